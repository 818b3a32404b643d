//! The CPU device: one process, a few threads, AVX-512 where there is, AVX2 or plain Rust where not.
//!
//! Kernels take slices and live one concept a file; this file holds the device itself and connects them to
//! [`Device`].

mod amx;
mod attention;
mod buffer;
mod draw;
mod elementwise;
mod embed;
mod gemm;
mod isa;
mod layer_norm;
mod linear;
mod lm_loss;
mod log_sum_exp;
mod once;
mod optimizer;
mod pack;
mod packed;
mod peak;
pub(crate) mod pool;
mod random;
mod simd;
mod soon;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use buffer::CpuBuf;
pub use isa::Isa;
use once::once;
pub use packed::Packed;
pub use pool::MOST_THREADS;
use pool::Pool;

use crate::*;

/// How to set up a [`CpuDevice`].
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Threads; all that the process may use when absent.
    pub threads: Option<usize>,
    /// Instruction set; the fastest there is when absent. The environment variable `FERROPT_ISA` (portable, avx2,
    /// avx512, avx512-bf16, amx) sets the default.
    pub isa: Option<Isa>,
    /// Bind worker threads to processors.
    pub pin: bool,
}

/// The processor of this machine.
pub struct CpuDevice {
    isa: Isa,
    pool: Pool,
    workspace: Mutex<Workspace>,
    /// Held by the loss while the products that it is made of use `workspace`.
    loss_workspace: Mutex<Workspace>,
    /// Of the last matrix that few rows were multiplied with: what follows it.
    before: Mutex<Option<Arc<packed::Next>>>,
    /// One for each thread.
    drawers: Vec<Mutex<Drawer>>,
}

/// Memory that kernels use beside their arguments. Each piece grows to the largest size asked for, in the first step,
/// and is then reused.
#[derive(Default)]
struct Workspace {
    bytes: Vec<Option<CpuBuf<u32>>>,
}

/// A piece of workspace.
#[derive(Clone, Copy)]
enum Scratch {
    PackedA,
    PackedB,
    Partials,
    Logits,
    Attention,
}

impl CpuDevice {
    /// Opens the processor. Fails when asked for an instruction set that it lacks.
    pub fn new(options: CpuOptions) -> anyhow::Result<Self> {
        let all = Isa::available().into_iter().map(Isa::name).collect::<Vec<_>>().join(", ");
        let isa = match (options.isa, std::env::var("FERROPT_ISA")) {
            (Some(isa), _) => isa,
            (None, Ok(name)) => Isa::from_name(&name).ok_or_else(|| {
                anyhow::anyhow!("FERROPT_ISA is {name:?}; on this processor it may be one of {all}")
            })?,
            (None, Err(_)) => Isa::detect(),
        };
        anyhow::ensure!(
            Isa::available().contains(&isa),
            "instruction set {} asked for, but this processor has only {all}; unset FERROPT_ISA to use the best",
            isa.name()
        );
        let threads = pool::threads(options.threads)?;
        Ok(CpuDevice {
            isa,
            pool: Pool::new(threads, options.pin),
            workspace: Mutex::default(),
            loss_workspace: Mutex::default(),
            before: Mutex::default(),
            drawers: (0..threads).map(|_| Mutex::default()).collect(),
        })
    }

    /// Threads that run kernels.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Workspace for one operation; held to its end.
    fn workspace(&self) -> MutexGuard<'_, Workspace> {
        self.workspace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Workspace of the fused loss; taken before, never after, [`CpuDevice::workspace`].
    fn loss_workspace(&self) -> MutexGuard<'_, Workspace> {
        self.loss_workspace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of workspace that operations have taken so far; they are used again.
    pub fn workspace_taken(&self) -> usize {
        let words = |w: &Workspace| w.bytes.iter().flatten().map(|piece| piece.len()).sum::<usize>();
        4 * (words(&self.workspace()) + words(&self.loss_workspace()))
    }
}

