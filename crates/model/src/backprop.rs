//! Forward and backward pass of the whole model.

use crate::activations::{ActivationTable, Allocator, Recompute};
use crate::config::Config;
use crate::ends::Ends;
use crate::inspect::{Observer, Written, tell};
use crate::layer::Layers;
use crate::part::{Held, Part, Place};
use crate::units::{Totals, Units};
use crate::weights::{Model, Weights};
use anyhow::{Result, ensure};
use ferropt_device::{Device, Element, Store};
use ferropt_mesh::{Group, Label, Mesh};

/// What a pass is given, row-major `[B, T]`.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Input ids.
    pub tokens: &'a [u32],
    /// What follows each input; [`ferropt_device::IGNORE`] takes no part in the loss.
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

/// Activations and gradients of a model, or of this process's part of one.
pub struct Backprop<D: Device, E: Element> {
    /// Gradients of the weights that are held, summed over micro-batches as the caller says, and with
    /// [`Backprop::sum`] over ranks.
    pub gradients: Weights<D, f32>,
    layers: Layers<D, E>,
    ends: Ends<D, E>,
    units: Units<D, E>,
    totals: Totals<D>,
    held: Vec<Held>,
    mesh: Mesh,
}

impl<D: Device, E: Element> Backprop<D, E> {
    /// Allocates everything that passes through a whole model need.
    ///
    /// # Errors
    /// When sequences are longer than the model's positions, or memory is short.
    pub fn new(device: &D, config: &Config, options: Options) -> Result<Self> {
        Backprop::on(device, config, options, Mesh::solo())
    }

    /// Allocates everything that passes need, for this process's part of the model: [`part_of`] the mesh.
    ///
    /// # Errors
    /// When sequences are longer than the model's positions, the parts cannot share out a micro-batch's rows or the model, or
    /// memory is short.
    pub fn on(device: &D, config: &Config, options: Options, mesh: Mesh) -> Result<Self> {
        config.check()?;
        let (part, parts) = (part_of(&mesh), mesh.tensor.size());
        part.check(config)?;
        let Options { batch, seq, recompute, .. } = options;
        ensure!(
            batch > 0 && (1..=config.positions).contains(&seq),
            "a micro-batch of {batch} sequences of {seq} tokens was asked for; there is at least one sequence, of 1 to {} \
             tokens, as many as the model has positions",
            config.positions
        );
        ensure!(
            (batch * seq).is_multiple_of(parts),
            "a micro-batch of {batch} sequences of {seq} tokens cannot be shared out among {parts} tensor-parallel parts: \
             {} is no multiple of {parts}",
            batch * seq
        );
        let table = ActivationTable::training(config, batch, seq, recompute, parts);
        let make = &mut Allocator::new(device, table);
        let held = config.held(part);
        let this = Backprop {
            gradients: Weights::zeros(device, config, &held)?,
            layers: Layers::new(make, config, options, &mesh.tensor)?,
            ends: Ends::new(device, make, config, options, &mesh.tensor)?,
            units: Units::new(device, config, &held, &mesh.shard)?,
            totals: Totals::new(device, config, &held, &mesh.shard)?,
            held,
            mesh,
        };
        #[cfg(test)]
        assert!(make.left().is_empty(), "activations that nothing uses: {:?}", make.left());
        Ok(this)
    }

