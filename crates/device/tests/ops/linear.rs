use ferropt_device::{Activation, Device, Dropout, Element, LinearShape, Store, bf16, f16};

use crate::*;

/// Single rows, few, partial tiles on every side, several blocks of k.
const SHAPES: [(usize, usize, usize); 8] = [
    (1, 1, 1),
    (1, 130, 77),
    (4, 65, 96),
    (5, 49, 64),
    (13, 100, 33),
    (64, 48, 128),
    (97, 193, 50),
    (6, 7, 4500),
];

/// Sums of products `x[i] * y[i]` over `i`, and what f32 may lose on the way.
fn sum(len: usize, product: impl Fn(usize) -> f64) -> (f64, f64) {
    let (mut sum, mut sizes) = (0.0, 0.0);
    for i in 0..len {
        sum += product(i);
        sizes += product(i).abs();
    }
    // Rounding errors of a sum of n terms grow like its root; two bits to spare.
    (sum, UNIT * (8.0 + 4.0 * (len as f64).sqrt()) * sizes)
}

struct Operands<E> {
    s: LinearShape,
    x: Vec<E>,
    w: Vec<E>,
    dy: Vec<E>,
    bias: Vec<f32>,
    residual: Vec<f32>,
}

impl<E: Element> Operands<E> {
    fn new((m, n, k): (usize, usize, usize)) -> Self {
        Operands {
            s: LinearShape { m, n, k },
            x: numbers(1, m * k, 1.0),
            w: numbers(2, n * k, 1.0),
            dy: numbers(3, m * n, 1.0),
            bias: numbers(4, n, 3.0),
            residual: numbers(5, m * n, 2.0),
        }
    }

    /// `x * w^T + bias` and its slack.
    fn forward(&self, bias: bool) -> (Vec<f64>, Vec<f64>) {
        let LinearShape { m, n, k } = self.s;
        let (x, w) = (widen(&self.x), widen(&self.w));
        let element = |at: usize| {
            let (i, j) = (at / n, at % n);
            let (value, slack) = sum(k, |l| x[i * k + l] * w[j * k + l]);
            let bias = if bias { self.bias[j] as f64 } else { 0.0 };
            (value + bias, slack + 2.0 * UNIT * bias.abs())
        };
        (0..m * n).map(element).unzip()
    }

    fn what(&self, isa: &str) -> String {
        format!("{isa:?}, {}, {:?}", E::DTYPE, self.s)
    }
}

fn check_forward<E: Element>(shape: (usize, usize, usize)) {
    let o = Operands::<E>::new(shape);
    let (plain, plain_slack) = o.forward(false);
    let (biased, biased_slack) = o.forward(true);
    let relu: Vec<f64> = biased.iter().map(|y| y.max(0.0)).collect();
    for (isa, got) in on_every_device(|device| {
        let (x, w, bias) = (put(device, &o.x), put(device, &o.w), put(device, &o.bias));
        let len = o.s.m * o.s.n;
        let (mut y, mut y_f32, mut y_relu) =
            (poisoned::<E>(device, len), poisoned::<f32>(device, len), poisoned::<E>(device, len + 3));
        device.linear(o.s, &x, &w, None, Activation::Identity, &mut y);
        device.linear(o.s, &x, &w, Some(&bias), Activation::Identity, &mut y_f32);
        device.linear(o.s, &x, &w, Some(&bias), Activation::Relu, &mut y_relu);
        let mut y_relu = get(device, &y_relu);
        assert!(y_relu.split_off(len).iter().all(|x| x.is_nan()), "beyond the shape");
        vec![get(device, &y), get(device, &y_f32), y_relu]
    }) {
        let what = o.what(&isa);
        assert_close(&format!("y, {what}"), E::DTYPE, &got[0], &plain, |i| plain_slack[i]);
        assert_close(&format!("y in f32, {what}"), DType::F32, &got[1], &biased, |i| biased_slack[i]);
        assert_close(&format!("relu(y), {what}"), E::DTYPE, &got[2], &relu, |i| biased_slack[i]);
    }
}

