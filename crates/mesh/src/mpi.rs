//! Ranks that talk through MPI, whose library is loaded when it is needed: a program that is not started by `mpirun` runs
//! without it. Open MPI (4 and 5) and MPICH's family (MPICH, Intel MPI, MVAPICH) have different binary interfaces; what is used
//! of them is little.
//!
//! All calls are made on the thread that owns the transport.

// The library is foreign: each call says why it is sound.
#![allow(unsafe_code)]

use crate::transport::{Transport, Waker};
use anyhow::{Context, Result, bail, ensure};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};
use std::collections::VecDeque;
use std::ffi::{c_char, c_int, c_void};
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Bytes of a message at most, and how many to a rank may be under way.
const MESSAGE: usize = 1 << 20;
const UNDER_WAY: usize = 4;
/// Idle ranks look for messages less and less often, so that they leave the processor to those that compute.
const SHORTEST: Duration = Duration::from_micros(20);
const LONGEST: Duration = Duration::from_millis(1);
const THREAD_SERIALIZED: c_int = 2;
const TAG: c_int = 7;

/// A communicator, data type, request or error handler. Open MPI's are pointers, MPICH's are ints: both fit, and an int is
/// passed in the lower half of the same register. Requests that MPICH writes are the lower half too (little endian).
type Handle = usize;
/// Larger than any library's status, and aligned for all.
type Status = [u64; 8];

type InitThread = unsafe extern "C" fn(*mut c_int, *mut c_void, c_int, *mut c_int) -> c_int;
type Finalize = unsafe extern "C" fn() -> c_int;
type CommNumber = unsafe extern "C" fn(Handle, *mut c_int) -> c_int;
type SetErrors = unsafe extern "C" fn(Handle, Handle) -> c_int;
type Isend = unsafe extern "C" fn(*const c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle) -> c_int;
type Test = unsafe extern "C" fn(*mut Handle, *mut c_int, *mut Status) -> c_int;
type Iprobe = unsafe extern "C" fn(c_int, c_int, Handle, *mut c_int, *mut Status) -> c_int;
type GetCount = unsafe extern "C" fn(*const Status, Handle, *mut c_int) -> c_int;
type Recv = unsafe extern "C" fn(*mut c_void, c_int, Handle, c_int, c_int, Handle, *mut Status) -> c_int;
type Version = unsafe extern "C" fn(*mut c_char, *mut c_int) -> c_int;

/// MPI's world.
pub(crate) struct Mpi {
    finalize: Symbol<Finalize>,
    isend: Symbol<Isend>,
    test: Symbol<Test>,
    iprobe: Symbol<Iprobe>,
    get_count: Symbol<GetCount>,
    recv: Symbol<Recv>,
    world: Handle,
    byte: Handle,
    any_source: c_int,
    rank: usize,
    size: usize,
    version: String,
    /// Messages to each rank that are under way.
    sending: Vec<VecDeque<Sending>>,
    /// What has come of a message and is not read yet.
    left: Vec<(Vec<u8>, usize)>,
    /// No message was there from any rank, and nothing has happened since. To look for each rank's costs as much as to look for
    /// any, and where more ranks than processors wait, each look gives the processor away.
    silent: bool,
    idle: Duration,
    called: Arc<(Mutex<bool>, Condvar)>,
    /// Never unloaded: its threads may outlive what is called here.
    _library: Library,
}

/// A message that the library reads until the request is done.
struct Sending {
    request: Box<Handle>,
    _bytes: Vec<u8>,
}

// SAFETY: it is used by one thread at a time, which the library is told at its start (MPI_THREAD_SERIALIZED).
unsafe impl Send for Mpi {}

fn check(code: c_int, what: &str) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::other(format!("{what} failed with MPI error {code}"))) }
}

