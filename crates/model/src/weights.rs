//! Weights in memory, in the shape of the model; gradients have the same shape, in f32.

use crate::config::Config;
use crate::offload::Offload;
use crate::part::{Held, Part};
use anyhow::{Context, Result, ensure};
use ferropt_device::{Device, Element, Param};

/// A model on a device, or a part of one.
pub struct Model<D: Device, E: Element> {
    config: Config,
    held: Vec<Held>,
    offload: Offload,
    /// The weights.
    pub weights: Weights<D, E>,
}

/// One buffer per parameter, as long as what is held of it: matrices of type `E`, vectors of f32. Shapes below are those of whole
/// parameters.
pub struct Weights<D: Device, E: Element> {
    /// `[V, W]`: token embeddings, and the LM head.
    pub tokens: D::Buf<E>,
    /// `[positions + 2, C]`.
    pub positions: D::Buf<E>,
    /// `[C, W]`, with embedding projections.
    pub project_in: Option<D::Buf<E>>,
    /// L layers.
    pub layers: Vec<Layer<D, E>>,
    /// Before the LM head; none with `post_norm`.
    pub final_norm: Option<Norm<D>>,
    /// `[W, C]`, with embedding projections.
    pub project_out: Option<D::Buf<E>>,
}

/// One decoder layer.
pub struct Layer<D: Device, E: Element> {
    /// `[3C, C]`: q, k and v, in that order.
    pub qkv: Linear<D, E>,
    /// `[C, C]`.
    pub out: Linear<D, E>,
    /// Layer norm of the attention block.
    pub norm1: Norm<D>,
    /// `[F, C]`.
    pub fc1: Linear<D, E>,
    /// `[C, F]`.
    pub fc2: Linear<D, E>,
    /// Layer norm of the feed-forward block.
    pub norm2: Norm<D>,
}

/// `y = x * weight^T + bias`.
pub struct Linear<D: Device, E: Element> {
    /// `[out, in]`.
    pub weight: D::Buf<E>,
    /// `[out]`.
    pub bias: D::Buf<f32>,
}

/// Layer norm.
pub struct Norm<D: Device> {
    /// `[C]`.
    pub gain: D::Buf<f32>,
    /// `[C]`.
    pub bias: D::Buf<f32>,
}

/// A parameter's buffer.
pub enum Tensor<'a, D: Device, E: Element> {
    /// Two dimensions, compute type.
    Matrix(&'a D::Buf<E>),
    /// One dimension, f32.
    Vector(&'a D::Buf<f32>),
}

impl<'a, D: Device> Tensor<'a, D, f32> {
    /// The buffer of a tensor whose compute type is f32, as every gradient's is: matrices and vectors are alike there.
    pub fn flat(self) -> &'a D::Buf<f32> {
        match self {
            Tensor::Matrix(buffer) | Tensor::Vector(buffer) => buffer,
        }
    }
}

/// A parameter's buffer, to be changed.
pub enum TensorMut<'a, D: Device, E: Element> {
    /// Two dimensions, compute type.
    Matrix(&'a mut D::Buf<E>),
    /// One dimension, f32.
    Vector(&'a mut D::Buf<f32>),
}

impl<'a, D: Device> TensorMut<'a, D, f32> {
    /// The buffer, as [`Tensor::flat`].
    pub fn flat(self) -> &'a mut D::Buf<f32> {
        match self {
            TensorMut::Matrix(buffer) | TensorMut::Vector(buffer) => buffer,
        }
    }
}

/// Lists the buffers in the order of the parameter table, as shared or exclusive references, with what `layers` lists
/// in the middle.
macro_rules! in_table_order {
    ($weights:expr, $tensor:ident, $iter:ident, $layers:expr, $($mutable:tt)?) => {{
        let mut list = vec![
            $tensor::Matrix(& $($mutable)? $weights.tokens),
            $tensor::Matrix(& $($mutable)? $weights.positions),
        ];
        list.extend($weights.project_in.$iter().map($tensor::Matrix));
        list.extend($layers);
        for norm in $weights.final_norm.$iter() {
            list.extend([
                $tensor::Vector(& $($mutable)? norm.gain),
                $tensor::Vector(& $($mutable)? norm.bias),
            ]);
        }
        list.extend($weights.project_out.$iter().map($tensor::Matrix));
        list
    }};
}

