//! Faults of many ranks: killed, stopped, slow, without disk, with poisoned data. The supervisor and the guard bring each run
//! to its end with no person involved, to the bits of an undisturbed run where the data is the same, and the logbook
//! says what happened.

mod lab;

use lab::{Lab, text, train};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Twelve sequences a step, so that two or three ranks share them out; checkpoints now and then.
const SET: [&str; 6] = [
    "batch.tokens=768",
    "batch.micro_batch=1",
    "run.threads=1",
    "checkpoint.every=20",
    "validation.every=1000",
    "parallel.timeout=20",
];

fn ranks(config: &Path, set: &[&str], ranks: usize, more: &[&str]) -> Command {
    let mut command = train(config, &[&SET, set].concat());
    command.args(["--ranks", &ranks.to_string(), "--supervise"]).args(more);
    command
}

/// Of most tests' runs, on two ranks.
const STEPS: u64 = 400;

/// Of those that poison is looked for in: enough to learn something before and behind it.
const POISON_STEPS: u64 = 1000;

/// What a run comes to that nothing happens to.
struct Whole {
    tensors: BTreeMap<String, Vec<u8>>,
    losses: Vec<(u64, f64)>,
}

impl Whole {
    fn new(steps: u64, n: usize) -> Whole {
        let lab = Lab::new();
        undisturbed(&lab, "whole", steps, &[], n);
        Whole { tensors: lab.tensors("whole", steps), losses: lab.metric("whole", "loss") }
    }

    /// Of [`STEPS`] on two ranks: several tests compare with the same one.
    fn of_two() -> &'static Whole {
        static RUN: OnceLock<Whole> = OnceLock::new();
        RUN.get_or_init(|| Whole::new(STEPS, 2))
    }
}

fn undisturbed(lab: &Lab, run: &str, steps: u64, set: &[&str], n: usize) {
    let out = ranks(&lab.config(run, steps), set, n, &[]).output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    assert!(!text(&out).contains("starting again"), "{}", text(&out));
}

/// Starts a supervised run, with what it says in a file.
fn start(lab: &Lab, run: &str, steps: u64, n: usize, more: &[&str]) -> Child {
    let mut command = ranks(&lab.config(run, steps), &[], n, more);
    let said = fs::File::create(lab.path(&format!("{run}.log"))).unwrap();
    command.stdout(said.try_clone().unwrap()).stderr(said).stdin(Stdio::null()).spawn().unwrap()
}

/// Waits for the end, and compares with the undisturbed run.
fn ends_alike(lab: &Lab, mut supervisor: Child, run: &str, steps: u64, whole: &Whole) {
    let status = supervisor.wait().unwrap();
    let said = fs::read_to_string(lab.path(&format!("{run}.log"))).unwrap();
    let page = fs::read_to_string(lab.path(run).join("logbook.md")).unwrap_or_default();
    assert!(
        status.success(),
        "{status}: {page}\n{}",
        said.lines().rev().take(40).collect::<Vec<_>>().join("\n")
    );
    assert!(lab.tensors(run, steps) == whole.tensors, "{page}");
    assert_eq!(lab.metric(run, "loss"), whole.losses);
    assert!(page.trim_end().ends_with("All steps are done."), "{page}");
}

/// Processes that a supervisor has started, by rank.
fn workers(supervisor: &Child) -> Vec<(usize, u32)> {
    let id = supervisor.id();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
    let children = children.split_whitespace().filter_map(|child| child.parse().ok());
    let rank = |child: u32| {
        let environment = fs::read(format!("/proc/{child}/environ")).ok()?;
        let mut variables = environment.split(|byte| *byte == 0);
        let own = variables.find_map(|v| v.strip_prefix(b"RANK="))?;
        Some((std::str::from_utf8(own).ok()?.parse().ok()?, child))
    };
    children.filter_map(rank).collect()
}

/// False if the process is gone.
fn signal(process: u32, name: &str) -> bool {
    let mut kill = Command::new("kill");
    kill.args([&format!("-{name}"), &process.to_string()]).stderr(Stdio::null()).status().unwrap().success()
}

