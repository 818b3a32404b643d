//! CUDA's driver: a GPU's memory, its stream of work, and errors in words.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Once, OnceLock};

use anyhow::{Context as _, Result, bail, ensure};

use super::graphs::Noted;
use super::library::{Library, Wanted, functions};

/// Handle of something in the driver.
pub(super) type Handle = *mut c_void;
/// Address in a GPU's memory.
pub(super) type Address = u64;

functions! {
    /// Functions of libcuda (cuda.h). All return 0 or the number of an error.
    Functions {
        fn cuInit(c_uint) -> c_int;
        fn cuDriverGetVersion(*mut c_int) -> c_int;
        fn cuDeviceGetCount(*mut c_int) -> c_int;
        fn cuDeviceGet(*mut c_int, c_int) -> c_int;
        fn cuDeviceGetName(*mut c_char, c_int, c_int) -> c_int;
        fn cuDeviceGetAttribute(*mut c_int, c_int, c_int) -> c_int;
        fn cuDeviceTotalMem_v2(*mut usize, c_int) -> c_int;
        fn cuDevicePrimaryCtxRetain(*mut Handle, c_int) -> c_int;
        fn cuDevicePrimaryCtxRelease_v2(c_int) -> c_int;
        fn cuCtxSetCurrent(Handle) -> c_int;
        fn cuGetErrorName(c_int, *mut *const c_char) -> c_int;
        fn cuGetErrorString(c_int, *mut *const c_char) -> c_int;
        fn cuMemGetInfo_v2(*mut usize, *mut usize) -> c_int;
        fn cuMemAlloc_v2(*mut Address, usize) -> c_int;
        fn cuMemFree_v2(Address) -> c_int;
        fn cuMemHostAlloc(*mut *mut c_void, usize, c_uint) -> c_int;
        fn cuMemFreeHost(*mut c_void) -> c_int;
        fn cuMemsetD8Async(Address, u8, usize, Handle) -> c_int;
        fn cuMemcpyHtoDAsync_v2(Address, *const c_void, usize, Handle) -> c_int;
        fn cuMemcpyDtoHAsync_v2(*mut c_void, Address, usize, Handle) -> c_int;
        fn cuMemcpyAsync(Address, Address, usize, Handle) -> c_int;
        fn cuStreamCreate(*mut Handle, c_uint) -> c_int;
        fn cuStreamDestroy_v2(Handle) -> c_int;
        fn cuStreamSynchronize(Handle) -> c_int;
        fn cuStreamWaitEvent(Handle, Handle, c_uint) -> c_int;
        fn cuStreamBeginCapture_v2(Handle, c_uint) -> c_int;
        fn cuStreamEndCapture(Handle, *mut Handle) -> c_int;
        fn cuStreamGetCaptureInfo_v2(
            Handle, *mut c_int, *mut u64, *mut Handle, *mut *const Handle, *mut usize
        ) -> c_int;
        fn cuGraphInstantiateWithFlags(*mut Handle, Handle, u64) -> c_int;
        fn cuGraphDestroy(Handle) -> c_int;
        fn cuGraphLaunch(Handle, Handle) -> c_int;
        fn cuGraphExecKernelNodeSetParams(Handle, Handle, *const KernelNode) -> c_int;
        fn cuGraphExecDestroy(Handle) -> c_int;
        fn cuEventCreate(*mut Handle, c_uint) -> c_int;
        fn cuEventDestroy_v2(Handle) -> c_int;
        fn cuEventRecord(Handle, Handle) -> c_int;
        fn cuEventQuery(Handle) -> c_int;
        fn cuEventSynchronize(Handle) -> c_int;
        fn cuEventElapsedTime(*mut f32, Handle, Handle) -> c_int;
        fn cuModuleLoadData(*mut Handle, *const c_void) -> c_int;
        fn cuModuleUnload(Handle) -> c_int;
        fn cuModuleGetFunction(*mut Handle, Handle, *const c_char) -> c_int;
        fn cuFuncGetAttribute(*mut c_int, c_int, Handle) -> c_int;
        fn cuFuncSetAttribute(Handle, c_int, c_int) -> c_int;
        fn cuLaunchKernel(
            Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void
        ) -> c_int;
    }
}

