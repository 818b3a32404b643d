use ferropt_device::{Device, Element, IGNORE, LossShape, Store, bf16, f16};

use crate::*;

/// The definition in f64, with what rounding of logits and their gradients to `E` may change.
struct Reference {
    losses: Vec<f64>,
    dh: Vec<f64>,
    dw: Vec<f64>,
    loss_slack: Vec<f64>,
    dh_slack: Vec<f64>,
    dw_slack: Vec<f64>,
}

fn reference(s: LossShape, h: &[f64], w: &[f64], targets: &[u32], scale: f64, unit: f64) -> Reference {
    let zeros = |len| vec![0.0; len];
    let mut r = Reference {
        losses: zeros(s.rows),
        dh: zeros(s.rows * s.width),
        dw: zeros(s.vocab * s.width),
        loss_slack: zeros(s.rows),
        dh_slack: zeros(s.rows * s.width),
        dw_slack: zeros(s.vocab * s.width),
    };
    for row in (0..s.rows).filter(|row| targets[*row] != IGNORE) {
        let h = &h[row * s.width..][..s.width];
        let w_of = |v: usize| &w[v * s.width..][..s.width];
        let logits: Vec<f64> =
            (0..s.vocab).map(|v| h.iter().zip(w_of(v)).map(|(h, w)| h * w).sum()).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log_sum = max + logits.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
        let target = targets[row] as usize;
        r.losses[row] = log_sum - logits[target];
        // A logit is off by its rounding and by that of its sum; then so is, at most, their weighted mean.
        let sizes = |v: usize| h.iter().zip(w_of(v)).map(|(h, w)| (h * w).abs()).sum::<f64>();
        let off = (0..s.vocab).map(|v| unit * logits[v].abs() + 8.0 * UNIT * sizes(v)).fold(0.0, f64::max);
        let off = off + 16.0 * UNIT * (1.0 + log_sum.abs());
        r.loss_slack[row] = 2.0 * off;
        for v in 0..s.vocab {
            let p = (logits[v] - log_sum).exp();
            let d = (p - (v == target) as u8 as f64) * scale;
            // exp turns absolute errors into relative ones, to first order; then the gradient itself is rounded.
            let d_off = scale * p * (2.2 * off + 16.0 * UNIT) + (unit + UNIT) * d.abs() + UNIT * scale;
            for c in 0..s.width {
                r.dh[row * s.width + c] += d * w_of(v)[c];
                r.dh_slack[row * s.width + c] += (d_off + 8.0 * UNIT * d.abs()) * w_of(v)[c].abs();
                r.dw[v * s.width + c] += d * h[c];
                r.dw_slack[v * s.width + c] += (d_off + 8.0 * UNIT * d.abs()) * h[c].abs();
            }
        }
    }
    r
}

/// Factor on the losses: large where gradients would be too small for the type otherwise.
fn scale_of(dtype: DType) -> f32 {
    if dtype == DType::F16 { 32.0 } else { 0.03 }
}

/// Every fifth target takes no part.
fn targets_of(rows: usize, vocab: usize) -> Vec<u32> {
    let mut targets = whole(7, rows, vocab);
    targets.iter_mut().skip(2).step_by(5).for_each(|t| *t = IGNORE);
    targets
}

#[test]
fn the_reference_is_its_own_derivative() {
    let s = LossShape { rows: 4, vocab: 9, width: 5, first: 0 };
    let (h, w) = (widen::<f32>(&numbers(1, 20, 1.0)), widen::<f32>(&numbers(2, 45, 1.0)));
    let targets = targets_of(s.rows, s.vocab);
    let value =
        |h: &[f64], w: &[f64]| reference(s, h, w, &targets, 1.0, 0.0).losses.iter().sum::<f64>() * 0.7;
    let r = reference(s, &h, &w, &targets, 0.7, 0.0);
    let step = 1e-5;
    let slope = |at: &[f64], i: usize, value: &dyn Fn(&[f64]) -> f64| {
        let moved = |by: f64| {
            let mut at = at.to_vec();
            at[i] += by;
            value(&at)
        };
        (moved(step) - moved(-step)) / (2.0 * step)
    };
    for i in 0..h.len() {
        assert!((slope(&h, i, &|h| value(h, &w)) - r.dh[i]).abs() < 1e-8, "dh {i}");
    }
    for i in 0..w.len() {
        assert!((slope(&w, i, &|w| value(&h, w)) - r.dw[i]).abs() < 1e-8, "dw {i}");
    }
}

