//! One decoder layer, forward and backward, over the buffers of the activation table.
//!
//! Pre-norm: `mid = stream + attention(norm1(stream))`, `stream' = mid + feed_forward(norm2(mid))`.
//! Post-norm (350m): `between = norm1(stream + attention(stream))`, `stream' = norm2(between + feed_forward(between))`.

use crate::activations::{Allocator, Copies, Recompute};
use crate::backprop::{Options, Pass};
use crate::config::Config;
use crate::exchange::{Exchange, all_rows, linear_residual, share, sum_rows};
use crate::part::Stage;
use crate::weights::{Layer, Linear, Norm};
use anyhow::Result;
use ferropt_device::rng::{Purpose, Stream};
use ferropt_device::{Activation, AttentionShape, Device, Dropout, Element, LinearShape, Store};
use ferropt_mesh::{Group, Label};

/// Buffers of all layers; the names are those of the activation table.
pub(crate) struct Layers<D: Device, E: Element> {
    pub(crate) stream: Copies<D::Buf<f32>>,
    pub(crate) normed1: Copies<D::Buf<E>>,
    mean1: Copies<D::Buf<f32>>,
    rstd1: Copies<D::Buf<f32>>,
    pub(crate) qkv: Copies<D::Buf<E>>,
    pub(crate) attended: Copies<D::Buf<E>>,
    lse: Copies<D::Buf<f32>>,
    pub(crate) mid: Copies<D::Buf<f32>>,
    pub(crate) normed2: Copies<D::Buf<E>>,
    mean2: Copies<D::Buf<f32>>,
    rstd2: Copies<D::Buf<f32>>,
    pub(crate) relu: Copies<D::Buf<E>>,
    /// Behind the last layer: what the LM head, or the projection before it, reads.
    pub(crate) hidden: D::Buf<E>,
    doc_start: D::Buf<u32>,
    pub(crate) post: Option<PostNorm<D>>,
    pub(crate) gradients: Gradients<D, E>,
    /// Between the parts of a tensor-parallel model; none of a model in one part.
    pub(crate) exchange: Option<Exchange<D, E>>,
    pub(crate) sizes: Sizes,
}

/// What only post-norm layers have.
pub(crate) struct PostNorm<D: Device> {
    between: D::Buf<f32>,
    pub(crate) sum2: Copies<D::Buf<f32>>,
    d_stream_before: D::Buf<f32>,
}

/// Gradients of activations.
pub(crate) struct Gradients<D: Device, E: Element> {
    /// Of the residual stream; with post-norm the gradient of a layer's output is this plus `d_normed`.
    pub(crate) d_stream: D::Buf<f32>,
    pub(crate) d_branch: D::Buf<E>,
    pub(crate) d_relu: D::Buf<E>,
    /// Of a layer norm's output: what a block reads.
    pub(crate) d_normed: D::Buf<E>,
    pub(crate) d_attended: D::Buf<E>,
    pub(crate) d_qkv: D::Buf<E>,
}

/// Numbers that every operation asks for.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) layers: usize,
    /// Number of the first of them in the whole model.
    pub(crate) first_layer: usize,
    /// Whether the LM head comes behind them.
    last_stage: bool,
    /// Rows between blocks: of this part.
    rows: usize,
    /// Number of the first of them in the micro-batch.
    pub(crate) first_row: usize,
    pub(crate) width: usize,
    attention: AttentionShape,
    recompute: Recompute,
    stop_at_documents: bool,
    dropout: f64,
    attention_dropout: f64,
    pub(crate) qkv: LinearShape,
    pub(crate) out: LinearShape,
    pub(crate) fc1: LinearShape,
    pub(crate) fc2: LinearShape,
}

