use ferropt_device::{Device, Element, Store, bf16, f16};

use crate::*;

/// The definition, one row in f64: mean, reciprocal standard deviation, normalised row.
fn normalise(x: &[f64]) -> (f64, f64, Vec<f64>) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
    let rstd = 1.0 / (variance + 1e-5).sqrt();
    (mean, rstd, x.iter().map(|x| (x - mean) * rstd).collect())
}

/// Rows around a number far from 0, which a one-pass variance would not survive.
fn rows_of_x(rows: usize, width: usize) -> Vec<f32> {
    let mut x: Vec<f32> = numbers(1, rows * width, 1.5);
    for (row, x) in x.chunks_mut(width).enumerate() {
        x.iter_mut().for_each(|x| *x += [0.0, -3.0, 200.0][row % 3]);
    }
    x
}

fn largest(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |a, b| a.max(b.abs()))
}

fn check_forward<E: Element>() {
    for (width, rows) in WIDTHS.into_iter().zip([40, 130, 33, 21, 5]) {
        let x = rows_of_x(rows, width);
        let (gamma, beta): (Vec<f32>, Vec<f32>) = (numbers(2, width, 1.0), numbers(3, width, 1.0));
        let (gamma64, beta64) = (widen(&gamma), widen(&beta));
        let (mut y, mut slack, mut means, mut rstds) = (vec![], vec![], vec![], vec![]);
        for x in x.chunks(width) {
            let x = widen(x);
            let (mean, rstd, normal) = normalise(&x);
            for c in 0..width {
                y.push(normal[c] * gamma64[c] + beta64[c]);
                // The mean's rounding errors shift a whole row.
                slack.push(
                    32.0 * UNIT
                        * (gamma64[c].abs() * (normal[c].abs() + largest(&x) * rstd) + beta64[c].abs()),
                );
            }
            means.push(mean);
            rstds.push(rstd);
        }
        for (isa, got) in on_every_device(|device| {
            let mut out = poisoned::<E>(device, rows * width);
            let mut out_f32 = poisoned::<f32>(device, rows * width);
            let (mut mean, mut rstd) = (poisoned(device, rows), poisoned(device, rows));
            let (x, gamma, beta) = (put(device, &x), put(device, &gamma), put(device, &beta));
            device.layer_norm(
                rows,
                width,
                &x,
                &gamma,
                &beta,
                &mut out,
                Some(&mut out_f32),
                &mut mean,
                &mut rstd,
            );
            let mut alone = poisoned::<E>(device, rows * width);
            device.layer_norm(rows, width, &x, &gamma, &beta, &mut alone, None, &mut mean, &mut rstd);
            assert!(same_bits(&get(device, &out), &get(device, &alone)));
            vec![get(device, &out), get(device, &out_f32), get(device, &mean), get(device, &rstd)]
        }) {
            let what = format!("{isa:?}, {}, width {width}", E::DTYPE);
            assert_close(&format!("y, {what}"), E::DTYPE, &got[0], &y, |i| slack[i]);
            assert_close(&format!("y in f32, {what}"), DType::F32, &got[1], &y, |i| slack[i]);
            let rounded: Vec<f32> = got[1].iter().map(|y| E::from_f32(*y).to_f32()).collect();
            assert!(same_bits(&got[0], &rounded), "{what}: y is y_f32, rounded");
            assert_close(&format!("mean, {what}"), DType::F32, &got[2], &means, |_| 32.0 * UNIT * 200.0);
            assert_close(&format!("rstd, {what}"), DType::F32, &got[3], &rstds, |i| 32.0 * UNIT * rstds[i]);
        }
    }
}

#[test]
fn rows_are_normalised() {
    check_forward::<f32>();
    check_forward::<bf16>();
    check_forward::<f16>();
}

