//! Layouts never change the answer: a run on many ranks has the losses, the gradient norms and the final weights of a run
//! on one, to rounding, however its work is shared out. Ranks are processes: under `mpirun` where that is installed,
//! else started with the variables that torchrun sets. Every eighth layout, every second one with
//! `FERROPT_LAYOUTS=half`, or all 36 with `FERROPT_LAYOUTS=all`.

mod lab;

use ferropt_train::checkpoint::Dtype;
use lab::Lab;
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

const STEPS: u64 = 30;

/// How a run's work is shared out.
#[derive(Clone, Copy, Debug)]
struct Layout {
    tensor: usize,
    shard: usize,
    replicate: usize,
    pipeline: usize,
    recompute: &'static str,
    micro_batch: usize,
}

const fn layout(
    [tensor, shard, replicate, pipeline]: [usize; 4],
    recompute: &'static str,
    micro_batch: usize,
) -> Layout {
    Layout { tensor, shard, replicate, pipeline, recompute, micro_batch }
}

const NONE: &str = "none";
const SELECTIVE: &str = "selective";
const FULL: &str = "full";

/// Of pre-norm models.
const LAYOUTS: [Layout; 24] = [
    layout([1, 2, 1, 1], NONE, 4),
    layout([1, 1, 2, 1], SELECTIVE, 2),
    layout([1, 4, 1, 1], FULL, 1),
    layout([1, 2, 2, 1], NONE, 2),
    layout([1, 1, 4, 1], NONE, 1),
    layout([1, 3, 1, 1], NONE, 2),
    layout([1, 8, 1, 1], NONE, 1),
    layout([1, 4, 2, 1], SELECTIVE, 1),
    layout([1, 2, 4, 1], FULL, 1),
    layout([2, 1, 1, 1], NONE, 4),
    layout([2, 1, 1, 1], FULL, 8),
    layout([2, 2, 1, 1], SELECTIVE, 2),
    layout([2, 1, 2, 1], NONE, 1),
    layout([2, 3, 1, 1], FULL, 1),
    layout([2, 2, 2, 1], NONE, 2),
    layout([2, 4, 1, 1], FULL, 1),
    layout([4, 1, 1, 1], NONE, 8),
    layout([4, 2, 1, 1], SELECTIVE, 2),
    layout([1, 1, 1, 2], NONE, 4),
    layout([1, 1, 1, 3], FULL, 2),
    layout([1, 2, 1, 3], NONE, 2),
    layout([2, 1, 1, 2], SELECTIVE, 2),
    layout([2, 2, 1, 2], FULL, 1),
    layout([1, 2, 2, 2], NONE, 1),
];

/// Of post-norm models, whose embeddings are narrower, as 350m's.
const POST_NORM: [Layout; 12] = [
    layout([1, 2, 1, 1], NONE, 4),
    layout([1, 4, 1, 1], FULL, 2),
    layout([1, 2, 2, 1], SELECTIVE, 1),
    layout([2, 1, 1, 1], NONE, 8),
    layout([2, 1, 1, 1], FULL, 2),
    layout([2, 2, 1, 1], SELECTIVE, 2),
    layout([2, 2, 2, 1], FULL, 1),
    layout([4, 1, 1, 1], NONE, 2),
    layout([4, 2, 1, 1], FULL, 1),
    layout([1, 1, 1, 3], NONE, 4),
    layout([2, 1, 1, 2], FULL, 2),
    layout([1, 2, 1, 3], SELECTIVE, 1),
];

impl Layout {
    fn ranks(self) -> usize {
        self.tensor * self.shard * self.replicate * self.pipeline
    }

    fn set(self) -> Vec<String> {
        vec![
            format!("parallel.tensor={}", self.tensor),
            format!("parallel.shard={}", self.shard),
            format!("parallel.pipeline={}", self.pipeline),
            format!("run.recompute={}", self.recompute),
            format!("batch.micro_batch={}", self.micro_batch),
        ]
    }
}

