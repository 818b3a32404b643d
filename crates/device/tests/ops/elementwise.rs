use ferropt_device::rng::{Purpose, Stream};
use ferropt_device::{Device, Dropout, Element, Store, bf16, f16};

use crate::*;

/// Lengths around registers, tasks' chunks, and none.
const LENGTHS: [usize; 6] = [0, 1, 7, 80, 1000, 100_003];

#[test]
fn fill_reaches_every_element() {
    on_every_device(|device| {
        for len in LENGTHS {
            let mut x = poisoned::<bf16>(device, len);
            device.fill(&mut x, bf16::from_f32(1.5));
            assert!(get(device, &x).iter().all(|x| *x == 1.5));
            let mut ids = poisoned::<u32>(device, len);
            device.fill(&mut ids, 7);
            assert!(get(device, &ids).iter().all(|x| *x == 7.0));
        }
        Vec::new()
    });
}

fn check_cast<S: Element, T: Element>(values: &[S]) {
    let want: Vec<f32> = values.iter().map(|v| T::from_f32(v.to_f32()).to_f32()).collect();
    for (isa, got) in on_every_device(|device| {
        let mut dst = poisoned::<T>(device, values.len());
        device.cast(&put(device, values), &mut dst);
        vec![get(device, &dst)]
    }) {
        assert!(same_bits(&got[0], &want), "{isa:?}: {} to {}", S::DTYPE, T::DTYPE);
    }
}

#[test]
fn casts_round_to_nearest_even() {
    for len in LENGTHS {
        let x: Vec<f32> = numbers(1, len, 3.0);
        let halves: Vec<bf16> = numbers(1, len, 3.0);
        check_cast::<f32, bf16>(&x);
        check_cast::<bf16, f32>(&halves);
        check_cast::<f32, f32>(&x);
        check_cast::<bf16, bf16>(&halves);
        let halves: Vec<f16> = numbers(1, len, 3.0);
        check_cast::<f32, f16>(&x);
        check_cast::<f16, f32>(&halves);
        check_cast::<f16, f16>(&halves);
    }
    // Ties, and ends of the range.
    let step = 1.0 / 128.0;
    check_cast::<f32, bf16>(&[1.0 + step / 2.0, 1.0 + 1.5 * step, -1.0 - step / 2.0, 0.0, -0.0]);
    check_cast::<f32, bf16>(&[f32::MAX, f32::MIN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e-30]);
    let step = 1.0 / 1024.0;
    check_cast::<f32, f16>(&[1.0 + step / 2.0, 1.0 + 1.5 * step, -1.0 - step / 2.0, 0.0, -0.0]);
    check_cast::<f32, f16>(&[65_519.0, 65_520.0, -1e30, f32::INFINITY, 3e-8, 2.9e-8, 6.1e-5, -1e-30]);
}

#[test]
fn a_cast_of_equal_types_keeps_every_bit() {
    // A quiet NaN with a payload, minus zero, the smallest subnormal.
    let bits = [0x7fc1_2345, 1 << 31, 1];
    on_every_device(|device| {
        let mut copy = put(device, &[0.0f32; 3]);
        device.cast(&put(device, &bits.map(f32::from_bits)), &mut copy);
        let mut got = [0.0; 3];
        device.download(&copy, 0, &mut got);
        assert_eq!(got.map(f32::to_bits), bits);
        Vec::new()
    });
}

