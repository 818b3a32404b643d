//! Sequences of operations that come again, started by one call: CUDA graphs.
//!
//! Starting a kernel takes the processor some microseconds, which a small model's step has a hundred of. A graph of all of
//! them is started at once. What it does is fixed when it is made: the kernels, their numbers and the addresses that they
//! read and write. So a graph is used only where the very same would be done now, which is found out each time: operations
//! first *note* what they would start, down to the last argument, and do nothing. If that was noted before, its graph is
//! started; else the operations run. There is no name for a sequence that a caller could get wrong, and nothing to be
//! declared invalid: where a buffer or a piece of workspace has moved, the notes are others.
//!
//! Where only a few kernels' arguments are others, as in each step of training those that say which random numbers dropout
//! takes, the graph is told those first.
//!
//! The first time a sequence runs as it is, which is when kernels are loaded and cuBLASLt's algorithms are chosen. The second
//! time it is recorded, on a stream of its own, so that what other threads do meanwhile goes its way.

use std::cell::RefCell;
use std::ffi::{c_int, c_uint};
use std::ptr::{null, null_mut};
use std::sync::{Arc, PoisonError};

use anyhow::Result;

use super::CudaDevice;
use super::driver::{Gpu, Handle};
use super::kernels::Call;
use super::switch;

/// Says whether sequences that come again are graphs, unless options do.
const VARIABLE: &str = "FERROPT_CUDA_GRAPHS";

/// Sequences that are remembered; the one that was not used for the longest time makes room. A step of decoding has two for each
/// number of rows that is small enough, its layers and its head, and with a draft as many again; one of training has three for
/// each layer, of which 175B has 96.
const KEPT: usize = 512;

/// CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what other threads do is not forbidden meanwhile.
const THREAD_LOCAL: c_uint = 1;

thread_local! {
    /// What this thread's operations do, while they are told to note it.
    static NOTES: RefCell<Option<Notes>> = const { RefCell::new(None) };
}

/// What operations would start, or are starting.
struct Notes {
    /// Of which device: two may share a GPU, and with it its context.
    gpu: *const Gpu,
    sequence: Sequence,
    /// Where they are recorded; null while they are only noted.
    recording: Handle,
    /// Where a graph of them has its kernels.
    nodes: Vec<Handle>,
    /// Memory was given back meanwhile, which what was noted before may have used.
    stale: bool,
}

impl Notes {
    /// Returns whether operations are only noted.
    fn add(&mut self, kind: Noted, words: impl IntoIterator<Item = u64>) -> bool {
        self.sequence.fixed.push(kind as u64);
        self.sequence.fixed.extend(words);
        self.recording.is_null()
    }
}

/// A sequence of operations: all that decides what it does.
#[derive(Default, PartialEq)]
struct Sequence {
    /// What they are, in order; of kernels all but their arguments.
    fixed: Vec<u64>,
    /// Kernels, in order.
    calls: Vec<Call>,
}

impl Sequence {
    /// Kernels whose arguments are others than in `known`, if a graph of that could do this with few changes. Where most
    /// are others, the sequences have nothing to do with each other, and each may come again.
    fn changed(&self, known: &Sequence) -> Option<Vec<usize>> {
        if self.fixed != known.fixed {
            return None;
        }
        let pairs = self.calls.iter().zip(&known.calls).enumerate();
        let changed: Vec<usize> = pairs.filter(|(_, (a, b))| a != b).map(|(i, _)| i).collect();
        (2 * changed.len() <= self.calls.len()).then_some(changed)
    }
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
        self.with_notes(|notes| notes.add(kind, words)).unwrap_or(false)
    }

    /// [`Gpu::note`] of a kernel, to be followed by [`Gpu::recorded`] when it was started.
    pub(super) fn note_call(&self, call: impl FnOnce() -> Call) -> bool {
        let only_noted = self.with_notes(|notes| {
            let call = call();
            let words = [call.function as u64].into_iter().chain(call.sizes.map(u64::from));
            let only_noted = notes.add(Noted::Kernel, words);
            notes.sequence.calls.push(call);
            only_noted
        });
        only_noted.unwrap_or(false)
    }

    /// Keeps where the kernel that was started last is in what is recorded, if it is.
    pub(super) fn recorded(&self) {
        let Some(stream) = self.recording() else { return };
        let (mut state, mut last, mut count) = (0, null(), 0);
        // SAFETY: the stream is alive; results go to variables, or nowhere. The nodes stay where they are until the stream
        // is given more to do.
        let node = unsafe {
            let (nothing, no_graph) = (null_mut(), null_mut());
            let info = self.driver().cuStreamGetCaptureInfo_v2;
            let code = info(stream, &mut state, nothing, no_graph, &mut last, &mut count);
            self.expect("nothing is known of what is recorded", code);
            if count != 1 {
                self.fail(&format!("a kernel was recorded, but {count} operations are the last ones"));
            }
            *last
        };
        self.with_notes(|notes| notes.nodes.push(node));
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

    /// What `work` starts, and where its kernels are in what is recorded; absent if memory was given back on the way. Nothing is
    /// started where `stream` is null; else it is recorded there.
    fn noted(&self, stream: Handle, work: &mut dyn FnMut()) -> Option<(Sequence, Vec<Handle>)> {
        /// Takes the notes away, also where an operation panics.
        struct End;
        impl Drop for End {
            fn drop(&mut self) {
                NOTES.take();
            }
        }
        let (sequence, nodes) = (Sequence::default(), Vec::new());
        NOTES.set(Some(Notes { gpu: self, sequence, recording: stream, nodes, stale: false }));
        let end = End;
        work();
        let notes = NOTES.take();
        drop(end);
        notes.filter(|notes| !notes.stale).map(|notes| (notes.sequence, notes.nodes))
    }
}

