use ferropt_device::Device;

use crate::*;

#[test]
fn log_sums_and_largest_places_match_the_definition() {
    for width in [1, 7, 64, 1000, 50_272] {
        let rows = 5;
        let mut x = numbers::<f32>(width, (rows + 1) * width, 4.0);
        // The first of equal ones, and extremes.
        x[width - 1] = 40.0;
        (x[width + width / 2], x[2 * width - 1]) = (30.0, 30.0);
        x[2 * width..3 * width].fill(f32::MIN);
        x[3 * width..4 * width].fill(f32::NEG_INFINITY);
        x[4 * width - 1] = -3.0;
        let (want_lse, want_largest): (Vec<f64>, Vec<f32>) = x[..rows * width]
            .chunks(width)
            .map(|x| {
                let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = x.iter().map(|x| (*x as f64 - max as f64).exp()).sum();
                (max as f64 + sum.ln(), x.iter().position(|x| *x == max).unwrap() as f32)
            })
            .unzip();
        for (isa, got) in on_every_device(|device| {
            // One more row is there than is asked for.
            let (x, mut lse, mut largest) =
                (put(device, &x), poisoned(device, rows + 1), put(device, &[9u32; 6]));
            device.log_sum_exp(rows, width, &x, &mut lse, &mut largest);
            assert_eq!(get(device, &largest)[rows], 9.0);
            vec![get(device, &lse)[..rows].to_vec(), get(device, &largest)[..rows].to_vec()]
        }) {
            let what = format!("log-sum-exp of {width}, {isa:?}");
            assert_close(&what, DType::F32, &got[0], &want_lse, |_| 1e-6 * (1.0 + (width as f64).ln()));
            assert_eq!(got[1], want_largest, "{what}");
        }
    }
}
