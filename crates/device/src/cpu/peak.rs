//! What the processor gives at most, measured: FLOP/s of the matrix-product instruction and bytes per second read from
//! memory. Speeds of operations are shares of these.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::amx::{self, Tiles};
use super::buffer::Shards;
use super::simd::{Isa, Simd, dispatch};
use super::{CpuBuf, CpuDevice, elementwise};
use crate::DType;

/// Sums that do not wait for each other: the instruction's latency times the number started in a cycle, with some to
/// spare (4 x 2 on today's processors), and few enough for AVX2's 16 registers.
const SUMS: usize = 12;
/// Rounds in one trial: a millisecond or two, so that on a machine that others use some trials are left alone.
const ROUNDS: usize = 400_000;
/// The same of [`Tiles::all_at_once`].
const TILE_ROUNDS: usize = 100_000;
/// Time that all threads go on for.
const WINDOW: Duration = Duration::from_millis(150);

/// Sum of each thread's best trial, all threads being busy. Others on the same machine can only make a trial slower,
/// so this is what the processor gives, not what they leave.
pub(super) fn measure(device: &CpuDevice, dtype: DType) -> f64 {
    let isa = if dtype == DType::Bf16 { device.isa } else { device.isa.min(Isa::Avx512) };
    let trial = || {
        let start = Instant::now();
        match isa {
            // SAFETY: an `Isa` value is only made for a processor that has it.
            Isa::Amx => unsafe { Tiles::new() }.all_at_once(TILE_ROUNDS),
            // SAFETY: as above.
            Isa::Avx512Bf16 => unsafe { bf16_products() },
            _ => dispatch!(isa, s => f32_products(s)),
        }
        start.elapsed().as_secs_f64()
    };
    let mut best = vec![f64::INFINITY; device.threads()];
    let shards = Shards::new(&mut best);
    let begin = Instant::now();
    device.pool.run(&|thread| {
        // SAFETY: each thread has its own element.
        let best = unsafe { &mut shards.range(thread..thread + 1)[0] };
        // The first trial is for clocks to rise and for the other threads to start; one that ends after the window
        // may have had a core to itself that two threads share, and counts only if there is no other.
        trial();
        loop {
            let seconds = trial();
            let over = begin.elapsed() > WINDOW;
            if !over || best.is_infinite() {
                *best = best.min(seconds);
            }
            if over {
                break;
            }
        }
    });
    let lanes = dispatch!(isa, s => lanes(s));
    // A lane multiplies and adds one pair of f32, or two pairs of bf16; a product of tiles has 16 x 16 sums of 32.
    let flops = match isa {
        Isa::Amx => TILE_ROUNDS * amx::ROUND * 2 * 16 * 16 * 32,
        Isa::Avx512Bf16 => ROUNDS * SUMS * lanes * 4,
        _ => ROUNDS * SUMS * lanes * 2,
    } as f64;
    best.iter().map(|seconds| flops / seconds).sum()
}

/// Bytes per second of reading memory once, in order, on all threads: more than caches hold, the best of a few passes.
pub(super) fn bandwidth(device: &CpuDevice) -> anyhow::Result<f64> {
    let mut memory = CpuBuf::<f32>::zeroed(READ / size_of::<f32>())?;
    // Pages that were never written are all the same one.
    elementwise::fill(device, &mut memory, 1.0);
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        let start = Instant::now();
        device.pool.for_chunks(memory.len(), PIECE, |range| {
            let x = &memory[range];
            black_box(dispatch!(device.isa, s => add_up(s, x)));
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(READ as f64 / best)
}

/// Bytes that are read in a pass.
const READ: usize = 1 << 30;
/// Numbers that a thread reads at a time.
const PIECE: usize = 1 << 20;

#[inline(always)]
fn add_up<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut sums = [s.zero(); 8];
    for x in x.chunks_exact(8 * S::LANES) {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = s.add(*sum, s.load(&x[i * S::LANES..]));
        }
    }
    let mut all = s.zero();
    for sum in sums {
        all = s.add(all, sum);
    }
    s.sum(all)
}

#[inline(always)]
fn lanes<S: Simd>(_: S) -> usize {
    S::LANES
}

#[inline(always)]
fn f32_products<S: Simd>(s: S) {
    let (a, b) = (s.splat(black_box(1e-3)), s.splat(black_box(1e-3)));
    let mut sums = [s.zero(); SUMS];
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            *sum = s.fma(a, b, *sum);
        }
    }
    for sum in sums {
        black_box(s.sum(sum));
    }
}

/// # Safety
/// The processor has AVX-512 F and BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn bf16_products() {
    use std::arch::x86_64::*;
    let ones = _mm512_cvtne2ps_pbh(_mm512_set1_ps(black_box(1e-3)), _mm512_set1_ps(black_box(1e-3)));
    let mut sums = [_mm512_setzero_ps(); SUMS];
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, ones, ones);
        }
    }
    for sum in sums {
        black_box(_mm512_reduce_add_ps(sum));
    }
}
