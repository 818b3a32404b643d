//! AdamW and gradient descent over the parameter table, with the state that they keep.
//!
//! Every parameter is updated by one fused pass of the device. In bf16 and f16 the f32 value of a matrix is its weight
//! joined with a low half kept here (the *split master*), unless updates are rounded at random instead; vectors and
//! f32 matrices are their own masters.

use crate::checkpoint::{Checkpoint, Data, Group};
use crate::collect::Collector;
use crate::stacked;
use anyhow::Result;
use bytemuck::cast_slice_mut;
use ferropt_device::rng::{Purpose, Stream};
use ferropt_device::{AdamW, DType, Device, Element, Param, Rounding, Sgd, Strided, bf16};
use ferropt_model::{Held, Model, Tensor, TensorMut, Weights, initial_shard};

/// Update rule with its constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// AdamW (Loshchilov and Hutter, 2019).
    AdamW {
        /// Decays of the two moments.
        betas: [f64; 2],
        /// Added to the root of the second moment.
        eps: f64,
    },
    /// Gradient descent.
    Sgd {
        /// Momentum; 0 for none.
        momentum: f64,
    },
}

/// How to update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Update rule.
    pub rule: Rule,
    /// Weight decay: decoupled for AdamW, L2 for gradient descent.
    pub weight_decay: f64,
    /// Whether biases and layer norms decay too.
    pub decay_vectors: bool,
    /// Largest gradient norm; 0 for no clipping.
    pub clip: f64,
    /// bf16 matrices have no low halves; updates are rounded at random.
    pub stochastic: bool,
    /// Seed of that rounding.
    pub seed: u64,
}

/// State of the optimiser for every parameter of a model.
pub struct Optimizer<D: Device> {
    settings: Settings,
    /// In the order of the parameter table.
    slots: Vec<Slot<D>>,
}

/// State of one parameter, or of what is held of it.
struct Slot<D: Device> {
    /// Where that lies in the parameter.
    place: Strided,
    /// Low halves of the split master, as long as the parameter.
    low: Option<D::Buf<i16>>,
    memory: Memory<D>,
}

/// What the update rule remembers; buffers as long as the parameter.
enum Memory<D: Device> {
    Moments { m: D::Buf<f32>, v: D::Buf<f32> },
    Momentum(D::Buf<f32>),
    None,
}

impl Settings {
    /// Buffers of f32 that the rule keeps for each parameter.
    pub(crate) fn moments(&self) -> usize {
        match self.rule {
            Rule::AdamW { .. } => 2,
            Rule::Sgd { momentum } => usize::from(momentum > 0.0),
        }
    }

    /// Whether matrices of type `compute` have low halves.
    pub(crate) fn splits(&self, compute: DType) -> bool {
        compute != DType::F32 && !self.stochastic
    }
}

impl<D: Device> Optimizer<D> {
    /// State for `model`, all zero, where the model's offload says.
    ///
    /// # Errors
    /// When memory is short; the message says how much was asked for.
    pub fn new<E: Element>(device: &D, model: &Model<D, E>, settings: Settings) -> Result<Self> {
        let offload = model.offload();
        let slot = |held: &Held| -> Result<Slot<D>> {
            let n = held.shard_len;
            let low = if held.parameter.is_matrix() && settings.splits(E::DTYPE) {
                Some(offload.state(device, n)?)
            } else {
                None
            };
            let kept = || offload.state(device, n);
            let memory = match (settings.rule, settings.moments()) {
                (Rule::AdamW { .. }, _) => Memory::Moments { m: kept()?, v: kept()? },
                (Rule::Sgd { .. }, 0) => Memory::None,
                (Rule::Sgd { .. }, _) => Memory::Momentum(kept()?),
            };
            Ok(Slot { place: held.place(), low, memory })
        };
        Ok(Optimizer { settings, slots: model.held().iter().map(slot).collect::<Result<_>>()? })
    }

