//! Devices of several ranks that exchange memory themselves, beside their other work.
//!
//! A [`Network`] opens a [`Link`] between the devices of some ranks. An [`Exchange`] on it takes a buffer, which is a
//! [`Flight`] until it [lands](Flight::land): what the device does afterwards waits for it, and the processor for nothing.
//! A [`Watch`] tells whether it is over.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};

use crate::{Buffer, DType, Element};

/// What the ranks of a link do with a buffer that each of them has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// Every rank gets the parts of all. There are as many equal parts as ranks, and a rank's own is in its place.
    AllGather,
    /// This rank's part, in its place, becomes the sum of everyone's there. The others are not to be used.
    ReduceScatter,
    /// The whole becomes the sum of everyone's.
    AllReduce,
    /// All get what one rank has.
    Broadcast {
        /// That rank.
        from: usize,
    },
    /// Another rank, which receives, gets what this one has.
    Send {
        /// That rank.
        to: usize,
    },
    /// This rank gets what another one sends.
    Receive {
        /// That rank.
        from: usize,
    },
}

/// What connects devices of one kind.
pub trait Network: Send + Sync {
    /// Name and version for people: "NCCL 2.32.3".
    fn describe(&self) -> String;
    /// What all ranks of one new link are to be given.
    ///
    /// # Errors
    /// When there is no way to be reached.
    fn invite(&self) -> Result<Vec<u8>>;
    /// Opens the link of this invitation as rank `rank` of `size`, once all of them do, unless `give_up` says not to wait for
    /// them any longer.
    ///
    /// # Errors
    /// When it cannot be opened, or not all come in time.
    fn open(
        &self,
        invitation: &[u8],
        rank: usize,
        size: usize,
        give_up: &dyn Fn() -> bool,
    ) -> Result<Arc<dyn Link>>;
}

/// The devices of some ranks. All of them start the same exchanges in the same order, which are done in this order.
pub trait Link: Send + Sync {
    /// Starts an exchange, after everything that the device was told to do before, and beside what it is told afterwards.
    ///
    /// # Errors
    /// When it cannot be started, or the link was given up.
    ///
    /// # Safety
    /// The memory is there, and nobody uses it, until the transfer is over or the device waits for it.
    unsafe fn start(&self, exchange: Exchange, memory: &Located) -> Result<Box<dyn Transfer>>;
    /// Whether all is well.
    ///
    /// # Errors
    /// When an exchange has failed.
    fn check(&self) -> Result<()>;
    /// Ends all exchanges, whose buffers then hold anything. There will be no others.
    fn abort(&self);
}

/// An exchange that was started.
pub trait Transfer: Send + Sync {
    /// What the device is told to do from now on waits for it.
    fn hold_back(&self);
    /// Whether it is over.
    fn is_over(&self) -> bool;
    /// Waits until it is.
    fn wait(&self);
}

/// Memory of a device, for its own [`Link`]s.
#[derive(Clone, Copy, Debug)]
pub struct Located {
    /// Which device: a number that no other has.
    pub(crate) device: usize,
    pub(crate) address: u64,
    /// Elements.
    pub(crate) len: usize,
    pub(crate) dtype: DType,
}

/// A buffer that is being exchanged. Dropping it is harmless: its memory is given back when that is over.
#[must_use = "the buffer comes back from `land`"]
pub struct Flight<B: Send + 'static> {
    buffer: Option<B>,
    shared: Arc<Shared>,
}

/// Tells when an exchange is over.
pub struct Watch(Arc<Shared>);

struct Shared {
    transfer: Box<dyn Transfer>,
    /// The buffer of a flight that nobody waits for.
    left: Mutex<Option<Box<dyn Send>>>,
}

