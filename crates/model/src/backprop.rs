//! Forward and backward pass of the whole model.

use crate::activations::{ActivationTable, Allocator, Recompute};
use crate::config::Config;
use crate::ends::Ends;
use crate::inspect::{Observer, Written, tell};
use crate::layer::Layers;
use crate::offload::Offload;
use crate::part::{Held, Part, Place, Stage};
use crate::sums::Sums;
use crate::units::{Totals, Units};
use crate::weights::{Model, Weights};
use anyhow::{Result, ensure};
use ferropt_device::{Device, Element, Store};
use ferropt_mesh::{Group, Label, Mesh, Pending};
use std::ops::Range;

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
    /// Where sums of gradients are kept, and whether weights have to be fetched: as the model's.
    pub offload: Offload,
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

/// A piece of a step's work in a stage: a pass of micro-batch number so and so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Its forward pass.
    Forward(usize),
    /// Its backward pass.
    Backward(usize),
}

/// The order of a step's passes over so many micro-batches in a stage: one forward, one backward, once as many are under way
/// as there are stages from this one on (1F1B; Narayanan et al., 2021).
pub fn schedule(stage: Place, micro_batches: usize) -> Vec<Task> {
    let ahead = (stage.of - 1 - stage.rank).min(micro_batches);
    let mut tasks: Vec<Task> = (0..ahead).map(Task::Forward).collect();
    for number in ahead..micro_batches {
        tasks.extend([Task::Forward(number), Task::Backward(number - ahead)]);
    }
    tasks.extend((micro_batches - ahead..micro_batches).map(Task::Backward));
    tasks
}

/// Buffers of a stage for what goes to its neighbours and comes from them: one more than micro-batches are under way in it. All are
/// there before the first step, in which making one could wait for what a GPU does, and that for another rank.
pub fn boundary_buffers(stage: Place) -> usize {
    if stage.of == 1 { 0 } else { stage.of - stage.rank + 1 }
}

/// Activations and gradients of a model, or of this process's part of one.
pub struct Backprop<D: Device, E: Element> {
    /// Gradients of the weights that are held, summed over micro-batches as the caller says, and with
    /// [`Backprop::sum`] over ranks.
    pub gradients: Weights<D, f32>,
    /// Of the micro-batches that are under way at once.
    flights: Vec<Flight<D, E>>,
    units: Units<D, E>,
    totals: Totals<D>,
    sums: Sums<D>,
    held: Vec<Held>,
    stage: Stage,
    /// What was sent to the neighbouring stages and may not be there yet, and the others of [`boundary_buffers`].
    sent: Vec<Pending<D::Buf<f32>>>,
    spare: Vec<D::Buf<f32>>,
    mesh: Mesh,
}

/// A micro-batch between its forward and backward pass.
struct Flight<D: Device, E: Element> {
    layers: Layers<D, E>,
    ends: Ends<D, E>,
    pass: Option<Pass>,
}

impl<D: Device, E: Element> Backprop<D, E> {
    /// Allocates everything that passes through a whole model need.
    ///
    /// # Errors
    /// When sequences are longer than the model's positions, or memory is short.
    pub fn new(device: &D, config: &Config, options: Options) -> Result<Self> {
        Backprop::on(device, config, options, Mesh::solo())
    }

    /// Allocates everything that passes need, for this process's part of the model: [`Part::of_rank`].
    ///
    /// # Errors
    /// When sequences are longer than the model's positions, the parts cannot share out a micro-batch's rows or the model, or
    /// memory is short.
    pub fn on(device: &D, config: &Config, options: Options, mesh: Mesh) -> Result<Self> {
        config.check()?;
        let (part, parts) = (Part::of_rank(mesh.axes, config.layers, mesh.world.rank()), mesh.tensor.size());
        part.check(config)?;
        let Options { batch, seq, offload, .. } = options;
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
        let (held, stage) = (config.held(part), part.stage);
        let under_way = stage.place.of - stage.place.rank;
        let flight = |_| Flight::new(device, config, options, stage, &mesh.tensor);
        let boundary = |_| device.alloc(batch * seq / parts * config.width);
        Ok(Backprop {
            gradients: Weights::zeros(device, config, &held, offload)?,
            flights: (0..under_way).map(flight).collect::<Result<_>>()?,
            units: Units::new(device, config, &held, &mesh.shard, offload)?,
            totals: Totals::new(device, config, &held, &mesh.shard, offload)?,
            sums: Sums::new(&mesh, &held, stage.start..stage.end.min(config.layers)),
            held,
            stage,
            sent: Vec::new(),
            spare: (0..boundary_buffers(stage.place)).map(boundary).collect::<Result<_>>()?,
            mesh,
        })
    }

