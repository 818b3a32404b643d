//! Buffers that their device is done with.

use std::marker::PhantomData;

use crate::{Buffer, Element};

/// A buffer that the processor reaches and the device is done with. It is told nothing of it as long as the buffer is in here, so
/// the memory is read and written without waiting for the device once more: by threads that must never do so.
pub struct AtRest<T, B> {
    buffer: B,
    element: PhantomData<fn() -> T>,
}

impl<T: Element, B: Buffer<T>> AtRest<T, B> {
    /// Waits until the device is done with the buffer.
    ///
    /// # Errors
    /// The buffer, where the processor does not reach its memory.
    pub fn new(buffer: B) -> Result<Self, B> {
        match buffer.host().is_some() {
            true => Ok(AtRest { buffer, element: PhantomData }),
            false => Err(buffer),
        }
    }

    /// Its elements.
    pub fn elements(&self) -> &[T] {
        // SAFETY: `new` has called `host`, and nobody could tell the device to use the buffer since.
        unsafe { self.buffer.host_at_rest() }.unwrap_or_default()
    }

    /// Its elements, to be changed.
    pub fn elements_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { self.buffer.host_at_rest_mut() }.unwrap_or_default()
    }

    /// The buffer, to be used by the device again.
    pub fn into_buffer(self) -> B {
        self.buffer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    /// Memory that is waited for, each time that it is asked for.
    struct Pinned {
        values: Vec<f32>,
        reached: bool,
        waits: AtomicUsize,
    }

    impl Buffer<f32> for Pinned {
        fn len(&self) -> usize {
            self.values.len()
        }

        fn host(&self) -> Option<&[f32]> {
            self.waits.fetch_add(1, SeqCst);
            self.reached.then_some(&self.values)
        }

        fn host_mut(&mut self) -> Option<&mut [f32]> {
            self.waits.fetch_add(1, SeqCst);
            self.reached.then_some(&mut self.values)
        }

        unsafe fn host_at_rest(&self) -> Option<&[f32]> {
            Some(&self.values)
        }

        unsafe fn host_at_rest_mut(&mut self) -> Option<&mut [f32]> {
            Some(&mut self.values)
        }

        fn read(&self, _: usize, _: &mut [f32]) {}

        fn write(&mut self, _: usize, _: &[f32]) {}
    }

    #[test]
    fn the_device_is_waited_for_once() {
        let pinned = |reached| Pinned { values: vec![1.0, 2.0, 3.0], reached, waits: AtomicUsize::default() };
        let mut at_rest = AtRest::new(pinned(true)).ok().expect("the processor reaches it");
        at_rest.elements_mut()[1] = 5.0;
        assert_eq!(at_rest.elements(), [1.0, 5.0, 3.0]);
        let buffer = at_rest.into_buffer();
        assert_eq!((buffer.values[1], buffer.waits.load(SeqCst)), (5.0, 1));
        // What is not reached comes back as it is.
        assert_eq!(AtRest::new(pinned(false)).err().map(|buffer| buffer.values.len()), Some(3));
    }
}
