//! Every operation on one to eight ranks against its definition, what is counted, and what happens when a rank is lost.

mod ranks;

use ferropt_device::cpu::CpuBuf;
use ferropt_device::{Buffer, Element, bf16};
use ferropt_mesh::{Axes, Group, Join, Label, Lost, Mesh, Operation, SMALL_SUM, World};
use ranks::{number, on_ranks, sum};
use std::io::Write;
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

fn on<R: Send>(ranks: usize, work: impl Fn(Group) -> R + Sync) -> Vec<R> {
    let members: Vec<usize> = (0..ranks).collect();
    on_ranks(World::local(ranks).unwrap(), |world| work(world.group(&members, "test").unwrap()))
}

fn buffer<T: Element>(values: impl Iterator<Item = f32>) -> CpuBuf<T> {
    let values: Vec<T> = values.map(T::from_f32).collect();
    let mut buffer = CpuBuf::zeroed(values.len()).unwrap();
    buffer.copy_from_slice(&values);
    buffer
}

fn check<T: Element>(ranks: usize, part: usize) {
    let len = ranks * part;
    on(ranks, |group| {
        let me = group.rank();
        let own = |place: usize| place / part.max(1) == me;
        let mine = || buffer::<T>((0..len).map(|place| number(me, place)));
        let alone = buffer::<T>((0..len).map(|place| if own(place) { number(me, place) } else { -100.0 }));
        // All at once, and waited for in another order.
        let gathered = group.all_gather(Label::of("layer", 1), alone);
        let scattered = group.reduce_scatter(Label::of("layer", 2), mine());
        let reduced = group.all_reduce(Label::of("layer", 3), mine());
        let sent = group.broadcast(Label::new("all"), ranks - 1, mine());
        let reduced = reduced.wait().unwrap();
        let (scattered, gathered) = (scattered.wait().unwrap(), gathered.wait().unwrap());
        let sent = sent.wait().unwrap();
        for place in 0..len {
            let what = format!("{ranks} ranks, {part} each, {}, place {place}", T::DTYPE);
            assert_eq!(gathered[place].to_f32(), number(place / part, place), "gathered, {what}");
            assert_eq!(reduced[place].to_f32(), sum(ranks, place), "reduced, {what}");
            assert_eq!(sent[place].to_f32(), number(ranks - 1, place), "broadcast, {what}");
            let want = if own(place) { sum(ranks, place) } else { number(me, place) };
            assert_eq!(scattered[place].to_f32(), want, "scattered, {what}");
        }
    });
}

#[test]
fn operations_do_what_they_say() {
    for ranks in 1..=8 {
        // Nothing, odd, more than a frame, more than the system takes at once.
        for part in [0, 1, 7, 3001] {
            check::<f32>(ranks, part);
            check::<bf16>(ranks, part);
        }
    }
    check::<f32>(2, 1_500_000);
    check::<bf16>(3, 1_000_001);
}

/// Memory that the processor does not reach, as a GPU's, and what goes with it.
struct Away<N = ()>(Vec<f32>, N);

impl<N: Send + Sync> Buffer<f32> for Away<N> {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn host(&self) -> Option<&[f32]> {
        None
    }

    fn host_mut(&mut self) -> Option<&mut [f32]> {
        None
    }

    fn read(&self, offset: usize, dst: &mut [f32]) {
        dst.copy_from_slice(&self.0[offset..][..dst.len()]);
    }

    fn write(&mut self, offset: usize, src: &[f32]) {
        self.0[offset..][..src.len()].copy_from_slice(src);
    }
}

