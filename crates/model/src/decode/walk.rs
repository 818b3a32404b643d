//! GPTQ through a whole model: text goes through the layers one after the other, and each is rounded by what reaches it
//! behind those that were rounded before, so that it makes up for their errors too.
//!
//! Memory holds one layer, the sums of products of its inputs, and the residual stream of all tokens.

use super::layer::{Layer, Linear, Product};
use super::{Decoder, Matrices, Memory, ReadRows, Reader};
use crate::config::Config;
use crate::gptq::Calibration;
use crate::parameters::{HEAD, Parameter};
use crate::rounded::{Rounded, RoundingError};
use anyhow::{Context, Result, ensure};
use ferropt_device::{Activation, Device, LinearShape, PAGE, Segment, Store, WeightFormat, bf16};
use std::collections::BTreeMap;

/// Tokens that go through a layer together, at least: enough for fast products.
const TOGETHER: usize = 2048;
/// Rows of a matrix whose error is computed at a time.
const ROWS: usize = 1024;

/// A matrix, rounded, and what that changed.
pub type WithError = (Rounded, RoundingError);

/// A model on its way through [`Walk::round`].
pub struct Walk<'a, 'r, D: Device> {
    device: &'a D,
    config: &'a Config,
    format: WeightFormat,
    threads: usize,
    read: &'a ReadRows<'r>,
    /// Told the steps done so far, and all.
    progress: &'a mut dyn FnMut(u64, u64),
    done: u64,
    table: Vec<Parameter>,
    /// The model without its layers. Embeddings are rounded to nearest here, and norms and projections as they will be.
    frame: Decoder<D>,
    batches: Vec<Batch<D>>,
    memory: Memory<D, bf16>,
    /// Keys and values of one batch in one layer, in so many pages.
    cache: (D::Buf<bf16>, D::Buf<bf16>),
    pages: usize,
    stage: Stage,
    /// Matrices that were rounded and not yet asked for.
    ready: BTreeMap<usize, WithError>,
}

/// What is to be rounded next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The projection behind the embeddings, if there is one.
    Embeddings,
    Layer(usize),
    /// The projection before the LM head, if there is one, and the head.
    Head,
    End,
}

/// Some texts.
struct Batch<D: Device> {
    tokens: Vec<u32>,
    /// Pages of each text in the cache, and its tokens.
    texts: Vec<(Vec<u32>, usize)>,
    /// `[N, C]`, before the next layer.
    stream: D::Buf<f32>,
}

impl<D: Device> Batch<D> {
    fn segments(&self) -> Vec<Segment<'_>> {
        self.texts.iter().map(|(pages, rows)| Segment { rows: *rows, past: 0, pages }).collect()
    }
}

/// Sums of products of what goes into a matrix.
struct Sums<D: Device> {
    k: usize,
    h: D::Buf<f32>,
}

impl<D: Device> Sums<D> {
    fn new(device: &D, k: usize) -> Result<Self> {
        let what = || format!("sums of products of inputs of width {k} do not fit");
        Ok(Sums { k, h: device.alloc(k * k).with_context(what)? })
    }

    fn add(&mut self, device: &D, m: usize, x: &D::Buf<bf16>) {
        let shape = LinearShape { m, n: self.k, k: self.k };
        device.linear_backward_weight(shape, x, x, &mut self.h, None, Store::Accumulate);
    }
}

impl<'a, 'r, D: Device> Walk<'a, 'r, D> {
    /// Prepares to round the matrices that `read` gives (see [`Decoder::new`]) by texts of at most as many tokens as the
    /// model has positions. `threads` do what the device does not; `progress` is told steps done and steps in all.
    ///
    /// # Errors
    /// When there is no text, one is too long or has ids that the model does not know, memory is short, or `read` fails.
    pub fn new(
        device: &'a D,
        config: &'a Config,
        format: WeightFormat,
        texts: &[Vec<u32>],
        threads: usize,
        read: &'a ReadRows<'r>,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        config.check()?;
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
        ensure!(longest > 0, "there is no text to calibrate with");
        let rows = longest.max(TOGETHER.min(texts.iter().map(Vec::len).sum()));
        let memory = Memory::new(device, config, rows, 1)?;
        let frame = frame(device, config, format, read)?;
        let batches = batches(device, config, texts, rows)?;
        let pages = batches.iter().map(|b| b.texts.iter().map(|(p, _)| p.len()).sum()).max().unwrap_or(0);
        for batch in &batches {
            frame.check(&batch.tokens, &batch.segments(), pages, rows)?;
        }
        let side = || device.alloc(pages * PAGE * config.width);
        let (cache, table) = ((side()?, side()?), config.parameters());
        let (stage, ready) = (Stage::Embeddings, BTreeMap::new());
        Ok(Walk {
            device,
            config,
            format,
            threads,
            read,
            progress,
            done: 0,
            table,
            frame,
            batches,
            memory,
            cache,
            pages,
            stage,
            ready,
        })
    }