impl Sizes {
    fn new(config: &Config, options: Options, parts: &Group, stage: Stage) -> Self {
        let (c, f, heads) = (config.width, config.feed_forward / parts.size(), config.heads / parts.size());
        let divided = c / parts.size();
        // Products are of all rows, in divided widths.
        let all_rows = options.batch * options.seq;
        let shape = |n, k| LinearShape { m: all_rows, n, k };
        let rows = all_rows / parts.size();
        Sizes {
            rows,
            first_row: parts.rank() * rows,
            layers: config.layers,
            first_layer: stage.start,
            last_stage: stage.is_last(),
            width: c,
            attention: AttentionShape {
                batch: options.batch,
                seq: options.seq,
                heads,
                width: config.head_width(),
                among: (parts.rank() * heads, config.heads),
            },
            recompute: options.recompute,
            stop_at_documents: options.stop_at_documents,
            dropout: config.dropout,
            attention_dropout: config.attention_dropout,
            qkv: shape(3 * divided, c),
            out: shape(c, divided),
            fc1: shape(f, c),
            fc2: shape(c, f),
        }
    }

    /// Rows of a micro-batch: within blocks.
    pub(crate) fn all_rows(&self) -> usize {
        self.attention.batch * self.attention.seq
    }

    /// Dropout of one place, while training.
    fn dropout(&self, pass: Option<Pass>, purpose: Purpose, layer: usize) -> Option<Dropout> {
        // Attention has all rows of some heads, the rest of a layer some rows.
        let (p, first_row) = match purpose {
            Purpose::DropoutAttention => (self.attention_dropout, 0),
            _ => (self.dropout, self.first_row),
        };
        let pass = pass.filter(|_| p > 0.0)?;
        Some(Dropout {
            p: p as f32,
            stream: Stream::new(pass.seed, purpose, self.first_layer + layer, pass.step),
            first_row: pass.first_sequence * self.attention.seq as u64 + first_row as u64,
        })
    }
}

impl<D: Device, E: Element> Layers<D, E> {
    pub(crate) fn new(
        make: &mut Allocator<'_, D>,
        config: &Config,
        options: Options,
        parts: &Group,
        stage: Stage,
    ) -> Result<Self> {
        let sizes = Sizes::new(config, options, parts, stage);
        let exchange = match make.optional("gathered")? {
            Some(gathered) => {
                Some(Exchange::new(parts, sizes.rows * sizes.width, gathered, make.one("partial")?))
            }
            None => None,
        };
        let post = config.post_norm.then(|| -> Result<_> {
            Ok(PostNorm {
                between: make.one("between")?,
                sum2: make.copies("sum2")?,
                d_stream_before: make.one("d_stream_before")?,
            })
        });
        Ok(Layers {
            post: post.transpose()?,
            stream: make.copies("stream")?,
            normed1: make.copies("normed1")?,
            mean1: make.copies("mean1")?,
            rstd1: make.copies("rstd1")?,
            qkv: make.copies("qkv")?,
            attended: make.copies("attended")?,
            lse: make.copies("lse")?,
            mid: make.copies("mid")?,
            normed2: make.copies("normed2")?,
            mean2: make.copies("mean2")?,
            rstd2: make.copies("rstd2")?,
            relu: make.copies("relu")?,
            hidden: make.one("hidden")?,
            doc_start: make.one("doc_start")?,
            gradients: Gradients {
                d_stream: make.one("d_stream")?,
                d_branch: make.one("d_branch")?,
                d_relu: make.one("d_relu")?,
                d_normed: make.one("d_normed")?,
                d_attended: make.one("d_attended")?,
                d_qkv: make.one("d_qkv")?,
            },
            exchange,
            sizes,
        })
    }

    /// Where documents start, `[B, T]`; used if attention stops there.
    pub(crate) fn set_documents(&mut self, device: &D, doc_start: &[u32]) {
        device.upload(&mut self.doc_start, 0, doc_start);
    }

    /// What the stage before this one has computed: `stream[0]`.
    pub(crate) fn enter(&mut self, device: &D, stream: &D::Buf<f32>) {
        let s = self.sizes;
        device.copy(s.rows * s.width, stream, 0, &mut self.stream[0], 0);
        if self.post.is_some() {
            device.cast(&self.stream[0], &mut self.normed1[0]);
        }
    }

