//! Joins the ranks that it was started with, tries every collective operation, and measures the larger ones: under `mpirun`,
//! `srun`, or with the variables of torchrun. Says on rank 0 what it found.

use anyhow::{Result, ensure};
use ferropt_device::cpu::CpuBuf;
use ferropt_mesh::{Group, Join, Label, World};
use std::time::Instant;

/// Bytes of the buffers that are timed.
const LARGE: usize = 64 << 20;
const ROUNDS: usize = 5;

fn main() -> Result<()> {
    let world = World::join(Join::default())?;
    let members: Vec<usize> = (0..world.size()).collect();
    let all = world.group(&members, "all")?;
    if world.rank() == 0 {
        println!("{}", world.describe());
    }
    for part in [1, 7, 3001, 400_000] {
        check(&all, part)?;
    }
    let len = (LARGE / 4).next_multiple_of(world.size());
    let bytes = (len * 4 * (world.size() - 1)) as f64 / world.size() as f64;
    for (name, operation) in [("all-gather", true), ("reduce-scatter", false)] {
        let mut best = f64::INFINITY;
        let mut buffer = CpuBuf::<f32>::zeroed(len)?;
        for round in 0..ROUNDS {
            all.barrier(Label::of("round", round))?;
            let started = Instant::now();
            let label = Label::new("measured");
            buffer =
                if operation { all.all_gather(label, buffer) } else { all.reduce_scatter(label, buffer) }
                    .wait()?;
            best = best.min(started.elapsed().as_secs_f64());
        }
        if world.rank() == 0 {
            println!("{name} of 64 MiB: {:.2} GB/s sent by each rank", bytes / best * 1e-9);
        }
    }
    let (started, rounds) = (Instant::now(), 200);
    for round in 0..rounds {
        all.gather_f64(Label::of("small", round), &[1.0])?;
    }
    if world.rank() == 0 {
        println!("a number of every rank: {:.0} us", started.elapsed().as_secs_f64() / rounds as f64 * 1e6);
        println!("all {} ranks agree", world.size());
    }
    Ok(())
}

/// Every operation against its definition.
fn check(all: &Group, part: usize) -> Result<()> {
    let (me, size) = (all.rank(), all.size());
    let len = size * part;
    let number = |rank: usize, place: usize| ((rank * 5 + place * 3) % 16) as f32;
    let sum = |place: usize| (0..size).map(|rank| number(rank, place)).sum::<f32>();
    let mine = || -> Result<CpuBuf<f32>> {
        let mut buffer = CpuBuf::zeroed(len)?;
        buffer.iter_mut().enumerate().for_each(|(place, value)| *value = number(me, place));
        Ok(buffer)
    };
    let gathered = all.all_gather(Label::of("gathered", part), mine()?);
    let scattered = all.reduce_scatter(Label::of("scattered", part), mine()?);
    let reduced = all.all_reduce(Label::of("reduced", part), mine()?);
    let told = all.broadcast(Label::of("told", part), size - 1, mine()?);
    let next = all.send(Label::of("ring", part), (me + 1) % size, mine()?);
    let before = (me + size - 1) % size;
    let received = all.receive(Label::of("ring", part), before, CpuBuf::<f32>::zeroed(len)?);
    let (gathered, scattered, reduced) = (gathered.wait()?, scattered.wait()?, reduced.wait()?);
    let (told, received) = (told.wait()?, received.wait()?);
    next.wait()?;
    for place in 0..len {
        ensure!(gathered[place] == number(place / part, place), "all-gather: place {place} of {len}");
        ensure!(
            place / part != me || scattered[place] == sum(place),
            "reduce-scatter: place {place} of {len}"
        );
        ensure!(reduced[place] == sum(place), "all-reduce: place {place} of {len}");
        ensure!(told[place] == number(size - 1, place), "broadcast: place {place} of {len}");
        ensure!(received[place] == number(before, place), "transfer: place {place} of {len}");
    }
    all.barrier(Label::of("checked", part))
}
