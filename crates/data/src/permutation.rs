//! A pseudo-random order of `0..n` that needs no memory.

use ferropt_device::rng::{Purpose, Stream};

/// Rounds of the Feistel network; four already make a good permutation of large domains (Luby and Rackoff, 1988), the
/// others are for small ones.
const ROUNDS: usize = 8;

/// A permutation of `0..n`, fixed by (seed, epoch).
///
/// A Feistel network permutes the next larger power of four; values that fall outside `0..n` go through it again
/// until they fall inside ("cycle walking", Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), at most
/// four times on average.
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    n: u64,
    /// Bits in each half of a value.
    half: u32,
    stream: Stream,
}

impl Permutation {
    /// The order of `n >= 1` things in an epoch.
    pub fn new(n: u64, seed: u64, epoch: u64) -> Self {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        let stream = Stream::new(seed, Purpose::DataOrder, epoch as usize, epoch >> 24);
        Permutation { n, half: bits.div_ceil(2).max(1), stream }
    }

    /// Where `place < n` comes from: the `place`-th thing of the order.
    pub fn at(&self, place: u64) -> u64 {
        debug_assert!(place < self.n);
        let mut x = place;
        loop {
            x = self.feistel(x);
            if x < self.n {
                return x;
            }
        }
    }

    /// A permutation of `0..4^half`.
    fn feistel(&self, x: u64) -> u64 {
        let mask = (1u64 << self.half) - 1;
        let (mut left, mut right) = (x >> self.half, x & mask);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ (self.stream.word(right, round) as u64 & mask));
        }
        left << self.half | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(n: u64, seed: u64, epoch: u64) -> Vec<u64> {
        let p = Permutation::new(n, seed, epoch);
        (0..n).map(|i| p.at(i)).collect()
    }

    #[test]
    fn every_size_is_permuted() {
        for n in (1..70).chain([255, 256, 257, 1000, 4096, 4097, 65_537]) {
            let mut sorted = order(n, 3, 1);
            sorted.sort_unstable();
            assert!(sorted.iter().copied().eq(0..n), "{n}");
        }
    }

    #[test]
    fn large_domains_stay_inside() {
        for n in [(1 << 32) + 1, 1 << 40, u64::MAX >> 1] {
            let p = Permutation::new(n, 1, 0);
            let mut seen: Vec<u64> = (0..1000).map(|i| p.at(i)).collect();
            assert!(seen.iter().all(|&x| x < n));
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), 1000);
        }
    }

    #[test]
    fn epochs_and_seeds_differ_and_repeat() {
        let base = order(1000, 7, 0);
        assert_eq!(base, order(1000, 7, 0));
        for other in [order(1000, 7, 1), order(1000, 8, 0), (0..1000).collect()] {
            let same = base.iter().zip(&other).filter(|(a, b)| a == b).count();
            // Two random orders agree in one place on average.
            assert!(same < 12, "{same} of 1000 places agree");
        }
    }

    #[test]
    fn neighbours_are_torn_apart() {
        // The mean distance of neighbours is n/3 in a random order.
        let order = order(30_000, 5, 2);
        let mean = order.windows(2).map(|w| w[0].abs_diff(w[1])).sum::<u64>() / 30_000;
        assert!((9_500..10_500).contains(&mean), "{mean}");
    }
}
