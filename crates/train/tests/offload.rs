//! State in the host's memory: the same bits, and as much less of the device's own memory as is planned. On the processor,
//! whose memory is the host's; with `FERROPT_TEST_DEVICE=cuda` on a GPU, real or emulated.

use ferropt_device::rng::{Purpose, Stream};
use ferropt_device::{Buffer, Chip, Device, Element, Store, bf16};
use ferropt_model::{Backprop, Batch, Config, Model, Offload, Options, Part, Pass, Recompute, Tensor};
use ferropt_train::checkpoint::Share;
use ferropt_train::optimizer::{Optimizer, Rule, Settings};
use ferropt_train::planner::Memory;

const SEED: u64 = 3;
const STEPS: u64 = 2;
/// Micro-batches of a step.
const PASSES: usize = 2;

const ADAMW: Settings = Settings {
    rule: Rule::AdamW { betas: [0.9, 0.95], eps: 1e-8 },
    weight_decay: 0.1,
    decay_vectors: true,
    // Every step is clipped, so that a norm with another bit would show.
    clip: 0.01,
    stochastic: false,
    seed: SEED,
};

/// A new one each time, so that its workspace is that of one run.
fn device() -> Chip {
    let name = std::env::var("FERROPT_TEST_DEVICE").unwrap_or("cpu".into());
    let which = name.parse().expect("a device's name in FERROPT_TEST_DEVICE");
    Chip::open(which, Some(2), false).expect("the device that is to be tested")
}

/// More layers than are on the device at a time.
fn configs() -> [Config; 2] {
    let tiny = Config::preset("tiny").unwrap();
    let base = Config { layers: 4, vocab: 50, positions: 16, dropout: 0.1, attention_dropout: 0.1, ..tiny };
    [base.clone(), Config { post_norm: true, embedding_width: 24, ..base }]
}

/// What a run has computed, to the bit, and how much of the device's memory it took and should take.
struct Run {
    figures: Vec<[u64; 2]>,
    weights: Vec<Vec<u32>>,
    taken: Option<u64>,
    planned: Memory,
}

fn run<E: Element>(config: &Config, settings: Settings, offload: Offload) -> Run {
    let (device, seq) = (device(), 16);
    let options = Options { batch: 2, seq, recompute: Recompute::Full, stop_at_documents: false, offload };
    let mut model = Model::<_, E>::part(&device, config, Part::WHOLE, offload).unwrap();
    let mut optimizer = Optimizer::new(&device, &model, settings).unwrap();
    optimizer.initialise(&device, &mut model, SEED, None);
    let mut backprop = Backprop::<_, E>::new(&device, config, options).unwrap();
    let rows = options.batch * seq;
    let mut figures = Vec::new();
    for step in 1..=STEPS {
        let mut loss = 0.0;
        for number in 0..PASSES {
            let random = Stream::new(SEED, Purpose::Sampling, number, step);
            let ids: Vec<u32> = (0..=rows).map(|i| random.word(0, i) % config.vocab as u32).collect();
            let batch = Batch { tokens: &ids[..rows], targets: &ids[1..], doc_start: &vec![0; rows] };
            let pass = Pass { seed: SEED, step, first_sequence: (number * options.batch) as u64 };
            let store = if number == 0 { Store::Overwrite } else { Store::Accumulate };
            let scale = 1.0 / (PASSES * rows) as f32;
            loss += backprop.train(&device, &model, batch, pass, scale, store).unwrap();
        }
        let norm = backprop.sum(&device).unwrap();
        assert!(norm > settings.clip, "{norm}");
        optimizer.step(&device, &mut model, &backprop.gradients, step, 1e-2, norm, 1.0);
        figures.push([loss.to_bits(), norm.to_bits()]);
    }
    let bits = |tensor: &Tensor<'_, Chip, E>| match tensor {
        Tensor::Matrix(w) => downloaded(&device, w),
        Tensor::Vector(w) => downloaded(&device, w),
    };
    let weights = model.weights.tensors().iter().map(bits).collect();
    let planned = Memory::of::<_, E>(config, Part::WHOLE, Share::alone(), &options, &settings, &device);
    Run { figures, weights, taken: device.memory_taken(), planned }
}

fn downloaded<T: Element>(device: &Chip, buffer: &<Chip as Device>::Buf<T>) -> Vec<u32> {
    let mut values = vec![T::default(); buffer.len()];
    device.download(buffer, 0, &mut values);
    values.into_iter().map(|value| value.to_f32().to_bits()).collect()
}

fn check<E: Element>(config: &Config, settings: Settings) {
    let here = run::<E>(config, settings, Offload::None);
    let mut before = here.taken;
    for offload in [Offload::Optimizer, Offload::All] {
        let away = run::<E>(config, settings, offload);
        assert_eq!(away.figures, here.figures, "{offload:?}: loss or norm");
        assert!(away.weights == here.weights, "{offload:?}: weights");
        let (Some(taken), Some(most)) = (away.taken, here.taken) else { continue };
        let planned = |run: &Run| run.planned.device.expect("a device with its own memory has a plan for it");
        assert!(taken <= planned(&away), "{offload:?}: {taken} bytes taken, {} planned", planned(&away));
        assert_eq!(most - taken, planned(&here) - planned(&away), "{offload:?}: bytes less");
        assert!(before.replace(taken) > Some(taken), "{offload:?} takes no less");
        let moved = away.planned.host - here.planned.host;
        assert!(moved >= most - taken, "{offload:?}: what the device does not have, the host has");
    }
}

#[test]
fn adamw_with_split_masters() {
    for config in configs() {
        check::<bf16>(&config, ADAMW);
    }
}

#[test]
fn adamw_in_f32() {
    check::<f32>(&configs()[0], ADAMW);
}

#[test]
fn momentum_with_rounding_at_random() {
    let rule = Rule::Sgd { momentum: 0.9 };
    check::<bf16>(&configs()[0], Settings { rule, stochastic: true, ..ADAMW });
}