impl Workspace {
    /// Several pieces at once, each of at least the given number of 4-byte words, with unspecified contents.
    fn take<const N: usize>(&mut self, pieces: [(Scratch, usize); N]) -> [&mut [u32]; N] {
        if self.bytes.is_empty() {
            self.bytes.resize_with(5, || None);
        }
        for (which, words) in pieces {
            let slot = &mut self.bytes[which as usize];
            if slot.as_ref().is_none_or(|b| b.len() < words) {
                // Free the old piece before the new one is made.
                *slot = None;
                *slot = Some(CpuBuf::zeroed(words).unwrap_or_else(|e| panic!("kernel workspace: {e}")));
            }
        }
        let mut parts: [&mut [u32]; N] = std::array::from_fn(|_| Default::default());
        for (i, slot) in self.bytes.iter_mut().enumerate() {
            if let (Some(place), Some(buf)) = (pieces.iter().position(|p| p.0 as usize == i), slot.as_mut()) {
                parts[place] = &mut buf[..pieces[place].1];
            }
        }
        parts
    }
}

impl Device for CpuDevice {
    type Buf<T: Element> = CpuBuf<T>;
    type Packed = Packed;

    fn describe(&self) -> String {
        format!("CPU, {} threads, {}", self.threads(), self.isa.name())
    }

    fn alloc<T: Element>(&self, len: usize) -> anyhow::Result<CpuBuf<T>> {
        CpuBuf::zeroed(len)
    }

    fn alloc_host<T: Element>(&self, len: usize) -> anyhow::Result<CpuBuf<T>> {
        CpuBuf::zeroed(len)
    }

    fn memory_taken(&self) -> Option<u64> {
        None
    }

    fn upload<T: Element>(&self, dst: &mut CpuBuf<T>, offset: usize, src: &[T]) {
        dst.write(offset, src);
    }

    fn download<T: Element>(&self, src: &CpuBuf<T>, offset: usize, dst: &mut [T]) {
        src.read(offset, dst);
    }

    fn wait(&self) {}

    fn fill<T: Element>(&self, dst: &mut CpuBuf<T>, value: T) {
        elementwise::fill(self, dst, value);
    }

    fn embed<E: Element, O: Element>(
        &self,
        rows: usize,
        width: usize,
        ids: &CpuBuf<u32>,
        table: &CpuBuf<E>,
        second: Option<(&CpuBuf<u32>, &CpuBuf<E>)>,
        out: &mut CpuBuf<O>,
    ) {
        let second = second.map(|(ids, table)| (&ids[..], &table[..]));
        let ids = &ids[..rows];
        once!(self, embed::forward<E, O>, width: usize, ids: &[u32], table: &[E], second: Option<(&[u32], &[E])>,
            out: &mut [O]);
    }

    fn embed_backward<G: Element>(
        &self,
        width: usize,
        ids: &CpuBuf<u32>,
        dout: &CpuBuf<G>,
        dtable: &mut CpuBuf<f32>,
    ) {
        once!(self, embed::backward<G>, width: usize, ids: &[u32], dout: &[G], dtable: &mut [f32]);
    }

    fn layer_norm<E: Element>(
        &self,
        rows: usize,
        width: usize,
        x: &CpuBuf<f32>,
        gamma: &CpuBuf<f32>,
        beta: &CpuBuf<f32>,
        y: &mut CpuBuf<E>,
        y_f32: Option<&mut CpuBuf<f32>>,
        mean: &mut CpuBuf<f32>,
        rstd: &mut CpuBuf<f32>,
    ) {
        let (mean, rstd) = (&mut mean[..rows], &mut rstd[..rows]);
        let y_f32 = y_f32.map(|y| &mut y[..]);
        once!(self, layer_norm::forward<E>, width: usize, x: &[f32], gamma: &[f32], beta: &[f32], y: &mut [E],
            y_f32: Option<&mut [f32]>, mean: &mut [f32], rstd: &mut [f32]);
    }

    fn layer_norm_backward<G: Element>(
        &self,
        width: usize,
        dy: &CpuBuf<G>,
        x: &CpuBuf<f32>,
        mean: &CpuBuf<f32>,
        rstd: &CpuBuf<f32>,
        gamma: &CpuBuf<f32>,
        dx: &mut CpuBuf<f32>,
        dx_store: Store,
        dgamma: &mut CpuBuf<f32>,
        dbeta: &mut CpuBuf<f32>,
        grad_store: Store,
    ) {
        once!(self, layer_norm::backward<G>, width: usize, dy: &[G], x: &[f32], mean: &[f32], rstd: &[f32],
            gamma: &[f32], dx: &mut [f32], dx_store: Store, dgamma: &mut [f32], dbeta: &mut [f32],
            grad_store: Store);
    }

