//! `ferropt train --supervise`: whatever happens to the process, the run ends with the bits of an undisturbed one.

mod lab;

use lab::{Lab, text, train};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const STEPS: u64 = 400;

/// Steps long enough for a test to catch the run between two of them, and few enough checkpoints to lose some.
const SET: [&str; 2] = ["checkpoint.every=20", "validation.every=200"];

fn supervised(config: &Path, more: &[&str]) -> Child {
    let mut command = train(config, &SET);
    command.arg("--supervise").args(more).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// The process that a supervisor has started, once it works.
fn worker(supervisor: &Child) -> Option<u32> {
    let id = supervisor.id();
    let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
    children.split_whitespace().next()?.parse().ok()
}

fn signal(process: u32, name: &str) {
    assert!(
        Command::new("kill").args([&format!("-{name}"), &process.to_string()]).status().unwrap().success()
    );
}

/// Waits for the run to record `lines` lines.
fn until(lab: &Lab, run: &str, lines: usize) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while lab.told(run) < lines {
        assert!(Instant::now() < deadline, "not {lines} steps within a minute");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn told(lab: &Lab, run: &str) -> String {
    std::fs::read_to_string(lab.path(run).join("logbook.md")).unwrap()
}

fn finished(child: Child) -> Output {
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    out
}

#[test]
fn killed_and_stopped_processes_are_started_again_to_the_same_bits() {
    let lab = Lab::new();
    lab.train(&lab.config("whole", STEPS), &SET);
    let supervisor = supervised(&lab.config("killed", STEPS), &["--hang", "1"]);
    for (lines, how) in [(30, "KILL"), (90, "KILL"), (150, "STOP")] {
        until(&lab, "killed", lines);
        signal(worker(&supervisor).expect("a process that works"), how);
    }
    let out = finished(supervisor);
    assert!(lab.tensors("killed", STEPS) == lab.tensors("whole", STEPS));
    assert_eq!(lab.metric("killed", "loss"), lab.metric("whole", "loss"));
    let page = told(&lab, "killed");
    assert_eq!(page.matches("**rank lost**. the process was killed").count(), 2, "{page}");
    assert!(page.contains("stopped for too long"), "{page}");
    assert!(page.trim_end().ends_with("All steps are done."), "{page}");
    assert!(text(&out).contains("supervisor: starting again"), "{}", text(&out));
}

#[test]
fn sigterm_goes_through_to_the_process_and_asks_to_be_started_again() {
    let lab = Lab::new();
    let config = lab.config("run", STEPS);
    let supervisor = supervised(&config, &[]);
    until(&lab, "run", 10);
    signal(supervisor.id(), "TERM");
    let out = supervisor.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(75), "{}", text(&out));
    let done = lab.metric("run", "loss").len() as u64;
    lab.tensors("run", done);
    assert!(told(&lab, "run").trim_end().ends_with("Somebody asked it to stop."));
    finished(supervised(&config, &[]));
    lab.train(&lab.config("whole", STEPS), &SET);
    assert!(lab.tensors("run", STEPS) == lab.tensors("whole", STEPS));
}

#[test]
fn what_would_fail_again_is_not_started_again() {
    let lab = Lab::new();
    let config = lab.config("run", 30);
    for (set, status, said) in [
        (&["data.train=nowhere"][..], 1, "nowhere"),
        (
            &["optimizer.kind=sgd", "optimizer.betas=", "optimizer.lr=1e30", "optimizer.clip=0"],
            3,
            "roll-backs did not help",
        ),
    ] {
        let out = train(&config, set).arg("--supervise").output().unwrap();
        assert_eq!(out.status.code(), Some(status), "{}", text(&out));
        assert!(text(&out).contains(said), "{}", text(&out));
        assert!(!text(&out).contains("starting again"), "{}", text(&out));
    }
    // A file in the place of a folder.
    let nowhere = format!("run.dir={}/run", config.display());
    for ranks in [&[][..], &["--ranks", "2"]] {
        let out = train(&config, &[&nowhere]).arg("--supervise").args(ranks).output().unwrap();
        assert_eq!(out.status.code(), Some(1), "{ranks:?}: {}", text(&out));
        assert!(text(&out).contains("run.dir") && !text(&out).contains("starting again"), "{}", text(&out));
    }
}

#[test]
fn a_launched_process_ends_with_its_launcher() {
    let lab = Lab::new();
    let mut supervisor = supervised(&lab.config("run", 100_000), &[]);
    until(&lab, "run", 10);
    let worker = worker(&supervisor).expect("a process that works");
    supervisor.kill().unwrap();
    supervisor.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    // A process that has ended and that nobody has waited for yet is a zombie.
    let alive = || {
        let stat = std::fs::read_to_string(format!("/proc/{worker}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with('Z'))
    };
    while alive() {
        assert!(Instant::now() < deadline, "the process works on without its launcher");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(told(&lab, "run").trim_end().ends_with("Somebody asked it to stop."));
}

#[test]
fn contradictions_are_refused() {
    let lab = Lab::new();
    let config = lab.config("run", 30);
    for (arguments, said) in [
        (&["--ranks", "0"][..], "--ranks 0"),
        (&["--ranks", "2", "--supervise", "--min-ranks", "3"], "--min-ranks 3"),
        (&["--restarts", "3"], "--supervise"),
        (&["--supervise", "--dry-run"], "--dry-run"),
    ] {
        let out = train(&config, &[]).args(arguments).output().unwrap();
        assert!(!out.status.success() && text(&out).contains(said), "{arguments:?}: {}", text(&out));
    }
    let out = train(&config, &[]).args(["--ranks", "2"]).env("RANK", "1").output().unwrap();
    assert!(!out.status.success() && text(&out).contains("RANK=1"), "{}", text(&out));
}
