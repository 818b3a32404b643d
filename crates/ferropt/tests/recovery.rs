//! Training that goes wrong, by real poison: text that makes the loss explode, weights that are none, a rate far too high.
//! Each run ends as an undisturbed one does, or says why it gave up, with no person involved.

mod lab;

use lab::{Lab, text, train};
use serde_json::Value;
use std::ops::Range;
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

/// Entries of a run's logbook.
fn book(lab: &Lab, run: &str) -> Vec<Value> {
    let lines = std::fs::read_to_string(lab.path(run).join("logbook.jsonl")).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn events(lab: &Lab, run: &str) -> Vec<String> {
    book(lab, run).iter().map(|entry| entry["event"].as_str().unwrap().to_string()).collect()
}

/// Loss on the held-out set at the end.
fn quality(lab: &Lab, run: &str) -> f64 {
    let lines = std::fs::read_to_string(lab.path(run).join("metrics.jsonl")).unwrap();
    let mut values = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    values.rfind(|v| v["kind"] == "validation").unwrap()["loss"].as_f64().unwrap()
}

/// More text, so that a run does not come round to what it knows, and a document of one rare byte, repeated.
fn poison(lab: &Lab) {
    for i in 0..2 {
        let story = std::fs::read_to_string(lab.path(&format!("texts/{i}.txt"))).unwrap();
        std::fs::write(lab.path(&format!("texts/more-{i}.txt")), story.repeat(8)).unwrap();
    }
    std::fs::write(lab.path("texts/poison.txt"), "\u{1}".repeat(64 * 6)).unwrap();
}

/// Small batches, so that a poisoned sequence is half of one.
const SMALL: [&str; 5] = [
    "batch.tokens=128",
    "schedule.warmup=20",
    "optimizer.lr=3e-3",
    "validation.every=1000",
    "recovery.window=32",
];

#[test]
fn poisoned_batches_are_left_out_and_the_quality_is_that_of_clean_text() {
    let lab = Lab::new();
    // Long enough for the end to depend little on the order of the samples: on one rank and on two, two seeds end between
    // 0.25 and 0.33 without poison, and between 0.25 and 0.29 with it.
    const STEPS: u64 = 1600;
    let set = ["batch.tokens=128", "schedule.warmup=50", "optimizer.lr=3e-3", "recovery.window=32"];
    poison(&lab);
    std::fs::rename(lab.path("texts/poison.txt"), lab.path("poison.txt")).unwrap();
    lab.train(&lab.config("clean", STEPS), &set);
    std::fs::rename(lab.path("poison.txt"), lab.path("texts/poison.txt")).unwrap();
    let out = lab.train(&lab.config("poisoned", STEPS), &set);
    let skipped: Vec<Value> =
        book(&lab, "poisoned").into_iter().filter(|entry| entry["event"] == "skipped").collect();
    assert!((1..40).contains(&skipped.len()), "{} skipped: {}", skipped.len(), text(&out));
    // Each is a batch with the poison in it, kept for a look.
    for entry in &skipped {
        let (step, batch) =
            (entry["cause"]["step"].as_u64().unwrap(), entry["cause"]["batch"].as_u64().unwrap());
        let kept = lab.path(&format!("poisoned/trouble/step-{step:08}/batch-{batch:08}.jsonl"));
        let kept = std::fs::read_to_string(kept).unwrap();
        assert_eq!(kept.lines().count(), 2);
        assert!(kept.contains("\\u0001\\u0001\\u0001"), "{kept}");
        assert!(entry["text"].as_str().unwrap().contains("robust deviations above"), "{entry}");
    }
    let (clean, poisoned) = (quality(&lab, "clean"), quality(&lab, "poisoned"));
    println!("held-out loss: clean {clean:.4}, poisoned {poisoned:.4}, {} batches left out", skipped.len());
    assert!(poisoned < 1.25 * clean, "clean {clean}, poisoned {poisoned}");
    assert_eq!(lab.metric("poisoned", "loss").len() as u64, STEPS, "each step is reported once");
}

/// Trouble that lasts longer than the last checkpoints reach back: the way back is kept, and the run is not lost.
#[test]
fn a_trouble_that_outlasts_the_last_checkpoints_does_not_go_back_to_the_beginning() {
    let lab = Lab::new();
    poison(&lab);
    let set =
        [&SMALL[..], &["recovery.window=96", "recovery.max_skips=1", "recovery.max_rollbacks=40"]].concat();
    lab.train(&lab.config("run", 400), &set);
    let entries = book(&lab, "run");
    let back = entries.iter().find(|entry| entry["event"] == "rolled-back").expect("a roll-back");
    let [from, to, first] = ["from", "to", "first"].map(|key| back[key].as_u64().unwrap());
    // Two checkpoints, five steps apart, are kept; the margin is ten steps.
    assert!(from > first + 5, "the trouble lasts from step {first} to {from}");
    assert!(to + 10 < first && first < to + 40, "from step {from} to {to}, for a trouble since {first}");
    let kept = std::fs::read_dir(lab.path("run/checkpoints")).unwrap().count();
    assert!(kept <= 5, "{kept} names in the folder");
}

/// Changes values of a tensor in a checkpoint to `value`, with checksums that fit.
fn spoil(run: &Path, step: u64, group: &str, tensor: &str, which: Range<usize>, value: f32) {
    let folder = run.join(format!("checkpoints/step-{step:08}"));
    let manifest = folder.join("manifest.json");
    let mut content: Value = serde_json::from_slice(&std::fs::read(&manifest).unwrap()).unwrap();
    let name = content["groups"][group][tensor]["file"].as_str().unwrap().to_string();
    let mut bytes = std::fs::read(folder.join(&name)).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let table: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let start = 8 + header + table[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    for at in which.map(|index| start + 4 * index) {
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    std::fs::write(folder.join(&name), &bytes).unwrap();
    content["files"][&name]["crc32c"] = format!("{:08x}", crc32c::crc32c(&bytes)).into();
    content.as_object_mut().unwrap().remove("crc32c");
    let mut sealed = serde_json::to_vec_pretty(&content).unwrap();
    sealed.truncate(sealed.len() - 2);
    let seal = format!(",\n  \"crc32c\": \"{:08x}\"\n}}\n", crc32c::crc32c(&sealed));
    sealed.extend(seal.into_bytes());
    std::fs::write(&manifest, sealed).unwrap();
}

/// Trains `whole` undisturbed, and `spoilt` with a checkpoint of step 200 that was changed. Returns the entries of the
/// latter's logbook.
fn with_spoilt_checkpoint(lab: &Lab, spoil: impl Fn(&Path)) -> Vec<Value> {
    let set = ["checkpoint.keep_last=20", "schedule.total=300", "recovery.window=32", "recovery.cooldown=30"];
    lab.train(&lab.config("whole", 300), &set);
    lab.train(&lab.config("spoilt", 200), &set);
    spoil(&lab.path("spoilt"));
    let out = lab.train(&lab.config("spoilt", 300), &set);
    let (whole, spoilt) = (quality(lab, "whole"), quality(lab, "spoilt"));
    println!("held-out loss: whole {whole:.4}, spoilt {spoilt:.4}");
    assert!(spoilt < 1.05 * whole, "whole {whole}, spoilt {spoilt}: {}", text(&out));
    let losses = lab.metric("spoilt", "loss");
    assert_eq!(losses.len(), 300);
    assert!(losses.windows(2).all(|pair| pair[1].0 == pair[0].0 + 1), "metrics are in the order of steps");
    book(lab, "spoilt")
}

/// Steps of the only roll-back.
fn rolled_back(entries: &[Value]) -> (u64, u64) {
    let mut found = entries.iter().filter(|entry| entry["event"] == "rolled-back");
    let entry = found.next().expect("a roll-back");
    assert!(found.next().is_none(), "one roll-back: {entries:?}");
    (entry["from"].as_u64().unwrap(), entry["to"].as_u64().unwrap())
}

#[test]
fn weights_that_are_not_numbers_are_named_and_an_older_checkpoint_is_taken() {
    let lab = Lab::new();
    let entries = with_spoilt_checkpoint(&lab, |run| {
        spoil(run, 200, "model", "model.decoder.layers.1.fc1.weight", 0..1, f32::NAN);
    });
    let skipped = entries.iter().find(|entry| entry["event"] == "skipped").expect("a skipped step");
    let said = skipped["text"].as_str().unwrap();
    assert!(said.contains("layers.1.fc1.weight, row 0: NaN in the weights"), "{said}");
    assert_eq!(rolled_back(&entries), (200, 190));
    // The page for people tells the same.
    let page = std::fs::read_to_string(lab.path("spoilt/logbook.md")).unwrap();
    assert!(page.contains("**rolled back**") && page.contains("NaN in the weights"), "{page}");
}

#[test]
fn many_ranks_find_the_same_weight_and_go_back_together() {
    const BIAS: &str = "model.decoder.layers.1.fc2.bias";
    let wrong = "layers.1.fc2.bias, row 0: NaN in the weights, before this step, on rank 0";
    // What overflows in the first stage of a pipeline comes to the second before anything that that one computes.
    const FIRST: &str = "model.decoder.layers.0.fc1.weight";
    let large = "layer 0, relu, row ";
    // Between blocks, the second of two tensor-parallel ranks has the second half of a sequence.
    const POSITIONS: &str = "model.decoder.embed_positions.weight";
    let (position, late) =
        (42 * 32..43 * 32, "layer 0, normed1, row 40 of micro-batch 0 (sequence 0, position 40)");
    for (layout, ranks, tensor, which, value, report, on) in [
        ("parallel.shard=2", "2", BIAS, 0..32, f32::NAN, wrong, 0),
        ("parallel.tensor=2", "2", BIAS, 0..32, f32::NAN, wrong, 0),
        ("parallel.tensor=2", "4", BIAS, 0..32, f32::NAN, wrong, 0),
        ("parallel.tensor=2", "2", POSITIONS, position, 3e38, late, 1),
        ("parallel.pipeline=2", "2", FIRST, 0..32, 3e38, large, 0),
    ] {
        let lab = Lab::new();
        let set = ["checkpoint.keep_last=20", "schedule.total=60", "recovery.window=16", "run.threads=1"];
        // In bf16 it depends on the order of sums which step is the first that overflows.
        let precision = "run.precision=f32";
        let set = [&set[..], &["batch.micro_batch=1", "model.vocab=264", precision, layout]].concat();
        let train_on = |steps: u64| {
            let out = train(&lab.config("run", steps), &set).args(["--ranks", ranks]).output().unwrap();
            assert!(out.status.success(), "{}", text(&out));
        };
        train_on(30);
        spoil(&lab.path("run"), 30, "model", tensor, which, value);
        train_on(60);
        let entries = book(&lab, "run");
        let skipped = entries.iter().find(|entry| entry["event"] == "skipped").expect("a skipped step");
        let said = skipped["text"].as_str().unwrap();
        assert!(said.contains(report) && said.contains(&format!("on rank {on}")), "{layout}: {said}");
        assert_eq!(rolled_back(&entries), (30, 20), "{layout}");
        assert_eq!(lab.metric("run", "loss").len(), 60);
    }
}

/// The checkpoint that the trouble leaves trusted has a damaged file, which one of the ranks finds in its share.
#[test]
fn a_way_back_that_is_damaged_is_told_and_passed_over_by_all_ranks() {
    let lab = Lab::new();
    let set = ["checkpoint.keep_last=20", "schedule.total=60", "recovery.window=16", "parallel.shard=2"];
    let train_on = |steps: u64| {
        let out = train(&lab.config("run", steps), &set).args(["--ranks", "2"]).output().unwrap();
        assert!(out.status.success(), "{}", text(&out));
        text(&out)
    };
    train_on(30);
    spoil(&lab.path("run"), 30, "model", "model.decoder.layers.1.fc2.bias", 0..1, f32::NAN);
    let files = std::fs::read_dir(lab.path("run/checkpoints/step-00000020")).unwrap();
    let mut files = files.map(|file| file.unwrap().path());
    let file = files.find(|file| file.to_str().unwrap().contains("/adam_m")).expect("a file of moments");
    let mut content = std::fs::read(&file).unwrap();
    *content.last_mut().unwrap() ^= 1;
    std::fs::write(&file, content).unwrap();
    let said = train_on(60);
    assert!(said.contains("passed over") && said.contains("is damaged: its CRC-32C"), "{said}");
    assert_eq!(rolled_back(&book(&lab, "run")), (30, 15), "{said}");
}

#[test]
fn a_loss_that_explodes_is_rolled_back_with_a_lower_rate() {
    let lab = Lab::new();
    // A first moment that is far too large makes the next updates enormous, as a burst of gradients does.
    let entries = with_spoilt_checkpoint(&lab, |run| {
        spoil(run, 200, "adam_m", "model.decoder.layers.0.fc1.weight", 0..128 * 32, 1.0);
    });
    let (from, to) = rolled_back(&entries);
    assert!((201..205).contains(&from) && to == 190, "from {from} to {to}: {entries:?}");
    let rates = (lab.metric("whole", "lr"), lab.metric("spoilt", "lr"));
    for (step, factor) in [(190, 1.0), (191, 0.8), (230, 0.8), (240, 1.0)] {
        let ratio = rates.1[step - 1].1 / rates.0[step - 1].1;
        assert!((ratio - factor).abs() < 1e-12, "step {step}: {ratio} of the undisturbed rate");
    }
    let aside = std::fs::read_to_string(lab.path("spoilt/trouble/roll-back-1-metrics.jsonl")).unwrap();
    assert!(aside.contains("\"step\":200"), "what was rolled back is kept: {aside}");
}

#[test]
fn a_run_that_was_killed_in_its_troubles_ends_with_the_same_bits() {
    let lab = Lab::new();
    const STEPS: u64 = 400;
    poison(&lab);
    let set = [
        &SMALL[..],
        &["recovery.max_skips=0", "recovery.max_rollbacks=40", "recovery.margin=2", "log.every=10"],
    ]
    .concat();
    let started = Instant::now();
    lab.train(&lab.config("whole", STEPS), &set);
    let longest = started.elapsed();
    let whole = events(&lab, "whole");
    assert!(whole.contains(&"rolled-back".into()) && whole.contains(&"skipped".into()), "{whole:?}");
    let config = lab.config("killed", STEPS);
    let mut kills = 0;
    for round in 0..8u32 {
        let mut child = train(&config, &set).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(longest.mul_f64(0.15 + 0.07 * f64::from(round * 7 % 5)));
        if child.try_wait().unwrap().is_some() {
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
    }
    lab.train(&config, &set);
    println!("{kills} kills; {whole:?}");
    assert!(lab.tensors("killed", STEPS) == lab.tensors("whole", STEPS), "after {kills} kills");
    assert_eq!(lab.metric("killed", "loss"), lab.metric("whole", "loss"));
    let told = |run: &str| {
        let entries = book(&lab, run).into_iter();
        let of_trouble = |e: &Value| ["skipped", "rolled-back"].contains(&e["event"].as_str().unwrap());
        entries.filter(of_trouble).map(|e| e["text"].to_string()).collect::<Vec<_>>()
    };
    assert_eq!(told("killed"), told("whole"), "each trouble is told once");
    if kills > 0 {
        assert!(events(&lab, "killed").contains(&"was-killed".into()), "{:?}", events(&lab, "killed"));
    }
}

#[test]
fn switched_off_the_first_loss_that_is_not_finite_ends_the_run() {
    let lab = Lab::new();
    let wild = ["optimizer.kind=sgd", "optimizer.betas=", "optimizer.lr=1e30", "optimizer.clip=0"];
    let off = [&wild[..], &["recovery.enabled=false"]].concat();
    let out = train(&lab.config("run", 50), &off).output().unwrap();
    assert_eq!(out.status.code(), Some(3), "{}", text(&out));
    assert!(text(&out).contains("recovery.enabled = false"), "{}", text(&out));
    assert_eq!(events(&lab, "run"), ["started", "skipped", "gave-up"]);
    // The same command again comes to the same end, which nobody is to take for a machine that was lost.
    let out = train(&lab.config("run", 50), &off).output().unwrap();
    assert_eq!(out.status.code(), Some(3), "{}", text(&out));
    assert_eq!(events(&lab, "run"), ["started", "skipped", "gave-up", "started", "gave-up"]);
    let causes = book(&lab, "run").into_iter().filter(|entry| entry["event"] == "gave-up");
    assert!(
        causes.into_iter().all(|entry| entry["cause"]["loss"].is_null() || entry["cause"]["step"].is_u64())
    );
}

/// A factor on the loss that grows until something overflows, and again: no text is lost, no bit by a break, and the model is
/// the one of f32.
#[test]
fn in_f16_steps_that_overflow_are_tried_again_with_the_same_batch() {
    let lab = Lab::new();
    const STEPS: u64 = 60;
    // A gradient of the largest factor is above 65,504 for a token that is not expected.
    let set = ["batch.tokens=128", "optimizer.lr=2e-3", "schedule.total=60", "schedule.warmup=5"];
    let f16 =
        [&set[..], &["run.precision=f16", "loss_scale.initial=16777216", "loss_scale.window=7"]].concat();
    lab.train(&lab.config("f32", STEPS), &[&set[..], &["run.precision=f32"]].concat());
    let out = lab.train(&lab.config("f16", STEPS), &f16);
    let said = text(&out);
    let again = said.matches("it is tried again with 8388608").count();
    assert!(again >= 3, "{again} steps were tried again: {said}");
    assert!(!events(&lab, "f16").contains(&"skipped".to_string()), "{said}");
    let (one, other) = (lab.metric("f32", "loss"), lab.metric("f16", "loss"));
    assert_eq!(one.len(), other.len());
    for ((step, a), (_, b)) in one.iter().zip(&other) {
        assert!((a - b).abs() < 3e-3 * a, "step {step}: loss {b}, in f32 {a}");
    }
    for ((step, a), (_, b)) in lab.metric("f32", "grad_norm").iter().zip(lab.metric("f16", "grad_norm")) {
        assert!((a - b).abs() < 3e-2 * a, "step {step}: norm {b}, in f32 {a}");
    }
    let factors = lab.metric("f16", "loss_scale");
    assert!(factors.iter().any(|(_, factor)| *factor == 8_388_608.0), "{factors:?}");

    // In two parts, the second of which begins where the factor was.
    lab.train(&lab.config("broken", 33), &f16);
    lab.train(&lab.config("broken", STEPS), &f16);
    assert!(lab.tensors("broken", STEPS) == lab.tensors("f16", STEPS), "a break changed the weights");
    assert_eq!(lab.metric("broken", "loss_scale"), factors);
}

#[test]
fn a_loss_scale_at_its_floor_is_trouble_whose_place_is_named() {
    let lab = Lab::new();
    let set = [
        "batch.tokens=64",
        "run.precision=f16",
        "loss_scale.initial=16777216",
        "loss_scale.floor=8388608",
        "recovery.max_rollbacks=1",
    ];
    let out = train(&lab.config("run", 20), &set).output().unwrap();
    assert_eq!(out.status.code(), Some(3), "{}", text(&out));
    assert!(
        text(&out).contains("at the loss scale 16777216; it is tried again with 8388608"),
        "{}",
        text(&out)
    );
    let entries = book(&lab, "run");
    let skipped = entries.iter().find(|entry| entry["event"] == "skipped").expect("a skipped step");
    let said = skipped["text"].as_str().unwrap();
    assert!(said.contains("not finite") && said.contains("embed_tokens.weight, row"), "{said}");
    assert!(said.contains("-inf in the gradient of the weight"), "{said}");
    assert!(events(&lab, "run").contains(&"gave-up".to_string()));
}
