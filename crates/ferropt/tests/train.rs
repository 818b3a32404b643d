//! `ferropt train` as a user meets it.

mod lab;

use lab::{Lab, ferropt, text, train};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn what_does_not_fit_in_memory_is_refused_before_it_is_taken() {
    let lab = Lab::new();
    let config = lab.config("run", 2);
    let set = ["model.layers=", "model.heads=", "model.width=", "model.preset=175b"];
    let out = train(&config, &set).output().unwrap();
    assert_eq!(out.status.code(), Some(1), "{}", text(&out));
    for part in
        [" of memory, and ", "available", "largest part is its", "run.recompute", "run.check_memory = false"]
    {
        assert!(text(&out).contains(part), "{part}: {}", text(&out));
    }
    assert!(!lab.path("run").exists() && !lab.path("cache").exists(), "refused before anything is made");
    let plan = train(&config, &set).arg("--dry-run").output().unwrap();
    assert!(plan.status.success() && text(&plan).contains("note: on this machine"), "{}", text(&plan));
    lab.train(&config, &["run.check_memory=false"]);
}

#[test]
fn learns_validates_and_reports() {
    let lab = Lab::new();
    let out = lab.train(&lab.config("run", 60), &[]);
    let losses = lab.metric("run", "loss");
    assert_eq!(losses.len(), 60);
    let (first, last) = (losses[0].1, losses[59].1);
    assert!((first - 260f64.ln()).abs() < 0.2, "a fresh model guesses evenly: {first}");
    assert!(last < 0.6 * first, "loss {first} -> {last}");
    let validation: serde_json::Value = std::fs::read_to_string(lab.path("run").join("metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap())
        .rfind(|l| l.to_string().contains("held-out"))
        .expect("the held-out set is reported");
    assert!(validation.to_string().contains("bits_per_byte"), "{validation}");
    assert!(text(&out).contains("held-out"), "{}", text(&out));
    let resolved = std::fs::read_to_string(lab.path("run").join("config.toml")).unwrap();
    assert!(resolved.contains("betas") && resolved.contains("warmup"), "{resolved}");
    // Of checkpoints every 5 steps the last two, and the one before that a roll-back would go back to.
    let kept = std::fs::read_dir(lab.path("run").join("checkpoints")).unwrap();
    let mut kept: Vec<String> = kept.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    kept.retain(|name| name.starts_with("step-"));
    kept.sort();
    assert_eq!(kept, ["step-00000050", "step-00000055", "step-00000060"]);
}

#[test]
fn sigterm_saves_and_the_same_command_continues_to_the_same_bits() {
    let lab = Lab::new();
    const STEPS: u64 = 400;
    lab.train(&lab.config("whole", STEPS), &[]);
    let config = lab.config("stopped", STEPS);
    // Never on its own, so that the checkpoint can only come from the signal.
    let set = ["checkpoint.every=100000"];
    let child = train(&config, &set).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while std::fs::read_to_string(lab.path("stopped/metrics.jsonl")).unwrap_or_default().lines().count() < 10
    {
        assert!(Instant::now() < deadline, "no steps within a minute");
        std::thread::sleep(Duration::from_millis(2));
    }
    Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(75), "a scheduler may start it again: {}", text(&out));
    assert!(text(&out).contains("same command"), "says how to continue: {}", text(&out));
    let done = lab.metric("stopped", "loss").len() as u64;
    assert!((10..STEPS).contains(&done), "stopped after {done} steps");
    lab.train(&config, &set);
    assert!(lab.tensors("stopped", STEPS) == lab.tensors("whole", STEPS));
    assert_eq!(lab.metric("stopped", "loss"), lab.metric("whole", "loss"), "each step is reported once");
}

#[test]
fn a_reader_that_leaves_ends_nothing() {
    let lab = Lab::new();
    let config = lab.config("run", 5);
    for set in [&["--dry-run"][..], &[]] {
        let mut command = train(&config, &[]);
        let mut child = command.args(set).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success() && !text(&out).contains("panicked"), "{set:?}: {}", text(&out));
    }
    assert!(lab.tensors("run", 5).contains_key("adam_m.safetensors"));
}

