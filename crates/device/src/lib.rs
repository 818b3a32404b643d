//! One chip: memory and the fused operations of an OPT decoder.
//!
//! Everything above this crate is generic over [`Device`]; nothing above it knows which chip it runs on.
//! Letters in shapes: B batch, T sequence, N = B*T rows, C model width, H heads, D head width,
//! F feed-forward width, V vocabulary, L layers. All matrices are row-major. Weights are `[out, in]`, as in
//! Hugging Face checkpoints.
//!
//! Numbers: matrices and activations are of the compute type `E` (f32, bf16 or f16); the residual stream, biases,
//! layer-norm parameters, gradients and optimiser moments are always f32; every sum is accumulated in f32 or wider.
//! Every operation gives the same bits whatever the number of threads.
//!
//! A device that fails in the middle of an operation ends it, and what called it, as far as [`failures`].

// Kernels are the one place where unsafe code is allowed; each block says why it is sound.
#![allow(unsafe_code)]
// An optional pair of buffers is plainer than a name for it.
#![allow(clippy::type_complexity)]

mod at_rest;
mod chip;
pub mod cpu;
pub mod cuda;
mod draw;
mod element;
mod failure;
mod link;
mod mapped;
mod paged;
mod places;
pub mod quantise;
mod random_weights;
pub mod rng;
mod strided;
mod timed;

pub use at_rest::AtRest;
pub use chip::{Chip, ChipBuf, ChipPacked, Which};
pub use draw::{Draw, Drawer};
pub use element::{DType, Element};
pub use failure::{Failure, failures};
pub use half::{bf16, f16};
pub use link::{Departure, Exchange, Flight, Link, Located, Network, Transfer, Watch};
pub use mapped::Mapped;
pub use paged::{PAGE, Placed, Places, Segment};
pub use random_weights::RandomWeights;
use rng::Stream;
pub use strided::Strided;
pub use timed::Timed;

/// Target value that takes no part in the loss; token id without an embedding.
pub const IGNORE: u32 = u32::MAX;

/// Memory on a device: a fixed number of elements of one type.
pub trait Buffer<T: Element>: Send + Sync {
    /// Number of elements.
    fn len(&self) -> usize;
    /// True when there are no elements.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The memory itself, where the processor reaches it.
    fn host(&self) -> Option<&[T]>;
    /// The memory itself, to be changed.
    fn host_mut(&mut self) -> Option<&mut [T]>;
    /// [`Buffer::host`] without waiting for the device; [`AtRest`] is the safe way to it.
    ///
    /// # Safety
    /// The device was told nothing that uses the memory since the last [`Buffer::host`] or [`Buffer::host_mut`].
    unsafe fn host_at_rest(&self) -> Option<&[T]> {
        self.host()
    }
    /// The same, to be changed.
    ///
    /// # Safety
    /// As above.
    unsafe fn host_at_rest_mut(&mut self) -> Option<&mut [T]> {
        self.host_mut()
    }
    /// Copies the elements from `offset` on to `dst`, when all work before is done.
    fn read(&self, offset: usize, dst: &mut [T]);
    /// Copies `src` to the elements from `offset` on.
    fn write(&mut self, offset: usize, src: &[T]);
    /// Takes the memory of a new buffer, which is all zeros, from the system now, if that would otherwise happen where it is
    /// first written to.
    fn reserve(&mut self) {}
    /// Where the memory is for a [`Link`] of its device; none where the processor reaches it.
    fn located(&self) -> Option<Located> {
        None
    }
}

/// Function applied to the output of [`Device::linear`] after the bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    Identity,
    /// `max(x, 0)`, OPT's only non-linearity.
    Relu,
}

/// Whether a gradient is added to what the buffer holds or replaces it (the first micro-batch of a step).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// Replace.
    Overwrite,
    /// Add.
    Accumulate,
}

/// Dropout of one place in the model during one step. The mask is never stored: element (row, column) is kept when
/// `stream.word(row, column) >= p * 2^32`, where `row` counts from the start of the *global* batch, so that any
/// split into micro-batches and any recomputation sees the same mask. Kept values are scaled by `1/(1-p)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of zeroing, in `[0, 1)`.
    pub p: f32,
    /// Where the random words come from.
    pub stream: Stream,
    /// Index in the global batch of the buffer's first row (a row is one token position).
    pub first_row: u64,
}