    /// Matrix number `index` of the parameter table, rounded. Each may be had once; asking for them in the model's order,
    /// the embeddings last, holds those of one layer at a time.
    ///
    /// # Errors
    /// When `read` fails, memory is short, or what reaches the matrix is not finite; the message names the matrix.
    pub fn round(&mut self, index: usize) -> Result<WithError> {
        loop {
            if let Some(rounded) = self.ready.remove(&index) {
                return Ok(rounded);
            }
            match self.stage {
                Stage::Embeddings => self.embeddings()?,
                Stage::Layer(l) => self.layer(l)?,
                Stage::Head => self.head()?,
                Stage::End => {
                    anyhow::bail!("parameter {index} is no matrix to be rounded, or was asked for twice")
                }
            }
            self.stage = match self.stage {
                Stage::Embeddings => Stage::Layer(0),
                Stage::Layer(l) if l + 1 < self.config.layers => Stage::Layer(l + 1),
                Stage::Layer(_) => Stage::Head,
                Stage::Head | Stage::End => Stage::End,
            };
        }
    }

    /// One batch went through something: a layer twice, embeddings and head once.
    fn step(&mut self) {
        self.done += 1;
        (self.progress)(self.done, (self.batches.len() * (2 * self.config.layers + 2)) as u64);
    }

    /// Fills the batches' streams.
    fn embeddings(&mut self) -> Result<()> {
        let d = self.device;
        if self.config.has_projections() {
            let mut sums = Sums::new(d, self.config.embedding_width)?;
            for batch in &self.batches {
                self.frame.put(d, &batch.tokens, &batch.segments(), self.pages, &mut self.memory);
                self.frame.embed(d, batch.tokens.len(), &mut self.memory);
                if let Some((_, narrow)) = &self.memory.narrow {
                    sums.add(d, batch.tokens.len(), narrow);
                }
            }
            // In the table it follows the two tables of embeddings.
            let packed = self.round_one(2, sums)?;
            if let Some((project_in, _)) = &mut self.frame.projections {
                *project_in = packed;
            }
        }
        for i in 0..self.batches.len() {
            let batch = &mut self.batches[i];
            self.frame.put(d, &batch.tokens, &batch.segments(), self.pages, &mut self.memory);
            self.frame.embed(d, batch.tokens.len(), &mut self.memory);
            std::mem::swap(&mut self.memory.activations.stream, &mut batch.stream);
            self.step();
        }
        Ok(())
    }

    fn layer(&mut self, l: usize) -> Result<()> {
        let d = self.device;
        let prefix = format!("model.decoder.layers.{l}.");
        let own = |i: &usize| self.table[*i].names[0].starts_with(&prefix);
        let first = (0..self.table.len()).find(own).with_context(|| format!("there is no layer {l}"))?;
        let matrices: Vec<usize> =
            (first..self.table.len()).take_while(own).filter(|i| self.table[*i].is_matrix()).collect();
        let mut layer = reader(d, self.config, WeightFormat::Bf16, self.read, first).layer()?;
        let (c, f) = (self.config.width, self.config.feed_forward);
        let [mut qkv, mut out, mut fc1, mut fc2] =
            [Sums::new(d, c)?, Sums::new(d, c)?, Sums::new(d, c)?, Sums::new(d, f)?];
        for i in 0..self.batches.len() {
            let m = self.batches[i].tokens.len();
            self.copy_in(i);
            self.forward(&layer, i, &mut |product, x| {
                let sums = match product {
                    Product::Qkv => &mut qkv,
                    Product::Out => &mut out,
                    Product::Fc1 => &mut fc1,
                    Product::Fc2 => &mut fc2,
                };
                sums.add(d, m, x);
            });
            self.step();
        }
        let Layer { qkv: w_qkv, out: w_out, fc1: w_fc1, fc2: w_fc2, .. } = &mut layer;
        let products = [(w_qkv, qkv), (w_out, out), (w_fc1, fc1), (w_fc2, fc2)];
        for ((Linear { weight, .. }, sums), index) in products.into_iter().zip(matrices) {
            *weight = self.round_one(index, sums)?;
        }
        for i in 0..self.batches.len() {
            self.copy_in(i);
            self.forward(&layer, i, &mut |_, _| {});
            std::mem::swap(&mut self.memory.activations.stream, &mut self.batches[i].stream);
            self.step();
        }
        Ok(())
    }

