//! Passes on many ranks, as threads of one process, give the losses and gradients of passes on one. On the processor; with
//! `FERROPT_TEST_DEVICE=cuda` on GPUs, real or emulated, of which ranks take the next ones in turn, and fewer layouts.

use ferropt_device::cuda::CudaDevice;
use ferropt_device::rng::{Purpose, Stream};
use ferropt_device::{Buffer, Chip, DType, Device, Element, Store, Which, bf16};
use ferropt_mesh::{Axes, Mesh, World};
use ferropt_model::{
    Backprop, Batch, Config, Held, Initial, Model, Offload, Options, Part, Pass, Place, Recompute, Task,
    initial_shard, schedule,
};

const SEED: u64 = 5;
/// Sequences of a step, and their length.
const SEQUENCES: usize = 8;
const SEQ: usize = 12;

fn config(post_norm: bool) -> Config {
    let base = Config::preset("tiny").unwrap();
    let config = Config { layers: 3, heads: 4, vocab: 48, positions: 16, ..base };
    let config = Config { dropout: 0.2, attention_dropout: 0.1, ..config };
    if post_norm { Config { post_norm, embedding_width: 24, ..config } } else { config }
}

/// Values that are neither small nor all alike, so that nothing can be left out without notice.
fn noisy(held: &Held) -> Vec<f32> {
    let mean = f32::from(held.parameter.initial == Initial::Ones);
    let mut noise = held.clone();
    noise.parameter.initial = Initial::Normal(0.1);
    let mut values = initial_shard(&noise, SEED, None);
    values[..held.shard.len()].iter_mut().for_each(|v| *v += mean);
    values
}

fn ids(which: usize, len: usize, below: usize) -> Vec<u32> {
    let stream = Stream::new(SEED, Purpose::Sampling, which, 0);
    (0..len).map(|i| stream.word(0, i) % below as u32).collect()
}

/// What one rank has computed.
struct Computed {
    loss: f64,
    score: f64,
    norm: f64,
    /// What is held of each parameter, and the gradients of that.
    gradients: Vec<(Held, Vec<f32>)>,
}

/// How a step is computed.
#[derive(Clone, Copy)]
struct How {
    /// Sequences in a micro-batch.
    batch: usize,
    recompute: Recompute,
    offload: Offload,
    /// Sums over ranks are on their way behind the last backward pass.
    behind: bool,
}

impl How {
    const PLAIN: How = How { batch: 2, recompute: Recompute::None, offload: Offload::None, behind: true };
}

/// The device that is tested.
fn which() -> Which {
    let name = std::env::var("FERROPT_TEST_DEVICE").unwrap_or("cpu".into());
    name.parse().expect("a device's name in FERROPT_TEST_DEVICE")
}

/// That of a rank.
fn device(rank: usize) -> Chip {
    let which = match which() {
        Which::Cpu => Which::Cpu,
        Which::Cuda(first) => Which::Cuda((first + rank) % CudaDevice::count().unwrap()),
    };
    Chip::open(which, Some(1), false).expect("the device that is to be tested")
}

/// A step's passes, twice, so that the second finds what the first left; and a score.
fn passes<E: Element>(config: &Config, how: How, mesh: Mesh) -> Computed {
    let How { batch, recompute, offload, behind } = how;
    let device = device(mesh.world.rank());
    let (mesh, _) = mesh.linked(&device).unwrap();
    let part = Part::of_rank(mesh.axes, config.layers, mesh.world.rank());
    let mut model = Model::<_, E>::part(&device, config, part, offload).unwrap();
    for held in model.held().to_vec() {
        model.set(&device, held.index, &noisy(&held)).unwrap();
    }
    let options = Options { batch, seq: SEQ, recompute, stop_at_documents: true, offload };
    let (rank, ranks) = (mesh.data.rank(), mesh.data.size());
    let stage = Place { rank: mesh.pipeline.rank(), of: mesh.pipeline.size() };
    let mut backprop = Backprop::<_, E>::on(&device, config, options, mesh).unwrap();
    let (tokens, targets) = (ids(1, SEQUENCES * SEQ, config.vocab), ids(2, SEQUENCES * SEQ, config.vocab));
    let doc_start: Vec<u32> = (0..SEQUENCES * SEQ).map(|i| if i % SEQ < 5 { 0 } else { 5 }).collect();
    let mut part = Computed { loss: 0.0, score: 0.0, norm: 0.0, gradients: Vec::new() };
    for _ in 0..2 {
        part.loss = 0.0;
        backprop.begin();
        let micro_batches = SEQUENCES / (batch * ranks);
        for task in schedule(stage, micro_batches) {
            match task {
                Task::Forward(micro) => {
                    let first = (micro * ranks + rank) * batch;
                    let rows = first * SEQ..(first + batch) * SEQ;
                    let doc_start = &doc_start[rows.clone()];
                    let batch = Batch { tokens: &tokens[rows.clone()], targets: &targets[rows], doc_start };
                    let pass = Pass { seed: SEED, step: 3, first_sequence: first as u64 };
                    backprop.forward_pass(&device, &model, micro, batch, pass).unwrap();
                }
                Task::Backward(micro) => {
                    let store = if micro == 0 { Store::Overwrite } else { Store::Accumulate };
                    let last = behind && micro + 1 == micro_batches;
                    part.loss += backprop.backward_pass(&device, &model, micro, 0.01, store, last).unwrap();
                }
            }
        }
        part.norm = backprop.sum(&device).unwrap();
        let rows = ..batch * SEQ;
        let batch = Batch { tokens: &tokens[rows], targets: &targets[rows], doc_start: &doc_start[rows] };
        part.score = backprop.score(&device, &model, batch).unwrap();
    }
    let tensors = backprop.gradients.tensors().into_iter().map(|g| {
        let flat = g.flat();
        let mut values = vec![0.0; flat.len()];
        device.download(flat, 0, &mut values);
        values
    });
    part.gradients = model.held().iter().cloned().zip(tensors).collect();
    part
}

