//! The ends of the model: embeddings, last layer norm, LM head and loss, and the products between the embeddings' width and
//! the model's.

use crate::activations::Allocator;
use crate::backprop::{Batch, Options};
use crate::config::{Config, POSITION_OFFSET};
use crate::exchange::{Exchange, all_rows, rows_and_share, share, sum_rows, with_parts};
use crate::layer::Layers;
use crate::weights::Weights;
use anyhow::{Result, ensure};
use ferropt_device::{Activation, Device, Element, IGNORE, LinearShape, LossShape, Store};
use ferropt_mesh::{Group, Label};

/// Activations of the ends. Functions take the layers between them, from which and to which they lead.
pub(crate) struct Ends<D: Device, E: Element> {
    /// Rows of this part's embedding table; [`IGNORE`] for those of other parts.
    tokens: D::Buf<u32>,
    positions: D::Buf<u32>,
    targets: D::Buf<u32>,
    pub(crate) losses: D::Buf<f32>,
    /// Statistics of the last layer norm; none with `post_norm`.
    final_norm: Option<(D::Buf<f32>, D::Buf<f32>)>,
    /// Token rows and position rows, where they are not added up at once.
    apart: Option<(D::Buf<E>, D::Buf<f32>)>,
    pub(crate) projections: Option<Projections<D, E>>,
    /// Between parts, at the width of the embeddings where that is not the model's.
    narrow: Option<Exchange<D, E>>,
    parts: Group,
    pub(crate) config: Config,
    options: Options,
}

/// Activations of the products between the embeddings' width and the model's.
pub(crate) struct Projections<D: Device, E: Element> {
    pub(crate) projected: D::Buf<E>,
    d_embedded: D::Buf<E>,
}

impl<D: Device, E: Element> Ends<D, E> {
    pub(crate) fn new(
        device: &D,
        make: &mut Allocator<'_, D>,
        config: &Config,
        options: Options,
        parts: &Group,
    ) -> Result<Self> {
        let rows = options.batch * options.seq / parts.size();
        let first = parts.rank() * rows;
        let positions: Vec<u32> =
            (first..first + rows).map(|row| (row % options.seq + POSITION_OFFSET) as u32).collect();
        let mut ends = Ends {
            tokens: make.one("tokens")?,
            positions: make.one("positions")?,
            targets: make.one("targets")?,
            losses: make.one("losses")?,
            final_norm: match make.optional("final_mean")? {
                Some(mean) => Some((mean, make.one("final_rstd")?)),
                None => None,
            },
            apart: match make.optional("embedded")? {
                Some(embedded) => Some((embedded, make.one("position_rows")?)),
                None => None,
            },
            projections: match make.optional("projected")? {
                Some(projected) => Some(Projections { projected, d_embedded: make.one("d_embedded")? }),
                None => None,
            },
            narrow: match make.optional("gathered_narrow")? {
                Some(gathered) => {
                    let own = rows * config.embedding_width;
                    Some(Exchange::new(parts, own, gathered, make.one("partial_narrow")?))
                }
                None => None,
            },
            parts: parts.clone(),
            config: config.clone(),
            options,
        };
        device.upload(&mut ends.positions, 0, &positions);
        Ok(ends)
    }

    /// All rows.
    fn all_rows(&self) -> usize {
        self.options.batch * self.options.seq
    }

    /// Rows that this part has between blocks.
    fn rows(&self) -> usize {
        self.all_rows() / self.parts.size()
    }

    /// Rows of this part's embedding table.
    fn vocab(&self) -> usize {
        self.config.vocab / self.parts.size()
    }

    /// Id of its first row.
    fn first_id(&self) -> usize {
        self.parts.rank() * self.vocab()
    }

