//! Checkpoints that several ranks write together, and what is left when some of them fail or die.
//!
//! Ranks are threads, or processes where they have to be killed: then this very test binary, started again to run
//! [`member`] alone.

mod checkpoint_common;
#[path = "checkpoint_common/kills.rs"]
mod kills;

use anyhow::Error;
use checkpoint_common::{assert_content, owned, save, snapshot};
use ferropt_train::checkpoint::{
    Checkpoint, DEFAULT_SHARD_BYTES, Event, Parting, Retention, Share, Snapshot, Store, Team, Writer,
};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

const SHARD_BYTES: u64 = 20_000;
const LONG: Duration = Duration::from_secs(60);

fn team(rank: usize, of: usize, attempt: u64) -> Team {
    Team { share: Share { rank, of }, attempt, patience: LONG }
}

/// Opens the folder as rank 0 does. A process that another test is starting has a copy of the last one's lock for a moment.
fn open_for_writing(run: &Path) -> Store {
    let started = Instant::now();
    loop {
        match Store::open_for_writing(run) {
            Err(error) if started.elapsed() > Duration::from_secs(10) => panic!("{error:#}"),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
            Ok(store) => return store,
        }
    }
}

/// Rank 0 opens the folder before the others start, as the trainer sees to.
fn writer(run: &Path, retention: Retention, team: Team) -> Writer {
    let store = if team.share.rank == 0 { open_for_writing(run) } else { Store::open(run).unwrap() };
    Writer::start(store, retention, SHARD_BYTES, team).unwrap()
}