impl Dropout {
    /// Smallest word of a kept element: `word >= p * 2^32` for an integral word; p < 1 has 24 bits, so this fits.
    #[inline(always)]
    pub(crate) fn threshold(&self) -> u32 {
        (self.p as f64 * 4_294_967_296.0).ceil() as u32
    }

    /// What a kept element is multiplied by.
    #[inline(always)]
    pub(crate) fn keep(&self) -> f32 {
        1.0 / (1.0 - self.p)
    }
}

/// `y[m, n] = x[m, k] * w[n, k]^T`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// Rows of x and y (tokens).
    pub m: usize,
    /// Output width.
    pub n: usize,
    /// Input width.
    pub k: usize,
}

/// How a weight matrix that is only read is stored.
///
/// Int8, Int4 and Int3 are for weights alone: groups of 64 along k share a scale (and below 8 bits a minimum, both bf16).
/// Activations stay in the compute type; products round them to 8 bits on the way, a group at a time, and add up
/// integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// 32 bits.
    F32,
    /// 16 bits, IEEE's halves. Numbers that are none lose bits; those that would become infinite are refused.
    F16,
    /// 16 bits.
    Bf16,
    /// 8.25 bits.
    Int8,
    /// 4.5 bits.
    Int4,
    /// 3.5 bits.
    Int3,
}

impl WeightFormat {
    /// All, from wide to narrow.
    pub const ALL: [WeightFormat; 6] = [
        WeightFormat::F32,
        WeightFormat::F16,
        WeightFormat::Bf16,
        WeightFormat::Int8,
        WeightFormat::Int4,
        WeightFormat::Int3,
    ];

    /// Those of codes, see [`quantise`].
    pub const CODES: [WeightFormat; 3] = [WeightFormat::Int8, WeightFormat::Int4, WeightFormat::Int3];

    /// Whether inference computes, and keeps keys and values, in f32 beside such weights; else it does in bf16.
    pub fn computes_in_f32(self) -> bool {
        matches!(self, WeightFormat::F32 | WeightFormat::F16)
    }

    /// Name for people and programs.
    pub fn name(self) -> &'static str {
        match self {
            WeightFormat::F32 => "f32",
            WeightFormat::F16 => "f16",
            WeightFormat::Bf16 => "bf16",
            WeightFormat::Int8 => "int8",
            WeightFormat::Int4 => "int4",
            WeightFormat::Int3 => "int3",
        }
    }
}

/// Fills its slice with the rows of a range, as f32. May be called from several threads at once.
pub type ReadRows<'a> = dyn Fn(std::ops::Range<usize>, &mut [f32]) -> anyhow::Result<()> + Sync + 'a;

/// Takes a piece of what is written, with its place in bytes. May be called from several threads at once.
pub type WritePiece<'a> = dyn Fn(usize, &[u8]) -> anyhow::Result<()> + Sync + 'a;

/// Shape of causal self-attention over packed `[B*T, 3*H*D]` rows that hold q, k and v in that order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// B, sequences.
    pub batch: usize,
    /// T, positions in each.
    pub seq: usize,
    /// H, heads.
    pub heads: usize,
    /// D, width of one head. Scores are scaled by `D^-1/2`.
    pub width: usize,
    /// Where these heads are among all of the layer, for dropout: the first one's number, and how many there are.
    pub among: (usize, usize),
}

/// Sizes of the fused LM head and loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossShape {
    /// N, rows.
    pub rows: usize,
    /// V, vocabulary; of a part of it, its size.
    pub vocab: usize,
    /// Width of the rows that meet the embedding table (C, or the projected width of 350m).
    pub width: usize,
    /// Id of the first row of the table: above 0 in a later part of a vocabulary.
    pub first: usize,
}

/// Puts together what the parts of a vocabulary know of a chunk of rows (Shoeybi et al., 2019, "Megatron-LM"). Given for each
/// row the log-sum-exp of this part's logits and, if the target is in this part, its logit, else 0; to be replaced by
/// the log-sum-exp of all parts and the sum of the logits.
pub type Combine<'a> = dyn FnMut(&mut [f32], &mut [f32]) + 'a;

