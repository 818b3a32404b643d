//! The kernels: their sources, the machine code of a GPU, and how they are started.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use bytemuck::NoUninit;

use super::cubin::kernels_in;
use super::driver::{Gpu, Handle, KernelNode};
use super::nvrtc::{Compiler, Source};

/// Names and texts of files in `kernels/`.
macro_rules! sources {
    ($($name:literal),* $(,)?) => { &[$(($name, include_str!(concat!("kernels/", $name)))),*] };
}

/// What other files include.
pub(super) const HEADERS: &[Source] =
    sources!["common.cuh", "mma.cuh", "attention.cuh", "attention_mma.cuh", "packed.cuh"];
/// Programs.
pub(super) const PROGRAMS: &[Source] = sources![
    "attention.cu",
    "attention_backward.cu",
    "attention_mma.cu",
    "attention_mma_backward.cu",
    "attention_paged.cu",
    "column_sums.cu",
    "draw.cu",
    "elementwise.cu",
    "embed.cu",
    "layer_norm.cu",
    "loss.cu",
    "optimizer.cu",
    "packed.cu",
    "packed_mma.cu",
    "residual.cu",
];

/// Shared memory that a block may use without asking for more, that of its kernel's own variables included.
const SHARED: usize = 48 << 10;
/// CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: what a kernel's own variables take.
const OWN_SHARED: c_int = 1;
/// CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: what a launch may ask for beside them.
const MOST_SHARED: c_int = 8;

/// A kernel, and its shared memory.
struct Function {
    handle: Handle,
    /// Bytes of its own variables.
    own: usize,
    /// Bytes that a launch may ask for beside them.
    allowed: usize,
}

/// All kernels of one GPU.
pub(super) struct Kernels {
    gpu: Arc<Gpu>,
    modules: Vec<Handle>,
    /// Those that were fetched, by name.
    found: Mutex<HashMap<String, Function>>,
}

