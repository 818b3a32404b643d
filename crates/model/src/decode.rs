//! Inference: read-only weights, and a forward pass over new tokens of many sequences at once.

mod layer;
mod walk;

pub use walk::{Walk, WithError};

use crate::config::{Config, POSITION_OFFSET};
use crate::parameters::Initial;
use crate::ready::Ready;
use crate::weights::Norm;
use anyhow::{Context, Result, ensure};
use ferropt_device::quantise::Codes;
use ferropt_device::rng::{Purpose, Stream};
use ferropt_device::{
    Activation, Buffer, Device, Draw, Element, PAGE, Places, RandomWeights, Segment, WeightFormat,
};
use layer::{Layer, Linear};
use std::ops::Range;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Gives rows of a parameter (its number in [`Config::parameters`]) as f32; a vector's rows are its elements. May be
/// called from several threads at once.
pub type ReadRows<'a> = dyn Fn(usize, Range<usize>, &mut [f32]) -> Result<()> + Sync + 'a;

/// Gives rows of a matrix that was rounded before as codes; the arguments are those of [`ReadRows`].
pub type ReadCodes<'a> = dyn Fn(usize, Range<usize>, Codes<'_>) -> Result<()> + Sync + 'a;

/// Where a decoder's matrices come from.
#[derive(Clone, Copy)]
pub enum Matrices<'a> {
    /// From the same rows as the other parameters.
    Rows,
    /// They were rounded before: from their codes.
    Codes(&'a ReadCodes<'a>),
    /// They were packed before: they are used where they lie.
    Ready(&'a Ready),
    /// Random ones of this seed, as large as a new model's, which the device makes itself: for a model that only has to be
    /// there.
    Random(u64),
}

/// The weights of a model, laid out to be read only.
pub struct Decoder<D: Device> {
    config: Config,
    /// `[V, W]`: token embeddings, and the LM head unless there is another.
    tokens: D::Packed,
    /// `[positions + 2, C]`.
    positions: D::Buf<f32>,
    /// `[C, W]` and `[W, C]`, with embedding projections.
    projections: Option<(D::Packed, D::Packed)>,
    layers: Vec<Layer<D>>,
    /// Before the LM head; none with `post_norm`.
    final_norm: Option<Norm<D>>,
    /// `[V, W]`: an LM head of its own.
    own_head: Option<D::Packed>,
}

/// Rows of a step that may well come again: a token of each text. With more there are prompts among them, of any length, and
/// the operations take longer than starting them.
const REPEATED: usize = 64;

/// Numbers that are read at a time, where they are used as they are.
const AT_A_TIME: usize = 1 << 16;

/// Reads parameters in the order of the table.
struct Reader<'a, 'r, D> {
    device: &'a D,
    format: WeightFormat,
    /// Names for errors, and shape.
    table: std::iter::Enumerate<std::vec::IntoIter<crate::Parameter>>,
    read: &'a ReadRows<'r>,
    matrices: Matrices<'a>,
}

impl<D: Device> Reader<'_, '_, D> {
    fn next(&mut self) -> Result<(usize, crate::Parameter)> {
        self.table.next().context("the table of parameters is shorter than the model")
    }

    fn packed(&mut self) -> Result<D::Packed> {
        let (index, parameter) = self.next()?;
        let [n, k] = parameter.shape[..] else { anyhow::bail!("{:?} is no matrix", parameter.names) };
        let packed = match self.matrices {
            Matrices::Rows => {
                let rows = |rows: Range<usize>, out: &mut [f32]| (self.read)(index, rows, out);
                self.device.pack_weight(self.format, n, k, &rows)
            }
            Matrices::Codes(codes) => {
                self.device.pack_codes(self.format, n, k, &mut |rows, to| codes(index, rows, to))
            }
            Matrices::Ready(ready) => ready.matrix(self.device, index, self.format, n, k),
            Matrices::Random(seed) => {
                let Initial::Normal(std) = parameter.initial else {
                    anyhow::bail!("{:?} begins with no random numbers", parameter.names)
                };
                let random =
                    RandomWeights { stream: Stream::new(seed, Purpose::Weights, index, 0), std: std as f32 };
                self.device.pack_random(self.format, n, k, random)
            }
        };
        packed.with_context(|| parameter.names.join(", "))
    }

