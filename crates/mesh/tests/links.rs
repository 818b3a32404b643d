//! What the devices of ranks exchange themselves: against its definition, beside computing, and when something goes wrong. On GPUs,
//! one for each rank, real or emulated; `scripts/check-cuda-kernels` runs it.

mod ranks;

use ferropt_device::cuda::CudaDevice;
use ferropt_device::{Buffer, Chip, ChipBuf, Device, Element, Store, Which, bf16};
use ferropt_mesh::{Axes, Group, Join, Label, Mesh, Operation, Pending, SMALL_SUM, World};
use ranks::{number, on_ranks, sum};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const ALONE: Axes = Axes { tensor: 1, shard: 1, replicate: 1, pipeline: 1 };
/// How long a test's ranks may take, before one is said to hang.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs `work` on every rank, each a process with a GPU of its own, as in a run; nothing where there are too few GPUs. As threads of one
/// process they could wait for each other for ever: a GPU that gives memory back waits for its exchanges, and meanwhile nobody in
/// the process may get the memory that the other rank needs before it takes part.
///
/// The processes are this one's program, told to run the same test, in which they find this call by its number of ranks.
fn on_gpus(axes: Axes, join: Join, work: impl Fn(Mesh, &Chip)) {
    // A closure's type is named by the function that it is in.
    let test = std::any::type_name_of_val(&work).split("::").nth(1).unwrap();
    let ranks = axes.tensor * axes.shard * axes.replicate * axes.pipeline;
    let gpus = CudaDevice::count().unwrap();
    if gpus < ranks {
        println!("skipped: {ranks} ranks, for which there are only {gpus} GPUs");
    } else if std::env::var_os(RANK_OF).is_none_or(|of| of != test) {
        run_ranks(test, ranks);
    } else if std::env::var("WORLD_SIZE").unwrap() == ranks.to_string() {
        let world = World::join(join).unwrap();
        let device = Chip::open(Which::Cuda(world.rank()), Some(1), false).unwrap();
        let (mesh, line) = Mesh::new(world, axes).unwrap().linked(&device).unwrap();
        let line = line.expect("a line about GPUs");
        assert!(line.contains("memory through NCCL 2."), "{line}");
        work(mesh, &device);
    }
}

/// The test that a process is a rank of.
const RANK_OF: &str = "FERROPT_LINK_TEST";