    /// What the next stage goes on with.
    pub(crate) fn leave(&self, device: &D, stream: &mut D::Buf<f32>) {
        let s = self.sizes;
        device.copy(s.rows * s.width, &self.stream[s.layers], 0, stream, 0);
    }

    /// The gradient of what [`Layers::leave`] gave.
    pub(crate) fn enter_backward(&mut self, device: &D, gradient: &D::Buf<f32>) {
        let (s, d) = (self.sizes, &mut self.gradients);
        device.copy(s.rows * s.width, gradient, 0, &mut d.d_stream, 0);
        if self.post.is_some() {
            device.fill(&mut d.d_normed, E::default());
        }
    }

    /// The gradient of what [`Layers::enter`] was given.
    pub(crate) fn leave_backward(&mut self, device: &D, gradient: &mut D::Buf<f32>) {
        let (s, d) = (self.sizes, &self.gradients);
        match self.post {
            None => device.copy(s.rows * s.width, &d.d_stream, 0, gradient, 0),
            Some(_) => device.residual(s.rows, s.width, &d.d_normed, None, None, &d.d_stream, gradient),
        }
    }

    /// Forward through layer `l`: `stream[l]` to `stream[l + 1]` (and with post-norm `normed1`, or `hidden` behind the
    /// last layer).
    ///
    /// # Errors
    /// When another part is lost.
    pub(crate) fn forward(
        &mut self,
        device: &D,
        w: &Layer<D, E>,
        l: usize,
        pass: Option<Pass>,
    ) -> Result<()> {
        if self.post.is_none() {
            self.norm1_ahead(device, &w.norm1, l);
        }
        self.forward_attention(device, w, l, pass)?;
        self.forward_feed_forward(device, w, l, pass, true)
    }

    /// Pre-norm: `normed1 = norm1(stream)`.
    fn norm1_ahead(&mut self, d: &D, norm: &Norm<D>, l: usize) {
        let (y, mean, rstd) = (&mut self.normed1[l], &mut self.mean1[l], &mut self.rstd1[l]);
        let (x, s) = (&self.stream[l], self.sizes);
        d.layer_norm(s.rows, s.width, x, &norm.gain, &norm.bias, y, None, mean, rstd);
    }

    /// `normed2`, the feed-forward block's input: pre-norm `norm2(mid)`, post-norm `norm1(mid)`.
    fn norm_of_mid(&mut self, d: &D, w: &Layer<D, E>, l: usize) {
        let (x, y, Sizes { rows, width, .. }) = (&self.mid[l], &mut self.normed2[l], self.sizes);
        match &mut self.post {
            None => {
                let (mean, rstd) = (&mut self.mean2[l], &mut self.rstd2[l]);
                d.layer_norm(rows, width, x, &w.norm2.gain, &w.norm2.bias, y, None, mean, rstd);
            }
            Some(post) => {
                let (mean, rstd) = (&mut self.mean1[l], &mut self.rstd1[l]);
                let between = Some(&mut post.between);
                d.layer_norm(rows, width, x, &w.norm1.gain, &w.norm1.bias, y, between, mean, rstd);
            }
        }
    }

    fn attend(&mut self, d: &D, l: usize, pass: Option<Pass>) {
        let s = &self.sizes;
        let documents = s.stop_at_documents.then_some(&self.doc_start);
        let dropout = s.dropout(pass, Purpose::DropoutAttention, l);
        d.attention(s.attention, &self.qkv[l], documents, dropout, &mut self.attended[l], &mut self.lse[l]);
    }

