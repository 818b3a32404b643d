//! Stops, and starts after them: nothing that was done is lost, nothing is said to be saved that is not, and a start that is
//! refused leaves a run as it was.

mod lab;

use lab::{Lab, ferropt, text, train};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// What a run has told, but for what is measured.
fn told(lab: &Lab, run: &str) -> Vec<[Value; 5]> {
    let lines = fs::read_to_string(lab.path(run).join("metrics.jsonl")).unwrap_or_default();
    let lines = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.map(|line| ["kind", "step", "set", "loss", "tokens"].map(|key| line[key].clone())).collect()
}

/// Waits until a run has told of so many things.
fn until(lab: &Lab, run: &str, lines: usize) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while lab.told(run) < lines {
        assert!(Instant::now() < deadline, "{} lines within two minutes", lab.told(run));
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

fn entries(lab: &Lab, run: &str, event: &str) -> Vec<String> {
    let book = fs::read_to_string(lab.path(run).join("logbook.jsonl")).unwrap();
    let entries = book.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    entries.filter(|entry| entry["event"] == event).map(|entry| entry["text"].to_string()).collect()
}

#[test]
fn a_last_checkpoint_that_fails_is_no_success() {
    let lab = Lab::new();
    if !Command::new("unshare").args(["-rm", "true"]).output().is_ok_and(|out| out.status.success()) {
        println!("skipped: `unshare -rm` is not allowed here, so no small tmpfs can be mounted");
        return;
    }
    let config = lab.config("small/run", 3);
    fs::create_dir(lab.path("small")).unwrap();
    // Room for everything but a checkpoint. The failure arrives before the run ends, or behind that.
    let script = "set -e
        mount -t tmpfs -o size=192k tmpfs \"$SMALL\"
        try() {
            rm -rf \"$SMALL/run\"
            status=0
            $FERROPT train \"$CONFIG\" --set checkpoint.every=1 --set run.steps=100000 --set \"$@\" || status=$?
            echo \"status $status of $*\"
            if ls \"$SMALL/run/checkpoints\" | grep -q step-; then echo 'it fits'; fi
            tail -n 1 \"$SMALL/run/logbook.jsonl\"
        }
        for set in run.steps=1 run.steps=3 run.steps=40 run.max_minutes=0.003 run.max_minutes=0.004; do try $set; done
        try run.steps=3 --ranks 2
        try run.max_minutes=0.003 --ranks 2";
    let out = Command::new("unshare")
        .args(["-rm", "sh", "-c", script])
        .env("FERROPT", env!("CARGO_BIN_EXE_ferropt"))
        .env("SMALL", lab.path("small"))
        .env("CONFIG", &config)
        .output()
        .unwrap();
    let said = text(&out);
    assert!(out.status.success() && !said.contains("it fits"), "{said}");
    assert_eq!(said.matches("status 1 of").count(), 7, "{said}");
    assert_eq!(said.matches("\"event\":\"failed\"").count(), 7, "{said}");
    assert!(said.matches("could not be saved").count() >= 7, "{said}");
    for lie in ["complete:", "which is saved;", "All steps are done"] {
        assert!(!said.contains(lie), "{said}");
    }
}

#[test]
fn sigterm_within_a_validation_saves_at_once_and_the_validation_is_made_up_for() {
    let lab = Lab::new();
    // Seconds of validation, twice.
    let sentences = fs::read_to_string(lab.path("held-out.txt")).unwrap();
    fs::write(lab.path("held-out.txt"), sentences.repeat(1 << 8)).unwrap();
    fs::write(lab.path("also.txt"), &sentences).unwrap();
    let also = format!("data.validation.also={}", lab.path("also.txt").display());
    let set = ["validation.every=2", "validation.max_tokens=", "checkpoint.every=100000", &also];
    lab.train(&lab.config("whole", 3), &set);
    let config = lab.config("stopped", 3);
    let child = train(&config, &set).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Two steps, and the small set, which is the first.
    until(&lab, "stopped", 3);
    signal(&child, "-TERM");
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(75), "{}", text(&out));
    assert!(text(&out).contains("stopped after step 2, which is saved"), "{}", text(&out));
    assert_eq!(told(&lab, "stopped"), told(&lab, "whole")[..3], "the score of a part is none");
    lab.tensors("stopped", 2);
    lab.train(&config, &set);
    assert_eq!(told(&lab, "stopped"), told(&lab, "whole"));
    assert!(lab.tensors("stopped", 3) == lab.tensors("whole", 3));
}