impl Mpi {
    /// Loads the library and starts it. `told` is how many ranks there are, and the variable in which `mpirun` said so.
    ///
    /// # Errors
    /// When there is none, or it does not start, or it is not the one that `mpirun` belongs to; the message says what to install.
    pub(crate) fn load(told: Option<(&str, usize)>) -> Result<Mpi> {
        let (library, name) = open()?;
        let symbol = |name: &str| format!("the MPI library has no {name}; set FERROPT_MPI to another one");
        macro_rules! function {
            ($type:ty, $name:literal) => {
                // SAFETY: the signature is that of the standard, with handles as described at `Handle`.
                unsafe { library.get::<$type>($name.as_bytes()) }.with_context(|| symbol($name))?
            };
        }
        let init: Symbol<InitThread> = function!(InitThread, "MPI_Init_thread");
        let set_errors: Symbol<SetErrors> = function!(SetErrors, "MPI_Comm_set_errhandler");
        let (rank_of, size_of) =
            (function!(CommNumber, "MPI_Comm_rank"), function!(CommNumber, "MPI_Comm_size"));
        let version = function!(Version, "MPI_Get_library_version");
        // SAFETY: looks an address up.
        let open_mpi = unsafe { library.get::<*mut c_void>(b"ompi_mpi_comm_world") }.is_ok();
        let object = |name: &str| -> Result<Handle> {
            // SAFETY: looks the address of a global object up, which is Open MPI's handle; nothing is read.
            let address = unsafe { library.get::<*mut c_void>(name.as_bytes()) };
            Ok(address.with_context(|| symbol(name))?.into_raw() as Handle)
        };
        let (world, byte, errors_return, any_source) = match open_mpi {
            true => {
                let [world, byte, errors_return] =
                    ["ompi_mpi_comm_world", "ompi_mpi_byte", "ompi_mpi_errors_return"].map(object);
                (world?, byte?, errors_return?, -1)
            }
            // Values of the interface that MPICH's family has agreed on.
            false => (0x4400_0000, 0x4c00_010d, 0x5400_0001, -2),
        };

        let mut provided = 0;
        // SAFETY: null pointers are allowed for the program's arguments; `provided` outlives the call.
        let code =
            unsafe { init(std::ptr::null_mut(), std::ptr::null_mut(), THREAD_SERIALIZED, &mut provided) };
        check(code, "MPI_Init_thread").with_context(|| format!("{name} does not start"))?;
        ensure!(
            provided >= THREAD_SERIALIZED,
            "{name} was built without threads (level {provided}, {THREAD_SERIALIZED} is needed); set FERROPT_MPI to another one"
        );
        let (mut rank, mut size) = (0, 0);
        // SAFETY: the library is started, the handles are its own, and the numbers outlive the calls.
        let codes = unsafe {
            [set_errors(world, errors_return), rank_of(world, &mut rank), size_of(world, &mut size)]
        };
        for code in codes {
            check(code, "asking MPI for its ranks")?;
        }
        let (mut text, mut len) = (vec![0u8; 1 << 14], 0);
        // SAFETY: no library's version is longer than MPI_MAX_LIBRARY_VERSION_STRING, of which 8192 is the largest.
        check(unsafe { version(text.as_mut_ptr().cast(), &mut len) }, "MPI_Get_library_version")?;
        text.truncate((len.max(0) as usize).min(text.len()));
        let text = String::from_utf8_lossy(&text);
        // "Open MPI v4.1.4, package: ...", "MPICH Version:\t4.0.2\n..."
        let version = text.split(['\n', ',', '\0']).next().unwrap_or_default().replace("Version:", "");
        let version = version.split_whitespace().collect::<Vec<_>>().join(" ");
        let (rank, size) = (rank.max(0) as usize, size.max(1) as usize);
        let finalize = function!(Finalize, "MPI_Finalize");
        if let Some((variable, ranks)) = told.filter(|(_, ranks)| *ranks != size) {
            // SAFETY: the last call, on the thread that made the first.
            unsafe { finalize() };
            bail!(
                "{variable} says that there are {ranks} ranks, but {version} ({name}), which was loaded, knows of {size}: it is not the \
                 library that this mpirun belongs to. Name that in FERROPT_MPI, or set FERROPT_TRANSPORT=tcp and MASTER_ADDR to do \
                 without"
            );
        }
        Ok(Mpi {
            finalize,
            isend: function!(Isend, "MPI_Isend"),
            test: function!(Test, "MPI_Test"),
            iprobe: function!(Iprobe, "MPI_Iprobe"),
            get_count: function!(GetCount, "MPI_Get_count"),
            recv: function!(Recv, "MPI_Recv"),
            world,
            byte,
            any_source,
            rank,
            size,
            version,
            sending: (0..size).map(|_| VecDeque::new()).collect(),
            left: (0..size).map(|_| (Vec::new(), 0)).collect(),
            silent: false,
            idle: SHORTEST,
            called: Arc::default(),
            _library: library,
        })
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// The size of the next message of a rank, or of any, if there is one.
    fn next(&self, from: c_int) -> io::Result<Option<c_int>> {
        let (mut there, mut status, mut count) = (0, Status::default(), 0);
        // SAFETY: everything outlives the calls.
        unsafe {
            check((self.iprobe)(from, TAG, self.world, &mut there, &mut status), "MPI_Iprobe")?;
            if there == 0 {
                return Ok(None);
            }
            check((self.get_count)(&status, self.byte, &mut count), "MPI_Get_count")?;
        }
        Ok(Some(count.max(0)))
    }

    /// Forgets messages that have been sent.
    fn sent(&mut self, to: usize) -> io::Result<()> {
        while let Some(first) = self.sending[to].front_mut() {
            let (mut done, mut status) = (0, Status::default());
            // SAFETY: the request is of `isend` and not done; everything outlives the call.
            check(unsafe { (self.test)(&mut *first.request, &mut done, &mut status) }, "MPI_Test")?;
            if done == 0 {
                break;
            }
            self.sending[to].pop_front();
        }
        Ok(())
    }
}

/// The library, with its name.
fn open() -> Result<(Library, String)> {
    let by_open_mpi = std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some();
    let mut names = vec!["libmpi.so.40", "libmpi.so.12", "libmpich.so.12", "libmpi.so"];
    if !by_open_mpi {
        names.rotate_left(1);
    }
    let given = std::env::var("FERROPT_MPI").ok();
    if let Some(given) = &given {
        names = vec![given];
    }
    let mut errors = Vec::new();
    for name in names {
        // Its plugins look for its symbols, hence global.
        // SAFETY: an MPI library's initialisers may run in any program.
        match unsafe { Library::open(Some(name), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(library) => return Ok((library, name.into())),
            Err(error) => errors.push(format!("\n  {name}: {error}")),
        }
    }
    let advice = match given {
        Some(_) => "FERROPT_MPI names no library that can be loaded",
        None => {
            "this process was started by mpirun, but no MPI library can be loaded. Install the one that mpirun belongs to (Debian: \
             libopenmpi3 or libmpich12), name it in FERROPT_MPI, or set FERROPT_TRANSPORT=tcp and MASTER_ADDR to do without"
        }
    };
    bail!("{advice}:{}", errors.concat())
}

impl Transport for Mpi {
    fn write(&mut self, to: usize, bytes: &[u8]) -> io::Result<usize> {
        self.sent(to)?;
        if self.sending[to].len() >= UNDER_WAY {
            return Ok(0);
        }
        let bytes = bytes[..bytes.len().min(MESSAGE)].to_vec();
        let mut request = Box::new(0);
        // SAFETY: bytes and request stay where they are until the request is done: both are on the heap, owned by the list.
        let code = unsafe {
            let (data, len) = (bytes.as_ptr().cast(), bytes.len() as c_int);
            (self.isend)(data, len, self.byte, to as c_int, TAG, self.world, &mut *request)
        };
        check(code, "MPI_Isend")?;
        let sent = bytes.len();
        self.sending[to].push_back(Sending { request, _bytes: bytes });
        (self.silent, self.idle) = (false, SHORTEST);
        Ok(sent)
    }

    fn read(&mut self, from: usize, into: &mut [u8]) -> io::Result<usize> {
        if self.left[from].1 == self.left[from].0.len() {
            self.silent = self.silent || self.next(self.any_source)?.is_none();
            if self.silent {
                return Ok(0);
            }
            let Some(count) = self.next(from as c_int)? else { return Ok(0) };
            let (left, at) = &mut self.left[from];
            let len = count as usize;
            let mut status = Status::default();
            let direct = len <= into.len();
            if !direct {
                left.resize(len, 0);
                *at = 0;
            }
            let target = if direct { &mut into[..len] } else { &mut left[..] };
            // SAFETY: the message that was found is the next from that rank, and has room in `target`.
            let code = unsafe {
                let data = target.as_mut_ptr().cast();
                (self.recv)(data, count, self.byte, from as c_int, TAG, self.world, &mut status)
            };
            check(code, "MPI_Recv")?;
            self.idle = SHORTEST;
            if direct {
                return Ok(len);
            }
        }
        let (left, at) = &mut self.left[from];
        let count = into.len().min(left.len() - *at);
        into[..count].copy_from_slice(&left[*at..*at + count]);
        *at += count;
        Ok(count)
    }

    fn wait(&mut self, _: &[usize], writes: &[usize], at_most: Duration) -> io::Result<()> {
        // MPI has no way to wait for messages or a call, whichever comes first.
        for to in writes {
            self.sent(*to)?;
        }
        let (called, condition) = &*self.called;
        let called = called.lock().unwrap_or_else(PoisonError::into_inner);
        let time = self.idle.min(at_most);
        self.idle = (self.idle * 2).min(LONGEST);
        self.silent = false;
        let (mut called, _) = condition
            .wait_timeout_while(called, time, |called| !*called)
            .unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut *called) {
            self.idle = SHORTEST;
        }
        Ok(())
    }

    fn waker(&self) -> Waker {
        let called = self.called.clone();
        Arc::new(move || {
            *called.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
            called.1.notify_one();
        })
    }

    fn close(&mut self, clean: bool) {
        let done = |sending: &VecDeque<Sending>| sending.is_empty();
        while clean && !self.sending.iter().all(done) {
            if (0..self.size).any(|to| self.sent(to).is_err()) {
                return;
            }
            std::thread::sleep(SHORTEST);
        }
        if clean {
            // SAFETY: the last call, on the thread that made the first. Otherwise mpirun is to see that the run has failed.
            unsafe { (self.finalize)() };
        }
    }

    fn name(&self) -> String {
        self.version.clone()
    }

    fn host(&self, _: usize) -> &str {
        ""
    }
}
