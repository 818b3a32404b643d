use super::*;
use crate::checkpoint::{DEFAULT_SHARD_BYTES, Retention, RunState, Snapshot, Store, Team, Writer};
use ferropt_device::cpu::{CpuDevice, CpuOptions};
use ferropt_device::{Buffer, f16};
use ferropt_mesh::Mesh;
use ferropt_model::{Config, Offload, Part, initial_values};

const ADAMW: Settings = Settings {
    rule: Rule::AdamW { betas: [0.9, 0.95], eps: 1e-8 },
    weight_decay: 0.1,
    decay_vectors: true,
    clip: 1.0,
    stochastic: false,
    seed: 7,
};
const SGD: Settings = Settings { rule: Rule::Sgd { momentum: 0.9 }, ..ADAMW };
const LR: f64 = 1e-2;

fn device() -> CpuDevice {
    CpuDevice::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap()
}

/// Post-norm with projections, so that every kind of parameter is there.
fn config() -> Config {
    Config { vocab: 20, positions: 6, embedding_width: 8, post_norm: true, ..Config::preset("tiny").unwrap() }
}

/// Gradient of element `i` of parameter `index` in a step: anything that is neither even nor tiny.
fn gradient(index: usize, i: usize, step: u64) -> f32 {
    ((i as f32 * 0.7 + index as f32 * 1.3 + step as f32).sin() + 0.2) * 1e-3
}

fn gradients(device: &CpuDevice, step: u64) -> Weights<CpuDevice, f32> {
    let mut weights = Weights::zeros(device, &config(), &config().held(Part::WHOLE), Offload::None).unwrap();
    for (index, tensor) in weights.tensors_mut().into_iter().enumerate() {
        let (TensorMut::Matrix(buffer) | TensorMut::Vector(buffer)) = tensor;
        let values: Vec<f32> = (0..buffer.len()).map(|i| gradient(index, i, step)).collect();
        device.upload(buffer, 0, &values);
    }
    weights
}

/// L2 norm of all gradients together.
fn gradient_norm(device: &CpuDevice, gradients: &Weights<CpuDevice, f32>) -> f64 {
    let gradients = gradients.tensors().into_iter().map(|g| g.flat()).collect();
    device.sums_of_squares(gradients).iter().sum::<f64>().sqrt()
}

/// What a checkpoint holds of a model and its optimiser.
fn saved<E: Element>(
    device: &CpuDevice,
    model: &Model<CpuDevice, E>,
    optimizer: &Optimizer<CpuDevice>,
) -> Vec<Group> {
    optimizer.save(device, model, &Collector::new(Mesh::solo(), model.held())).unwrap()
}

/// A model and its optimiser after some steps.
fn trained<E: Element>(
    device: &CpuDevice,
    settings: Settings,
    steps: u64,
) -> (Model<CpuDevice, E>, Optimizer<CpuDevice>) {
    let mut model = Model::zeros(device, &config()).unwrap();
    let mut optimizer = Optimizer::new(device, &model, settings).unwrap();
    optimizer.initialise(device, &mut model, 3, None);
    for step in 1..=steps {
        let gradients = gradients(device, step);
        let norm = gradient_norm(device, &gradients);
        optimizer.step(device, &mut model, &gradients, step, LR, norm, 1.0);
    }
    (model, optimizer)
}