fn check<E: Element>(s: LossShape) {
    let (h, w) = (numbers::<E>(1, s.rows * s.width, 1.0), numbers::<E>(2, s.vocab * s.width, 0.7));
    let targets = targets_of(s.rows, s.vocab);
    let scale = scale_of(E::DTYPE);
    let rounding = if E::DTYPE == DType::F32 { 0.0 } else { unit(E::DTYPE) };
    let want = reference(s, &widen(&h), &widen(&w), &targets, scale as f64, rounding);
    let before: Vec<f32> = numbers(3, s.vocab * s.width, 0.01);
    for (isa, got) in on_every_device(|device| {
        let (h, w, targets) = (put(device, &h), put(device, &w), put(device, &targets));
        let mut only_losses = poisoned(device, s.rows);
        device.lm_loss(s, &h, &w, &targets, None, &mut only_losses);
        let (mut losses, mut dh) = (poisoned(device, s.rows), poisoned::<E>(device, s.rows * s.width));
        let mut dw = poisoned(device, s.vocab * s.width);
        device.lm_loss_backward(
            s,
            &h,
            &w,
            &targets,
            None,
            scale,
            &mut losses,
            &mut dh,
            &mut dw,
            Store::Overwrite,
        );
        assert!(same_bits(&get(device, &only_losses), &get(device, &losses)));
        let mut sum = put(device, &before);
        device.lm_loss_backward(
            s,
            &h,
            &w,
            &targets,
            None,
            scale,
            &mut losses,
            &mut dh,
            &mut sum,
            Store::Accumulate,
        );
        vec![get(device, &losses), get(device, &dh), get(device, &dw), get(device, &sum)]
    }) {
        let what = format!("{isa:?}, {}, {s:?}", E::DTYPE);
        assert_close(&format!("losses, {what}"), DType::F32, &got[0], &want.losses, |i| want.loss_slack[i]);
        assert_close(&format!("dh, {what}"), E::DTYPE, &got[1], &want.dh, |i| want.dh_slack[i]);
        assert_close(&format!("dw, {what}"), DType::F32, &got[2], &want.dw, |i| want.dw_slack[i]);
        let sum: Vec<f64> = want.dw.iter().zip(&before).map(|(d, b)| d + *b as f64).collect();
        let slack = |i: usize| want.dw_slack[i] + UNIT * 0.1;
        assert_close(&format!("dw added, {what}"), DType::F32, &got[3], &sum, slack);
        for row in (0..s.rows).filter(|row| targets[*row] == IGNORE) {
            assert_eq!(got[0][row], 0.0, "{what}: loss of an ignored row");
            assert!(got[1][row * s.width..][..s.width].iter().all(|d| *d == 0.0), "{what}: its gradient");
        }
    }
}

#[test]
fn losses_and_gradients_match_the_definition() {
    for (rows, vocab, width) in
        // The last has more rows than a GPU's chunk of logits.
        [(1, 1, 1), (3, 7, 80), (40, 80, 7), (5, 1000, 24), (9, 769, 1), (1030, 33, 7), (4100, 3, 2)]
    {
        check::<f32>(LossShape { rows, vocab, width, first: 0 });
        check::<bf16>(LossShape { rows, vocab, width, first: 0 });
        check::<f16>(LossShape { rows, vocab, width, first: 0 });
    }
}

#[test]
fn large_logits_overflow_nothing() {
    let s = LossShape { rows: 2, vocab: 3, width: 1, first: 0 };
    for (isa, got) in on_every_device(|device| {
        let (h, w) = (put(device, &[1000.0f32, -1000.0]), put(device, &[1.0f32, 0.0, -1.0]));
        let (mut losses, mut dh, mut dw) =
            (poisoned(device, 2), poisoned::<f32>(device, 2), poisoned(device, 3));
        let targets = put(device, &[0, 1]);
        device.lm_loss_backward(
            s,
            &h,
            &w,
            &targets,
            None,
            1.0,
            &mut losses,
            &mut dh,
            &mut dw,
            Store::Overwrite,
        );
        vec![get(device, &losses), get(device, &dh), get(device, &dw)]
    }) {
        assert_eq!(got, [vec![0.0, 1000.0], vec![0.0, -1.0], vec![0.0, 1000.0, -1000.0]], "{isa:?}");
    }
}

#[test]
fn nothing_to_learn_gives_no_gradient() {
    for rows in [0, 3] {
        let s = LossShape { rows, vocab: 5, width: 2, first: 0 };
        for (isa, got) in on_every_device(|device| {
            let (h, w) = (put(device, &vec![bf16::ONE; 2 * rows]), put(device, &[bf16::ONE; 10]));
            let targets = put(device, &vec![IGNORE; rows]);
            let (mut losses, mut dh) = (poisoned(device, rows), poisoned::<bf16>(device, 2 * rows));
            let mut dw = poisoned(device, 10);
            device.lm_loss_backward(
                s,
                &h,
                &w,
                &targets,
                None,
                1.0,
                &mut losses,
                &mut dh,
                &mut dw,
                Store::Overwrite,
            );
            let mut kept = put(device, &[3.0f32; 10]);
            device.lm_loss_backward(
                s,
                &h,
                &w,
                &targets,
                None,
                1.0,
                &mut losses,
                &mut dh,
                &mut kept,
                Store::Accumulate,
            );
            vec![get(device, &losses), get(device, &dh), get(device, &dw), get(device, &kept)]
        }) {
            assert!(got[..3].iter().flatten().all(|x| *x == 0.0), "{isa:?}, {rows} rows");
            assert!(got[3].iter().all(|x| *x == 3.0), "{isa:?}, {rows} rows");
        }
    }
}

