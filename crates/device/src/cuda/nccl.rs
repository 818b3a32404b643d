//! NCCL: GPUs of several ranks exchange buffers over NVLink, PCIe or the network, without the processor.
//!
//! A communicator has a stream of its own, so that its exchanges run beside what the GPU computes: one begins when all that
//! was given to the stream of operations before is done, and that stream waits for it where [`Transfer::hold_back`] says so.
//! Communicators are *not blocking*, in NCCL's words: calls that have to wait for other ranks return, and are asked after. So
//! another thread can abort them, and it must be able to, because NCCL waits for a rank that is lost for ever. For each such call
//! NCCL starts a thread, so exchanges that start together are one call: a group, in NCCL's words. A group is begun and ended under
//! one lock, because NCCL keeps what it is of with the thread: nobody may abort the communicator in between.
//!
//! Sums: NCCL adds in its own order, which depends on sizes and on how the GPUs are connected, and is the same each time. Two
//! bf16 numbers are added in f32 and rounded to bf16, for each rank once more (`reduce_kernel.h`). Where a switch adds up
//! (NVLS) the order is not always the same (NVIDIA/nccl, issue 1497), so it does not, unless the user says how.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::driver::{Gpu, Handle};
use super::event::{Aside, Event};
use super::library::{Library, Wanted, functions};
use super::switch;
use crate::{DType, Exchange, Link, Located, Network, Transfer};

/// Says whether NCCL is used.
const VARIABLE: &str = "FERROPT_NCCL";
/// How long all ranks of a link are waited for.
const OPENING: Duration = Duration::from_secs(120);
/// How long the end of all exchanges is waited for, when a link is closed.
const CLOSING: Duration = Duration::from_secs(10);
/// For how long calls that are not done are asked after without a rest: most take less than sleeping would.
const SOON: Duration = Duration::from_micros(100);
/// How often they are asked after later.
const POLL: Duration = Duration::from_micros(50);

const LIBRARY: Wanted = Wanted {
    what: "NCCL, by which GPUs exchange memory,",
    files: &["libnccl.so.2"],
    packages: &["nccl/lib"],
    loads: None,
    install: "Install it, for instance in a Python environment with `pip install nvidia-nccl-cu13` (cu12 for CUDA 12)",
    since: "NCCL 2.14",
};

/// ncclResult_t.
const IN_PROGRESS: c_int = 7;
/// ncclDataType_t.
const UINT8: c_int = 1;
const FLOAT16: c_int = 6;
const FLOAT32: c_int = 7;
const BFLOAT16: c_int = 9;
/// ncclRedOp_t.
const SUM: c_int = 0;

/// ncclUniqueId.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct UniqueId([u8; 128]);

/// ncclConfig_t as it was first: NCCL reads as much of it as its version has.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    /// What later versions have here: NCCL_CONFIG_UNDEF_INT.
    undefined: c_int,
}

impl Config {
    const NOT_BLOCKING: Config = Config {
        size: size_of::<Config>(),
        magic: 0xcafe_beef,
        version: 2_14_00,
        blocking: 0,
        undefined: c_int::MIN,
    };
}

