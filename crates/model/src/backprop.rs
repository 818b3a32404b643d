//! Forward and backward pass of the whole model.

use crate::activations::{ActivationTable, Allocator, Recompute};
use crate::config::{Config, POSITION_OFFSET};
use crate::inspect::{self, Observer, Role, Written, compute, tell, wide};
use crate::layer::Layers;
use crate::weights::{Model, Weights};
use anyhow::{Result, ensure};
use ferropt_device::{Activation, Device, Element, IGNORE, LinearShape, LossShape, Store};

/// What a pass is given, row-major `[B, T]`.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Input ids.
    pub tokens: &'a [u32],
    /// What follows each input; [`IGNORE`] takes no part in the loss.
    pub targets: &'a [u32],
    /// Where in its sequence each position's document starts; used with [`Options::stop_at_documents`].
    pub doc_start: &'a [u32],
}

/// How passes are made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// B, sequences in a micro-batch.
    pub batch: usize,
    /// T, tokens in a sequence.
    pub seq: usize,
    /// What is computed again instead of kept.
    pub recompute: Recompute,
    /// Tokens do not attend to documents before their own.
    pub stop_at_documents: bool,
}

/// Keys of a training pass's dropout masks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pass {
    /// Seed of the run.
    pub seed: u64,
    /// Optimiser step.
    pub step: u64,
    /// Place of the micro-batch's first sequence in the step's global batch.
    pub first_sequence: u64,
}

/// Activations and gradients of a model.
pub struct Backprop<D: Device, E: Element> {
    /// Gradients of the weights, summed over micro-batches as the caller says.
    pub gradients: Weights<D, f32>,
    layers: Layers<D, E>,
    tokens: D::Buf<u32>,
    positions: D::Buf<u32>,
    targets: D::Buf<u32>,
    losses: D::Buf<f32>,
    /// Statistics of the last layer norm; none with `post_norm`.
    final_norm: Option<(D::Buf<f32>, D::Buf<f32>)>,
    projections: Option<Projections<D, E>>,
    config: Config,
    options: Options,
}

/// Activations of the products between the embeddings' width and the model's.
struct Projections<D: Device, E: Element> {
    embedded: D::Buf<E>,
    position_rows: D::Buf<f32>,
    projected: D::Buf<E>,
    d_embedded: D::Buf<E>,
}

impl<D: Device, E: Element> Backprop<D, E> {
    /// Allocates everything that passes need.
    ///
    /// # Errors
    /// When sequences are longer than the model's positions, or memory is short.
    pub fn new(device: &D, config: &Config, options: Options) -> Result<Self> {
        config.check()?;
        let Options { batch, seq, recompute, .. } = options;
        ensure!(
            batch > 0 && (1..=config.positions).contains(&seq),
            "a micro-batch of {batch} sequences of {seq} tokens was asked for; there is at least one sequence, of 1 to {} \
             tokens, as many as the model has positions",
            config.positions
        );
        let make = &mut Allocator::new(device, ActivationTable::training(config, batch, seq, recompute));
        let mut positions = make.one("positions")?;
        let rows: Vec<u32> = (0..batch * seq).map(|row| (row % seq + POSITION_OFFSET) as u32).collect();
        device.upload(&mut positions, 0, &rows);
        let final_norm = match make.optional("final_mean")? {
            Some(mean) => Some((mean, make.one("final_rstd")?)),
            None => None,
        };
        let projections = match make.optional("embedded")? {
            Some(embedded) => Some(Projections {
                embedded,
                position_rows: make.one("position_rows")?,
                projected: make.one("projected")?,
                d_embedded: make.one("d_embedded")?,
            }),
            None => None,
        };
        let this = Backprop {
            gradients: Weights::zeros(device, config)?,
            layers: Layers::new(make, config, options)?,
            tokens: make.one("tokens")?,
            positions,
            targets: make.one("targets")?,
            losses: make.one("losses")?,
            final_norm,
            projections,
            config: config.clone(),
            options,
        };
        #[cfg(test)]
        assert!(make.left().is_empty(), "activations that nothing uses: {:?}", make.left());
        Ok(this)
    }