    /// A batch, whose stream is in the memory, through a layer.
    fn forward(&mut self, layer: &Layer<D>, batch: usize, see: &mut dyn FnMut(Product, &D::Buf<bf16>)) {
        let (d, batch) = (self.device, &self.batches[batch]);
        let Memory { places, numbers, activations, .. } = &mut self.memory;
        places.put(d, &batch.segments(), self.pages);
        let (m, cache) = (batch.tokens.len(), &mut self.cache);
        layer.forward(d, self.config, m, places.placed(), cache, numbers, activations, see);
    }

    fn head(&mut self) -> Result<()> {
        let d = self.device;
        if self.config.has_projections() {
            let mut sums = Sums::new(d, self.config.width)?;
            for i in 0..self.batches.len() {
                self.normed(i);
                sums.add(d, self.batches[i].tokens.len(), &self.memory.activations.normed);
            }
            let index = self.index_of("project_out.weight")?;
            let packed = self.round_one(index, sums)?;
            if let Some((_, project_out)) = &mut self.frame.projections {
                *project_out = packed;
            }
        }
        let mut sums = Sums::new(d, self.config.embedding_width)?;
        for i in 0..self.batches.len() {
            self.normed(i);
            let (m, normed) = (self.batches[i].tokens.len(), &self.memory.activations.normed);
            match (&mut self.memory.narrow, &self.frame.projections) {
                (Some((_, narrow)), Some((_, weight))) => {
                    d.packed_linear(m, normed, weight, None, Activation::Identity, narrow);
                    sums.add(d, m, narrow);
                }
                _ => sums.add(d, m, normed),
            }
            self.step();
        }
        if !self.config.own_head {
            self.round_one(0, sums)?;
            return Ok(());
        }
        self.round_one(self.index_of(HEAD)?, sums)?;
        // No product reads these embeddings, so that no text says how their errors make up for each other.
        let (n, k) = (self.table[0].shape[0], self.config.embedding_width);
        let mut w = vec![0.0; n * k];
        (self.read)(0, 0..n, &mut w)?;
        let rounded = Rounded::nearest(self.format, &w, k, self.threads)?;
        let error = rounded.error(&w);
        self.ready.insert(0, (rounded, error));
        Ok(())
    }

    /// Number of the parameter whose name ends so.
    fn index_of(&self, name: &str) -> Result<usize> {
        let found = self.table.iter().position(|p| p.names[0].ends_with(name));
        found.with_context(|| format!("there is no {name}"))
    }

    /// What a batch's last layer hands on.
    fn normed(&mut self, batch: usize) {
        self.copy_in(batch);
        self.frame.finish(self.device, self.batches[batch].tokens.len(), &mut self.memory);
    }

    /// Copies a batch's stream into the memory, as the layers before would have left it there.
    fn copy_in(&mut self, batch: usize) {
        let a = &mut self.memory.activations;
        self.device.cast(&self.batches[batch].stream, &mut a.stream);
        if self.config.post_norm {
            self.device.cast(&a.stream, &mut a.normed);
        }
    }

    /// Rounds a matrix by the sums of its inputs.
    fn round_one(&mut self, index: usize, sums: Sums<D>) -> Result<D::Packed> {
        let what = self.table[index].names.join(", ");
        let (packed, rounded) = self.rounded(index, sums).context(what)?;
        self.ready.insert(index, rounded);
        Ok(packed)
    }

