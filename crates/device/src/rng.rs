//! Counter-based random numbers: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as
//! 1, 2, 3", SC 2011). A word depends only on (seed, what, step, row, column), never on who computes it or when,
//! so initial weights, dropout masks, data order and samples are the same on any layout.

/// What a stream of random words is for; part of the counter, so that streams never meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Purpose {
    /// Initial weights; `index` is the parameter's number in the table.
    Init = 1,
    /// Dropout after attention's output projection; `index` is the layer.
    DropoutAttentionOut = 2,
    /// Dropout after the feed-forward block; `index` is the layer.
    DropoutFeedForward = 3,
    /// Dropout on attention probabilities; `index` is the layer.
    DropoutAttention = 4,
    /// Stochastic rounding of updated weights; `index` is the parameter's number.
    Rounding = 5,
    /// Order of the training data; `index` is the epoch.
    DataOrder = 6,
    /// Sampling of tokens.
    Sampling = 7,
    /// Weights that only have to be there; `index` is the parameter's number.
    Weights = 8,
}

/// A stream of random words, addressed by (row, column).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// The run's seed.
    pub seed: u64,
    /// Purpose and index, as packed by [`Stream::new`].
    pub what: u32,
    /// Training step, or 0.
    pub step: u32,
}

/// Columns that share one block of counters: 4 words of 16 lanes.
pub const BLOCK: usize = 64;

impl Stream {
    /// A stream for one purpose. `index` is below 2^24.
    pub fn new(seed: u64, purpose: Purpose, index: usize, step: u64) -> Self {
        Stream { seed, what: (purpose as u32) << 24 | (index as u32 & 0xff_ffff), step: step as u32 }
    }

    /// Counter of lane 0 of the block that holds columns `64*block ..` of `row`. Lane `l`'s counter has `l` added to
    /// its first word. Word `w` of lane `l` belongs to column `64*block + 16*w + l`: an order that lets SIMD code
    /// produce 64 neighbouring columns from consecutive counters without shuffles.
    #[inline]
    pub fn counter(&self, row: u64, block: u32) -> [u32; 4] {
        // 28 bits of block, 44 bits of row.
        [block << 4, row as u32, self.what, self.step ^ ((row >> 32) as u32).rotate_left(20)]
    }

    /// The random word of (row, column).
    #[inline]
    pub fn word(&self, row: u64, column: usize) -> u32 {
        let mut c = self.counter(row, (column / BLOCK) as u32);
        c[0] += (column % 16) as u32;
        philox(c, self.key())[column % BLOCK / 16]
    }

    /// The generator's key.
    #[inline]
    pub fn key(&self) -> [u32; 2] {
        [self.seed as u32, (self.seed >> 32) as u32]
    }

    /// Uniform in [0, 1) with 24 bits.
    #[inline]
    pub fn uniform(&self, row: u64, column: usize) -> f32 {
        (self.word(row, column) >> 8) as f32 * (1.0 / (1 << 24) as f32)
    }

    /// Standard normal number of (row, column), by Box-Muller; columns 2i and 2i+1 share a pair of words.
    pub fn normal(&self, row: u64, column: usize) -> f32 {
        self.normal_pair(row, column & !1)[column & 1]
    }

    /// Standard normal numbers of (row, column) and (row, column + 1); `column` is even.
    pub fn normal_pair(&self, row: u64, column: usize) -> [f32; 2] {
        debug_assert!(column.is_multiple_of(2));
        // (0, 1]: the logarithm must not see 0.
        let u = (self.word(row, column) as f64 + 1.0) / 4294967296.0;
        let (sin, cos) = (self.word(row, column + 1) as f64 / 4294967296.0 * std::f64::consts::TAU).sin_cos();
        let radius = (-2.0 * u.ln()).sqrt();
        [(radius * cos) as f32, (radius * sin) as f32]
    }
}

/// First multiplier of Philox4x32.
pub const M0: u32 = 0xD251_1F53;
/// Second multiplier.
pub const M1: u32 = 0xCD9E_8D57;
/// Key increments (golden ratio, sqrt(3) - 1).
pub const W: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Philox4x32 with 10 rounds.
#[inline]
pub fn philox(mut c: [u32; 4], mut k: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let (p0, p1) = (M0 as u64 * c[0] as u64, M1 as u64 * c[2] as u64);
        c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
        k = [k[0].wrapping_add(W[0]), k[1].wrapping_add(W[1])];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers from the authors' Random123 distribution (kat_vectors).
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn normal_moments() {
        let s = Stream::new(7, Purpose::Init, 3, 0);
        let n = 200_000;
        let (mut sum, mut sq, mut fourth) = (0.0, 0.0, 0.0);
        for i in 0..n {
            let x = s.normal((i / 1000) as u64, i % 1000) as f64;
            sum += x;
            sq += x * x;
            fourth += x.powi(4);
        }
        let n = n as f64;
        assert!((sum / n).abs() < 0.01 && (sq / n - 1.0).abs() < 0.02 && (fourth / n - 3.0).abs() < 0.1);
    }
}
