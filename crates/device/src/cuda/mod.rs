//! The CUDA device: one NVIDIA GPU, its libraries found when it is opened.
//!
//! All work goes to one stream in order, but for what is exchanged with other GPUs (`nccl.rs`) and what is done beside it (`lanes.rs`); operations return when it is enqueued, and only [`Device::download`] and what
//! answers with numbers waits. Products are cuBLASLt's, the rest are the kernels in `kernels/`. This file holds the device
//! itself and connects operations to [`Device`]; `kernels.rs` starts kernels, `driver.rs`, `nvrtc.rs`, `blas.rs`, `nccl.rs` speak
//! with NVIDIA's libraries.
//!
//! An operation that fails on the GPU (a lost device, a kernel that crashed) ends in a panic with the driver's words: what
//! was computed before cannot be trusted either. Being out of memory when a buffer is made is an error like any other.

mod attention;
mod blas;
mod buffer;
mod cubin;
mod draw;
mod driver;
mod event;
mod graphs;
mod kernels;
mod lanes;
mod library;
mod linear;
mod loss;
mod nccl;
mod nvrtc;
mod optimizer;
mod packed;
mod peak;
mod rows;
mod switch;
mod workspace;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use bytemuck::NoUninit;

pub use buffer::CudaBuf;
pub use packed::CudaPacked;

use crate::cpu::pool::Pool;
use crate::*;
use blas::Blas;
use driver::{Address, Gpu};
use graphs::Graphs;
use kernels::{Arguments, Kernels};
use loss::Gradients;
use workspace::Workspace;

/// How to use a GPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct CudaOptions {
    /// Threads of the processor beside it; all that the process may use when absent.
    pub threads: Option<usize>,
    /// Whether operations that are repeated become CUDA graphs. The environment variable `FERROPT_CUDA_GRAPHS` (0 or 1) sets
    /// the default, which is that they do. Results are the same bits.
    pub graphs: Option<bool>,
}

/// One NVIDIA GPU.
pub struct CudaDevice {
    graphs: Mutex<Graphs>,
    /// Whether NCCL may be used.
    nccl: bool,
    kernels: Kernels,
    blas: Blas,
    /// Threads of the processor, for what is done beside the GPU.
    pool: Pool,
    workspace: Mutex<Workspace>,
    /// Held by the loss while the products that it is made of use `workspace`.
    loss_workspace: Mutex<Workspace>,
    // Last: what is above gives memory back through it.
    gpu: Arc<Gpu>,
}

impl CudaDevice {
    /// Opens GPU `number`. The first time on a machine its kernels are compiled, which takes seconds.
    ///
    /// # Errors
    /// When a library is missing, with where it was looked for and what to install; when there is no such GPU; when the
    /// environment says about graphs or NCCL what has no meaning.
    pub fn new(number: usize, options: CudaOptions) -> anyhow::Result<Self> {
        let threads = cpu::pool::threads(options.threads)?;
        let graphs = Graphs::new(options.graphs)?;
        let nccl = nccl::wanted()?;
        let open = || {
            let gpu = Arc::new(Gpu::open(number)?);
            Ok(CudaDevice {
                graphs: Mutex::new(graphs),
                nccl,
                kernels: Kernels::load(&gpu)?,
                blas: Blas::load(&gpu)?,
                pool: Pool::new(threads, false),
                workspace: Mutex::new(Workspace::new(&gpu)),
                loss_workspace: Mutex::new(Workspace::new(&gpu)),
                gpu,
            })
        };
        open().map_err(|error: anyhow::Error| error.context(format!("cannot use GPU {number}")))
    }

    /// GPUs that this process sees.
    ///
    /// # Errors
    /// When NVIDIA's driver is missing or refuses.
    pub fn count() -> anyhow::Result<usize> {
        Gpu::count()
    }

    /// Threads of the processor beside it.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// How often a sequence of operations that is repeated was started at once, as a graph.
    pub fn graphs_started(&self) -> u64 {
        self.graphs.lock().unwrap_or_else(PoisonError::into_inner).started()
    }

    /// Workspace for one operation; held until its work is enqueued.
    fn workspace(&self) -> MutexGuard<'_, Workspace> {
        self.gpu.in_order("an operation that uses workspace");
        self.workspace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Workspace of the fused loss; taken before, never after, [`CudaDevice::workspace`].
    fn loss_workspace(&self) -> MutexGuard<'_, Workspace> {
        self.loss_workspace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of workspace that operations have taken so far; they are used again.
    pub fn workspace_taken(&self) -> usize {
        Blas::workspace_bytes() + self.workspace().bytes() + self.loss_workspace().bytes()
    }