#[test]
fn memory_that_the_processor_does_not_reach_is_sent_too() {
    for (ranks, part) in [(2, 7), (3, 0), (3, 3001)] {
        let len = ranks * part;
        on(ranks, |group| {
            let (me, next, last) =
                (group.rank(), (group.rank() + 1) % ranks, (group.rank() + ranks - 1) % ranks);
            let mine = || Away((0..len).map(|place| number(me, place)).collect(), ());
            let all = |of: &dyn Fn(usize) -> f32| (0..len).map(of).collect::<Vec<_>>();
            let label = Label::new("away");
            let gathered = group.all_gather(label, mine()).wait().unwrap().0;
            assert_eq!(gathered, all(&|place| number(place / part.max(1), place)));
            let scattered = group.reduce_scatter(label, mine()).wait().unwrap().0;
            let own = me * part..(me + 1) * part;
            assert_eq!(scattered[own.clone()], all(&|place| sum(ranks, place))[own]);
            let reduced = group.all_reduce(label, mine()).wait().unwrap().0;
            assert_eq!(reduced, all(&|place| sum(ranks, place)));
            let told = group.broadcast(label, 1, mine()).wait().unwrap().0;
            assert_eq!(told, all(&|place| number(1, place)));
            let (sent, came) = (group.send(label, next, mine()), group.receive(label, last, mine()));
            assert_eq!(came.wait().unwrap().0, all(&|place| number(last, place)));
            assert_eq!(sent.wait().unwrap().0, mine().0);
        });
    }
}

/// Notes which threads give memory back.
struct Noted(Arc<Mutex<Vec<String>>>);

impl Drop for Noted {
    fn drop(&mut self) {
        let name = std::thread::current().name().unwrap_or("a caller").to_string();
        self.0.lock().unwrap().push(name);
    }
}

/// Giving memory back may wait for a device, and the thread that moves bytes must not: also where nobody waits for an operation, or
/// it fails.
#[test]
fn memory_is_given_back_by_callers_only() {
    const LEN: usize = 1000;
    let given_back = on_ranks(World::local(2).unwrap(), |world| {
        let group = world.group(&[0, 1], "test").unwrap();
        let noted = Arc::new(Mutex::new(Vec::new()));
        let given_back = || noted.lock().unwrap().len();
        let new = || Away(vec![1.0; LEN], Noted(noted.clone()));
        drop(group.all_reduce(Label::new("dropped"), new()));
        // Both are done with it after one more operation, and the next one gives it back.
        group.barrier(Label::new("later")).unwrap();
        group.barrier(Label::new("and then")).unwrap();
        assert_eq!(given_back(), 1);
        if world.rank() == 1 {
            std::thread::sleep(Duration::from_millis(200));
            world.abandon("tired", 1);
            return noted;
        }
        let (dropped, waited) =
            (group.all_reduce(Label::new("a"), new()), group.all_reduce(Label::new("b"), new()));
        drop(dropped);
        assert!(waited.wait().is_err_and(|error| error.to_string().contains("tired")));
        assert!(group.all_reduce(Label::new("c"), new()).wait().is_err());
        assert!(group.barrier(Label::new("later")).is_err());
        assert_eq!(given_back(), 4);
        noted
    });
    for noted in given_back {
        let names = noted.lock().unwrap();
        assert!(names.iter().all(|name| name == "a caller"), "{names:?}");
    }
}

#[test]
fn any_length_is_reduced_to_the_same_bits_everywhere() {
    for ranks in [2, 3, 8] {
        for len in [1, 5, SMALL_SUM / 4, SMALL_SUM / 4 + 1, 100_003] {
            let values = |rank: usize| (0..len).map(move |i| ((i * 7 + rank * 13) as f32).sin());
            let all = on(ranks, |group| {
                let reduced =
                    group.all_reduce(Label::new("x"), buffer::<f32>(values(group.rank()))).wait().unwrap();
                reduced.to_vec()
            });
            // In the order of the ranks, in f32: the definition to the bit.
            let mut want = vec![0.0f32; len];
            for rank in 0..ranks {
                want.iter_mut().zip(values(rank)).for_each(|(sum, value)| *sum += value);
            }
            assert!(all.iter().all(|got| *got == want), "{ranks} ranks, {len}");
        }
    }
}

