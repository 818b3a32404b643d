//! Generation with a KV cache, one sequence at a time.

use crate::config::POSITION_OFFSET;
use crate::weights::{Layer, Linear, Model, Norm};
use anyhow::{Result, ensure};
use ferropt_device::{Activation, Device, Element, LinearShape};

/// A text that grows: keys and values of its tokens, layer by layer.
pub struct Session<'a, D: Device, E: Element> {
    device: &'a D,
    model: &'a Model<D, E>,
    /// Keys and values `[capacity, C]` of each layer.
    cache: Vec<(D::Buf<E>, D::Buf<E>)>,
    capacity: usize,
    len: usize,
    /// Buffers for one token, which most calls need.
    one: Rows<D, E>,
    logits: D::Buf<f32>,
}

/// Activations of some new tokens; names and shapes as in training, with N the number of tokens.
struct Rows<D: Device, E: Element> {
    count: usize,
    tokens: D::Buf<u32>,
    positions: D::Buf<u32>,
    stream: D::Buf<f32>,
    mid: D::Buf<f32>,
    normed: D::Buf<E>,
    qkv: D::Buf<E>,
    attended: D::Buf<E>,
    relu: D::Buf<E>,
    statistics: (D::Buf<f32>, D::Buf<f32>),
    /// `[N, W]`, with embedding projections.
    narrow: Option<D::Buf<E>>,
}

impl<D: Device, E: Element> Rows<D, E> {
    fn new(device: &D, config: &crate::Config, count: usize) -> Result<Self> {
        let c = config.width;
        Ok(Rows {
            count,
            tokens: device.alloc(count)?,
            positions: device.alloc(count)?,
            stream: device.alloc(count * c)?,
            mid: device.alloc(count * c)?,
            normed: device.alloc(count * c)?,
            qkv: device.alloc(count * 3 * c)?,
            attended: device.alloc(count * c)?,
            relu: device.alloc(count * config.feed_forward)?,
            statistics: (device.alloc(count)?, device.alloc(count)?),
            narrow: if config.has_projections() {
                Some(device.alloc(count * config.embedding_width)?)
            } else {
                None
            },
        })
    }
}

