//! CUDA's libraries, found when they are asked for: the program is the same where there are none.

use std::collections::HashSet;
use std::ffi::{CStr, CString, OsStr, c_char, c_void};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// Folders to look in first, separated by colons.
const VARIABLE: &str = "FERROPT_CUDA_LIBRARIES";

/// A library that is wanted.
pub(super) struct Wanted {
    /// What it is, for people.
    pub what: &'static str,
    /// Names of its file, the best first.
    pub files: &'static [&'static str],
    /// Folders below `site-packages/nvidia` where packages of Python put it.
    pub packages: &'static [&'static str],
    /// How the names of files begin that it loads itself, by name alone; packages of Python have them in the same folder.
    pub loads: Option<&'static str>,
    /// What to do where it is missing.
    pub install: &'static str,
    /// The first version that has all functions that are called.
    pub since: &'static str,
}

/// A loaded library. It stays loaded as long as the process lives, and so do its functions.
#[derive(Clone, Copy)]
pub(super) struct Library {
    handle: *mut c_void,
    what: &'static str,
    since: &'static str,
}

impl Library {
    /// Loads it from where the system, CUDA's installer or a package of Python has it.
    ///
    /// # Errors
    /// When it is nowhere, or none that there is can be loaded; says where it was looked for and what to install.
    pub(super) fn load(wanted: &Wanted) -> Result<Library> {
        let given = std::env::var_os(VARIABLE).unwrap_or_default();
        let given: Vec<PathBuf> =
            std::env::split_paths(&given).filter(|p| !p.as_os_str().is_empty()).collect();
        let folders = folders(wanted.packages);
        // An empty folder is the system's own search, LD_LIBRARY_PATH included.
        let places = given.iter().cloned().chain([PathBuf::new()]).chain(folders.iter().cloned());
        let mut broken = Vec::new();
        for place in places {
            for file in wanted.files {
                let path = place.join(file);
                if !place.as_os_str().is_empty() && !path.exists() {
                    continue;
                }
                match open(&path) {
                    Ok(handle) => {
                        load_beside(&place, wanted.loads);
                        return Ok(Library { handle, what: wanted.what, since: wanted.since });
                    }
                    // The system says so of a library that is nowhere, too.
                    Err(_) if place.as_os_str().is_empty() => {}
                    Err(error) => broken.push(error),
                }
            }
        }
        let mut text = format!("{} ({}) ", wanted.what, wanted.files.join(" or "));
        if broken.is_empty() {
            text.push_str("was not found");
        } else {
            let _ = write!(text, "cannot be loaded: {}", broken.join("; "));
        }
        let mut looked = vec!["the system's library path".to_string()];
        looked.extend(given.iter().chain(&folders).map(|folder| folder.display().to_string()));
        bail!(
            "{text}\nlooked in: {}\n{}, or name its folder in {VARIABLE}",
            looked.join(", "),
            wanted.install
        )
    }

    /// A function.
    ///
    /// # Errors
    /// When the library has none of this name.
    pub(super) fn function(&self, name: &str) -> Result<*mut c_void> {
        let text = CString::new(name)?;
        // SAFETY: the handle is of a library that is never closed.
        let found = unsafe { libc::dlsym(self.handle, text.as_ptr()) };
        if found.is_null() {
            bail!(
                "{} has no function {name}: it is older than {}; install a newer one",
                self.what,
                self.since
            );
        }
        Ok(found)
    }
}

/// Loads what a library is going to ask for by name, which the system finds in no other folder than its own, unless it is
/// loaded. Failures are told by the library when it asks.
fn load_beside(folder: &Path, names: Option<&str>) {
    let (Some(names), Ok(files)) = (names, std::fs::read_dir(folder)) else { return };
    for file in files.flatten().filter(|file| file.file_name().to_string_lossy().starts_with(names)) {
        let _ = open(&file.path());
    }
}

