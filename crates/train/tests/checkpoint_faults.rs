//! Real faults: the process killed in the middle of saves, a disk that is full, a file-size limit.
//!
//! The victim is this very test binary, started again to run [`victim`] alone.

mod checkpoint_common;
#[path = "checkpoint_common/kills.rs"]
mod kills;

use checkpoint_common::{assert_content, save, snapshot};
use ferropt_train::checkpoint::{DEFAULT_SHARD_BYTES, Event, Retention, Store, Team, Writer};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const RUN: &str = "FERROPT_TEST_VICTIM_RUN";
const ROWS: &str = "FERROPT_TEST_VICTIM_ROWS";
const ROWS_KILLED: usize = 2000;
const SHARD_BYTES: u64 = 40_000;

/// Trains forever as far as the store can tell: resumes from the newest whole checkpoint and saves every step.
/// Tells on standard output what is durable. Runs only when another test starts it.
#[test]
#[ignore = "started by the other tests, in a process that they can kill"]
fn victim() {
    let (Ok(run), Ok(rows)) = (std::env::var(RUN), std::env::var(ROWS)) else {
        println!("skipped: this test is the process that other tests kill");
        return;
    };
    let store = Store::open_for_writing(&run).unwrap();
    let found = store.latest_whole().unwrap();
    let first = found.map_or(1, |found| found.checkpoint.manifest().run.step + 1);
    let retention = Retention { keep_last: 2, keep_every: Some(10) };
    let mut writer = Writer::start(store, retention, SHARD_BYTES, Team::alone()).unwrap();
    println!("ready {first}");
    for step in first.. {
        writer.save(|| Ok(snapshot(step, rows.parse().unwrap()))).unwrap();
        for event in writer.poll() {
            match event {
                Event::Saved { step, .. } => println!("saved {step}"),
                other => {
                    println!("failed {other:#?}");
                    writer.finish();
                    return;
                }
            }
        }
    }
}

