//! Points in the work of a stream, which other streams can wait for.

use std::ffi::{c_int, c_uint};
use std::ptr::null_mut;
use std::sync::Arc;

use anyhow::Result;

use super::driver::{Gpu, Handle};
use crate::Transfer;

/// CUDA_ERROR_NOT_READY.
const NOT_READY: c_int = 600;
/// CU_EVENT_DISABLE_TIMING: what is only waited for needs no clock.
const UNTIMED: c_uint = 2;

/// Where a stream's work stood when it was made.
pub(super) struct Event {
    gpu: Arc<Gpu>,
    handle: Handle,
}

// SAFETY: the handle is only passed to the driver, whose functions may be called from any thread.
unsafe impl Send for Event {}
// SAFETY: as above; nothing changes it after it is made.
unsafe impl Sync for Event {}

impl Event {
    /// The end of all work that a stream was given so far.
    ///
    /// # Errors
    /// When the driver has no room for it, or earlier work ended badly.
    pub(super) fn at_end_of(gpu: &Arc<Gpu>, stream: Handle) -> Result<Event> {
        let mut handle = null_mut();
        // SAFETY: the result goes to a variable.
        gpu.check(unsafe { (gpu.driver().cuEventCreate)(&mut handle, UNTIMED) })?;
        let event = Event { gpu: gpu.clone(), handle };
        // SAFETY: the event was made just now, the stream is alive.
        gpu.check(unsafe { (gpu.driver().cuEventRecord)(handle, stream) })?;
        Ok(event)
    }

    /// Work that a stream is given from now on waits for it.
    ///
    /// # Errors
    /// When earlier work ended badly.
    pub(super) fn hold_back(&self, stream: Handle) -> Result<()> {
        // SAFETY: both are alive.
        self.gpu.check(unsafe { (self.gpu.driver().cuStreamWaitEvent)(stream, self.handle, 0) })
    }

    /// Whether the stream is past it. Where the GPU has failed nothing goes on, and nothing is worth waiting for.
    pub(super) fn is_past(&self) -> bool {
        // SAFETY: the event is alive.
        let code = unsafe { (self.gpu.driver().cuEventQuery)(self.handle) };
        code != NOT_READY
    }

    /// Waits until the stream is past it, or the GPU has failed.
    pub(super) fn wait(&self) {
        // SAFETY: the event is alive. What failed is told by the next operation.
        unsafe { (self.gpu.driver().cuEventSynchronize)(self.handle) };
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let Some(f) = self.gpu.closing() else { return };
        // SAFETY: made once, given back once; work that waits for it goes on doing so. An error can change nothing any more.
        unsafe { (f.cuEventDestroy_v2)(self.handle) };
    }
}

/// Work on another stream than that of operations, which are held back until it is over where that is said.
pub(super) struct Aside(Event);

impl Aside {
    /// All work that a stream was given so far.
    ///
    /// # Errors
    /// As [`Event::at_end_of`].
    pub(super) fn until_now(gpu: &Arc<Gpu>, stream: Handle) -> Result<Aside> {
        Event::at_end_of(gpu, stream).map(Aside)
    }
}

impl Transfer for Aside {
    fn hold_back(&self) {
        let Event { gpu, .. } = &self.0;
        gpu.outside("waiting for what is done beside it");
        let held = self.0.hold_back(gpu.stream());
        held.unwrap_or_else(|error| gpu.fail(&format!("{error:#}")));
    }

    fn is_over(&self) -> bool {
        self.0.is_past()
    }

    fn wait(&self) {
        self.0.wait();
    }
}
