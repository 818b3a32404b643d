use super::*;
use crate::launch::{Supervision, supervise};
use std::path::Path;

/// Ranks that run a shell script.
fn group(folder: &Path, ranks: usize, script: &str) -> Group {
    Group {
        program: "/bin/sh".into(),
        arguments: vec!["-c".into(), script.into()],
        ranks: Some(ranks),
        threads: None,
        logs: folder.join("logs"),
        grace: Duration::from_millis(300),
        hang: Duration::from_millis(300),
    }
}

/// Of a run in `folder`, without waits to speak of.
fn supervision(folder: &Path) -> Supervision<'static> {
    Supervision {
        run: folder.into(),
        restarts: 5,
        min_ranks: 1,
        backoff: Duration::from_millis(1),
        rank: None,
        fits: Box::new(|_| true),
    }
}

fn run(ranks: usize, script: &str) -> (Option<Failure>, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let failure = group(folder.path(), ranks, script).run(&Stop::default()).unwrap();
    (failure, folder)
}

#[test]
fn every_rank_is_told_who_it_is() {
    let script =
        "[ $RANK = 0 ] || echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $FERROPT_PORT";
    let (failure, folder) = run(3, script);
    assert!(failure.is_none(), "{failure:?}");
    let read = |rank| std::fs::read_to_string(log_file(&folder.path().join("logs"), rank)).unwrap();
    let words = |rank| read(rank).split_whitespace().map(String::from).collect::<Vec<_>>();
    let (one, two) = (words(1), words(2));
    assert_eq!(one[..5], ["1", "3", "1", "3", "127.0.0.1"]);
    assert_eq!(two[..5], ["2", "3", "2", "3", "127.0.0.1"]);
    assert_eq!(one[5], two[5], "they meet at one port");
    assert!(!log_file(&folder.path().join("logs"), 0).exists(), "the first rank is shown as it is");
}

#[test]
fn the_first_failure_is_told_with_its_message_and_the_others_end() {
    let script = "trap 'exit 75' TERM
        [ $RANK != 2 ] || { echo 'error: no such thing' >&2; echo '  because' >&2; exit 1; }
        while :; do sleep 0.02; done";
    let (failure, folder) = run(3, script);
    let failure = failure.unwrap();
    assert_eq!((failure.rank, failure.end, failure.end.status()), (2, End::Status(1), 1));
    assert_eq!(failure.error, "error: no such thing\n  because");
    assert!(!failure.end.may_start_again());
    let text = group(folder.path(), 3, "").describe(&failure);
    assert!(text.starts_with("rank 2 ended with status 1:\nerror: no such thing"), "{text}");
}