#[test]
fn a_longer_run_continues_and_a_different_one_is_refused() {
    let lab = Lab::new();
    let config = lab.config("run", 10);
    let constant = ["schedule.kind=constant", "schedule.warmup=2"];
    lab.train(&config, &constant);
    lab.train(&config, &[constant[0], constant[1], "run.steps=20", "log.every=5", "checkpoint.keep_last=1"]);
    assert!(lab.tensors("run", 20).contains_key("adam_m.safetensors"));
    for (key, old) in [("optimizer.lr=1e-3", "0.005"), ("data.seq=32", "64"), ("run.seed=9", "1")] {
        let out = train(&config, &[constant[0], constant[1], "run.steps=30", key]).output().unwrap();
        let name = key.split('=').next().unwrap();
        assert_eq!(out.status.code(), Some(1));
        assert!(text(&out).contains(name) && text(&out).contains(old), "{key}: {}", text(&out));
    }
    let out = lab.train(&config, &[constant[0], constant[1], "run.steps=20"]);
    assert!(text(&out).contains("already"), "nothing is left to do: {}", text(&out));
}

#[test]
fn a_run_goes_on_that_lies_among_its_texts_beside_another() {
    let lab = Lab::new();
    let around = format!("data.train={}", lab.path("").display());
    let set = [&*around, "schedule.kind=constant", "schedule.warmup=2", "log.every=3"];
    let config = lab.config("runs/a", 5);
    lab.train(&config, &set);
    lab.train(&lab.config("runs/b", 5), &set);
    lab.train(&config, &[&set[..], &["run.steps=7"]].concat());
    let steps: Vec<u64> = lab.metric("runs/a", "loss").into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [1, 3, 5, 6, 7], "every third step, the first one and the last ones");
}

#[test]
fn refusals_name_the_key_the_value_and_the_fix() {
    let lab = Lab::new();
    let config = lab.config("run", 10);
    for (set, parts) in [
        (&["optimizer.learning_rte=1"][..], &["optimizer.learning_rte", "unknown"][..]),
        (&["optimizer.weight_deacy=1"], &["`optimizer.weight_decay`"]),
        (&["model.preset=125m"], &["model.preset = \"125m\"", "model.layers = 2", "remove"]),
        (&["run.tokens=1M"], &["run.steps = 10", "run.tokens = 1000000", "remove"]),
        (&["batch.tokens=500"], &["batch.tokens = 500", "448", "512"]),
        (&["data.seq=128"], &["data.seq = 128", "64"]),
        (&["schedule.warmup=50"], &["schedule.warmup", "50 steps", "10 steps"]),
        (&["model.vocab=100"], &["model.vocab", "100", "260"]),
        (&["data.train=nowhere"], &["nowhere"]),
        (&["data.tokenizer=nowhere.json"], &["nowhere.json"]),
        (&["optimizer.kind=sgd", "optimizer.eps=1e-6"], &["sgd", "optimizer.eps"]),
        (&["run.precision=f32", "run.weights=split"], &["run.precision", "run.weights"]),
        (&["data.validation="], &["validation.every = 20 steps", "data.validation.held-out", "remove"]),
    ] {
        let out = train(&config, set).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{set:?} is refused: {said}");
        assert!(parts.iter().all(|p| said.contains(p)), "{set:?} should mention {parts:?}:\n{said}");
        assert!(!said.contains("panicked"), "{said}");
    }
    assert!(!lab.path("run/checkpoints").exists(), "a refused run leaves nothing behind");
    for times in ["--grace", "--hang"] {
        let out = train(&config, &[]).args([times, "5"]).output().unwrap();
        assert!(out.status.code() == Some(2) && text(&out).contains("--supervise"), "{}", text(&out));
    }
    assert_eq!(ferropt().arg("trian").output().unwrap().status.code(), Some(2), "wrong usage exits with 2");
}

