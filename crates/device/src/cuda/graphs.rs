//! Sequences of operations that come again, started by one call: CUDA graphs.
//!
//! Starting a kernel takes the processor some microseconds, which a small model's step has a hundred of. A graph of all of
//! them is started at once. What it does is fixed when it is made: the kernels, their numbers and the addresses that they
//! read and write. So a graph is used only where the very same would be done now, which is found out each time: operations
//! first *note* what they would start, down to the last argument, and do nothing. If that was noted before, its graph is
//! started; else the operations run. There is no name for a sequence that a caller could get wrong, and nothing to be
//! declared invalid: where a buffer or a piece of workspace has moved, the notes are others.
//!
//! The first time a sequence runs as it is, which is when kernels are loaded and cuBLASLt's algorithms are chosen. The second
//! time it is recorded, on a stream of its own, so that what other threads do meanwhile goes its way.

use std::cell::RefCell;
use std::ffi::{c_int, c_uint};
use std::ptr::null_mut;
use std::sync::{Arc, PoisonError};

use anyhow::Result;

use super::CudaDevice;
use super::driver::{Gpu, Handle};
use super::switch;

/// Says whether sequences that come again are graphs, unless options do.
const VARIABLE: &str = "FERROPT_CUDA_GRAPHS";

/// Sequences that are remembered; the one that was not used for the longest time makes room. A step has two for each number
/// of rows that is small enough, its layers and its head, and with a draft as many again.
const KEPT: usize = 256;

/// CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what other threads do is not forbidden meanwhile.
const THREAD_LOCAL: c_uint = 1;

thread_local! {
    /// What this thread's operations do, while they are told to note it.
    static NOTES: RefCell<Option<Notes>> = const { RefCell::new(None) };
}

/// What operations would start, or are starting, in order.
struct Notes {
    /// Of which device: two may share a GPU, and with it its context.
    gpu: *const Gpu,
    words: Vec<u64>,
    /// Where they are recorded; null while they are only noted.
    recording: Handle,
    /// Memory was given back meanwhile, which what was noted before may have used.
    stale: bool,
}

/// What kind of operation a note is of.
#[derive(Clone, Copy)]
pub(super) enum Noted {
    Kernel,
    Product,
    Copy,
    Clear,
}

impl Gpu {
    fn with_notes<R>(&self, f: impl FnOnce(&mut Notes) -> R) -> Option<R> {
        NOTES.with_borrow_mut(|notes| notes.as_mut().filter(|notes| std::ptr::eq(notes.gpu, self)).map(f))
    }

    /// To be called by every operation before it starts something, with all that decides what that does. Returns whether it
    /// is not to be started now.
    pub(super) fn note(&self, kind: Noted, words: impl IntoIterator<Item = u64>) -> bool {
        let only_noted = self.with_notes(|notes| {
            notes.words.push(kind as u64);
            notes.words.extend(words);
            notes.recording.is_null()
        });
        only_noted.unwrap_or(false)
    }

    /// To be called before memory is given back.
    pub(super) fn note_free(&self) {
        self.with_notes(|notes| notes.stale = true);
    }

    /// To be called by what cannot be a part of a sequence that comes again.
    ///
    /// # Panics
    /// When it is one.
    pub(super) fn outside(&self, what: &str) {
        let inside = self.with_notes(|_| ()).is_some();
        assert!(
            !inside,
            "{what} is among operations that are repeated (Device::repeated); it must be before or after them"
        );
    }

    /// Where operations of this thread are recorded, if they are.
    pub(super) fn recording(&self) -> Option<Handle> {
        self.with_notes(|notes| notes.recording).filter(|stream| !stream.is_null())
    }

    /// What `work` starts; absent if memory was given back on the way. Nothing is started where `stream` is null; else it is
    /// recorded there.
    fn noted(&self, stream: Handle, work: &mut dyn FnMut()) -> Option<Vec<u64>> {
        /// Takes the notes away, also where an operation panics.
        struct End;
        impl Drop for End {
            fn drop(&mut self) {
                NOTES.take();
            }
        }
        NOTES.set(Some(Notes { gpu: self, words: Vec::new(), recording: stream, stale: false }));
        let end = End;
        work();
        let notes = NOTES.take();
        drop(end);
        notes.filter(|notes| !notes.stale).map(|notes| notes.words)
    }
}

/// A sequence, ready to be started.
struct Graph {
    gpu: Arc<Gpu>,
    handle: Handle,
}

impl Graph {
    /// Records `work`, if it does what was noted before.
    fn record(gpu: &Arc<Gpu>, noted: &[u64], work: &mut dyn FnMut()) -> Option<Graph> {
        let recording = Recording::begin(gpu);
        let same = gpu.noted(recording.stream, work).is_some_and(|words| words == noted);
        let graph = recording.end();
        let mut handle = null_mut();
        if same {
            // SAFETY: the graph is whole; the result goes to a variable.
            let code = unsafe { (gpu.driver().cuGraphInstantiateWithFlags)(&mut handle, graph, 0) };
            gpu.expect("a graph cannot be made of what was recorded", code);
        }
        // SAFETY: made by `end`, given back once; what was made of it does not need it.
        gpu.expect("no graph", unsafe { (gpu.driver().cuGraphDestroy)(graph) });
        same.then(|| Graph { gpu: gpu.clone(), handle })
    }

    fn start(&self) {
        // SAFETY: the same operations would be started one by one now, so that all memory that they use is alive until the
        // work on the stream is done (see `Kernels::launch`).
        let code = unsafe { (self.gpu.driver().cuGraphLaunch)(self.handle, self.gpu.stream()) };
        self.gpu.expect("a graph does not start", code);
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let Some(f) = self.gpu.closing() else { return };
        // It may still be at work.
        self.gpu.wait();
        // SAFETY: made once, given back once. An error can change nothing any more.
        unsafe { (f.cuGraphExecDestroy)(self.handle) };
    }
}