    /// Bytes of all low halves, and of all that the rule remembers.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> (u64, u64) {
        use ferropt_device::Buffer;
        let low = self.slots.iter().flat_map(|slot| &slot.low).map(|low| 2 * low.len() as u64).sum();
        let kept = self.slots.iter().flat_map(|slot| Memory::GROUPS.map(|(_, pick)| pick(&slot.memory)));
        (low, kept.flatten().map(|kept| 4 * kept.len() as u64).sum())
    }

    /// Largest gradient norm from the next step on; 0 for none.
    pub fn set_clip(&mut self, clip: f64) {
        self.settings.clip = clip;
    }

    /// Gives every parameter its initial values, which follow from `seed` and are made on so many threads, all available unless
    /// given, and forgets all steps.
    pub fn initialise<E: Element>(
        &mut self,
        device: &D,
        model: &mut Model<D, E>,
        seed: u64,
        threads: Option<usize>,
    ) {
        for index in 0..self.slots.len() {
            let values = initial_shard(&model.held()[index], seed, threads);
            self.set(device, model, index, &values);
            match &mut self.slots[index].memory {
                Memory::Moments { m, v } => {
                    device.fill(m, 0.0);
                    device.fill(v, 0.0);
                }
                Memory::Momentum(momentum) => device.fill(momentum, 0.0),
                Memory::None => {}
            }
        }
    }

    /// Sets the master values of parameter number `index`.
    fn set<E: Element>(&mut self, device: &D, model: &mut Model<D, E>, index: usize, values: &[f32]) {
        let low = self.slots[index].low.as_mut();
        match model.weights.tensors_mut().swap_remove(index) {
            TensorMut::Matrix(w) => device.set_master(Param { w, low, rounding: None }, values),
            TensorMut::Vector(w) => device.set_master(Param { w, low: None, rounding: None }, values),
        }
    }

    /// Update number `step` (1 is the first) at learning rate `lr`. `gradients` are those of `loss_scale` times the loss;
    /// `norm` is that of the loss's own. Where it is above the clipping threshold they are scaled down to it.
    pub fn step<E: Element>(
        &mut self,
        device: &D,
        model: &mut Model<D, E>,
        gradients: &Weights<D, f32>,
        step: u64,
        lr: f64,
        norm: f64,
        loss_scale: f64,
    ) {
        let s = self.settings;
        let clip = if s.clip > 0.0 && norm > s.clip { s.clip / norm } else { 1.0 };
        let grad_scale = (clip / loss_scale) as f32;
        let parameters =
            model.weights.tensors_mut().into_iter().zip(gradients.tensors()).zip(&mut self.slots);
        for (index, ((parameter, gradient), slot)) in parameters.enumerate() {
            let Slot { place, low, memory } = slot;
            let update = Update { settings: s, step, lr, grad_scale, gradient: gradient.flat(), memory };
            match parameter {
                TensorMut::Matrix(w) => {
                    let rounding = s.stochastic.then(|| Rounding {
                        stream: Stream::new(s.seed, Purpose::Rounding, index, step),
                        place: *place,
                    });
                    update.apply(device, Param { w, low: low.as_mut(), rounding }, s.weight_decay);
                }
                TensorMut::Vector(w) => {
                    let decay = if s.decay_vectors { s.weight_decay } else { 0.0 };
                    update.apply(device, Param { w, low: None, rounding: None }, decay);
                }
            }
        }
    }

    /// Weights and state as groups of a checkpoint: `model` (f32 masters; bf16 matrices where updates are rounded at
    /// random), and what the rule remembers: `adam_m` and `adam_v`, or `momentum`. Tensors have their Hugging
    /// Face names. Of a run on many ranks, the tensors that the collector gives this one to write; the groups are there on
    /// every rank.
    ///
    /// # Errors
    /// When another rank is lost.
    pub(crate) fn save<E: Element>(
        &self,
        device: &D,
        model: &Model<D, E>,
        collector: &Collector,
    ) -> Result<Vec<Group>> {
        let table = model.held();
        let weights = model.weights.tensors();
        let mut masters = Vec::new();
        for ((weight, slot), held) in weights.iter().zip(&self.slots).zip(table) {
            let data = match weight {
                Tensor::Vector(w) => collector.whole(device, held, download(device, w, held))?.map(Data::F32),
                Tensor::Matrix(w) if E::DTYPE == DType::Bf16 && slot.low.is_none() => {
                    let mut values = vec![bf16::ZERO; held.shard_len];
                    device.download(w, 0, cast_slice_mut(&mut values));
                    collector.whole(device, held, values)?.map(Data::Bf16)
                }
                Tensor::Matrix(w) => {
                    let mut values = vec![0.0; held.shard_len];
                    device.get_master(w, slot.low.as_ref(), &mut values);
                    collector.whole(device, held, values)?.map(Data::F32)
                }
            };
            masters.extend(data.into_iter().flat_map(|data| stacked::tensors(&held.parameter, data)));
        }
        let mut groups = vec![Group { name: "model".into(), tensors: masters }];
        for (name, pick) in Memory::<D>::GROUPS {
            let slots = self.slots.iter().zip(table);
            let kept: Vec<_> = slots.filter_map(|(slot, held)| Some((pick(&slot.memory)?, held))).collect();
            if kept.is_empty() {
                continue;
            }
            let mut tensors = Vec::new();
            for (buffer, held) in kept {
                let values = collector.whole(device, held, download(device, buffer, held))?;
                let data = values.map(Data::F32);
                tensors.extend(data.into_iter().flat_map(|data| stacked::tensors(&held.parameter, data)));
            }
            groups.push(Group { name: name.into(), tensors });
        }
        Ok(groups)
    }

    /// Reads back what `Optimizer::save` wrote, to the bit: of every tensor the elements that are held here.
    ///
    /// # Errors
    /// Names the tensor that is missing or has another shape.
    pub fn load<E: Element>(
        &mut self,
        device: &D,
        model: &mut Model<D, E>,
        checkpoint: &Checkpoint,
    ) -> Result<()> {
        for index in 0..self.slots.len() {
            let held = model.held()[index].clone();
            self.set(device, model, index, &stacked::read(checkpoint, "model", &held)?);
            let fill = |buffer: &mut D::Buf<f32>, group| -> Result<()> {
                device.upload(buffer, 0, &stacked::read(checkpoint, group, &held)?);
                Ok(())
            };
            match &mut self.slots[index].memory {
                Memory::Moments { m, v } => {
                    fill(m, "adam_m")?;
                    fill(v, "adam_v")?;
                }
                Memory::Momentum(momentum) => fill(momentum, "momentum")?,
                Memory::None => {}
            }
        }
        Ok(())
    }
}