    /// `mid = stream + attention(normed1)`.
    fn forward_attention(&mut self, d: &D, w: &Layer<D, E>, l: usize, pass: Option<Pass>) -> Result<()> {
        let (s, label) = (self.sizes, Label::of("attention", self.sizes.first_layer + l));
        let Linear { weight, bias } = &w.qkv;
        let x = all_rows(&mut self.exchange, d, label, &self.normed1[l])?;
        d.linear(s.qkv, x, weight, Some(bias), Activation::Identity, &mut self.qkv[l]);
        self.attend(d, l, pass);
        let dropout = s.dropout(pass, Purpose::DropoutAttentionOut, l);
        let (x, residual, out) = (&self.attended[l], &self.stream[l], &mut self.mid[l]);
        let (exchange, branch) = (&mut self.exchange, &mut self.gradients.d_branch);
        linear_residual(exchange, d, label, s.out, s.rows, x, &w.out, dropout, branch, residual, out)
    }

    /// From `mid` to the layer's output; without `output` only what the backward pass of this layer reads.
    fn forward_feed_forward(
        &mut self,
        d: &D,
        w: &Layer<D, E>,
        l: usize,
        pass: Option<Pass>,
        output: bool,
    ) -> Result<()> {
        let (s, label) = (self.sizes, Label::of("feed-forward", self.sizes.first_layer + l));
        self.norm_of_mid(d, w, l);
        let Linear { weight, bias } = &w.fc1;
        let x = all_rows(&mut self.exchange, d, label, &self.normed2[l])?;
        d.linear(s.fc1, x, weight, Some(bias), Activation::Relu, &mut self.relu[l]);
        let (exchange, branch) = (&mut self.exchange, &mut self.gradients.d_branch);
        let dropout = s.dropout(pass, Purpose::DropoutFeedForward, l);
        match &mut self.post {
            None if output => {
                let (x, residual, out) = (&self.relu[l], &self.mid[l], &mut self.stream[l + 1]);
                linear_residual(
                    exchange, d, label, s.fc2, s.rows, x, &w.fc2, dropout, branch, residual, out,
                )?;
            }
            None => {}
            Some(post) => {
                let (x, residual, sum2) = (&self.relu[l], &post.between, &mut post.sum2[l]);
                linear_residual(
                    exchange, d, label, s.fc2, s.rows, x, &w.fc2, dropout, branch, residual, sum2,
                )?;
                let last = l + 1 == s.layers;
                let (y, y_f32) = match (output, last) {
                    // Only mean and rstd are wanted; `d_branch` is free.
                    (false, _) => (&mut self.gradients.d_branch, None),
                    (true, true) if s.last_stage => (&mut self.hidden, None),
                    // For the next stage, which makes its own of it.
                    (true, true) => (&mut self.hidden, Some(&mut self.stream[l + 1])),
                    (true, false) => (&mut self.normed1[l + 1], Some(&mut self.stream[l + 1])),
                };
                let (mean, rstd) = (&mut self.mean2[l], &mut self.rstd2[l]);
                d.layer_norm(s.rows, s.width, sum2, &w.norm2.gain, &w.norm2.bias, y, y_f32, mean, rstd);
            }
        }
        Ok(())
    }

    /// Computes again what layer `l`'s backward pass reads and the forward pass did not keep.
    fn recompute(&mut self, d: &D, w: &Layer<D, E>, l: usize, pass: Option<Pass>) -> Result<()> {
        if l + 1 == self.sizes.layers {
            // The last layer's activations have not been overwritten yet.
            return Ok(());
        }
        match self.sizes.recompute {
            Recompute::None => {}
            Recompute::Selective => {
                if self.post.is_none() {
                    self.norm1_ahead(d, &w.norm1, l);
                }
                self.attend(d, l, pass);
                self.norm_of_mid(d, w, l);
            }
            Recompute::Full => {
                if self.post.is_none() {
                    self.norm1_ahead(d, &w.norm1, l);
                } else {
                    d.cast(&self.stream[l], &mut self.normed1[l]);
                }
                self.forward_attention(d, w, l, pass)?;
                self.forward_feed_forward(d, w, l, pass, false)?;
            }
        }
        Ok(())
    }