// SAFETY: the handle is only passed to the driver, whose functions may be called from any thread, by one at a time.
unsafe impl Send for Graph {}

/// A stream that records. Given back also where an operation panics.
struct Recording<'g> {
    gpu: &'g Gpu,
    stream: Handle,
}

impl<'g> Recording<'g> {
    fn begin(gpu: &'g Gpu) -> Recording<'g> {
        let stream = gpu.new_stream().unwrap_or_else(|e| gpu.fail(&format!("no stream to record on: {e:#}")));
        // SAFETY: the stream was made just now.
        let code = unsafe { (gpu.driver().cuStreamBeginCapture_v2)(stream, THREAD_LOCAL) };
        gpu.expect("nothing can be recorded", code);
        Recording { gpu, stream }
    }

    /// What was recorded.
    fn end(self) -> Handle {
        let mut graph = null_mut();
        self.gpu.expect("what was recorded cannot be repeated", self.take(&mut graph));
        graph
    }

    fn take(&self, graph: &mut Handle) -> c_int {
        // SAFETY: the stream is alive, the result goes to a variable.
        unsafe { (self.gpu.driver().cuStreamEndCapture)(self.stream, graph) }
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        let mut graph = null_mut();
        // Where it has ended this is an error that changes nothing.
        self.take(&mut graph);
        self.gpu.give_back_stream(self.stream);
    }
}

/// A sequence that was met.
struct Known {
    noted: Vec<u64>,
    /// From the second time on.
    graph: Option<Graph>,
    /// When it was met last.
    met: u64,
}

/// Sequences of a device.
pub(super) struct Graphs {
    /// Whether sequences are kept at all.
    wanted: bool,
    known: Vec<Known>,
    /// How often a sequence was met, and a graph started.
    met: u64,
    started: u64,
}

impl Graphs {
    /// `wanted`, or as the environment says.
    ///
    /// # Errors
    /// When that says something else than 0 or 1.
    pub(super) fn new(wanted: Option<bool>) -> Result<Graphs> {
        let wanted = match wanted {
            Some(wanted) => wanted,
            None => switch::is_on(VARIABLE, "start the operations of a step one by one")?,
        };
        Ok(Graphs { wanted, known: Vec::new(), met: 0, started: 0 })
    }

    /// Graphs started so far.
    pub(super) fn started(&self) -> u64 {
        self.started
    }

    /// The sequence, and whether it is new.
    fn meet(&mut self, noted: Vec<u64>) -> (&mut Known, bool) {
        self.met += 1;
        let found = self.known.iter().position(|known| known.noted == noted);
        let at = found.unwrap_or_else(|| {
            if self.known.len() >= KEPT {
                let oldest = (0..self.known.len()).min_by_key(|i| self.known[*i].met).unwrap_or(0);
                self.known.swap_remove(oldest);
            }
            self.known.push(Known { noted, graph: None, met: 0 });
            self.known.len() - 1
        });
        self.known[at].met = self.met;
        (&mut self.known[at], found.is_none())
    }
}

/// [`crate::Device::repeated`].
pub(super) fn repeated(d: &CudaDevice, work: &mut dyn FnMut()) {
    // Within another sequence it is a part of that.
    if d.gpu.with_notes(|_| ()).is_some() {
        return work();
    }
    let mut graphs = d.graphs.lock().unwrap_or_else(PoisonError::into_inner);
    if !graphs.wanted || !start(d, &mut graphs, work) {
        drop(graphs);
        work();
    }
}

/// Starts the graph of `work`, if there is one or it is time to make it.
fn start(d: &CudaDevice, graphs: &mut Graphs, work: &mut dyn FnMut()) -> bool {
    let moved = || [d.loss_workspace().moved(), d.workspace().moved()];
    let before = moved();
    let Some(noted) = d.gpu.noted(null_mut(), work) else { return false };
    let (known, new) = graphs.meet(noted);
    if new {
        return false;
    }
    if known.graph.is_none() {
        known.graph = Graph::record(&d.gpu, &known.noted, work);
    }
    let Some(graph) = &known.graph else { return false };
    // Workspace is held until the work that uses it is on the stream, as by a single operation: another thread may want it,
    // and may have made it larger meanwhile.
    let (of_loss, of_others) = (d.loss_workspace(), d.workspace());
    if [of_loss.moved(), of_others.moved()] != before {
        return false;
    }
    graph.start();
    graphs.started += 1;
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_met_longest_ago_is_forgotten() {
        let mut graphs = Graphs::new(Some(true)).unwrap();
        let mut new = |n: u64| graphs.meet(vec![n]).1;
        assert!(new(0) && !new(0));
        for n in 1..KEPT as u64 {
            assert!(new(n));
        }
        assert!(!new(0), "all are known");
        assert!(new(KEPT as u64), "one more");
        assert!(!new(0) && new(1), "it took the place of the one that was met longest ago");
        assert_eq!(graphs.known.len(), KEPT);
    }

    #[test]
    #[ignore = "needs a GPU, real or emulated; scripts/check-cuda-kernels runs it"]
    fn a_graph_cannot_wait() {
        let gpu = Gpu::open(0).unwrap();
        let recording = Recording::begin(&gpu);
        let wrong = |code| format!("{:#}", gpu.check(code).unwrap_err());
        // SAFETY: the stream is alive.
        let waiting = wrong(unsafe { (gpu.driver().cuStreamSynchronize)(recording.stream) });
        assert!(waiting.contains("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"), "{waiting}");
        let ended = wrong(recording.take(&mut null_mut()));
        assert!(ended.contains("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"), "{ended}");
    }
}