/// 24 sequences of 16 tokens in a step, f32; dropout stays on, for its masks must not depend on the layout.
fn common(post_norm: bool) -> Vec<String> {
    let model = "model.layers=3 model.heads=4 model.vocab=264 model.positions=16 batch.tokens=384 run.precision=f32 \
                 optimizer.lr=2e-3 checkpoint.every=15 checkpoint.keep_last=9 validation.every=15 run.threads=1";
    let post = if post_norm { " model.post_norm=true model.embedding_width=16" } else { "" };
    format!("{model}{post}").split_whitespace().map(String::from).collect()
}

/// Whether `mpirun` is there.
fn has_mpi() -> bool {
    let found = Command::new("mpirun").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    found.is_ok_and(|status| status.success())
}

/// Trains on so many ranks, which send what they should.
fn train(config: &Path, set: &[String], ranks: usize) {
    let set: Vec<&str> = set.iter().map(String::as_str).collect();
    let one = lab::train(config, &set);
    let outputs = if ranks > 1 && has_mpi() {
        let mut command = Command::new("mpirun");
        command.args([
            "--allow-run-as-root",
            "--oversubscribe",
            "--bind-to",
            "none",
            "-n",
            &ranks.to_string(),
        ]);
        command.arg(one.get_program()).args(one.get_args());
        vec![command.output().unwrap()]
    } else {
        let port = lab::free_port().to_string();
        let start = |rank: usize| {
            let mut command = lab::train(config, &set);
            if ranks > 1 {
                let variables = [
                    ("RANK", rank.to_string()),
                    ("WORLD_SIZE", ranks.to_string()),
                    ("MASTER_ADDR", "127.0.0.1".into()),
                    ("MASTER_PORT", port.clone()),
                ];
                command.envs(variables);
            }
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let processes: Vec<_> = (0..ranks).map(start).collect();
        processes.into_iter().map(|process| process.wait_with_output().unwrap()).collect()
    };
    for (rank, out) in outputs.iter().enumerate() {
        assert!(out.status.success(), "{ranks} ranks, {set:?}: rank {rank} failed:\n{}", lab::text(out));
    }
    if ranks > 1 {
        let told = lab::text(&outputs[0]);
        assert!(told.contains("in a step, as planned"), "{ranks} ranks, {set:?}:\n{told}");
    }
}

/// What is compared: losses and gradient norms of all steps, and the last weights.
struct Run {
    losses: Vec<(u64, f64)>,
    norms: Vec<(u64, f64)>,
    weights: BTreeMap<String, Vec<f32>>,
}

fn run(lab: &Lab, name: &str, set: &[String], layout: Option<Layout>) -> Run {
    let set: Vec<String> = set.iter().cloned().chain(layout.into_iter().flat_map(Layout::set)).collect();
    train(&lab.config(name, STEPS), &set, layout.map_or(1, Layout::ranks));
    read(lab, name)
}

fn read(lab: &Lab, name: &str) -> Run {
    let mut weights = BTreeMap::new();
    let model = lab.tensors(name, STEPS).into_iter().filter(|(file, _)| file.starts_with("model"));
    for (_, bytes) in model {
        for (tensor, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            assert_eq!(view.dtype(), Dtype::F32);
            let values = view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            weights.insert(tensor.to_string(), values);
        }
    }
    Run { losses: lab.metric(name, "loss"), norms: lab.metric(name, "grad_norm"), weights }
}

/// Rounding differs and grows along a run; a gradient that is lost or counted twice shows in the first steps.
fn assert_same(what: &str, one: &Run, many: &Run) {
    let close = |name: &str, one: &[(u64, f64)], many: &[(u64, f64)], tolerance: f64| {
        assert_eq!(one.len(), STEPS as usize, "{what}");
        assert_eq!(one.len(), many.len(), "{what}: number of steps");
        for ((step, a), (_, b)) in one.iter().zip(many) {
            assert!((a - b).abs() <= tolerance * a, "{what}, step {step}: {name} {b}, on one rank {a}");
        }
    };
    close("loss", &one.losses, &many.losses, 2e-5);
    close("gradient norm", &one.norms, &many.norms, 1e-3);
    assert_eq!(one.weights.keys().collect::<Vec<_>>(), many.weights.keys().collect::<Vec<_>>(), "{what}");
    for (name, one) in &one.weights {
        let many = &many.weights[name];
        assert_eq!(one.len(), many.len(), "{what}: {name}");
        // Where a gradient is about 0, AdamW makes steps of its rounding; on the whole the weights are the same.
        let root_mean = |squares: f64| (squares / one.len() as f64).sqrt();
        let off = root_mean(one.iter().zip(many).map(|(a, b)| (*a as f64 - *b as f64).powi(2)).sum());
        let size = root_mean(one.iter().map(|a| (*a as f64).powi(2)).sum());
        // Biases of keys change nothing: their gradient is 0 but for rounding, and so are they.
        assert!(off <= 1e-2 * size + 1e-6, "{what}: {name} is off by {off:e} of {size:e}");
    }
}

fn matrix(post_norm: bool, layouts: &[Layout]) {
    if !has_mpi() {
        println!("skipped: mpirun, which is not installed; the ranks talk over TCP instead");
    }
    let lab = Lab::new();
    let set = common(post_norm);
    let one = run(&lab, "one", &set, None);
    let first = one.losses[0].1;
    assert!(one.losses[STEPS as usize - 1].1 < 0.9 * first, "nothing was learnt: {:?}", one.losses);
    let asked = std::env::var("FERROPT_LAYOUTS").unwrap_or_default();
    let wanted = |number: usize| match &*asked {
        "all" => true,
        "half" => number % 2 == 1,
        "" => number % 8 == 7,
        other => panic!("FERROPT_LAYOUTS={other}: expected half or all"),
    };
    for (number, layout) in layouts.iter().enumerate().filter(|(number, _)| wanted(*number)) {
        let many = run(&lab, &format!("many-{number}"), &set, Some(*layout));
        assert_same(&format!("{layout:?}"), &one, &many);
    }
}

#[test]
fn every_layout_trains_the_same_model() {
    matrix(false, &LAYOUTS);
}

#[test]
fn every_layout_trains_the_same_post_norm_model() {
    matrix(true, &POST_NORM);
}

/// Half of a run in one layout, the other half in another.
#[test]
fn a_run_goes_on_in_another_layout() {
    let lab = Lab::new();
    let set = common(false);
    let one = run(&lab, "one", &set, None);
    let ways = [
        (None, Some(layout([2, 2, 1, 1], NONE, 2))),
        (Some(layout([2, 2, 1, 1], FULL, 2)), Some(layout([1, 3, 2, 1], NONE, 4))),
        (Some(layout([1, 2, 2, 1], NONE, 2)), None),
        (Some(layout([4, 1, 1, 1], SELECTIVE, 8)), Some(layout([1, 8, 1, 1], NONE, 3))),
        (Some(layout([1, 2, 1, 3], NONE, 2)), Some(layout([2, 1, 1, 2], FULL, 4))),
    ];
    for (number, (first, then)) in ways.into_iter().enumerate() {
        let name = format!("many-{number}");
        let half = lab.config(&name, STEPS / 2);
        let with = |layout: Option<Layout>| -> Vec<String> {
            // The schedule's length follows from the run's unless it is set.
            let total = [format!("schedule.total={STEPS}"), format!("schedule.warmup={}", STEPS / 10)];
            set.iter().cloned().chain(total).chain(layout.into_iter().flat_map(Layout::set)).collect()
        };
        train(&half, &with(first), first.map_or(1, Layout::ranks));
        train(&lab.config(&name, STEPS), &with(then), then.map_or(1, Layout::ranks));
        assert_same(&format!("{first:?}, then {then:?}"), &one, &read(&lab, &name));
    }
}

/// Halves round more, and at other places where sums are divided.
#[test]
fn runs_in_halves_on_many_ranks_stay_near() {
    let lab = Lab::new();
    for (precision, weights, ways, near) in [
        ("bf16", "split", [[1, 4, 1, 1], [2, 1, 2, 1]], 5e-3),
        ("bf16", "bf16-stochastic", [[2, 2, 1, 1], [1, 2, 1, 2]], 5e-3),
        ("f16", "split", [[2, 2, 1, 1], [1, 2, 1, 2]], 1e-3),
    ] {
        let mut set = common(false);
        set.extend([format!("run.precision={precision}"), format!("run.weights={weights}")]);
        let losses = |name: &str, layout: Option<Layout>| {
            let set: Vec<String> =
                set.iter().cloned().chain(layout.into_iter().flat_map(Layout::set)).collect();
            let name = format!("{precision}-{weights}-{name}");
            train(&lab.config(&name, STEPS), &set, layout.map_or(1, Layout::ranks));
            lab.metric(&name, "loss")
        };
        let one = losses("one", None);
        for (number, way) in ways.into_iter().enumerate() {
            let many = losses(&number.to_string(), Some(layout(way, NONE, 2)));
            for ((step, a), (_, b)) in one.iter().zip(&many) {
                assert!(
                    (a - b).abs() <= near * a,
                    "{precision}, {weights}, {way:?}, step {step}: loss {b}, on one rank {a}"
                );
            }
        }
    }
}

/// Runs three steps in a layout, of which it traces `steps`: when what of that name began on each rank, in microseconds. Phase X is
/// of what is computed, phase b of what is communicated.
fn traced(layout: Layout, steps: u64) -> Vec<impl Fn(&str, &str) -> Vec<f64>> {
    let lab = Lab::new();
    let mut set = common(false);
    set.extend(layout.set());
    set.push(format!("log.trace={steps}"));
    train(&lab.config("traced", 3), &set, layout.ranks());
    let text = std::fs::read(lab.path("traced/trace.json")).unwrap();
    let events: Vec<serde_json::Value> = serde_json::from_slice(&text).unwrap();
    let of_rank = |rank: usize| {
        let events = events.clone();
        move |name: &str, phase: &str| -> Vec<f64> {
            let is = |e: &&serde_json::Value| e["pid"] == rank && e["name"] == name && e["ph"] == phase;
            events.iter().filter(is).map(|e| e["ts"].as_f64().unwrap()).collect()
        }
    };
    (0..layout.ranks()).map(of_rank).collect()
}

#[test]
fn a_trace_shows_every_rank_computing_while_others_weights_come() {
    for times in traced(layout([1, 2, 1, 1], NONE, 4), 2) {
        // Two steps of three micro-batches of four sequences; layers 0 and 1 are still there when a pass begins.
        assert_eq!(times("forward of layer 2", "X").len(), 6);
        assert_eq!(times("optimiser", "X").len(), 2);
        let (asked, computed) =
            (times("all-gather of layer 1 (shard)", "b"), times("forward of layer 0", "X"));
        assert!(
            !asked.is_empty() && asked[0] <= computed[0],
            "the next layer is asked for before this one computes"
        );
    }
}

#[test]
fn gradients_of_replicas_and_parts_are_summed_while_layers_compute() {
    for (axes, group) in [([1, 1, 2, 1], "replicate"), ([2, 1, 1, 1], "tensor")] {
        for times in traced(layout(axes, NONE, 2), 1) {
            // Of the last micro-batch's pass.
            let backward = |l: usize| *times(&format!("backward of layer {l}"), "X").last().unwrap();
            let between = backward(2)..backward(0);
            let sums = times(&format!("all-reduce of layer 2 ({group})"), "b");
            assert!(
                !sums.is_empty() && sums.iter().all(|at| between.contains(at)),
                "{group}: sums of layer 2 begin at {sums:?}, and its pass and that of layer 0 at {between:?}"
            );
        }
    }
}

#[test]
fn layouts_that_do_not_fit_are_refused_before_any_work() {
    let lab = Lab::new();
    for (set, words) in [
        ("parallel.tensor=3", "parallel.tensor = 3 does not divide the 1 ranks"),
        ("parallel.shard=2", "parallel.shard = 2 does not divide the 1 ranks"),
        ("parallel.pipeline=2", "parallel.pipeline = 2 does not divide the 1 ranks"),
        ("parallel.timeout=0", "parallel.timeout = 0"),
    ] {
        let out = lab::train(&lab.config("refused", 5), &[set]).output().unwrap();
        assert!(!out.status.success());
        assert!(lab::text(&out).contains(words), "{set}: {}", lab::text(&out));
        assert!(!lab.path("refused").exists(), "{set}: nothing is begun");
    }
}