    /// Backward through layer `l`: gradient of its output to gradient of its input, and gradients `g` of its weights.
    pub(crate) fn backward(
        &mut self,
        device: &D,
        w: &Layer<D, E>,
        g: &mut Layer<D, f32>,
        l: usize,
        pass: Option<Pass>,
        store: Store,
    ) -> Result<()> {
        self.recompute(device, w, l, pass)?;
        if let Some(post) = &mut self.post {
            let x = &post.sum2[l];
            let d = &mut self.gradients;
            norm_backward_of_sum(
                device,
                self.sizes.width,
                x,
                &self.mean2[l],
                &self.rstd2[l],
                &w.norm2,
                d,
                &mut g.norm2,
                &mut post.d_stream_before,
                store,
            );
        }
        self.backward_feed_forward(device, w, g, l, pass, store)?;
        match &mut self.post {
            None => {
                let d = &mut self.gradients;
                let (x, mean, rstd) = (&self.mid[l], &self.mean2[l], &self.rstd2[l]);
                norm_backward(device, self.sizes.width, x, mean, rstd, &w.norm2, d, &mut g.norm2, store);
            }
            Some(post) => {
                let d = &mut self.gradients;
                let (x, mean, rstd) = (&self.mid[l], &self.mean1[l], &self.rstd1[l]);
                norm_backward_of_sum(
                    device,
                    self.sizes.width,
                    x,
                    mean,
                    rstd,
                    &w.norm1,
                    d,
                    &mut g.norm1,
                    &mut post.d_stream_before,
                    store,
                );
            }
        }
        self.backward_attention(device, w, g, l, pass, store)?;
        if self.post.is_none() {
            let d = &mut self.gradients;
            let (x, mean, rstd) = (&self.stream[l], &self.mean1[l], &self.rstd1[l]);
            norm_backward(device, self.sizes.width, x, mean, rstd, &w.norm1, d, &mut g.norm1, store);
        }
        Ok(())
    }

    /// From `d_stream` to `d_normed`, the gradient of the feed-forward block's input.
    fn backward_feed_forward(
        &mut self,
        device: &D,
        w: &Layer<D, E>,
        g: &mut Layer<D, f32>,
        l: usize,
        pass: Option<Pass>,
        store: Store,
    ) -> Result<()> {
        let (s, d, label) =
            (self.sizes, &mut self.gradients, Label::of("feed-forward", self.sizes.first_layer + l));
        let dropout = s.dropout(pass, Purpose::DropoutFeedForward, l);
        device.residual_backward(s.width, &d.d_stream, dropout, &mut d.d_branch);
        let (exchange, relu) = (&mut self.exchange, &self.relu[l]);
        let speaks = exchange.as_ref().is_none_or(Exchange::speaks);
        let dy = all_rows(exchange, device, label, &d.d_branch)?;
        linear_backward_weight(device, s.fc2, dy, relu, &mut g.fc2, speaks, store);
        device.linear_backward_input(s.fc2, dy, &w.fc2.weight, Some(relu), &mut d.d_relu);
        let x = all_rows(exchange, device, label, &self.normed2[l])?;
        linear_backward_weight(device, s.fc1, &d.d_relu, x, &mut g.fc1, true, store);
        device.linear_backward_input(s.fc1, &d.d_relu, &w.fc1.weight, None, share(exchange, &mut d.d_normed));
        sum_rows(exchange, device, label, &mut d.d_normed)
    }