/// The same on all ranks of a mesh: losses added up, gradients put together.
fn on_ranks<E: Element>(config: &Config, how: How, axes: Axes) -> Computed {
    let worlds = World::local(axes.tensor * axes.shard * axes.replicate * axes.pipeline).unwrap();
    let parts: Vec<Computed> = std::thread::scope(|scope| {
        let start = |world| scope.spawn(move || passes::<E>(config, how, Mesh::new(world, axes).unwrap()));
        let ranks: Vec<_> = worlds.into_iter().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    let mut gradients: Vec<(Held, Vec<f32>)> = Vec::new();
    for (index, parameter) in config.parameters().into_iter().enumerate() {
        let mut whole = vec![f32::NAN; parameter.elements()];
        for part in &parts {
            let (held, values) = &part.gradients[index];
            for (at, start, len) in held.pieces() {
                for i in 0..len {
                    let before = std::mem::replace(&mut whole[start + i], values[at + i]);
                    assert!(
                        before.is_nan() || before == values[at + i],
                        "{:?}: those who hold the same have the same",
                        parameter.names
                    );
                }
            }
        }
        gradients.push((Held::new(parameter, index, Part::WHOLE), whole));
    }
    // The last stage has the losses: one part of each group that shares sequences.
    let first = parts.len() / axes.pipeline * (axes.pipeline - 1);
    let last = &parts[first..];
    let loss = last.iter().step_by(axes.tensor).map(|part| part.loss).sum();
    assert!(parts.iter().all(|part| part.norm == parts[0].norm));
    assert!(last.iter().all(|part| part.score == last[0].score));
    assert!(parts[..first].iter().all(|part| (part.loss, part.score) == (0.0, 0.0)));
    Computed { loss, score: last[0].score, norm: parts[0].norm, gradients }
}

/// Root of the mean square of the differences.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let squares: f64 = a.iter().zip(b).map(|(a, b)| (*a as f64 - *b as f64).powi(2)).sum();
    (squares / a.len() as f64).sqrt()
}

/// In f32, layouts agree to 1e-5 or so. In bf16 they are about as far from each other as one rank is from f32: what is
/// summed in parts is rounded before it is added up.
fn check<E: Element>(post_norm: bool, layouts: &[[usize; 4]]) {
    let config = config(post_norm);
    let exact = passes::<f32>(&config, How::PLAIN, Mesh::solo());
    let one = passes::<E>(&config, How::PLAIN, Mesh::solo());
    let tolerance = if E::DTYPE == DType::F32 { 1e-6 } else { 4e-3 };
    for (number, [tensor, shard, replicate, pipeline]) in layouts.iter().copied().enumerate() {
        let axes = Axes { tensor, shard, replicate, pipeline };
        let recompute = [Recompute::None, Recompute::Selective, Recompute::Full][number % 3];
        let batch = if (shard * replicate) % 4 == 0 { 1 } else { 2 };
        let many = on_ranks::<E>(&config, How { batch, recompute, ..How::PLAIN }, axes);
        let what = format!("{axes:?}, {recompute:?}, post-norm {post_norm}, {}", E::DTYPE);
        let near = |name: &str, a: f64, b: f64| {
            assert!((a - b).abs() <= tolerance * a.abs(), "{what}: {name} {b}, on one rank {a}");
        };
        near("loss", one.loss, many.loss);
        near("norm", one.norm, many.norm);
        // The score is of the first sequences.
        if batch == 2 {
            near("score", one.score, many.score);
        }
        let tensors = one.gradients.iter().zip(&many.gradients).zip(&exact.gradients);
        for (((held, a), (_, b)), (_, exact)) in tensors {
            let (off, rounding) = (distance(a, b), distance(a, exact));
            let size = distance(a, &vec![0.0; a.len()]);
            let name = &held.parameter.names[0];
            assert!(
                off <= 2.0 * rounding + 2e-5 * size + 1e-9,
                "{what}: {name} is off by {off:e} of {size:e}; rounding is {rounding:e}"
            );
        }
    }
}

/// Tensor, shard, replicate, pipeline.
const LAYOUTS: [[usize; 4]; 18] = [
    [1, 2, 1, 1],
    [1, 1, 2, 1],
    [1, 4, 1, 1],
    [2, 1, 1, 1],
    [1, 2, 2, 1],
    [4, 1, 1, 1],
    [2, 2, 1, 1],
    [2, 1, 2, 1],
    [2, 1, 1, 1],
    [2, 2, 2, 1],
    [4, 2, 1, 1],
    [1, 1, 1, 2],
    [1, 1, 1, 3],
    [1, 2, 1, 3],
    [2, 1, 1, 2],
    [1, 1, 2, 3],
    [2, 2, 1, 2],
    [1, 4, 1, 2],
];

/// On GPUs, which may be emulated and slow, every axis at least once.
fn layouts() -> Vec<[usize; 4]> {
    match which() {
        Which::Cpu => LAYOUTS.to_vec(),
        Which::Cuda(_) => vec![[1, 2, 1, 1], [2, 1, 2, 1], [2, 1, 1, 3]],
    }
}

#[test]
fn layouts_give_the_same_gradients() {
    check::<f32>(false, &layouts());
}

#[test]
fn layouts_give_the_same_gradients_with_post_norm_and_projections() {
    check::<f32>(true, &layouts());
}

#[test]
fn bf16_layouts_differ_by_rounding_alone() {
    check::<bf16>(false, &layouts());
    check::<bf16>(true, &layouts());
}

/// Where weights and sums are does not matter, on any layout, nor whether a layer is fetched for one rank or for many.
#[test]
fn offload_changes_no_bit() {
    for config in [config(false), config(true), Config { layers: 1, ..config(false) }] {
        for [tensor, shard, replicate, pipeline] in
            [[1, 1, 1, 1], [1, 2, 1, 1], [2, 1, 1, 1], [1, 1, 2, 1], [1, 1, 1, 3], [2, 2, 1, 3]]
        {
            let axes = Axes { tensor, shard, replicate, pipeline };
            if pipeline > config.layers {
                continue;
            }
            let [here, away] = [Offload::None, Offload::All].map(|offload| {
                on_ranks::<bf16>(&config, How { recompute: Recompute::Full, offload, ..How::PLAIN }, axes)
            });
            assert_same_bits(&here, &away, &format!("{axes:?}"));
        }
    }
}

/// Sums that are on their way while layers compute have the bits of those that are made afterwards.
#[test]
fn sums_behind_the_backward_pass_change_no_bit() {
    for [tensor, shard, replicate, pipeline] in
        [[1, 1, 2, 1], [2, 1, 2, 1], [1, 2, 2, 1], [2, 1, 1, 2], [1, 1, 2, 3], [2, 2, 2, 1]]
    {
        let axes = Axes { tensor, shard, replicate, pipeline };
        for offload in [Offload::None, Offload::All] {
            let [after, behind] = [false, true].map(|behind| {
                on_ranks::<bf16>(&config(false), How { batch: 1, behind, offload, ..How::PLAIN }, axes)
            });
            assert_same_bits(&after, &behind, &format!("{axes:?}, {offload:?}"));
        }
    }
}

fn assert_same_bits(one: &Computed, other: &Computed, what: &str) {
    let figures = |c: &Computed| [c.loss, c.score, c.norm].map(f64::to_bits);
    assert_eq!(figures(one), figures(other), "{what}");
    for ((held, a), (_, b)) in one.gradients.iter().zip(&other.gradients) {
        let same = a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "{what}: the gradient of {} differs", held.parameter.names[0]);
    }
}