    fn loss_shape(&self) -> LossShape {
        LossShape {
            rows: self.all_rows(),
            vocab: self.vocab(),
            width: self.config.embedding_width,
            first: self.first_id(),
        }
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
    pub(crate) fn load(&mut self, device: &D, batch: Batch<'_>, layers: &mut Layers<D, E>) -> Result<()> {
        let (rows, vocab, seq) = (self.all_rows(), self.config.vocab, self.options.seq);
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
        if self.parts.size() == 1 {
            device.upload(&mut self.tokens, 0, batch.tokens);
        } else {
            let here = self.first_id() as u32..(self.first_id() + self.vocab()) as u32;
            let row = |id: &u32| if here.contains(id) { id - here.start } else { IGNORE };
            device.upload(&mut self.tokens, 0, &batch.tokens.iter().map(row).collect::<Vec<_>>());
        }
        device.upload(&mut self.targets, 0, batch.targets);
        layers.set_documents(device, batch.doc_start);
        Ok(())
    }

    /// Tokens and positions to `stream[0]`.
    pub(crate) fn embed(&mut self, device: &D, w: &Weights<D, E>, layers: &mut Layers<D, E>) -> Result<()> {
        let (rows, all_rows, shape) = (self.rows(), self.all_rows(), self.project_in_shape());
        let (c, width) = (self.config.width, self.config.embedding_width);
        let first = &mut layers.stream[0];
        match &mut self.apart {
            None => {
                device.embed(rows, c, &self.tokens, &w.tokens, Some((&self.positions, &w.positions)), first)
            }
            Some((embedded, position_rows)) => {
                let exchange = if w.project_in.is_some() { &mut self.narrow } else { &mut layers.exchange };
                device.embed(all_rows, width, &self.tokens, &w.tokens, None, share(exchange, embedded));
                sum_rows(exchange, device, Label::new("embeddings"), embedded)?;
                device.embed(rows, c, &self.positions, &w.positions, None, position_rows);
                match &w.project_in {
                    Some(weight) => {
                        device.linear_residual(shape, embedded, weight, None, None, position_rows, first);
                    }
                    None => device.residual(rows, c, embedded, None, None, position_rows, first),
                }
            }
        }
        if self.config.post_norm {
            device.cast(&layers.stream[0], &mut layers.normed1[0]);
        }
        Ok(())
    }

    /// From behind the last layer to what the LM head reads: `projected`, or `hidden` where there are no projections.
    pub(crate) fn leave(&mut self, device: &D, w: &Weights<D, E>, layers: &mut Layers<D, E>) {
        let (rows, c, shape) = (self.rows(), self.config.width, self.project_out_shape());
        if let (Some((mean, rstd)), Some(norm)) = (&mut self.final_norm, &w.final_norm) {
            let (x, y) = (&layers.stream[self.config.layers], &mut layers.hidden);
            device.layer_norm(rows, c, x, &norm.gain, &norm.bias, y, None, mean, rstd);
        }
        if let (Some(p), Some(weight)) = (&mut self.projections, &w.project_out) {
            device.linear(shape, &layers.hidden, weight, None, Activation::Identity, &mut p.projected);
        }
    }

    /// Losses of all rows.
    pub(crate) fn losses(&mut self, device: &D, w: &Weights<D, E>, layers: &mut Layers<D, E>) -> Result<()> {
        let shape = self.loss_shape();
        let (own, exchange) = match &self.projections {
            Some(p) => (&p.projected, &mut self.narrow),
            None => (&layers.hidden, &mut layers.exchange),
        };
        let h = all_rows(exchange, device, Label::new("head"), own)?;
        let (targets, losses) = (&self.targets, &mut self.losses);
        with_parts(&self.parts, |combine| device.lm_loss(shape, h, &w.tokens, targets, combine, losses))
    }

    /// Logits `[N, V]`, of a model in one part.
    pub(crate) fn logits(&self, device: &D, w: &Weights<D, E>, layers: &Layers<D, E>) -> Result<Vec<f32>> {
        ensure!(self.parts.size() == 1, "logits are of a whole vocabulary; this is a part of a model");
        let s = self.loss_shape();
        let shape = LinearShape { m: s.rows, n: s.vocab, k: s.width };
        let head = self.projections.as_ref().map_or(&layers.hidden, |p| &p.projected);
        let mut logits = device.alloc::<f32>(s.rows * s.vocab)?;
        device.linear(shape, head, &w.tokens, None, Activation::Identity, &mut logits);
        let mut values = vec![0.0; s.rows * s.vocab];
        device.download(&logits, 0, &mut values);
        Ok(values)
    }

    /// From the losses to the gradient of the last layer's output: `d_stream`, or with post-norm `d_normed` and a
    /// `d_stream` of zeros.
    pub(crate) fn backward_head(
        &mut self,
        device: &D,
        w: &Weights<D, E>,
        g: &mut Weights<D, f32>,
        layers: &mut Layers<D, E>,
        scale: f32,
        store: Store,
    ) -> Result<()> {
        let (shape, loss_shape, label) = (self.project_out_shape(), self.loss_shape(), Label::new("head"));
        let (targets, losses, dw) = (&self.targets, &mut self.losses, &mut g.tokens);
        // With projections the embeddings' own gradient comes last, so its buffer is free.
        let (own, dh, exchange) = match &mut self.projections {
            Some(p) => (&p.projected, &mut p.d_embedded, &mut self.narrow),
            None => (&layers.hidden, &mut layers.gradients.d_normed, &mut layers.exchange),
        };
        let (h, share) = rows_and_share(exchange, device, label, own, dh)?;
        with_parts(&self.parts, |combine| {
            device.lm_loss_backward(
                loss_shape, h, &w.tokens, targets, combine, scale, losses, share, dw, store,
            );
        })?;
        sum_rows(exchange, device, label, dh)?;

        let d_hidden = &mut layers.gradients.d_normed;
        if let (Some(p), Some(weight), Some(d_weight)) =
            (&self.projections, &w.project_out, &mut g.project_out)
        {
            device.linear_backward_weight(shape, &p.d_embedded, &layers.hidden, d_weight, None, store);
            device.linear_backward_input(shape, &p.d_embedded, weight, None, d_hidden);
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
        Ok(())
    }

    /// From the gradient of `stream[0]` to those of the embeddings. The token table's already holds the LM head's part.
    pub(crate) fn backward_embed(
        &mut self,
        device: &D,
        w: &Weights<D, E>,
        g: &mut Weights<D, f32>,
        layers: &mut Layers<D, E>,
        store: Store,
    ) -> Result<()> {
        let (c, width, shape) = (self.config.width, self.config.embedding_width, self.project_in_shape());
        let (d, label) = (&mut layers.gradients, Label::new("embeddings"));
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
        if self.projections.is_none() && layers.exchange.is_none() {
            device.embed_backward(c, tokens, &d.d_stream, &mut g.tokens);
            if let Some(d_normed) = also {
                device.embed_backward(c, tokens, d_normed, &mut g.tokens);
            }
            return Ok(());
        }
        device.cast(&d.d_stream, &mut d.d_branch);
        let parts = [(Some(&d.d_branch), store), (also, Store::Accumulate)];
        for (dy, store) in parts.into_iter().filter_map(|(dy, store)| Some((dy?, store))) {
            let all = match (&mut self.projections, &mut self.apart, &w.project_in, &mut g.project_in) {
                (Some(p), Some((embedded, _)), Some(weight), Some(d_weight)) => {
                    device.linear_backward_weight(shape, dy, embedded, d_weight, None, store);
                    device.linear_backward_input(shape, dy, weight, None, &mut p.d_embedded);
                    all_rows(&mut self.narrow, device, label, &p.d_embedded)?
                }
                _ => all_rows(&mut layers.exchange, device, label, dy)?,
            };
            device.embed_backward(width, tokens, all, &mut g.tokens);
        }
        Ok(())
    }

    /// In f64 and in order, so that it does not depend on the device's threads.
    pub(crate) fn sum_of_losses(&self, device: &D) -> f64 {
        let mut losses = vec![0.0f32; self.all_rows()];
        device.download(&self.losses, 0, &mut losses);
        losses.into_iter().map(f64::from).sum()
    }
}
