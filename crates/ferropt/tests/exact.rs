//! Layout never changes the answer: threads and recomputation leave every bit alone, micro-batches change rounding.

mod lab;

use lab::Lab;

const STEPS: u64 = 12;

/// Final tensors of a run with overrides.
fn run(lab: &Lab, name: &str, set: &[&str]) -> std::collections::BTreeMap<String, Vec<u8>> {
    lab.train(&lab.config(name, STEPS), set);
    lab.tensors(name, STEPS)
}

#[test]
fn recomputation_and_threads_leave_every_bit_alone() {
    let lab = Lab::new();
    for precision in ["f32", "bf16", "f16"] {
        let precision_key = format!("run.precision={precision}");
        let reference = run(&lab, &format!("{precision}-reference"), &[&precision_key]);
        for key in ["run.recompute=selective", "run.recompute=full", "run.threads=2", "run.threads=3"] {
            let other =
                run(&lab, &format!("{precision}-{}", key.replace(['.', '='], "-")), &[&precision_key, key]);
            assert!(other == reference, "{key} changes the weights in {precision}");
        }
        let other = run(&lab, &format!("{precision}-seed"), &[&precision_key, "run.seed=2"]);
        assert!(other != reference, "the seed has no effect");
    }
}

#[test]
fn the_same_run_twice_is_the_same_bits_with_stochastic_rounding_too() {
    let lab = Lab::new();
    let set = ["run.weights=bf16-stochastic"];
    assert!(run(&lab, "a", &set) == run(&lab, "b", &set));
}

#[test]
fn micro_batches_agree_to_rounding() {
    let lab = Lab::new();
    // Dropout stays on: its masks must not depend on the split.
    let losses = |name: &str, set: &[&str]| {
        run(&lab, name, set);
        lab.metric(name, "loss")
    };
    let one = losses("one", &["run.precision=f32", "batch.micro_batch=8"]);
    for (name, key) in [("four", "batch.micro_batch=2"), ("eight", "batch.micro_batch=1")] {
        let many = losses(name, &["run.precision=f32", key]);
        assert_eq!(one.len(), many.len());
        for ((step, a), (_, b)) in one.iter().zip(&many) {
            assert!((a - b).abs() < 2e-5 * a, "{key}, step {step}: loss {b}, in one pass {a}");
        }
    }
}