/// Lists a layer's buffers in the order of the parameter table.
macro_rules! layer_in_table_order {
    ($layer:expr, $tensor:ident, $($mutable:tt)?) => {{
        let Layer { qkv, out, norm1, fc1, fc2, norm2 } = $layer;
        vec![
            $tensor::Matrix(& $($mutable)? qkv.weight),
            $tensor::Vector(& $($mutable)? qkv.bias),
            $tensor::Matrix(& $($mutable)? out.weight),
            $tensor::Vector(& $($mutable)? out.bias),
            $tensor::Vector(& $($mutable)? norm1.gain),
            $tensor::Vector(& $($mutable)? norm1.bias),
            $tensor::Matrix(& $($mutable)? fc1.weight),
            $tensor::Vector(& $($mutable)? fc1.bias),
            $tensor::Matrix(& $($mutable)? fc2.weight),
            $tensor::Vector(& $($mutable)? fc2.bias),
            $tensor::Vector(& $($mutable)? norm2.gain),
            $tensor::Vector(& $($mutable)? norm2.bias),
        ]
    }};
}

impl<D: Device, E: Element> Weights<D, E> {
    /// Zeroed buffers for what is held, where `offload` says.
    ///
    /// # Errors
    /// When memory is short; the message says how much was asked for.
    pub fn zeros(device: &D, config: &Config, held: &[Held], offload: Offload) -> Result<Self> {
        let mut lengths = held.iter().map(|h| h.shard_len);
        Weights::make(config, config.layers, &mut Zeros { device, offload, lengths: &mut lengths })
    }

    /// Buffers from a source, for so many layers.
    pub(crate) fn make(config: &Config, layers: usize, source: &mut impl Source<D, E>) -> Result<Self> {
        let projections = config.has_projections();
        Ok(Weights {
            tokens: source.matrix()?,
            positions: source.matrix()?,
            project_in: if projections { Some(source.matrix()?) } else { None },
            layers: (0..layers).map(|_| Layer::make(source)).collect::<Result<_>>()?,
            final_norm: if config.post_norm { None } else { Some(Norm::make(source)?) },
            project_out: if projections { Some(source.matrix()?) } else { None },
        })
    }

    /// The buffers in the order of [`Config::parameters`].
    pub fn tensors(&self) -> Vec<Tensor<'_, D, E>> {
        in_table_order!(self, Tensor, iter, self.layers.iter().flat_map(Layer::tensors),)
    }

    /// The buffers in the order of [`Config::parameters`], to be changed.
    pub fn tensors_mut(&mut self) -> Vec<TensorMut<'_, D, E>> {
        in_table_order!(self, TensorMut, iter_mut, self.layers.iter_mut().flat_map(Layer::tensors_mut), mut)
    }

    /// The buffers before and behind the layers.
    pub(crate) fn ends(&self) -> Vec<Tensor<'_, D, E>> {
        in_table_order!(self, Tensor, iter, [],)
    }

    /// The buffers before and behind the layers, to be changed.
    pub(crate) fn ends_mut(&mut self) -> Vec<TensorMut<'_, D, E>> {
        in_table_order!(self, TensorMut, iter_mut, [], mut)
    }
}

/// Where buffers come from, in the order of the parameter table.
pub(crate) trait Source<D: Device, E: Element> {
    /// The next one, of a matrix.
    fn matrix(&mut self) -> Result<D::Buf<E>>;
    /// The next one, of a vector.
    fn vector(&mut self) -> Result<D::Buf<f32>>;
}

/// New buffers of the lengths that are listed.
pub(crate) struct Zeros<'a, D, L> {
    pub(crate) device: &'a D,
    pub(crate) offload: Offload,
    pub(crate) lengths: &'a mut L,
}

impl<D: Device, E: Element, L: Iterator<Item = usize>> Source<D, E> for Zeros<'_, D, L> {
    fn matrix(&mut self) -> Result<D::Buf<E>> {
        self.offload.weights(self.device, self.lengths.next().unwrap_or(0))
    }

    fn vector(&mut self) -> Result<D::Buf<f32>> {
        self.offload.weights(self.device, self.lengths.next().unwrap_or(0))
    }
}