/// One AdamW step (Loshchilov and Hutter, 2019: decoupled weight decay), for step `t >= 1`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled decay; 0 for biases and layer norms if the caller wants so.
    pub weight_decay: f32,
    /// `1 - beta1^t`.
    pub bias_correction1: f32,
    /// `1 - beta2^t`.
    pub bias_correction2: f32,
    /// Factor on the gradient (clipping).
    pub grad_scale: f32,
}

/// One step of gradient descent with momentum: `buf = momentum*buf + g + decay*w; w -= lr*buf`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f32,
    /// Momentum; 0 for plain descent (the buffer is then not needed).
    pub momentum: f32,
    /// L2 decay, added to the gradient as in PyTorch's SGD.
    pub weight_decay: f32,
    /// Factor on the gradient (clipping).
    pub grad_scale: f32,
}

/// A parameter as the optimiser sees it.
///
/// With f32 compute type the weight itself is the master copy. With bf16 there are two ways:
/// *split master* (`low` present): the f32 master weight is `w` and `low` side by side, `f32 bits =
/// (w bits << 16) + sign_extended(low)`, `w` being the master rounded to nearest (ties away from zero), so a master
/// costs 2 bytes more than the bf16 weight; or *stochastic rounding* (`low` absent, `rounding` present).
/// With f16 there is the split master only: the master is `w + low * u`, where u is a part in 2^25 of w's power of two, which
/// is taken to be 2^-14 where it is less. So masters from 2^-14 on are those of f32, and lesser ones multiples of 2^-39.
pub struct Param<'a, D: Device, E: Element> {
    /// The weight used in compute.
    pub w: &'a mut D::Buf<E>,
    /// Low halves of the split master.
    pub low: Option<&'a mut D::Buf<i16>>,
    /// Stochastic rounding.
    pub rounding: Option<Rounding>,
}

/// Random words of stochastic rounding: (0, element of the whole parameter).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rounding {
    /// Where the words come from.
    pub stream: Stream,
    /// Which elements of the whole parameter these are.
    pub place: Strided,
}

/// Which way goes what is done [beside](Device::beside) other operations. What goes one way is done in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// To the device.
    In,
    /// Away from it.
    Out,
}