/// The halves of several sums are each on their way at once: once they have proceeded, nobody minds who waits for which first.
#[test]
fn sums_that_proceed_together_are_waited_for_in_any_order() {
    const SUMS: usize = 4;
    on(3, |group| {
        let len = |sum: usize| SMALL_SUM * (sum % 2) + 1003;
        let mut together = group.together();
        let pending: Vec<_> = (0..SUMS)
            .map(|sum| {
                let mine = buffer::<f32>((0..len(sum)).map(|place| number(group.rank(), place + sum)));
                together.all_reduce(Label::of("layer", sum), mine)
            })
            .collect();
        together.start().unwrap();
        let mut pending: Vec<_> = pending.into_iter().map(|sum| sum.proceed()).enumerate().collect();
        pending.rotate_left(group.rank());
        for (number, sum_of_it) in pending {
            let got = sum_of_it.wait().unwrap();
            assert!((0..len(number)).all(|place| got[place] == sum(3, place + number)), "sum {number}");
        }
    });
}

#[test]
fn bytes_of_different_lengths_are_gathered() {
    on(5, |group| {
        let mine = vec![group.rank() as u8; group.rank() * 3000];
        let all = group.gather_bytes(Label::new("bytes"), &mine).unwrap();
        for (rank, bytes) in all.iter().enumerate() {
            assert_eq!(*bytes, vec![rank as u8; rank * 3000]);
        }
        let numbers = group.gather_f64(Label::new("numbers"), &[group.rank() as f64, f64::NAN]).unwrap();
        assert!(numbers.iter().enumerate().all(|(rank, n)| n[0] == rank as f64 && n[1].is_nan()));
        group.barrier(Label::new("end")).unwrap();
    });
}

/// Both directions of a pipeline, with payloads that no connection keeps: each rank sends before it receives.
#[test]
fn opposite_transfers_do_not_block_each_other() {
    on(4, |group| {
        let (me, size, len) = (group.rank(), group.size(), 700_000);
        let (next, before) = ((me + 1) % size, (me + size - 1) % size);
        let values =
            |from: usize, round: usize| buffer::<f32>((0..len).map(move |_| (from * 10 + round) as f32));
        let mut pending = Vec::new();
        for round in 0..3 {
            for to in [next, before] {
                pending.push(group.send(Label::of("activation", round), to, values(me, round)));
            }
        }
        for round in 0..3 {
            for from in [before, next] {
                let got =
                    group.receive(Label::of("activation", round), from, CpuBuf::<f32>::zeroed(len).unwrap());
                let got = got.wait().unwrap();
                assert!(got.iter().all(|x| *x == (from * 10 + round) as f32), "from {from}, round {round}");
            }
        }
        for pending in pending {
            pending.wait().unwrap();
        }
    });
}

/// Groups that share ranks work side by side, and an operation may be dropped without being waited for.
#[test]
fn groups_do_not_disturb_each_other() {
    let axes = Axes { tensor: 2, shard: 2, replicate: 2, pipeline: 1 };
    on_ranks(World::local(8).unwrap(), |world| {
        let mesh = Mesh::new(world, axes).unwrap();
        for round in 0..20 {
            let rank = mesh.world.rank() as f32;
            let one = |group: &Group| {
                group.all_reduce(Label::of("round", round), buffer::<f32>([rank].into_iter()))
            };
            let (tensor, data, all) = (one(&mesh.tensor), one(&mesh.data), one(&mesh.all));
            drop(one(&mesh.shard));
            assert_eq!(all.wait().unwrap()[0], 28.0);
            let sum = |group: &Group| (0..group.size()).map(|m| group.world_rank(m) as f32).sum::<f32>();
            assert_eq!(data.wait().unwrap()[0], sum(&mesh.data));
            assert_eq!(tensor.wait().unwrap()[0], sum(&mesh.tensor));
        }
    });
}