    fn plain(&mut self) -> Result<D::Buf<f32>> {
        let (index, parameter) = self.next()?;
        let (rows, width) = (parameter.shape[0], parameter.elements() / parameter.shape[0]);
        let mut buf = self.device.alloc(parameter.elements())?;
        let step = (AT_A_TIME / width).clamp(1, rows);
        let mut values = vec![0.0; step * width];
        for first in (0..rows).step_by(step) {
            let rows = first..(first + step).min(rows);
            let values = &mut values[..rows.len() * width];
            (self.read)(index, rows, values).with_context(|| parameter.names.join(", "))?;
            self.device.upload(&mut buf, first * width, values);
        }
        Ok(buf)
    }

    fn linear(&mut self) -> Result<Linear<D>> {
        Ok(Linear { weight: self.packed()?, bias: self.plain()? })
    }

    fn norm(&mut self) -> Result<Norm<D>> {
        Ok(Norm { gain: self.plain()?, bias: self.plain()? })
    }

    fn layer(&mut self) -> Result<Layer<D>> {
        let (qkv, out, norm1) = (self.linear()?, self.linear()?, self.norm()?);
        Ok(Layer { qkv, out, norm1, fc1: self.linear()?, fc2: self.linear()?, norm2: self.norm()? })
    }
}

impl<D: Device> Decoder<D> {
    /// Reads all parameters once, one after the other, and stores matrices in `format`.
    ///
    /// # Errors
    /// When the sizes make no model, memory is short, reading fails, or the matrices are not of this model, format and
    /// device; the message names the parameter.
    pub fn new(
        device: &D,
        config: &Config,
        format: WeightFormat,
        read: &ReadRows<'_>,
        matrices: Matrices<'_>,
    ) -> Result<Self> {
        config.check()?;
        let table = config.parameters().into_iter().enumerate();
        let reader = Reader { device, format, table, read, matrices };
        Self::assemble(config, reader, |r| (0..config.layers).map(|_| r.layer()).collect())
    }

    /// Reads a model from its first parameter on; `layers` reads those of the layers, or passes over them.
    fn assemble<'a, 'r>(
        config: &Config,
        mut r: Reader<'a, 'r, D>,
        layers: impl FnOnce(&mut Reader<'a, 'r, D>) -> Result<Vec<Layer<D>>>,
    ) -> Result<Self> {
        let (tokens, positions) = (r.packed()?, r.plain()?);
        let project_in = if config.has_projections() { Some(r.packed()?) } else { None };
        let layers = layers(&mut r)?;
        let final_norm = if config.post_norm { None } else { Some(r.norm()?) };
        let projections = match project_in {
            Some(project_in) => Some((project_in, r.packed()?)),
            None => None,
        };
        let own_head = if config.own_head { Some(r.packed()?) } else { None };
        Ok(Decoder { config: config.clone(), tokens, positions, projections, layers, final_norm, own_head })
    }

    /// Its sizes.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Bytes of all matrices, which each pass reads once. Of embeddings that are not the LM head too it reads a few rows, and
    /// they do not count.
    pub fn bytes(&self, device: &D) -> usize {
        let layers = self.layers.iter().flat_map(|l| [&l.qkv, &l.out, &l.fc1, &l.fc2]).map(|l| &l.weight);
        let projections = self.projections.iter().flat_map(|(a, b)| [a, b]);
        layers.chain(projections).chain([self.lm_head()]).map(|w| device.packed_bytes(w)).sum()
    }

    fn lm_head(&self) -> &D::Packed {
        self.own_head.as_ref().unwrap_or(&self.tokens)
    }

