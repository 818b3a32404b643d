//! Speed of every operation at the shapes of OPT-125m, one sequence of 2048 tokens, as a share of the roofline: the
//! time that the operation's FLOPs take at the measured peak of the matrix-product instruction, or its bytes at the
//! measured bandwidth of a copy, whichever is longer (Williams, Waterman, Patterson, 2009). Rows of one sequence fit the
//! third-level cache, so operations on them can exceed a share of 100 %.
//!
//! `cargo bench -p ferropt-device [-- WORD]` runs the lines whose name contains WORD. `FERROPT_ISA` picks the
//! instruction set. Best of several runs; on a machine that others use, look at the smallest of several benches.

use std::time::{Duration, Instant};

use ferropt_device::cpu::{CpuBuf, CpuDevice, CpuOptions};
use ferropt_device::rng::{Purpose, Stream};
use ferropt_device::*;

const N: usize = 2048;
const C: usize = 768;
const F: usize = 3072;
const H: usize = 12;
const V: usize = 50_272;

struct Bench {
    device: CpuDevice,
    filter: String,
    /// FLOP/s of f32 and of bf16, and bytes per second.
    peak_f32: f64,
    peak_bf16: f64,
    bandwidth: f64,
}

/// What an operation must do: multiplications and additions of matrix products in a type, and bytes moved once.
struct Work {
    dtype: DType,
    flops: f64,
    bytes: f64,
}

impl Bench {
    /// Prints one line. `run` is called until its best time is known well.
    fn line(&self, name: &str, work: Work, mut run: impl FnMut(&CpuDevice)) {
        let name = format!("{name} {}", work.dtype);
        if !name.contains(&self.filter) {
            return;
        }
        let seconds = best_of(|| run(&self.device));
        let peak = if work.dtype == DType::Bf16 { self.peak_bf16 } else { self.peak_f32 };
        let roofline = (work.flops / peak).max(work.bytes / self.bandwidth);
        println!(
            "{name:<34} {:>9.3} ms {:>8.1} GFLOP/s {:>7.2} GB/s {:>6.1} %",
            seconds * 1e3,
            work.flops / seconds * 1e-9,
            work.bytes / seconds * 1e-9,
            roofline / seconds * 100.0
        );
    }

    fn numbers<E: Element>(&self, which: usize, len: usize) -> CpuBuf<E> {
        let stream = Stream::new(1, Purpose::Init, which, 0);
        let values: Vec<E> = (0..len).map(|i| E::from_f32(stream.uniform(0, i) - 0.5)).collect();
        let mut buf = self.zeros(len);
        self.device.upload(&mut buf, 0, &values);
        buf
    }

    fn zeros<E: Element>(&self, len: usize) -> CpuBuf<E> {
        self.device.alloc(len).expect("memory for the bench")
    }

    fn whole(&self, len: usize, below: usize) -> CpuBuf<u32> {
        let stream = Stream::new(1, Purpose::Sampling, 0, 0);
        let values: Vec<u32> = (0..len).map(|i| stream.word(0, i) % below as u32).collect();
        let mut buf = self.zeros(len);
        self.device.upload(&mut buf, 0, &values);
        buf
    }
}