impl<'a, D: Device, E: Element> Session<'a, D, E> {
    /// An empty text of at most `capacity` tokens.
    ///
    /// # Errors
    /// When the model has fewer positions, or memory is short.
    pub fn new(device: &'a D, model: &'a Model<D, E>, capacity: usize) -> Result<Self> {
        let config = model.config();
        ensure!(
            (1..=config.positions).contains(&capacity),
            "a text of {capacity} tokens was asked for, but the model has {} positions",
            config.positions
        );
        let side = || device.alloc(capacity * config.width);
        Ok(Session {
            device,
            model,
            cache: (0..config.layers).map(|_| Ok((side()?, side()?))).collect::<Result<_>>()?,
            capacity,
            len: 0,
            one: Rows::new(device, config, 1)?,
            logits: device.alloc(config.vocab)?,
        })
    }

    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no tokens yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends tokens and returns the logits `[V]` of what follows the last one.
    ///
    /// # Errors
    /// When there are no tokens, one is not in the vocabulary, or the text would exceed its capacity; nothing is
    /// appended then.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let config = self.model.config();
        ensure!(!tokens.is_empty(), "there is no token to go on from");
        ensure!(
            tokens.len() <= self.capacity - self.len,
            "{} tokens do not fit behind {}: the text may have {}",
            tokens.len(),
            self.len,
            self.capacity
        );
        if let Some(id) = tokens.iter().find(|id| **id as usize >= config.vocab) {
            anyhow::bail!("the token id {id} is not in the model's vocabulary of {}", config.vocab);
        }
        if tokens.len() > 1 {
            let (last, before) = (tokens.len() - 1, &tokens[..tokens.len() - 1]);
            let mut rows = Rows::new(self.device, config, last)?;
            self.run(before, &mut rows);
        }
        let mut one = std::mem::replace(&mut self.one, Rows::new(self.device, config, 0)?);
        self.run(&tokens[tokens.len() - 1..], &mut one);
        self.head(&mut one);
        self.one = one;
        let mut logits = vec![0.0; config.vocab];
        self.device.download(&self.logits, 0, &mut logits);
        Ok(logits)
    }

    /// Through all layers; `rows.normed` is then what the head reads.
    fn run(&mut self, tokens: &[u32], rows: &mut Rows<D, E>) {
        let (d, w, config) = (self.device, &self.model.weights, self.model.config());
        let (c, width) = (config.width, config.embedding_width);
        d.upload(&mut rows.tokens, 0, tokens);
        let positions: Vec<u32> =
            (0..tokens.len()).map(|i| (self.len + i + POSITION_OFFSET) as u32).collect();
        d.upload(&mut rows.positions, 0, &positions);
        match (&mut rows.narrow, &w.project_in) {
            (Some(embedded), Some(weight)) => {
                d.embed(width, &rows.tokens, &w.tokens, None, embedded);
                d.embed(c, &rows.positions, &w.positions, None, &mut rows.mid);
                let shape = LinearShape { m: rows.count, n: c, k: width };
                d.linear_residual(shape, embedded, weight, None, None, &rows.mid, &mut rows.stream);
            }
            _ => d.embed(c, &rows.tokens, &w.tokens, Some((&rows.positions, &w.positions)), &mut rows.stream),
        }
        if config.post_norm {
            d.cast(&rows.stream, &mut rows.normed);
        }
        for (layer, cache) in w.layers.iter().zip(&mut self.cache) {
            run_layer(d, config, layer, self.len, cache, rows);
        }
        if let Some(norm) = &w.final_norm {
            let (y, (mean, rstd)) = (&mut rows.normed, &mut rows.statistics);
            d.layer_norm(c, &rows.stream, &norm.gain, &norm.bias, y, None, mean, rstd);
        }
        self.len += tokens.len();
    }

    /// Logits of one row.
    fn head(&mut self, one: &mut Rows<D, E>) {
        let (d, w, config) = (self.device, &self.model.weights, self.model.config());
        let (c, width, none) = (config.width, config.embedding_width, Activation::Identity);
        let h = match (&mut one.narrow, &w.project_out) {
            (Some(narrow), Some(weight)) => {
                d.linear(LinearShape { m: 1, n: width, k: c }, &one.normed, weight, None, none, narrow);
                narrow
            }
            _ => &mut one.normed,
        };
        d.linear(LinearShape { m: 1, n: config.vocab, k: width }, h, &w.tokens, None, none, &mut self.logits);
    }
}

/// One layer over new tokens behind `past` cached ones: `stream` to `stream`, and with post-norm `normed` too.
fn run_layer<D: Device, E: Element>(
    d: &D,
    config: &crate::Config,
    w: &Layer<D, E>,
    past: usize,
    (k_cache, v_cache): &mut (D::Buf<E>, D::Buf<E>),
    rows: &mut Rows<D, E>,
) {
    let (c, f, m) = (config.width, config.feed_forward, rows.count);
    let shape = |n, k| LinearShape { m, n, k };
    let Rows { stream, mid, normed, qkv, attended, relu, statistics: (mean, rstd), .. } = rows;
    if !config.post_norm {
        d.layer_norm(c, stream, &w.norm1.gain, &w.norm1.bias, normed, None, mean, rstd);
    }
    let Linear { weight, bias } = &w.qkv;
    d.linear(shape(3 * c, c), normed, weight, Some(bias), Activation::Identity, qkv);
    d.attention_cached(config.heads, config.head_width(), past, m, qkv, k_cache, v_cache, attended);
    let Linear { weight, bias } = &w.out;
    d.linear_residual(shape(c, c), attended, weight, Some(bias), None, stream, mid);
    if config.post_norm {
        let Norm { gain, bias } = &w.norm1;
        d.layer_norm(c, mid, gain, bias, normed, Some(stream), mean, rstd);
    } else {
        d.layer_norm(c, mid, &w.norm2.gain, &w.norm2.bias, normed, None, mean, rstd);
    }
    d.linear(shape(f, c), normed, &w.fc1.weight, Some(&w.fc1.bias), Activation::Relu, relu);
    let Linear { weight, bias } = &w.fc2;
    if config.post_norm {
        d.linear_residual(shape(c, f), relu, weight, Some(bias), None, stream, mid);
        let Norm { gain, bias } = &w.norm2;
        d.layer_norm(c, mid, gain, bias, normed, Some(stream), mean, rstd);
    } else {
        d.linear_residual(shape(c, f), relu, weight, Some(bias), None, mid, stream);
    }
}