functions! {
    /// Functions of libnccl (nccl.h). Those that return a number return 0, that they are in progress, or an error.
    Functions {
        fn ncclGetVersion(*mut c_int) -> c_int;
        fn ncclGetErrorString(c_int) -> *const c_char;
        fn ncclGetLastError(Handle) -> *const c_char;
        fn ncclGetUniqueId(*mut UniqueId) -> c_int;
        fn ncclCommInitRankConfig(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> c_int;
        fn ncclCommGetAsyncError(Handle, *mut c_int) -> c_int;
        fn ncclCommFinalize(Handle) -> c_int;
        fn ncclCommDestroy(Handle) -> c_int;
        fn ncclCommAbort(Handle) -> c_int;
        fn ncclGroupStart() -> c_int;
        fn ncclGroupEnd() -> c_int;
        fn ncclAllGather(*const c_void, *mut c_void, usize, c_int, Handle, Handle) -> c_int;
        fn ncclReduceScatter(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Handle) -> c_int;
        fn ncclAllReduce(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Handle) -> c_int;
        fn ncclBroadcast(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Handle) -> c_int;
        fn ncclSend(*const c_void, usize, c_int, c_int, Handle, Handle) -> c_int;
        fn ncclRecv(*mut c_void, usize, c_int, c_int, Handle, Handle) -> c_int;
    }
}

/// Whether the environment wants NCCL to be used.
///
/// # Errors
/// When it says something else than 0 or 1.
pub(super) fn wanted() -> Result<bool> {
    switch::is_on(VARIABLE, "exchange copies in the hosts' memory")
}

/// Loads NCCL, for a GPU.
///
/// # Errors
/// When it is not wanted, or missing.
pub(super) fn open(gpu: &Arc<Gpu>, wanted: bool) -> Result<Box<dyn Network>> {
    ensure!(wanted, "{VARIABLE} is 0");
    leave_sums_to_gpus();
    let functions = Functions::of(&Library::load(&LIBRARY)?)?;
    let nccl = Nccl { functions, gpu: gpu.clone() };
    let mut version = 0;
    // SAFETY: the result goes to a variable.
    nccl.check(unsafe { (nccl.functions.ncclGetVersion)(&mut version) })?;
    Ok(Box::new(Loaded { nccl: Arc::new(nccl), version }))
}

/// Does without sums in switches, whose order changes from run to run, unless the user has said which algorithms to use.
fn leave_sums_to_gpus() {
    const NVLS: &str = "NCCL_NVLS_ENABLE";
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if [NVLS, "NCCL_ALGO"].iter().all(|name| std::env::var_os(name).is_none()) {
            // SAFETY: NCCL, which reads it, is not loaded yet; Rust's own readers in other threads are kept out by std, and the
            // driver has read what it wants when it was started.
            unsafe { std::env::set_var(NVLS, "0") };
        }
    });
}

/// NCCL's functions, used on one GPU.
struct Nccl {
    functions: Functions,
    gpu: Arc<Gpu>,
}

impl Nccl {
    /// An error of NCCL in words.
    fn check(&self, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let text = |text: *const c_char| match text.is_null() {
            true => String::new(),
            // SAFETY: NCCL answers with a text that ends with 0 and stays until its next error on this thread.
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_string(),
        };
        // SAFETY: the second takes a communicator that it does not look at.
        let (error, last) = unsafe {
            let f = &self.functions;
            (text((f.ncclGetErrorString)(code)), text((f.ncclGetLastError)(null_mut())))
        };
        let more = if last.is_empty() { String::new() } else { format!(": {last}") };
        bail!("{error} (NCCL's error {code}){more}")
    }
}

struct Loaded {
    nccl: Arc<Nccl>,
    version: c_int,
}

impl Network for Loaded {
    fn describe(&self) -> String {
        let version = self.version;
        format!("NCCL {}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
    }

    fn invite(&self) -> Result<Vec<u8>> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: the result goes to a variable of the size that NCCL fills.
        self.nccl.check(unsafe { (self.nccl.functions.ncclGetUniqueId)(&mut id) })?;
        Ok(id.0.to_vec())
    }

    fn open(
        &self,
        invitation: &[u8],
        rank: usize,
        size: usize,
        give_up: &dyn Fn() -> bool,
    ) -> Result<Arc<dyn Link>> {
        let id = invitation.try_into().context("an invitation that is not NCCL's")?;
        let gpu = &self.nccl.gpu;
        // Makes the GPU's context this thread's, from which NCCL learns which GPU it is.
        gpu.driver();
        let (mut handle, mut config) = (null_mut(), Config::NOT_BLOCKING);
        // SAFETY: the result and the configuration are variables of the right types.
        let code = unsafe {
            let f = &self.nccl.functions;
            (f.ncclCommInitRankConfig)(&mut handle, size as c_int, UniqueId(id), rank as c_int, &mut config)
        };
        if handle.is_null() {
            self.nccl.check(code)?;
            bail!("NCCL made no communicator");
        }
        let stream = match gpu.new_stream() {
            Ok(stream) => stream,
            Err(error) => {
                // SAFETY: made above, given back once.
                unsafe { (self.nccl.functions.ncclCommAbort)(handle) };
                return Err(error);
            }
        };
        let (starting, handle) = (Mutex::default(), Mutex::new(Some(handle)));
        let link = Communicator { nccl: self.nccl.clone(), handle, starting, stream, rank, size };
        let until = Instant::now() + OPENING;
        if let Err(error) = link.settle(code, &|| give_up() || Instant::now() > until) {
            link.abort();
            return Err(error);
        }
        Ok(Arc::new(link))
    }
}