fn best_of(mut run: impl FnMut()) -> f64 {
    run();
    let (begin, mut best, mut runs) = (Instant::now(), f64::INFINITY, 0);
    while runs < 3 || begin.elapsed() < Duration::from_millis(300) {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

fn main() -> anyhow::Result<()> {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with("--")).unwrap_or_default();
    let device = CpuDevice::new(CpuOptions::default())?;
    let (from, mut to): (CpuBuf<f32>, CpuBuf<f32>) = (device.alloc(1 << 25)?, device.alloc(1 << 25)?);
    // A copy reads, and fetches before it writes, so it moves three times its length.
    let bandwidth = (3u64 << 27) as f64 / best_of(|| device.cast(&from, &mut to));
    let reading = device.measured_bandwidth()?;
    let (peak_f32, peak_bf16) = (device.measured_peak::<f32>(), device.measured_peak::<bf16>());
    println!(
        "{}; peak {:.0} GFLOP/s f32, {:.0} bf16; copy {:.1} GB/s, reading {:.1}",
        device.describe(),
        peak_f32 * 1e-9,
        peak_bf16 * 1e-9,
        bandwidth * 1e-9,
        reading * 1e-9
    );
    let mut bench = Bench { device, filter, peak_f32, peak_bf16, bandwidth };
    rows::<f32>(&bench);
    rows::<bf16>(&bench);
    products::<f32>(&bench);
    products::<bf16>(&bench);
    attention::<f32>(&bench);
    attention::<bf16>(&bench);
    paged::<f32>(&bench);
    paged::<bf16>(&bench);
    loss::<f32>(&bench);
    loss::<bf16>(&bench);
    optimizers(&bench);
    // Weights that are only read are read, not copied.
    bench.bandwidth = reading;
    packed(&bench)
}

/// A work without matrix products: `bytes(size)` for an element size.
fn moved<E: Element>(bytes: impl Fn(usize) -> usize) -> Work {
    Work { dtype: E::DTYPE, flops: 0.0, bytes: bytes(E::DTYPE.size()) as f64 }
}

fn rows<E: Element>(b: &Bench) {
    let (ids, table, mut x) = (b.whole(N, V), b.numbers::<E>(1, V * C), b.zeros::<f32>(N * C));
    b.line("embed", moved::<E>(|e| N * C * (e + 4)), |d| d.embed(N, C, &ids, &table, None, &mut x));
    let mut dtable = b.zeros(V * C);
    b.line("embed_backward", moved::<f32>(|_| N * C * 12), |d| d.embed_backward(C, &ids, &x, &mut dtable));

    let (x, gamma, beta) = (b.numbers::<f32>(2, N * C), b.numbers(3, C), b.numbers(4, C));
    let (mut y, mut mean, mut rstd) = (b.zeros::<E>(N * C), b.zeros(N), b.zeros(N));
    b.line("layer_norm", moved::<E>(|e| N * C * (4 + e)), |d| {
        d.layer_norm(N, C, &x, &gamma, &beta, &mut y, None, &mut mean, &mut rstd);
    });
    let (mut dx, mut dgamma, mut dbeta) = (b.zeros(N * C), b.zeros(C), b.zeros(C));
    b.line("layer_norm_backward, added", moved::<E>(|e| N * C * (12 + e)), |d| {
        let (dx, dgamma, dbeta) = (&mut dx, &mut dgamma, &mut dbeta);
        let added = Store::Accumulate;
        d.layer_norm_backward(C, &y, &x, &mean, &rstd, &gamma, dx, added, dgamma, dbeta, added);
    });

    b.line("residual_backward", moved::<E>(|e| N * C * (4 + e)), |d| {
        d.residual_backward(C, &x, None, &mut y)
    });
    let stream = Stream::new(1, Purpose::DropoutFeedForward, 0, 0);
    let dropout = Some(Dropout { p: 0.1, stream, first_row: 0 });
    b.line("residual_backward, dropout", moved::<E>(|e| N * C * (4 + e)), |d| {
        d.residual_backward(C, &x, dropout, &mut y);
    });
}

fn products<E: Element>(b: &Bench) {
    for (name, n, k) in [("qkv", 3 * C, C), ("out", C, C), ("fc1", F, C), ("fc2", C, F)] {
        let s = LinearShape { m: N, n, k };
        let flops = 2.0 * (N * n * k) as f64;
        let work = |bytes: usize| Work { dtype: E::DTYPE, flops, bytes: bytes as f64 };
        let e = E::DTYPE.size();
        let (x, w, bias) = (b.numbers::<E>(1, N * k), b.numbers::<E>(2, n * k), b.numbers(3, n));
        let (mut y, mut dx, mut dw) = (b.zeros::<E>(N * n), b.zeros::<E>(N * k), b.zeros(n * k));
        b.line(&format!("linear {name}"), work(e * (N * k + n * k + N * n)), |d| {
            d.linear(s, &x, &w, Some(&bias), Activation::Identity, &mut y);
        });
        b.line(&format!("linear_backward_input {name}"), work(e * (N * k + n * k + N * n)), |d| {
            d.linear_backward_input(s, &y, &w, None, &mut dx);
        });
        b.line(&format!("linear_backward_weight {name}"), work(e * (N * k + N * n) + 4 * n * k), |d| {
            d.linear_backward_weight(s, &y, &x, &mut dw, None, Store::Overwrite);
        });
    }
}

/// Read-only weights: OPT-1.3b's feed-forward matrices, enough of them to lie in memory rather than in a cache, for as
/// many rows as decoding has, alone and in batches, and for a prompt.
fn packed(b: &Bench) -> anyhow::Result<()> {
    packed_matrix(b, "fc1", 8192, 2048)?;
    packed_matrix(b, "fc2", 2048, 8192)
}

fn packed_matrix(b: &Bench, matrix: &str, n: usize, k: usize) -> anyhow::Result<()> {
    let most = 1024;
    for format in WeightFormat::ALL {
        let rows: Vec<usize> = [1, 8, 32, 128, most]
            .into_iter()
            .filter(|m| format!("packed_linear {matrix} {} x{m} bf16", format.name()).contains(&b.filter))
            .collect();
        if rows.is_empty() {
            continue;
        }
        let stream = Stream::new(1, Purpose::Init, 5, 0);
        let pack = || {
            b.device.pack_weight(format, n, k, &|range, out| {
                for (row, out) in range.zip(out.chunks_exact_mut(k)) {
                    out.iter_mut().enumerate().for_each(|(i, w)| *w = stream.uniform(row as u64, i) - 0.5);
                }
                Ok(())
            })
        };
        let mut matrices = vec![pack()?];
        let bytes = b.device.packed_bytes(&matrices[0]);
        while matrices.len() * bytes < 400 << 20 {
            matrices.push(pack()?);
        }
        let (x, mut y) = (b.numbers::<bf16>(6, most * k), b.zeros::<bf16>(most * n));
        for m in rows {
            let flops = 2.0 * (m * n * k * matrices.len()) as f64;
            let bytes = (bytes + 2 * m * (n + k)) * matrices.len();
            let work = Work { dtype: DType::Bf16, flops, bytes: bytes as f64 };
            b.line(&format!("packed_linear {matrix} {} x{m}", format.name()), work, |d| {
                for w in &matrices {
                    d.packed_linear(m, &x, w, None, Activation::Relu, &mut y);
                }
            });
        }
    }
    Ok(())
}

fn attention<E: Element>(b: &Bench) {
    let s = AttentionShape { batch: 1, seq: N, heads: H, width: C / H, among: (0, H) };
    let e = E::DTYPE.size();
    // Scores and values for half of the T x T pairs; five products instead of two on the way back.
    let forward = 2.0 * (N * N * C) as f64;
    let qkv = b.numbers::<E>(1, N * 3 * C);
    let (mut out, mut lse, mut dqkv) = (b.zeros::<E>(N * C), b.zeros(H * N), b.zeros::<E>(N * 3 * C));
    let stream = Stream::new(1, Purpose::DropoutAttention, 0, 0);
    for (name, dropout) in [("", None), (", dropout", Some(Dropout { p: 0.1, stream, first_row: 0 }))] {
        let work = Work { dtype: E::DTYPE, flops: forward, bytes: (e * N * 4 * C) as f64 };
        b.line(&format!("attention{name}"), work, |d| {
            d.attention(s, &qkv, None, dropout, &mut out, &mut lse)
        });
        let work = Work { dtype: E::DTYPE, flops: 2.5 * forward, bytes: (e * N * 8 * C) as f64 };
        b.line(&format!("attention_backward{name}"), work, |d| {
            d.attention_backward(s, &qkv, None, dropout, &out, &lse, &out, &mut dqkv);
        });
    }
}

/// New tokens over a paged cache: a whole prompt, its last piece, and one token of each of several texts.
fn paged<E: Element>(b: &Bench) {
    let e = E::DTYPE.size();
    for (name, texts, past, rows) in [
        ("prompt", 1, 0, N),
        ("last 512", 1, N - 512, 512),
        ("1 token", 1, N - 1, 1),
        ("1 token of 32", 32, 511, 1),
        ("1 token of 128", 128, 299, 1),
    ] {
        let each = (past + rows).div_ceil(PAGE);
        let pages: Vec<u32> = (0..(texts * each) as u32).collect();
        let segments: Vec<Segment<'_>> =
            pages.chunks(each).map(|pages| Segment { rows, past, pages }).collect();
        let mut places = Places::new(&b.device, texts * rows, each).expect("memory");
        places.put(&b.device, &segments, pages.len());
        let qkv = b.numbers::<E>(1, texts * rows * 3 * C);
        let mut out = b.zeros::<E>(texts * rows * C);
        let side = || b.numbers::<E>(2, pages.len() * PAGE * C);
        let (mut k, mut v) = (side(), side());
        let pairs = texts * rows * (2 * past + rows + 1) / 2;
        let work = Work {
            dtype: E::DTYPE,
            flops: 4.0 * (pairs * C) as f64,
            bytes: (2 * e * texts * (past + rows) * C) as f64,
        };
        b.line(&format!("attention_paged, {name}"), work, |d| {
            d.attention_paged(H, C / H, places.placed(), &qkv, &mut k, &mut v, &mut out);
        });
    }
}

fn loss<E: Element>(b: &Bench) {
    let rows = N;
    let s = LossShape { rows, vocab: V, width: C, first: 0 };
    let flops = 2.0 * (rows * V * C) as f64;
    let work =
        |products: f64, bytes: usize| Work { dtype: E::DTYPE, flops: products * flops, bytes: bytes as f64 };
    let (h, w, targets) = (b.numbers::<E>(1, rows * C), b.numbers::<E>(2, V * C), b.whole(rows, V));
    let (mut losses, mut dh, mut dw) = (b.zeros(rows), b.zeros::<E>(rows * C), b.zeros(V * C));
    let e = E::DTYPE.size();
    b.line("lm_loss", work(1.0, e * V * C), |d| d.lm_loss(s, &h, &w, &targets, None, &mut losses));
    b.line("lm_loss_backward", work(3.0, (e + 4) * V * C), |d| {
        d.lm_loss_backward(s, &h, &w, &targets, None, 1e-3, &mut losses, &mut dh, &mut dw, Store::Overwrite);
    });
}

fn optimizers(b: &Bench) {
    let len = 1 << 23;
    let hyper = AdamW {
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        bias_correction1: 0.5,
        bias_correction2: 0.5,
        grad_scale: 1.0,
    };
    let (g, mut m, mut v) = (b.numbers::<f32>(1, len), b.zeros(len), b.zeros(len));
    let (mut w, mut high, mut low) =
        (b.numbers::<f32>(2, len), b.numbers::<bf16>(2, len), b.zeros::<i16>(len));
    b.line("adamw", moved::<f32>(|_| len * 28), |d| {
        d.adamw(hyper, Param { w: &mut w, low: None, rounding: None }, &g, &mut m, &mut v);
    });
    b.line("adamw, split master", moved::<bf16>(|_| len * 28), |d| {
        d.adamw(hyper, Param { w: &mut high, low: Some(&mut low), rounding: None }, &g, &mut m, &mut v);
    });
    let rounding = Some(Rounding { stream: Stream::new(1, Purpose::Rounding, 0, 0), place: Strided::WHOLE });
    b.line("adamw, stochastic rounding", moved::<bf16>(|_| len * 24), |d| {
        d.adamw(hyper, Param { w: &mut high, low: None, rounding }, &g, &mut m, &mut v);
    });
    b.line("sums_of_squares", moved::<f32>(|_| len * 4), |d| {
        std::hint::black_box(d.sums_of_squares(vec![&g]));
    });
}
