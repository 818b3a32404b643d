//! Kernels compiled for the GPU that is there, by NVRTC, once: what it made is kept on the disk.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use anyhow::{Result, bail};

use super::driver::CUDA_13;
use super::library::{Library, Wanted, functions};

functions! {
    /// Functions of libnvrtc (nvrtc.h). All that return a number return 0 or that of an error.
    #[derive(Clone, Copy)]
    Functions {
        fn nvrtcGetErrorString(c_int) -> *const c_char;
        fn nvrtcCreateProgram(
            *mut *mut c_void, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
        ) -> c_int;
        fn nvrtcDestroyProgram(*mut *mut c_void) -> c_int;
        fn nvrtcCompileProgram(*mut c_void, c_int, *const *const c_char) -> c_int;
        fn nvrtcGetProgramLogSize(*mut c_void, *mut usize) -> c_int;
        fn nvrtcGetProgramLog(*mut c_void, *mut c_char) -> c_int;
        fn nvrtcGetCUBINSize(*mut c_void, *mut usize) -> c_int;
        fn nvrtcGetCUBIN(*mut c_void, *mut c_char) -> c_int;
    }
}

const NVRTC: Wanted = Wanted {
    what: "NVIDIA's run-time compiler",
    files: &["libnvrtc.so.13", "libnvrtc.so.12"],
    packages: &["cu13/lib", "cuda_nvrtc/lib"],
    loads: Some("libnvrtc-builtins.so."),
    install: "Install CUDA 12 or 13, or in a Python environment `pip install nvidia-cuda-nvrtc`",
    since: "CUDA 12",
};
/// For drivers before [`CUDA_13`], which refuse the machine code of later compilers.
const NVRTC_12: Wanted = Wanted {
    files: &["libnvrtc.so.12"],
    packages: &["cuda_nvrtc/lib"],
    install: "The driver is older than CUDA 13: install CUDA 12, or in a Python environment \
              `pip install nvidia-cuda-nvrtc-cu12`",
    ..NVRTC
};

/// A file of kernels: its name and text.
pub(super) type Source = (&'static str, &'static str);

/// Where machine code comes from: from the disk, or from the compiler, which is loaded when the first program is not there.
pub(super) struct Compiler {
    wanted: &'static Wanted,
    folder: Option<PathBuf>,
    functions: Mutex<Option<Functions>>,
}

impl Compiler {
    /// One whose code a driver of this version takes, and which keeps it in the user's folder of caches.
    pub(super) fn new(driver: c_int) -> Compiler {
        Compiler::keeping(driver, folder())
    }

    /// One that keeps it in a folder, or nowhere.
    pub(super) fn keeping(driver: c_int, folder: Option<PathBuf>) -> Compiler {
        let wanted = if driver < CUDA_13 { &NVRTC_12 } else { &NVRTC };
        Compiler { wanted, folder, functions: Mutex::default() }
    }

    /// Machine code of a program for a GPU of this compute capability, from the disk where it is there.
    ///
    /// # Errors
    /// When it is not there and there is no compiler, or it does not compile; the compiler's words are in the message.
    pub(super) fn machine_code(
        &self,
        source: Source,
        headers: &[Source],
        capability: (c_int, c_int),
    ) -> Result<Vec<u8>> {
        match self.place(source, headers, &options(capability)).and_then(|path| kept(&path)) {
            Some(code) => Ok(code),
            None => self.compile(source, headers, capability),
        }
    }

    /// [`Compiler::machine_code`], made now and kept in place of what is on the disk.
    ///
    /// # Errors
    /// When there is no compiler, or it does not compile; the compiler's words are in the message.
    pub(super) fn compile(
        &self,
        source: Source,
        headers: &[Source],
        capability: (c_int, c_int),
    ) -> Result<Vec<u8>> {
        let options = options(capability);
        let code = compile(&self.functions()?, source, headers, &options)?;
        // Only a saving of time: a folder that cannot be written to changes nothing else.
        if let Some(path) = self.place(source, headers, &options) {
            let _ = keep(&path, &code);
        }
        Ok(code)
    }