/// The GPUs of some ranks.
struct Communicator {
    nccl: Arc<Nccl>,
    /// None once it was aborted.
    handle: Mutex<Option<Handle>>,
    /// Held while an exchange is started: between a call and its end there must be no other.
    starting: Mutex<()>,
    stream: Handle,
    rank: usize,
    size: usize,
}

// SAFETY: the handles are only passed to NCCL and the driver, a communicator's by one thread at a time.
unsafe impl Send for Communicator {}
// SAFETY: as above.
unsafe impl Sync for Communicator {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Communicator {
    /// What a call with the communicator returns, on whichever GPU is this thread's.
    fn ask(&self, call: impl FnOnce(&Functions, Handle) -> c_int) -> Result<c_int> {
        let handle = lock(&self.handle);
        let handle = handle.context("the exchange of memory was given up")?;
        Ok(call(&self.nccl.functions, handle))
    }

    /// What a call returns that needs the GPU: from the current context NCCL learns which one that is.
    fn call(&self, call: impl FnOnce(&Functions, Handle) -> c_int) -> Result<c_int> {
        self.nccl.gpu.driver();
        self.ask(call)
    }

    /// What became of calls that were in progress. NCCL knows it without the GPU or its driver.
    fn state(&self) -> Result<c_int> {
        let mut state = 0;
        // SAFETY: the communicator is alive, the result goes to a variable.
        let code = self.ask(|f, handle| unsafe { (f.ncclCommGetAsyncError)(handle, &mut state) })?;
        self.nccl.check(code)?;
        Ok(state)
    }

    /// Waits for the end of a call that returned `code`.
    fn settle(&self, mut code: c_int, give_up: &dyn Fn() -> bool) -> Result<()> {
        let started = Instant::now();
        while code == IN_PROGRESS {
            ensure!(!give_up(), "not all of the {} ranks came", self.size);
            match started.elapsed() < SOON {
                true => std::thread::yield_now(),
                false => std::thread::sleep(POLL),
            }
            code = self.state()?;
        }
        self.nccl.check(code)
    }

    /// Calls NCCL's functions for exchanges, several as one group.
    ///
    /// # Safety
    /// That of [`Link::start`].
    unsafe fn enqueue(&self, exchanges: &[(Exchange, Located)]) -> Result<c_int> {
        for (exchange, memory) in exchanges {
            let sums = matches!(exchange, Exchange::AllReduce | Exchange::ReduceScatter);
            let dtype = memory.dtype;
            ensure!(!sums || number(dtype) != UINT8, "{dtype} is no type to sum in; f32, bf16 and f16 are");
        }
        self.call(|f, comm| {
            // SAFETY: the caller's promise.
            let one = |(exchange, memory): &_| unsafe { self.enqueue_one(f, comm, *exchange, memory) };
            if let [only] = exchanges {
                return one(only);
            }
            // SAFETY: a group is ended by the thread that began it, whatever goes wrong on the way: its end says what it was.
            unsafe {
                match (f.ncclGroupStart)() {
                    0 => {}
                    code => return code,
                }
                let _ = exchanges.iter().map(one).all(|code| code == 0 || code == IN_PROGRESS);
                (f.ncclGroupEnd)()
            }
        })
    }