/// Losses and gradients of a vocabulary whose parts are in two places, each of which has its own idea of the rows only
/// through what they tell each other.
fn check_parts<E: Element>(s: LossShape, cut: usize) {
    let (h, w) = (numbers::<E>(1, s.rows * s.width, 1.0), numbers::<E>(2, s.vocab * s.width, 0.7));
    let targets = targets_of(s.rows, s.vocab);
    let scale = scale_of(E::DTYPE);
    let rounding = if E::DTYPE == DType::F32 { 0.0 } else { unit(E::DTYPE) };
    let want = reference(s, &widen(&h), &widen(&w), &targets, scale as f64, rounding);
    for (isa, got) in on_every_device(|device| {
        let (h, targets) = (put(device, &h), put(device, &targets));
        // Log-sum-exps and targets' logits of all rows of both parts, looked at first.
        let parts = [(0, &w[..cut * s.width]), (cut, &w[cut * s.width..])]
            .map(|(first, w)| (LossShape { vocab: w.len() / s.width, first, ..s }, put(device, w)));
        let seen = [0, 1].map(|part| {
            let (mut sums, mut logits) = (Vec::new(), Vec::new());
            let combine = &mut |sum: &mut [f32], logit: &mut [f32]| {
                sums.extend_from_slice(sum);
                logits.extend_from_slice(logit);
            };
            let (s, w) = &parts[part];
            device.lm_loss(*s, &h, w, &targets, Some(combine), &mut poisoned(device, s.rows));
            (sums, logits)
        });
        let mut out: Vec<Vec<f32>> = Vec::new();
        for (s, w) in &parts {
            let mut row = 0;
            let combine = &mut |sum: &mut [f32], logit: &mut [f32]| {
                for (sum, logit) in sum.iter_mut().zip(logit) {
                    let [(a, x), (b, y)] = [0, 1].map(|part| (seen[part].0[row], seen[part].1[row]));
                    let max = a.max(b);
                    (*sum, *logit) = (max + ((a - max).exp() + (b - max).exp()).ln(), x + y);
                    row += 1;
                }
            };
            let (mut losses, mut dh) = (poisoned(device, s.rows), poisoned::<E>(device, s.rows * s.width));
            let mut dw = poisoned(device, s.vocab * s.width);
            let store = Store::Overwrite;
            device.lm_loss_backward(
                *s,
                &h,
                w,
                &targets,
                Some(combine),
                scale,
                &mut losses,
                &mut dh,
                &mut dw,
                store,
            );
            out.extend([get(device, &losses), get(device, &dh), get(device, &dw)]);
        }
        assert!(same_bits(&out[0], &out[3]), "both parts know the same losses");
        let dh = out[1].iter().zip(&out[4]).map(|(a, b)| a + b).collect();
        vec![out[0].clone(), dh, [&out[2][..], &out[5]].concat()]
    }) {
        let what = format!("{isa:?}, {}, {s:?} cut at {cut}", E::DTYPE);
        assert_close(&format!("losses, {what}"), DType::F32, &got[0], &want.losses, |i| {
            want.loss_slack[i] + 16.0 * UNIT * want.losses[i].abs()
        });
        // Each part's share is rounded to `E` before they are added.
        assert_close(&format!("dh, {what}"), E::DTYPE, &got[1], &want.dh, |i| {
            want.dh_slack[i] + unit(E::DTYPE) * scale as f64
        });
        assert_close(&format!("dw, {what}"), DType::F32, &got[2], &want.dw, |i| {
            want.dw_slack[i] + 16.0 * UNIT * (want.dw[i].abs() + scale as f64)
        });
    }
}

#[test]
fn parts_of_a_vocabulary_make_the_whole() {
    for (rows, vocab, width, cut) in [(40, 80, 7, 40), (5, 1000, 24, 300), (1030, 33, 7, 32), (4100, 5, 2, 3)]
    {
        check_parts::<f32>(LossShape { rows, vocab, width, first: 0 }, cut);
        check_parts::<bf16>(LossShape { rows, vocab, width, first: 0 }, cut);
        check_parts::<f16>(LossShape { rows, vocab, width, first: 0 }, cut);
    }
}