impl<D: Device, E: Element> Layer<D, E> {
    /// The buffers in the order of [`Config::parameters`].
    pub(crate) fn tensors(&self) -> Vec<Tensor<'_, D, E>> {
        layer_in_table_order!(self, Tensor,)
    }

    /// The buffers in the order of [`Config::parameters`], to be changed.
    pub(crate) fn tensors_mut(&mut self) -> Vec<TensorMut<'_, D, E>> {
        layer_in_table_order!(self, TensorMut, mut)
    }

    /// Buffers from a source.
    pub(crate) fn make(source: &mut impl Source<D, E>) -> Result<Self> {
        Ok(Layer {
            qkv: Linear::make(source)?,
            out: Linear::make(source)?,
            norm1: Norm::make(source)?,
            fc1: Linear::make(source)?,
            fc2: Linear::make(source)?,
            norm2: Norm::make(source)?,
        })
    }
}

impl<D: Device, E: Element> Linear<D, E> {
    fn make(source: &mut impl Source<D, E>) -> Result<Self> {
        Ok(Linear { weight: source.matrix()?, bias: source.vector()? })
    }
}

impl<D: Device> Norm<D> {
    fn make<E: Element>(source: &mut impl Source<D, E>) -> Result<Self> {
        Ok(Norm { gain: source.vector()?, bias: source.vector()? })
    }
}

impl<D: Device, E: Element> Model<D, E> {
    /// A whole model, whose weights are all zero until they are set.
    ///
    /// # Errors
    /// When the sizes make no model, or memory is short.
    pub fn zeros(device: &D, config: &Config) -> Result<Self> {
        Model::part(device, config, Part::WHOLE, Offload::None)
    }

    /// A part of a model, whose weights are all zero until they are set, and are where `offload` says.
    ///
    /// # Errors
    /// When the sizes make no model that can be trained, or cannot be divided, or memory is short.
    pub fn part(device: &D, config: &Config, part: Part, offload: Offload) -> Result<Self> {
        config.check()?;
        part.check(config)?;
        ensure!(
            !config.own_head,
            "its LM head is a matrix of its own (tie_word_embeddings = false), which can be used, but not trained: training \
             takes the embedding table for the head"
        );
        let held = config.held(part);
        let weights = Weights::zeros(device, config, &held, offload)
            .with_context(|| format!("a model with {} parameters does not fit", config.parameter_count()))?;
        Ok(Model { config: config.clone(), held, offload, weights })
    }

    /// Its sizes.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What is here of each of its parameters.
    pub fn held(&self) -> &[Held] {
        &self.held
    }

    /// What of its state, and of its optimiser's, is in the host's memory.
    pub fn offload(&self) -> Offload {
        self.offload
    }

    /// Sets parameter number `index`, or what is here of it, rounding to nearest where the compute type is bf16.
    ///
    /// # Errors
    /// When there is no such parameter or the number of values is wrong.
    pub fn set(&mut self, device: &D, index: usize, values: &[f32]) -> Result<()> {
        let held = self.held.get(index).with_context(|| format!("there is no parameter {index}"))?;
        ensure!(
            values.len() == held.shard_len,
            "{} has shape {:?}, of which {} values are here, not {}",
            held.parameter.names.join(", "),
            held.parameter.shape,
            held.shard_len,
            values.len()
        );
        match self.weights.tensors_mut().swap_remove(index) {
            TensorMut::Matrix(w) => device.set_master(Param { w, low: None, rounding: None }, values),
            TensorMut::Vector(w) => device.set_master(Param { w, low: None, rounding: None }, values),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferropt_device::cpu::{CpuDevice, CpuOptions};
    use ferropt_device::{Buffer, bf16};

    #[test]
    fn buffers_follow_the_table() {
        let device = CpuDevice::new(CpuOptions::default()).unwrap();
        let base = Config { vocab: 11, positions: 7, feed_forward: 40, ..Config::preset("tiny").unwrap() };
        for config in [base.clone(), Config { post_norm: true, embedding_width: 24, ..base }] {
            let model = Model::<_, bf16>::zeros(&device, &config).unwrap();
            let tensors = model.weights.tensors();
            assert_eq!(tensors.len(), model.held().len());
            for (tensor, Held { parameter, .. }) in tensors.iter().zip(model.held()) {
                let (len, matrix) = match tensor {
                    Tensor::Matrix(w) => (w.len(), true),
                    Tensor::Vector(w) => (w.len(), false),
                };
                assert_eq!(
                    (len, matrix),
                    (parameter.elements(), parameter.is_matrix()),
                    "{:?}",
                    parameter.names
                );
            }
        }
    }
}