    /// Calls NCCL's function for an exchange.
    ///
    /// # Safety
    /// That of [`Link::start`].
    unsafe fn enqueue_one(&self, f: &Functions, comm: Handle, exchange: Exchange, memory: &Located) -> c_int {
        let (all, width) = (memory.address as *mut c_void, memory.dtype.size());
        let (bytes, part) = (memory.len * width, memory.len / self.size);
        let own = all.wrapping_byte_add(self.rank * part * width);
        let (number, s) = (number(memory.dtype), self.stream);
        // SAFETY: the caller's promise; all addresses are within the memory. What is only moved is moved as bytes.
        unsafe {
            match exchange {
                Exchange::AllGather => (f.ncclAllGather)(own, all, part * width, UINT8, comm, s),
                Exchange::ReduceScatter => (f.ncclReduceScatter)(all, own, part, number, SUM, comm, s),
                Exchange::AllReduce => (f.ncclAllReduce)(all, all, memory.len, number, SUM, comm, s),
                Exchange::Broadcast { from } => {
                    (f.ncclBroadcast)(all, all, bytes, UINT8, from as c_int, comm, s)
                }
                Exchange::Send { to } => (f.ncclSend)(all, bytes, UINT8, to as c_int, comm, s),
                Exchange::Receive { from } => (f.ncclRecv)(all, bytes, UINT8, from as c_int, comm, s),
            }
        }
    }
}

/// What NCCL calls a type; bytes, which have no sums, where it has none.
fn number(dtype: DType) -> c_int {
    match dtype {
        DType::F32 => FLOAT32,
        DType::Bf16 => BFLOAT16,
        DType::F16 => FLOAT16,
        _ => UINT8,
    }
}

impl Link for Communicator {
    unsafe fn start(&self, exchanges: &[(Exchange, Located)]) -> Result<Box<dyn Transfer>> {
        let gpu = &self.nccl.gpu;
        gpu.outside("an exchange with other ranks");
        let mine = |(_, memory): &(_, Located)| memory.device == Arc::as_ptr(gpu) as usize;
        ensure!(exchanges.iter().all(mine), "memory of another GPU was to be exchanged");
        let _one_at_a_time = lock(&self.starting);
        Event::at_end_of(gpu, gpu.stream())?.hold_back(self.stream)?;
        // SAFETY: the caller's promise.
        let started = unsafe { self.enqueue(exchanges) };
        if let Err(error) = started.and_then(|code| self.settle(code, &|| false)) {
            // Part of it may be under way, and wait for ever.
            self.abort();
            return Err(error);
        }
        Ok(Box::new(Aside::until_now(gpu, self.stream)?))
    }

    fn check(&self) -> Result<()> {
        match self.state()? {
            IN_PROGRESS => Ok(()),
            code => self.nccl.check(code),
        }
    }

    fn abort(&self) {
        let handle = lock(&self.handle).take();
        if let Some(handle) = handle {
            // Without the driver before, which may not answer until this has begun: NCCL first tells its kernels to end, and
            // finds the GPU itself.
            // SAFETY: nobody else has the handle any more. An error can change nothing.
            unsafe { (self.nccl.functions.ncclCommAbort)(handle) };
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let until = Instant::now() + CLOSING;
        // SAFETY: the communicator is alive. Without exchanges that nobody waits for this takes a moment.
        let ended = self
            .call(|f, handle| unsafe { (f.ncclCommFinalize)(handle) })
            .and_then(|code| self.settle(code, &|| Instant::now() > until));
        let handle = match ended {
            Ok(()) => lock(&self.handle).take(),
            Err(_) => None,
        };
        match handle {
            // SAFETY: it has ended, and nobody else has the handle any more.
            Some(handle) => unsafe {
                (self.nccl.functions.ncclCommDestroy)(handle);
            },
            None => self.abort(),
        }
        self.nccl.gpu.give_back_stream(self.stream);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "needs NCCL, no GPU; scripts/check-cuda-kernels runs it"]
    fn every_function_of_nccl_is_there() {
        let library = Library::load(&LIBRARY).unwrap();
        assert!(Functions::of(&library).is_ok());
    }
}