    /// Runs new tokens, those of one segment after those of another, through all layers, and appends their keys and
    /// values to the cache. A token's results have the same bits whatever else is in the call and however its sequence
    /// was cut into calls.
    ///
    /// # Errors
    /// When there are more tokens than the memory has rows, ids are not in the vocabulary, or a sequence is longer than the
    /// model's positions or its pages; nothing is computed then.
    pub fn forward<E: Element>(
        &self,
        d: &D,
        tokens: &[u32],
        segments: &[Segment<'_>],
        cache: &mut Cache<D, E>,
        memory: &mut Memory<D, E>,
    ) -> Result<()> {
        self.check(tokens, segments, cache.pages, memory.rows)?;
        let m = tokens.len();
        if m == 0 {
            return Ok(());
        }
        self.put(d, tokens, segments, cache.pages, memory);
        // All that differs between steps of as many rows is in memory now.
        perhaps_repeated(d, m, || {
            self.embed(d, m, memory);
            let (rows, a) = (&mut memory.numbers, &mut memory.activations);
            for (layer, cache) in self.layers.iter().zip(&mut cache.layers) {
                layer.forward(d, &self.config, m, memory.places.placed(), cache, rows, a, &mut |_, _| {});
            }
            self.finish(d, m, memory);
        });
        Ok(())
    }

    /// Uploads what a pass over new tokens reads; the cache has so many `pages`.
    fn put<E: Element>(
        &self,
        d: &D,
        tokens: &[u32],
        segments: &[Segment<'_>],
        pages: usize,
        memory: &mut Memory<D, E>,
    ) {
        let positions: Vec<u32> = segments
            .iter()
            .flat_map(|s| s.past..s.past + s.rows)
            .map(|p| (p + POSITION_OFFSET) as u32)
            .collect();
        let rows = &mut memory.numbers;
        d.upload(&mut rows.tokens, 0, tokens);
        d.upload(&mut rows.positions, 0, &positions);
        memory.places.put(d, segments, pages);
    }

    /// What the first layer reads.
    fn embed<E: Element>(&self, d: &D, m: usize, memory: &mut Memory<D, E>) {
        let (c, rows, a) = (self.config.width, &memory.numbers, &mut memory.activations);
        match (&mut memory.narrow, &self.projections) {
            (Some((embedded, narrow)), Some((weight, _))) => {
                d.packed_embed(m, &rows.tokens, &self.tokens, None, embedded);
                d.cast(embedded, narrow);
                d.embed(m, c, &rows.positions, &self.positions, None, &mut a.mid);
                d.packed_linear_residual(m, narrow, weight, None, &a.mid, &mut a.stream);
            }
            _ => {
                let second = Some((&rows.positions, &self.positions));
                d.packed_embed(m, &rows.tokens, &self.tokens, second, &mut a.stream);
            }
        }
        if self.config.post_norm {
            d.cast(&a.stream, &mut a.normed);
        }
    }

    /// What the head reads, out of what the last layer left in the stream.
    fn finish<E: Element>(&self, d: &D, m: usize, memory: &mut Memory<D, E>) {
        let (rows, a) = (&mut memory.numbers, &mut memory.activations);
        if let Some(Norm { gain, bias }) = &self.final_norm {
            let (c, mean, rstd) = (self.config.width, &mut rows.mean, &mut rows.rstd);
            d.layer_norm(m, c, &a.stream, gain, bias, &mut a.normed, None, mean, rstd);
        }
    }

    fn check(&self, tokens: &[u32], segments: &[Segment<'_>], pages: usize, rows: usize) -> Result<()> {
        let all: usize = segments.iter().map(|s| s.rows).sum();
        ensure!(all == tokens.len(), "{} tokens were given for {all} rows", tokens.len());
        ensure!(all <= rows, "{all} tokens are more than the {rows} rows of the memory");
        if let Some(id) = tokens.iter().find(|id| **id as usize >= self.config.vocab) {
            anyhow::bail!("the token id {id} is not in the model's vocabulary of {}", self.config.vocab);
        }
        for s in segments {
            let len = s.past + s.rows;
            ensure!(
                len <= self.config.positions,
                "a text of {len} tokens is longer than the model's {} positions",
                self.config.positions
            );
            ensure!(
                s.pages.len() * PAGE >= len,
                "a text of {len} tokens does not fit {} pages",
                s.pages.len()
            );
            if let Some(page) = s.pages.iter().find(|page| **page as usize >= pages) {
                anyhow::bail!("page {page} was named, but the cache has {pages}");
            }
        }
        Ok(())
    }

    /// Logits of some rows of the last forward pass.
    ///
    /// # Errors
    /// When there are more than the memory has room for.
    pub fn head<'p, E: Element>(
        &self,
        d: &'p D,
        rows: &[u32],
        memory: &'p mut Memory<D, E>,
    ) -> Result<Logits<'p, D>> {
        let (m, vocab) = (rows.len(), self.config.vocab);
        memory.put_chosen(d, rows)?;
        if m > 0 {
            perhaps_repeated(d, m, || {
                self.choose(d, m, memory);
                let hidden = memory.narrow.as_ref().map_or(&memory.chosen, |(_, narrow)| narrow);
                d.packed_linear(m, hidden, self.lm_head(), None, Activation::Identity, &mut memory.logits);
                d.log_sum_exp(m, vocab, &memory.logits, &mut memory.lse, &mut memory.largest);
            });
        }
        Ok(Logits {
            device: d,
            rows: m,
            vocab,
            logits: &memory.logits,
            lse: Asked::new(&memory.lse),
            largest: Asked::new(&memory.largest),
        })
    }

    /// Hidden states of some rows of the last forward pass, `[M, W]` with the embeddings' width W: what the LM head
    /// multiplies with its matrix, which is Hugging Face's `last_hidden_state`.
    ///
    /// # Errors
    /// When there are more than the memory has room for.
    pub fn hidden<E: Element>(&self, d: &D, rows: &[u32], memory: &mut Memory<D, E>) -> Result<Vec<f32>> {
        memory.put_chosen(d, rows)?;
        if !rows.is_empty() {
            self.choose(d, rows.len(), memory);
        }
        let hidden = memory.narrow.as_ref().map_or(&memory.chosen, |(_, narrow)| narrow);
        let mut values = vec![E::default(); rows.len() * self.config.embedding_width];
        d.download(hidden, 0, &mut values);
        Ok(values.into_iter().map(E::to_f32).collect())
    }

    /// Brings together what the head reads of the rows that were put, in the embeddings' width.
    fn choose<E: Element>(&self, d: &D, m: usize, memory: &mut Memory<D, E>) {
        let (rows, normed) = (&memory.numbers.tokens, &memory.activations.normed);
        d.embed(m, self.config.width, rows, normed, None, &mut memory.chosen);
        if let (Some((_, narrow)), Some((_, weight))) = (&mut memory.narrow, &self.projections) {
            d.packed_linear(m, &memory.chosen, weight, None, Activation::Identity, narrow);
        }
    }
}

/// Runs operations on `m` rows, in such a way that they are started at once where as many are likely to come again.
fn perhaps_repeated<D: Device>(d: &D, m: usize, mut work: impl FnMut()) {
    if m <= REPEATED {
        d.repeated(&mut work);
    } else {
        work();
    }
}

/// Keys and values of all layers, in pages of [`PAGE`] tokens.
pub struct Cache<D: Device, E: Element> {
    layers: Vec<(D::Buf<E>, D::Buf<E>)>,
    pages: usize,
    /// Elements of a page.
    size: usize,
}

impl<D: Device, E: Element> Cache<D, E> {
    /// Room for `pages` pages.
    ///
    /// # Errors
    /// When memory is short.
    pub fn new(device: &D, config: &Config, pages: usize) -> Result<Self> {
        let size = PAGE * config.width;
        let side = || device.alloc(pages * size);
        let layers = (0..config.layers).map(|_| Ok((side()?, side()?))).collect::<Result<_>>();
        let layers = layers.with_context(|| format!("a cache of {} tokens does not fit", pages * PAGE))?;
        Ok(Cache { layers, pages, size })
    }