#[test]
fn what_is_sent_is_counted() {
    on_ranks(World::local(4).unwrap(), |world| {
        let group = world.group(&[0, 1, 2, 3], "four").unwrap();
        let of = |len: usize| buffer::<bf16>((0..len).map(|_| 1.0));
        group.all_gather(Label::new("a"), of(4000)).wait().unwrap();
        group.all_gather(Label::new("a"), of(8000)).wait().unwrap();
        group.reduce_scatter(Label::new("b"), of(4000)).wait().unwrap();
        group.all_reduce(Label::new("c"), of(40_000)).wait().unwrap();
        let traffic = world.traffic();
        let sent = |operation: Operation| {
            let line = traffic.iter().find(|t| t.operation == operation).unwrap();
            assert_eq!(line.group, "four");
            (line.bytes, line.calls)
        };
        // Three quarters of a buffer; twice that to sum and then gather.
        assert_eq!(sent(Operation::AllGather), (3 * 1000 * 2 + 3 * 2000 * 2, 2));
        assert_eq!(sent(Operation::ReduceScatter), (3 * 1000 * 2, 1));
        assert_eq!(sent(Operation::AllReduce), (2 * 3 * 10_000 * 2, 2));
        world.reset_traffic();
        assert!(world.traffic().is_empty());
    });
}

#[test]
fn a_trace_shows_both_lanes_of_all_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let file = |rank: usize| folder.path().join(format!("{rank}.json"));
    on_ranks(World::local(2).unwrap(), |world| {
        let group = world.group(&[0, 1], "pair").unwrap();
        world.trace().start(world.rank());
        let sum = group.all_reduce(Label::of("layer", 3), buffer::<f32>((0..100_000).map(|_| 1.0)));
        drop(world.trace().span(Label::new("computing")));
        sum.wait().unwrap();
        world.trace().write(&file(world.rank())).unwrap();
    });
    let merged = folder.path().join("trace.json");
    ferropt_mesh::Trace::merge(&[&file(0), &file(1)], &merged).unwrap();
    let events: serde_json::Value = serde_json::from_slice(&std::fs::read(merged).unwrap()).unwrap();
    let events = events.as_array().unwrap();
    for rank in [0, 1] {
        let named = |name: &str, phase: &str| {
            let is = |e: &&serde_json::Value| e["pid"] == rank && e["ph"] == phase && e["name"] == name;
            events.iter().filter(is).count()
        };
        assert_eq!(named("computing", "X"), 1);
        assert_eq!(named("all-reduce of layer 3 (pair)", "b"), 2, "sum and gathering");
        assert_eq!(named("all-reduce of layer 3 (pair)", "e"), 2);
    }
    // Two events with one number are the same operation, whatever process they are said to be of.
    let asynchronous: Vec<_> = events.iter().filter(|e| e["ph"] == "b").collect();
    let numbers: std::collections::BTreeSet<&str> =
        asynchronous.iter().map(|e| e["id"].as_str().unwrap()).collect();
    assert_eq!(numbers.len(), asynchronous.len());
}

fn message<R>(result: anyhow::Result<R>) -> String {
    format!("{:#}", result.err().expect("an error"))
}

#[test]
fn ranks_that_do_different_things_are_told_so() {
    let messages = on(3, |group| {
        let label = Label::of("layer", if group.rank() == 1 { 8 } else { 7 });
        message(group.all_gather(label, buffer::<f32>((0..3000).map(|_| 1.0))).wait())
    });
    for message in &messages {
        assert!(message.contains("layer 7") && message.contains("layer 8"), "{message}");
        assert!(message.contains("the all-gather of") && message.contains("expects"), "{message}");
    }
}

#[test]
fn types_are_compared_and_integers_are_not_summed() {
    let messages = on(2, |group| match group.rank() {
        0 => message(
            group
                .broadcast(Label::new("x"), 0, buffer::<f32>((0..4).map(|_| 1.0)))
                .wait()
                .and_then(|_| group.barrier(Label::new("end"))),
        ),
        _ => message(group.broadcast(Label::new("x"), 0, buffer::<i16>((0..8).map(|_| 1.0))).wait()),
    });
    assert!(messages.iter().all(|m| m.contains("of f32") && m.contains("of i16")), "{messages:?}");
    let refused = message(
        on(2, |group| group.all_reduce(Label::new("x"), buffer::<u32>([1.0].into_iter()))).remove(0).wait(),
    );
    assert!(refused.contains("u32 is no type to sum in"), "{refused}");
}