/// Gradients of `sum(dy * layer_norm(x))` by central differences (x) and by linearity (gamma, beta), in f64.
fn gradients(width: usize, x: &[f64], gamma: &[f64], dy: &[f64]) -> [Vec<f64>; 3] {
    let (mut dx, mut dgamma, mut dbeta) = (vec![], vec![0.0; width], vec![0.0; width]);
    for (x, dy) in x.chunks(width).zip(dy.chunks(width)) {
        let value =
            |x: &[f64]| normalise(x).2.iter().zip(gamma).zip(dy).map(|((n, g), dy)| n * g * dy).sum::<f64>();
        let mut moved = x.to_vec();
        let h = 1e-4;
        for c in 0..width {
            moved[c] = x[c] + h;
            let up = value(&moved);
            moved[c] = x[c] - h;
            let down = value(&moved);
            moved[c] = x[c];
            dx.push((up - down) / (2.0 * h));
        }
        for (c, normal) in normalise(x).2.into_iter().enumerate() {
            dgamma[c] += dy[c] * normal;
            dbeta[c] += dy[c];
        }
    }
    [dx, dgamma, dbeta]
}

fn check_backward<G: Element>() {
    // More rows than one partial sum takes, in all but the widest.
    for (width, rows) in WIDTHS.into_iter().zip([140, 130, 70, 3, 3]) {
        let x = rows_of_x(rows, width);
        let dy: Vec<G> = numbers(4, rows * width, 1.0);
        let gamma: Vec<f32> = numbers(2, width, 1.0);
        let [dx, dgamma, dbeta] = gradients(width, &widen(&x), &widen(&gamma), &widen(&dy));
        let before: Vec<f32> = numbers(5, rows * width, 1.0);
        let before_gamma: Vec<f32> = numbers(6, width, 1.0);
        let moments: Vec<(f64, f64)> = x
            .chunks(width)
            .map(|x| {
                let (mean, rstd, _) = normalise(&widen(x));
                (mean, rstd)
            })
            .collect();
        let mean: Vec<f32> = moments.iter().map(|m| m.0 as f32).collect();
        let rstd: Vec<f32> = moments.iter().map(|m| m.1 as f32).collect();
        // What f32's rounding of x - mean does to a normalised number.
        let shift: Vec<f64> = moments.iter().map(|(mean, rstd)| 1.0 + 2.0 * mean.abs() * rstd).collect();
        for (isa, got) in on_every_device(|device| {
            let (x, dy, gamma) = (put(device, &x), put(device, &dy), put(device, &gamma));
            let (mean, rstd) = (put(device, &mean), put(device, &rstd));
            let mut out = Vec::new();
            for store in [Store::Overwrite, Store::Accumulate] {
                let [mut dx, mut dgamma, mut dbeta] = match store {
                    Store::Overwrite => [rows * width, width, width].map(|len| poisoned(device, len)),
                    Store::Accumulate => [&before, &before_gamma, &before_gamma].map(|v| put(device, v)),
                };
                device.layer_norm_backward(
                    width,
                    &dy,
                    &x,
                    &mean,
                    &rstd,
                    &gamma,
                    &mut dx,
                    store,
                    &mut dgamma,
                    &mut dbeta,
                    store,
                );
                out.extend([get(device, &dx), get(device, &dgamma), get(device, &dbeta)]);
            }
            out
        }) {
            let what = format!("{isa:?}, {}, width {width}", G::DTYPE);
            let largest_dy = largest(&widen(&dy));
            // Central differences are good to 1e-7 of a row's slope (h^2, and rounding in f64 over h).
            let slack_x = |i: usize| {
                let (_, rstd) = moments[i / width];
                (64.0 * UNIT * shift[i / width] + 1e-7 * (1.0 + rstd * rstd)) * rstd * largest_dy * 4.0
            };
            let slack_gamma = |_| 64.0 * UNIT * shift.iter().sum::<f64>() * largest_dy * 4.0;
            let plus = |a: &[f64], b: &[f32]| a.iter().zip(b).map(|(a, b)| a + *b as f64).collect::<Vec<_>>();
            let check = |name: &str, got: &[f32], want: &[f64], slack: &dyn Fn(usize) -> f64| {
                assert_close(&format!("{name}, {what}"), DType::F32, got, want, slack);
            };
            check("dx", &got[0], &dx, &slack_x);
            check("dgamma", &got[1], &dgamma, &slack_gamma);
            check("dbeta", &got[2], &dbeta, &slack_gamma);
            check("dx added", &got[3], &plus(&dx, &before), &|i| slack_x(i) + UNIT * 8.0);
            check("dgamma added", &got[4], &plus(&dgamma, &before_gamma), &slack_gamma);
            check("dbeta added", &got[5], &plus(&dbeta, &before_gamma), &slack_gamma);
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    check_backward::<f32>();
    check_backward::<bf16>();
    check_backward::<f16>();
}