    /// Takes all memory of a new cache from the system now, on all threads: otherwise that happens where a page is used for the
    /// first time, which on some virtual machines takes longer than the step that it is in.
    pub fn reserve(&mut self, device: &D) {
        let layers: Vec<_> = self.layers.iter_mut().map(Mutex::new).collect();
        device.each_task(layers.len(), &|layer| {
            let mut layer = layers[layer].lock().unwrap_or_else(PoisonError::into_inner);
            layer.0.reserve();
            layer.1.reserve();
        });
    }

    /// Copies pages, from and to, in this order.
    pub fn copy(&mut self, device: &D, pairs: &[(u32, u32)]) {
        for (k, v) in &mut self.layers {
            device.copy_blocks(self.size, pairs, k);
            device.copy_blocks(self.size, pairs, v);
        }
    }
}

/// Memory of a forward pass, made once.
pub struct Memory<D: Device, E: Element> {
    rows: usize,
    head_rows: usize,
    numbers: Numbers<D>,
    places: Places<D>,
    activations: Activations<D, E>,
    /// `[N, W]`, with embedding projections: as embedded, and as products take it.
    narrow: Option<(D::Buf<f32>, D::Buf<E>)>,
    /// `[M, C]`: rows whose logits are wanted.
    chosen: D::Buf<E>,
    /// `[M, V]`
    logits: D::Buf<f32>,
    lse: D::Buf<f32>,
    largest: D::Buf<u32>,
}

/// A number for each row.
struct Numbers<D: Device> {
    tokens: D::Buf<u32>,
    positions: D::Buf<u32>,
    mean: D::Buf<f32>,
    rstd: D::Buf<f32>,
}

/// What a layer works on; names and shapes are those of training, with N rows.
struct Activations<D: Device, E: Element> {
    stream: D::Buf<f32>,
    mid: D::Buf<f32>,
    normed: D::Buf<E>,
    qkv: D::Buf<E>,
    attended: D::Buf<E>,
    relu: D::Buf<E>,
}

impl<D: Device, E: Element> Memory<D, E> {
    /// For at most `rows` tokens in a call, and logits of at most `head_rows` of them at a time.
    ///
    /// # Errors
    /// When memory is short.
    pub fn new(device: &D, config: &Config, rows: usize, head_rows: usize) -> Result<Self> {
        let (rows, head_rows) = (rows.max(1), head_rows.clamp(1, rows.max(1)));
        let (n, m, c, w) = (rows, head_rows, config.width, config.embedding_width);
        let narrow =
            if config.has_projections() { Some((device.alloc(n * w)?, device.alloc(n * w)?)) } else { None };
        Ok(Memory {
            rows,
            head_rows,
            numbers: Numbers {
                tokens: device.alloc(n)?,
                positions: device.alloc(n)?,
                mean: device.alloc(n)?,
                rstd: device.alloc(n)?,
            },
            places: Places::new(device, n, config.positions.div_ceil(PAGE))?,
            activations: Activations {
                stream: device.alloc(n * c)?,
                mid: device.alloc(n * c)?,
                normed: device.alloc(n * c)?,
                qkv: device.alloc(n * 3 * c)?,
                attended: device.alloc(n * c)?,
                relu: device.alloc(n * config.feed_forward)?,
            },
            narrow,
            chosen: device.alloc(m * c)?,
            logits: device.alloc(head_rows * config.vocab)?,
            lse: device.alloc(head_rows)?,
            largest: device.alloc(head_rows)?,
        })
    }

