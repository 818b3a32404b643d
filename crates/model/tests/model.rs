//! What holds for the model as a whole, whatever the oracle says: dropout's gradients against finite differences,
//! layouts that agree, documents that do not see each other, decoding that equals the forward pass.

use ferropt_device::cpu::{CpuDevice, CpuOptions};
use ferropt_device::{Buffer, Device, Element, Segment, Store, WeightFormat, bf16};
use ferropt_model::{
    Backprop, Batch, Cache, Config, Decoder, Initial, Matrices, Memory, Model, Offload, Options, Parameter,
    Pass, Recompute, Tensor, initial_values,
};

#[path = "model/graphs.rs"]
mod graphs;
#[path = "model/inspect.rs"]
mod inspect;
#[path = "common/logits.rs"]
mod logits;
#[path = "model/quantised.rs"]
mod quantised;

const SEED: u64 = 5;

fn device() -> CpuDevice {
    CpuDevice::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap()
}

/// A pre-norm model and one like 350m, with initial values large enough for all parts to matter.
fn configs() -> [Config; 2] {
    let base = Config {
        layers: 2,
        heads: 2,
        width: 32,
        feed_forward: 48,
        embedding_width: 32,
        post_norm: false,
        own_head: false,
        vocab: 61,
        positions: 40,
        dropout: 0.0,
        attention_dropout: 0.0,
    };
    [base.clone(), Config { post_norm: true, embedding_width: 24, ..base }]
}

/// Initial values of a parameter, larger than OPT's.
fn values(parameter: &Parameter, index: usize) -> Vec<f32> {
    let columns = *parameter.shape.last().unwrap() as f64;
    let (std, mean) = if parameter.is_matrix() { (1.2 / columns.sqrt(), 0.0) } else { (0.1, 0.0) };
    let mean = if parameter.initial == Initial::Ones { 1.0 } else { mean };
    let noise = Parameter { initial: Initial::Normal(std), ..parameter.clone() };
    initial_values(&noise, index, SEED).into_iter().map(|v| v + mean).collect()
}

fn model<E: Element>(device: &CpuDevice, config: &Config) -> Model<CpuDevice, E> {
    let mut model = Model::zeros(device, config).unwrap();
    for (i, parameter) in config.parameters().iter().enumerate() {
        model.set(device, i, &values(parameter, i)).unwrap();
    }
    model
}

fn options(batch: usize, seq: usize) -> Options {
    Options { batch, seq, recompute: Recompute::None, stop_at_documents: false, offload: Offload::None }
}

fn ids(which: usize, len: usize, vocab: usize) -> Vec<u32> {
    let stream = ferropt_device::rng::Stream::new(77, ferropt_device::rng::Purpose::Sampling, which, 0);
    (0..len).map(|i| stream.word(0, i) % vocab as u32).collect()
}

fn gradients(device: &CpuDevice, backprop: &Backprop<CpuDevice, f32>) -> Vec<Vec<f32>> {
    let get = |tensor: Tensor<'_, CpuDevice, f32>| {
        let g = tensor.flat();
        let mut values = vec![0.0; g.len()];
        device.download(g, 0, &mut values);
        values
    };
    backprop.gradients.tensors().into_iter().map(get).collect()
}

/// The loss moves along a random direction as the gradient says, dropout masks staying as they are.
#[test]
fn gradients_under_dropout_match_finite_differences() {
    let device = device();
    for config in configs() {
        let config = Config { dropout: 0.2, attention_dropout: 0.3, ..config };
        let (batch, seq) = (2, 21);
        let (tokens, targets) = (ids(1, batch * seq, 61), ids(2, batch * seq, 61));
        let documents = vec![0; batch * seq];
        let given = Batch { tokens: &tokens, targets: &targets, doc_start: &documents };
        let pass = Pass { seed: 3, step: 7, first_sequence: 5 };
        let mut backprop = Backprop::new(&device, &config, options(batch, seq)).unwrap();
        let mut model = model::<f32>(&device, &config);
        backprop.train(&device, &model, given, pass, 1.0, Store::Overwrite).unwrap();
        let gradients = gradients(&device, &backprop);
        for (i, parameter) in config.parameters().iter().enumerate() {
            let at = values(parameter, i);
            let noise = Parameter { initial: Initial::Normal(1.0), ..parameter.clone() };
            let direction = initial_values(&noise, i, SEED + 1);
            let slope: f64 = direction.iter().zip(&gradients[i]).map(|(d, g)| *d as f64 * *g as f64).sum();
            let mut loss = |step: f32| {
                let moved: Vec<f32> = at.iter().zip(&direction).map(|(w, d)| w + step * d).collect();
                model.set(&device, i, &moved).unwrap();
                backprop.train(&device, &model, given, pass, 1.0, Store::Overwrite).unwrap()
            };
            // ReLU has kinks, which a small step rarely crosses; f32 losses are rough, which a large one does not feel.
            // A wrong mask in one place is an error of a tenth and more, whatever the step.
            let errors = [2e-3, 6e-4, 2e-4].map(|step| {
                let step = step / (at.len() as f32).powf(0.25);
                let measured = (loss(step) - loss(-step)) / (2.0 * step as f64);
                (measured - slope).abs()
            });
            loss(0.0);
            let size: f64 = gradients[i].iter().map(|g| (*g as f64).powi(2)).sum::<f64>().sqrt();
            let error = errors.into_iter().fold(f64::INFINITY, f64::min);
            assert!(error < 0.02 * size + 0.02, "{}: slope {slope}, off by {errors:?}", parameter.names[0]);
        }
    }
}

