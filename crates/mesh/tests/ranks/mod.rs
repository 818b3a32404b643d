//! What tests of collective operations have in common.

use ferropt_mesh::World;

/// Runs `work` on every rank, each a thread, and returns what they return.
pub fn on_ranks<R: Send>(worlds: Vec<World>, work: impl Fn(World) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let ranks: Vec<_> = worlds.into_iter().map(|world| scope.spawn(|| work(world))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// A number that tells rank and place, small enough that sums of eight are exact in bf16.
pub fn number(rank: usize, place: usize) -> f32 {
    ((rank * 5 + place * 3) % 16) as f32 - 7.0
}

/// The sum of all ranks' numbers.
pub fn sum(ranks: usize, place: usize) -> f32 {
    (0..ranks).map(|rank| number(rank, place)).sum()
}