fn run_ranks(test: &str, ranks: usize) {
    // Nobody else takes it in the moment until rank 0 does.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let start = |rank: usize| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([test, "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
        command.env(RANK_OF, test).env("RANK", rank.to_string()).env("WORLD_SIZE", ranks.to_string());
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        command.env_remove("FERROPT_TRANSPORT").stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let mut children: Vec<Child> = (0..ranks).map(start).collect();
    let started = Instant::now();
    while children.iter_mut().any(|child| child.try_wait().unwrap().is_none()) {
        if started.elapsed() > LIMIT {
            children.iter_mut().for_each(|child| child.kill().unwrap());
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let ended: Vec<_> = children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    let mut wrong = String::new();
    for (rank, output) in ended.iter().enumerate().filter(|(_, output)| !output.status.success()) {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        wrong += &format!("rank {rank} of {ranks}, {}:\n{out}{err}\n", output.status);
    }
    assert!(wrong.is_empty(), "after {:.0} s:\n{wrong}", started.elapsed().as_secs_f64());
}

fn upload<T: Element>(device: &Chip, values: impl Iterator<Item = f32>) -> ChipBuf<T> {
    let values: Vec<T> = values.map(T::from_f32).collect();
    let mut buffer = device.alloc(values.len()).unwrap();
    device.upload(&mut buffer, 0, &values);
    buffer
}

fn download<T: Element>(device: &Chip, buffer: &ChipBuf<T>) -> Vec<f32> {
    let mut values = vec![T::default(); buffer.len()];
    device.download(buffer, 0, &mut values);
    values.into_iter().map(T::to_f32).collect()
}

fn check<T: Element>(device: &Chip, group: &Group, part: usize) {
    let (me, ranks) = (group.rank(), group.size());
    let len = ranks * part;
    let mine = || upload::<T>(device, (0..len).map(|place| number(me, place)));
    let own = |place: usize| place / part.max(1) == me;
    let alone = upload::<T>(device, (0..len).map(|place| if own(place) { number(me, place) } else { -9.0 }));
    // All at once, and waited for in another order.
    let gathered = group.all_gather(Label::of("layer", 1), alone);
    let scattered = group.reduce_scatter(Label::of("layer", 2), mine());
    let reduced = group.all_reduce(Label::of("layer", 3), mine());
    let told = group.broadcast(Label::new("all"), ranks - 1, mine());
    let values = |pending: Pending<ChipBuf<T>>| download(device, &pending.wait().unwrap());
    let (reduced, scattered, gathered, told) =
        (values(reduced), values(scattered), values(gathered), values(told));
    for place in 0..len {
        let what = format!("{ranks} ranks, {part} each, {}, place {place}", T::DTYPE);
        assert_eq!(gathered[place], number(place / part, place), "gathered, {what}");
        assert_eq!(reduced[place], sum(ranks, place), "reduced, {what}");
        assert_eq!(told[place], number(ranks - 1, place), "broadcast, {what}");
        if own(place) {
            assert_eq!(scattered[place], sum(ranks, place), "scattered, {what}");
        }
    }
}

#[test]
#[ignore = "needs GPUs, real or emulated; scripts/check-cuda-kernels runs it"]
fn operations_do_what_they_say() {
    for ranks in [2, 3, 8] {
        on_gpus(Axes { shard: ranks, ..ALONE }, Join::default(), |mesh, device| {
            for part in [0, 1, 7, 3001] {
                check::<f32>(device, &mesh.shard, part);
                check::<bf16>(device, &mesh.shard, part);
            }
        });
    }
}

/// Each rank sends before it receives, in both directions, and sends what it has just computed.
#[test]
#[ignore = "needs GPUs, real or emulated; scripts/check-cuda-kernels runs it"]
fn opposite_transfers_do_not_block_each_other() {
    on_gpus(Axes { pipeline: 4, ..ALONE }, Join::default(), |mesh, device| {
        let (group, len) = (&mesh.pipeline, 70_000);
        let me = group.rank();
        let neighbours: Vec<usize> =
            [me.checked_sub(1), (me + 1 < group.size()).then_some(me + 1)].into_iter().flatten().collect();
        let value = |from: usize, to: usize, round: usize| (from * 100 + to * 10 + round) as f32;
        // A GPU may wait for all of its exchanges before it gives memory, or gets some back, so all of it is taken before and kept.
        let buffer = || device.alloc::<f32>(len).unwrap();
        let mut spare: Vec<_> = (0..2 * 3 * neighbours.len()).map(|_| buffer()).collect();
        let mut pending = Vec::new();
        for round in 0..3 {
            for to in &neighbours {
                let mut goes = spare.pop().unwrap();
                device.fill(&mut goes, value(me, *to, round));
                pending.push(group.send(Label::of("activation", round), *to, goes));
            }
        }
        let mut came = Vec::new();
        for round in 0..3 {
            for from in neighbours.iter().rev() {
                let comes = spare.pop().unwrap();
                came.push(group.receive(Label::of("activation", round), *from, comes).wait().unwrap());
                let (got, expected) = (download(device, &came[came.len() - 1]), value(*from, me, round));
                assert!(got.iter().all(|x| *x == expected), "round {round} from {from}");
            }
        }
        for pending in pending {
            drop(pending.wait().unwrap());
        }
        // What is not a neighbour's goes the old way.
        if me == 0 {
            drop(group.send(Label::new("far"), 3, upload::<f32>(device, [5.0].into_iter())).wait().unwrap());
        } else if me == 3 {
            let came = group.receive(Label::new("far"), 0, device.alloc::<f32>(1).unwrap()).wait().unwrap();
            assert_eq!(download(device, &came), [5.0]);
        }
    });
}

/// Exchanges begin when what they exchange is computed, and what is computed from them begins when they are over, though
/// the processor waits for neither.
#[test]
#[ignore = "needs GPUs, real or emulated; scripts/check-cuda-kernels runs it"]
fn computing_and_exchanging_wait_for_each_other() {
    const PART: usize = 20_000;
    const ROUNDS: usize = 12;
    let axes = Axes { tensor: 2, shard: 2, ..ALONE };
    on_gpus(axes, Join::default(), |mesh, device| {
        let me = mesh.world.rank() as f32;
        let len = 2 * PART;
        let zeros = || device.alloc::<f32>(len).unwrap();
        let (mut gathering, mut summing, mut total) = (zeros(), zeros(), zeros());
        let mut own = device.alloc::<f32>(PART).unwrap();
        let mut expected = vec![0.0f32; len];
        for round in 0..ROUNDS {
            let value = |rank: f32| (round + 1) as f32 * (rank + 1.0);
            // Both are written, and then go at once, in different groups.
            device.fill(&mut own, value(me));
            device.copy(PART, &own, 0, &mut gathering, mesh.tensor.rank() * PART);
            let gathered = mesh.tensor.all_gather(Label::of("round", round), gathering);
            device.fill(&mut summing, value(me));
            let summed = mesh.shard.all_reduce(Label::of("round", round), summing);
            // Something to do meanwhile.
            device.fill(&mut own, -1.0);
            gathering = gathered.wait().unwrap();
            device.accumulate(&gathering, 0, &mut total, Store::Accumulate);
            summing = summed.wait().unwrap();
            device.accumulate(&summing, 0, &mut total, Store::Accumulate);
            // What was read may be written.
            device.fill(&mut gathering, f32::NAN);

            let rank = |group: &Group, member: usize| group.world_rank(member) as f32;
            let sum: f32 = (0..2).map(|member| value(rank(&mesh.shard, member))).sum();
            for (place, expected) in expected.iter_mut().enumerate() {
                *expected += value(rank(&mesh.tensor, place / PART)) + sum;
            }
        }
        assert!(download(device, &total) == expected, "rank {me}");
    });
}

/// Groups that share ranks work side by side, and an operation may be dropped without being waited for.
#[test]
#[ignore = "needs GPUs, real or emulated; scripts/check-cuda-kernels runs it"]
fn groups_do_not_disturb_each_other() {
    let axes = Axes { tensor: 2, shard: 2, replicate: 2, ..ALONE };
    on_gpus(axes, Join::default(), |mesh, device| {
        let taken = device.memory_taken();
        for round in 0..10 {
            let one = |group: &Group| {
                let mut buffer = device.alloc::<f32>(1000).unwrap();
                device.fill(&mut buffer, mesh.world.rank() as f32);
                group.all_reduce(Label::of("round", round), buffer)
            };
            let (tensor, replicate) = (one(&mesh.tensor), one(&mesh.replicate));
            drop(one(&mesh.shard));
            let sum = |group: &Group| (0..group.size()).map(|m| group.world_rank(m) as f32).sum::<f32>();
            assert_eq!(download(device, &replicate.wait().unwrap())[999], sum(&mesh.replicate));
            assert_eq!(download(device, &tensor.wait().unwrap())[999], sum(&mesh.tensor));
        }
        // What was dropped is given back when it is over, with the next operation or sign of life.
        let until = Instant::now() + Duration::from_secs(10);
        while device.memory_taken() != taken && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
            mesh.world.beat(Label::new("end"));
        }
        assert_eq!(device.memory_taken(), taken);
    });
}

/// As many bytes as pairs would send, and the trace's lane of communication.
#[test]
#[ignore = "needs GPUs, real or emulated; scripts/check-cuda-kernels runs it"]
fn what_is_sent_is_counted_and_traced() {
    let folder = tempfile::tempdir().unwrap();
    on_gpus(Axes { shard: 4, ..ALONE }, Join::default(), |mesh, device| {
        let (world, group) = (&mesh.world, &mesh.shard);
        world.trace().start(world.rank());
        world.reset_traffic();
        let of = |len: usize| device.alloc::<f32>(len).unwrap();
        group.all_gather(Label::new("a"), of(4000)).wait().unwrap();
        group.reduce_scatter(Label::new("b"), of(4000)).wait().unwrap();
        group.all_reduce(Label::new("c"), of(40_001)).wait().unwrap();
        group.all_reduce(Label::new("d"), of(SMALL_SUM / 4)).wait().unwrap();
        device.wait();
        let sent = |operation: Operation| {
            world.traffic().iter().find(|t| t.operation == operation).map(|t| (t.group, t.bytes))
        };
        assert_eq!(sent(Operation::AllGather), Some(("shard", 3 * 1000 * 4)));
        assert_eq!(sent(Operation::ReduceScatter), Some(("shard", 3 * 1000 * 4)));
        // The last of 10001, 10001, 10001 and 9998 elements has the last rank.
        let own = if group.rank() == 3 { 9998 } else { 10_001 };
        let large = (40_001 - own) + 3 * own;
        assert_eq!(sent(Operation::AllReduce), Some(("shard", (4 * large + 3 * SMALL_SUM) as u64)));
        std::thread::sleep(Duration::from_millis(500)); // whether they are over is asked every few milliseconds
        let file = folder.path().join(format!("{}.json", world.rank()));
        world.trace().write(&file).unwrap();
        let text = std::fs::read_to_string(file).unwrap();
        for name in ["all-gather of a (shard)", "reduce-scatter of b (shard)", "all-reduce of d (shard)"] {
            assert_eq!(text.matches(name).count(), 2, "{name}: {text}");
        }
    });
}

/// What starts together is one call of NCCL, and has the bits and is counted like operations that start one by one.
#[test]
#[ignore = "needs GPUs, real or emulated; scripts/check-cuda-kernels runs it"]
fn operations_that_start_together_are_those_that_start_alone() {
    const PARTS: [usize; 4] = [1, 7, 0, 3001];
    let folder = tempfile::tempdir().unwrap();
    let axes = Axes { shard: 3, ..ALONE };
    on_gpus(axes, Join::default(), |mesh, device| {
        let (world, group) = (&mesh.world, &mesh.shard);
        let (me, ranks) = (group.rank(), group.size());
        let values = |len: usize| (0..len).map(|place| ((place * 7 + me * 13) as f32).sin());
        let matrix = |part: usize| upload::<bf16>(device, values(ranks * part));
        let vector = |part: usize| upload::<f32>(device, values(ranks * part));
        world.reset_traffic();
        let alone: Vec<_> = PARTS
            .into_iter()
            .map(|part| {
                let label = Label::of("alone", part);
                let gathered = group.all_gather(label, matrix(part)).wait().unwrap();
                let scattered = group.reduce_scatter(label, vector(part)).wait().unwrap();
                let reduced = group.all_reduce(label, vector(part)).wait().unwrap();
                [download(device, &gathered), download(device, &scattered), download(device, &reduced)]
            })
            .collect();
        let counted = world.traffic();

        world.trace().start(world.rank());
        world.reset_traffic();
        let mut together = group.together();
        let board = |part| {
            let label = Label::of("together", part);
            let gathered = together.all_gather(label, matrix(part));
            let scattered = together.reduce_scatter(label, vector(part));
            (gathered, scattered, together.all_reduce(label, vector(part)))
        };
        let pending: Vec<_> = PARTS.into_iter().map(board).collect();
        together.start().unwrap();
        let landed: Vec<_> = pending
            .into_iter()
            .map(|(gathered, scattered, reduced)| {
                (gathered.wait().unwrap(), scattered.wait().unwrap(), reduced.wait().unwrap())
            })
            .collect();
        for ((gathered, scattered, reduced), alone) in landed.iter().zip(&alone) {
            let [alone_gathered, alone_scattered, alone_reduced] = alone;
            assert_eq!(download(device, gathered), *alone_gathered);
            assert_eq!(download(device, reduced), *alone_reduced);
            let own = scattered.len() / ranks * me..scattered.len() / ranks * (me + 1);
            // Parts of others hold anything.
            assert_eq!(download(device, scattered)[own.clone()], alone_scattered[own]);
        }
        assert_eq!(world.traffic(), counted);
        // They began at the same time, and were over when the last was.
        std::thread::sleep(Duration::from_millis(500));
        let file = folder.path().join(format!("{}.json", world.rank()));
        world.trace().write(&file).unwrap();
        let trace: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let begins: Vec<f64> = trace
            .as_array()
            .unwrap()
            .iter()
            .filter(|event| event["ph"] == "b" && event["name"].as_str().unwrap().contains("together"))
            .map(|event| event["ts"].as_f64().unwrap())
            .collect();
        assert!(begins.len() == 3 * PARTS.len() && begins.iter().all(|at| *at == begins[0]), "{begins:?}");
        // What is never started ends in an error, and harms nobody.
        let never = group.together().all_gather(Label::new("never"), matrix(1)).wait().err().unwrap();
        assert!(never.to_string().contains("not started"), "{never}");
        group.barrier(Label::new("end")).unwrap();
    });
}

/// Has the devices exchange something that is never whole, and returns in which error that ends. The stream of operations
/// does not hang.
fn ends_in(mesh: &Mesh, device: &Chip, label: Label, len: usize) -> String {
    let started = Instant::now();
    let pending = mesh.shard.all_gather(label, device.alloc::<f32>(len).unwrap());
    let landed = pending.wait();
    device.wait();
    drop(landed);
    let error = loop {
        if let Err(error) = mesh.shard.barrier(Label::new("after")) {
            break error;
        }
    };
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    format!("{error:#}")
}

#[test]
#[ignore = "needs GPUs, real or emulated; scripts/check-cuda-kernels runs it"]
fn who_gives_up_says_why_and_ends_all_exchanges() {
    let axes = Axes { shard: 3, ..ALONE };
    on_gpus(axes, Join::default(), |mesh, device| {
        if mesh.world.rank() == 2 {
            std::thread::sleep(Duration::from_millis(300));
            return mesh.world.abandon("the disk of this rank is on fire", 1);
        }
        let message = ends_in(&mesh, device, Label::of("layer", 7), 3000);
        assert!(message.contains("rank 2") && message.contains("on fire"), "{message}");
    });
}

#[test]
#[ignore = "needs GPUs, real or emulated; scripts/check-cuda-kernels runs it"]
fn a_rank_that_leaves_too_early_is_named() {
    let axes = Axes { shard: 3, ..ALONE };
    on_gpus(axes, Join::default(), |mesh, device| {
        if mesh.world.rank() == 1 {
            return;
        }
        let message = ends_in(&mesh, device, Label::of("layer", 7), 3000);
        assert!(message.contains("rank 1") && message.contains("ended its work"), "{message}");
        assert!(
            message.contains("the all-gather of layer 7 in group shard, 12000 bytes of f32"),
            "{message}"
        );
    });
}

/// A rank that is alive, but never does what the others wait for.
#[test]
#[ignore = "needs GPUs, real or emulated; scripts/check-cuda-kernels runs it"]
fn a_rank_without_end_is_given_up() {
    let join = Join { patience: Duration::from_millis(1500), ..Join::default() };
    let axes = Axes { shard: 2, ..ALONE };
    on_gpus(axes, join, |mesh, device| {
        if mesh.world.rank() == 1 {
            return std::thread::sleep(Duration::from_secs(4));
        }
        let message = ends_in(&mesh, device, Label::of("step", 13), 3000);
        assert!(message.contains("the all-gather of step 13") && message.contains("ranks [1]"), "{message}");
    });
}

/// Memory of the host that a GPU reaches (`run.offload`) goes through the reactor, which is the only one who can end an exchange, and
/// must not wait for a GPU that waits for one.
#[test]
#[ignore = "needs GPUs, real or emulated; scripts/check-cuda-kernels runs it"]
fn a_lost_rank_is_named_while_the_hosts_memory_is_on_its_way() {
    // More than the system takes at once: the other rank is slow to begin.
    const LEN: usize = 32 << 20;
    let axes = Axes { shard: 2, ..ALONE };
    on_gpus(axes, Join::default(), |mesh, device| {
        let mut sums = device.alloc_host::<f32>(LEN).unwrap();
        device.fill(&mut sums, mesh.world.rank() as f32);
        let label = Label::new("sums");
        if mesh.world.rank() == 1 {
            std::thread::sleep(Duration::from_millis(700));
            let sums = mesh.shard.all_gather(label, sums).wait().unwrap();
            assert_eq!(sums.host().map(|sums| (sums[0], sums[LEN - 1])), Some((0.0, 1.0)));
            return;
        }
        let sums = mesh.shard.all_gather(label, sums);
        let message = ends_in(&mesh, device, Label::of("layer", 7), 3000);
        assert!(message.contains("rank 1") && message.contains("the all-gather of layer 7"), "{message}");
        assert_eq!(sums.wait().unwrap().host().map(|sums| (sums[0], sums[LEN - 1])), Some((0.0, 1.0)));
    });
}

/// A GPU that gives memory back waits for its exchanges, and answers nobody meanwhile.
#[test]
#[ignore = "needs GPUs, real or emulated; scripts/check-cuda-kernels runs it"]
fn a_lost_rank_is_named_while_memory_is_given_back() {
    let axes = Axes { shard: 2, ..ALONE };
    on_gpus(axes, Join::default(), |mesh, device| {
        if mesh.world.rank() == 1 {
            // The other one has looked around meanwhile, as it does every second.
            std::thread::sleep(Duration::from_millis(2500));
            return mesh.world.abandon("the disk of this rank is on fire", 1);
        }
        let (started, spare) = (Instant::now(), device.alloc::<f32>(1000).unwrap());
        let gathered = mesh.shard.all_gather(Label::of("layer", 7), device.alloc::<f32>(3000).unwrap());
        drop(spare);
        let message = gathered.wait().err().map(|error| format!("{error:#}")).unwrap_or_default();
        assert!(message.contains("rank 1") && message.contains("on fire"), "{message}");
        assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    });
}

/// NCCL does not notice it; its emulation does, so that a test that has ranks do different things ends.
#[test]
#[ignore = "needs GPUs, real or emulated; scripts/check-cuda-kernels runs it"]
fn exchanges_that_differ_end_in_an_error() {
    let axes = Axes { shard: 2, ..ALONE };
    on_gpus(axes, Join::default(), |mesh, device| {
        if !device.describe().contains("emulated") {
            return;
        }
        let len = 3000 + 2 * mesh.world.rank();
        let message = ends_in(&mesh, device, Label::of("layer", 7), len);
        // Who hears of it first says what differs.
        assert!(message.contains("failed") && message.contains("rank"), "{message}");
    });
}

#[test]
#[ignore = "needs a GPU, real or emulated; scripts/check-cuda-kernels runs it"]
fn ranks_that_share_a_gpu_exchange_copies() {
    let lines = on_ranks(World::local(2).unwrap(), |world| {
        let device = Chip::open(Which::Cuda(0), Some(1), false).unwrap();
        let axes = Axes { tensor: 2, ..ALONE };
        let (mesh, line) = Mesh::new(world, axes).unwrap().linked(&device).unwrap();
        check::<f32>(&device, &mesh.tensor, 7);
        line.expect("a line about GPUs")
    });
    assert_eq!(lines[0], lines[1]);
    assert!(lines[0].contains("copies") && lines[0].contains("Duplicate GPU"), "{}", lines[0]);
}