    /// From `d_stream` to `d_normed`, the gradient of the attention block's input.
    fn backward_attention(
        &mut self,
        device: &D,
        w: &Layer<D, E>,
        g: &mut Layer<D, f32>,
        l: usize,
        pass: Option<Pass>,
        store: Store,
    ) -> Result<()> {
        let (s, d, label) =
            (self.sizes, &mut self.gradients, Label::of("attention", self.sizes.first_layer + l));
        let dropout = s.dropout(pass, Purpose::DropoutAttentionOut, l);
        device.residual_backward(s.width, &d.d_stream, dropout, &mut d.d_branch);
        let (exchange, attended) = (&mut self.exchange, &self.attended[l]);
        let speaks = exchange.as_ref().is_none_or(Exchange::speaks);
        let dy = all_rows(exchange, device, label, &d.d_branch)?;
        linear_backward_weight(device, s.out, dy, attended, &mut g.out, speaks, store);
        device.linear_backward_input(s.out, dy, &w.out.weight, None, &mut d.d_attended);
        let documents = s.stop_at_documents.then_some(&self.doc_start);
        let dropout = s.dropout(pass, Purpose::DropoutAttention, l);
        let (qkv, lse) = (&self.qkv[l], &self.lse[l]);
        device.attention_backward(
            s.attention,
            qkv,
            documents,
            dropout,
            attended,
            lse,
            &d.d_attended,
            &mut d.d_qkv,
        );
        let x = all_rows(exchange, device, label, &self.normed1[l])?;
        linear_backward_weight(device, s.qkv, &d.d_qkv, x, &mut g.qkv, true, store);
        device.linear_backward_input(s.qkv, &d.d_qkv, &w.qkv.weight, None, share(exchange, &mut d.d_normed));
        sum_rows(exchange, device, label, &mut d.d_normed)
    }
}

/// Gradients of the weight and bias of `y = x * w^T + b`. Where all parts have the whole bias and know its whole gradient, one of
/// them `speaks`, since what they have is added up.
fn linear_backward_weight<D: Device, E: Element>(
    device: &D,
    s: LinearShape,
    dy: &D::Buf<E>,
    x: &D::Buf<E>,
    g: &mut Linear<D, f32>,
    speaks: bool,
    store: Store,
) {
    let bias = speaks.then_some(&mut g.bias);
    device.linear_backward_weight(s, dy, x, &mut g.weight, bias, store);
    if !speaks && store == Store::Overwrite {
        device.fill(&mut g.bias, 0.0);
    }
}

/// Pre-norm: adds the gradient that comes through a layer norm, `d_normed`, to that of the residual stream.
fn norm_backward<D: Device, E: Element>(
    device: &D,
    width: usize,
    x: &D::Buf<f32>,
    mean: &D::Buf<f32>,
    rstd: &D::Buf<f32>,
    norm: &Norm<D>,
    d: &mut Gradients<D, E>,
    g: &mut Norm<D>,
    store: Store,
) {
    let (dx, added) = (&mut d.d_stream, Store::Accumulate);
    let (gain, bias) = (&mut g.gain, &mut g.bias);
    device.layer_norm_backward(width, &d.d_normed, x, mean, rstd, &norm.gain, dx, added, gain, bias, store);
}

/// Post-norm: the gradient of a layer norm's output is `d_stream + d_normed`, and it replaces `d_stream` by that of its
/// input. The backward pass is linear in it, so the parts are taken one after the other.
fn norm_backward_of_sum<D: Device, E: Element>(
    device: &D,
    width: usize,
    x: &D::Buf<f32>,
    mean: &D::Buf<f32>,
    rstd: &D::Buf<f32>,
    norm: &Norm<D>,
    d: &mut Gradients<D, E>,
    g: &mut Norm<D>,
    dx: &mut D::Buf<f32>,
    store: Store,
) {
    let (gain, bias) = (&mut g.gain, &mut g.bias);
    let (first, then) = (Store::Overwrite, Store::Accumulate);
    device.layer_norm_backward(width, &d.d_stream, x, mean, rstd, &norm.gain, dx, first, gain, bias, store);
    device.layer_norm_backward(width, &d.d_normed, x, mean, rstd, &norm.gain, dx, then, gain, bias, then);
    std::mem::swap(&mut d.d_stream, dx);
}