/// A chip that can run OPT.
pub trait Device: Send + Sync + Sized + 'static {
    /// Memory of this device.
    type Buf<T: Element>: Buffer<T>;
    /// A weight matrix `[n, k]` that is only read, laid out for this device's products.
    type Packed: Send + Sync;

    /// Name for people: "AMD EPYC, 2 threads, avx512-bf16".
    fn describe(&self) -> String;

    /// Zeroed memory for `len` elements. Fails with the size asked for when there is not enough.
    fn alloc<T: Element>(&self, len: usize) -> anyhow::Result<Self::Buf<T>>;
    /// The same in the host's memory, for what is needed once in a while. Operations take it as they take [`Device::alloc`]'s,
    /// and give the same bits; what they read and write of it goes over the bus. The same memory where the processor is
    /// the device.
    fn alloc_host<T: Element>(&self, len: usize) -> anyhow::Result<Self::Buf<T>>;
    /// Bytes of the device's own memory that are taken, by buffers and workspace; none where it has none of its own.
    fn memory_taken(&self) -> Option<u64>;
    /// Copies `src` to `dst[offset..offset + src.len()]`.
    fn upload<T: Element>(&self, dst: &mut Self::Buf<T>, offset: usize, src: &[T]);
    /// Copies `src[offset..offset + dst.len()]` to `dst`.
    fn download<T: Element>(&self, src: &Self::Buf<T>, offset: usize, dst: &mut [T]);
    /// Waits until all operations are done. Where they are done when they return, there is nothing to wait for.
    fn wait(&self);
    /// How devices of this kind exchange memory themselves, or why they do not; none where their memory is the host's.
    fn network(&self) -> Option<anyhow::Result<Box<dyn Network>>> {
        None
    }
    /// Runs `work`, a sequence of operations that is likely to come again with the same buffers and sizes, only with other
    /// contents. Where starting operations takes longer than some of them do, what came before is started at once; the results
    /// are the same bits. Numbers that differ each time are best in buffers already; a few of the operations may be told others,
    /// such as the step whose random masks are used. `work` may be called more than once, and must do nothing but start the
    /// operations.
    ///
    /// # Panics
    /// On devices where it makes a difference, when `work` makes buffers, uploads, downloads or waits.
    fn repeated(&self, work: &mut dyn FnMut()) {
        work();
    }
    /// Runs `work`, whose operations are done after those that came before, and beside those that come later, for which it is to
    /// be [held back](Transfer::hold_back): whoever uses what they use until then finds anything there. They are copies, sums of
    /// buffers, and exchanges with other ranks. None where they are done when they return.
    ///
    /// # Panics
    /// On devices where it makes a difference, when `work` needs workspace, or is among operations that are repeated.
    fn beside(&self, _: Lane, work: &mut dyn FnMut()) -> Option<Box<dyn Transfer>> {
        work();
        None
    }
    /// Sets every element.
    fn fill<T: Element>(&self, dst: &mut Self::Buf<T>, value: T);

    /// Token (and position) embedding. `out[rows, width] = table[ids[i]] (+ table2[ids2[i]])`, where `second` is
    /// `(ids2, table2)`; every id is less than its table's number of rows. Without a second table, [`IGNORE`] gives zeros.
    /// `ids` and `out` may be longer.
    fn embed<E: Element, O: Element>(
        &self,
        rows: usize,
        width: usize,
        ids: &Self::Buf<u32>,
        table: &Self::Buf<E>,
        second: Option<(&Self::Buf<u32>, &Self::Buf<E>)>,
        out: &mut Self::Buf<O>,
    );
    /// Backward of [`Device::embed`] for one table: `dtable[ids[i]] += dout[i]`, rows added in the order of `i`; [`IGNORE`] is
    /// passed over.
    fn embed_backward<G: Element>(
        &self,
        width: usize,
        ids: &Self::Buf<u32>,
        dout: &Self::Buf<G>,
        dtable: &mut Self::Buf<f32>,
    );

    /// Layer norm over the last axis, eps 1e-5. `x` [rows, C] f32; `y` [rows, C]; `mean`, `rstd` `[rows]`. All may be
    /// longer; the rest is left alone.
    /// `y_f32`, when given, also receives the result in f32 (post-LN, where it is the residual stream).
    fn layer_norm<E: Element>(
        &self,
        rows: usize,
        width: usize,
        x: &Self::Buf<f32>,
        gamma: &Self::Buf<f32>,
        beta: &Self::Buf<f32>,
        y: &mut Self::Buf<E>,
        y_f32: Option<&mut Self::Buf<f32>>,
        mean: &mut Self::Buf<f32>,
        rstd: &mut Self::Buf<f32>,
    );
    /// Backward of [`Device::layer_norm`]. `dy` [N, C] of any type; `dx` [N, C] replaced or added to by `dx_store`;
    /// `dgamma`, `dbeta` `[C]` by `grad_store`.
    fn layer_norm_backward<G: Element>(
        &self,
        width: usize,
        dy: &Self::Buf<G>,
        x: &Self::Buf<f32>,
        mean: &Self::Buf<f32>,
        rstd: &Self::Buf<f32>,
        gamma: &Self::Buf<f32>,
        dx: &mut Self::Buf<f32>,
        dx_store: Store,
        dgamma: &mut Self::Buf<f32>,
        dbeta: &mut Self::Buf<f32>,
        grad_store: Store,
    );

    /// `y[m, n] = act(x * w^T + bias)`. Buffers may be longer than the shape says; the rest is left alone.
    fn linear<E: Element, O: Element>(
        &self,
        s: LinearShape,
        x: &Self::Buf<E>,
        w: &Self::Buf<E>,
        bias: Option<&Self::Buf<f32>>,
        act: Activation,
        y: &mut Self::Buf<O>,
    );
    /// `out[m, n] = residual + dropout(x * w^T + bias)`, in f32.
    fn linear_residual<E: Element>(
        &self,
        s: LinearShape,
        x: &Self::Buf<E>,
        w: &Self::Buf<E>,
        bias: Option<&Self::Buf<f32>>,
        dropout: Option<Dropout>,
        residual: &Self::Buf<f32>,
        out: &mut Self::Buf<f32>,
    );
    /// Lays out a weight matrix `[n, k]` for reading. `rows` is asked for every row once, in no order. Fails when it does,
    /// or memory is short.
    fn pack_weight(
        &self,
        format: WeightFormat,
        n: usize,
        k: usize,
        rows: &ReadRows<'_>,
    ) -> anyhow::Result<Self::Packed>;
    /// The same for a matrix whose numbers were rounded before. `rows` fills codes and groups of a range of rows. Fails
    /// when the format has no codes, or a code is too large for it.
    fn pack_codes(
        &self,
        format: WeightFormat,
        n: usize,
        k: usize,
        rows: &mut dyn FnMut(std::ops::Range<usize>, quantise::Codes<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self::Packed>;
    /// The same for a matrix of random numbers, which the device makes itself, so that it takes neither time nor memory of
    /// its host. They are the same on every device. Fails when memory is short.
    fn pack_random(
        &self,
        format: WeightFormat,
        n: usize,
        k: usize,
        random: RandomWeights,
    ) -> anyhow::Result<Self::Packed>;
    /// What decides how weights are laid out, beside their format and sizes. Where it is the same, what
    /// [`Device::pack_weight_to`] wrote may be used again.
    fn packed_layout(&self) -> String;
    /// Bytes of a matrix `[n, k]` as it is laid out.
    fn packed_size(&self, format: WeightFormat, n: usize, k: usize) -> usize;
    /// [`Device::pack_weight`] to somewhere else than memory: `write` takes pieces that cover all
    /// [`Device::packed_size`] bytes once, in no order. Fails when `rows` or `write` does.
    fn pack_weight_to(
        &self,
        format: WeightFormat,
        n: usize,
        k: usize,
        rows: &ReadRows<'_>,
        write: &WritePiece<'_>,
    ) -> anyhow::Result<()>;
    /// The matrix that [`Device::pack_weight_to`] wrote, where it lies. Fails when the bytes are not as many, or do not
    /// begin at a multiple of 4.
    fn packed_from(
        &self,
        format: WeightFormat,
        n: usize,
        k: usize,
        bytes: Mapped,
    ) -> anyhow::Result<Self::Packed>;
    /// Bytes that a packed matrix takes, all of which a product reads.
    fn packed_bytes(&self, w: &Self::Packed) -> usize;
    /// `y[m, n] = act(x[m, k] * w^T + bias)`. A row of y has the same bits whatever m and the other rows are.
    fn packed_linear<E: Element, O: Element>(
        &self,
        m: usize,
        x: &Self::Buf<E>,
        w: &Self::Packed,
        bias: Option<&Self::Buf<f32>>,
        act: Activation,
        y: &mut Self::Buf<O>,
    );
    /// `out[m, n] = residual + x[m, k] * w^T + bias`; rows are as independent as in [`Device::packed_linear`].
    fn packed_linear_residual<E: Element>(
        &self,
        m: usize,
        x: &Self::Buf<E>,
        w: &Self::Packed,
        bias: Option<&Self::Buf<f32>>,
        residual: &Self::Buf<f32>,
        out: &mut Self::Buf<f32>,
    );
    /// Rows of a packed matrix as f32, `out[rows, k] = w[ids[i]] (+ table[ids2[i]])` with `second` being `(ids2, table)`:
    /// embeddings that are tied to an LM head need no second copy. Buffers may be longer.
    fn packed_embed(
        &self,
        rows: usize,
        ids: &Self::Buf<u32>,
        w: &Self::Packed,
        second: Option<(&Self::Buf<u32>, &Self::Buf<f32>)>,
        out: &mut Self::Buf<f32>,
    );
    /// Gradient of a linear layer's input: `dx[m, k] = dy[m, n] * w[n, k]`; with `relu_output` [m, k] (this layer's
    /// input, which was a ReLU's output) the result is zeroed where that is not above 0.
    fn linear_backward_input<E: Element, O: Element>(
        &self,
        s: LinearShape,
        dy: &Self::Buf<E>,
        w: &Self::Buf<E>,
        relu_output: Option<&Self::Buf<E>>,
        dx: &mut Self::Buf<O>,
    );
    /// Gradient of a linear layer's weight and bias: `dw[n, k] (+)= dy^T * x`, `dbias[n] (+)= sum of dy's rows`.
    fn linear_backward_weight<E: Element>(
        &self,
        s: LinearShape,
        dy: &Self::Buf<E>,
        x: &Self::Buf<E>,
        dw: &mut Self::Buf<f32>,
        dbias: Option<&mut Self::Buf<f32>>,
        store: Store,
    );

    /// The end of a residual branch whose product was made elsewhere, over the first `rows` rows:
    /// `out[rows, C] = residual + dropout(branch + bias)`, in f32.
    fn residual<E: Element>(
        &self,
        rows: usize,
        width: usize,
        branch: &Self::Buf<E>,
        bias: Option<&Self::Buf<f32>>,
        dropout: Option<Dropout>,
        residual: &Self::Buf<f32>,
        out: &mut Self::Buf<f32>,
    );
    /// Gradient that enters a residual branch: `dy[N, C] = dropout_mask(dres)`, cast to the compute type.
    fn residual_backward<E: Element>(
        &self,
        width: usize,
        dres: &Self::Buf<f32>,
        dropout: Option<Dropout>,
        dy: &mut Self::Buf<E>,
    );
    /// Casts `src` to `dst`'s type; both are compute types.
    fn cast<S: Element, T: Element>(&self, src: &Self::Buf<S>, dst: &mut Self::Buf<T>);
    /// Copies `len` elements of `src` from `from` on to `dst` from `to` on.
    fn copy<T: Element>(
        &self,
        len: usize,
        src: &Self::Buf<T>,
        from: usize,
        dst: &mut Self::Buf<T>,
        to: usize,
    );
    /// `dst (+)= src`, for as many elements as `dst` has, those of `src` from `from` on.
    fn accumulate(&self, src: &Self::Buf<f32>, from: usize, dst: &mut Self::Buf<f32>, store: Store);

    /// Causal attention with an online softmax; no T x T matrix is stored. `qkv` [B*T, 3*H*D], `out` [B*T, H*D],
    /// `lse` [B, H, T] receives the log-sum-exp of each row's scaled scores.
    /// Position t attends to `doc_start[b*T + t] ..= t` (0 ..= t without `doc_start`). Dropout acts on the
    /// probabilities, its row being `(first_row + b*T + t) * H + h` and its column the key's position.
    fn attention<E: Element>(
        &self,
        s: AttentionShape,
        qkv: &Self::Buf<E>,
        doc_start: Option<&Self::Buf<u32>>,
        dropout: Option<Dropout>,
        out: &mut Self::Buf<E>,
        lse: &mut Self::Buf<f32>,
    );
    /// Backward of [`Device::attention`]; `dqkv` [B*T, 3*H*D] is overwritten.
    fn attention_backward<E: Element>(
        &self,
        s: AttentionShape,
        qkv: &Self::Buf<E>,
        doc_start: Option<&Self::Buf<u32>>,
        dropout: Option<Dropout>,
        out: &Self::Buf<E>,
        lse: &Self::Buf<f32>,
        dout: &Self::Buf<E>,
        dqkv: &mut Self::Buf<E>,
    );
    /// Causal attention of new tokens of many sequences over their KV caches, which are pages of [`PAGE`] tokens. Appends
    /// the new tokens' k and v, then attends. A token's result has the same bits whatever else is in the call and however
    /// its sequence was cut into calls.
    ///
    /// `qkv` [N, 3*H*D] and `out` [N, H*D] hold the rows of all segments that were put into `places`, one after the other. Page
    /// p of `k_pages` is [H, D, PAGE] (keys as columns), of `v_pages` [H, PAGE, D]; how a head's part is ordered inside is the
    /// device's own affair. Sequences may share pages that nothing is appended to.
    fn attention_paged<E: Element>(
        &self,
        heads: usize,
        width: usize,
        places: Placed<'_, Self>,
        qkv: &Self::Buf<E>,
        k_pages: &mut Self::Buf<E>,
        v_pages: &mut Self::Buf<E>,
        out: &mut Self::Buf<E>,
    );
    /// Copies blocks of `size` elements within a buffer: of each pair, the first block to the second, pair after pair.
    fn copy_blocks<T: Element>(&self, size: usize, pairs: &[(u32, u32)], x: &mut Self::Buf<T>);
    /// Of each of the first `rows` rows of `x` [rows, width], the logarithm of the sum of exponentials, and the place of
    /// the largest element (the first of equal ones).
    fn log_sum_exp(
        &self,
        rows: usize,
        width: usize,
        x: &Self::Buf<f32>,
        lse: &mut Self::Buf<f32>,
        largest: &mut Self::Buf<u32>,
    );
    /// Chooses a token for each `(row, draw)`, out of the first `known` columns of that row of `logits` [rows, width]. They are
    /// those that [`Drawer::draw`] chooses, on every device.
    fn draw(&self, width: usize, known: usize, logits: &Self::Buf<f32>, draws: &[(usize, Draw)]) -> Vec<u32>;

    /// Runs `task` with each number below `tasks` on the processor's threads that work for this device, and waits for all:
    /// for what is decided there between operations. A task must not use the device for more than downloads.
    fn each_task(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));

    /// Cross-entropy of a tied LM head, in chunks of rows so that the [N, V] logits never exist.
    /// `h` [N, width], `w` [V, width], `targets` `[N]` ([`IGNORE`] takes no part); `losses` `[N]` in nats (0 where ignored).
    /// With `combine`, `w` is a part of the vocabulary, and others have the rest; `targets` and `losses` are the same in all.
    fn lm_loss<E: Element>(
        &self,
        s: LossShape,
        h: &Self::Buf<E>,
        w: &Self::Buf<E>,
        targets: &Self::Buf<u32>,
        combine: Option<&mut Combine<'_>>,
        losses: &mut Self::Buf<f32>,
    );
    /// [`Device::lm_loss`] with gradients of `scale * sum(losses)`: `dh` [N, width] overwritten, `dw` [V, width] by `store`.
    /// With `combine`, `dh` is this part's share of a sum over all parts.
    fn lm_loss_backward<E: Element>(
        &self,
        s: LossShape,
        h: &Self::Buf<E>,
        w: &Self::Buf<E>,
        targets: &Self::Buf<u32>,
        combine: Option<&mut Combine<'_>>,
        scale: f32,
        losses: &mut Self::Buf<f32>,
        dh: &mut Self::Buf<E>,
        dw: &mut Self::Buf<f32>,
        store: Store,
    );

    /// Sum of squares of each buffer, in f64, by a fixed tree; all are waited for once.
    fn sums_of_squares(&self, xs: Vec<&Self::Buf<f32>>) -> Vec<f64>;
    /// One fused AdamW pass over a parameter.
    fn adamw<E: Element>(
        &self,
        hyper: AdamW,
        param: Param<'_, Self, E>,
        grad: &Self::Buf<f32>,
        m: &mut Self::Buf<f32>,
        v: &mut Self::Buf<f32>,
    );
    /// One fused SGD pass over a parameter; `momentum` is needed unless `hyper.momentum` is 0.
    fn sgd<E: Element>(
        &self,
        hyper: Sgd,
        param: Param<'_, Self, E>,
        grad: &Self::Buf<f32>,
        momentum: Option<&mut Self::Buf<f32>>,
    );
    /// Writes f32 master values into a parameter (`w`, and `low` if present; without it, rounded to nearest even).
    fn set_master<E: Element>(&self, param: Param<'_, Self, E>, values: &[f32]);
    /// Reads f32 master values of a parameter: `w` joined with `low` if present.
    fn get_master<E: Element>(&self, w: &Self::Buf<E>, low: Option<&Self::Buf<i16>>, values: &mut [f32]);

    /// Bytes of workspace that the operations take beside their arguments, at most, for `rows` rows of a model whose
    /// widest linear layer is `widest`, whose vocabulary is `vocab` x `width` and whose attention is of shape
    /// `attention`, in elements of `E`.
    fn workspace_bytes<E: Element>(
        &self,
        rows: usize,
        widest: usize,
        vocab: usize,
        width: usize,
        attention: AttentionShape,
    ) -> usize;
    /// Measured peak of the matrix-product instruction for `E`, in FLOP/s (a register-only loop on all threads).
    fn measured_peak<E: Element>(&self) -> f64;
    /// Measured bytes per second of reading memory on all threads. Fails when there is no GiB to read.
    fn measured_bandwidth(&self) -> anyhow::Result<f64>;
}