fn open(path: &Path) -> Result<*mut c_void, String> {
    let name = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| e.to_string())?;
    // SAFETY: loading runs the library's own start-up code: these are NVIDIA's, or what the user put in their place.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if !handle.is_null() {
        return Ok(handle);
    }
    // SAFETY: the error's text, which is of this thread and stays until the next call.
    let text: *const c_char = unsafe { libc::dlerror() };
    if text.is_null() {
        return Err(format!("{}: no reason given", path.display()));
    }
    // SAFETY: as above.
    Err(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// Where CUDA's installer, container runtimes (which bring the host's driver) and packages of Python put libraries on this
/// machine.
fn folders(packages: &[&str]) -> Vec<PathBuf> {
    let fixed = ["/usr/local/cuda/lib64", "/usr/local/nvidia/lib64", "/usr/local/nvidia/lib"];
    let environments = environments();
    let packages = environments.iter().flat_map(|environment| folders_of(environment, packages));
    fixed.into_iter().map(PathBuf::from).chain(packages).collect()
}

/// Environments of Python that there may be, each once.
fn environments() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let activated = [variable("VIRTUAL_ENV"), variable("CONDA_PREFIX"), Some(PathBuf::from(".venv"))];
    let usual = [
        variable("HOME").map(|home| home.join(".local")),
        Some(PathBuf::from("/usr/local")),
        Some(PathBuf::from("/usr")),
    ];
    let on_path = environments_on(&std::env::var_os("PATH").unwrap_or_default());
    let mut met = HashSet::new();
    let all = activated.into_iter().flatten().chain(on_path).chain(usual.into_iter().flatten());
    all.filter(|environment| met.insert(environment.clone())).collect()
}

/// Environments of the Pythons on a PATH. Images of containers put one there, and nothing is activated. A virtual environment
/// is where the link to its Python is; what that points to may have packages too.
fn environments_on(path: &OsStr) -> Vec<PathBuf> {
    let programs = std::env::split_paths(path)
        .flat_map(|folder| ["python3", "python"].map(|name| folder.join(name)))
        .filter(|program| program.is_absolute() && program.is_file());
    programs
        .flat_map(|program| {
            let target = program.canonicalize().ok();
            [Some(program), target].into_iter().flatten()
        })
        .filter_map(|program| Some(program.parent()?.parent()?.to_path_buf()))
        .collect()
}

/// Where an environment of Python has these packages.
fn folders_of(environment: &Path, packages: &[&str]) -> Vec<PathBuf> {
    let Ok(versions) = std::fs::read_dir(environment.join("lib")) else { return Vec::new() };
    let mut versions: Vec<PathBuf> = versions
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"))
        .map(|entry| entry.path())
        .collect();
    versions.sort();
    let sites = versions.iter().flat_map(|v| ["site-packages", "dist-packages"].map(|site| v.join(site)));
    sites
        .flat_map(|site| packages.iter().map(move |package| site.join("nvidia").join(package)))
        .filter(|folder| folder.is_dir())
        .collect()
}

/// Declares a table of a library's functions, as its header has them, and how it is filled.
macro_rules! functions {
    ($(#[$doc:meta])* $name:ident { $(fn $function:ident($($type:ty),*) -> $result:ty;)* }) => {
        $(#[$doc])*
        #[allow(non_snake_case)]
        pub(super) struct $name {
            $(pub $function: unsafe extern "C" fn($($type),*) -> $result,)*
        }

        impl $name {
            fn of(library: &$crate::cuda::library::Library) -> anyhow::Result<Self> {
                Ok($name {
                    // SAFETY: the functions have these types in the headers of CUDA 12 and 13, and of NCCL 2.
                    $($function: unsafe {
                        std::mem::transmute::<*mut std::ffi::c_void, unsafe extern "C" fn($($type),*) -> $result>(
                            library.function(stringify!($function))?,
                        )
                    },)*
                })
            }
        }
    };
}
pub(super) use functions;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_where_it_was_looked_for() {
        let wanted = Wanted {
            what: "the library of nothing",
            files: &["libferropt-nothing.so.1"],
            packages: &[],
            loads: None,
            install: "install nothing",
            since: "version 1",
        };
        let text = Library::load(&wanted).err().expect("no such library").to_string();
        for part in [
            "the library of nothing",
            "libferropt-nothing.so.1",
            "/usr/local/cuda/lib64",
            "/usr/local/nvidia/lib64",
            "install nothing",
            VARIABLE,
        ] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn packages_of_a_python_that_is_only_on_path_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let (own, base) = (root.join("torch/.venv"), root.join("base"));
        let package = |environment: &Path| environment.join("lib/python3.12/site-packages/nvidia/cublas/lib");
        for environment in [&own, &base] {
            std::fs::create_dir_all(environment.join("bin")).unwrap();
            std::fs::create_dir_all(package(environment)).unwrap();
        }
        std::fs::write(base.join("bin/python3.12"), "").unwrap();
        std::os::unix::fs::symlink(base.join("bin/python3.12"), own.join("bin/python3")).unwrap();
        let path = std::env::join_paths([&root.join("nowhere"), &own.join("bin"), Path::new("bin")]).unwrap();
        let found = environments_on(&path);
        assert_eq!(found, [own.clone(), base.clone()], "where the link is, and where it points to");
        let folders: Vec<PathBuf> =
            found.iter().flat_map(|e| folders_of(e, &["cublas/lib", "cu13/lib"])).collect();
        assert_eq!(folders, [package(&own), package(&base)]);
    }
}