#[test]
fn a_run_that_diverges_whatever_is_tried_ends_without_saving_over_good_state() {
    let lab = Lab::new();
    let config = lab.config("run", 50);
    let wild = ["optimizer.kind=sgd", "optimizer.betas=", "optimizer.lr=1e30", "optimizer.clip=0"];
    let out = train(&config, &wild).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(3), "{said}");
    assert!(said.contains("3 roll-backs did not help") && said.contains("optimizer.lr"), "{said}");
    lab.tensors("run", 0);
}

#[test]
fn every_rule_schedule_and_attention_trains() {
    let lab = Lab::new();
    for (name, set) in [
        ("sgd", &["optimizer.kind=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.3"][..]),
        ("plain-sgd", &["optimizer.kind=sgd", "optimizer.lr=1", "run.weights=bf16-stochastic"]),
        ("cosine", &["schedule.kind=cosine"]),
        ("inverse-sqrt", &["schedule.kind=inverse-sqrt"]),
        ("constant", &["schedule.kind=constant", "optimizer.decay_vectors=false"]),
        ("wsd", &["schedule.kind=wsd", "schedule.decay=10"]),
        ("documents", &["data.stop_attention_at_document_ends=true"]),
        ("post-norm", &["model.post_norm=true", "model.embedding_width=16", "run.precision=f32"]),
    ] {
        lab.train(&lab.config(name, 30), set);
        let (losses, rates) = (lab.metric(name, "loss"), lab.metric(name, "lr"));
        assert!(losses[29].1 < losses[0].1 - 0.3, "{name}: {losses:?}");
        let peak = rates.iter().map(|r| r.1).fold(0.0, f64::max);
        let falls = rates[29].1 < 0.9 * peak;
        assert_eq!(falls, name != "constant", "{name}: {rates:?}");
    }
}

#[test]
fn a_run_without_time_saves_its_first_weights_and_goes_on_from_them() {
    let lab = Lab::new();
    let config = lab.config("run", 10);
    let out = lab.train(&config, &["run.max_minutes=1e-12", "checkpoint.keep_every=10"]);
    assert!(text(&out).contains("same command"), "{}", text(&out));
    assert!(lab.tensors("run", 0).contains_key("adam_v.safetensors"));
    for file in ["config.json", "tokenizer.json"] {
        assert!(lab.path("run/checkpoints/step-00000000").join(file).is_file(), "{file}");
    }
    lab.train(&config, &["checkpoint.keep_every=10"]);
    assert_eq!(lab.metric("run", "loss").len(), 10);
    lab.tensors("run", 0);
    let cached =
        std::fs::read_dir(lab.path("cache")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut cached: Vec<String> = cached.map(|name| name.split_once('-').unwrap().0.to_string()).collect();
    cached.sort();
    assert_eq!(cached, ["held", "train"]);
}

#[test]
fn the_bench_says_where_time_and_memory_go() {
    let args =
        ["bench", "train", "--preset", "tiny", "--seq", "64", "--batch", "2", "--steps", "2", "--json"];
    let out = ferropt().args(args).output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["step_s"].as_array().unwrap().len(), 2);
    assert_eq!(report["parameters"], 3_448_704);
    let parts = report["parts"].as_object().unwrap();
    let linear = parts["linear layers, forward"].as_f64().unwrap();
    assert!(linear > 0.0 && parts["gradient norm, AdamW"].as_f64().unwrap() > 0.0, "{parts:?}");
    assert!(report["measured_peak_flops"].as_f64().unwrap() > 1e9);
    // The program itself and the pages that a buffer shares with nothing come on top of what is planned.
    let (planned, taken) =
        (report["planned_bytes"].as_f64().unwrap(), report["peak_rss_bytes"].as_f64().unwrap());
    assert!(taken < 1.1 * planned + 32e6 && taken > 0.6 * planned, "planned {planned} bytes, took {taken}");
}