    /// Uploads the numbers of rows that something is wanted of.
    fn put_chosen(&mut self, device: &D, rows: &[u32]) -> Result<()> {
        let m = rows.len();
        ensure!(m <= self.head_rows, "{m} rows are more than the {} of the memory", self.head_rows);
        device.upload(&mut self.numbers.tokens, 0, rows);
        Ok(())
    }

    /// Most tokens of a call.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Most rows whose logits can be had at a time.
    pub fn head_rows(&self) -> usize {
        self.head_rows
    }
}

/// Logits of some rows.
pub struct Logits<'a, D: Device> {
    device: &'a D,
    rows: usize,
    vocab: usize,
    logits: &'a D::Buf<f32>,
    lse: Asked<&'a D::Buf<f32>, f32>,
    largest: Asked<&'a D::Buf<u32>, u32>,
}

/// Numbers of a device, one for each row, which come when the first of them is asked for: each download waits for the device.
struct Asked<B, T> {
    there: B,
    here: OnceLock<Vec<T>>,
}

impl<B, T> Asked<B, T> {
    fn new(there: B) -> Self {
        Asked { there, here: OnceLock::new() }
    }
}

impl<D: Device> Logits<'_, D> {
    /// The id with the largest logit, the lowest of equal ones.
    pub fn largest(&self, row: usize) -> u32 {
        self.of_row(&self.largest, row)
    }

    fn of_row<T: Element>(&self, asked: &Asked<&D::Buf<T>, T>, row: usize) -> T {
        asked.here.get_or_init(|| {
            let mut all = vec![T::default(); self.rows];
            self.device.download(asked.there, 0, &mut all);
            all
        })[row]
    }

    /// Log-probability of a token.
    pub fn log_prob(&self, row: usize, id: u32) -> f32 {
        let mut logit = [0.0];
        self.device.download(self.logits, row * self.vocab + id as usize, &mut logit);
        logit[0] - self.log_sum_exp(row)
    }

    /// What to take off a row's logits to get log-probabilities.
    pub fn log_sum_exp(&self, row: usize) -> f32 {
        self.of_row(&self.lse, row)
    }

    /// Chooses a token for each `(row, draw)`, of ids below `known`.
    pub fn draw(&self, known: usize, draws: &[(usize, Draw)]) -> Vec<u32> {
        self.device.draw(self.vocab, known, self.logits, draws)
    }

    /// All logits of a row.
    pub fn read(&self, row: usize, out: &mut Vec<f32>) {
        out.resize(self.vocab, 0.0);
        self.device.download(self.logits, row * self.vocab, out);
    }
}