    fn functions(&self) -> Result<Functions> {
        let mut loaded = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(functions) = *loaded {
            return Ok(functions);
        }
        Ok(*loaded.insert(Functions::of(&Library::load(self.wanted)?)?))
    }

    /// Where it is kept, if it is.
    fn place(&self, source: Source, headers: &[Source], options: &[String]) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.join(self.file_name(source, headers, options)))
    }

    /// A name that is another one when anything changes that the code depends on, but the compiler's version: what one made, all
    /// drivers take that take its library, so that code which came from elsewhere is as good.
    fn file_name(&self, source: Source, headers: &[Source], options: &[String]) -> String {
        let mut text = format!("{:?} {options:?}", self.wanted.files);
        for (name, content) in headers.iter().chain([&source]) {
            text.push_str(name);
            text.push_str(content);
        }
        format!("{}-{:032x}.cubin", source.0.trim_end_matches(".cu"), hash(text.as_bytes()))
    }
}

fn compile(f: &Functions, source: Source, headers: &[Source], options: &[String]) -> Result<Vec<u8>> {
    let text = |text: &str| CString::new(text).map_err(anyhow::Error::from);
    let texts = |list: Vec<&str>| list.into_iter().map(text).collect::<Result<Vec<CString>>>();
    let (name, program_text) = (text(source.0)?, text(source.1)?);
    let names = texts(headers.iter().map(|h| h.0).collect())?;
    let contents = texts(headers.iter().map(|h| h.1).collect())?;
    let options = texts(options.iter().map(String::as_str).collect())?;
    let pointers = |list: &[CString]| list.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
    let mut program = null_mut();
    // SAFETY: all texts end with 0 and outlive the calls; sizes are those that the compiler says.
    unsafe {
        let (count, contents, names) = (headers.len() as c_int, pointers(&contents), pointers(&names));
        let code = (f.nvrtcCreateProgram)(
            &mut program,
            program_text.as_ptr(),
            name.as_ptr(),
            count,
            contents.as_ptr(),
            names.as_ptr(),
        );
        check(f, code)?;
        let compiled = (f.nvrtcCompileProgram)(program, options.len() as c_int, pointers(&options).as_ptr());
        let result = if compiled == 0 {
            let mut size = 0;
            check(f, (f.nvrtcGetCUBINSize)(program, &mut size)).and_then(|()| {
                let mut code = vec![0u8; size];
                check(f, (f.nvrtcGetCUBIN)(program, code.as_mut_ptr().cast()))?;
                Ok(code)
            })
        } else {
            let mut size = 0;
            (f.nvrtcGetProgramLogSize)(program, &mut size);
            let mut log = vec![0u8; size];
            (f.nvrtcGetProgramLog)(program, log.as_mut_ptr().cast());
            let log = String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_string();
            check(f, compiled)
                .and_then(|()| bail!("no reason"))
                .map_err(|error| error.context(format!("the kernels in {} do not compile:\n{log}", source.0)))
        };
        (f.nvrtcDestroyProgram)(&mut program);
        result
    }
}

fn check(f: &Functions, code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the compiler answers with a text of its own that stays.
    let words = unsafe { CStr::from_ptr((f.nvrtcGetErrorString)(code)) };
    bail!("NVIDIA's run-time compiler: {}", words.to_string_lossy())
}

/// What every program is compiled with. Hopper has instructions of its own in code that runs on nothing else. Products and
/// sums are not contracted: where that is wanted it is written down.
fn options((major, minor): (c_int, c_int)) -> Vec<String> {
    let special = if (major, minor) == (9, 0) { "a" } else { "" };
    vec![
        format!("--gpu-architecture=sm_{major}{minor}{special}"),
        "--std=c++17".to_string(),
        "--fmad=false".to_string(),
    ]
}

/// Where machine code is kept: below `FERROPT_CACHE` or the user's folder of caches; nowhere when that is off.
fn folder() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let folder = match variable("FERROPT_CACHE") {
        Some(off) if off.as_os_str() == "off" => return None,
        Some(folder) => folder,
        None => {
            variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")))?.join("ferropt")
        }
    };
    Some(folder.join("kernels"))
}

