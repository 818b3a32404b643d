//! Devices of several ranks that exchange memory themselves, beside their other work.
//!
//! A [`Network`] opens a [`Link`] between the devices of some ranks. An [`Exchange`] on it takes a buffer, which is a
//! [`Flight`] until it [lands](Flight::land): what the device does afterwards waits for it, and the processor for nothing.
//! Several that start together are a [`Departure`]. A [`Watch`] tells whether they are over.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

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
    /// Starts exchanges together, after everything that the device was told to do before, and beside what it is told afterwards.
    /// All ranks start the same ones together.
    ///
    /// # Errors
    /// When they cannot be started, or the link was given up.
    ///
    /// # Safety
    /// The memory is there, and nobody uses it, until the transfer is over or the device waits for it.
    unsafe fn start(&self, exchanges: &[(Exchange, Located)]) -> Result<Box<dyn Transfer>>;
    /// Whether all is well. The device is not asked.
    ///
    /// # Errors
    /// When an exchange has failed.
    fn check(&self) -> Result<()>;
    /// Ends all exchanges, whose buffers then hold anything. There will be no others.
    fn abort(&self);
}

/// What a device does beside its other work, such as exchanges that were started together.
pub trait Transfer: Send + Sync {
    /// What the device is told to do from now on waits for it; [beside](crate::Device::beside) other work, what is told there.
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

/// Exchanges that are going to start together, which takes the processor hardly longer than starting one of them.
pub struct Departure<'l> {
    link: &'l dyn Link,
    exchanges: Vec<(Exchange, Located)>,
    shared: Arc<Shared>,
}

/// A buffer that is being exchanged, once its [`Departure`] has started. Dropping it is harmless: its memory is given back when
/// that is over.
#[must_use = "the buffer comes back from `land`"]
pub struct Flight<B: Send + 'static> {
    buffer: Option<B>,
    shared: Arc<Shared>,
}

/// Tells when the exchanges of a departure are over. Memory of those that nobody waits for is given back where it is dropped.
pub struct Watch(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// None until they have started.
    transfer: OnceLock<Box<dyn Transfer>>,
    /// The buffers of flights that nobody waits for.
    left: Mutex<Vec<Box<dyn Send>>>,
}

impl<'l> Departure<'l> {
    /// Of no exchange yet.
    pub fn new(link: &'l dyn Link) -> Self {
        Departure { link, exchanges: Vec::new(), shared: Arc::default() }
    }

    /// Takes a buffer along.
    ///
    /// # Errors
    /// When no link reaches it.
    pub fn board<T: Element, B: Buffer<T> + 'static>(
        &mut self,
        exchange: Exchange,
        buffer: B,
    ) -> Result<Flight<B>> {
        let located = buffer.located().context("memory that no link reaches was to be exchanged")?;
        self.exchanges.push((exchange, located));
        Ok(Flight { buffer: Some(buffer), shared: self.shared.clone() })
    }

    /// Starts all of them.
    ///
    /// # Errors
    /// When they cannot be started.
    pub fn start(self) -> Result<Watch> {
        // SAFETY: each flight has its buffer until the device waits for the transfer, and before there is one it does not give
        // it away; otherwise it leaves it with `shared`, which lives until the transfer is over.
        let transfer = unsafe { self.link.start(&self.exchanges) }?;
        // Nobody else sets it: this departure is used up.
        let _ = self.shared.transfer.set(transfer);
        Ok(Watch(self.shared))
    }
}

impl<B: Send + 'static> Flight<B> {
    /// Starts a single exchange.
    ///
    /// # Errors
    /// When it cannot be started, or no link reaches the buffer.
    pub fn start<T: Element>(link: &dyn Link, exchange: Exchange, buffer: B) -> Result<Self>
    where
        B: Buffer<T>,
    {
        let mut departure = Departure::new(link);
        let flight = departure.board(exchange, buffer)?;
        departure.start()?;
        Ok(flight)
    }

    /// The buffer, to be used by the device: what it does with it waits until the exchange is over.
    ///
    /// # Errors
    /// When the exchange was not started.
    pub fn land(mut self) -> Result<B> {
        let transfer = self.shared.transfer.get();
        transfer.context("an exchange that was not started was waited for")?.hold_back();
        Ok(self.buffer.take().expect("a flight lands once"))
    }
}

impl<B: Send + 'static> Drop for Flight<B> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.shared.left.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(buffer));
        }
    }
}

impl Watch {
    /// Whether the exchanges are over. Asks the device, which may have to do something else before it answers.
    pub fn is_over(&self) -> bool {
        self.0.transfer.get().is_none_or(|transfer| transfer.is_over())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let left = self.left.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let (false, Some(transfer)) = (left.is_empty(), self.transfer.get()) {
            transfer.wait();
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
        /// How many exchanges each start was of.
        started: Arc<Mutex<Vec<usize>>>,
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
            assert_eq!(self.freed.load(SeqCst), 0, "memory was given back while it was in use");
            self.over.store(true, SeqCst);
        }
    }

    impl Link for Slow {
        unsafe fn start(&self, exchanges: &[(Exchange, Located)]) -> Result<Box<dyn Transfer>> {
            self.started.lock().expect("nobody has panicked").push(exchanges.len());
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
        let watched = |slow: &Slow| {
            let mut departure = Departure::new(slow);
            let flight = departure.board::<f32, _>(Exchange::AllReduce, Counted(slow.clone()));
            (flight.expect("a flight"), departure.start().expect("a start"))
        };
        let fly = |slow: &Slow| {
            Flight::start::<f32>(slow, Exchange::AllReduce, Counted(slow.clone())).expect("a flight")
        };
        let freed = |slow: &Slow| slow.freed.load(SeqCst);
        // The device waits, so the buffer may be used by it.
        let slow = Slow::default();
        let landed = fly(&slow).land().expect("it has started");
        assert!(slow.waited.load(SeqCst) && freed(&slow) == 0);
        drop(landed);
        // Nobody waits, but somebody watches.
        let slow = Slow::default();
        let (flight, watch) = watched(&slow);
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

    #[test]
    fn what_starts_together_lands_one_by_one() {
        let slow = Slow::default();
        let freed = || slow.freed.load(SeqCst);
        let mut departure = Departure::new(&slow);
        let mut board = || {
            let buffer = Counted(slow.clone());
            departure.board::<f32, _>(Exchange::AllReduce, buffer).expect("a flight")
        };
        let (early, first, second, dropped) = (board(), board(), board(), board());
        // A buffer that is going to be exchanged is not given away, and not given back.
        assert!(early.land().is_err() && !slow.waited.load(SeqCst) && freed() == 0);
        let watch = departure.start().expect("a start");
        assert_eq!(*slow.started.lock().expect("nobody has panicked"), [4]);
        drop(second.land().expect("it has started"));
        assert!(slow.waited.load(SeqCst) && freed() == 1);
        // What nobody waits for stays as long as somebody else may ask whether it is over.
        slow.freed.store(0, SeqCst);
        drop(dropped);
        slow.over.store(true, SeqCst);
        drop(first.land().expect("it has started"));
        assert!(watch.is_over() && freed() == 1);
        slow.freed.store(0, SeqCst);
        drop(watch);
        assert_eq!(freed(), 2);
    }
}