fn until(lab: &Lab, run: &str, lines: usize) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while lab.told(run) < lines {
        assert!(Instant::now() < deadline, "not {lines} steps within two minutes");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn events(lab: &Lab, run: &str) -> Vec<Value> {
    let lines = fs::read_to_string(lab.path(run).join("logbook.jsonl")).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn count(events: &[Value], event: &str) -> usize {
    events.iter().filter(|entry| entry["event"] == event).count()
}

/// `FERROPT_KILLS` sets how many; `scripts/fault-test` runs fifty.
#[test]
fn random_ranks_are_killed_at_random_moments() {
    let kills: u64 = std::env::var("FERROPT_KILLS").map_or(4, |n| n.parse().expect("a number"));
    let lab = Lab::new();
    let steps = 200 + 100 * kills;
    let whole = Whole::new(steps, 3);
    let seed = std::env::var("FERROPT_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut state: u64 = seed.unwrap_or_else(|| std::process::id().into());
    println!("{kills} kills, FERROPT_SEED={state}");
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    let mut supervisor = start(&lab, "killed", steps, 3, &["--restarts", "30"]);
    let mut done = 0;
    while done < kills && supervisor.try_wait().unwrap().is_none() {
        // Some in the midst of starting, some in the midst of training.
        std::thread::sleep(Duration::from_secs_f64(0.3 + 2.5 * random()));
        let workers = workers(&supervisor);
        if workers.is_empty() {
            continue;
        }
        let (rank, process) = workers[(random() * workers.len() as f64) as usize];
        if signal(process, "KILL") {
            done += 1;
            println!("kill {done}: rank {rank}, after {} lines of metrics", lab.told("killed"));
        }
    }
    ends_alike(&lab, supervisor, "killed", steps, &whole);
    let events = events(&lab, "killed");
    println!(
        "{} starts, {} entries of lost ranks",
        count(&events, "resumed") + 1,
        count(&events, "rank-lost")
    );
    assert!(done == kills, "the run ended after {done} of {kills} kills");
    assert!(count(&events, "rank-lost") > 0);
}

#[test]
fn a_rank_that_hangs_is_found_and_the_run_goes_on() {
    let lab = Lab::new();
    let whole = Whole::of_two();
    let supervisor =
        start(&lab, "stopped", STEPS, 2, &["--set", "parallel.timeout=3", "--hang", "60", "--grace", "1"]);
    until(&lab, "stopped", 60);
    let (_, process) = workers(&supervisor).into_iter().find(|(rank, _)| *rank == 1).expect("rank 1 runs");
    assert!(signal(process, "STOP"));
    let at = lab.told("stopped");
    ends_alike(&lab, supervisor, "stopped", STEPS, whole);
    let events = events(&lab, "stopped");
    assert_eq!(count(&events, "rank-lost"), 1, "after {at} steps: {events:?}");
    let why = events.iter().find(|entry| entry["event"] == "failed").expect("rank 0 says why it ended");
    let why = why["text"].as_str().unwrap();
    assert!(why.contains("rank 1") && why.contains("has not answered"), "names the rank: {why}");
}

#[test]
fn a_stopped_rank_is_killed_by_the_supervisor_before_the_others_wait_too_long() {
    let lab = Lab::new();
    let whole = Whole::of_two();
    let supervisor = start(&lab, "hung", STEPS, 2, &["--hang", "1"]);
    until(&lab, "hung", 60);
    let (_, process) = workers(&supervisor).into_iter().find(|(rank, _)| *rank == 1).expect("rank 1 runs");
    assert!(signal(process, "STOP"));
    ends_alike(&lab, supervisor, "hung", STEPS, whole);
    let page = fs::read_to_string(lab.path("hung/logbook.md")).unwrap();
    assert!(page.contains("rank 1 was stopped for too long"), "{page}");
}

#[test]
fn a_slow_rank_slows_the_run_and_nothing_else() {
    let lab = Lab::new();
    let whole = Whole::of_two();
    let mut supervisor = start(&lab, "slow", STEPS, 2, &[]);
    until(&lab, "slow", 20);
    let (_, process) = workers(&supervisor).into_iter().find(|(rank, _)| *rank == 1).expect("rank 1 runs");
    for _ in 0..15 {
        if supervisor.try_wait().unwrap().is_some() || !signal(process, "STOP") {
            break;
        }
        std::thread::sleep(Duration::from_millis(150));
        signal(process, "CONT");
        std::thread::sleep(Duration::from_millis(20));
    }
    ends_alike(&lab, supervisor, "slow", STEPS, whole);
    assert_eq!(count(&events(&lab, "slow"), "rank-lost"), 0);
}

#[test]
fn a_disk_that_is_full_for_a_while_costs_checkpoints_only() {
    let lab = Lab::new();
    if !Command::new("unshare").args(["-rm", "true"]).output().is_ok_and(|o| o.status.success()) {
        println!("skipped: `unshare -rm` is not allowed here, so no small tmpfs can be mounted");
        return;
    }
    // Enough for the disk to fill up and to be empty again in the midst of them.
    let steps = STEPS + 200;
    let whole = Whole::new(steps, 2);
    let config = lab.config("small/run", steps);
    fs::create_dir(lab.path("small")).unwrap();
    let command = ranks(&config, &["checkpoint.keep_last=1"], 2, &[]);
    let words = [command.get_program()].into_iter().chain(command.get_args());
    let words: Vec<String> = words.map(|word| format!("'{}'", word.to_str().unwrap())).collect();
    // The disk fills up after the first checkpoints, and somebody makes room later.
    let script = format!(
        "set -e
        mount -t tmpfs -o size=6m tmpfs \"$SMALL\"
        {} > \"$SAID\" 2>&1 & run=$!
        until [ -d \"$SMALL/run/checkpoints/step-00000060\" ]; do sleep 0.01; done
        dd if=/dev/zero of=\"$SMALL/ballast\" bs=4k 2> /dev/null || true
        until grep -q 'was not saved' \"$SAID\"; do kill -0 $run; sleep 0.01; done
        sleep 0.2
        rm \"$SMALL/ballast\"
        wait $run
        cp -r \"$SMALL/run\" \"$KEEP\"",
        words.join(" ")
    );
    let out: Output = Command::new("unshare")
        .args(["-rm", "sh", "-c", &script])
        .env("SMALL", lab.path("small"))
        .env("SAID", lab.path("said"))
        .env("KEEP", lab.path("kept"))
        .output()
        .unwrap();
    let said = fs::read_to_string(lab.path("said")).unwrap_or_default();
    assert!(out.status.success(), "{}\n{said}", text(&out));
    assert!(lab.tensors("kept", steps) == whole.tensors);
    let events = events(&lab, "kept");
    assert!(count(&events, "checkpoint-failed") > 0, "the logbook says so once there is room: {events:?}");
    assert_eq!(count(&events, "rank-lost"), 0);
}

#[test]
fn a_rank_without_room_for_its_files_costs_checkpoints_only() {
    let lab = Lab::new();
    let whole = Whole::of_two();
    let supervisor = start(&lab, "limited", STEPS, 2, &[]);
    until(&lab, "limited", 60);
    let (_, process) = workers(&supervisor).into_iter().find(|(rank, _)| *rank == 1).expect("rank 1 runs");
    let limit = |bytes: &str| {
        let (process, limit) = (format!("--pid={process}"), format!("--fsize={bytes}:unlimited"));
        assert!(Command::new("prlimit").args([process, limit]).status().unwrap().success());
    };
    limit("4096");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !fs::read_to_string(lab.path("limited.log")).unwrap().contains("was not saved") {
        assert!(Instant::now() < deadline, "no save failed within a minute");
        std::thread::sleep(Duration::from_millis(2));
    }
    limit("unlimited");
    ends_alike(&lab, supervisor, "limited", STEPS, whole);
    let events = events(&lab, "limited");
    let failed: Vec<_> = events.iter().filter(|entry| entry["event"] == "checkpoint-failed").collect();
    assert!(failed.iter().any(|entry| entry["text"].as_str().unwrap().contains("rank 1")), "{events:?}");
    assert_eq!(count(&events, "rank-lost"), 0);
}

#[test]
fn poison_is_left_out_on_many_ranks_as_on_one() {
    let lab = Lab::new();
    for i in 0..2 {
        let story = fs::read_to_string(lab.path(&format!("texts/{i}.txt"))).unwrap();
        fs::write(lab.path(&format!("texts/more-{i}.txt")), story.repeat(8)).unwrap();
    }
    let set = ["batch.tokens=128", "schedule.warmup=50", "optimizer.lr=3e-3", "recovery.window=32"];
    let quality = |run: &str| {
        let lines = fs::read_to_string(lab.path(run).join("metrics.jsonl")).unwrap();
        let mut values = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        values.rfind(|value| value["kind"] == "validation").unwrap()["loss"].as_f64().unwrap()
    };
    undisturbed(&lab, "clean", POISON_STEPS, &set, 2);
    fs::write(lab.path("texts/poison.txt"), "\u{1}".repeat(64 * 6)).unwrap();
    undisturbed(&lab, "poisoned", POISON_STEPS, &set, 2);
    let left_out = count(&events(&lab, "poisoned"), "skipped");
    let (clean, poisoned) = (quality("clean"), quality("poisoned"));
    println!("held-out loss: clean {clean:.4}, poisoned {poisoned:.4}, {left_out} batches left out");
    assert!(
        left_out > 0 && poisoned < 1.25 * clean,
        "{left_out} left out, clean {clean}, poisoned {poisoned}"
    );
}