fn check_residual_backward<E: Element>() {
    let stream = Stream::new(9, Purpose::DropoutFeedForward, 4, 100);
    for (width, rows) in WIDTHS.into_iter().zip([300, 41, 77, 90, 3]) {
        let dres: Vec<f32> = numbers(2, rows * width, 1.0);
        for dropout in [None, Some(Dropout { p: 0.1, stream, first_row: 1 << 33 | 5 })] {
            let factor = |i: usize| match dropout {
                None => 1.0,
                Some(d) => {
                    let word = stream.word(d.first_row + (i / width) as u64, i % width);
                    if word as f64 >= d.p as f64 * 4_294_967_296.0 { 1.0 / (1.0 - d.p) } else { 0.0 }
                }
            };
            let want: Vec<f32> =
                dres.iter().enumerate().map(|(i, x)| E::from_f32(x * factor(i)).to_f32()).collect();
            for (isa, got) in on_every_device(|device| {
                let mut dy = poisoned::<E>(device, rows * width);
                device.residual_backward(width, &put(device, &dres), dropout, &mut dy);
                vec![get(device, &dy)]
            }) {
                assert!(same_bits(&got[0], &want), "{isa:?}: width {width}, {dropout:?}");
            }
        }
    }
}

#[test]
fn residual_gradients_are_masked_as_defined() {
    check_residual_backward::<f32>();
    check_residual_backward::<bf16>();
    check_residual_backward::<f16>();
}

fn check_residual<E: Element>() {
    let stream = Stream::new(9, Purpose::DropoutFeedForward, 4, 100);
    for (width, rows) in WIDTHS.into_iter().zip([300, 41, 77, 90, 3]) {
        let (branch, bias) = (numbers::<E>(1, (rows + 1) * width, 1.0), numbers::<f32>(3, width, 1.0));
        let residual: Vec<f32> = numbers(2, (rows + 1) * width, 1.0);
        for dropout in [None, Some(Dropout { p: 0.1, stream, first_row: 77 })] {
            for bias in [None, Some(&bias)] {
                // The definition, and that of the product's own epilogue with a matrix of one.
                let want = |i: usize| {
                    let sum = branch[i].to_f32() + bias.map_or(0.0, |b| b[i % width]);
                    let factor = dropout.map_or(1.0, |d| {
                        let word = stream.word(d.first_row + (i / width) as u64, i % width);
                        if word as f64 >= d.p as f64 * 4_294_967_296.0 { 1.0 / (1.0 - d.p) } else { 0.0 }
                    });
                    residual[i] + sum * factor
                };
                for (isa, got) in on_every_device(|device| {
                    let mut out = poisoned::<f32>(device, (rows + 1) * width);
                    let bias = bias.map(|b| put(device, b));
                    let (branch, residual) = (put(device, &branch), put(device, &residual));
                    device.residual(rows, width, &branch, bias.as_ref(), dropout, &residual, &mut out);
                    vec![get(device, &out)]
                }) {
                    for (i, got) in got[0].iter().enumerate() {
                        let right = if i < rows * width { *got == want(i) } else { got.is_nan() };
                        assert!(right, "{isa:?}: width {width}, {dropout:?}, element {i}: {got}");
                    }
                }
            }
        }
    }
}

#[test]
fn residual_branches_end_as_defined() {
    check_residual::<f32>();
    check_residual::<bf16>();
    check_residual::<f16>();
}

#[test]
fn parts_of_buffers_are_copied_and_added() {
    on_every_device(|device| {
        for len in LENGTHS {
            let (src, old): (Vec<f32>, Vec<f32>) = (numbers(1, len + 5, 1.0), numbers(2, len, 1.0));
            let from = put(device, &src);
            let mut copy = put(device, &vec![-1.0f32; len + 3]);
            device.copy(len, &from, 5, &mut copy, 2);
            let want = [&[-1.0; 2], &src[5..], &[-1.0]].concat();
            assert_eq!(get(device, &copy), want);
            let mut sum = put(device, &old);
            device.accumulate(&from, 4, &mut sum, Store::Accumulate);
            assert_eq!(get(device, &sum), old.iter().zip(&src[4..]).map(|(a, b)| a + b).collect::<Vec<_>>());
            device.accumulate(&from, 3, &mut sum, Store::Overwrite);
            assert_eq!(get(device, &sum), src[3..3 + len]);
        }
        Vec::new()
    });
}
