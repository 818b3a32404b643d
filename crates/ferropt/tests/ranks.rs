//! Ranks that do not fit together, stand still, or end: what they say, and with which status.

mod lab;

use lab::{Lab, free_port, text, train};
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const COMMON: [&str; 4] =
    ["batch.tokens=768", "batch.micro_batch=1", "run.threads=1", "validation.every=1000"];

/// One of several ranks, with keys of its own.
fn rank(config: &Path, set: &[&str], rank: usize, ranks: usize, port: u16) -> Command {
    let mut command = train(config, &[&COMMON, set].concat());
    command.env("RANK", rank.to_string()).env("WORLD_SIZE", ranks.to_string());
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Two ranks, the second of which has other keys.
fn two(lab: &Lab, run: &str, set: &[&str]) -> [Output; 2] {
    let (config, port) = (lab.config(run, 10), free_port());
    let ranks = [&[], set].map(|set| set.to_vec());
    let start = |(number, set): (usize, &Vec<&str>)| rank(&config, set, number, 2, port).spawn().unwrap();
    let ranks: Vec<Child> = ranks.iter().enumerate().map(start).collect();
    let ends: Vec<Output> = ranks.into_iter().map(|rank| rank.wait_with_output().unwrap()).collect();
    ends.try_into().unwrap()
}

#[test]
fn ranks_that_were_given_other_things_are_refused_with_their_names() {
    let lab = Lab::new();
    let less = format!("data.train={}", lab.path("texts/0.txt").display());
    let held_out = fs::read_to_string(lab.path("held-out.txt")).unwrap();
    fs::write(lab.path("other.txt"), held_out.replace('e', "a")).unwrap();
    let more = format!("data.validation.more={}", lab.path("other.txt").display());
    let as_long = format!("data.validation.held-out={}", lab.path("other.txt").display());
    for (set, words) in [
        (&["optimizer.lr=0.5"][..], "optimizer.lr is 0.5 on rank 1 and 0.005 on rank 0"),
        (&["run.seed=7"], "run.seed is 7 on rank 1 and 1 on rank 0"),
        (&["recovery.enabled=false"], "recovery.enabled is false on rank 1 and true on rank 0"),
        (&["run.precision=f32"], "run.precision is \"f32\" on rank 1 and \"bf16\" on rank 0"),
        (&["run.device=cuda:3"], "run.device is \"cuda\" on rank 1 and \"cpu\" on rank 0"),
        (&["log.trace=2"], "log.trace is 2 on rank 1 and 0 on rank 0"),
        (&["checkpoint.every=3"], "checkpoint.every"),
        (&[&less], "data.train.documents is 1 on rank 1 and 4 on rank 0"),
        (&[&more], "data.validation.more"),
        (&[&as_long], "data.validation.held-out.checksum is "),
    ] {
        for end in two(&lab, "run", set) {
            let said = text(&end);
            assert_eq!(end.status.code(), Some(1), "{set:?}: {said}");
            assert!(said.contains(words), "{set:?}: {said}");
        }
    }
    assert!(!lab.path("run/checkpoints").exists(), "nothing was trained");
}

#[test]
fn another_run_folder_is_refused() {
    let lab = Lab::new();
    fs::create_dir_all(lab.path("elsewhere/checkpoints")).unwrap();
    let elsewhere = format!("run.dir={}", lab.path("elsewhere").display());
    for end in two(&lab, "run", &[&elsewhere]) {
        assert_eq!(end.status.code(), Some(1), "{}", text(&end));
        assert!(text(&end).contains("another folder on rank 1 than on rank 0"), "{}", text(&end));
    }
    // The same folder by another name is none.
    std::os::unix::fs::symlink(lab.path("run"), lab.path("link")).unwrap();
    let link = format!("run.dir={}", lab.path("link").display());
    for end in two(&lab, "run", &[&link, "run.threads=2"]) {
        assert!(end.status.success(), "{}", text(&end));
    }
}

#[test]
fn what_is_wrong_with_one_rank_ends_all_with_its_status() {
    let lab = Lab::new();
    let ends = two(&lab, "run", &["data.tokenizer=nothing.json"]);
    for end in &ends {
        assert_eq!(end.status.code(), Some(1), "{}", text(end));
        assert!(text(end).contains("nothing.json"), "{}", text(end));
    }
    assert!(text(&ends[0]).contains("rank 1 (on "), "{}", text(&ends[0]));
}

/// As under a scheduler: each supervisor is told by the environment which rank its process is, and of how many.
#[test]
fn each_rank_may_have_a_supervisor_in_any_layout() {
    let lab = Lab::new();
    let (config, port) = (lab.config("run", 3), free_port());
    let set = ["parallel.tensor=2"];
    let supervisors = [0, 1].map(|number| rank(&config, &set, number, 2, port).arg("--supervise").spawn());
    for supervisor in supervisors {
        let end = supervisor.unwrap().wait_with_output().unwrap();
        assert!(end.status.success(), "{}", text(&end));
    }
    lab.tensors("run", 3);
}

/// Starts a run on three ranks and waits until it has made a few steps.
fn started(lab: &Lab, run: &str, set: &[&str], more: &[&str]) -> Child {
    let mut command = train(&lab.config(run, 100_000), &[&COMMON, set].concat());
    let said = fs::File::create(lab.path(&format!("{run}.log"))).unwrap();
    command.args(["--ranks", "3"]).args(more).stdin(Stdio::null());
    let child = command.stdout(said.try_clone().unwrap()).stderr(said).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while lab.told(run) < 20 {
        assert!(Instant::now() < deadline, "not 20 steps within a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

fn ranks_of(launcher: &Child) -> Vec<String> {
    let id = launcher.id();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    children.split_whitespace().map(String::from).collect()
}

fn signal(processes: &[String], name: &str) {
    assert!(Command::new("kill").arg(format!("-{name}")).args(processes).status().unwrap().success());
}

#[test]
fn a_job_that_is_suspended_as_a_whole_goes_on() {
    let lab = Lab::new();
    let mut launcher = started(&lab, "run", &["parallel.timeout=4", "checkpoint.every=100000"], &[]);
    let ranks = ranks_of(&launcher);
    signal(&ranks, "STOP");
    std::thread::sleep(Duration::from_secs(7));
    let before = lab.told("run");
    signal(&ranks, "CONT");
    let deadline = Instant::now() + Duration::from_secs(60);
    while lab.told("run") < before + 50 {
        let said = || fs::read_to_string(lab.path("run.log")).unwrap();
        assert!(launcher.try_wait().unwrap().is_none(), "{}", said());
        assert!(Instant::now() < deadline, "{}", said());
        std::thread::sleep(Duration::from_millis(10));
    }
    signal(&[launcher.id().to_string()], "INT");
    assert_eq!(launcher.wait().unwrap().code(), Some(0));
}

/// The others are in the midst of checkpoints nearly always.
#[test]
fn ranks_end_soon_after_the_first_one_is_gone() {
    let lab = Lab::new();
    for round in 0..3 {
        let run = format!("run-{round}");
        let mut launcher =
            started(&lab, &run, &["checkpoint.every=1", "parallel.timeout=60"], &["--grace", "60"]);
        let ranks = ranks_of(&launcher);
        let gone = Instant::now();
        signal(&ranks[..1], "KILL");
        assert_eq!(launcher.wait().unwrap().code(), Some(75));
        assert!(gone.elapsed() < Duration::from_secs(10), "{:?}", gone.elapsed());
    }
}

#[test]
fn a_stop_before_all_ranks_are_there_is_heard() {
    let lab = Lab::new();
    let config = lab.config("run", 10);
    for (name, status) in [("INT", 0), ("TERM", 75)] {
        let port = free_port();
        let first = rank(&config, &[], 0, 2, port).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        // Where nobody listens, a connection may be to its own end.
        let listens = || {
            let stream = std::net::TcpStream::connect(("127.0.0.1", port)).ok()?;
            Some(stream.local_addr().ok()? != stream.peer_addr().ok()?)
        };
        while listens() != Some(true) {
            assert!(Instant::now() < deadline, "nobody listens");
            std::thread::sleep(Duration::from_millis(10));
        }
        signal(&[first.id().to_string()], name);
        let end = first.wait_with_output().unwrap();
        assert_eq!(end.status.code(), Some(status), "{}", text(&end));
        assert!(text(&end).contains("stopped before training went on"), "{}", text(&end));
    }
}

/// Ctrl-C at any moment of a start.
#[test]
fn a_stop_while_ranks_start_is_no_failure() {
    let lab = Lab::new();
    for delay in [20, 40, 60, 90, 130] {
        let mut command = train(&lab.config("run", 100_000), &COMMON);
        let launcher =
            command.args(["--ranks", "2", "--supervise"]).stdin(Stdio::null()).stdout(Stdio::piped());
        let launcher = launcher.stderr(Stdio::piped()).spawn().unwrap();
        // Once it has handlers, which it has when it has started ranks.
        let deadline = Instant::now() + Duration::from_secs(20);
        while ranks_of(&launcher).is_empty() {
            assert!(Instant::now() < deadline, "no rank is started");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(delay));
        signal(&[launcher.id().to_string()], "INT");
        let end = launcher.wait_with_output().unwrap();
        assert_eq!(end.status.code(), Some(0), "after {delay} ms: {}", text(&end));
    }
}

#[test]
fn a_trace_of_fewer_steps_than_asked_for_is_written_and_one_that_cannot_be_ends_nothing() {
    let lab = Lab::new();
    lab.train(&lab.config("short", 3), &["log.trace=10"]);
    let trace = fs::read_to_string(lab.path("short/trace.json")).unwrap();
    assert_eq!(trace.matches("\"name\":\"optimiser\"").count(), 3);
    fs::create_dir_all(lab.path("blocked/trace.json")).unwrap();
    let out = lab.train(&lab.config("blocked", 5), &["log.trace=2"]);
    assert!(text(&out).contains("warning: there is no trace of this start"), "{}", text(&out));
}