#[test]
fn what_cannot_be_divided_is_refused() {
    let (device, config) = (device(0), config(false));
    let options = Options {
        batch: 1,
        seq: 7,
        recompute: Recompute::None,
        stop_at_documents: false,
        offload: Offload::None,
    };
    let world = World::local(2).unwrap().swap_remove(0);
    let axes = Axes { tensor: 2, shard: 1, replicate: 1, pipeline: 1 };
    let mesh = Mesh::new(world, axes).unwrap();
    let refused = Backprop::<_, f32>::on(&device, &config, options, mesh).err().unwrap().to_string();
    assert!(refused.contains("7 is no multiple of 2"), "{refused}");
}

#[test]
fn one_forward_one_backward() {
    use Task::{Backward as B, Forward as F};
    assert_eq!(schedule(Place::ALONE, 2), [F(0), B(0), F(1), B(1)]);
    assert_eq!(schedule(Place { rank: 0, of: 3 }, 4), [F(0), F(1), F(2), B(0), F(3), B(1), B(2), B(3)]);
    assert_eq!(schedule(Place { rank: 2, of: 3 }, 2), [F(0), B(0), F(1), B(1)]);
    // Fewer micro-batches than stages.
    assert_eq!(schedule(Place { rank: 0, of: 4 }, 2), [F(0), F(1), B(0), B(1)]);
}