#[test]
fn a_rank_that_leaves_too_early_is_named() {
    let messages = on(3, |group| {
        if group.rank() == 2 {
            return "left".into();
        }
        message(group.barrier(Label::new("end")))
    });
    for message in &messages[..2] {
        assert!(message.contains("rank 2") && message.contains("ended"), "{message}");
    }
}

#[test]
fn who_gives_up_says_why_and_ends_all_waiting() {
    let messages = on_ranks(World::local(4).unwrap(), |world| {
        let group = world.group(&[0, 1, 2, 3], "four").unwrap();
        if world.rank() == 3 {
            world.abandon("the disk of this rank is on fire", 1);
        }
        let first = message(group.barrier(Label::new("end")));
        // Everything afterwards fails alike.
        let again = message(group.gather_f64(Label::new("more"), &[1.0]));
        assert_eq!(first, again);
        first
    });
    for message in messages {
        assert!(message.contains("the disk of this rank is on fire"), "{message}");
    }
}

/// What is half sent is sent to its end, so that the reason can follow.
#[test]
fn who_gives_up_in_the_midst_of_a_transfer_says_why_too() {
    // More bytes than connections keep.
    const LEN: usize = 10_000_000;
    on_ranks(World::local(2).unwrap(), |world| {
        let group = world.group(&[0, 1], "two").unwrap();
        let (label, mut buffer) = (Label::new("much"), CpuBuf::<f32>::zeroed(LEN).unwrap());
        if world.rank() == 0 {
            buffer.fill(1.0);
            let sent = group.send(label, 1, buffer);
            std::thread::sleep(Duration::from_millis(300));
            world.abandon("the disk of this rank is on fire", 3);
            assert!(message(sent.wait()).contains("on fire"));
            return;
        }
        std::thread::sleep(Duration::from_millis(600));
        let got = group.receive(label, 0, buffer).wait().unwrap();
        assert!(got.iter().all(|value| *value == 1.0));
        let error = group.barrier(Label::new("end")).unwrap_err();
        assert!(error.to_string().contains("rank 0") && error.to_string().contains("on fire"), "{error:#}");
        assert_eq!(error.downcast::<Lost>().unwrap().status(), Some(3));
    });
}

/// A rank that is alive, but never does what the others wait for.
#[test]
fn a_rank_without_end_is_given_up() {
    let options = Join { patience: Duration::from_millis(1500), ..Join::default() };
    let messages = on_ranks(World::local_with(2, options).unwrap(), |world| {
        let group = world.group(&[0, 1], "two").unwrap();
        if world.rank() == 1 {
            world.beat(Label::of("step", 12));
            std::thread::sleep(Duration::from_secs(4));
            return String::new();
        }
        message(group.barrier(Label::of("step", 13)))
    });
    for part in ["rank 1", "last heard of at step 12", "is alive", "step 13"] {
        assert!(messages[0].contains(part), "{}", messages[0]);
    }
}

/// A rank is stuck, and another one waits for it, which is itself waited for.
#[test]
fn who_keeps_others_waiting_is_named_by_those_that_wait_for_others() {
    let options = Join { patience: Duration::from_millis(2500), ..Join::default() };
    let messages = on_ranks(World::local_with(3, options).unwrap(), |world| {
        world.beat(Label::of("step", 12));
        let pair = |one: usize| world.group(&[one, one + 1], "pair").unwrap();
        match world.rank() {
            0 => message(pair(0).barrier(Label::of("step", 13))),
            1 => {
                // So that the first rank loses its patience first.
                std::thread::sleep(Duration::from_millis(500));
                message(pair(1).barrier(Label::of("step", 14)))
            }
            _ => {
                std::thread::sleep(Duration::from_secs(6));
                String::new()
            }
        }
    });
    for part in ["rank 1 (on ", "is alive", "step 13", "in the end for rank 2 (on "] {
        assert!(messages[0].contains(part), "{}", messages[0]);
    }
    assert!(
        messages[1].contains("rank 0") && messages[1].contains("in the end for rank 2"),
        "{}",
        messages[1]
    );
}