// SAFETY: the handles are only passed to the driver, whose functions may be called from any thread.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Loads all programs, which the first time on a machine are compiled, and fetches their kernels. The driver brings one to
    /// the GPU when it is fetched and may wait for all that the GPU does meanwhile; later, with an exchange under way that
    /// waits for another rank, two ranks could so wait for each other.
    ///
    /// # Errors
    /// When there is no compiler for what is not kept on the disk, or the GPU does not take what was made.
    pub(super) fn load(gpu: &Arc<Gpu>) -> Result<Kernels> {
        Kernels::made_by(&Compiler::new(gpu.version), gpu)
    }

    fn made_by(compiler: &Compiler, gpu: &Arc<Gpu>) -> Result<Kernels> {
        let codes: Vec<Result<Vec<u8>>> = std::thread::scope(|scope| {
            let compile =
                |source: &'static Source| move || compiler.machine_code(*source, HEADERS, gpu.capability);
            let threads: Vec<_> = PROGRAMS.iter().map(|source| scope.spawn(compile(source))).collect();
            threads
                .into_iter()
                .map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        let mut kernels = Kernels { gpu: gpu.clone(), modules: Vec::new(), found: Mutex::default() };
        let mut found = HashMap::new();
        for (source, code) in PROGRAMS.iter().zip(codes) {
            let (mut code, refused) = (code?, format!("the GPU does not take the kernels in {}", source.0));
            let module = load_module(gpu, &code).or_else(|error| {
                // It may have been kept on the disk, and be of no use any more.
                code = compiler
                    .compile(*source, HEADERS, gpu.capability)
                    .with_context(|| format!("{refused}: {error:#}"))?;
                load_module(gpu, &code).context(refused)
            })?;
            kernels.modules.push(module);
            for name in kernels_in(&code) {
                let function = fetch(gpu, module, &name)?;
                found.extend(function.map(|function| (name.to_string_lossy().into_owned(), function)));
            }
        }
        kernels.found = Mutex::new(found);
        Ok(kernels)
    }

    /// Starts a kernel: `blocks` and `threads` in x and y, bytes of shared memory, and arguments in order. Nothing happens
    /// where there are no blocks.
    ///
    /// # Panics
    /// When there is no such kernel, or the GPU refuses it.
    pub(super) fn launch(
        &self,
        name: &str,
        blocks: (usize, usize),
        threads: (usize, usize),
        shared: usize,
        arguments: &mut Arguments,
    ) {
        if blocks.0 == 0 || blocks.1 == 0 {
            return;
        }
        let function = self.function(name, shared);
        let sizes = [blocks.0, blocks.1, threads.0, threads.1, shared].map(|n| n as c_uint);
        if self.gpu.note_call(|| Call { function, sizes, arguments: arguments.clone() }) {
            return;
        }
        let [bx, by, tx, ty, shared] = sizes;
        let mut pointers = arguments.pointers();
        // SAFETY: the arguments are those of the kernel, which callers of this crate keep next to its name; the driver
        // copies them before it returns. What they point to is alive until the work on the stream is done, because giving
        // memory back waits for that.
        let code = unsafe {
            (self.gpu.driver().cuLaunchKernel)(
                function,
                bx,
                by,
                1,
                tx,
                ty,
                1,
                shared,
                self.gpu.stream(),
                pointers.as_mut_ptr(),
                null_mut(),
            )
        };
        self.gpu.expect(&format!("kernel {name} with {blocks:?} blocks of {threads:?} threads"), code);
        self.gpu.recorded();
    }

    /// A kernel that may use so many bytes of shared memory.
    fn function(&self, name: &str, shared: usize) -> Handle {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if !found.contains_key(name) {
            let text = CString::new(name).unwrap_or_default();
            // Machine code whose kernels cannot be listed when it is loaded, such as the emulated GPU's.
            let fetched = self.modules.iter().find_map(|module| fetch(&self.gpu, *module, &text).transpose());
            let function = fetched.unwrap_or_else(|| panic!("there is no kernel {name}"));
            let function = function.unwrap_or_else(|e| self.gpu.fail(&format!("kernel {name}: {e:#}")));
            found.insert(name.to_string(), function);
        }
        let Function { handle, own, allowed } = found.get_mut(name).expect("inserted above");
        if shared > *allowed {
            // SAFETY: the function is of a living module.
            let code =
                unsafe { (self.gpu.driver().cuFuncSetAttribute)(*handle, MOST_SHARED, shared as c_int) };
            let (all, most) = (shared + *own, self.gpu.shared);
            self.gpu
                .expect(&format!("kernel {name} wants {all} of at most {most} bytes of shared memory"), code);
            *allowed = shared;
        }
        *handle
    }
}

/// Brings a program to the GPU.
fn load_module(gpu: &Gpu, code: &[u8]) -> Result<Handle> {
    let mut module = null_mut();
    // SAFETY: the code is whole and outlives the call; the result goes to a variable.
    gpu.check(unsafe { (gpu.driver().cuModuleLoadData)(&mut module, code.as_ptr().cast()) })?;
    Ok(module)
}

/// Fetches a kernel, if this module has it.
fn fetch(gpu: &Gpu, module: Handle, name: &CStr) -> Result<Option<Function>> {
    let (driver, mut handle, mut own) = (gpu.driver(), null_mut(), 0);
    // SAFETY: the module is alive, the name ends with 0, results go to variables.
    unsafe {
        if (driver.cuModuleGetFunction)(&mut handle, module, name.as_ptr()) != 0 {
            return Ok(None);
        }
        gpu.check((driver.cuFuncGetAttribute)(&mut own, OWN_SHARED, handle))?;
    }
    let own = own as usize;
    Ok(Some(Function { handle, own, allowed: SHARED.saturating_sub(own) }))
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let Some(f) = self.gpu.closing() else { return };
        for module in &self.modules {
            // SAFETY: loaded once, given back once. An error can change nothing any more.
            unsafe { (f.cuModuleUnload)(*module) };
        }
    }
}

/// A kernel that is to be started: blocks and threads in x and y, bytes of shared memory.
#[derive(Clone, PartialEq)]
pub(super) struct Call {
    pub function: Handle,
    pub sizes: [c_uint; 5],
    pub arguments: Arguments,
}

impl Call {
    /// Makes it what a node of a graph starts, which started the same kernel, in the same blocks, with other arguments.
    pub(super) fn put(&mut self, gpu: &Gpu, graph: Handle, node: Handle) {
        let [bx, by, tx, ty, shared] = self.sizes;
        let mut pointers = self.arguments.pointers();
        let node_params = KernelNode {
            function: self.function,
            blocks: [bx, by, 1],
            threads: [tx, ty, 1],
            shared,
            arguments: pointers.as_mut_ptr(),
            extra: null_mut(),
        };
        // SAFETY: the node is of what the graph was made of, and both are alive; as for arguments, see `Kernels::launch`.
        let code = unsafe { (gpu.driver().cuGraphExecKernelNodeSetParams)(graph, node, &node_params) };
        gpu.expect("a kernel of a graph does not take other arguments", code);
    }
}

/// Arguments of a kernel, as bytes: numbers, addresses, and structs that are declared alike on both sides.
#[derive(Clone, Default, PartialEq)]
pub(super) struct Arguments {
    words: Vec<u64>,
    starts: Vec<usize>,
}