/// The same in f64, as the papers have it.
fn reference(s: Settings, steps: u64) -> Vec<Vec<f64>> {
    let table = config().parameters();
    let each = || table.iter().enumerate();
    let mut weights: Vec<Vec<f64>> =
        each().map(|(i, p)| initial_values(p, i, 3).into_iter().map(f64::from).collect()).collect();
    let zeros: Vec<Vec<f64>> = table.iter().map(|p| vec![0.0; p.elements()]).collect();
    let (mut first, mut second) = (zeros.clone(), zeros);
    for step in 1..=steps {
        let all =
            each().flat_map(|(index, p)| (0..p.elements()).map(move |i| gradient(index, i, step) as f64));
        let norm = all.map(|g| g * g).sum::<f64>().sqrt();
        let scale = if s.clip > 0.0 { (s.clip / norm).min(1.0) } else { 1.0 };
        for (index, p) in each() {
            let decay = if p.is_matrix() || s.decay_vectors { s.weight_decay } else { 0.0 };
            for i in 0..p.elements() {
                let g = gradient(index, i, step) as f64 * scale;
                let (w, m, v) = (&mut weights[index][i], &mut first[index][i], &mut second[index][i]);
                match s.rule {
                    Rule::AdamW { betas: [b1, b2], eps } => {
                        *m = b1 * *m + (1.0 - b1) * g;
                        *v = b2 * *v + (1.0 - b2) * g * g;
                        let (m, v) = (*m / (1.0 - b1.powf(step as f64)), *v / (1.0 - b2.powf(step as f64)));
                        *w -= LR * decay * *w + LR * m / (v.sqrt() + eps);
                    }
                    Rule::Sgd { momentum } => {
                        *m = momentum * *m + g + decay * *w;
                        *w -= LR * *m;
                    }
                }
            }
        }
    }
    weights
}

/// Values of a group of a checkpoint, in the order of the table.
fn values(groups: &[Group], name: &str) -> Vec<f32> {
    let group = groups.iter().find(|g| g.name == name).unwrap();
    let tensor = |data: &Data| match data {
        Data::F32(values) => values.clone(),
        Data::Bf16(values) => values.iter().map(|v| v.to_f32()).collect(),
    };
    group.tensors.iter().flat_map(|t| tensor(&t.data)).collect()
}

