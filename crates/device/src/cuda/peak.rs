//! What the GPU gives at most, measured: FLOP/s of a large product and bytes per second of its memory.

use anyhow::Result;

use super::blas::{Factor, Product};
use super::{CudaBuf, CudaDevice};
use crate::{Buffer, Element};

/// Rows and columns of the measured product: enough for every multiprocessor, and small beside any GPU's memory.
const SIZE: usize = 8192;
/// Trials, of which the fastest counts, after one to warm up.
const TRIALS: usize = 8;

/// FLOP/s of cuBLASLt's product of two square matrices of random numbers: zeros would be multiplied faster.
pub(super) fn measure<E: Element>(d: &CudaDevice) -> Result<f64> {
    let size = if d.gpu.multiprocessors < 16 { SIZE / 32 } else { SIZE };
    let random = crate::rng::Stream::new(1, crate::rng::Purpose::Init, 0, 0);
    let some: Vec<E> = (0..65_521).map(|i| E::from_f32(random.uniform(0, i) - 0.5)).collect();
    let numbers: Vec<E> = some.iter().copied().cycle().take(size * size).collect();
    let [left, right, out] = [(); 3].map(|()| CudaBuf::<E>::new(&d.gpu, size * size));
    let (mut left, mut right, out) = (left?, right?, out?);
    left.write(0, &numbers);
    right.write(0, &numbers);
    let factor = |x: &CudaBuf<E>, turned| Factor { address: x.at(0, size * size), dtype: E::DTYPE, turned };
    let product = Product {
        m: size,
        n: size,
        k: size,
        left: factor(&left, false),
        right: factor(&right, true),
        out: out.at(0, size * size),
        out_dtype: E::DTYPE,
        add: false,
    };
    d.blas.multiply(&product);
    let best = (0..TRIALS).map(|_| d.gpu.time(|| d.blas.multiply(&product))).fold(f64::INFINITY, f64::min);
    Ok(2.0 * (size as f64).powi(3) / best)
}

/// Measured bytes per second of copying memory, what is read and what is written both counted.
pub(super) fn bandwidth(d: &CudaDevice) -> Result<f64> {
    const BYTES: usize = 1 << 30;
    let [src, dst] = [(); 2].map(|()| CudaBuf::<u32>::new(&d.gpu, BYTES / 4));
    let (src, dst) = (src?, dst?);
    let mut best = f64::INFINITY;
    for _ in 0..8 {
        best = best.min(d.gpu.time(|| dst.copy_from(0, &src, 0, BYTES / 4)));
    }
    Ok(2.0 * BYTES as f64 / best)
}
