use ferropt_device::rng::{Purpose, Stream};
use ferropt_device::{AdamW, Device, Param, Rounding, Sgd, Strided, bf16, f16};

use crate::*;

/// Lengths around registers, tiles and tasks' chunks.
const LENGTHS: [usize; 5] = [1, 7, 1000, 1025, 100_003];
const STEPS: usize = 5;

fn adamw_at(step: usize) -> AdamW {
    AdamW {
        lr: 1e-3 * step as f32,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        bias_correction1: 1.0 - 0.9f32.powi(step as i32),
        bias_correction2: 1.0 - 0.95f32.powi(step as i32),
        grad_scale: 0.5,
    }
}

fn gradient_at(step: usize, len: usize) -> Vec<f32> {
    numbers(10 + step, len, 0.02)
}

/// PyTorch's AdamW in f64: parameter, first moment, second moment.
fn adamw_reference(start: &[f32]) -> [Vec<f64>; 3] {
    let (mut p, mut m, mut v) = (widen(start), vec![0.0; start.len()], vec![0.0; start.len()]);
    for step in 1..=STEPS {
        let h = adamw_at(step);
        let [lr, b1, b2, eps, decay, c1, c2, scale] = [
            h.lr,
            h.beta1,
            h.beta2,
            h.eps,
            h.weight_decay,
            h.bias_correction1,
            h.bias_correction2,
            h.grad_scale,
        ]
        .map(|x| x as f64);
        for (i, g) in gradient_at(step, start.len()).into_iter().enumerate() {
            let g = g as f64 * scale;
            p[i] *= 1.0 - lr * decay;
            m[i] = b1 * m[i] + (1.0 - b1) * g;
            v[i] = b2 * v[i] + (1.0 - b2) * g * g;
            p[i] -= lr / c1 * m[i] / (v[i].sqrt() / c2.sqrt() + eps);
        }
    }
    [p, m, v]
}

#[test]
fn adamw_is_pytorchs_and_split_masters_are_f32() {
    for len in LENGTHS {
        let start: Vec<f32> = numbers(1, len, 0.5);
        let [p, m, v] = adamw_reference(&start);
        let mut first: Option<Vec<Vec<f32>>> = None;
        for (isa, got) in on_every_device(|device| {
            let mut w = put(device, &start);
            let [mut m, mut v, mut m2, mut v2] = std::array::from_fn(|_| put(device, &vec![0.0f32; len]));
            let (mut high, mut low) = (poisoned::<bf16>(device, len), put(device, &vec![i16::MAX; len]));
            device.set_master(Param { w: &mut high, low: Some(&mut low), rounding: None }, &start);
            let (mut half, mut rest) = (poisoned::<f16>(device, len), put(device, &vec![i16::MAX; len]));
            device.set_master(Param { w: &mut half, low: Some(&mut rest), rounding: None }, &start);
            let [mut m3, mut v3] = std::array::from_fn(|_| put(device, &vec![0.0f32; len]));
            for step in 1..=STEPS {
                let (hyper, g) = (adamw_at(step), put(device, &gradient_at(step, len)));
                device.adamw(hyper, Param { w: &mut w, low: None, rounding: None }, &g, &mut m, &mut v);
                let split = Param { w: &mut high, low: Some(&mut low), rounding: None };
                device.adamw(hyper, split, &g, &mut m2, &mut v2);
                let split = Param { w: &mut half, low: Some(&mut rest), rounding: None };
                device.adamw(hyper, split, &g, &mut m3, &mut v3);
            }
            let mut master = vec![f32::NAN; len];
            device.get_master(&high, Some(&low), &mut master);
            let mut plain = vec![f32::NAN; len];
            device.get_master(&w, None, &mut plain);
            assert!(same_bits(&plain, &get(device, &w)));
            assert!(same_bits(&master, &plain), "the split master went another way than f32");
            for (high, master) in get(device, &high).iter().zip(&master) {
                assert!(
                    (high - master).abs() <= master.abs() / 256.0,
                    "compute weight {high} of master {master}"
                );
            }
            let mut of_f16 = vec![f32::NAN; len];
            device.get_master(&half, Some(&rest), &mut of_f16);
            for ((half, master), plain) in get(device, &half).iter().zip(&of_f16).zip(&plain) {
                assert_eq!(*half, f16::from_f32(*master).to_f32(), "compute weight of master {master}");
                // Of each step's result that is less than 2^-14, half of 2^-39 may be lost.
                let near = STEPS as f32 * 2f32.powi(-40) * 1.01;
                assert!((master - plain).abs() <= near, "master {master} in f16, {plain} in f32");
            }
            vec![plain, get(device, &m), get(device, &v), of_f16]
        }) {
            // A step is at most lr * (1 / c1) * few, each good to some roundings; the weight is rounded each time.
            let what = format!("{isa:?}, {len}");
            let steps = STEPS as f64;
            assert_close(&format!("w, {what}"), DType::F32, &got[0], &p, |i| {
                2.0 * steps * UNIT * (p[i].abs() + 0.1)
            });
            assert_close(&format!("m, {what}"), DType::F32, &got[1], &m, |_| 4.0 * steps * UNIT * 0.02);
            assert_close(&format!("v, {what}"), DType::F32, &got[2], &v, |i| 8.0 * steps * UNIT * v[i]);
            let first = first.get_or_insert_with(|| got.clone());
            assert!(
                first.iter().zip(&got).all(|(a, b)| same_bits(a, b)),
                "{what}: other bits than the first"
            );
        }
    }
}