#[test]
fn a_rank_that_does_not_end_is_killed_after_the_grace() {
    let started = Instant::now();
    let (failure, _) = run(2, "trap '' TERM; [ $RANK = 1 ] && exit 75; while :; do sleep 0.02; done");
    assert_eq!(failure.map(|f| (f.rank, f.end)), Some((1, End::Status(75))));
    assert!(started.elapsed() >= Duration::from_millis(300) && started.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_killed_rank_is_the_cause_and_not_those_that_miss_it() {
    let script = "case $RANK in 1) kill -KILL $$;; *) sleep 0.05; exit 75;; esac";
    let failure = run(3, script).0.unwrap();
    assert_eq!((failure.rank, failure.end, failure.end.status()), (1, End::Signal(9), 75));
    assert!(failure.end.may_start_again());
}

#[test]
fn a_stopped_rank_is_killed() {
    let failure = run(2, "[ $RANK = 0 ] && exit 0; kill -STOP $$; exit 0").0.unwrap();
    assert_eq!((failure.rank, failure.end), (1, End::Hung));
}

/// One that is stopped longer than the others wait for it, and shorter than it may be.
#[test]
fn a_stopped_rank_is_the_cause_and_not_those_that_gave_it_up() {
    let folder = tempfile::tempdir().unwrap();
    let script = "case $RANK in 0) kill -STOP $$;; *) sleep 0.3; exit 75;; esac";
    let group = Group { hang: Duration::from_secs(600), ..group(folder.path(), 3, script) };
    let failure = group.run(&Stop::default()).unwrap().unwrap();
    assert_eq!((failure.rank, failure.end), (0, End::Hung));
}

/// Asks for a stop as soon as all ranks are up, and returns the failure.
fn stopped_by_hand(script: &str) -> Option<Failure> {
    let folder = tempfile::tempdir().unwrap();
    let up = folder.path().join("up");
    let mut group =
        group(folder.path(), 2, &format!("{script}\necho up > $0.$RANK; while :; do sleep 0.02; done"));
    group.arguments.push(up.clone().into());
    let stop = Stop::default();
    stop.on_signals().unwrap();
    let asker = stop.clone();
    let thread = std::thread::spawn(move || {
        while !(up.with_extension("0").exists() && up.with_extension("1").exists()) {
            std::thread::sleep(Duration::from_millis(5));
        }
        asker.request();
    });
    let failure = group.run(&stop).unwrap();
    thread.join().unwrap();
    failure
}

#[test]
fn ranks_that_are_not_prepared_for_a_request_to_stop_do_not_fail() {
    // One has no handler yet, and the other misses it.
    assert!(stopped_by_hand("[ $RANK = 0 ] || trap 'sleep 0.1; exit 75' INT").is_none());
    let failure = stopped_by_hand("trap 'exit 1' INT").expect("what is wrong is told");
    assert_eq!(failure.end, End::Status(1));
}

#[test]
fn a_request_to_stop_is_passed_on() {
    let folder = tempfile::tempdir().unwrap();
    let stop = Stop::default();
    // As a launcher does. A shell cannot trap what is ignored where it was started, as in the background of a script; what is
    // handled there is as usual for what is started.
    stop.on_signals().unwrap();
    let asker = stop.clone();
    let script = "trap 'exit 0' INT; echo up > $0.$RANK; while :; do sleep 0.02; done";
    let mut group = group(folder.path(), 2, script);
    let up = folder.path().join("up");
    group.arguments.push(up.clone().into());
    let thread = std::thread::spawn(move || {
        while !(up.with_extension("0").exists() && up.with_extension("1").exists()) {
            std::thread::sleep(Duration::from_millis(5));
        }
        asker.request();
    });
    assert!(group.run(&stop).unwrap().is_none());
    thread.join().unwrap();
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let group = Group { program: folder.path().join("nothing"), ..group(folder.path(), 2, "") };
    let failure = group.run(&Stop::default()).unwrap().unwrap();
    assert_eq!((failure.rank, failure.end), (0, End::NotStarted));
    assert!(failure.error.contains("nothing"), "{}", failure.error);
}

#[test]
fn logs_that_cannot_be_written_are_refused_before_a_rank_is_started() {
    let folder = tempfile::tempdir().unwrap();
    let started = folder.path().join("started");
    let mut group = group(folder.path(), 2, "echo x >> $0; exit 75");
    group.arguments.push(started.clone().into());
    std::fs::write(&group.logs, "a file in the place of the folder").unwrap();
    let how = supervision(folder.path());
    let error = supervise(group, &how, &Stop::default(), &mut |line| panic!("{line}")).unwrap_err();
    assert!(format!("{error:#}").contains("logs"), "{error:#}");
    assert_eq!(crate::launch::status(&error), crate::launch::WRONG);
    assert!(!started.exists());
}

/// Supervises a script; returns the status, what was said, and how often rank 0 was started.
fn supervised(ranks: usize, min_ranks: usize, restarts: u32, script: &str) -> (u8, Vec<String>, usize) {
    let folder = tempfile::tempdir().unwrap();
    let starts = folder.path().join("starts");
    let mut group = group(folder.path(), ranks, &format!("[ $RANK = 0 ] && echo x >> $0\n{script}"));
    group.arguments.push(starts.clone().into());
    let how = Supervision { restarts, min_ranks, ..supervision(folder.path()) };
    let mut said = Vec::new();
    let status = supervise(group, &how, &Stop::default(), &mut |line| said.push(line.into())).unwrap();
    let starts = std::fs::read_to_string(starts).unwrap().lines().count();
    let book = Logbook::open(folder.path()).unwrap();
    assert!(book.entries().iter().all(|entry| entry.event == "rank-lost"));
    (status, said, starts)
}

use crate::logbook::Logbook;

#[test]
fn lost_ranks_are_started_again_and_wrong_ones_are_not() {
    // The third start succeeds.
    let script = "[ $(wc -l < $0) -ge 3 ] && exit 0; [ $RANK = 1 ] && kill -KILL $$; sleep 0.05; exit 75";
    let (status, said, starts) = supervised(2, 2, 5, script);
    assert_eq!((status, starts), (0, 3), "{said:?}");
    assert!(said.iter().any(|line| line.contains("rank 1 was killed")), "{said:?}");
    for (wrong, want) in [(1, 1), (2, 2), (3, 3)] {
        let (status, _, starts) = supervised(2, 2, 5, &format!("exit {wrong}"));
        assert_eq!((status, starts), (want, 1));
    }
}

#[test]
fn a_person_who_stops_the_waiting_for_another_start_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let stop = Stop::default();
    let how = Supervision { backoff: Duration::from_secs(60), ..supervision(folder.path()) };
    let mut say = |line: &str| {
        if line.contains("starting again in") {
            stop.request();
        }
    };
    assert_eq!(supervise(group(folder.path(), 1, "exit 75"), &how, &stop, &mut say).unwrap(), 0);
}

#[test]
fn of_supervisors_of_a_rank_each_the_first_keeps_the_logbook() {
    let folder = tempfile::tempdir().unwrap();
    let supervise_rank = |rank| {
        let group = Group { ranks: None, ..group(folder.path(), 1, "exit 75") };
        let how = Supervision { restarts: 1, rank, ..supervision(folder.path()) };
        assert_eq!(supervise(group, &how, &Stop::default(), &mut |_| ()).unwrap(), 75);
        Logbook::open(folder.path()).unwrap().entries().len()
    };
    assert_eq!([Some(3), None, Some(0)].map(supervise_rank), [0, 0, 2]);
}

#[test]
fn starts_without_progress_come_to_an_end() {
    let (status, said, starts) = supervised(1, 1, 3, "exit 75");
    assert_eq!((status, starts), (75, 4), "{said:?}");
    assert!(said.last().unwrap().contains("no further"), "{said:?}");
}

#[test]
fn fewer_ranks_go_on_where_that_is_allowed() {
    let script = "[ $WORLD_SIZE -le 2 ] && exit 0; [ $RANK = 2 ] && kill -KILL $$; sleep 0.05; exit 75";
    let (status, said, _) = supervised(3, 2, 5, script);
    assert_eq!(status, 0, "{said:?}");
    let (status, _, _) = supervised(3, 3, 2, script);
    assert_eq!(status, 75);
}