/// As torchrun starts ranks: its agent listens at MASTER_PORT itself.
#[test]
fn ranks_of_torchrun_meet_beside_its_agent() {
    let agent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = agent.local_addr().unwrap().port().to_string();
    let start = |rank: usize| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ferropt-mesh-check"));
        command.env("RANK", rank.to_string()).env("WORLD_SIZE", "2").env("MASTER_ADDR", "localhost");
        command.env("MASTER_PORT", &port).env("TORCHELASTIC_RUN_ID", std::process::id().to_string());
        command
            .env("TORCHELASTIC_USE_AGENT_STORE", "True")
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    };
    for rank in [0, 1].map(start) {
        let out = rank.wait_with_output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
}

/// Addresses that are good on one link only, in a network of the test's own. Where none may be made, the test says so.
#[test]
fn ranks_meet_at_link_local_addresses() {
    let script = "ip link set lo up && ip addr add fe80::1/64 dev lo nodad || exit 77
        for rank in 2 1 0; do RANK=$rank \"$0\" & ranks=\"$ranks $!\"; done
        for rank in $ranks; do wait $rank || { kill $ranks; exit 1; }; done";
    let mut command = std::process::Command::new("unshare");
    command.args(["-rn", "sh", "-c", script, env!("CARGO_BIN_EXE_ferropt-mesh-check")]);
    command.env("WORLD_SIZE", "3").env("MASTER_ADDR", "fe80::1%lo").env("MASTER_PORT", "29500");
    let Ok(out) = command.output() else {
        println!("skipped: there is no unshare");
        return;
    };
    let said = String::from_utf8_lossy(&out.stderr);
    match out.status.code() {
        Some(0) => assert!(String::from_utf8_lossy(&out.stdout).contains("all 3 ranks agree"), "{said}"),
        Some(1) if !said.contains("unshare") => panic!("{said}"),
        _ => println!("skipped: no network can be made here: {said}"),
    }
}

/// What connects to the port where ranks meet, and is none of them, harms nothing, and keeps nobody waiting.
#[test]
fn strangers_are_shown_out() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let knock = |text: &[u8]| {
        let until = Instant::now() + Duration::from_secs(10);
        while Instant::now() < until {
            if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
                // Whether it is read does not matter.
                let _ = stream.write_all(text);
                return stream;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("nobody listens");
    };
    let program = env!("CARGO_BIN_EXE_ferropt-mesh-check");
    let start = |rank: usize| {
        let mut command = std::process::Command::new(program);
        command.env("RANK", rank.to_string()).env("WORLD_SIZE", "3").env("MASTER_ADDR", "127.0.0.1");
        command.env("MASTER_PORT", port.to_string()).stderr(std::process::Stdio::piped()).spawn().unwrap()
    };
    let mut ranks = vec![start(0)];
    knock(b"GET / HTTP/1.1\r\nHost: me\r\n\r\n");
    knock(b"ferropt1\xff\xff\xff\xff\xff\xff\xff\xff");
    knock(b"ferropt1\x05\0\0\0\0\0\0\0hello");
    // Each may take five seconds to say who it is.
    let silent = [0; 12].map(|_| knock(b"ferropt1"));
    let started = Instant::now();
    ranks.extend([1, 2].map(start));
    for rank in ranks {
        let out = rank.wait_with_output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    assert!(started.elapsed() < Duration::from_secs(40), "{:?}", started.elapsed());
    drop(silent);
}