/// CUDA_KERNEL_NODE_PARAMS_v1: a kernel in a graph.
#[repr(C)]
pub(super) struct KernelNode {
    pub function: Handle,
    /// In x, y and z, as those of a block.
    pub blocks: [c_uint; 3],
    pub threads: [c_uint; 3],
    pub shared: c_uint,
    pub arguments: *mut *mut c_void,
    pub extra: *mut *mut c_void,
}

const DRIVER: Wanted = Wanted {
    what: "NVIDIA's driver",
    files: &["libcuda.so.1"],
    packages: &[],
    loads: None,
    install: "Install the driver of the GPU (https://www.nvidia.com/drivers)",
    since: "CUDA 12",
};

const OUT_OF_MEMORY: c_int = 2;
/// CUdevice_attribute.
const MULTIPROCESSORS: c_int = 16;
const CAPABILITY: (c_int, c_int) = (75, 76);
const PAGEABLE_MEMORY_ACCESS: c_int = 88;
const MOST_SHARED_MEMORY: c_int = 97;
/// Work on this stream does not wait for that on the default one.
const NON_BLOCKING: c_uint = 1;
/// Pinned memory that kernels reach.
const MAPPED: c_uint = 2;

/// How many streams of a GPU the driver keeps apart: 8 unless it is told otherwise, 32 at most. Further ones share a queue, in
/// which one waits for what the other waits for: an exchange with a rank that may itself be waiting. Each link to other ranks has a
/// stream, and NCCL has more.
const QUEUES: (&str, &str) = ("CUDA_DEVICE_MAX_CONNECTIONS", "32");

/// Version of the driver (580) with which libraries of CUDA 13 work. With an earlier one they load all the same, and fail later.
pub(super) const CUDA_13: c_int = 13_000;

fn gib(bytes: usize) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

thread_local! {
    /// The context that this thread works in.
    static CURRENT: Cell<Handle> = const { Cell::new(null_mut()) };
}

/// One GPU, the stream on which its work is done in order, and those for what is done beside that.
pub(super) struct Gpu {
    functions: Functions,
    device: c_int,
    context: Handle,
    stream: Handle,
    /// Made when something is done beside other work, see lanes.rs.
    pub(super) lanes: OnceLock<[Handle; 2]>,
    /// Bytes of its memory that are taken.
    taken: AtomicU64,
    /// Whether it has failed, which it does for good: nothing can be given back to it any more.
    failed: AtomicBool,
    /// As the driver calls it.
    pub name: String,
    /// Compute capability: 9 and 0 for Hopper.
    pub capability: (c_int, c_int),
    /// Number of multiprocessors.
    pub multiprocessors: usize,
    /// Most bytes of shared memory that a block can have, if a kernel asks for so many.
    pub shared: usize,
    /// The driver's version of CUDA: 12040 for 12.4.
    pub version: c_int,
    /// Whether the GPU reaches ordinary memory of the host (GH200, HMM). Only where it does not, the driver promises to have
    /// taken what is uploaded when the call returns.
    reads_late: bool,
}