fn check_residual<E: Element>(shape: (usize, usize, usize)) {
    let o = Operands::<E>::new(shape);
    let (y, slack) = o.forward(true);
    let stream = Stream::new(4, Purpose::DropoutFeedForward, 5, 6);
    for dropout in [None, Some(Dropout { p: 0.4, stream, first_row: 1000 })] {
        let factor = |i: usize| {
            let Some(d) = dropout else { return 1.0 };
            let kept = stream.word(d.first_row + (i / o.s.n) as u64, i % o.s.n) as f64
                >= d.p as f64 * 4_294_967_296.0;
            if kept { 1.0 / (1.0 - d.p as f64) } else { 0.0 }
        };
        let want: Vec<f64> =
            y.iter().enumerate().map(|(i, y)| o.residual[i] as f64 + factor(i) * y).collect();
        for (isa, got) in on_every_device(|device| {
            let (x, w, bias) = (put(device, &o.x), put(device, &o.w), put(device, &o.bias));
            let (residual, mut out) = (put(device, &o.residual), poisoned(device, o.residual.len()));
            device.linear_residual(o.s, &x, &w, Some(&bias), dropout, &residual, &mut out);
            vec![get(device, &out)]
        }) {
            let what = format!("out, {}, dropout {}", o.what(&isa), dropout.is_some());
            assert_close(&what, DType::F32, &got[0], &want, |i| {
                factor(i) * slack[i] + 4.0 * UNIT * (factor(i) * y[i]).abs()
            });
        }
    }
}

fn check_backward<E: Element>(shape: (usize, usize, usize)) {
    let o = Operands::<E>::new(shape);
    let LinearShape { m, n, k } = o.s;
    let (x, w, dy) = (widen(&o.x), widen(&o.w), widen(&o.dy));
    let (dx, dx_slack): (Vec<f64>, Vec<f64>) =
        (0..m * k).map(|at| sum(n, |j| dy[at / k * n + j] * w[j * k + at % k])).unzip();
    // The layer's input as the output of a ReLU: about half of it is not above 0.
    let masked: Vec<f64> = dx.iter().zip(&x).map(|(d, x)| if *x > 0.0 { *d } else { 0.0 }).collect();
    let (dw, dw_slack): (Vec<f64>, Vec<f64>) =
        (0..n * k).map(|at| sum(m, |i| dy[i * n + at / k] * x[i * k + at % k])).unzip();
    let (db, db_slack): (Vec<f64>, Vec<f64>) = (0..n).map(|j| sum(m, |i| dy[i * n + j])).unzip();
    let (dw_before, db_before) = (numbers::<f32>(6, n * k, 1.0), numbers::<f32>(7, n, 1.0));
    let added = |d: &[f64], before: &[f32]| -> Vec<f64> {
        d.iter().zip(before).map(|(d, b)| d + *b as f64).collect()
    };
    let (dw_added, db_added) = (added(&dw, &dw_before), added(&db, &db_before));
    for (isa, got) in on_every_device(|device| {
        let (x, w, dy) = (put(device, &o.x), put(device, &o.w), put(device, &o.dy));
        let (mut dx, mut dx_masked) = (poisoned::<f32>(device, m * k), poisoned::<E>(device, m * k));
        device.linear_backward_input(o.s, &dy, &w, None, &mut dx);
        device.linear_backward_input(o.s, &dy, &w, Some(&x), &mut dx_masked);
        let (mut dw, mut db) = (poisoned(device, n * k), poisoned(device, n));
        device.linear_backward_weight(o.s, &dy, &x, &mut dw, Some(&mut db), Store::Overwrite);
        let (mut dw_sum, mut db_sum) = (put(device, &dw_before), put(device, &db_before));
        device.linear_backward_weight(o.s, &dy, &x, &mut dw_sum, Some(&mut db_sum), Store::Accumulate);
        let mut alone = poisoned(device, n * k);
        device.linear_backward_weight(o.s, &dy, &x, &mut alone, None, Store::Overwrite);
        assert!(same_bits(&get(device, &alone), &get(device, &dw)), "dw without dbias");
        let all = (get(device, &dx), get(device, &dx_masked), get(device, &dw), get(device, &db));
        vec![all.0, all.1, all.2, all.3, get(device, &dw_sum), get(device, &db_sum)]
    }) {
        let what = o.what(&isa);
        assert_close(&format!("dx, {what}"), DType::F32, &got[0], &dx, |i| dx_slack[i]);
        assert_close(&format!("masked dx, {what}"), E::DTYPE, &got[1], &masked, |i| dx_slack[i]);
        assert_close(&format!("dw, {what}"), DType::F32, &got[2], &dw, |i| dw_slack[i]);
        assert_close(&format!("dbias, {what}"), DType::F32, &got[3], &db, |i| db_slack[i]);
        let slack = |i: usize| dw_slack[i] + UNIT * dw[i].abs();
        assert_close(&format!("dw added, {what}"), DType::F32, &got[4], &dw_added, slack);
        let slack = |i: usize| db_slack[i] + UNIT * db[i].abs();
        assert_close(&format!("dbias added, {what}"), DType::F32, &got[5], &db_added, slack);
    }
}