    fn rounded(&mut self, index: usize, sums: Sums<D>) -> Result<(D::Packed, WithError)> {
        let (n, k) = (self.table[index].shape[0], sums.k);
        let (mut w, mut h) = (vec![0.0; n * k], vec![0.0; k * k]);
        (self.read)(index, 0..n, &mut w)?;
        self.device.download(&sums.h, 0, &mut h);
        let rounded = Calibration::new(&h, k, self.threads)?.round(self.format, &w, self.threads)?;
        let error = RoundingError { outputs: Some(self.outputs(&rounded, &w, &sums)?), ..rounded.error(&w) };
        Ok((rounded.pack(self.device)?, (rounded, error)))
    }

    /// Sums of squares of what rounding changed in all outputs, and of the outputs: of a row w, `w H w^T`.
    fn outputs(&self, rounded: &Rounded, w: &[f32], sums: &Sums<D>) -> Result<(f64, f64)> {
        let (d, k) = (self.device, sums.k);
        let (mut x, mut y) = (d.alloc(ROWS * k)?, d.alloc(ROWS * k)?);
        let mut values = vec![0.0; ROWS.min(rounded.rows()) * k];
        let mut products = values.clone();
        let mut squares = |values: &[f32], products: &mut [f32]| -> f64 {
            let shape = LinearShape { m: values.len() / k, n: k, k };
            d.upload(&mut x, 0, values);
            d.linear(shape, &x, &sums.h, None, Activation::Identity, &mut y);
            d.download(&y, 0, products);
            values.iter().zip(products).map(|(a, b)| *a as f64 * *b as f64).sum()
        };
        let (mut changed, mut all) = (0.0, 0.0);
        for (w, first) in w.chunks(ROWS * k).zip((0..).step_by(ROWS)) {
            let (values, products) = (&mut values[..w.len()], &mut products[..w.len()]);
            all += squares(w, products);
            for (i, (row, w)) in values.chunks_exact_mut(k).zip(w.chunks_exact(k)).enumerate() {
                rounded.row(first + i, row);
                row.iter_mut().zip(w).for_each(|(x, w)| *x -= w);
            }
            changed += squares(values, products);
        }
        Ok((changed, all))
    }
}

/// Reads parameters from number `first` of the table on.
fn reader<'a, 'r, D: Device>(
    device: &'a D,
    config: &Config,
    format: WeightFormat,
    read: &'a ReadRows<'r>,
    first: usize,
) -> Reader<'a, 'r, D> {
    let mut table = config.parameters().into_iter().enumerate();
    if first > 0 {
        table.nth(first - 1);
    }
    Reader { device, format, table, read, matrices: Matrices::Rows }
}

/// The model without its layers.
fn frame<D: Device>(
    device: &D,
    config: &Config,
    format: WeightFormat,
    read: &ReadRows<'_>,
) -> Result<Decoder<D>> {
    let of_layers = config.parameters().iter().filter(|p| p.names[0].contains(".layers.")).count();
    Decoder::assemble(config, reader(device, config, format, read, 0), |r| {
        r.table.by_ref().take(of_layers).for_each(drop);
        Ok(Vec::new())
    })
}

/// Texts in batches of at most `rows` tokens.
fn batches<D: Device>(device: &D, config: &Config, texts: &[Vec<u32>], rows: usize) -> Result<Vec<Batch<D>>> {
    let mut batches: Vec<Batch<D>> = Vec::new();
    for text in texts.iter().filter(|text| !text.is_empty()) {
        if batches.last().is_none_or(|last| last.tokens.len() + text.len() > rows) {
            // As long as the memory's own stream, with which it changes places.
            let stream = device.alloc(rows * config.width);
            let what = || format!("activations of {} texts do not fit", texts.len());
            let stream = stream.with_context(what)?;
            batches.push(Batch { tokens: Vec::new(), texts: Vec::new(), stream });
        }
        if let Some(batch) = batches.last_mut() {
            let first = batch.texts.last().and_then(|(pages, _)| pages.last()).map_or(0, |last| last + 1);
            let pages = text.len().div_ceil(PAGE) as u32;
            batch.texts.push(((first..first + pages).collect(), text.len()));
            batch.tokens.extend(text);
        }
    }
    Ok(batches)
}