/// FNV-1a, 128 bits: no two that differ by chance have the same.
fn hash(bytes: &[u8]) -> u128 {
    bytes.iter().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |hash, byte| {
        (hash ^ *byte as u128).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    })
}

/// What [`keep`] has written, if it is whole.
pub(super) fn kept(path: &Path) -> Option<Vec<u8>> {
    let mut code = std::fs::read(path).ok()?;
    let (start, end) = code.split_last_chunk()?;
    let (whole, len) = (hash(start) == u128::from_le_bytes(*end), start.len());
    code.truncate(len);
    whole.then_some(code)
}

/// Writes code, and its hash behind it: beside the place, under a name that nobody else has, also not in another container that
/// shares the folder. Then renames, so that readers find a whole file or none.
pub(super) fn keep(path: &Path, code: &[u8]) -> std::io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
    let (process, count) = (std::process::id(), COUNT.fetch_add(1, Relaxed));
    let beside = path.with_extension(format!("{process}.{count}.{since_1970}.tmp"));
    let written = File::create_new(&beside).and_then(|mut file| {
        file.write_all(code)?;
        file.write_all(&hash(code).to_le_bytes())?;
        file.sync_all()
    });
    let moved = written.and_then(|()| std::fs::rename(&beside, path));
    if moved.is_err() {
        let _ = std::fs::remove_file(&beside);
    }
    moved
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_before_cuda_13_is_given_no_library_of_it() {
        let named = |wanted: &Wanted, text: &str| {
            let all = wanted.files.iter().chain(wanted.packages).chain([&wanted.install]);
            all.filter(|name| name.contains(text)).count()
        };
        assert_eq!((named(&NVRTC_12, ".so.13"), named(&NVRTC_12, "cu13")), (0, 0));
        assert!(NVRTC_12.install.ends_with("`pip install nvidia-cuda-nvrtc-cu12`"), "{}", NVRTC_12.install);
        assert_eq!(NVRTC.files, ["libnvrtc.so.13", "libnvrtc.so.12"], "the newer one first");
        assert!(NVRTC.install.ends_with("`pip install nvidia-cuda-nvrtc`"), "{}", NVRTC.install);
    }

    #[test]
    fn what_is_on_the_disk_needs_no_compiler() {
        let folder = tempfile::tempdir().unwrap();
        let (source, headers) = (("some.cu", "a program"), [("some.cuh", "a header")]);
        let compiler = Compiler::keeping(CUDA_13, Some(folder.path().to_path_buf()));
        keep(&compiler.place(source, &headers, &options((8, 0))).unwrap(), b"code").unwrap();
        assert_eq!(compiler.machine_code(source, &headers, (8, 0)).unwrap(), b"code");
        assert!(compiler.functions.lock().unwrap().is_none(), "a compiler was looked for");
        // Of another program there is none.
        let of =
            |source, driver| Compiler::keeping(driver, None).file_name(source, &headers, &options((8, 0)));
        assert_ne!(of(source, CUDA_13), of(("some.cu", "another"), CUDA_13));
        // A driver before CUDA 13 refuses what later compilers make.
        assert_ne!(of(source, CUDA_13), of(source, CUDA_13 - 1));
    }

    #[test]
    fn what_is_not_whole_on_the_disk_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("some.cubin");
        keep(&path, b"code").unwrap();
        assert_eq!(kept(&path).unwrap(), b"code");
        let whole = std::fs::read(&path).unwrap();
        let (cut, changed) = (&whole[..whole.len() - 1], [b"c0de", &whole[4..]].concat());
        let zeros = vec![0; whole.len()];
        for damaged in [&[][..], cut, &whole[1..], &zeros, &changed, b"code"] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(kept(&path), None, "{damaged:?}");
        }
        // Many who keep the same at once take no notice of each other.
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..5).for_each(|_| keep(&path, b"code").unwrap()));
            }
        });
        assert_eq!(kept(&path).unwrap(), b"code");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "something was left beside it");
    }
}