impl Arguments {
    /// Adds one.
    pub(super) fn with<T: NoUninit>(mut self, value: T) -> Self {
        const { assert!(align_of::<T>() <= 8) };
        let start = self.words.len();
        self.words.resize(start + size_of::<T>().div_ceil(8), 0);
        bytemuck::cast_slice_mut(&mut self.words[start..])[..size_of::<T>()]
            .copy_from_slice(bytemuck::bytes_of(&value));
        self.starts.push(start);
        self
    }

    fn pointers(&mut self) -> Vec<*mut c_void> {
        let words = self.words.as_mut_ptr();
        self.starts.iter().map(|start| words.wrapping_add(*start).cast()).collect()
    }
}

/// The arguments of a kernel, in order.
macro_rules! args {
    ($($value:expr),* $(,)?) => { &mut $crate::cuda::kernels::Arguments::default()$(.with($value))* };
}
pub(super) use args;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::cubin::frames_in;
    use crate::cuda::driver::CUDA_13;
    use crate::cuda::nvrtc::{keep, kept};
    use crate::cuda::{CudaDevice, CudaOptions};
    use crate::{Device, Store};

    #[test]
    fn every_file_of_kernels_is_known() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/cuda/kernels");
        let mut there: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let mut known: Vec<String> =
            HEADERS.iter().chain(PROGRAMS).map(|(name, _)| name.to_string()).collect();
        there.sort();
        known.sort();
        assert_eq!(there, known);
    }

    #[test]
    #[ignore = "needs NVRTC, no GPU; scripts/check-cuda-kernels runs it"]
    fn every_kernel_compiles_for_ampere_and_hopper() {
        // One after the other: NVRTC compiles one program at a time, whatever the threads.
        let compiler = Compiler::new(CUDA_13);
        let mut names = Vec::new();
        for source in PROGRAMS {
            for capability in [(8, 0), (9, 0)] {
                let code = compiler.machine_code(*source, HEADERS, capability).unwrap();
                assert_eq!(&code[..4], b"\x7fELF", "{}", source.0);
                let kernels = kernels_in(&code);
                assert!(!kernels.is_empty(), "no kernels are seen in what became of {}", source.0);
                // An array that is not in registers, or registers that are short, make a kernel many times slower.
                let frames = frames_in(&code).unwrap();
                assert!(kernels.iter().all(|name| frames.iter().any(|frame| frame.0 == *name)), "{frames:?}");
                let local: Vec<_> = frames.iter().filter(|(_, bytes)| *bytes > 0).collect();
                assert!(local.is_empty(), "local memory for {capability:?} in {}: {local:?}", source.0);
                names.extend(kernels.into_iter().map(|name| (name.into_string().unwrap(), capability)));
            }
        }
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all, "two kernels have one name");
        for name in ["fill_4", "layer_norm_backward_bf16", "attention_dkv_f32_256", "set_master_f16"] {
            assert_eq!(names.iter().filter(|(seen, _)| seen == name).count(), 2, "{name}");
        }
    }

    #[test]
    #[ignore = "needs a GPU, real or emulated; scripts/check-cuda-kernels runs it"]
    fn what_the_gpu_does_not_take_any_more_is_compiled_again() {
        let folder = tempfile::tempdir().unwrap();
        let gpu = Arc::new(Gpu::open(0).unwrap());
        let compiler = Compiler::keeping(gpu.version, Some(folder.path().into()));
        let load = || drop(Kernels::made_by(&compiler, &gpu).unwrap());
        load();
        let path = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        let code = kept(&path).unwrap();
        keep(&path, b"no machine code\0").unwrap();
        load();
        assert!(kept(&path).unwrap() == code, "what was compiled again is not kept");
    }

    #[test]
    #[ignore = "needs a GPU, real or emulated; scripts/check-cuda-kernels runs it"]
    fn a_kernels_own_variables_are_shared_memory_too() {
        let device = CudaDevice::new(0, CudaOptions::default()).unwrap();
        // For each column 8 bytes: 48 KiB without the kernel's own, which the last width asks the driver for beforehand.
        for width in [6128, 6144, 6145] {
            let x = device.alloc::<f32>(width).unwrap();
            let [mut dx, mut dgamma, mut dbeta] = [(); 3].map(|()| device.alloc::<f32>(width).unwrap());
            let (gamma, mean, rstd) = (device.alloc(width), device.alloc(1), device.alloc(1));
            let (gamma, mean, rstd) = (gamma.unwrap(), mean.unwrap(), rstd.unwrap());
            device.layer_norm_backward(
                width,
                &x,
                &x,
                &mean,
                &rstd,
                &gamma,
                &mut dx,
                Store::Overwrite,
                &mut dgamma,
                &mut dbeta,
                Store::Overwrite,
            );
            device.wait();
        }
    }
}