    /// Starts a kernel with a block for each row, of about as many threads as there is `work` in a row.
    fn by_row(&self, kernel: &str, rows: usize, work: usize, arguments: &mut Arguments) {
        self.kernels.launch(kernel, (rows, 1), (threads_for(work), 1), 0, arguments);
    }

    /// Starts a kernel whose threads share out `work`, each going on with the next free one.
    fn by_element(&self, kernel: &str, work: usize, arguments: &mut Arguments) {
        const THREADS: usize = 256;
        // As many blocks as fit a GPU at a time, several times over, so that the last ones end together.
        let blocks = work.div_ceil(THREADS).min(32 * self.gpu.multiprocessors);
        self.kernels.launch(kernel, (blocks, 1), (THREADS, 1), 0, arguments);
    }

    /// Copies numbers to workspace.
    fn write<T: bytemuck::Pod>(&self, to: Address, values: &[T]) {
        // SAFETY: the address is of at least so many bytes, as the callers in this module took them.
        unsafe { self.gpu.upload(to, values) };
    }

    /// Copies numbers from workspace, when all work before is done.
    fn read<T: bytemuck::Pod>(&self, from: Address, values: &mut [T]) {
        // SAFETY: as in `write`.
        unsafe { self.gpu.download(from, values) };
    }

    /// Copies memory that the GPU reaches.
    fn copy_bytes(&self, to: Address, from: Address, bytes: usize) {
        // SAFETY: both are of at least so many bytes, as the callers in this module checked.
        unsafe { self.gpu.copy(to, from, bytes) };
    }
}

/// Threads of a block that has so much to do: whole warps, at most 256.
fn threads_for(work: usize) -> usize {
    work.next_multiple_of(32).clamp(32, 256)
}

/// Name of a compute type, as in kernels' names.
fn name<E: Element>() -> &'static str {
    match E::DTYPE {
        DType::F32 => "f32",
        DType::Bf16 => "bf16",
        DType::F16 => "f16",
        other => panic!("{other} is no type to compute with; f32, bf16 and f16 are"),
    }
}

/// Address of the first `len` elements; 0, which kernels take for none, where there is no buffer.
fn optional<T: Element>(buffer: Option<&CudaBuf<T>>, len: usize) -> Address {
    buffer.map_or(0, |buffer| buffer.at(0, len))
}

/// `Stream` of kernels/common.cuh.
#[derive(Clone, Copy, Default, NoUninit)]
#[repr(C)]
struct StreamWords {
    seed: u64,
    what: u32,
    step: u32,
}

impl StreamWords {
    fn new(stream: rng::Stream) -> Self {
        StreamWords { seed: stream.seed, what: stream.what, step: stream.step }
    }
}

/// `Dropout` of kernels/common.cuh.
#[derive(Clone, Copy, Default, NoUninit)]
#[repr(C)]
struct DropoutWords {
    stream: StreamWords,
    first_row: u64,
    threshold: u32,
    keep: f32,
}

impl DropoutWords {
    fn new(dropout: Option<Dropout>) -> Self {
        let Some(d) = dropout else { return DropoutWords { keep: 1.0, ..DropoutWords::default() } };
        let (threshold, keep) = (d.threshold(), d.keep());
        DropoutWords { stream: StreamWords::new(d.stream), first_row: d.first_row, threshold, keep }
    }
}

impl Device for CudaDevice {
    type Buf<T: Element> = CudaBuf<T>;
    type Packed = CudaPacked;

    fn describe(&self) -> String {
        let (bytes, version) = self.gpu.facts().unwrap_or_default();
        format!(
            "{}, {:.0} GiB, CUDA {}.{}",
            self.gpu.name,
            bytes as f64 / (1u64 << 30) as f64,
            version / 1000,
            version % 1000 / 10
        )
    }

    fn alloc<T: Element>(&self, len: usize) -> anyhow::Result<CudaBuf<T>> {
        self.gpu.outside("making a buffer");
        CudaBuf::zeroed(&self.gpu, len)
    }

    fn alloc_host<T: Element>(&self, len: usize) -> anyhow::Result<CudaBuf<T>> {
        CudaBuf::zeroed_on_host(&self.gpu, len)
    }

    fn memory_taken(&self) -> Option<u64> {
        Some(self.gpu.taken())
    }

    fn upload<T: Element>(&self, dst: &mut CudaBuf<T>, offset: usize, src: &[T]) {
        dst.write(offset, src);
    }

    fn download<T: Element>(&self, src: &CudaBuf<T>, offset: usize, dst: &mut [T]) {
        src.read(offset, dst);
    }