    fn linear<E: Element, O: Element>(
        &self,
        s: LinearShape,
        x: &CpuBuf<E>,
        w: &CpuBuf<E>,
        bias: Option<&CpuBuf<f32>>,
        act: Activation,
        y: &mut CpuBuf<O>,
    ) {
        let bias = bias.map(|b| &b[..]);
        once!(self, linear::forward<E, O>, s: LinearShape, x: &[E], w: &[E], bias: Option<&[f32]>, act: Activation,
            y: &mut [O]);
    }

    fn linear_residual<E: Element>(
        &self,
        s: LinearShape,
        x: &CpuBuf<E>,
        w: &CpuBuf<E>,
        bias: Option<&CpuBuf<f32>>,
        dropout: Option<Dropout>,
        residual: &CpuBuf<f32>,
        out: &mut CpuBuf<f32>,
    ) {
        let bias = bias.map(|b| &b[..]);
        once!(self, linear::forward_residual<E>, s: LinearShape, x: &[E], w: &[E], bias: Option<&[f32]>,
            dropout: Option<Dropout>, residual: &[f32], out: &mut [f32]);
    }

    fn pack_weight(
        &self,
        format: WeightFormat,
        n: usize,
        k: usize,
        rows: &ReadRows<'_>,
    ) -> anyhow::Result<Packed> {
        Packed::new(self, format, n, k, rows)
    }

    fn packed_layout(&self) -> String {
        packed::layout(self)
    }