    /// A step begins: the weights may have changed.
    pub fn begin(&mut self) {
        self.units.forget();
    }

    /// Forward pass of micro-batch number `number` of a step, with dropout. Passes come in the order of [`schedule`].
    ///
    /// # Errors
    /// When the batch does not fit the options or the vocabulary, or another rank is lost.
    pub fn forward_pass(
        &mut self,
        device: &D,
        model: &Model<D, E>,
        number: usize,
        batch: Batch<'_>,
        pass: Pass,
    ) -> Result<()> {
        self.forward(device, &model.weights, number, batch, Some(pass), &mut None)
    }

    /// Backward pass of micro-batch number `number`, whose forward pass is done: sum of the losses in nats (0 in stages that
    /// are not the last), and the gradients of `scale` times that. [`Store::Overwrite`] replaces [`Backprop::gradients`],
    /// [`Store::Accumulate`] adds to them. The first micro-batch of a step overwrites, and the last is followed by
    /// [`Backprop::sum`]. If it is said to be the `last`, what that sums is on its way behind it.
    ///
    /// # Errors
    /// When another rank is lost.
    pub fn backward_pass(
        &mut self,
        device: &D,
        model: &Model<D, E>,
        number: usize,
        scale: f32,
        store: Store,
        last: bool,
    ) -> Result<f64> {
        self.backward(device, &model.weights, number, scale, store, last, &mut None)
    }

    /// Both passes of one micro-batch: the first of a step if it overwrites.
    ///
    /// # Errors
    /// Those of [`Backprop::forward_pass`].
    pub fn train(
        &mut self,
        device: &D,
        model: &Model<D, E>,
        batch: Batch<'_>,
        pass: Pass,
        scale: f32,
        store: Store,
    ) -> Result<f64> {
        if store == Store::Overwrite {
            self.begin();
        }
        self.forward_pass(device, model, 0, batch, pass)?;
        self.backward_pass(device, model, 0, scale, store, false)
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
        self.begin();
        let mut observer: Observer<'_, D, E> = Some(observer);
        self.forward(device, &model.weights, 0, batch, Some(pass), &mut observer)?;
        self.backward(device, &model.weights, 0, scale, Store::Overwrite, false, &mut observer)
    }

    /// Completes the gradients of a step, as sums over all ranks that hold the same weights, and returns the L2 norm of all
    /// gradients together: squares summed in f64, each parameter's once.
    ///
    /// # Errors
    /// When another rank is lost.
    pub fn sum(&mut self, device: &D) -> Result<f64> {
        self.totals.finish(device, &mut self.gradients)?;
        self.sums.finish(device, &mut self.gradients)?;
        let spoken = self.held.iter().zip(self.gradients.tensors()).filter(|(held, _)| held.speaks);
        let mut squares: f64 = device.sums_of_squares(spoken.map(|(_, g)| g.flat()).collect()).iter().sum();
        for group in [&self.mesh.tensor, &self.mesh.shard, &self.mesh.pipeline] {
            squares = group.gather_f64(Label::new("norm"), &[squares])?.concat().iter().sum();
        }
        Ok(squares.sqrt())
    }

    /// Sum of the losses in nats, without dropout and without gradients; 0 in stages that are not the last.
    ///
    /// # Errors
    /// When the batch does not fit the options or the vocabulary, or another rank is lost.
    pub fn score(&mut self, device: &D, model: &Model<D, E>, batch: Batch<'_>) -> Result<f64> {
        self.begin();
        self.forward(device, &model.weights, 0, batch, None, &mut None)?;
        if !self.stage.is_last() {
            return Ok(0.0);
        }
        let Flight { layers, ends, .. } = &mut self.flights[0];
        ends.losses(device, self.units.ends(device, &model.weights)?, layers)?;
        Ok(ends.sum_of_losses(device))
    }

    /// Logits `[B, T, V]` of a batch, without dropout: for small models in one part, since training never holds them.
    ///
    /// # Errors
    /// When the batch does not fit the options or the vocabulary, memory for the logits is short, or the model is divided.
    pub fn logits(&mut self, device: &D, model: &Model<D, E>, batch: Batch<'_>) -> Result<Vec<f32>> {
        ensure!(self.stage.place.of == 1, "logits are of a whole model; this is a stage of one");
        self.begin();
        self.forward(device, &model.weights, 0, batch, None, &mut None)?;
        let Flight { layers, ends, .. } = &self.flights[0];
        ends.logits(device, self.units.ends(device, &model.weights)?, layers)
    }