    /// Sum of the losses in nats, and the gradients of `scale` times that, with dropout. [`Store::Overwrite`] replaces
    /// [`Backprop::gradients`], [`Store::Accumulate`] adds to them. The first micro-batch of a step overwrites, and the last
    /// is followed by [`Backprop::sum`].
    ///
    /// # Errors
    /// When the batch does not fit the options or the vocabulary, or another rank is lost.
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
        if store == Store::Overwrite {
            self.units.forget();
        }
        self.ends.load(device, batch, &mut self.layers)?;
        self.forward(device, &model.weights, Some(pass), &mut observer)?;
        self.backward(device, &model.weights, Some(pass), scale, store, &mut observer)?;
        Ok(self.ends.sum_of_losses(device))
    }

    /// Completes the gradients of a step, as sums over all ranks that hold the same weights, and returns the L2 norm of all
    /// gradients together: squares summed in f64, each parameter's once.
    ///
    /// # Errors
    /// When another rank is lost.
    pub fn sum(&mut self, device: &D) -> Result<f64> {
        self.totals.finish(device, &mut self.gradients)?;
        let whole: Vec<bool> = self.held.iter().map(Held::is_whole).collect();
        // Of what all tensor-parallel parts have, each has the gradient of its own rows.
        sum_over(device, &self.mesh.tensor, &mut self.gradients, |index| whole[index])?;
        sum_over(device, &self.mesh.replicate, &mut self.gradients, |_| true)?;

        let spoken = self.held.iter().zip(self.gradients.tensors()).filter(|(held, _)| held.speaks);
        let mut squares = spoken.map(|(_, g)| device.sum_of_squares(g.flat())).sum::<f64>();
        for group in [&self.mesh.tensor, &self.mesh.shard] {
            squares = group.gather_f64(Label::new("norm"), &[squares])?.concat().iter().sum();
        }
        Ok(squares.sqrt())
    }

    /// Sum of the losses in nats, without dropout and without gradients.
    ///
    /// # Errors
    /// When the batch does not fit the options or the vocabulary, or another rank is lost.
    pub fn score(&mut self, device: &D, model: &Model<D, E>, batch: Batch<'_>) -> Result<f64> {
        self.units.forget();
        self.ends.load(device, batch, &mut self.layers)?;
        self.forward(device, &model.weights, None, &mut None)?;
        self.ends.losses(device, self.units.ends(device, &model.weights)?, &mut self.layers)?;
        Ok(self.ends.sum_of_losses(device))
    }

    /// Logits `[B, T, V]` of a batch, without dropout: for small models in one part, since training never holds them.
    ///
    /// # Errors
    /// When the batch does not fit the options or the vocabulary, memory for the logits is short, or the model is divided.
    pub fn logits(&mut self, device: &D, model: &Model<D, E>, batch: Batch<'_>) -> Result<Vec<f32>> {
        self.units.forget();
        self.ends.load(device, batch, &mut self.layers)?;
        self.forward(device, &model.weights, None, &mut None)?;
        self.ends.logits(device, self.units.ends(device, &model.weights)?, &self.layers)
    }

    /// Up to what the LM head reads.
    fn forward(
        &mut self,
        device: &D,
        w: &Weights<D, E>,
        pass: Option<Pass>,
        observer: &mut Observer<'_, D, E>,
    ) -> Result<()> {
        let (units, layers) = (&mut self.units, &mut self.layers);
        units.ask(device, w, 0, None)?;
        self.ends.embed(device, units.ends(device, w)?, layers)?;
        tell(observer, || layers.written_first());
        for l in 0..w.layers.len() {
            units.ask(device, w, l, Some(l + 1))?;
            let weights = units.layer(w, l)?;
            let _span = self.mesh.world.trace().span(Label::of("forward of layer", l));
            layers.forward(device, weights, l, pass)?;
            tell(observer, || layers.written_forward(l));
        }
        self.ends.leave(device, units.ends(device, w)?, layers);
        tell(observer, || self.ends.written_forward(layers));
        Ok(())
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
    ) -> Result<()> {
        let Backprop { units, totals, layers, ends, gradients, mesh, .. } = self;
        let trace = mesh.world.trace();
        let span = trace.span(Label::new("head, forward and backward"));
        let (g, ends_store) = totals.ends(device, gradients, store)?;
        ends.backward_head(device, units.ends(device, w)?, g, layers, scale, ends_store)?;
        tell(observer, || ends.written_head(g, layers));
        drop(span);
        for l in (0..w.layers.len()).rev() {
            units.ask(device, w, l, l.checked_sub(1))?;
            let (g, store) = totals.layer(device, gradients, l, store)?;
            let weights = units.layer(w, l)?;
            let _span = trace.span(Label::of("backward of layer", l));
            layers.backward(device, weights, g, l, pass, store)?;
            tell(observer, || layers.written_backward(g, l));
            totals.layer_done(device)?;
        }
        let (g, ends_store) = totals.ends(device, gradients, store)?;
        ends.backward_embed(device, units.ends(device, w)?, g, layers, ends_store)?;
        tell(observer, || ends.written_backward(g));
        totals.ends_done(device)
    }
}

/// The part of a model that this process of a mesh holds.
pub fn part_of(mesh: &Mesh) -> Part {
    let place = |group: &Group| Place { rank: group.rank(), of: group.size() };
    Part { tensor: place(&mesh.tensor), shard: place(&mesh.shard) }
}

/// Sums the gradients of some parameters over a group, all at once.
fn sum_over<D: Device>(
    device: &D,
    group: &Group,
    gradients: &mut Weights<D, f32>,
    which: impl Fn(usize) -> bool,
) -> Result<()> {
    if group.size() == 1 {
        return Ok(());
    }
    let mut coming = Vec::new();
    for (index, tensor) in gradients.tensors_mut().into_iter().enumerate().filter(|(index, _)| which(*index))
    {
        let buffer = std::mem::replace(tensor.flat(), device.alloc(0)?);
        coming.push((index, group.all_reduce(Label::of("gradient", index), buffer)));
    }
    let mut tensors = gradients.tensors_mut();
    for (index, coming) in coming.into_iter().rev() {
        *tensors.swap_remove(index).flat() = coming.wait()?;
    }
    Ok(())
}
