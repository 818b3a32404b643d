//! What nobody waits for any more. Giving memory back to a device may wait for all that the device does, and that for a rank that
//! is lost. So the threads that end such waiting give back nothing: whoever calls operations does, when it calls the next one.

use std::sync::{Arc, Mutex, PoisonError};

/// Things to be given back by a caller. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Left(Arc<Mutex<Vec<Box<dyn Send>>>>);

impl Left {
    /// Leaves something to the callers.
    pub(crate) fn leave(&self, what: impl Send + 'static) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(what));
    }

    /// Gives all of it back, on this thread.
    pub(crate) fn give_back(&self) {
        // Not under the lock, for which the others would wait.
        let all = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        drop(all);
    }
}
