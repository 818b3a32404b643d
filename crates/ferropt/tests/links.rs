//! Runs on several GPUs, one for each rank, which exchange buffers themselves, through NCCL: they train what one rank does, the
//! same bits each time, and end when one of them is lost. Real GPUs or emulated; `scripts/check-cuda-kernels` runs it.

mod lab;

use ferropt_device::cuda::CudaDevice;
use lab::{Lab, text};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What all runs have in common: little work, since an emulated GPU is slow.
const SET: [&str; 8] = [
    "run.device=cuda",
    "run.precision=f32",
    "model.layers=2",
    "data.seq=32",
    "batch.tokens=256",
    "batch.micro_batch=1",
    "checkpoint.every=100",
    "validation.max_tokens=32",
];
const STEPS: u64 = 3;
const LINKED: &str = "ranks exchange their devices' memory through NCCL 2.";

fn command(lab: &Lab, run: &str, steps: u64, set: &[&str]) -> Command {
    let set: Vec<&str> = SET.into_iter().chain(set.iter().copied()).collect();
    lab::train(&lab.config(run, steps), &set)
}

/// Trains on so many ranks, and returns what was said.
fn train(lab: &Lab, run: &str, set: &[&str], ranks: usize, variables: &[(&str, &str)]) -> String {
    let mut command = command(lab, run, STEPS, set);
    command.envs(variables.iter().copied());
    if ranks > 1 {
        command.args(["--ranks", &ranks.to_string()]);
    }
    let out = command.output().unwrap();
    assert!(out.status.success(), "{run}: {}", text(&out));
    text(&out)
}

fn enough_gpus(ranks: usize) -> bool {
    let gpus = CudaDevice::count().unwrap();
    if gpus < ranks {
        println!("skipped: {ranks} ranks, for which there are only {gpus} GPUs");
    }
    gpus >= ranks
}

fn assert_near(lab: &Lab, run: &str) {
    for (key, tolerance) in [("loss", 2e-5), ("grad_norm", 1e-3)] {
        let (one, many) = (lab.metric("one", key), lab.metric(run, key));
        assert_eq!(one.len(), STEPS as usize);
        assert_eq!(one.len(), many.len(), "{run}: number of steps");
        for ((step, a), (_, b)) in one.iter().zip(&many) {
            assert!((a - b).abs() <= tolerance * a, "{run}, step {step}: {key} {b}, on one rank {a}");
        }
    }
}

#[test]
#[ignore = "needs GPUs, real or emulated; scripts/check-cuda-kernels runs it"]
fn ranks_on_gpus_train_what_one_does() {
    let lab = Lab::new();
    train(&lab, "one", &[], 1, &[]);
    for (run, ranks, axes) in [
        ("shard", 2, ["parallel.shard=2", "parallel.tensor=1"]),
        ("tensor", 4, ["parallel.shard=2", "parallel.tensor=2"]),
        ("pipeline", 4, ["parallel.shard=1", "parallel.pipeline=2"]),
    ] {
        if !enough_gpus(ranks) {
            continue;
        }
        let said = train(&lab, run, &axes, ranks, &[]);
        assert!(said.contains(LINKED) && said.contains("in a step, as planned"), "{run}: {said}");
        assert_near(&lab, run);
    }
    if enough_gpus(2) {
        // Once more the same bits; through copies the same to rounding.
        let axes = ["parallel.shard=2"];
        train(&lab, "again", &axes, 2, &[]);
        assert!(lab.tensors("again", STEPS) == lab.tensors("shard", STEPS), "the same run has other bits");
        let said = train(&lab, "copies", &axes, 2, &[("FERROPT_NCCL", "0")]);
        assert!(said.contains("ranks exchange copies of their devices' memory"), "{said}");
        assert!(said.contains("FERROPT_NCCL is 0") && said.contains("in a step, as planned"), "{said}");
        assert_near(&lab, "copies");
    }
}

#[test]
#[ignore = "needs GPUs, real or emulated; scripts/check-cuda-kernels runs it"]
fn a_rank_that_is_killed_ends_the_others() {
    if !enough_gpus(2) {
        return;
    }
    let (lab, port) = (Lab::new(), lab::free_port().to_string());
    let start = |rank: usize| {
        let mut command = command(&lab, "killed", 10_000, &["parallel.shard=2"]);
        command.env("RANK", rank.to_string()).env("WORLD_SIZE", "2");
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let (first, mut second) = (start(0), start(1));
    let until = Instant::now() + Duration::from_secs(60);
    while lab.told("killed") < 3 {
        assert!(Instant::now() < until, "the run does not get going");
        std::thread::sleep(Duration::from_millis(20));
    }
    second.kill().unwrap();
    second.wait().unwrap();
    let killed = Instant::now();
    let out = first.wait_with_output().unwrap();
    assert!(killed.elapsed() < Duration::from_secs(30), "{:?}", killed.elapsed());
    assert!(!out.status.success());
    let said = text(&out);
    assert!(said.contains(LINKED) && said.contains("rank 1") && said.contains("is gone"), "{said}");
}