/// One pass over four sequences, or two over two: the same loss and gradients to rounding, masks included.
#[test]
fn micro_batches_agree() {
    let device = device();
    for config in configs() {
        let config = Config { dropout: 0.1, attention_dropout: 0.1, ..config };
        let seq = 17;
        let (tokens, targets) = (ids(1, 4 * seq, 61), ids(2, 4 * seq, 61));
        let documents = vec![0; 4 * seq];
        let model = model::<f32>(&device, &config);
        let run = |micro: usize| {
            let mut backprop = Backprop::new(&device, &config, options(micro, seq)).unwrap();
            let mut sum = 0.0;
            for first in (0..4).step_by(micro) {
                let rows = first * seq..(first + micro) * seq;
                let (tokens, targets) = (&tokens[rows.clone()], &targets[rows.clone()]);
                let given = Batch { tokens, targets, doc_start: &documents[rows] };
                let pass = Pass { seed: 3, step: 7, first_sequence: first as u64 };
                let store = if first == 0 { Store::Overwrite } else { Store::Accumulate };
                sum += backprop.train(&device, &model, given, pass, 0.25, store).unwrap();
            }
            (sum, gradients(&device, &backprop))
        };
        let (whole, parts) = (run(4), run(2));
        assert!((whole.0 / parts.0 - 1.0).abs() < 1e-6);
        for ((a, b), parameter) in whole.1.iter().zip(&parts.1).zip(config.parameters()) {
            let size = a.iter().fold(0.0f32, |most, g| most.max(g.abs()));
            for (a, b) in a.iter().zip(b) {
                assert!((a - b).abs() <= 1e-5 * size + 1e-6, "{}: {a} and {b}", parameter.names[0]);
            }
        }
    }
}

#[test]
fn documents_do_not_see_those_before_them() {
    let device = device();
    for config in configs() {
        let seq = 30;
        let start = 11;
        let documents: Vec<u32> = (0..seq).map(|t| if t < start { 0 } else { start }).collect();
        let model = model::<f32>(&device, &config);
        let apart = Options { stop_at_documents: true, ..options(1, seq as usize) };
        let mut backprop = Backprop::new(&device, &config, apart).unwrap();
        let targets = ids(2, seq as usize, 61);
        let mut logits = |tokens: &[u32]| {
            let given = Batch { tokens, targets: &targets, doc_start: &documents };
            backprop.logits(&device, &model, given).unwrap()
        };
        let tokens = ids(1, seq as usize, 61);
        let mut other = tokens.clone();
        other[start as usize - 1] = (other[start as usize - 1] + 1) % 61;
        let (a, b) = (logits(&tokens), logits(&other));
        let border = start as usize * 61;
        assert!(a[border..] == b[border..], "a later document depends on an earlier one");
        assert!(a[border - 61..border] != b[border - 61..border], "a token does not matter to itself");
        other = tokens.clone();
        other[start as usize] = (other[start as usize] + 1) % 61;
        let c = logits(&other);
        assert!(a[c.len() - 61..] != c[c.len() - 61..], "tokens of one document see each other");
    }
}

/// Read-only weights with the values of a model in training.
fn decoder<E: Element>(
    device: &CpuDevice,
    model: &Model<CpuDevice, E>,
    format: WeightFormat,
) -> Decoder<CpuDevice> {
    let values: Vec<Vec<f32>> = model
        .weights
        .tensors()
        .iter()
        .map(|tensor| match tensor {
            Tensor::Matrix(w) => {
                let mut values = vec![0.0; w.len()];
                device.get_master(w, None, &mut values);
                values
            }
            Tensor::Vector(w) => w.to_vec(),
        })
        .collect();
    let table = model.config().parameters();
    let read = |index: usize, rows: std::ops::Range<usize>, out: &mut [f32]| {
        let width = table[index].elements() / table[index].shape[0];
        out.copy_from_slice(&values[index][rows.start * width..rows.end * width]);
        Ok(())
    };
    Decoder::new(device, model.config(), format, &read, Matrices::Rows).unwrap()
}