/// Saves `snapshots` by so many ranks, each its own part, as `edit` leaves it. Returns what each rank's writer told.
fn save_together(
    run: &Path,
    snapshots: &[Snapshot],
    teams: &[Team],
    retention: Retention,
    edit: impl Fn(usize, &mut Snapshot) + Sync,
) -> Vec<Vec<Event>> {
    let first = writer(run, retention, teams[0].clone());
    let others = teams[1..].iter().map(|team| writer(run, retention, team.clone()));
    let writers: Vec<Writer> = [first].into_iter().chain(others).collect();
    std::thread::scope(|scope| {
        let rank = |(mut writer, team): (Writer, &Team)| {
            let (share, edit) = (team.share, &edit);
            scope.spawn(move || {
                for snapshot in snapshots {
                    let mut mine = owned(snapshot.clone(), share);
                    edit(share.rank, &mut mine);
                    writer.save(|| Ok(mine)).unwrap();
                }
                writer.finish()
            })
        };
        let threads: Vec<_> = writers.into_iter().zip(teams).map(rank).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn teams(of: usize, attempt: u64) -> Vec<Team> {
    (0..of).map(|rank| team(rank, of, attempt)).collect()
}

fn names_in(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

fn failure(event: &Event, step: u64) -> String {
    match event {
        Event::Failed { step: failed, error } if *failed == step => format!("{error:#}"),
        other => panic!("expected the failure of step {step}, got {other:?}"),
    }
}

#[test]
fn one_rank_writes_the_bytes_that_it_always_did() {
    let run = tempfile::tempdir().unwrap();
    save(run.path(), vec![snapshot(10, 2000)], Retention::ALL, 40_000);
    let manifest = Store::survey(&run.path().join("checkpoints/step-00000010")).unwrap();
    let found: BTreeMap<&str, &str> =
        manifest.files.iter().map(|(name, file)| (name.as_str(), file.crc32c.as_str())).collect();
    // Written by the version before checkpoints had more than one writer.
    let expected = BTreeMap::from([
        ("adam_m.safetensors", "a35b8e2c"),
        ("adam_v.safetensors", "7aeff43b"),
        ("config.json", "35c8046f"),
        ("model-00001-of-00002.safetensors", "100c3c6c"),
        ("model-00002-of-00002.safetensors", "76e6c21b"),
        ("model.safetensors.index.json", "9903caa2"),
    ]);
    assert_eq!(found, expected);
}

#[test]
fn any_number_of_ranks_writes_a_checkpoint_that_anyone_reads() {
    for of in [2, 3, 5, 9] {
        let run = tempfile::tempdir().unwrap();
        let snapshots: Vec<Snapshot> =
            [(1, 500), (2, 700), (3, 10), (2, 900)].map(|(s, r)| snapshot(s, r)).into();
        let retention = Retention { keep_last: 1, keep_every: Some(3) };
        let told = save_together(run.path(), &snapshots, &teams(of, 1), retention, |_, _| {});
        let saved = |event: &Event| match event {
            Event::Saved { step, path, bytes, .. } => (*step, path.clone(), *bytes),
            other => panic!("{other:?}"),
        };
        let saved_by = |told: &Vec<Event>| -> Vec<_> { told.iter().map(saved).collect() };
        let first = saved_by(&told[0]);
        assert_eq!(first.iter().map(|saved| saved.0).collect::<Vec<_>>(), [1, 2, 3, 2]);
        assert!(told.iter().all(|told| saved_by(told) == first), "{told:?}");
        let checkpoints = run.path().join("checkpoints");
        assert_eq!(names_in(&checkpoints), [".lock", "step-00000002", "step-00000003"]);
        for step in [2, 3] {
            let checkpoint = Store::open(run.path()).unwrap().load(step).unwrap();
            assert_content(&checkpoint);
            // Exactly the files that the manifest knows, and those that Hugging Face's index names.
            let mut names: Vec<String> = checkpoint.manifest().files.keys().cloned().collect();
            names.push("manifest.json".into());
            names.sort();
            assert_eq!(names_in(checkpoint.path()), names);
            let index = fs::read(checkpoint.path().join("model.safetensors.index.json")).unwrap();
            let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
            let weights = index["weight_map"].as_object().unwrap();
            assert_eq!(weights.len(), 4);
            for (name, file) in weights {
                let file = file.as_str().unwrap();
                assert!(file.starts_with("model-0") && file.contains("-of-"), "{file}");
                let bytes = fs::read(checkpoint.path().join(file)).unwrap();
                safetensors::SafeTensors::deserialize(&bytes).unwrap().tensor(name).unwrap();
            }
        }
        // The number of ranks is gone: one rank goes on.
        save(run.path(), vec![snapshot(4, 20)], Retention::ALL, DEFAULT_SHARD_BYTES);
        assert_content(&Store::open(run.path()).unwrap().latest_whole().unwrap().unwrap().checkpoint);
    }
}

#[test]
fn what_stops_one_rank_is_told_by_all_and_the_next_save_works() {
    for bad in 0..3 {
        let run = tempfile::tempdir().unwrap();
        let snapshots: Vec<Snapshot> = (1..=4).map(|step| snapshot(step, 300)).collect();
        let edit = |rank, snapshot: &mut Snapshot| {
            if rank == bad && snapshot.run.step.is_multiple_of(2) {
                let tensors = snapshot.groups.iter_mut().flat_map(|group| &mut group.tensors);
                tensors.take(1).for_each(|tensor| tensor.shape.push(7));
            }
        };
        let told = save_together(run.path(), &snapshots, &teams(3, 1), Retention::ALL, edit);
        for (rank, told) in told.iter().enumerate() {
            assert_eq!(told.len(), 4, "{told:?}");
            for event in [&told[1], &told[3]] {
                let step = if std::ptr::eq(event, &told[1]) { 2 } else { 4 };
                let error = failure(event, step);
                assert!(error.contains(&format!("step-{step:08} was not saved")), "{error}");
                assert!(error.contains("has shape") && error.contains(", 7]"), "{error}");
                if rank != bad {
                    assert!(error.contains(&format!("rank {bad} could not")), "{error}");
                }
            }
            assert!(matches!(told[0], Event::Saved { step: 1, .. }), "{told:?}");
            assert!(matches!(told[2], Event::Saved { step: 3, .. }), "{told:?}");
        }
        let store = Store::open(run.path()).unwrap();
        assert_content(&store.latest_whole().unwrap().unwrap().checkpoint);
        assert_eq!(store.list().unwrap().len(), 2);
        // Rank 0's last words on step 4 stay until the next save or start; nothing else does.
        drop(open_for_writing(run.path()));
        assert_eq!(names_in(store.path()), [".lock", "step-00000001", "step-00000003"]);
    }
}

#[test]
fn a_rank_that_never_comes_is_named_when_patience_ends() {
    let run = tempfile::tempdir().unwrap();
    let mut teams = teams(4, 1);
    teams.truncate(2);
    teams.iter_mut().for_each(|team| team.patience = Duration::from_millis(300));
    let told = save_together(run.path(), &[snapshot(1, 50)], &teams, Retention::ALL, |_, _| {});
    for told in told {
        let error = failure(&told[0], 1);
        assert!(error.contains("no part came from these ranks: 2, 3"), "{error}");
    }
    assert!(Store::open(run.path()).unwrap().list().unwrap().is_empty());
}

#[test]
fn a_rank_without_a_first_one_says_so() {
    let run = tempfile::tempdir().unwrap();
    let mut writer = writer(run.path(), Retention::ALL, team(1, 2, 1));
    // Rank 0 is found to be lost while this one waits for it.
    let started = Instant::now();
    let parting = Parting { patience: Duration::ZERO, lost: Some(0) };
    writer.hurry_when(move || (started.elapsed() > Duration::from_millis(100)).then_some(parting));
    writer.save(|| Ok(snapshot(1, 50))).unwrap();
    // As at the next save, before anything of that is sent to other ranks.
    writer.settle().unwrap();
    assert!(started.elapsed() < LONG / 2, "{:?}", started.elapsed());
    let error = failure(&writer.finish()[0], 1);
    assert!(error.contains("rank 0 did not begin it") && error.contains("run.dir"), "{error}");
}

#[test]
fn the_part_of_a_rank_that_is_lost_is_not_waited_for() {
    let run = tempfile::tempdir().unwrap();
    let mut first = writer(run.path(), Retention::ALL, team(0, 3, 1));
    let started = Instant::now();
    first.hurry_when(|| Some(Parting { patience: LONG, lost: Some(2) }));
    first.save(|| Ok(owned(snapshot(1, 50), team(0, 3, 1).share))).unwrap();
    let error = failure(&first.finish()[0], 1);
    assert!(error.contains("no part came from these ranks: 1, 2"), "{error}");
    assert!(started.elapsed() < LONG / 2, "{:?}", started.elapsed());
}

#[test]
fn tensors_that_two_ranks_claim_are_refused() {
    let run = tempfile::tempdir().unwrap();
    let all = snapshot(1, 50);
    let edit = |_, mine: &mut Snapshot| *mine = all.clone();
    for told in save_together(run.path(), &[snapshot(1, 50)], &teams(2, 1), Retention::ALL, edit) {
        let error = failure(&told[0], 1);
        assert!(error.contains("came from rank 1 and an earlier one"), "{error}");
    }
}

const MEMBER: &str = "FERROPT_TEST_MEMBER";

/// Saves every step from `first` on as one rank of several, until it fails; runs only when another test starts it.
#[test]
#[ignore = "started by the other tests, in a process that they can kill"]
fn member() {
    let Ok(text) = std::env::var(MEMBER) else {
        println!("skipped: this test is the process that other tests kill");
        return;
    };
    let words: Vec<&str> = text.splitn(6, ' ').collect();
    let [rank, of, attempt, first, rows] = [0, 1, 2, 3, 4].map(|i| words[i].parse::<u64>().unwrap());
    let team = team(rank as usize, of as usize, attempt);
    let mut writer = writer(Path::new(words[5]), Retention { keep_last: 2, keep_every: None }, team.clone());
    println!("ready");
    for step in first.. {
        writer.save(|| Ok(owned(snapshot(step, rows as usize), team.share))).unwrap();
        for event in writer.poll() {
            match event {
                Event::Saved { step, .. } => println!("saved {step}"),
                other => {
                    println!("failed {other:?}");
                    return;
                }
            }
        }
    }
}

/// Starts [`member`]; `shell` is what runs before it in a shell, for limits.
fn start_member(
    run: &Path,
    team: &Team,
    first: u64,
    rows: usize,
    shell: &str,
) -> (Child, std::io::Lines<BufReader<ChildStdout>>) {
    let Team { share, attempt, .. } = team;
    let mut child = Command::new("bash")
        .arg("-c")
        .arg(format!("{shell} exec \"$0\" --exact member --ignored --nocapture --test-threads 1"))
        .arg(std::env::current_exe().unwrap())
        .env(MEMBER, format!("{} {} {attempt} {first} {rows} {}", share.rank, share.of, run.display()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(
        lines.by_ref().map_while(Result::ok).any(|line| line.contains("ready")),
        "the rank did not start"
    );
    (child, lines)
}

/// Saves every step as one rank until a save fails, which it may once `dead` is set. Returns the last step saved, and the
/// failure.
fn save_until_failure(
    run: &Path,
    team: &Team,
    first: u64,
    rows: usize,
    dead: &Arc<AtomicBool>,
) -> (u64, String) {
    let mut writer = writer(run, Retention { keep_last: 2, keep_every: None }, team.clone());
    let dead = dead.clone();
    let parting = Parting { patience: Duration::from_millis(50), lost: None };
    writer.hurry_when(move || dead.load(Ordering::Relaxed).then_some(parting));
    for step in first.. {
        writer.save(|| Ok(owned(snapshot(step, rows), team.share))).unwrap();
        let event = loop {
            if let Some(event) = writer.poll().pop() {
                break event;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        if let Event::Failed { error, .. } = event {
            return (step - 1, format!("{error:#}"));
        }
    }
    unreachable!()
}

#[test]
fn kill_9_of_any_rank_at_any_moment_leaves_a_whole_checkpoint() {
    let run = tempfile::tempdir().unwrap();
    let (of, rows) = (3, 1500);
    let (mut torn, mut newest) = (0, 0);
    for round in 0..24_u64 {
        let victim = (round % of as u64) as usize;
        let attempt = round + 1;
        let dead = Arc::new(AtomicBool::new(false));
        if victim != 0 {
            drop(open_for_writing(run.path()));
        }
        let victims_team = team(victim, of, attempt);
        let (mut child, lines) = start_member(run.path(), &victims_team, newest + 1, rows, "");
        let others: Vec<Team> =
            (0..of).filter(|rank| *rank != victim).map(|rank| team(rank, of, attempt)).collect();
        let ends = std::thread::scope(|scope| {
            let (run, dead) = (run.path(), &dead);
            let rank = |team| scope.spawn(move || save_until_failure(run, team, newest + 1, rows, dead));
            let threads: Vec<_> = others.iter().map(rank).collect();
            std::thread::sleep(Duration::from_micros(round.wrapping_mul(0x9e37_79b9) % 60_000));
            child.kill().unwrap(); // SIGKILL
            child.wait().unwrap();
            dead.store(true, Ordering::Relaxed);
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        for (last, error) in ends {
            newest = newest.max(last);
            // On a busy machine another rank may be late too.
            let expected: &[&str] = match victim {
                0 => &["rank 0 did not begin it", "rank 0 did not finish the checkpoint"],
                1 => &["no part came from these ranks: 1", "rank 0"],
                _ => &["no part came from these ranks: 2", "no part came from these ranks: 1, 2", "rank 0"],
            };
            assert!(expected.iter().any(|part| error.contains(part)), "round {round}: {error}");
        }
        for line in lines.map_while(Result::ok) {
            if let Some(step) = line.strip_prefix("saved ") {
                newest = newest.max(step.parse().unwrap());
            }
            assert!(!line.starts_with("failed"), "{line}");
        }
        let store = Store::open(run.path()).unwrap();
        torn += names_in(store.path()).iter().filter(|name| name.contains(".tmp-")).count();
        newest = kills::newest_of_whole(&store, newest, round);
    }
    assert!(torn > 0, "no kill hit a save, so this test proved nothing");
    assert!(newest > 10, "only {newest} steps were saved");
    drop(open_for_writing(run.path()));
    assert!(!names_in(&run.path().join("checkpoints")).iter().any(|name| name.contains(".tmp-")));
}

#[test]
fn a_rank_whose_disk_is_full_stops_the_save_of_all_and_nothing_else() {
    let run = tempfile::tempdir().unwrap();
    save(run.path(), vec![snapshot(1, 10)], Retention::ALL, DEFAULT_SHARD_BYTES);
    drop(open_for_writing(run.path()));
    // Blocks of 1 KiB, for this rank alone; the signal is ignored so that the write fails instead of killing the process.
    let limit = "trap '' XFSZ; ulimit -f 64;";
    let (mut child, lines) = start_member(run.path(), &team(2, 3, 9), 2, 2000, limit);
    let never = Arc::new(AtomicBool::new(false));
    let started = Instant::now();
    let ends = std::thread::scope(|scope| {
        let rank = |rank| {
            let (run, never) = (run.path(), &never);
            scope.spawn(move || save_until_failure(run, &team(rank, 3, 9), 2, 2000, never))
        };
        let threads = [rank(0), rank(1)];
        threads.map(|thread| thread.join().unwrap())
    });
    assert!(started.elapsed() < LONG / 2, "the others waited for a rank that had told them");
    for (last, error) in ends {
        assert_eq!(last, 1);
        for part in ["rank 2 could not write its part", "no room", "it needs", "are free", "Free some space"]
        {
            assert!(error.contains(part), "{part:?} is not in {error}");
        }
    }
    let told = lines.map_while(Result::ok).collect::<Vec<_>>().concat();
    assert!(told.contains("failed") && told.contains("there is no room"), "{told}");
    assert!(child.wait().unwrap().success());
    let store = Store::open(run.path()).unwrap();
    assert!(!names_in(store.path()).iter().any(|name| name.contains(".tmp-") && !name.ends_with(".failed")));
    // The disk has room again.
    let told = save_together(run.path(), &[snapshot(3, 2000)], &teams(3, 10), Retention::ALL, |_, _| {});
    assert!(told.iter().all(|told| matches!(told[..], [Event::Saved { step: 3, .. }])), "{told:?}");
    assert_content(&store.latest_whole().unwrap().unwrap().checkpoint);
    assert_eq!(names_in(store.path()), [".lock", "step-00000001", "step-00000003"]);
}

#[test]
fn what_an_earlier_start_left_is_never_mixed_with_a_new_one() {
    let run = tempfile::tempdir().unwrap();
    // The first start: rank 2 never comes, rank 0 is killed, and rank 1 still believes in it.
    let (mut child, _lines) = start_member(run.path(), &team(0, 3, 1), 5, 800, "");
    let mut stale = writer(run.path(), Retention::ALL, team(1, 3, 1));
    stale.save(|| Ok(owned(snapshot(5, 800), team(1, 3, 1).share))).unwrap();
    let part = run.path().join("checkpoints/.step-00000005.tmp-1-0/.part-00001.json");
    let started = Instant::now();
    while !part.exists() {
        assert!(started.elapsed() < LONG, "rank 1 wrote no part");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(stale.poll().is_empty());
    // The second start saves the same step with other content.
    let told = save_together(run.path(), &[snapshot(5, 60)], &teams(3, 2), Retention::ALL, |_, _| {});
    assert!(told.iter().all(|told| matches!(told[..], [Event::Saved { step: 5, .. }])), "{told:?}");
    let checkpoint = Store::open(run.path()).unwrap().load(5).unwrap();
    assert_eq!(checkpoint.manifest().run.model["rows"], 60);
    assert_content(&checkpoint);
    let error = failure(&stale.finish()[0], 5);
    assert!(error.contains("rank 0 has given it up"), "{error}");
    assert_content(&Store::open(run.path()).unwrap().load(5).unwrap());
    assert_eq!(names_in(&run.path().join("checkpoints")), [".lock", "step-00000005"]);
}

/// Gives every thread the bytes of all.
struct Exchange {
    barrier: Barrier,
    said: Vec<Mutex<Vec<u8>>>,
}

impl Exchange {
    fn among(of: usize) -> Exchange {
        Exchange { barrier: Barrier::new(of), said: (0..of).map(|_| Mutex::default()).collect() }
    }

    fn all(&self, rank: usize, bytes: &[u8]) -> Vec<Vec<u8>> {
        *self.said[rank].lock().unwrap() = bytes.to_vec();
        self.barrier.wait();
        let all = self.said.iter().map(|said| said.lock().unwrap().clone()).collect();
        self.barrier.wait();
        all
    }
}

/// What all ranks find: the step, and the damage passed over; or the error.
type Together = Result<Option<(u64, Vec<String>)>, String>;

/// What all ranks come to with `open`, which gets the store, a rank's share and its way to tell the others.
fn together(
    run: &Path,
    of: usize,
    open: impl Fn(
        Store,
        Share,
        &dyn Fn(&[u8]) -> Vec<Vec<u8>>,
    ) -> anyhow::Result<(Option<Checkpoint>, Vec<Error>)>
    + Sync,
) -> Together {
    let exchange = Exchange::among(of);
    let mut found = std::thread::scope(|scope| {
        let rank = |rank| {
            let (exchange, open) = (&exchange, &open);
            scope.spawn(move || {
                let all = |bytes: &[u8]| exchange.all(rank, bytes);
                let found = open(Store::open(run).unwrap(), Share { rank, of }, &all);
                found.map_err(|error| format!("{error:#}")).map(|(checkpoint, damaged)| {
                    let damaged = damaged.iter().map(|error| format!("{error:#}")).collect();
                    checkpoint.inspect(assert_content).map(|found| (found.manifest().run.step, damaged))
                })
            })
        };
        let threads: Vec<_> = (0..of).map(rank).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(found.windows(2).all(|pair| pair[0] == pair[1]), "ranks found different things: {found:?}");
    found.remove(0)
}

/// The newest.
fn find_together(run: &Path, of: usize) -> Together {
    together(run, of, |store, share, all| {
        let found = store.latest_whole_together(share, |bytes: &[u8]| Ok(all(bytes)))?;
        Ok(found.map_or((None, Vec::new()), |found| (Some(found.checkpoint), found.damaged)))
    })
}

#[test]
fn damage_that_one_rank_finds_is_damage_to_all() {
    let run = tempfile::tempdir().unwrap();
    assert_eq!(find_together(run.path(), 3), Ok(None));
    let snapshots: Vec<Snapshot> = (1..=3).map(|step| snapshot(step, 300)).collect();
    save_together(run.path(), &snapshots, &teams(4, 1), Retention::ALL, |_, _| {});
    for of in [1, 2, 3, 7, 20] {
        assert_eq!(find_together(run.path(), of), Ok(Some((3, Vec::new()))));
    }
    // Every file of the newest: some rank finds it, whichever has it in its share.
    let newest = run.path().join("checkpoints/step-00000003");
    for name in names_in(&newest) {
        let file = newest.join(&name);
        let whole = fs::read(&file).unwrap();
        let mut damaged = whole.clone();
        *damaged.last_mut().unwrap() ^= 4;
        fs::write(&file, damaged).unwrap();
        let (step, passed_over) = find_together(run.path(), 3).unwrap().unwrap();
        assert_eq!(step, 2);
        assert!(passed_over.len() == 1 && passed_over[0].contains(&name), "{name}: {passed_over:?}");
        fs::write(&file, whole).unwrap();
    }
    for step in 1..=3 {
        fs::remove_file(run.path().join(format!("checkpoints/step-{step:08}/config.json"))).unwrap();
    }
    let error = find_together(run.path(), 3).unwrap_err();
    assert!(error.contains("is whole") && error.contains("config.json"), "{error}");
}

#[test]
fn the_first_that_is_whole_is_that_of_rank_0s_list_and_each_rank_reads_its_share() {
    let run = tempfile::tempdir().unwrap();
    let snapshots: Vec<Snapshot> = (1..=3).map(|step| snapshot(step, 300)).collect();
    save_together(run.path(), &snapshots, &teams(2, 1), Retention::ALL, |_, _| {});
    let of_these = |steps: &'static [u64]| {
        together(run.path(), 2, move |store, share, all| {
            let steps = if share.rank == 0 { steps } else { &[9] };
            store.first_whole_together(steps, share, |bytes: &[u8]| Ok(all(bytes)))
        })
    };
    assert_eq!(of_these(&[2, 1, 3]), Ok(Some((2, Vec::new()))));
    assert_eq!(of_these(&[]), Ok(None));
    let file = run.path().join("checkpoints/step-00000002/adam_v.safetensors");
    let mut content = fs::read(&file).unwrap();
    *content.last_mut().unwrap() ^= 4;
    fs::write(&file, content).unwrap();
    let found = |rank| Checkpoint::open_share(file.parent().unwrap(), Share { rank, of: 2 }).is_err();
    assert!(found(0) != found(1), "one of them reads the file");
    let (step, passed_over) = of_these(&[2, 1, 3]).unwrap().unwrap();
    assert!(step == 1 && passed_over.len() == 1, "{step}: {passed_over:?}");
    assert_eq!(of_these(&[2]), Ok(None));
}
