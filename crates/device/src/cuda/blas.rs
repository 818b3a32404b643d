//! Matrix products, by cuBLASLt. What it chose for a product's sizes is kept.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, ensure};

use super::CudaBuf;
use super::driver::{Address, CUDA_13, Gpu, Handle};
use super::graphs::Noted;
use super::library::{Library, Wanted, functions};
use crate::DType;

functions! {
    /// Functions of libcublasLt (cublasLt.h). All return 0 or the number of an error.
    Functions {
        fn cublasLtCreate(*mut Handle) -> c_int;
        fn cublasLtDestroy(Handle) -> c_int;
        fn cublasLtMatmulDescCreate(*mut Handle, c_int, c_int) -> c_int;
        fn cublasLtMatmulDescDestroy(Handle) -> c_int;
        fn cublasLtMatmulDescSetAttribute(Handle, c_int, *const c_void, usize) -> c_int;
        fn cublasLtMatrixLayoutCreate(*mut Handle, c_int, u64, u64, i64) -> c_int;
        fn cublasLtMatrixLayoutDestroy(Handle) -> c_int;
        fn cublasLtMatmulPreferenceCreate(*mut Handle) -> c_int;
        fn cublasLtMatmulPreferenceDestroy(Handle) -> c_int;
        fn cublasLtMatmulPreferenceSetAttribute(Handle, c_int, *const c_void, usize) -> c_int;
        fn cublasLtMatmulAlgoGetHeuristic(
            Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Found, *mut c_int
        ) -> c_int;
        fn cublasLtMatmul(
            Handle, Handle, *const f32, Address, Handle, Address, Handle, *const f32, Address, Handle, Address, Handle,
            *const [u64; 8], Address, usize, Handle
        ) -> c_int;
    }
}

const CUBLASLT: Wanted = Wanted {
    what: "NVIDIA's library of matrix products",
    files: &["libcublasLt.so.13", "libcublasLt.so.12"],
    packages: &["cu13/lib", "cublas/lib"],
    loads: None,
    install: "Install CUDA 12 or 13, or in a Python environment `pip install nvidia-cublas`",
    since: "CUDA 12",
};
/// For drivers before [`CUDA_13`], with which a later library loads and then does not start.
const CUBLASLT_12: Wanted = Wanted {
    files: &["libcublasLt.so.12"],
    packages: &["cublas/lib"],
    install: "The driver is older than CUDA 13: install CUDA 12, or in a Python environment \
              `pip install nvidia-cublas-cu12`",
    ..CUBLASLT
};

/// CUBLAS_COMPUTE_32F, CUDA_R_32F, CUDA_R_16BF.
const COMPUTE_F32: c_int = 68;
const F32: c_int = 0;
const BF16: c_int = 14;
const F16: c_int = 2;
/// CUBLASLT_MATMUL_DESC_TRANSA, _TRANSB.
const TRANSPOSE: [c_int; 2] = [3, 4];
/// CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, _REDUCTION_SCHEME_MASK, _MIN_ALIGNMENT_A_BYTES to _D_BYTES.
const MOST_WORKSPACE: c_int = 1;
const REDUCTIONS: c_int = 3;
const ALIGNMENTS: [c_int; 4] = [5, 6, 7, 8];
/// CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE: where a sum is cut, its parts are added in f32, in a fixed order. Adding them in
/// place, as they come, would give other bits each time.
const IN_ORDER: u32 = 2;

/// Bytes that a product may use beside its operands: what NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;

/// cublasLtMatmulHeuristicResult_t.
#[repr(C)]
pub(super) struct Found {
    algorithm: [u64; 8],
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

/// A factor of a product: rows of memory [rows, columns], and whether they are what is summed over (so that it is used
/// turned around).
#[derive(Clone, Copy)]
pub(super) struct Factor {
    pub address: Address,
    pub dtype: DType,
    pub turned: bool,
}

/// `out[m, n] (+)= left[m, k] * right[k, n]`, all in rows. A turned `left` is [k, m] in memory, a turned `right` [n, k].
pub(super) struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub left: Factor,
    pub right: Factor,
    pub out: Address,
    pub out_dtype: DType,
    pub add: bool,
}