#[test]
fn outputs_match_the_definition() {
    for shape in SHAPES {
        check_forward::<f32>(shape);
        check_forward::<bf16>(shape);
        check_forward::<f16>(shape);
    }
}

#[test]
fn residuals_and_dropout_match_the_definition() {
    for shape in SHAPES {
        check_residual::<f32>(shape);
        check_residual::<bf16>(shape);
        check_residual::<f16>(shape);
    }
}

#[test]
fn gradients_match_the_definition() {
    for shape in SHAPES {
        check_backward::<f32>(shape);
        check_backward::<bf16>(shape);
        check_backward::<f16>(shape);
    }
}

/// On a GPU products wait for their epilogue a piece after the other, of 1,024 rows of the larger width, for which one that is
/// emulated is too slow.
#[test]
fn rows_behind_a_piece_are_those_of_a_product_alone() {
    let device = one_device();
    let n = if gpu().is_some() && !emulated() { 8192 } else { 64 };
    let (m, first) = (1030, 1024);
    // Whole numbers, whose products and sums are exact in any order.
    let small = |which, len| whole(which, len, 9).into_iter().map(|x| bf16::from_f32(x as f32 - 4.0));
    let (x, w): (Vec<bf16>, Vec<bf16>) = (small(1, m * 3).collect(), small(2, n * 3).collect());
    let (w, bias) = (put(device, &w), put(device, &numbers::<f32>(3, n, 1.0)));
    let residual: Vec<f32> = numbers(4, m * n, 1.0);
    let rows = |first: usize| {
        let s = LinearShape { m: m - first, n, k: 3 };
        let x = put(device, &x[first * 3..]);
        let mut y = poisoned::<bf16>(device, s.m * n);
        device.linear(s, &x, &w, Some(&bias), Activation::Relu, &mut y);
        let stream = Stream::new(4, Purpose::DropoutFeedForward, 5, 6);
        let dropout = Some(Dropout { p: 0.4, stream, first_row: 1000 + first as u64 });
        let (residual, mut out) = (put(device, &residual[first * n..]), poisoned(device, s.m * n));
        device.linear_residual(s, &x, &w, Some(&bias), dropout, &residual, &mut out);
        [get(device, &y), get(device, &out)]
    };
    for (all, last) in rows(0).iter().zip(rows(first)) {
        assert!(same_bits(&all[first * n..], &last));
    }
}