#[test]
fn stochastic_rounding_is_right_on_average() {
    let (len, lr) = (100_003, 1e-4);
    let hyper = Sgd { lr, momentum: 0.0, weight_decay: 0.0, grad_scale: 1.0 };
    let mut all = Vec::new();
    for (isa, got) in on_every_device(|device| {
        let mut w = put(device, &vec![bf16::ONE; len]);
        let g = put(device, &vec![1.0f32; len]);
        for step in 0..10 {
            let rounding =
                Some(Rounding { stream: Stream::new(1, Purpose::Rounding, 3, step), place: Strided::WHOLE });
            device.sgd(hyper, Param { w: &mut w, low: None, rounding }, &g, None);
        }
        vec![get(device, &w)]
    }) {
        // bf16 has steps of 1/256 below 1, so rounding to nearest would never move.
        let mean = got[0].iter().map(|w| *w as f64).sum::<f64>() / len as f64;
        // Ten steps of probability 0.0256 by 1/256: standard deviation of the mean 6e-6.
        assert!((mean - (1.0 - 10.0 * lr as f64)).abs() < 3e-5, "{isa:?}: mean {mean}");
        all.push(got);
    }
    assert!(all.iter().all(|got| same_bits(&got[0], &all[0][0])), "instruction sets round differently");
}

#[test]
fn stochastic_rounding_of_a_part_is_that_of_the_whole() {
    let (rows, columns) = (37, 200);
    let hyper = Sgd { lr: 1e-3, momentum: 0.0, weight_decay: 0.0, grad_scale: 1.0 };
    let stream = Stream::new(1, Purpose::Rounding, 3, 5);
    let step = |device: &Chip, place: Strided, len: usize| {
        let (mut w, g) = (put(device, &vec![bf16::ONE; len]), put(device, &vec![1.0f32; len]));
        let rounding = Some(Rounding { stream, place });
        device.sgd(hyper, Param { w: &mut w, low: None, rounding }, &g, None);
        get(device, &w)
    };
    on_every_device(|device| {
        let whole = step(device, Strided::WHOLE, rows * columns);
        assert!(whole.contains(&1.0) && whole.iter().any(|w| *w < 1.0));
        // Columns 70 to 169, and of them what comes after the first 133.
        let place = Strided { first: 70, run: 100, stride: columns, skip: 0 };
        let part = step(device, place, rows * 100);
        let shard = step(device, place.after(133), 300);
        for (i, w) in part.iter().enumerate() {
            assert_eq!(*w, whole[i / 100 * columns + 70 + i % 100], "element {i}");
        }
        assert_eq!(shard, part[133..433]);
        Vec::new()
    });
}

