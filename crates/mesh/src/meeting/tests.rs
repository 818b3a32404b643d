use super::*;
use std::sync::atomic::{AtomicBool, Ordering};

/// Far less than the deadline, and far more than anything here takes.
const SOON: Duration = Duration::from_secs(20);

/// A door, and how to come to it.
fn door() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

fn meeting(rank: usize, size: usize, port: u16) -> Meeting {
    let deadline = Duration::from_secs(300);
    Meeting { rank, size, address: "127.0.0.1".into(), port, token: "t".into(), deadline }
}

fn come(meeting: Meeting) -> thread::JoinHandle<Result<Met>> {
    thread::spawn(move || meeting.meet(&|| false))
}

fn lead(meeting: Meeting, listener: TcpListener) -> thread::JoinHandle<Result<Met>> {
    thread::spawn(move || meeting.meet_at(Some(listener), &|| false))
}

/// A rank that has said who it is and does nothing else.
fn introduced(rank: usize, size: usize, port: u16) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let me = Introduction { rank, address: stream.local_addr().unwrap(), host: "there".into() };
    say(&mut stream, &meeting(rank, size, port).introduction(&me)).unwrap();
    stream
}

/// What a rank is told.
fn told(stream: &TcpStream) -> String {
    hear(&mut Until { stream, until: Instant::now() + SOON, stopped: &|| false }).unwrap()
}

fn message(met: Result<Met>) -> String {
    format!("{:#}", met.err().expect("an error"))
}

#[test]
fn a_rank_that_died_on_its_way_is_replaced() {
    let (listener, port) = door();
    let first = lead(meeting(0, 3, port), listener);
    let dead = introduced(1, 3, port);
    thread::sleep(4 * AGAIN);
    drop(dead);
    let others = [1, 2].map(|rank| come(meeting(rank, 3, port)));
    let ranks = [first].into_iter().chain(others).map(|rank| rank.join().unwrap().unwrap());
    // All of them are kept until all have met: a connection that ends is a rank that is gone.
    let met: Vec<Met> = ranks.collect();
    assert!(met.iter().all(|met| met.peers.iter().flatten().count() == 2));
}

#[test]
fn who_is_not_let_in_is_told_why_and_so_are_people() {
    let (listener, port) = door();
    let first = Meeting { deadline: Duration::from_secs(3), ..meeting(0, 3, port) };
    let first = lead(first, listener);
    let _here = introduced(1, 3, port);
    thread::sleep(4 * AGAIN);
    let second = come(meeting(1, 3, port)).join().unwrap().err().unwrap();
    assert!(second.is::<Lost>(), "an earlier one may still end: {second:#}");
    assert!(format!("{second:#}").contains("two processes have RANK=1"), "{second:#}");
    for (wrong, words) in [
        (meeting(2, 4, port), "one of 4 ranks (WORLD_SIZE), rank 0 one of 3"),
        (Meeting { token: "u".into(), ..meeting(2, 3, port) }, "FERROPT_TOKEN"),
    ] {
        let error = come(wrong).join().unwrap().err().unwrap();
        assert!(!error.is::<Lost>() && format!("{error:#}").contains(words), "{error:#}");
    }
    let mut old = TcpStream::connect(("127.0.0.1", port)).unwrap();
    say(&mut old, "0.0.9\tt\t3\t2 127.0.0.1:1 there").unwrap();
    let answer = told(&old);
    assert!(answer.starts_with("wrong\t") && answer.contains("version 0.0.9"), "{answer}");
    let waited = message(first.join().unwrap());
    for part in ["did not come: 2", "two processes have RANK=1", "WORLD_SIZE", "version 0.0.9"] {
        assert!(waited.contains(part), "{waited}");
    }
}