#[test]
fn steps_follow_the_papers() {
    let device = device();
    let (norm, parameters) = (gradient_norm(&device, &gradients(&device, 1)), config().parameter_count());
    assert!(norm > 2e-4 * (parameters as f64).sqrt(), "{norm}");
    for settings in [
        ADAMW,
        Settings { clip: norm / 3.0, ..ADAMW },
        Settings { clip: 0.0, decay_vectors: false, weight_decay: 0.5, ..ADAMW },
        Settings { clip: norm / 3.0, ..SGD },
        Settings { rule: Rule::Sgd { momentum: 0.0 }, decay_vectors: false, ..SGD },
    ] {
        let (model, optimizer) = trained::<f32>(&device, settings, 5);
        let got = values(&saved(&device, &model, &optimizer), "model");
        let want: Vec<f64> = reference(settings, 5).into_iter().flatten().collect();
        assert_eq!(got.len(), want.len());
        // Weights are at most 1 or so; five f32 steps of at most LR each round by about 1e-7 of that.
        let worst = got.iter().zip(&want).map(|(a, b)| (*a as f64 - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-6, "{settings:?}: off by {worst:e}");
    }
}

#[test]
fn split_masters_are_the_f32_run_to_the_bit_and_stochastic_ones_stay_near() {
    let device = device();
    let groups = |stochastic, bf16_weights: bool| {
        let settings = Settings { stochastic, ..ADAMW };
        if bf16_weights {
            let (model, optimizer) = trained::<bf16>(&device, settings, 3);
            saved(&device, &model, &optimizer)
        } else {
            let (model, optimizer) = trained::<f32>(&device, settings, 3);
            saved(&device, &model, &optimizer)
        }
    };
    let plain = values(&groups(false, false), "model");
    assert_eq!(values(&groups(false, true), "model"), plain);
    let stochastic = values(&groups(true, true), "model");
    assert_ne!(stochastic, plain);
    assert_eq!(stochastic, values(&groups(true, true), "model"), "the same every time");
    for (a, b) in stochastic.iter().zip(&plain) {
        assert!((a - b).abs() < 0.05 * b.abs() + 1e-3, "{a} and {b}");
    }
}

/// A checkpoint with these groups.
fn written(folder: &std::path::Path, groups: Vec<Group>) -> Checkpoint {
    let null = serde_json::Value::Null;
    let (model, config, loop_state) = (null.clone(), null.clone(), null);
    let run = RunState { step: 1, tokens: 0, rollbacks: 0, early: false, seed: 0, model, config, loop_state };
    let store = Store::open_for_writing(folder).unwrap();
    let mut writer = Writer::start(store, Retention::ALL, DEFAULT_SHARD_BYTES, Team::alone()).unwrap();
    writer.save(|| Ok(Snapshot { run, groups, files: Vec::new() })).unwrap();
    writer.finish();
    Store::open(folder).unwrap().load(1).unwrap()
}

/// Training on from a checkpoint gives what training on without one gives.
fn comes_back<E: Element>(settings: Settings, groups: &[&str]) {
    let (device, folder) = (device(), tempfile::tempdir().unwrap());
    let (mut model, mut optimizer) = trained::<E>(&device, settings, 2);
    let first = saved(&device, &model, &optimizer);
    assert_eq!(first.iter().map(|g| g.name.as_str()).collect::<Vec<_>>(), groups);
    let checkpoint = written(folder.path(), first);

    let mut other = Model::<_, E>::zeros(&device, &config()).unwrap();
    let mut again = Optimizer::new(&device, &other, settings).unwrap();
    again.load(&device, &mut other, &checkpoint).unwrap();
    let (gradients, norm) = (gradients(&device, 3), 1.0);
    optimizer.step(&device, &mut model, &gradients, 3, LR, norm, 1.0);
    again.step(&device, &mut other, &gradients, 3, LR, norm, 1.0);
    let (left, right) = (saved(&device, &model, &optimizer), saved(&device, &other, &again));
    for group in groups {
        assert_eq!(values(&left, group), values(&right, group), "{settings:?}: {group}");
    }
}

#[test]
fn state_comes_back_to_the_bit() {
    comes_back::<f32>(ADAMW, &["model", "adam_m", "adam_v"]);
    comes_back::<bf16>(ADAMW, &["model", "adam_m", "adam_v"]);
    comes_back::<f16>(ADAMW, &["model", "adam_m", "adam_v"]);
    comes_back::<bf16>(Settings { stochastic: true, ..SGD }, &["model", "momentum"]);
    comes_back::<bf16>(Settings { rule: Rule::Sgd { momentum: 0.0 }, ..SGD }, &["model"]);
}

#[test]
fn checkpoints_have_hugging_face_tensors_and_foreign_ones_are_refused() {
    let (device, folder) = (device(), tempfile::tempdir().unwrap());
    let (model, optimizer) = trained::<bf16>(&device, Settings { stochastic: true, ..SGD }, 1);
    let checkpoint = written(folder.path(), saved(&device, &model, &optimizer));
    let k = checkpoint.tensor("model", "model.decoder.layers.1.self_attn.k_proj.weight").unwrap();
    assert_eq!((k.shape, k.dtype), (&[64, 64][..], crate::checkpoint::Dtype::BF16));
    let bias = checkpoint.tensor("model", "model.decoder.layers.1.self_attn.k_proj.bias").unwrap();
    assert_eq!((bias.shape, bias.dtype), (&[64][..], crate::checkpoint::Dtype::F32));

    let load = |config: &Config, settings| {
        let mut model = Model::<_, bf16>::zeros(&device, config).unwrap();
        let mut optimizer = Optimizer::new(&device, &model, settings).unwrap();
        format!("{:#}", optimizer.load(&device, &mut model, &checkpoint).unwrap_err())
    };
    let message = load(&config(), ADAMW);
    assert!(message.contains("adam_m") && message.contains("momentum"), "{message}");
    let message = load(&Config { vocab: 30, ..config() }, SGD);
    assert!(message.contains("embed_tokens.weight") && message.contains("[20, 8]"), "{message}");
    let message = load(&Config { layers: 3, ..config() }, SGD);
    assert!(message.contains("layers.2."), "{message}");
}
