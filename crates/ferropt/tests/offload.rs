//! A GPU's state in the host's memory (`run.offload`): runs compute the same bits, and go on from each other's checkpoints.

mod lab;

use lab::{Lab, text};
use std::process::Output;

const STEPS: u64 = 4;

/// What all runs have in common: a schedule that does not follow from the length of the run, and little work, since an emulated
/// GPU is slow.
const SET: [&str; 8] = [
    "run.device=cuda",
    "run.recompute=full",
    "schedule.total=4",
    "schedule.warmup=1",
    "data.seq=32",
    "batch.tokens=64",
    "batch.micro_batch=1",
    "validation.max_tokens=32",
];

/// Trains so many steps, as one rank or as many on this machine.
fn train(lab: &Lab, run: &str, steps: u64, set: &[&str], ranks: &[&str]) -> Output {
    let set: Vec<&str> = SET.into_iter().chain(set.iter().copied()).collect();
    let out = lab::train(&lab.config(run, steps), &set).args(ranks).output().unwrap();
    assert!(out.status.success(), "{run}: {}", text(&out));
    out
}

fn figures(lab: &Lab, run: &str) -> [Vec<(u64, f64)>; 2] {
    ["loss", "grad_norm"].map(|key| lab.metric(run, key))
}

#[test]
#[ignore = "needs a GPU, real or emulated; scripts/check-cuda-kernels runs it"]
fn offloaded_runs_are_the_same_bits_and_go_on_from_each_other() {
    let lab = Lab::new();
    let run = |name: &str, steps: u64, offload: &str| {
        let said = text(&train(&lab, name, steps, &[&format!("run.offload={offload}")], &[]));
        assert!(said.contains("GPU's memory: "), "{said}");
    };
    run("none", STEPS, "none");
    let same = |name: &str| {
        assert_eq!(figures(&lab, name), figures(&lab, "none"), "{name}");
        assert!(lab.tensors(name, STEPS) == lab.tensors("none", STEPS), "{name}: other bits are saved");
    };
    for offload in ["optimizer", "all"] {
        run(offload, STEPS, offload);
        same(offload);
    }
    // Each part of this one goes on from a checkpoint that another kind of run wrote.
    for (steps, offload) in [(1, "all"), (2, "none"), (3, "optimizer"), (STEPS, "all")] {
        run("mixed", steps, offload);
    }
    same("mixed");
}

/// Sixteen ranks in the layout that docs/parallel.md plans 175B for, and stages, which pass rows on. The emulated GPU is there for
/// each rank.
#[test]
#[ignore = "needs a GPU, real or emulated; scripts/check-cuda-kernels runs it"]
fn ranks_on_gpus_are_the_same_bits_with_their_state_on_the_host() {
    let lab = Lab::new();
    for (layout, ranks, axes) in [
        ("tensor", "16", ["parallel.tensor=2", "parallel.shard=8"]),
        ("pipeline", "4", ["parallel.pipeline=2", "parallel.shard=2"]),
    ] {
        for offload in ["none", "all"] {
            let key = format!("run.offload={offload}");
            let set: Vec<&str> = [&*key, "batch.tokens=256"].into_iter().chain(axes).collect();
            train(&lab, &format!("{layout}-{offload}"), 2, &set, &["--ranks", ranks]);
        }
        let [here, away] = ["none", "all"].map(|offload| format!("{layout}-{offload}"));
        assert_eq!(figures(&lab, &away), figures(&lab, &here), "{layout}");
        assert!(lab.tensors(&away, 2) == lab.tensors(&here, 2), "{layout}: other bits are saved");
    }
}