    /// Numbers of this stage's layers.
    fn layers(&self, w: &Weights<D, E>) -> Range<usize> {
        self.stage.start..self.stage.end.min(w.layers.len())
    }

    /// Up to what the LM head reads, or the next stage.
    fn forward(
        &mut self,
        device: &D,
        w: &Weights<D, E>,
        number: usize,
        batch: Batch<'_>,
        pass: Option<Pass>,
        observer: &mut Observer<'_, D, E>,
    ) -> Result<()> {
        let range = self.layers(w);
        let after = |l: usize| Some(l + 1).filter(|next| range.contains(next));
        let place = number % self.flights.len();
        self.flights[place].pass = pass;
        self.units.ask(device, w, range.start, after(range.start))?;
        let Flight { layers, ends, .. } = &mut self.flights[place];
        ends.load(device, batch, layers)?;
        if self.stage.is_first() {
            ends.embed(device, self.units.ends(device, w)?, layers)?;
        } else {
            let came = self.receive(Label::of("activations", number), self.stage.place.rank - 1)?;
            self.flights[place].layers.enter(device, &came);
            self.spare.push(came);
        }
        let layers = &mut self.flights[place].layers;
        tell(observer, || layers.written_first());
        for l in range.clone() {
            self.units.ask(device, w, l, after(l))?;
            let weights = self.units.layer(w, l)?;
            let _span = self.mesh.world.trace().span(Label::of("forward of layer", l));
            at_once(device, &self.mesh, || layers.forward(device, weights, l - range.start, pass))?;
            tell(observer, || layers.written_forward(l - range.start));
        }
        if self.stage.is_last() {
            let Flight { layers, ends, .. } = &mut self.flights[place];
            ends.leave(device, self.units.ends(device, w)?, layers);
            tell(observer, || ends.written_forward(layers));
            return Ok(());
        }
        let mut goes = self.buffer()?;
        self.flights[place].layers.leave(device, &mut goes);
        self.send(Label::of("activations", number), self.stage.place.rank + 1, goes);
        Ok(())
    }

    /// Gradients of `scale * sum(losses)` after [`Backprop::forward`] of the same micro-batch.
    fn backward(
        &mut self,
        device: &D,
        w: &Weights<D, E>,
        number: usize,
        scale: f32,
        store: Store,
        last: bool,
        observer: &mut Observer<'_, D, E>,
    ) -> Result<f64> {
        let range = self.layers(w);
        let place = number % self.flights.len();
        let came = match self.stage.is_last() {
            true => None,
            false => Some(self.receive(Label::of("gradients", number), self.stage.place.rank + 1)?),
        };
        let Backprop { units, totals, sums, flights, gradients, mesh, stage, spare, .. } = self;
        let Flight { layers, ends, pass } = &mut flights[place];
        let trace = mesh.world.trace();
        let (g, ends_store) = totals.ends(device, gradients, store)?;
        match &came {
            None => {
                let _span = trace.span(Label::new("head, forward and backward"));
                ends.backward_head(device, units.ends(device, w)?, g, layers, scale, ends_store)?;
                tell(observer, || ends.written_head(g, layers));
            }
            Some(came) => {
                layers.enter_backward(device, came);
                if ends_store == Store::Overwrite {
                    device.fill(&mut g.tokens, 0.0);
                }
            }
        }
        spare.extend(came);
        for l in range.clone().rev() {
            let next = l.checked_sub(1).filter(|next| range.contains(next));
            units.ask(device, w, l, next)?;
            let (g, store) = totals.layer(device, gradients, l, next, store)?;
            let weights = units.layer(w, l)?;
            let span = trace.span(Label::of("backward of layer", l));
            at_once(device, mesh, || layers.backward(device, weights, g, l - range.start, *pass, store))?;
            drop(span);
            tell(observer, || layers.written_backward(g, l - range.start));
            totals.layer_done(device, gradients)?;
            if last {
                sums.follow(device, gradients, l + totals.behind())?;
            }
        }
        if stage.is_first() {
            let (g, ends_store) = totals.ends(device, gradients, store)?;
            ends.backward_embed(device, units.ends(device, w)?, g, layers, ends_store)?;
            tell(observer, || ends.written_backward(g));
        }
        totals.ends_done(device, gradients)?;
        let losses = if stage.is_last() { ends.sum_of_losses(device) } else { 0.0 };
        if !stage.is_first() {
            let mut goes = self.buffer()?;
            self.flights[place].layers.leave_backward(device, &mut goes);
            self.send(Label::of("gradients", number), self.stage.place.rank - 1, goes);
        }
        Ok(losses)
    }

