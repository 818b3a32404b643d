//! A GPU's state in the host's memory (`run.offload`): runs compute the same bits, and go on from each other's checkpoints.

mod lab;

use lab::{Lab, text};

const STEPS: u64 = 6;

/// What all runs have in common: a schedule that does not follow from the length of the run, and three passes a step.
const SET: [&str; 6] = [
    "run.device=cuda",
    "run.recompute=full",
    "schedule.total=6",
    "schedule.warmup=1",
    "batch.tokens=384",
    "batch.micro_batch=2",
];

#[test]
#[ignore = "needs a GPU, real or emulated; scripts/check-cuda-kernels runs it"]
fn offloaded_runs_are_the_same_bits_and_go_on_from_each_other() {
    let lab = Lab::new();
    for (name, weights) in [("split", "run.weights=split"), ("stochastic", "run.weights=bf16-stochastic")] {
        let train = |run: &str, steps: u64, offload: &str| {
            let offload = format!("run.offload={offload}");
            let set: Vec<&str> = SET.into_iter().chain([weights, &*offload]).collect();
            let said = text(&lab.train(&lab.config(run, steps), &set));
            assert!(said.contains("GPU's memory: "), "{said}");
        };
        let figures = |run: &str| ["loss", "grad_norm"].map(|key| lab.metric(run, key));
        let plain = format!("{name}-none");
        train(&plain, STEPS, "none");
        for offload in ["optimizer", "all"] {
            let run = format!("{name}-{offload}");
            train(&run, STEPS, offload);
            assert_eq!(figures(&run), figures(&plain), "{run}");
            assert!(lab.tensors(&run, STEPS) == lab.tensors(&plain, STEPS), "{run}: other bits are saved");
        }
        // Each part of this one goes on from a checkpoint that another kind of run wrote.
        let mixed = format!("{name}-mixed");
        for (steps, offload) in [(1, "all"), (2, "none"), (3, "optimizer"), (4, "all"), (STEPS, "none")] {
            train(&mixed, steps, offload);
        }
        assert_eq!(figures(&mixed), figures(&plain), "{mixed}");
        assert!(lab.tensors(&mixed, STEPS) == lab.tensors(&plain, STEPS), "{mixed}: other bits are saved");
    }
}