/// A sequence, ready to be started.
struct Graph {
    gpu: Arc<Gpu>,
    handle: Handle,
    /// What it was made of, whose nodes name its kernels, in order.
    recorded: Handle,
    nodes: Vec<Handle>,
}

impl Graph {
    /// Records `work`, if it does what was noted before.
    fn record(gpu: &Arc<Gpu>, noted: &Sequence, work: &mut dyn FnMut()) -> Option<Graph> {
        let recording = Recording::begin(gpu);
        let made = gpu.noted(recording.stream, work);
        let recorded = recording.end();
        let mut graph = Graph { gpu: gpu.clone(), handle: null_mut(), recorded, nodes: Vec::new() };
        let (sequence, nodes) = made?;
        if sequence != *noted {
            return None;
        }
        // SAFETY: the graph is whole; the result goes to a variable.
        let code = unsafe { (gpu.driver().cuGraphInstantiateWithFlags)(&mut graph.handle, recorded, 0) };
        gpu.expect("a graph cannot be made of what was recorded", code);
        graph.nodes = nodes;
        Some(graph)
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
        // SAFETY: made once, given back once. An error can change nothing any more.
        unsafe { (f.cuGraphDestroy)(self.recorded) };
        if !self.handle.is_null() {
            // It may still be at work.
            self.gpu.wait();
            // SAFETY: as above.
            unsafe { (f.cuGraphExecDestroy)(self.handle) };
        }
    }
}

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
    /// As it was the last time.
    sequence: Sequence,
    /// From the second time on.
    graph: Option<Graph>,
    /// When it was met last.
    met: u64,
}

// SAFETY: handles are only passed to the driver, whose functions may be called from any thread, by one at a time.
unsafe impl Send for Known {}

impl Known {
    /// Makes it what `sequence` is, of which `changed` kernels have other arguments.
    fn become_like(&mut self, mut sequence: Sequence, changed: &[usize]) {
        if let Some(graph) = &self.graph {
            for i in changed {
                sequence.calls[*i].put(&graph.gpu, graph.handle, graph.nodes[*i]);
            }
        }
        self.sequence = sequence;
    }
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
    fn meet(&mut self, sequence: Sequence) -> (&mut Known, bool) {
        self.met += 1;
        // The one that has to change least.
        let alike = self.known.iter().map(|known| sequence.changed(&known.sequence)).enumerate();
        let found =
            alike.filter_map(|(i, changed)| Some((i, changed?))).min_by_key(|(_, changed)| changed.len());
        let new = found.is_none();
        let at = match found {
            Some((at, changed)) => {
                self.known[at].become_like(sequence, &changed);
                at
            }
            None => {
                if self.known.len() >= KEPT {
                    let oldest = (0..self.known.len()).min_by_key(|i| self.known[*i].met).unwrap_or(0);
                    self.known.swap_remove(oldest);
                }
                self.known.push(Known { sequence, graph: None, met: 0 });
                self.known.len() - 1
            }
        };
        self.known[at].met = self.met;
        (&mut self.known[at], new)
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
    let Some((sequence, _)) = d.gpu.noted(null_mut(), work) else { return false };
    let (known, new) = graphs.meet(sequence);
    if new {
        return false;
    }
    if known.graph.is_none() {
        known.graph = Graph::record(&d.gpu, &known.sequence, work);
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
        let mut new = |n: u64| graphs.meet(Sequence { fixed: vec![n], calls: Vec::new() }).1;
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