#[test]
fn ranks_that_wait_for_each_other_see_that_the_first_one_is_gone() {
    let (listener, port) = door();
    // It has told all who is there; rank 1 is not, and nobody listens where it said that it does.
    let second = come(meeting(2, 3, port));
    let (mut stream, _) = listener.accept().unwrap();
    told(&stream);
    let (nobody, closed) = door();
    drop(nobody);
    say(&mut stream, &format!("ranks\t0 127.0.0.1:{port} a\t1 127.0.0.1:{closed} b\t2 127.0.0.1:1 c"))
        .unwrap();
    thread::sleep(4 * AGAIN);
    assert!(!second.is_finished());
    let reason = Lost::chosen("no such layout".into(), 1).to_bytes();
    stream.write_all(&Header::control(Kind::Beat, "step 1", 0).to_bytes()).unwrap();
    stream.write_all(&Header::control(Kind::Abandon, "", reason.len()).to_bytes()).unwrap();
    stream.write_all(&reason).unwrap();
    drop(stream);
    let started = Instant::now();
    let error = second.join().unwrap().err().unwrap();
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
    assert!(error.to_string().contains("rank 0 (on a) gave up: no such layout"), "{error:#}");
    assert_eq!(error.downcast::<Lost>().unwrap().status(), Some(1));
}

#[test]
fn a_rank_that_is_gone_before_all_are_there_ends_the_waiting() {
    let (listener, port) = door();
    let first = come(meeting(1, 3, port));
    let (mut stream, _) = listener.accept().unwrap();
    let own = told(&stream);
    let own = Introduction::parse(own.rsplit('\t').next().unwrap()).unwrap();
    say(&mut stream, &format!("ranks\t0 127.0.0.1:{port} a\t{}\t2 127.0.0.1:1 c", own.line())).unwrap();
    drop(stream);
    let error = message(first.join().unwrap());
    assert!(error.contains("rank 0 (on a) is gone"), "{error}");
}

#[test]
fn a_name_leads_to_all_addresses_of_rank_0s_machine() {
    let named = Meeting { address: "localhost".into(), ..meeting(0, 3, 0) };
    let listener = named.listen().unwrap();
    let port = listener.local_addr().unwrap().port();
    TcpStream::connect(("127.0.0.2", port)).unwrap();
    // An address is meant as it is.
    let listener = meeting(0, 3, 0).listen().unwrap();
    let port = listener.local_addr().unwrap().port();
    assert!(TcpStream::connect(("127.0.0.2", port)).is_err());
}

#[test]
fn who_is_on_rank_0s_machine_is_reached_from_others_as_rank_0_is() {
    let one = |address: &str| Introduction { rank: 1, address: address.parse().unwrap(), host: "a".into() };
    let seen = |one: &Introduction, from: &str| one.known_by(from.parse().unwrap()).address.to_string();
    let inside = one("127.0.1.1:77");
    assert_eq!(seen(&inside, "10.0.0.1"), "10.0.0.1:77");
    assert_eq!(seen(&inside, "127.0.1.1"), "127.0.1.1:77");
    assert_eq!(seen(&one("10.0.0.2:77"), "10.0.0.1"), "10.0.0.2:77");
    assert_eq!(seen(&one("[::1]:77"), "fd00::1"), "[fd00::1]:77");
}

#[test]
fn a_meeting_is_broken_off() {
    let (listener, port) = door();
    let stop = std::sync::Arc::new(AtomicBool::new(false));
    let asked = |meeting: Meeting, listener: Option<TcpListener>| {
        let stop = stop.clone();
        thread::spawn(move || meeting.meet_at(listener, &|| stop.load(Ordering::Relaxed)))
    };
    let (_, nobody) = door();
    let ranks = [
        asked(meeting(0, 3, port), Some(listener)),
        asked(meeting(1, 3, port), None),
        asked(meeting(1, 2, nobody), None),
    ];
    thread::sleep(4 * AGAIN);
    stop.store(true, Ordering::Relaxed);
    for rank in ranks {
        let error = rank.join().unwrap().err().unwrap();
        assert!(error.is::<BrokenOff>(), "{error:#}");
    }
}