    fn wait(&self) {
        self.gpu.wait();
    }

    fn network(&self) -> Option<anyhow::Result<Box<dyn Network>>> {
        Some(nccl::open(&self.gpu, self.nccl))
    }

    fn repeated(&self, work: &mut dyn FnMut()) {
        graphs::repeated(self, work);
    }

    fn beside(&self, lane: Lane, work: &mut dyn FnMut()) -> Option<Box<dyn Transfer>> {
        Some(self.gpu.beside(lane, work))
    }

    fn fill<T: Element>(&self, dst: &mut CudaBuf<T>, value: T) {
        rows::fill(self, dst, value);
    }

    fn embed<E: Element, O: Element>(
        &self,
        rows: usize,
        width: usize,
        ids: &CudaBuf<u32>,
        table: &CudaBuf<E>,
        second: Option<(&CudaBuf<u32>, &CudaBuf<E>)>,
        out: &mut CudaBuf<O>,
    ) {
        rows::embed(self, (rows, width), ids, table, second, out);
    }

    fn embed_backward<G: Element>(
        &self,
        width: usize,
        ids: &CudaBuf<u32>,
        dout: &CudaBuf<G>,
        dtable: &mut CudaBuf<f32>,
    ) {
        rows::embed_backward(self, width, ids, dout, dtable);
    }

    fn layer_norm<E: Element>(
        &self,
        rows: usize,
        width: usize,
        x: &CudaBuf<f32>,
        gamma: &CudaBuf<f32>,
        beta: &CudaBuf<f32>,
        y: &mut CudaBuf<E>,
        y_f32: Option<&mut CudaBuf<f32>>,
        mean: &mut CudaBuf<f32>,
        rstd: &mut CudaBuf<f32>,
    ) {
        rows::layer_norm(self, (rows, width), x, gamma, beta, y, y_f32, mean, rstd);
    }

    fn layer_norm_backward<G: Element>(
        &self,
        width: usize,
        dy: &CudaBuf<G>,
        x: &CudaBuf<f32>,
        mean: &CudaBuf<f32>,
        rstd: &CudaBuf<f32>,
        gamma: &CudaBuf<f32>,
        dx: &mut CudaBuf<f32>,
        dx_store: Store,
        dgamma: &mut CudaBuf<f32>,
        dbeta: &mut CudaBuf<f32>,
        grad_store: Store,
    ) {
        rows::layer_norm_backward(
            self, width, dy, x, mean, rstd, gamma, dx, dx_store, dgamma, dbeta, grad_store,
        );
    }

    fn linear<E: Element, O: Element>(
        &self,
        s: LinearShape,
        x: &CudaBuf<E>,
        w: &CudaBuf<E>,
        bias: Option<&CudaBuf<f32>>,
        act: Activation,
        y: &mut CudaBuf<O>,
    ) {
        linear::forward(self, s, x, w, bias, act, y);
    }

    fn linear_residual<E: Element>(
        &self,
        s: LinearShape,
        x: &CudaBuf<E>,
        w: &CudaBuf<E>,
        bias: Option<&CudaBuf<f32>>,
        dropout: Option<Dropout>,
        residual: &CudaBuf<f32>,
        out: &mut CudaBuf<f32>,
    ) {
        linear::forward_residual(self, s, x, w, bias, dropout, residual, out);
    }

    fn pack_weight(
        &self,
        format: WeightFormat,
        n: usize,
        k: usize,
        rows: &ReadRows<'_>,
    ) -> anyhow::Result<CudaPacked> {
        CudaPacked::new(self, format, n, k, rows)
    }