impl Product {
    /// All that decides what it does.
    fn words(&self) -> [u64; 11] {
        let Product { m, n, k, left, right, out, out_dtype, add } = self;
        let flags =
            [left.dtype as u64, left.turned as u64, right.turned as u64, *out_dtype as u64, *add as u64];
        let [m, n, k] = [m, n, k].map(|n| *n as u64);
        let [a, b, c, d, e] = flags;
        [m, n, k, left.address, right.address, *out, a, b, c, d, e]
    }
}

/// What decides which algorithm is the best.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    sizes: [usize; 3],
    dtypes: [DType; 2],
    turned: [bool; 2],
    /// Largest power of two, up to 256, that divides each address.
    alignments: [u32; 3],
}

/// Descriptions of the operands, and the algorithm.
struct Plan {
    operation: Handle,
    layouts: [Handle; 3],
    algorithm: [u64; 8],
}

/// cuBLASLt on one GPU.
pub(super) struct Blas {
    gpu: Arc<Gpu>,
    functions: Functions,
    handle: Handle,
    workspace: CudaBuf<u32>,
    plans: Mutex<HashMap<Key, Plan>>,
}

// SAFETY: cuBLASLt's functions may be called from any thread with one handle; plans are behind a lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Blas {
    pub(super) fn load(gpu: &Arc<Gpu>) -> Result<Blas> {
        let wanted = if gpu.version < CUDA_13 { &CUBLASLT_12 } else { &CUBLASLT };
        let functions = Functions::of(&Library::load(wanted)?)?;
        let mut handle = null_mut();
        gpu.driver();
        // SAFETY: the result goes to a variable.
        let code = unsafe { (functions.cublasLtCreate)(&mut handle) };
        ensure!(code == 0, "cuBLASLt does not start on {} (status {code})", gpu.name);
        let workspace = CudaBuf::new(gpu, WORKSPACE / 4)?;
        Ok(Blas { gpu: gpu.clone(), functions, handle, workspace, plans: Mutex::default() })
    }

    /// Bytes of workspace.
    pub(super) fn workspace_bytes() -> usize {
        WORKSPACE
    }

    /// Starts a product.
    ///
    /// # Panics
    /// When cuBLASLt has no way to make it.
    pub(super) fn multiply(&self, p: &Product) {
        if p.m == 0 || p.n == 0 {
            return;
        }
        // cuBLASLt thinks in columns: rows of memory are its columns. So it is asked for out^T = right^T * left^T.
        let alignment = |address: Address| 1 << (address | 256).trailing_zeros();
        let key = Key {
            sizes: [p.m, p.n, p.k],
            dtypes: [p.left.dtype, p.out_dtype],
            turned: [p.left.turned, p.right.turned],
            alignments: [p.right.address, p.left.address, p.out].map(alignment),
        };
        if self.gpu.note(Noted::Product, p.words()) {
            return;
        }
        let (one, beta) = (1.0f32, if p.add { 1.0f32 } else { 0.0 });
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = plans.entry(key).or_insert_with(|| self.plan(&key));
        let [right, left, out] = plan.layouts;
        self.gpu.in_order("a product");
        self.gpu.driver();
        // SAFETY: the plan describes exactly these operands; all memory outlives the work (see `Kernels::launch`).
        let code = unsafe {
            (self.functions.cublasLtMatmul)(
                self.handle,
                plan.operation,
                &one,
                p.right.address,
                right,
                p.left.address,
                left,
                &beta,
                p.out,
                out,
                p.out,
                out,
                &plan.algorithm,
                self.workspace.at(0, WORKSPACE / 4),
                WORKSPACE,
                self.gpu.stream(),
            )
        };
        self.expect("a product", &key, code);
    }

    fn plan(&self, key: &Key) -> Plan {
        let f = &self.functions;
        let [m, n, k] = key.sizes.map(|n| n as u64);
        let [of_factors, of_out] = key.dtypes.map(|dtype| match dtype {
            DType::Bf16 => BF16,
            DType::F16 => F16,
            _ => F32,
        });
        let [left_turned, right_turned] = key.turned;
        let (mut operation, mut layouts, mut preference) = (null_mut(), [null_mut(); 3], null_mut());
        // SAFETY: results go to variables; values are read within the calls, with the sizes that their attributes have.
        let (count, found) = unsafe {
            let check = |code| self.expect("a description", key, code);
            check((f.cublasLtMatmulDescCreate)(&mut operation, COMPUTE_F32, F32));
            for (attribute, turned) in TRANSPOSE.into_iter().zip([right_turned, left_turned]) {
                let value = turned as c_int;
                check((f.cublasLtMatmulDescSetAttribute)(operation, attribute, (&raw const value).cast(), 4));
            }
            let right = if right_turned { (k, n) } else { (n, k) };
            let left = if left_turned { (m, k) } else { (k, m) };
            let shapes = [(of_factors, right), (of_factors, left), (of_out, (n, m))];
            for (layout, (dtype, (rows, columns))) in layouts.iter_mut().zip(shapes) {
                check((f.cublasLtMatrixLayoutCreate)(layout, dtype, rows, columns, rows as i64));
            }
            check((f.cublasLtMatmulPreferenceCreate)(&mut preference));
            let set = |attribute, value: *const c_void, size| {
                check((f.cublasLtMatmulPreferenceSetAttribute)(preference, attribute, value, size));
            };
            let (workspace, in_order) = (WORKSPACE, IN_ORDER);
            set(MOST_WORKSPACE, (&raw const workspace).cast(), 8);
            set(REDUCTIONS, (&raw const in_order).cast(), 4);
            let [right, left, out] = key.alignments;
            for (attribute, value) in ALIGNMENTS.into_iter().zip([right, left, out, out]) {
                set(attribute, (&raw const value).cast(), 4);
            }
            let (mut count, mut found) = (0, std::mem::zeroed::<Found>());
            let [a, b, c] = layouts;
            let code = (f.cublasLtMatmulAlgoGetHeuristic)(
                self.handle,
                operation,
                a,
                b,
                c,
                c,
                preference,
                1,
                &mut found,
                &mut count,
            );
            self.expect("an algorithm", key, code);
            (f.cublasLtMatmulPreferenceDestroy)(preference);
            (count, found)
        };
        if count != 1 || found.state != 0 || found.workspace > WORKSPACE {
            let (sizes, dtypes) = (key.sizes, key.dtypes);
            self.gpu.fail(&format!("cuBLASLt has no algorithm for a product of {sizes:?} in {dtypes:?}"));
        }
        Plan { operation, layouts, algorithm: found.algorithm }
    }

    fn expect(&self, what: &str, key: &Key, code: c_int) {
        if code != 0 {
            let (sizes, dtypes) = (key.sizes, key.dtypes);
            self.gpu.fail(&format!("cuBLASLt gave status {code} for {what} of {sizes:?} in {dtypes:?}"));
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if self.gpu.closing().is_none() {
            return;
        }
        let f = &self.functions;
        let plans = self.plans.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: each was made once and is given back once. Errors can change nothing any more.
        unsafe {
            for plan in plans.values() {
                (f.cublasLtMatmulDescDestroy)(plan.operation);
                for layout in plan.layouts {
                    (f.cublasLtMatrixLayoutDestroy)(layout);
                }
            }
            (f.cublasLtDestroy)(self.handle);
        }
    }
}
