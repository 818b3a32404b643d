//! Weights in memory, in the shape of the model; gradients have the same shape, in f32.

use crate::config::Config;
use crate::parameters::Parameter;
use anyhow::{Context, Result, ensure};
use ferropt_device::{Device, Element, Param};

/// A model on a device.
pub struct Model<D: Device, E: Element> {
    config: Config,
    table: Vec<Parameter>,
    /// The weights.
    pub weights: Weights<D, E>,
}

/// One buffer per parameter: matrices of type `E`, vectors of f32.
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

/// Lists the buffers in the order of the parameter table, as shared or exclusive references.
macro_rules! in_table_order {
    ($weights:expr, $tensor:ident, $iter:ident, $($mutable:tt)?) => {{
        let w = $weights;
        let mut list = vec![
            $tensor::Matrix(& $($mutable)? w.tokens),
            $tensor::Matrix(& $($mutable)? w.positions),
        ];
        list.extend(w.project_in.$iter().map($tensor::Matrix));
        for layer in w.layers.$iter() {
            let Layer { qkv, out, norm1, fc1, fc2, norm2 } = layer;
            list.extend([
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
            ]);
        }
        for norm in w.final_norm.$iter() {
            list.extend([
                $tensor::Vector(& $($mutable)? norm.gain),
                $tensor::Vector(& $($mutable)? norm.bias),
            ]);
        }
        list.extend(w.project_out.$iter().map($tensor::Matrix));
        list
    }};
}

impl<D: Device, E: Element> Weights<D, E> {
    /// Zeroed buffers for every parameter.
    ///
    /// # Errors
    /// When memory is short; the message says how much was asked for.
    pub fn zeros(device: &D, config: &Config) -> Result<Self> {
        let table = config.parameters();
        let mut next = table.iter();
        let mut maker = Maker { device, elements: || next.next().map_or(0, Parameter::elements) };
        let m = &mut maker;
        let projections = config.has_projections();
        Ok(Weights {
            tokens: m.buffer()?,
            positions: m.buffer()?,
            project_in: if projections { Some(m.buffer()?) } else { None },
            layers: (0..config.layers).map(|_| m.layer()).collect::<Result<_>>()?,
            final_norm: if config.post_norm { None } else { Some(m.norm()?) },
            project_out: if projections { Some(m.buffer()?) } else { None },
        })
    }

    /// The buffers in the order of [`Config::parameters`].
    pub fn tensors(&self) -> Vec<Tensor<'_, D, E>> {
        in_table_order!(self, Tensor, iter,)
    }

    /// The buffers in the order of [`Config::parameters`], to be changed.
    pub fn tensors_mut(&mut self) -> Vec<TensorMut<'_, D, E>> {
        in_table_order!(self, TensorMut, iter_mut, mut)
    }
}

/// Makes buffers of the sizes that the table lists, one after the other.
struct Maker<'a, D, F> {
    device: &'a D,
    elements: F,
}

impl<D: Device, F: FnMut() -> usize> Maker<'_, D, F> {
    fn buffer<E: Element>(&mut self) -> Result<D::Buf<E>> {
        self.device.alloc((self.elements)())
    }

    fn linear<E: Element>(&mut self) -> Result<Linear<D, E>> {
        Ok(Linear { weight: self.buffer()?, bias: self.buffer()? })
    }

    fn norm(&mut self) -> Result<Norm<D>> {
        Ok(Norm { gain: self.buffer()?, bias: self.buffer()? })
    }

    fn layer<E: Element>(&mut self) -> Result<Layer<D, E>> {
        Ok(Layer {
            qkv: self.linear()?,
            out: self.linear()?,
            norm1: self.norm()?,
            fc1: self.linear()?,
            fc2: self.linear()?,
            norm2: self.norm()?,
        })
    }
}

impl<D: Device, E: Element> Model<D, E> {
    /// A model whose weights are all zero until they are set.
    ///
    /// # Errors
    /// When the sizes make no model, or memory is short.
    pub fn zeros(device: &D, config: &Config) -> Result<Self> {
        config.check()?;
        let weights = Weights::zeros(device, config)
            .with_context(|| format!("a model with {} parameters does not fit", config.parameter_count()))?;
        Ok(Model { config: config.clone(), table: config.parameters(), weights })
    }

    /// Its sizes.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its parameters.
    pub fn parameters(&self) -> &[Parameter] {
        &self.table
    }

    /// Sets parameter number `index`, rounding to nearest where the compute type is bf16.
    ///
    /// # Errors
    /// When there is no such parameter or the number of values is wrong.
    pub fn set(&mut self, device: &D, index: usize, values: &[f32]) -> Result<()> {
        let parameter = self.table.get(index).with_context(|| format!("there is no parameter {index}"))?;
        ensure!(
            values.len() == parameter.elements(),
            "{} has shape {:?}, which is not {} values",
            parameter.names.join(", "),
            parameter.shape,
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
            assert_eq!(tensors.len(), model.parameters().len());
            for (tensor, parameter) in tensors.iter().zip(model.parameters()) {
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