    fn pack_codes(
        &self,
        format: WeightFormat,
        n: usize,
        k: usize,
        rows: &mut dyn FnMut(std::ops::Range<usize>, quantise::Codes<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<CudaPacked> {
        CudaPacked::from_codes(self, format, n, k, rows)
    }

    fn pack_random(
        &self,
        format: WeightFormat,
        n: usize,
        k: usize,
        random: RandomWeights,
    ) -> anyhow::Result<CudaPacked> {
        CudaPacked::random(self, format, n, k, random)
    }

    fn packed_layout(&self) -> String {
        packed::LAYOUT.to_string()
    }

    fn packed_size(&self, format: WeightFormat, n: usize, k: usize) -> usize {
        packed::size(format, n, k)
    }

    fn pack_weight_to(
        &self,
        format: WeightFormat,
        n: usize,
        k: usize,
        rows: &ReadRows<'_>,
        write: &WritePiece<'_>,
    ) -> anyhow::Result<()> {
        packed::pack_to(self, format, (n, k), rows, write)
    }

    fn packed_from(
        &self,
        format: WeightFormat,
        n: usize,
        k: usize,
        bytes: Mapped,
    ) -> anyhow::Result<CudaPacked> {
        CudaPacked::mapped(self, format, n, k, bytes)
    }

    fn packed_bytes(&self, w: &CudaPacked) -> usize {
        w.bytes()
    }

    fn packed_linear<E: Element, O: Element>(
        &self,
        m: usize,
        x: &CudaBuf<E>,
        w: &CudaPacked,
        bias: Option<&CudaBuf<f32>>,
        act: Activation,
        y: &mut CudaBuf<O>,
    ) {
        packed::multiply(self, m, x, w, bias, act, None, y);
    }

    fn packed_linear_residual<E: Element>(
        &self,
        m: usize,
        x: &CudaBuf<E>,
        w: &CudaPacked,
        bias: Option<&CudaBuf<f32>>,
        residual: &CudaBuf<f32>,
        out: &mut CudaBuf<f32>,
    ) {
        packed::multiply(self, m, x, w, bias, Activation::Identity, Some(residual), out);
    }

    fn packed_embed(
        &self,
        rows: usize,
        ids: &CudaBuf<u32>,
        w: &CudaPacked,
        second: Option<(&CudaBuf<u32>, &CudaBuf<f32>)>,
        out: &mut CudaBuf<f32>,
    ) {
        packed::embed(self, rows, ids, w, second, out);
    }

    fn linear_backward_input<E: Element, O: Element>(
        &self,
        s: LinearShape,
        dy: &CudaBuf<E>,
        w: &CudaBuf<E>,
        relu_output: Option<&CudaBuf<E>>,
        dx: &mut CudaBuf<O>,
    ) {
        linear::backward_input(self, s, dy.at(0, s.m * s.n), w, relu_output, dx, 0);
    }

    fn linear_backward_weight<E: Element>(
        &self,
        s: LinearShape,
        dy: &CudaBuf<E>,
        x: &CudaBuf<E>,
        dw: &mut CudaBuf<f32>,
        dbias: Option<&mut CudaBuf<f32>>,
        store: Store,
    ) {
        linear::backward_weight(self, s, E::DTYPE, (dy.at(0, s.m * s.n), x.at(0, s.m * s.k)), dw, store);
        if let Some(dbias) = dbias {
            linear::column_sums(self, (s.m, s.n), dy, dbias, store);
        }
    }

    fn residual<E: Element>(
        &self,
        rows: usize,
        width: usize,
        branch: &CudaBuf<E>,
        bias: Option<&CudaBuf<f32>>,
        dropout: Option<Dropout>,
        residual: &CudaBuf<f32>,
        out: &mut CudaBuf<f32>,
    ) {
        rows::residual(self, (rows, width), branch, bias, dropout, residual, out);
    }

    fn residual_backward<E: Element>(
        &self,
        width: usize,
        dres: &CudaBuf<f32>,
        dropout: Option<Dropout>,
        dy: &mut CudaBuf<E>,
    ) {
        rows::residual_backward(self, width, dres, dropout, dy);
    }

    fn cast<S: Element, T: Element>(&self, src: &CudaBuf<S>, dst: &mut CudaBuf<T>) {
        rows::cast(self, src, dst);
    }

    fn copy<T: Element>(&self, len: usize, src: &CudaBuf<T>, from: usize, dst: &mut CudaBuf<T>, to: usize) {
        dst.copy_from(to, src, from, len);
    }

    fn accumulate(&self, src: &CudaBuf<f32>, from: usize, dst: &mut CudaBuf<f32>, store: Store) {
        rows::accumulate(self, src, from, dst, store);
    }

    fn attention<E: Element>(
        &self,
        s: AttentionShape,
        qkv: &CudaBuf<E>,
        doc_start: Option<&CudaBuf<u32>>,
        dropout: Option<Dropout>,
        out: &mut CudaBuf<E>,
        lse: &mut CudaBuf<f32>,
    ) {
        attention::forward(self, s, qkv, doc_start, dropout, out, lse);
    }

    fn attention_backward<E: Element>(
        &self,
        s: AttentionShape,
        qkv: &CudaBuf<E>,
        doc_start: Option<&CudaBuf<u32>>,
        dropout: Option<Dropout>,
        out: &CudaBuf<E>,
        lse: &CudaBuf<f32>,
        dout: &CudaBuf<E>,
        dqkv: &mut CudaBuf<E>,
    ) {
        attention::backward(self, s, qkv, doc_start, dropout, out, lse, dout, dqkv);
    }

    fn attention_paged<E: Element>(
        &self,
        heads: usize,
        width: usize,
        places: Placed<'_, Self>,
        qkv: &CudaBuf<E>,
        k_pages: &mut CudaBuf<E>,
        v_pages: &mut CudaBuf<E>,
        out: &mut CudaBuf<E>,
    ) {
        attention::paged(self, heads, width, places, qkv, k_pages, v_pages, out);
    }

    fn copy_blocks<T: Element>(&self, size: usize, pairs: &[(u32, u32)], x: &mut CudaBuf<T>) {
        for (from, to) in pairs {
            x.copy_from(*to as usize * size, x, *from as usize * size, size);
        }
    }

    fn log_sum_exp(
        &self,
        rows: usize,
        width: usize,
        x: &CudaBuf<f32>,
        lse: &mut CudaBuf<f32>,
        largest: &mut CudaBuf<u32>,
    ) {
        loss::log_sum_exp(self, (rows, width), x, lse, largest);
    }

    fn draw(&self, width: usize, known: usize, logits: &CudaBuf<f32>, draws: &[(usize, Draw)]) -> Vec<u32> {
        draw::draw(self, (width, known), logits, draws)
    }

    fn each_task(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.pool.for_each(tasks, |number, _| task(number));
    }

    fn lm_loss<E: Element>(
        &self,
        s: LossShape,
        h: &CudaBuf<E>,
        w: &CudaBuf<E>,
        targets: &CudaBuf<u32>,
        combine: Option<&mut Combine<'_>>,
        losses: &mut CudaBuf<f32>,
    ) {
        loss::lm_loss(self, s, h, w, targets, combine, losses, None);
    }

    fn lm_loss_backward<E: Element>(
        &self,
        s: LossShape,
        h: &CudaBuf<E>,
        w: &CudaBuf<E>,
        targets: &CudaBuf<u32>,
        combine: Option<&mut Combine<'_>>,
        scale: f32,
        losses: &mut CudaBuf<f32>,
        dh: &mut CudaBuf<E>,
        dw: &mut CudaBuf<f32>,
        store: Store,
    ) {
        let gradients = Gradients { scale, dh, dw, store };
        loss::lm_loss(self, s, h, w, targets, combine, losses, Some(gradients));
    }

    fn sums_of_squares(&self, xs: Vec<&CudaBuf<f32>>) -> Vec<f64> {
        xs.chunks(optimizer::AT_ONCE).flat_map(|xs| optimizer::sums_of_squares(self, xs)).collect()
    }

    fn adamw<E: Element>(
        &self,
        hyper: AdamW,
        param: Param<'_, Self, E>,
        grad: &CudaBuf<f32>,
        m: &mut CudaBuf<f32>,
        v: &mut CudaBuf<f32>,
    ) {
        optimizer::adamw(self, hyper, param, grad, m, v);
    }

    fn sgd<E: Element>(
        &self,
        hyper: Sgd,
        param: Param<'_, Self, E>,
        grad: &CudaBuf<f32>,
        momentum: Option<&mut CudaBuf<f32>>,
    ) {
        optimizer::sgd(self, hyper, param, grad, momentum);
    }

    fn set_master<E: Element>(&self, param: Param<'_, Self, E>, values: &[f32]) {
        optimizer::set_master(self, param, values);
    }

    fn get_master<E: Element>(&self, w: &CudaBuf<E>, low: Option<&CudaBuf<i16>>, values: &mut [f32]) {
        optimizer::get_master(self, w, low, values);
    }

    fn workspace_bytes<E: Element>(
        &self,
        rows: usize,
        widest: usize,
        vocab: usize,
        width: usize,
        attention: AttentionShape,
    ) -> usize {
        let sums = linear::sums_bytes(rows, widest).max(rows::layer_norm_bytes(rows, width));
        Blas::workspace_bytes()
            + linear::forward_bytes(rows, widest)
            + sums.max(optimizer::squares_bytes(vocab.max(widest) * width))
            + loss::workspace_bytes::<E>(rows, vocab)
            + attention::workspace_bytes(attention)
            + packed::rounded_bytes(rows, widest)
            + 4 * optimizer::ON_THE_WAY
    }

    fn measured_peak<E: Element>(&self) -> f64 {
        // Without memory for the matrices there is nothing to compare with.
        peak::measure::<E>(self).unwrap_or(f64::NAN)
    }

    fn measured_bandwidth(&self) -> anyhow::Result<f64> {
        peak::bandwidth(self).context("the copy whose speed is measured does not fit")
    }
}
