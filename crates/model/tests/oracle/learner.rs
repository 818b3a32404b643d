//! A model with the weights of a fixture, trained with AdamW as PyTorch does it.

use super::fixture::Fixture;
use ferropt_device::{AdamW, Buffer, Chip, ChipBuf, DType, Device, Element, IGNORE, Param, Store};
use ferropt_model::{
    Backprop, Batch, Model, Offload, Options, Parameter, Pass, Recompute, Tensor, TensorMut,
};

pub struct Learner<E: Element> {
    model: Model<Chip, E>,
    backprop: Backprop<Chip, E>,
    /// Low halves of f32 masters, for matrices of halves.
    low: Vec<Option<ChipBuf<i16>>>,
    moments: Vec<(ChipBuf<f32>, ChipBuf<f32>)>,
}

/// What the loss is multiplied by: gradients would be too small for f16.
fn loss_scale<E: Element>() -> f32 {
    if E::DTYPE == DType::F16 { 4096.0 } else { 1.0 }
}

const PASS: Pass = Pass { seed: 1, step: 1, first_sequence: 0 };

impl<E: Element> Learner<E> {
    pub fn new(device: &Chip, f: &Fixture, recompute: Recompute) -> Self {
        Self::with(device, f, recompute, 0.0)
    }

    pub fn with_dropout(device: &Chip, f: &Fixture, recompute: Recompute) -> Self {
        Self::with(device, f, recompute, 0.1)
    }

    fn with(device: &Chip, f: &Fixture, recompute: Recompute, dropout: f64) -> Self {
        let mut config = f.config.clone();
        (config.dropout, config.attention_dropout) = (dropout, dropout);
        let mut model = Model::zeros(device, &config).unwrap();
        let options = Options {
            batch: f.batch,
            seq: f.seq,
            recompute,
            stop_at_documents: false,
            offload: Offload::None,
        };
        let backprop = Backprop::new(device, &config, options).unwrap();
        let table = config.parameters();
        for (i, parameter) in table.iter().enumerate() {
            let values: Vec<f32> = parameter.names.iter().flat_map(|name| f.values(name)).collect();
            model.set(device, i, &values).unwrap();
        }
        let buffers =
            |p: &Parameter| (device.alloc(p.elements()).unwrap(), device.alloc(p.elements()).unwrap());
        let split = |p: &Parameter| {
            (p.is_matrix() && size_of::<E>() == 2).then(|| device.alloc(p.elements()).unwrap())
        };
        let (low, moments) = (table.iter().map(split).collect(), table.iter().map(buffers).collect());
        Learner { model, backprop, low, moments }
    }

    pub fn logits(&mut self, device: &Chip, f: &Fixture) -> Vec<f32> {
        self.backprop.logits(device, &self.model, batch(f, &vec![0; f.tokens.len()])).unwrap()
    }

    /// Mean loss; leaves its gradients.
    pub fn train(&mut self, device: &Chip, f: &Fixture) -> f64 {
        let targets = f.targets.iter().filter(|t| **t != IGNORE).count();
        let documents = vec![0; f.tokens.len()];
        let (batch, scale) = (batch(f, &documents), loss_scale::<E>() / targets as f32);
        let sum = self.backprop.train(device, &self.model, batch, PASS, scale, Store::Overwrite).unwrap();
        sum / targets as f64
    }

    /// Gradients under Hugging Face names.
    pub fn gradients(&self, device: &Chip) -> Vec<(String, Vec<f32>)> {
        let values = |tensor: Tensor<'_, Chip, f32>| {
            let scaled = download(device, tensor.flat());
            scaled.into_iter().map(|g| g / loss_scale::<E>()).collect()
        };
        apart(&self.model.config().parameters(), self.backprop.gradients.tensors().into_iter().map(values))
    }

    /// Master weights under Hugging Face names.
    pub fn masters(&self, device: &Chip) -> Vec<(String, Vec<f32>)> {
        let tensors = self.model.weights.tensors();
        let values = tensors.iter().zip(&self.low).map(|(tensor, low)| match tensor {
            Tensor::Matrix(w) => {
                let mut values = vec![0.0; w.len()];
                device.get_master(w, low.as_ref(), &mut values);
                values
            }
            Tensor::Vector(w) => download(device, w),
        });
        apart(&self.model.config().parameters(), values)
    }

    pub fn step(&mut self, device: &Chip, f: &Fixture, t: u64) {
        let o = &f.optimizer;
        let hyper = AdamW {
            lr: o.lr as f32,
            beta1: o.beta1 as f32,
            beta2: o.beta2 as f32,
            eps: o.eps as f32,
            weight_decay: o.weight_decay as f32,
            bias_correction1: (1.0 - o.beta1.powi(t as i32)) as f32,
            bias_correction2: (1.0 - o.beta2.powi(t as i32)) as f32,
            grad_scale: 1.0 / loss_scale::<E>(),
        };
        let tensors = self.model.weights.tensors_mut();
        let gradients = self.backprop.gradients.tensors();
        for (((tensor, g), low), (m, v)) in
            tensors.into_iter().zip(gradients).zip(&mut self.low).zip(&mut self.moments)
        {
            let g = g.flat();
            match tensor {
                TensorMut::Matrix(w) => {
                    device.adamw(hyper, Param { w, low: low.as_mut(), rounding: None }, g, m, v);
                }
                TensorMut::Vector(w) => device.adamw(hyper, Param { w, low: None, rounding: None }, g, m, v),
            }
        }
    }
}

fn batch<'a>(f: &'a Fixture, documents: &'a [u32]) -> Batch<'a> {
    Batch { tokens: &f.tokens, targets: &f.targets, doc_start: documents }
}

fn download(device: &Chip, buf: &ChipBuf<f32>) -> Vec<f32> {
    let mut values = vec![0.0; buf.len()];
    device.download(buf, 0, &mut values);
    values
}

/// Stacked tensors, each under its own name.
fn apart(table: &[Parameter], values: impl Iterator<Item = Vec<f32>>) -> Vec<(String, Vec<f32>)> {
    let split = |(parameter, values): (&Parameter, Vec<f32>)| -> Vec<_> {
        let parts = values.chunks(values.len() / parameter.names.len()).map(<[f32]>::to_vec);
        parameter.names.iter().cloned().zip(parts).collect()
    };
    table.iter().zip(values).flat_map(split).collect()
}