// SAFETY: the driver's functions may be called from any thread; the handles are only passed to them.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// GPUs that the driver sees.
    ///
    /// # Errors
    /// When the driver is missing or refuses.
    pub(super) fn count() -> Result<usize> {
        start().map(|(_, count)| count)
    }

    /// Opens GPU `number`.
    ///
    /// # Errors
    /// When the driver is missing or refuses, or there is no such GPU, or it is older than Ampere.
    pub(super) fn open(number: usize) -> Result<Gpu> {
        let (functions, count) = start()?;
        let f = &functions;
        ensure!(
            number < count,
            "there is no GPU {number}: the driver sees {count} (CUDA_VISIBLE_DEVICES can hide some)"
        );
        let (mut device, mut context, mut stream) = (0, null_mut(), null_mut());
        // SAFETY: results go to variables of the right types, which outlive the calls.
        check(f, unsafe { (f.cuDeviceGet)(&mut device, number as c_int) })?;
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: as above.
            check(f, unsafe { (f.cuDeviceGetAttribute)(&mut value, which, device) }).map(|()| value)
        };
        let capability = (attribute(CAPABILITY.0)?, attribute(CAPABILITY.1)?);
        let multiprocessors = attribute(MULTIPROCESSORS)? as usize;
        let shared = attribute(MOST_SHARED_MEMORY)? as usize;
        let reads_late = attribute(PAGEABLE_MEMORY_ACCESS)? != 0;
        let mut version = 0;
        // SAFETY: as above.
        check(f, unsafe { (f.cuDriverGetVersion)(&mut version) })?;
        let mut name = [0 as c_char; 128];
        // SAFETY: as above; the name is cut to its room and ends with 0.
        let name = unsafe {
            check(f, (f.cuDeviceGetName)(name.as_mut_ptr(), name.len() as c_int, device))?;
            CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
        };
        ensure!(
            capability.0 >= 8,
            "GPU {number}, {name}, has compute capability {}.{}; bf16 needs 8.0 (Ampere) or later",
            capability.0,
            capability.1
        );
        // SAFETY: as above.
        unsafe {
            check(f, (f.cuDevicePrimaryCtxRetain)(&mut context, device))?;
            check(f, (f.cuCtxSetCurrent)(context))?;
            CURRENT.set(context);
            check(f, (f.cuStreamCreate)(&mut stream, NON_BLOCKING))?;
        }
        let (taken, failed) = (AtomicU64::new(0), AtomicBool::new(false));
        Ok(Gpu {
            functions,
            device,
            context,
            stream,
            lanes: OnceLock::new(),
            taken,
            failed,
            name,
            capability,
            multiprocessors,
            shared,
            version,
            reads_late,
        })
    }

    /// The driver's functions, with this GPU's context current on this thread.
    pub(super) fn driver(&self) -> &Functions {
        if CURRENT.get() != self.context {
            // SAFETY: the context lives as long as `self`.
            self.expect("cannot be used from this thread", unsafe {
                (self.functions.cuCtxSetCurrent)(self.context)
            });
            CURRENT.set(self.context);
        }
        &self.functions
    }

    /// The stream of all work, the one that records it, or the one of what this thread has done beside it.
    pub(super) fn stream(&self) -> Handle {
        self.recording().or_else(|| self.lane()).unwrap_or(self.stream)
    }

    /// Another stream.
    ///
    /// # Errors
    /// When the driver has no room for it.
    pub(super) fn new_stream(&self) -> Result<Handle> {
        let mut stream = null_mut();
        // SAFETY: the result goes to a variable.
        self.check(unsafe { (self.driver().cuStreamCreate)(&mut stream, NON_BLOCKING) })?;
        Ok(stream)
    }

    /// Gives back a stream of [`Gpu::new_stream`].
    pub(super) fn give_back_stream(&self, stream: Handle) {
        let Some(f) = self.closing() else { return };
        // SAFETY: made once, given back once. An error can change nothing any more.
        unsafe { (f.cuStreamDestroy_v2)(stream) };
    }

    /// An error of the driver in words.
    ///
    /// # Errors
    /// When `code` is one.
    pub(super) fn check(&self, code: c_int) -> Result<()> {
        check(&self.functions, code)
    }

    /// Ends with the driver's words where an operation fails that has no way to say so: a kernel that crashed, or a GPU
    /// that is lost. Nothing that was computed can be trusted then.
    pub(super) fn expect(&self, what: &str, code: c_int) {
        if let Err(error) = self.check(code) {
            self.fail(&format!("{what}: {error:#}"));
        }
    }

    /// Ends the operation under way with [`crate::Failure`].
    pub(super) fn fail(&self, what: &str) -> ! {
        self.failed.store(true, Relaxed);
        crate::failure::fail(format!("the GPU {} failed: {what}", self.name))
    }

    /// The driver's functions, for whoever gives something back; none where an operation has failed.
    pub(super) fn closing(&self) -> Option<&Functions> {
        (!self.failed.load(Relaxed)).then(|| self.driver())
    }

    /// Waits for all work, also for what is done beside other work.
    pub(super) fn wait(&self) {
        self.outside("waiting for the GPU");
        self.finish();
    }

    /// [`Gpu::wait`], also where operations are only noted.
    fn finish(&self) {
        for stream in [self.stream].into_iter().chain(self.lanes.get().into_iter().flatten().copied()) {
            self.wait_for(stream);
        }
    }

    fn wait_for(&self, stream: Handle) {
        // SAFETY: streams live as long as `self`.
        self.expect("work on it ended badly", unsafe { (self.driver().cuStreamSynchronize)(stream) });
    }

    /// Memory with unspecified contents; `bytes` is above 0.
    ///
    /// # Errors
    /// When there is not enough; says how much was asked for and how much is free.
    pub(super) fn allocate(&self, bytes: usize) -> Result<Address> {
        let f = self.driver();
        let (mut address, mut free, mut total) = (0, 0, 0);
        // SAFETY: results go to variables that outlive the calls.
        let code = unsafe { (f.cuMemAlloc_v2)(&mut address, bytes) };
        if code == OUT_OF_MEMORY {
            // SAFETY: as above.
            self.check(unsafe { (f.cuMemGetInfo_v2)(&mut free, &mut total) })?;
            bail!(
                "out of memory on the GPU: {:.2} GiB asked for, {:.2} of {:.2} GiB are free; use a smaller model or \
                 micro-batch, recompute = \"full\", or for training offload = \"optimizer\" or \"all\"",
                gib(bytes),
                gib(free),
                gib(total)
            );
        }
        self.check(code)?;
        self.taken.fetch_add(bytes as u64, Relaxed);
        Ok(address)
    }

    /// Gives memory back, once the work that uses it is done.
    pub(super) fn free(&self, address: Address, bytes: usize) {
        let Some(f) = self.closing() else { return };
        self.note_free();
        // The driver may wait for it itself, but does not promise to.
        self.finish();
        // SAFETY: from `allocate`, given back once, and no work uses it any more.
        self.expect("memory cannot be given back", unsafe { (f.cuMemFree_v2)(address) });
        self.taken.fetch_sub(bytes as u64, Relaxed);
    }

    /// Bytes of its memory that are allocated.
    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Relaxed)
    }

    /// Pinned memory of the host with unspecified contents; `bytes` is above 0. Where addresses have 64 bits, as on all that
    /// this program runs on, CUDA has one space of addresses: the GPU's is the processor's.
    ///
    /// # Errors
    /// When there is not enough; says how much was asked for.
    pub(super) fn allocate_on_host(&self, bytes: usize) -> Result<Address> {
        let mut start = null_mut();
        // SAFETY: the result goes to a variable that outlives the call.
        let code = unsafe { (self.driver().cuMemHostAlloc)(&mut start, bytes, MAPPED) };
        if code == OUT_OF_MEMORY {
            bail!(
                "out of memory on the host: {:.2} GiB that the GPU reaches (pinned) asked for; use more hosts, or a smaller model",
                gib(bytes)
            );
        }
        self.check(code)?;
        Ok(start as Address)
    }

    /// Gives the host's memory back, once the work that uses it is done.
    pub(super) fn free_on_host(&self, address: Address) {
        let Some(f) = self.closing() else { return };
        self.note_free();
        self.finish();
        // SAFETY: from `allocate_on_host`, given back once, and no work uses it any more.
        let code = unsafe { (f.cuMemFreeHost)(address as *mut c_void) };
        self.expect("memory of the host cannot be given back", code);
    }

    /// Copies numbers to memory of the GPU.
    ///
    /// # Safety
    /// There are at least so many bytes at the address.
    pub(super) unsafe fn upload<T: bytemuck::Pod>(&self, to: Address, values: &[T]) {
        self.outside("an upload");
        if !values.is_empty() {
            let (from, bytes) = (values.as_ptr().cast(), size_of_val(values));
            // SAFETY: the caller's promise; the driver has taken ordinary memory's contents when it returns, or is waited for.
            let code = unsafe { (self.driver().cuMemcpyHtoDAsync_v2)(to, from, bytes, self.stream()) };
            self.expect("nothing can be copied to it", code);
            if self.reads_late {
                self.wait_for(self.stream());
            }
        }
    }

    /// Copies numbers from memory of the GPU, when all work before is done.
    ///
    /// # Safety
    /// There are at least so many bytes at the address.
    pub(super) unsafe fn download<T: bytemuck::Pod>(&self, from: Address, values: &mut [T]) {
        self.outside("a download");
        if !values.is_empty() {
            let (to, bytes) = (values.as_mut_ptr().cast(), size_of_val(values));
            // SAFETY: the caller's promise; `values` is ours until the copy is over.
            let code = unsafe { (self.driver().cuMemcpyDtoHAsync_v2)(to, from, bytes, self.stream()) };
            self.expect("nothing can be copied from it", code);
        }
        self.wait();
    }

    /// Copies memory that the GPU reaches to other such memory.
    ///
    /// # Safety
    /// There are at least so many bytes at both addresses, and they do not overlap.
    pub(super) unsafe fn copy(&self, to: Address, from: Address, bytes: usize) {
        if bytes == 0 || self.note(Noted::Copy, [to, from, bytes as u64]) {
            return;
        }
        // SAFETY: the caller's promise.
        let code = unsafe { (self.driver().cuMemcpyAsync)(to, from, bytes, self.stream()) };
        self.expect("memory cannot be copied", code);
    }

    /// Zeros memory of the GPU.
    ///
    /// # Safety
    /// There are at least so many bytes at the address.
    pub(super) unsafe fn clear(&self, to: Address, bytes: usize) {
        if bytes == 0 || self.note(Noted::Clear, [to, bytes as u64]) {
            return;
        }
        // SAFETY: the caller's promise.
        let code = unsafe { (self.driver().cuMemsetD8Async)(to, 0, bytes, self.stream()) };
        self.expect("memory cannot be zeroed", code);
    }

    /// Seconds that the GPU takes for the work that `enqueue` starts.
    pub(super) fn time(&self, enqueue: impl FnOnce()) -> f64 {
        self.outside("a measurement");
        let f = self.driver();
        let (mut events, mut ms) = ([null_mut(); 2], 0.0);
        // SAFETY: events are made, recorded on the living stream, read when both are over, and given back.
        unsafe {
            for event in &mut events {
                self.expect("no event", (f.cuEventCreate)(event, 0));
            }
            self.expect("no event", (f.cuEventRecord)(events[0], self.stream));
            enqueue();
            self.expect("no event", (f.cuEventRecord)(events[1], self.stream));
            self.expect("work on it ended badly", (f.cuEventSynchronize)(events[1]));
            self.expect("no time", (f.cuEventElapsedTime)(&mut ms, events[0], events[1]));
            for event in events {
                self.expect("no event", (f.cuEventDestroy_v2)(event));
            }
        }
        ms as f64 * 1e-3
    }

    /// Bytes of its memory, and the driver's version of CUDA.
    pub(super) fn facts(&self) -> Result<(usize, c_int)> {
        let mut bytes = 0;
        // SAFETY: the result goes to a variable that outlives the call.
        self.check(unsafe { (self.driver().cuDeviceTotalMem_v2)(&mut bytes, self.device) })?;
        Ok((bytes, self.version))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        let Some(f) = self.closing() else { return };
        // SAFETY: made by `open`; everything that uses them is gone. Errors can change nothing any more.
        unsafe {
            for lane in self.lanes.get().into_iter().flatten() {
                (f.cuStreamDestroy_v2)(*lane);
            }
            (f.cuStreamDestroy_v2)(self.stream);
            (f.cuDevicePrimaryCtxRelease_v2)(self.device);
        }
        CURRENT.set(null_mut());
    }
}