impl<D: Device> Memory<D> {
    /// Groups of a checkpoint, and how to find their buffers.
    #[allow(clippy::type_complexity)] // a table of names and accessors
    const GROUPS: [(&'static str, fn(&Self) -> Option<&D::Buf<f32>>); 3] = [
        ("adam_m", |memory| if let Memory::Moments { m, .. } = memory { Some(m) } else { None }),
        ("adam_v", |memory| if let Memory::Moments { v, .. } = memory { Some(v) } else { None }),
        ("momentum", |memory| if let Memory::Momentum(momentum) = memory { Some(momentum) } else { None }),
    ];
}

fn download<D: Device>(device: &D, buffer: &D::Buf<f32>, held: &Held) -> Vec<f32> {
    let mut values = vec![0.0; held.shard_len];
    device.download(buffer, 0, &mut values);
    values
}

/// One parameter's part of a step.
struct Update<'a, D: Device> {
    settings: Settings,
    step: u64,
    lr: f64,
    grad_scale: f32,
    gradient: &'a D::Buf<f32>,
    memory: &'a mut Memory<D>,
}

impl<D: Device> Update<'_, D> {
    fn apply<E: Element>(self, device: &D, param: Param<'_, D, E>, weight_decay: f64) {
        let (lr, weight_decay, grad_scale) = (self.lr as f32, weight_decay as f32, self.grad_scale);
        match (self.settings.rule, self.memory) {
            (Rule::AdamW { betas, eps }, Memory::Moments { m, v }) => {
                // In f64: 1 - beta^t loses most of its digits in f32 while t is small.
                let [bias_correction1, bias_correction2] =
                    betas.map(|beta| (1.0 - beta.powf(self.step as f64)) as f32);
                let [beta1, beta2] = betas.map(|beta| beta as f32);
                let eps = eps as f32;
                let hyper = AdamW {
                    lr,
                    beta1,
                    beta2,
                    eps,
                    weight_decay,
                    bias_correction1,
                    bias_correction2,
                    grad_scale,
                };
                device.adamw(hyper, param, self.gradient, m, v);
            }
            (Rule::Sgd { momentum }, memory) => {
                let hyper = Sgd { lr, momentum: momentum as f32, weight_decay, grad_scale };
                let buffer = if let Memory::Momentum(buffer) = memory { Some(buffer) } else { None };
                device.sgd(hyper, param, self.gradient, buffer);
            }
            // `Optimizer::new` makes moments for every parameter under AdamW.
            (Rule::AdamW { .. }, Memory::Momentum(_) | Memory::None) => {}
        }
    }
}

#[cfg(test)]
mod tests;