#[test]
fn decoding_is_the_forward_pass() {
    fn check<E: Element>(format: WeightFormat, tolerance: f32) {
        let device = device();
        for config in configs() {
            let model = model::<E>(&device, &config);
            let decoder = decoder(&device, &model, format);
            let tokens = ids(1, 33, 61);
            let mut backprop = Backprop::<_, E>::new(&device, &config, options(1, 33)).unwrap();
            let documents = vec![0; 33];
            let given = Batch { tokens: &tokens, targets: &tokens, doc_start: &documents };
            let want = backprop.logits(&device, &model, given).unwrap();
            let mut first: Vec<Vec<f32>> = vec![];
            for pieces in [vec![33], vec![1; 33], vec![7, 1, 2, 20, 3]] {
                let mut cache = Cache::<_, E>::new(&device, &config, 3).unwrap();
                let mut memory = Memory::new(&device, &config, 33, 5).unwrap();
                let (mut past, mut all) = (0, vec![]);
                for rows in pieces {
                    let segments = [Segment { rows, past, pages: &[1] }];
                    let new = &tokens[past..past + rows];
                    decoder.forward(&device, new, &segments, &mut cache, &mut memory).unwrap();
                    let rows: Vec<u32> = (0..rows as u32).collect();
                    for rows in rows.chunks(5) {
                        let logits = decoder.head(&device, rows, &mut memory).unwrap();
                        for row in 0..rows.len() {
                            let mut values = vec![];
                            logits.read(row, &mut values);
                            all.push(values);
                        }
                    }
                    past += rows.len();
                }
                for (at, (got, want)) in all.iter().zip(want.chunks(61)).enumerate() {
                    for (got, want) in got.iter().zip(want) {
                        assert!((got - want).abs() < tolerance, "{} at {at}: {got}, not {want}", E::DTYPE);
                    }
                }
                if first.is_empty() {
                    first = all;
                } else {
                    assert!(first == all, "pieces change bits");
                }
            }
        }
    }
    check::<f32>(WeightFormat::F32, 2e-5);
    check::<bf16>(WeightFormat::Bf16, 0.15);
}

/// Bytes of this process that are in memory.
#[cfg(target_os = "linux")]
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    4096 * pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn a_cache_takes_its_memory_when_it_is_used_or_reserved() {
    const MIB: usize = 1 << 20;
    let device = device();
    let [config, _] = configs();
    let page = 2 * config.layers * 64 * config.width * size_of::<f32>();
    let before = resident();
    // Other tests take some at the same time, but not as much.
    let mut cache = Cache::<_, f32>::new(&device, &config, 512 * MIB / page).unwrap();
    assert!(resident() < before + 256 * MIB, "memory is taken before it is needed");
    cache.reserve(&device);
    assert!(resident() > before + 448 * MIB, "memory is not taken: {} before, {} now", before, resident());
}

#[test]
fn what_a_decoder_cannot_do_is_refused() {
    let device = device();
    let [config, _] = configs();
    let decoder = decoder(&device, &model::<f32>(&device, &config), WeightFormat::F32);
    let mut cache = Cache::<_, f32>::new(&device, &config, 2).unwrap();
    let mut memory = Memory::new(&device, &config, 8, 2).unwrap();
    let mut refused = |tokens: &[u32], segment: Segment<'_>, part: &str| {
        let message = decoder.forward(&device, tokens, &[segment], &mut cache, &mut memory).unwrap_err();
        assert!(message.to_string().contains(part), "{message}");
    };
    let one = Segment { rows: 1, past: 0, pages: &[0] };
    refused(&[61], one, "61");
    refused(&[1, 2], one, "2 tokens");
    refused(&[1; 9], Segment { rows: 9, ..one }, "8 rows");
    refused(&[1], Segment { past: 40, ..one }, "40 positions");
    refused(&[1], Segment { pages: &[], ..one }, "0 pages");
    refused(&[1], Segment { pages: &[2], ..one }, "page 2");
    assert!(decoder.head(&device, &[0, 0, 0], &mut memory).is_err_and(|e| e.to_string().contains("3 rows")));
}

#[test]
fn wrong_batches_are_refused() {
    let device = device();
    let [config, _] = configs();
    let model = model::<f32>(&device, &config);
    let mut backprop = Backprop::new(&device, &config, options(1, 3)).unwrap();
    let mut refused = |tokens: &[u32], targets: &[u32], documents: &[u32], part: &str| {
        let given = Batch { tokens, targets, doc_start: documents };
        let message = backprop.score(&device, &model, given).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    };
    refused(&[1, 2], &[1, 2, 3], &[0; 3], "2 tokens");
    refused(&[1, 2, 61], &[1, 2, 3], &[0; 3], "61");
    refused(&[1, 2, 3], &[1, 99, 3], &[0; 3], "99");
    refused(&[1, 2, 3], &[1, 2, 3], &[1, 0, 0], "starts behind");
    assert!(
        Backprop::<_, f32>::new(&device, &config, options(1, 41))
            .is_err_and(|e| e.to_string().contains("40"))
    );
}
