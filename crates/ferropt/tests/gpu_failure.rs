//! A GPU that goes wrong in the middle of its work: an error with its words, after which a run goes on from its last checkpoint.

mod lab;

use lab::{Lab, ferropt, text};
use std::process::Output;

const STEPS: u64 = 4;

/// Little work, since an emulated GPU is slow.
const SET: [&str; 7] = [
    "run.device=cuda",
    "checkpoint.every=1",
    "schedule.total=4",
    "schedule.warmup=1",
    "data.seq=32",
    "batch.tokens=64",
    "validation.max_tokens=32",
];

/// Trains with a GPU that fails after so many kernels.
fn train(lab: &Lab, run: &str, kernels: Option<u64>) -> Output {
    let mut command = lab::train(&lab.config(run, STEPS), &SET);
    command.envs(kernels.map(|kernels| ("FERROPT_EMULATED_FAILURE", kernels.to_string())));
    command.output().unwrap()
}

/// The error, of what failed, and nothing of a panic.
fn assert_told(said: &str, what: &str) {
    assert!(said.contains(&format!("the GPU emulated GPU failed: {what}")), "{said}");
    assert!(said.contains("an illegal memory access was encountered"), "{said}");
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
#[ignore = "needs an emulated GPU; scripts/check-cuda-kernels runs it"]
fn a_run_whose_gpu_fails_says_so_and_goes_on_later_with_the_same_bits() {
    let lab = Lab::new();
    let whole = train(&lab, "whole", None);
    assert!(whole.status.success(), "{}", text(&whole));
    let mut failed = 0;
    // In the first step, in a later one, and perhaps behind the last; when layers are graphs, as one of those.
    for (kernels, what) in
        [(20, "kernel "), (400, "kernel "), (700, "a graph does not start"), (1000, "a graph does not start")]
    {
        let run = format!("after-{kernels}");
        let out = train(&lab, &run, Some(kernels));
        if !out.status.success() {
            failed += 1;
            assert_eq!(out.status.code(), Some(75), "{}", text(&out));
            assert_told(&text(&out), what);
        }
        let rest = train(&lab, &run, None);
        assert!(rest.status.success(), "{}", text(&rest));
        assert!(lab.tensors(&run, STEPS) == lab.tensors("whole", STEPS), "after {kernels}: other weights");
    }
    assert!(failed >= 3, "only {failed} runs failed");
}

#[test]
#[ignore = "needs an emulated GPU; scripts/check-cuda-kernels runs it"]
fn a_text_whose_gpu_fails_ends_in_an_error() {
    let lab = Lab::new();
    assert!(train(&lab, "run", None).status.success());
    for kernels in ["0", "40", "150"] {
        let out = ferropt()
            .args(["generate", "--device", "cuda", "--max-tokens", "40", "--model"])
            .arg(lab.path("run"))
            .arg("The")
            .env("FERROPT_EMULATED_FAILURE", kernels)
            // One by one, so that what fails is a kernel.
            .env("FERROPT_CUDA_GRAPHS", "0")
            .output()
            .unwrap();
        assert!(!out.status.success(), "{kernels}: {}", text(&out));
        assert_told(&text(&out), "kernel ");
    }
}