/// Loads and starts the driver; with the number of GPUs that it sees.
fn start() -> Result<(Functions, usize)> {
    keep_streams_apart();
    let functions = Functions::of(&Library::load(&DRIVER)?)?;
    let (f, mut count) = (&functions, 0);
    // SAFETY: the result goes to a variable of the right type, which outlives the call.
    unsafe {
        check(f, (f.cuInit)(0)).context("NVIDIA's driver does not start")?;
        check(f, (f.cuDeviceGetCount)(&mut count))?;
    }
    Ok((functions, count.max(0) as usize))
}

/// Has the driver keep as many streams apart as it can, unless the user has said how many.
fn keep_streams_apart() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if std::env::var_os(QUEUES.0).is_none() {
            // SAFETY: the driver, which reads it, is not loaded yet; Rust's own readers in other threads are kept out by std. What
            // C code reads the environment, libc's resolver and MPI's library, does so when ranks meet, not when one opens a GPU.
            unsafe { std::env::set_var(QUEUES.0, QUEUES.1) };
        }
    });
}

fn check(f: &Functions, code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let word = |function: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
        let mut text = std::ptr::null();
        // SAFETY: the driver answers with a text of its own that stays, or with none.
        unsafe {
            match function(code, &mut text) {
                0 if !text.is_null() => CStr::from_ptr(text).to_string_lossy().into_owned(),
                _ => format!("error {code}"),
            }
        }
    };
    bail!("{} ({})", word(f.cuGetErrorString), word(f.cuGetErrorName))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_keeps_streams_apart_unless_the_user_says_how_many() {
        let said = std::env::var(QUEUES.0);
        // It is said before the driver is looked for, which may be missing.
        let _ = Gpu::count();
        assert_eq!(std::env::var(QUEUES.0).unwrap(), said.unwrap_or(QUEUES.1.into()));
    }

    #[test]
    #[ignore = "needs a GPU, real or emulated; scripts/check-cuda-kernels runs it"]
    fn an_upload_has_taken_its_source_when_it_returns() {
        let gpu = Gpu::open(0).unwrap();
        let mut values = vec![7u32; 1 << 20];
        let bytes = size_of_val(&values[..]);
        let address = gpu.allocate(bytes).unwrap();
        // SAFETY: so many bytes were allocated.
        unsafe {
            gpu.upload(address, &values);
            values.fill(8);
            gpu.download(address, &mut values);
        }
        assert!(values.iter().all(|value| *value == 7), "what was there later was copied");
        gpu.free(address, bytes);
    }

    #[test]
    #[ignore = "needs a GPU, real or emulated; scripts/check-cuda-kernels runs it"]
    fn memory_is_given_back_when_the_work_that_uses_it_is_done() {
        let gpu = Gpu::open(0).unwrap();
        let bytes = 16 << 20;
        let (from, to) = (gpu.allocate(bytes).unwrap(), gpu.allocate(bytes).unwrap());
        let mut values = vec![0u32; bytes / 4];
        // SAFETY: so many bytes were allocated, and those that are read are not given back yet.
        unsafe {
            (0..4).for_each(|_| gpu.clear(from, bytes));
            gpu.copy(to, from, bytes);
            // An emulated GPU ends the program where work uses memory that was given back.
            gpu.free(from, bytes);
            gpu.download(to, &mut values);
        }
        assert!(values.iter().all(|value| *value == 0));
        gpu.free(to, bytes);
    }
}