#[test]
fn dry_run_plans_every_preset_without_allocating() {
    let lab = Lab::new();
    let config = lab.config("run", 10);
    let sizes = ["model.layers=", "model.heads=", "model.width=", "model.vocab=", "model.positions="];
    for (preset, millions) in [
        ("125m", 125.2),
        ("350m", 331.2),
        ("1.3b", 1315.8),
        ("2.7b", 2651.6),
        ("6.7b", 6658.5),
        ("13b", 12853.5),
        ("30b", 29974.5),
        ("66b", 65717.0),
        ("175b", 175_000.0),
    ] {
        let preset_key = format!("model.preset={preset}");
        let set: Vec<&str> = sizes.into_iter().chain([&*preset_key, "batch.tokens="]).collect();
        let out = train(&config, &set).args(["--dry-run", "--json"]).output().unwrap();
        assert!(out.status.success(), "{preset}: {}", text(&out));
        let plan: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        let parameters = plan["parameters"].as_f64().unwrap() / 1e6;
        assert!((parameters / millions - 1.0).abs() < 0.01, "{preset}: {parameters} million parameters");
        // Weights, masters, gradients and two moments: 16 bytes a parameter; activations and workspace come on top.
        let total = plan["memory"]["total"].as_f64().unwrap();
        assert!(total > 16e6 * parameters && total < 40e6 * parameters + 40e9, "{preset}: {total} bytes");
    }
    let out = train(&config, &[]).arg("--dry-run").output().unwrap();
    let said = text(&out);
    assert!(["activations", "tokens per step", "FLOP", "time"].iter().all(|w| said.contains(w)), "{said}");
    assert!(!lab.path("run").exists(), "a dry run leaves nothing behind");
    assert!(!said.contains("note:"), "{said}");
    let out = train(&config, &["run.threads="]).args(["--dry-run", "--ranks", "8"]).output().unwrap();
    let share = (std::thread::available_parallelism().unwrap().get() / 8).max(1);
    for part in [
        &*format!("CPU, {share} threads"),
        "512 = 8 (shard x replicate) x 1 passes of 1 x 64",
        "measured peak of 8 x ",
    ] {
        assert!(text(&out).contains(part), "{part}: {}", text(&out));
    }
    let out = train(&config, &["data.validation.more=nowhere.txt"]).arg("--dry-run").output().unwrap();
    let said = text(&out);
    assert!(out.status.success() && said.contains("data.validation.more is not there"), "{said}");
}

#[test]
fn what_nobody_can_read_ends_no_run() {
    let lab = Lab::new();
    let config = lab.config("run", 3);
    let full = |arguments: &[&str]| {
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec \"$0\" \"$@\" 2> /dev/full", env!("CARGO_BIN_EXE_ferropt")]).args(arguments);
        shell.status().unwrap().code()
    };
    assert_eq!(full(&["train", "nowhere.toml"]), Some(1));
    assert_eq!(full(&["train", config.to_str().unwrap()]), Some(0));
    assert_eq!(lab.metric("run", "loss").len(), 3);
}

#[test]
fn a_limit_of_files_sizes_is_an_error_and_no_end() {
    let lab = Lab::new();
    // 64 KiB: less than the weights.
    let limited = |config: &Path| {
        let mut shell = Command::new("sh");
        shell.args(["-c", "ulimit -f 128; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_ferropt"), "train"]);
        shell.arg(config);
        shell
    };
    let out = limited(&lab.config("run", 7)).output().unwrap();
    assert_eq!(out.status.code(), Some(1), "{}", text(&out));
    assert!(text(&out).contains("was not saved"), "{}", text(&out));
    assert_eq!(lab.metric("run", "loss").len(), 7);
    let stopped =
        limited(&lab.config("stopped", 7)).args(["--set", "run.max_minutes=1e-12"]).output().unwrap();
    assert_eq!(stopped.status.code(), Some(1), "{}", text(&stopped));
    assert_eq!(text(&stopped).matches("step 0 was not saved").count(), 2, "{}", text(&stopped));
}