impl<B: Send + 'static> Flight<B> {
    /// Starts an exchange of a buffer.
    ///
    /// # Errors
    /// When it cannot be started, or no link reaches the buffer.
    pub fn start<T: Element>(link: &dyn Link, exchange: Exchange, buffer: B) -> Result<Self>
    where
        B: Buffer<T>,
    {
        let located = buffer.located().context("memory that no link reaches was to be exchanged")?;
        // SAFETY: the flight has the buffer until the device waits for the transfer, and leaves it with `shared`, which lives
        // until the transfer is over, otherwise.
        let transfer = unsafe { link.start(exchange, &located) }?;
        Ok(Flight { buffer: Some(buffer), shared: Arc::new(Shared { transfer, left: Mutex::default() }) })
    }

    /// To know when it is over.
    pub fn watch(&self) -> Watch {
        Watch(self.shared.clone())
    }

    /// The buffer, to be used by the device: what it does with it waits until the exchange is over.
    pub fn land(mut self) -> B {
        self.shared.transfer.hold_back();
        self.buffer.take().expect("a flight lands once")
    }
}

impl<B: Send + 'static> Drop for Flight<B> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            *self.shared.left.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(buffer));
        }
    }
}

impl Watch {
    /// Whether the exchange is over.
    pub fn is_over(&self) -> bool {
        self.0.transfer.is_over()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.left.get_mut().unwrap_or_else(PoisonError::into_inner).is_some() {
            self.transfer.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

    /// A link whose exchanges are over when it is told, and a buffer that counts how often its memory was given back.
    #[derive(Clone, Default)]
    struct Slow {
        over: Arc<AtomicBool>,
        waited: Arc<AtomicBool>,
        freed: Arc<AtomicUsize>,
    }

    impl Transfer for Slow {
        fn hold_back(&self) {
            self.waited.store(true, SeqCst);
        }

        fn is_over(&self) -> bool {
            self.over.load(SeqCst)
        }

        fn wait(&self) {
            assert_eq!(self.freed.load(SeqCst), 0, "memory is given back while it is in use");
            self.over.store(true, SeqCst);
        }
    }

    impl Link for Slow {
        unsafe fn start(&self, _: Exchange, _: &Located) -> Result<Box<dyn Transfer>> {
            Ok(Box::new(self.clone()))
        }

        fn check(&self) -> Result<()> {
            Ok(())
        }

        fn abort(&self) {}
    }

    struct Counted(Slow);

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.freed.fetch_add(1, SeqCst);
        }
    }

    impl Buffer<f32> for Counted {
        fn len(&self) -> usize {
            0
        }

        fn host(&self) -> Option<&[f32]> {
            None
        }

        fn host_mut(&mut self) -> Option<&mut [f32]> {
            None
        }

        fn read(&self, _: usize, _: &mut [f32]) {}

        fn write(&mut self, _: usize, _: &[f32]) {}

        fn located(&self) -> Option<Located> {
            Some(Located { device: 0, address: 0, len: 0, dtype: DType::F32 })
        }
    }

    #[test]
    fn memory_stays_until_nobody_uses_it() {
        let fly = |slow: &Slow| {
            Flight::start::<f32>(slow, Exchange::AllReduce, Counted(slow.clone())).expect("a flight")
        };
        let freed = |slow: &Slow| slow.freed.load(SeqCst);
        // The device waits, so the buffer may be used by it.
        let slow = Slow::default();
        let landed = fly(&slow).land();
        assert!(slow.waited.load(SeqCst) && freed(&slow) == 0);
        drop(landed);
        // Nobody waits, but somebody watches.
        let slow = Slow::default();
        let flight = fly(&slow);
        let watch = flight.watch();
        drop(flight);
        assert!(!watch.is_over() && freed(&slow) == 0);
        slow.over.store(true, SeqCst);
        assert!(watch.is_over() && freed(&slow) == 0);
        drop(watch);
        assert_eq!(freed(&slow), 1);
        // Nobody even watches.
        let slow = Slow::default();
        drop(fly(&slow));
        assert!(slow.is_over() && freed(&slow) == 1);
    }
}