    /// A buffer for what goes between stages. Those that were sent come back.
    fn buffer(&mut self) -> Result<D::Buf<f32>> {
        match self.spare.pop() {
            Some(buffer) => Ok(buffer),
            // At most as many are on their way as micro-batches are under way in the next stage.
            None => {
                ensure!(
                    !self.sent.is_empty(),
                    "exchanges with other stages failed before; no step can be made any more"
                );
                self.sent.remove(0).wait()
            }
        }
    }

    fn send(&mut self, label: Label, to: usize, buffer: D::Buf<f32>) {
        self.sent.push(self.mesh.pipeline.send(label, to, buffer));
    }

    fn receive(&mut self, label: Label, from: usize) -> Result<D::Buf<f32>> {
        let buffer = self.buffer()?;
        self.mesh.pipeline.receive(label, from, buffer).wait()
    }
}

impl<D: Device, E: Element> Flight<D, E> {
    fn new(device: &D, config: &Config, options: Options, stage: Stage, parts: &Group) -> Result<Self> {
        let here = Config { layers: stage.end.min(config.layers) - stage.start, ..config.clone() };
        let Options { batch, seq, recompute, .. } = options;
        let table = ActivationTable::training(&here, batch, seq, recompute, parts.size());
        let make = &mut Allocator::new(device, table);
        let flight = Flight {
            layers: Layers::new(make, &here, options, parts, stage)?,
            ends: Ends::new(device, make, &here, options, parts)?,
            pass: None,
        };
        #[cfg(test)]
        assert!(make.left().is_empty(), "activations that nothing uses: {:?}", make.left());
        Ok(flight)
    }
}

/// Runs the operations of a layer, which are started at once where that can be: not where parts of the layer tell each other
/// something on the way.
fn at_once<D: Device>(device: &D, mesh: &Mesh, mut layer: impl FnMut() -> Result<()>) -> Result<()> {
    if mesh.tensor.size() > 1 {
        return layer();
    }
    let mut result = Ok(());
    device.repeated(&mut || result = layer());
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferropt_device::cpu::{CpuDevice, CpuOptions};
    use ferropt_mesh::{Axes, World};

    #[test]
    fn buffers_between_stages_are_made_before_the_first_step() {
        const SEQ: usize = 4;
        let config = Config { layers: 3, vocab: 20, positions: SEQ, ..Config::preset("tiny").unwrap() };
        let steps = |world: World| {
            let axes = Axes { tensor: 1, shard: 1, replicate: 1, pipeline: 3 };
            let (device, mesh) =
                (CpuDevice::new(CpuOptions::default()).unwrap(), Mesh::new(world, axes).unwrap());
            let part = Part::of_rank(axes, config.layers, mesh.world.rank());
            let (offload, recompute) = (Offload::None, Recompute::None);
            let model = Model::<_, f32>::part(&device, &config, part, offload).unwrap();
            let options = Options { batch: 1, seq: SEQ, recompute, stop_at_documents: false, offload };
            let mut backprop = Backprop::on(&device, &config, options, mesh).unwrap();
            let stage = part.stage.place;
            assert_eq!(backprop.spare.len(), 4 - stage.rank);
            let batch = Batch { tokens: &[1; SEQ], targets: &[2; SEQ], doc_start: &[0; SEQ] };
            let pass = Pass { seed: 1, step: 1, first_sequence: 0 };
            for _ in 0..2 {
                backprop.begin();
                for task in schedule(stage, 5) {
                    match task {
                        Task::Forward(n) => backprop.forward_pass(&device, &model, n, batch, pass).unwrap(),
                        Task::Backward(n) => backprop
                            .backward_pass(&device, &model, n, 1.0, Store::Accumulate, n == 4)
                            .map(drop)
                            .unwrap(),
                    }
                    assert_eq!(
                        backprop.spare.len() + backprop.sent.len(),
                        4 - stage.rank,
                        "{task:?} in {stage:?}"
                    );
                }
                backprop.sum(&device).unwrap();
            }
        };
        std::thread::scope(|scope| {
            let start = |world| scope.spawn(|| steps(world));
            let ranks: Vec<_> = World::local(3).unwrap().into_iter().map(start).collect();
            ranks.into_iter().for_each(|rank| rank.join().unwrap());
        });
    }
}