#[test]
fn masters_without_low_halves_are_rounded_to_nearest() {
    let values: Vec<f32> = numbers(2, 1000, 1.0);
    let want: Vec<f32> = values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
    on_every_device(|device| {
        for rounding in
            [None, Some(Rounding { stream: Stream::new(1, Purpose::Rounding, 0, 0), place: Strided::WHOLE })]
        {
            let mut w = poisoned::<bf16>(device, values.len());
            device.set_master(Param { w: &mut w, low: None, rounding }, &values);
            let mut master = vec![f32::NAN; values.len()];
            device.get_master(&w, None, &mut master);
            assert!(same_bits(&master, &want));
        }
        Vec::new()
    });
}

#[test]
fn sgd_is_pytorchs() {
    for len in LENGTHS {
        for momentum in [0.0, 0.9] {
            let hyper = Sgd { lr: 0.1, momentum, weight_decay: 0.01, grad_scale: 0.5 };
            let start: Vec<f32> = numbers(1, len, 0.5);
            let (mut p, mut buffer) = (widen(&start), vec![0.0; len]);
            for step in 1..=STEPS {
                for (i, g) in gradient_at(step, len).into_iter().enumerate() {
                    let g = g as f64 * 0.5 + hyper.weight_decay as f64 * p[i];
                    buffer[i] = momentum as f64 * buffer[i] + g;
                    p[i] -= hyper.lr as f64 * buffer[i];
                }
            }
            for (isa, got) in on_every_device(|device| {
                let mut w = put(device, &start);
                let mut buffer = put(device, &vec![0.0f32; len]);
                for step in 1..=STEPS {
                    let g = put(device, &gradient_at(step, len));
                    let buffer = (momentum > 0.0).then_some(&mut buffer);
                    device.sgd(hyper, Param { w: &mut w, low: None, rounding: None }, &g, buffer);
                }
                vec![get(device, &w), get(device, &buffer)]
            }) {
                let what = format!("{isa:?}, {len}, momentum {momentum}");
                let slack = |i: usize| 4.0 * STEPS as f64 * UNIT * (p[i].abs() + 0.1);
                assert_close(&format!("w, {what}"), DType::F32, &got[0], &p, slack);
                if momentum > 0.0 {
                    assert_close(&format!("momentum, {what}"), DType::F32, &got[1], &buffer, slack);
                }
            }
        }
    }
}

#[test]
fn sums_of_squares_are_those_of_f64() {
    // Of several buffers together, a smaller one behind a larger one among them, and of each alone.
    let xs = [1000, 0, 100_003, 1, 7].map(|len| numbers::<f32>(3, len, 3.0));
    let outputs = on_every_device(|device| {
        let bufs: Vec<_> = xs.iter().map(|x| put(device, x)).collect();
        let sums = device.sums_of_squares(bufs.iter().collect());
        let alone: Vec<f64> = bufs.iter().flat_map(|x| device.sums_of_squares(vec![x])).collect();
        assert_eq!(sums, alone);
        assert!(device.sums_of_squares(vec![]).is_empty());
        // As two halves of 32 bits, which are compared.
        let halves = |sum: &f64| [sum.to_bits() as u32, (sum.to_bits() >> 32) as u32].map(f32::from_bits);
        vec![sums.iter().flat_map(halves).collect()]
    });
    for (isa, got) in &outputs {
        assert!(same_bits(&got[0], &outputs[0].1[0]), "{isa}: {got:?}");
        for (x, halves) in xs.iter().zip(got[0].chunks(2)) {
            let want: f64 = x.iter().map(|x| *x as f64 * *x as f64).sum();
            let [low, high] = [halves[0], halves[1]].map(|half| half.to_bits() as u64);
            let sum = f64::from_bits(high << 32 | low);
            assert!((sum - want).abs() <= 1e-13 * want, "{isa}, {}: {sum} is not {want}", x.len());
        }
    }
}

#[test]
fn sums_of_squares_of_very_many_buffers_are_in_their_order() {
    let device = one_device();
    let bufs: Vec<_> = (0..1030).map(|i| put(device, &[i as f32])).collect();
    let want: Vec<f64> = (0..1030).map(|i| (i * i) as f64).collect();
    assert_eq!(device.sums_of_squares(bufs.iter().collect()), want);
}