#[test]
fn time_that_is_over_within_the_last_validation_is_no_end_of_the_run() {
    let lab = Lab::new();
    let sentences = fs::read_to_string(lab.path("held-out.txt")).unwrap();
    fs::write(lab.path("held-out.txt"), sentences.repeat(1 << 8)).unwrap();
    let config = lab.config("run", 1);
    let out = lab.train(&config, &["validation.max_tokens=", "run.max_minutes=0.01"]);
    assert!(text(&out).contains("are over after step 1, which is saved"), "{}", text(&out));
    assert_eq!(told(&lab, "run").len(), 1);
    // What is scored may change between two starts.
    lab.train(&config, &[]);
    assert_eq!(told(&lab, "run").len(), 2);
    lab.train(&config, &[]);
    assert_eq!(told(&lab, "run").len(), 2, "each is scored once");
}

#[test]
fn time_that_is_too_short_for_a_validation_is_no_standstill() {
    let lab = Lab::new();
    let sentences = fs::read_to_string(lab.path("held-out.txt")).unwrap();
    fs::write(lab.path("held-out.txt"), sentences.repeat(1 << 8)).unwrap();
    let config = lab.config("run", 3);
    let set = ["validation.every=1", "validation.max_tokens=", "run.max_minutes=0.01"];
    for lines in 1..=3 {
        let out = lab.train(&config, &set);
        assert!(text(&out).contains("run.max_minutes are over after step"), "{}", text(&out));
        assert_eq!(told(&lab, "run").len(), lines, "a step, its score, and the next step");
    }
    lab.tensors("run", 2);
}