    /// Sum of the losses in nats, and the gradients of `scale` times that, with dropout. [`Store::Overwrite`] replaces
    /// [`Backprop::gradients`], [`Store::Accumulate`] adds to them.
    ///
    /// # Errors
    /// When the batch does not fit the options or the vocabulary.
    pub fn train(
        &mut self,
        device: &D,
        model: &Model<D, E>,
        batch: Batch<'_>,
        pass: Pass,
        scale: f32,
        store: Store,
    ) -> Result<f64> {
        self.pass(device, model, batch, pass, scale, store, None)
    }

    /// [`Backprop::train`], overwriting the gradients, and every tensor is shown to `observer` in the order in which they
    /// are computed: a layer's activations when its forward pass is done, gradients when its backward pass is.
    ///
    /// # Errors
    /// As [`Backprop::train`].
    pub fn inspect(
        &mut self,
        device: &D,
        model: &Model<D, E>,
        batch: Batch<'_>,
        pass: Pass,
        scale: f32,
        observer: &mut dyn FnMut(Written<'_, D, E>),
    ) -> Result<f64> {
        self.pass(device, model, batch, pass, scale, Store::Overwrite, Some(observer))
    }

    fn pass(
        &mut self,
        device: &D,
        model: &Model<D, E>,
        batch: Batch<'_>,
        pass: Pass,
        scale: f32,
        store: Store,
        mut observer: Observer<'_, D, E>,
    ) -> Result<f64> {
        self.load(device, batch)?;
        let pass = Some(pass);
        self.forward(device, &model.weights, pass, &mut observer);
        self.backward(device, &model.weights, pass, scale, store, &mut observer);
        Ok(self.sum_of_losses(device))
    }

    /// Sum of the losses in nats, without dropout and without gradients.
    ///
    /// # Errors
    /// When the batch does not fit the options or the vocabulary.
    pub fn score(&mut self, device: &D, model: &Model<D, E>, batch: Batch<'_>) -> Result<f64> {
        self.load(device, batch)?;
        self.forward(device, &model.weights, None, &mut None);
        let head = match &self.projections {
            Some(p) => &p.projected,
            None => &self.layers.hidden,
        };
        device.lm_loss(self.loss_shape(), head, &model.weights.tokens, &self.targets, &mut self.losses);
        Ok(self.sum_of_losses(device))
    }

    /// Logits `[B, T, V]` of a batch, without dropout: for small models, since training never holds them.
    ///
    /// # Errors
    /// When the batch does not fit the options or the vocabulary, or memory for the logits is short.
    pub fn logits(&mut self, device: &D, model: &Model<D, E>, batch: Batch<'_>) -> Result<Vec<f32>> {
        self.load(device, batch)?;
        self.forward(device, &model.weights, None, &mut None);
        let s = self.loss_shape();
        let shape = LinearShape { m: s.rows, n: s.vocab, k: s.width };
        let head = match &self.projections {
            Some(p) => &p.projected,
            None => &self.layers.hidden,
        };
        let mut logits = device.alloc::<f32>(s.rows * s.vocab)?;
        device.linear(shape, head, &model.weights.tokens, None, Activation::Identity, &mut logits);
        let mut values = vec![0.0; s.rows * s.vocab];
        device.download(&logits, 0, &mut values);
        Ok(values)
    }

    fn rows(&self) -> usize {
        self.options.batch * self.options.seq
    }

    fn loss_shape(&self) -> LossShape {
        LossShape { rows: self.rows(), vocab: self.config.vocab, width: self.config.embedding_width }
    }

    /// Product from the embeddings' width to the model's.
    fn project_in_shape(&self) -> LinearShape {
        LinearShape { m: self.rows(), n: self.config.width, k: self.config.embedding_width }
    }

    /// Product from the model's width to the embeddings'.
    fn project_out_shape(&self) -> LinearShape {
        LinearShape { m: self.rows(), n: self.config.embedding_width, k: self.config.width }
    }

    /// Checks a batch and copies it to the device.
    fn load(&mut self, device: &D, batch: Batch<'_>) -> Result<()> {
        let (rows, vocab, seq) = (self.rows(), self.config.vocab, self.options.seq);
        for (name, values) in
            [("tokens", batch.tokens), ("targets", batch.targets), ("doc_start", batch.doc_start)]
        {
            ensure!(
                values.len() == rows,
                "a batch has {} {name}, but passes of {} x {seq} take {rows}",
                values.len(),
                self.options.batch
            );
        }
        let foreign = |id: &&u32| **id as usize >= vocab;
        let target = batch.targets.iter().filter(|id| **id != IGNORE).find(foreign);
        if let Some(id) = batch.tokens.iter().find(foreign).or(target) {
            anyhow::bail!("a batch holds the token id {id}, but the model's vocabulary has {vocab}");
        }
        let early = |(row, start): (usize, &u32)| *start as usize <= row % seq;
        ensure!(
            batch.doc_start.iter().enumerate().all(early),
            "a document of a batch starts behind its own tokens"
        );
        device.upload(&mut self.tokens, 0, batch.tokens);
        device.upload(&mut self.targets, 0, batch.targets);
        self.layers.set_documents(device, batch.doc_start);
        Ok(())
    }

    /// Up to what the LM head reads: `projected`, or `hidden` where there are no projections.
    fn forward(
        &mut self,
        device: &D,
        w: &Weights<D, E>,
        pass: Option<Pass>,
        observer: &mut Observer<'_, D, E>,
    ) {
        let (rows, c) = (self.rows(), self.config.width);
        self.embed(device, w);
        tell(observer, || vec![wide(Role::Activation, "stream", c, &self.layers.stream[0])]);
        for (l, layer) in w.layers.iter().enumerate() {
            self.layers.forward(device, layer, l, pass);
            tell(observer, || self.layers.written_forward(l));
        }
        if let (Some((mean, rstd)), Some(norm)) = (&mut self.final_norm, &w.final_norm) {
            let (x, y) = (&self.layers.stream[self.config.layers], &mut self.layers.hidden);
            device.layer_norm(rows, c, x, &norm.gain, &norm.bias, y, None, mean, rstd);
        }
        let shape = self.project_out_shape();
        if let (Some(p), Some(weight)) = (&mut self.projections, &w.project_out) {
            device.linear(shape, &self.layers.hidden, weight, None, Activation::Identity, &mut p.projected);
        }
        tell(observer, || {
            let width = self.config.embedding_width;
            let projected = self.projections.iter().map(|p| ("projected", width, &p.projected));
            let list = [("hidden", c, &self.layers.hidden)].into_iter().chain(projected);
            list.map(|(name, width, values)| compute(Role::Activation, name, width, values)).collect()
        });
    }

    /// Tokens and positions to `stream[0]`.
    fn embed(&mut self, device: &D, w: &Weights<D, E>) {
        let (rows, shape) = (self.rows(), self.project_in_shape());
        let (c, width) = (self.config.width, self.config.embedding_width);
        let first = &mut self.layers.stream[0];
        match (&mut self.projections, &w.project_in) {
            (Some(p), Some(weight)) => {
                device.embed(rows, width, &self.tokens, &w.tokens, None, &mut p.embedded);
                device.embed(rows, c, &self.positions, &w.positions, None, &mut p.position_rows);
                device.linear_residual(shape, &p.embedded, weight, None, None, &p.position_rows, first);
            }
            _ => device.embed(rows, c, &self.tokens, &w.tokens, Some((&self.positions, &w.positions)), first),
        }
        if self.config.post_norm {
            device.cast(&self.layers.stream[0], &mut self.layers.normed1[0]);
        }
    }

    /// Gradients of `scale * sum(losses)` after [`Backprop::forward`] with the same `pass`.
    fn backward(
        &mut self,
        device: &D,
        w: &Weights<D, E>,
        pass: Option<Pass>,
        scale: f32,
        store: Store,
        observer: &mut Observer<'_, D, E>,
    ) {
        let (c, width) = (self.config.width, self.config.embedding_width);
        self.backward_head(device, w, scale, store);
        tell(observer, || {
            let mut list = vec![wide(Role::Activation, "losses", 1, &self.losses)];
            list.extend(inspect::head(&self.gradients, c, width));
            list.push(wide(Role::Gradient, "stream", c, &self.layers.gradients.d_stream));
            list
        });
        for l in (0..self.config.layers).rev() {
            self.layers.backward(device, &w.layers[l], &mut self.gradients.layers[l], l, pass, store);
            tell(observer, || self.layers.written_backward(&self.gradients.layers[l], l));
        }
        self.backward_embed(device, w, store);
        tell(observer, || inspect::ends(&self.gradients, c, width));
    }

    /// From the losses to the gradient of the last layer's output: `d_stream`, or with post-norm `d_normed` and a
    /// `d_stream` of zeros.
    fn backward_head(&mut self, device: &D, w: &Weights<D, E>, scale: f32, store: Store) {
        let (shape, loss_shape) = (self.project_out_shape(), self.loss_shape());
        let (layers, g) = (&mut self.layers, &mut self.gradients);
        let (targets, losses, dw) = (&self.targets, &mut self.losses, &mut g.tokens);
        let d_hidden = &mut layers.gradients.d_normed;
        match (&mut self.projections, &w.project_out, &mut g.project_out) {
            (Some(p), Some(weight), Some(d_weight)) => {
                // The embeddings' own gradient comes last, so its buffer is free.
                let dh = &mut p.d_embedded;
                device.lm_loss_backward(
                    loss_shape,
                    &p.projected,
                    &w.tokens,
                    targets,
                    scale,
                    losses,
                    dh,
                    dw,
                    store,
                );
                device.linear_backward_weight(shape, dh, &layers.hidden, d_weight, None, store);
                device.linear_backward_input(shape, dh, weight, None, d_hidden);
            }
            _ => {
                let h = &layers.hidden;
                device
                    .lm_loss_backward(loss_shape, h, &w.tokens, targets, scale, losses, d_hidden, dw, store);
            }
        }
        let d_stream = &mut layers.gradients.d_stream;
        match (&self.final_norm, &w.final_norm, &mut g.final_norm) {
            (Some((mean, rstd)), Some(norm), Some(g)) => {
                let (x, first) = (&layers.stream[self.config.layers], Store::Overwrite);
                let (c, gain, bias) = (self.config.width, &mut g.gain, &mut g.bias);
                device.layer_norm_backward(
                    c, d_hidden, x, mean, rstd, &norm.gain, d_stream, first, gain, bias, store,
                );
            }
            _ => device.fill(d_stream, 0.0),
        }
    }

    /// From the gradient of `stream[0]` to those of the embeddings. The token table's already holds the LM head's part.
    fn backward_embed(&mut self, device: &D, w: &Weights<D, E>, store: Store) {
        let (c, width, shape) = (self.config.width, self.config.embedding_width, self.project_in_shape());
        let (d, g) = (&mut self.layers.gradients, &mut self.gradients);
        let (tokens, positions) = (&self.tokens, &self.positions);
        if store == Store::Overwrite {
            device.fill(&mut g.positions, 0.0);
        }
        device.embed_backward(c, positions, &d.d_stream, &mut g.positions);
        // With post-norm the gradient is `d_stream + d_normed`, taken one after the other.
        let also = self.config.post_norm.then_some(&d.d_normed);
        if let Some(d_normed) = also {
            device.embed_backward(c, positions, d_normed, &mut g.positions);
        }
        match (&mut self.projections, &w.project_in, &mut g.project_in) {
            (Some(p), Some(weight), Some(d_weight)) => {
                device.cast(&d.d_stream, &mut d.d_branch);
                let parts = [(Some(&d.d_branch), store), (also, Store::Accumulate)];
                for (dy, store) in parts.into_iter().filter_map(|(dy, store)| Some((dy?, store))) {
                    device.linear_backward_weight(shape, dy, &p.embedded, d_weight, None, store);
                    device.linear_backward_input(shape, dy, weight, None, &mut p.d_embedded);
                    device.embed_backward(width, tokens, &p.d_embedded, &mut g.tokens);
                }
            }
            _ => {
                device.embed_backward(c, tokens, &d.d_stream, &mut g.tokens);
                if let Some(d_normed) = also {
                    device.embed_backward(c, tokens, d_normed, &mut g.tokens);
                }
            }
        }
    }

    /// In f64 and in order, so that it does not depend on the device's threads.
    fn sum_of_losses(&self, device: &D) -> f64 {
        let mut losses = vec![0.0f32; self.rows()];
        device.download(&self.losses, 0, &mut losses);
        losses.into_iter().map(f64::from).sum()
    }
}
