//! Optimiser steps, masters, and the sum of squares.

use bytemuck::NoUninit;

use super::driver::Address;
use super::kernels::args;
use super::workspace::Scratch;
use super::{CudaBuf, CudaDevice, StreamWords, name, optional};
use crate::{AdamW, Buffer, DType, Element, Param, Sgd, Strided};

/// Elements whose squares a block adds up; fixed, and so is the order of all additions.
const EACH: usize = 1 << 14;
/// Threads of such a block.
const THREADS: usize = 256;

/// Buffers whose sums of squares are waited for at once: more than models have parameters, but the very largest.
pub(super) const AT_ONCE: usize = 1024;

/// Masters that are copied in f32 at a time.
pub(super) const ON_THE_WAY: usize = 1 << 22;

/// `Master` of kernels/optimizer.cu.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Master {
    w: Address,
    low: Address,
    random: u32,
    unused: u32,
    stream: StreamWords,
    place: [u64; 4],
}

impl Master {
    fn new<E: Element>(param: &Param<'_, CudaDevice, E>) -> Master {
        let mut master = Master::of(param.w, param.low.as_deref(), 0, param.w.len());
        if let Some(rounding) = param.rounding {
            let Strided { first, run, stride, skip } = rounding.place;
            master.random = 1;
            master.stream = StreamWords::new(rounding.stream);
            master.place = [first, run, stride, skip].map(|n| n as u64);
        }
        master
    }

    /// Elements `first ..`, rounded to nearest where there is no other half.
    fn of<E: Element>(w: &CudaBuf<E>, low: Option<&CudaBuf<i16>>, first: usize, len: usize) -> Master {
        Master {
            w: w.at(first, len),
            low: low.map_or(0, |low| low.at(first, len)),
            random: 0,
            unused: 0,
            stream: StreamWords::default(),
            place: [0, u64::MAX, u64::MAX, 0],
        }
    }
}

pub(super) fn adamw<E: Element>(
    d: &CudaDevice,
    hyper: AdamW,
    param: Param<'_, CudaDevice, E>,
    grad: &CudaBuf<f32>,
    m: &mut CudaBuf<f32>,
    v: &mut CudaBuf<f32>,
) {
    let AdamW { lr, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2, grad_scale } = hyper;
    let (decay, step, root) = (1.0 - lr * weight_decay, lr / bias_correction1, bias_correction2.sqrt());
    let hyper = [grad_scale, beta1, beta2, decay, step, root, eps];
    let len = param.w.len();
    let arguments =
        args![hyper, Master::new(&param), grad.at(0, len), m.at(0, len), v.at(0, len), len as u64];
    d.by_element(&format!("adamw_{}", name::<E>()), len, arguments);
}

pub(super) fn sgd<E: Element>(
    d: &CudaDevice,
    hyper: Sgd,
    param: Param<'_, CudaDevice, E>,
    grad: &CudaBuf<f32>,
    momentum: Option<&mut CudaBuf<f32>>,
) {
    let len = param.w.len();
    let arguments = args![
        Master::new(&param),
        grad.at(0, len),
        optional(momentum.as_deref(), len),
        len as u64,
        hyper.lr,
        hyper.momentum,
        hyper.weight_decay,
        hyper.grad_scale
    ];
    d.by_element(&format!("sgd_{}", name::<E>()), len, arguments);
}

pub(super) fn set_master<E: Element>(d: &CudaDevice, param: Param<'_, CudaDevice, E>, values: &[f32]) {
    if E::DTYPE == DType::F32 {
        return param.w.write(0, bytemuck::cast_slice(values));
    }
    let mut workspace = d.workspace();
    let there = workspace.take(Scratch::Masters, 4 * ON_THE_WAY.min(values.len()));
    let set = format!("set_master_{}", name::<E>());
    for (piece, values) in values.chunks(ON_THE_WAY).enumerate() {
        let len = values.len();
        // Rounded to nearest, also where steps round at random.
        let master = Master::of(param.w, param.low.as_deref(), piece * ON_THE_WAY, len);
        d.write(there, values);
        d.by_element(&set, len, args![there, master, len as u64]);
    }
}

pub(super) fn get_master<E: Element>(
    d: &CudaDevice,
    w: &CudaBuf<E>,
    low: Option<&CudaBuf<i16>>,
    values: &mut [f32],
) {
    if E::DTYPE == DType::F32 {
        return w.read(0, bytemuck::cast_slice_mut(values));
    }
    let mut workspace = d.workspace();
    let there = workspace.take(Scratch::Masters, 4 * ON_THE_WAY.min(values.len()));
    let get = format!("get_master_{}", name::<E>());
    for (piece, values) in values.chunks_mut(ON_THE_WAY).enumerate() {
        let (master, len) = (Master::of(w, low, piece * ON_THE_WAY, values.len()), values.len());
        d.by_element(&get, len, args![master, there, len as u64]);
        d.read(there, values);
    }
}

/// Bytes of workspace of [`sums_of_squares`], where the largest buffer has so many elements: its parts, since one buffer's are
/// added before the next one's are made, and the sums.
pub(super) fn squares_bytes(len: usize) -> usize {
    8 * (len.div_ceil(EACH) + AT_ONCE)
}

/// Of at most [`AT_ONCE`] buffers.
pub(super) fn sums_of_squares(d: &CudaDevice, xs: &[&CudaBuf<f32>]) -> Vec<f64> {
    let largest = xs.iter().map(|x| x.len()).max().unwrap_or_default();
    let mut workspace = d.workspace();
    let sums = workspace.take(Scratch::Parts, squares_bytes(largest));
    let parts = sums + 8 * AT_ONCE as u64;
    for (i, x) in xs.iter().enumerate() {
        let (len, blocks) = (x.len(), x.len().div_ceil(EACH));
        let arguments = args![x.at(0, len), len as u64, EACH as u32, parts];
        d.kernels.launch("squares", (blocks, 1), (THREADS, 1), 0, arguments);
        let arguments = args![parts, blocks as u32, sums + 8 * i as u64];
        d.kernels.launch("sum_parts", (1, 1), (THREADS, 1), 0, arguments);
    }
    let mut totals = vec![0.0f64; xs.len()];
    d.read(sums, &mut totals);
    totals
}