/// Starts the victim; `shell` is what runs before it in a shell, for limits.
fn start_victim(run: &Path, rows: usize, shell: &str) -> Child {
    Command::new("bash")
        .arg("-c")
        .arg(format!("{shell} exec \"$0\" --exact victim --ignored --nocapture --test-threads 1"))
        .arg(std::env::current_exe().unwrap())
        .env(RUN, run)
        .env(ROWS, rows.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Numbers for the moments of the kills; any would do, these are spread evenly.
fn spread(round: u64) -> u64 {
    round.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[test]
fn kill_9_at_any_moment_leaves_a_whole_checkpoint() {
    let run = tempfile::tempdir().unwrap();
    let checkpoints = run.path().join("checkpoints");
    let elsewhere = tempfile::tempdir().unwrap();
    let started = Instant::now();
    save(
        elsewhere.path(),
        (1..=4).map(|step| snapshot(step, ROWS_KILLED)).collect(),
        Retention::ALL,
        SHARD_BYTES,
    );
    let four_saves = started.elapsed().as_nanos() as u64;

    let (mut newest, mut torn) = (0, 0);
    for round in 0..60 {
        let mut child = start_victim(run.path(), ROWS_KILLED, "");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.by_ref().map(Result::unwrap).find(|line| line.contains("ready")).unwrap();
        let resumed: u64 = ready.rsplit(' ').next().unwrap().parse().unwrap();
        assert!(resumed > newest, "step {newest} was durable, yet training went on from {resumed}");

        // Up to four saves later: all their phases are hit, deletions included.
        std::thread::sleep(Duration::from_nanos(spread(round) % four_saves));
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        for line in lines.map_while(Result::ok) {
            if let Some(step) = line.strip_prefix("saved ") {
                newest = step.parse().unwrap();
            }
            assert!(!line.starts_with("failed"), "{line}");
        }

        let names = fs::read_dir(&checkpoints).unwrap().map(|entry| entry.unwrap().file_name());
        torn += names.filter(|name| name.to_str().unwrap().contains(".tmp-")).count();
        let store = Store::open(run.path()).unwrap();
        newest = kills::newest_of_whole(&store, newest, round);
    }
    assert!(torn > 0, "no kill hit a save, so this test proved nothing");
    assert!(newest > 10, "only {newest} steps were saved");
    drop(Store::open_for_writing(run.path()).unwrap());
    let left = fs::read_dir(&checkpoints).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(left.filter(|name| name.to_str().unwrap().contains(".tmp-")).count(), 0);
}

/// A small file system of its own, where the tests may mount one.
struct SmallDisk(PathBuf, #[allow(dead_code)] tempfile::TempDir);

impl SmallDisk {
    fn mount(options: &str) -> Option<SmallDisk> {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("disk");
        fs::create_dir(&place).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&place).stderr(Stdio::null());
        match mount.status() {
            Ok(status) if status.success() => Some(SmallDisk(place, folder)),
            _ => {
                println!("skipped: mounting a small tmpfs needs root");
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// What is expected of a save that did not fit: an error that says what to do, no remains, the earlier one intact.
fn assert_refused(run: &Path, events: &[Event]) {
    let [Event::Saved { step: 1, .. }, Event::Failed { step: 2, error }] = events else {
        panic!("{events:?}")
    };
    let error = format!("{error:#}");
    for part in ["step-00000002", "no room", "it needs", "are free", "Free some space"] {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
    let mut names: Vec<_> =
        fs::read_dir(run.join("checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, [".lock", "step-00000001"]);
    assert_content(&Store::open(run).unwrap().latest_whole().unwrap().unwrap().checkpoint);
}

#[test]
fn a_disk_that_is_too_small_is_refused_and_training_goes_on() {
    let Some(disk) = SmallDisk::mount("size=1m") else { return };
    let snapshots = vec![snapshot(1, 1000), snapshot(2, 20_000)];
    assert_refused(&disk.0, &save(&disk.0, snapshots, Retention::ALL, DEFAULT_SHARD_BYTES));
    // The same disk, something smaller: the next save succeeds.
    let events = save(&disk.0, vec![snapshot(3, 1000)], Retention::ALL, DEFAULT_SHARD_BYTES);
    assert!(matches!(events[..], [Event::Saved { step: 3, .. }]), "{events:?}");
}

#[test]
fn a_disk_that_fills_up_in_the_middle_of_a_save_leaves_no_remains() {
    // Room for the bytes, not for the number of files: the save starts and then meets the full disk.
    let Some(disk) = SmallDisk::mount("size=16m,nr_inodes=16") else { return };
    let snapshots = vec![snapshot(1, 200), snapshot(2, 400)];
    assert_refused(&disk.0, &save(&disk.0, snapshots, Retention::ALL, 20_000));
}

#[test]
fn a_file_size_limit_stops_a_save_and_nothing_else() {
    let run = tempfile::tempdir().unwrap();
    save(run.path(), vec![snapshot(1, 10)], Retention::ALL, DEFAULT_SHARD_BYTES);
    // Blocks of 1 KiB; the signal is ignored so that the write fails instead of killing the process.
    let child = start_victim(run.path(), 2000, "trap '' XFSZ; ulimit -f 64;");
    let told = child.wait_with_output().unwrap();
    let told = String::from_utf8(told.stdout).unwrap();
    assert!(told.contains("ready 2") && told.contains("failed") && told.contains("no room"), "{told}");
    let found = Store::open(run.path()).unwrap().latest_whole().unwrap().unwrap();
    assert_eq!(found.checkpoint.manifest().run.step, 1);
    let names = fs::read_dir(run.path().join("checkpoints")).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(names.filter(|name| name.to_str().unwrap().contains(".tmp-")).count(), 0);
}

#[test]
fn the_lock_of_a_killed_process_is_free() {
    let run = tempfile::tempdir().unwrap();
    let mut child = start_victim(run.path(), 100, "");
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().starts_with("saved")));
    let refused = Store::open_for_writing(run.path()).unwrap_err().to_string();
    assert!(refused.contains("another process is training"), "{refused}");
    child.kill().unwrap();
    child.wait().unwrap();
    let started = Instant::now();
    while Store::open_for_writing(run.path()).is_err() {
        assert!(started.elapsed() < Duration::from_secs(10), "the lock outlived its process");
    }
}