    fn packed_size(&self, format: WeightFormat, n: usize, k: usize) -> usize {
        packed::size(self, format, n, k)
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

    fn packed_from(&self, format: WeightFormat, n: usize, k: usize, bytes: Mapped) -> anyhow::Result<Packed> {
        Packed::mapped(self, format, n, k, bytes)
    }

    fn pack_codes(
        &self,
        format: WeightFormat,
        n: usize,
        k: usize,
        rows: &mut dyn FnMut(std::ops::Range<usize>, quantise::Codes<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<Packed> {
        Packed::from_codes(self, format, n, k, rows)
    }

    fn pack_random(
        &self,
        format: WeightFormat,
        n: usize,
        k: usize,
        random: RandomWeights,
    ) -> anyhow::Result<Packed> {
        Packed::random(self, format, n, k, random)
    }

    fn packed_bytes(&self, w: &Packed) -> usize {
        w.bytes()
    }

    fn packed_linear<E: Element, O: Element>(
        &self,
        m: usize,
        x: &CpuBuf<E>,
        w: &Packed,
        bias: Option<&CpuBuf<f32>>,
        act: Activation,
        y: &mut CpuBuf<O>,
    ) {
        let finish = packed::Finish::new(w, bias.map(|b| &b[..]), act, None, y);
        packed::multiply(self, m, packed::Rows::new(x), w, &finish);
    }

    fn packed_linear_residual<E: Element>(
        &self,
        m: usize,
        x: &CpuBuf<E>,
        w: &Packed,
        bias: Option<&CpuBuf<f32>>,
        residual: &CpuBuf<f32>,
        out: &mut CpuBuf<f32>,
    ) {
        let bias = bias.map(|b| &b[..]);
        let finish = packed::Finish::new(w, bias, Activation::Identity, Some(residual), out);
        packed::multiply(self, m, packed::Rows::new(x), w, &finish);
    }

    fn packed_embed(
        &self,
        rows: usize,
        ids: &CpuBuf<u32>,
        w: &Packed,
        second: Option<(&CpuBuf<u32>, &CpuBuf<f32>)>,
        out: &mut CpuBuf<f32>,
    ) {
        let second = second.map(|(ids, table)| (&ids[..], &table[..]));
        packed::embed(self, &ids[..rows], w, second, out);
    }

    fn linear_backward_input<E: Element, O: Element>(
        &self,
        s: LinearShape,
        dy: &CpuBuf<E>,
        w: &CpuBuf<E>,
        relu_output: Option<&CpuBuf<E>>,
        dx: &mut CpuBuf<O>,
    ) {
        let relu_output = relu_output.map(|r| &r[..]);
        once!(self, linear::backward_input<E, O>, s: LinearShape, dy: &[E], w: &[E], relu_output: Option<&[E]>,
            dx: &mut [O]);
    }

    fn linear_backward_weight<E: Element>(
        &self,
        s: LinearShape,
        dy: &CpuBuf<E>,
        x: &CpuBuf<E>,
        dw: &mut CpuBuf<f32>,
        dbias: Option<&mut CpuBuf<f32>>,
        store: Store,
    ) {
        let dbias = dbias.map(|d| &mut d[..]);
        once!(self, linear::backward_weight<E>, s: LinearShape, dy: &[E], x: &[E], dw: &mut [f32],
            dbias: Option<&mut [f32]>, store: Store);
    }

    fn residual<E: Element>(
        &self,
        rows: usize,
        width: usize,
        branch: &CpuBuf<E>,
        bias: Option<&CpuBuf<f32>>,
        dropout: Option<Dropout>,
        residual: &CpuBuf<f32>,
        out: &mut CpuBuf<f32>,
    ) {
        let bias = bias.map(|b| &b[..]);
        once!(self, elementwise::residual<E>, rows: usize, width: usize, branch: &[E], bias: Option<&[f32]>,
            dropout: Option<Dropout>, residual: &[f32], out: &mut [f32]);
    }

    fn residual_backward<E: Element>(
        &self,
        width: usize,
        dres: &CpuBuf<f32>,
        dropout: Option<Dropout>,
        dy: &mut CpuBuf<E>,
    ) {
        once!(self, elementwise::residual_backward<E>, width: usize, dres: &[f32], dropout: Option<Dropout>,
            dy: &mut [E]);
    }

    fn cast<S: Element, T: Element>(&self, src: &CpuBuf<S>, dst: &mut CpuBuf<T>) {
        once!(self, elementwise::cast<S, T>, src: &[S], dst: &mut [T]);
    }

    fn copy<T: Element>(&self, len: usize, src: &CpuBuf<T>, from: usize, dst: &mut CpuBuf<T>, to: usize) {
        elementwise::copy(self, &src[from..from + len], &mut dst[to..to + len]);
    }

    fn accumulate(&self, src: &CpuBuf<f32>, from: usize, dst: &mut CpuBuf<f32>, store: Store) {
        elementwise::accumulate(self, &src[from..from + dst.len()], dst, store);
    }

    fn attention<E: Element>(
        &self,
        s: AttentionShape,
        qkv: &CpuBuf<E>,
        doc_start: Option<&CpuBuf<u32>>,
        dropout: Option<Dropout>,
        out: &mut CpuBuf<E>,
        lse: &mut CpuBuf<f32>,
    ) {
        let doc_start = doc_start.map(|d| &d[..]);
        once!(self, attention::forward<E>, s: AttentionShape, qkv: &[E], doc_start: Option<&[u32]>,
            dropout: Option<Dropout>, out: &mut [E], lse: &mut [f32]);
    }

    fn attention_backward<E: Element>(
        &self,
        s: AttentionShape,
        qkv: &CpuBuf<E>,
        doc_start: Option<&CpuBuf<u32>>,
        dropout: Option<Dropout>,
        out: &CpuBuf<E>,
        lse: &CpuBuf<f32>,
        dout: &CpuBuf<E>,
        dqkv: &mut CpuBuf<E>,
    ) {
        let doc_start = doc_start.map(|d| &d[..]);
        once!(self, attention::backward<E>, s: AttentionShape, qkv: &[E], doc_start: Option<&[u32]>,
            dropout: Option<Dropout>, out: &[E], lse: &[f32], dout: &[E], dqkv: &mut [E]);
    }

    fn attention_paged<E: Element>(
        &self,
        heads: usize,
        width: usize,
        places: Placed<'_, Self>,
        qkv: &CpuBuf<E>,
        k_pages: &mut CpuBuf<E>,
        v_pages: &mut CpuBuf<E>,
        out: &mut CpuBuf<E>,
    ) {
        once!(self, attention::paged<E of inference>, heads: usize, width: usize, places: Placed<'_, CpuDevice>, qkv: &[E],
            k_pages: &mut [E], v_pages: &mut [E], out: &mut [E]);
    }

    fn copy_blocks<T: Element>(&self, size: usize, pairs: &[(u32, u32)], x: &mut CpuBuf<T>) {
        elementwise::copy_blocks(size, pairs, x);
    }

    fn log_sum_exp(
        &self,
        rows: usize,
        width: usize,
        x: &CpuBuf<f32>,
        lse: &mut CpuBuf<f32>,
        largest: &mut CpuBuf<u32>,
    ) {
        log_sum_exp::log_sum_exp(self, rows, width, x, lse, largest);
    }

    fn draw(&self, width: usize, known: usize, logits: &CpuBuf<f32>, draws: &[(usize, Draw)]) -> Vec<u32> {
        draw::draw(self, (width, known), logits, draws)
    }

    fn each_task(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.pool.for_each(tasks, |number, _| task(number));
    }

    fn lm_loss<E: Element>(
        &self,
        s: LossShape,
        h: &CpuBuf<E>,
        w: &CpuBuf<E>,
        targets: &CpuBuf<u32>,
        combine: Option<&mut Combine<'_>>,
        losses: &mut CpuBuf<f32>,
    ) {
        once!(self, lm_loss::forward<E>, s: LossShape, h: &[E], w: &[E], targets: &[u32],
            combine: Option<&mut Combine<'_>>, losses: &mut [f32]);
    }

    fn lm_loss_backward<E: Element>(
        &self,
        s: LossShape,
        h: &CpuBuf<E>,
        w: &CpuBuf<E>,
        targets: &CpuBuf<u32>,
        combine: Option<&mut Combine<'_>>,
        scale: f32,
        losses: &mut CpuBuf<f32>,
        dh: &mut CpuBuf<E>,
        dw: &mut CpuBuf<f32>,
        store: Store,
    ) {
        once!(self, lm_loss::backward<E>, s: LossShape, h: &[E], w: &[E], targets: &[u32],
            combine: Option<&mut Combine<'_>>, scale: f32, losses: &mut [f32], dh: &mut [E], dw: &mut [f32], store: Store);
    }

    fn sums_of_squares(&self, xs: Vec<&CpuBuf<f32>>) -> Vec<f64> {
        xs.into_iter().map(|x| optimizer::sum_of_squares(self, x)).collect()
    }

    fn adamw<E: Element>(
        &self,
        hyper: AdamW,
        param: Param<'_, Self, E>,
        grad: &CpuBuf<f32>,
        m: &mut CpuBuf<f32>,
        v: &mut CpuBuf<f32>,
    ) {
        once!(self, optimizer::adamw<E>, hyper: AdamW, param: Param<'_, CpuDevice, E>, grad: &[f32], m: &mut [f32],
            v: &mut [f32]);
    }

    fn sgd<E: Element>(
        &self,
        hyper: Sgd,
        param: Param<'_, Self, E>,
        grad: &CpuBuf<f32>,
        momentum: Option<&mut CpuBuf<f32>>,
    ) {
        let momentum = momentum.map(|m| &mut m[..]);
        once!(self, optimizer::sgd<E>, hyper: Sgd, param: Param<'_, CpuDevice, E>, grad: &[f32],
            momentum: Option<&mut [f32]>);
    }

    fn set_master<E: Element>(&self, param: Param<'_, Self, E>, values: &[f32]) {
        once!(self, optimizer::set_master<E>, param: Param<'_, CpuDevice, E>, values: &[f32]);
    }

    fn get_master<E: Element>(&self, w: &CpuBuf<E>, low: Option<&CpuBuf<i16>>, values: &mut [f32]) {
        let low = low.map(|l| &l[..]);
        once!(self, optimizer::get_master<E>, w: &[E], low: Option<&[i16]>, values: &mut [f32]);
    }

    fn workspace_bytes<E: Element>(
        &self,
        rows: usize,
        widest: usize,
        vocab: usize,
        width: usize,
        attention: AttentionShape,
    ) -> usize {
        let products = gemm::workspace_bytes::<E>(self, rows, widest);
        let head = gemm::workspace_bytes::<E>(self, rows.min(lm_loss::ROWS), vocab.max(width));
        products.max(head)
            + layer_norm::workspace_bytes(rows, widest)
            + lm_loss::workspace_bytes::<E>(rows, vocab)
            + attention::workspace_bytes::<E>(self, attention)
    }

    fn measured_bandwidth(&self) -> anyhow::Result<f64> {
        peak::bandwidth(self)
    }

    fn measured_peak<E: Element>(&self) -> f64 {
        peak::measure(self, E::DTYPE)
    }
}