#[test]
fn sighup_is_a_stop_unless_nohup_started_the_run() {
    let lab = Lab::new();
    let set = ["checkpoint.every=100000"];
    let run = |name: &str, steps: u64, disposition: &str| {
        let mut command = Command::new("env");
        command.arg(disposition).arg(env!("CARGO_BIN_EXE_ferropt")).arg("train").arg(lab.config(name, steps));
        let command = command.args(["--set", set[0]]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        until(&lab, name, 5);
        signal(&child, "-HUP");
        signal(&child, "-HUP");
        child.wait_with_output().unwrap()
    };
    let out = run("closed", 100_000, "--default-signal=HUP");
    if text(&out).contains("unrecognized option") {
        println!("skipped: this `env` cannot set what signals do");
        return;
    }
    assert_eq!(out.status.code(), Some(75), "{}", text(&out));
    assert!(text(&out).contains("which is saved"), "{}", text(&out));
    let out = run("nohup", 300, "--ignore-signal=HUP");
    assert_eq!(out.status.code(), Some(0), "{}", text(&out));
    lab.tensors("nohup", 300);
}

#[test]
fn other_training_data_of_the_same_size_is_refused_and_changes_nothing() {
    let lab = Lab::new();
    let config = lab.config("run", 5);
    lab.train(&config, &["schedule.total=10"]);
    let before = fs::read(lab.path("run/config.toml")).unwrap();
    let path = lab.path("texts/1.txt");
    let old = fs::read_to_string(&path).unwrap();
    fs::write(&path, old.replace('a', "o")).unwrap();
    let set = ["schedule.total=10", "run.steps=10", "log.every=3"];
    let out = train(&config, &set).output().unwrap();
    assert_eq!(out.status.code(), Some(1), "{}", text(&out));
    let said = text(&out);
    assert!(
        said.contains("data.train is not what this run began with") && said.contains("checksum"),
        "{said}"
    );
    assert_eq!(
        fs::read(lab.path("run/config.toml")).unwrap(),
        before,
        "a refused start leaves a run as it was"
    );
    // Where it lies, and when it was written, does not matter.
    fs::write(&path, old).unwrap();
    fs::rename(lab.path("texts"), lab.path("moved")).unwrap();
    let moved = format!("data.train={}", lab.path("moved").display());
    lab.train(&config, &[&set[..], &[&moved]].concat());
    lab.tensors("run", 10);
}

#[test]
fn a_schedule_can_be_made_longer_while_its_rates_are_those_of_the_longer_one() {
    let lab = Lab::new();
    let schedule = |kind, total| [format!("schedule.kind={kind}"), format!("schedule.total={total}")];
    let start = |run: &str, steps, kind, total| {
        let set = schedule(kind, total);
        let decay = if kind == "wsd" { "schedule.decay=4" } else { "schedule.decay=" };
        train(&lab.config(run, steps), &[&set[0], &set[1], "schedule.warmup=2", decay]).output().unwrap()
    };
    for (run, steps, total) in [("run", 5, 10), ("run", 10, 14), ("whole", 10, 14)] {
        let out = start(run, steps, "wsd", total);
        assert!(out.status.success(), "{run}: {}", text(&out));
    }
    assert!(
        lab.tensors("run", 10) == lab.tensors("whole", 10),
        "the same bits as with that schedule from the start"
    );
    // From here on it falls, as a straight line does from the warm-up on.
    let late = start("run", 12, "wsd", 14);
    assert!(late.status.success(), "{}", text(&late));
    assert!(start("line", 5, "linear", 10).status.success());
    for refused in [start("run", 20, "wsd", 20), start("line", 10, "linear", 14)] {
        assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
        assert!(text(&refused).contains("schedule.total was 1"), "{}", text(&refused));
    }
}

#[test]
fn curves_that_cannot_be_drawn_are_no_failure() {
    let lab = Lab::new();
    let config = lab.config("run", 2);
    fs::create_dir_all(lab.path("run/loss.svg")).unwrap();
    let out = lab.train(&config, &[]);
    for part in ["complete: 2 steps", "warning: the loss curves are not drawn", "loss.svg"] {
        assert!(text(&out).contains(part), "{part}: {}", text(&out));
    }
    assert!(!lab.path("run/loss.tmp").exists(), "whole or not at all");
    fs::remove_dir(lab.path("run/loss.svg")).unwrap();
    lab.train(&config, &[]);
    assert!(fs::read_to_string(lab.path("run/loss.svg")).unwrap().trim_end().ends_with("</svg>"));
}

#[test]
fn a_complete_run_goes_on_with_the_settings_that_it_names() {
    let lab = Lab::new();
    let named = |out: &Output| -> Vec<String> {
        let said = text(out);
        let behind = said.split("--set ").skip(1);
        behind.map(|set| set.split_whitespace().next().unwrap().to_string()).collect()
    };
    for (kind, length, longer) in
        [("linear", "run.tokens=5000", "run.tokens=20480"), ("wsd", "run.steps=10", "run.steps=40")]
    {
        let config = lab.config(kind, 10);
        let kind = format!("schedule.kind={kind}");
        let command = |more: &[String]| {
            let more: Vec<&str> = more.iter().map(|set| &**set).collect();
            train(&config, &[&["run.steps=", length, &kind][..], &more].concat()).output().unwrap()
        };
        assert!(command(&[]).status.success());
        let complete = command(&[]);
        assert!(text(&complete).contains("has made its 10 steps already"), "{}", text(&complete));
        let settings = named(&complete);
        assert!(settings.contains(&"schedule.total=10".into()), "{settings:?}");
        let on = command(&settings);
        assert!(text(&on).contains("complete: 20 steps"), "{settings:?}: {}", text(&on));
        // Who makes up the length alone is told the rest.
        let refused = command(&[longer.into()]);
        assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
        let on = command(&[&[longer.to_string()][..], &named(&refused)].concat());
        assert!(text(&on).contains("complete: 40 steps"), "{}\n{}", text(&refused), text(&on));
    }
}

#[test]
fn damaged_tokens_are_made_anew_and_named() {
    let lab = Lab::new();
    lab.train(&lab.config("whole", 5), &[]);
    let tokens = fs::read_dir(lab.path("cache")).unwrap().map(|entry| entry.unwrap().path());
    let tokens = tokens.into_iter().find(|path| path.to_str().unwrap().contains("train-")).unwrap();
    let whole = fs::read(&tokens).unwrap();
    let mut damaged = whole.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x40;
    fs::write(&tokens, damaged).unwrap();
    let out = lab.train(&lab.config("run", 5), &[]);
    let name = tokens.file_name().unwrap().to_str().unwrap();
    assert!(text(&out).contains(name) && text(&out).contains("was damaged"), "{}", text(&out));
    assert!(entries(&lab, "run", "noted")[0].contains(name));
    assert!(lab.tensors("run", 5) == lab.tensors("whole", 5));
    assert_eq!(fs::read(&tokens).unwrap(), whole);
}

#[test]
fn a_score_does_not_depend_on_passes_and_ranks() {
    let lab = Lab::new();
    let set = ["run.precision=f32", "validation.max_tokens=100"];
    lab.train(&lab.config("one", 2), &[&set[..], &["batch.micro_batch=1"]].concat());
    lab.train(&lab.config("eight", 2), &[&set[..], &["batch.micro_batch=8"]].concat());
    let out = train(&lab.config("ranks", 2), &set).args(["--ranks", "2"]).output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    let score = |run: &str| told(&lab, run).last().unwrap()[3].as_f64().unwrap();
    for run in ["eight", "ranks"] {
        assert!((score(run) / score("one") - 1.0).abs() < 1e-5, "{run}: {}, {}", score(run), score("one"));
    }
}

#[test]
fn a_quick_start_leaves_the_run_of_another_alone() {
    let lab = Lab::new();
    lab.train(&lab.config("run", 1), &[]);
    let list = |run: &Path| {
        let mut names: Vec<_> = fs::read_dir(run).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = list(&lab.path("run"));
    let mut command = ferropt();
    command.arg("quickstart").arg("--dir").arg(lab.path("run")).arg("--text").arg(lab.path("texts"));
    let out = command.output().unwrap();
    assert_eq!(out.status.code(), Some(1), "{}", text(&out));
    assert!(text(&out).contains("no quick start began"), "{}", text(&out));
    assert_eq!(list(&lab.path("run")), before);
}
