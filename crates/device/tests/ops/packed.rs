use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use ferropt_device::quantise::{GROUP, Group, code_bits, round_group};
use ferropt_device::{
    Activation, Chip, ChipPacked, Device, Element, Mapped, RandomWeights, WeightFormat, bf16, f16,
};

use crate::*;

/// One column and one element, partial panels and groups, whole ones, several blocks of k, many columns; and so many that with the
/// most rows there is work for all of a large GPU, which then takes another kernel.
const SHAPES: [(usize, usize); 7] =
    [(1, 1), (50, 77), (48, 64), (193, 200), (100, 2500), (1000, 128), (2200, 72)];
/// Rows: every size of tile, partial tiles, as many as go in one pass over the weights, more where k is long.
const ROWS: [usize; 9] = [1, 2, 3, 4, 5, 8, 33, 64, 420];

/// Shapes and rows to test: without the largest on a processor, which an emulated GPU is too.
fn sizes() -> (&'static [(usize, usize)], &'static [usize]) {
    match gpu() {
        None => (&SHAPES[..6], &ROWS),
        Some(_) if emulated() => (&SHAPES[..5], &ROWS[..7]),
        Some(_) => (&SHAPES, &ROWS),
    }
}

fn pack(device: &Chip, format: WeightFormat, (n, k): (usize, usize), w: &[f32]) -> ChipPacked {
    let read: Vec<AtomicBool> = (0..n).map(|_| AtomicBool::new(false)).collect();
    let packed = device
        .pack_weight(format, n, k, &|range, out| {
            for row in range.clone() {
                assert!(!read[row].swap(true, Relaxed), "row {row} is read twice");
            }
            out.copy_from_slice(&w[range.start * k..range.end * k]);
            Ok(())
        })
        .expect("a packed matrix");
    assert!(read.iter().all(|read| read.load(Relaxed)));
    packed
}

/// The matrix that products see.
fn unpacked(device: &Chip, w: &ChipPacked, (n, k): (usize, usize)) -> Vec<f32> {
    let ids: Vec<u32> = (0..n as u32).collect();
    let mut out = put(device, &vec![f32::NAN; n * k]);
    device.packed_embed(n, &put(device, &ids), w, None, &mut out);
    get(device, &out)
}

#[test]
fn rows_come_back_within_the_formats_rounding() {
    for &(n, k) in sizes().0 {
        let w: Vec<f32> = numbers(1, n * k, 0.02);
        on_every_device(|device| {
            WeightFormat::ALL
                .into_iter()
                .map(|format| {
                    let packed = pack(device, format, (n, k), &w);
                    let got = unpacked(device, &packed, (n, k));
                    for (got, w) in got.chunks(k).zip(w.chunks(k)) {
                        for (got, w) in got.chunks(64).zip(w.chunks(64)) {
                            let most = w.iter().fold(0.0f32, |m, w| m.max(w.abs()));
                            for (got, w) in got.iter().zip(w) {
                                let slack = match format {
                                    WeightFormat::F32 => 0.0,
                                    // Below the smallest normal number all have the same distance.
                                    WeightFormat::F16 => w.abs().max(f32::powi(2.0, -14)) / 2048.0,
                                    WeightFormat::Bf16 => w.abs() / 256.0,
                                    WeightFormat::Int8 => 0.51 * most / 127.0,
                                    // Half a step, and what may be cut off at the ends.
                                    WeightFormat::Int4 => 0.51 * most * 2.0 / 15.0 + 0.2 * most,
                                    WeightFormat::Int3 => 0.51 * most * 2.0 / 7.0 + 0.3 * most,
                                };
                                assert!((got - w).abs() <= slack, "{format:?} {n}x{k}: {got}, not {w}");
                            }
                        }
                    }
                    got
                })
                .collect()
        });
    }
}

fn check<E: Element>(format: WeightFormat) {
    let (shapes, rows) = sizes();
    for &(n, k) in shapes {
        for m in [1, 2, 5, 33, 420].into_iter().filter(|m| m <= rows.last().unwrap()) {
            let (x, w): (Vec<E>, Vec<f32>) = (numbers(1, m * k, 1.0), numbers(2, n * k, 0.02));
            let (bias, residual): (Vec<f32>, Vec<f32>) = (numbers(3, n, 1.0), numbers(4, m * n, 1.0));
            let outputs = on_every_device(|device| {
                let packed = pack(device, format, (n, k), &w);
                let (x, bias) = (put(device, &x), put(device, &bias));
                let mut y = put(device, &vec![f32::NAN; m * n]);
                device.packed_linear(m, &x, &packed, Some(&bias), Activation::Relu, &mut y);
                let mut low = put(device, &vec![bf16::NAN; m * n]);
                device.packed_linear(m, &x, &packed, Some(&bias), Activation::Relu, &mut low);
                let (low, y) = (get(device, &low), get(device, &y));
                for (low, y) in low.iter().zip(&y) {
                    assert_eq!(*low, bf16::from_f32(*y).to_f32());
                }
                let mut sum = put(device, &vec![f32::NAN; m * n]);
                let residual = put(device, &residual);
                device.packed_linear_residual(m, &x, &packed, Some(&bias), &residual, &mut sum);
                vec![y, get(device, &sum), unpacked(device, &packed, (n, k))]
            });
            for (isa, out) in outputs {
                let seen = &out[2];
                for i in (0..m).step_by(1 + m / 5) {
                    for j in (0..n).step_by(1 + n / 30) {
                        let (mut exact, mut squares, mut sizes) = (0.0f64, 0.0f64, 0.0f64);
                        for l in 0..k {
                            let (x, w) = (x[i * k + l].to_f32() as f64, seen[j * k + l] as f64);
                            exact += x * w;
                            squares += w * w;
                            sizes += (x * w).abs();
                        }
                        // Activations of deviation 1, of which the largest of a group is hardly above 4.5, are
                        // rounded to steps of that by 127; errors of six deviations, and what f32 loses.
                        let rounding = match format {
                            WeightFormat::Int8 | WeightFormat::Int4 | WeightFormat::Int3 => {
                                6.0 * squares.sqrt() * 4.5 / 127.0 / 12f64.sqrt()
                            }
                            // f32 activations are multiplied with pairs as bf16.
                            WeightFormat::Bf16 if size_of::<E>() == 4 => sizes / 256.0,
                            _ => 0.0,
                        };
                        let slack = rounding + 1e-6 * (4.0 + sizes);
                        let want = (exact + bias[j] as f64).max(0.0);
                        let got = out[0][i * n + j] as f64;
                        assert!(
                            (got - want).abs() <= slack,
                            "{isa:?} {format:?} {m}x{n}x{k}: {got}, not {want}"
                        );
                        let want = exact + bias[j] as f64 + residual[i * n + j] as f64;
                        let got = out[1][i * n + j] as f64;
                        assert!(
                            (got - want).abs() <= slack,
                            "{isa:?} {format:?} {m}x{n}x{k}: {got}, not {want}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn products_match_the_definition() {
    for format in WeightFormat::ALL {
        check::<f32>(format);
        check::<bf16>(format);
    }
}

/// Numbers that are halves are multiplied as what they are.
#[test]
fn products_with_halves_have_the_bits_of_products_with_f32() {
    let (shapes, rows) = sizes();
    for &(n, k) in shapes {
        let halves: Vec<f16> = numbers(2, n * k, 0.02);
        let mut w: Vec<f32> = halves.iter().map(|w| w.to_f32()).collect();
        // The largest and the smallest of all, among them what is no normal number.
        for (w, bits) in w.iter_mut().zip([0x7bff, 0x0001, 0x83ff, 0x0400, 0x8000]) {
            *w = f16::from_bits(bits).to_f32();
        }
        on_every_device(|device| {
            let [half, full] = [WeightFormat::F16, WeightFormat::F32].map(|f| pack(device, f, (n, k), &w));
            assert!(same_bits(&unpacked(device, &half, (n, k)), &w));
            let mut all = vec![];
            for &m in rows {
                let x = put(device, &numbers::<f32>(1, m * k, 1.0));
                let product = |w: &ChipPacked| {
                    let mut y = put(device, &vec![f32::NAN; m * n]);
                    device.packed_linear(m, &x, w, None, Activation::Identity, &mut y);
                    get(device, &y)
                };
                all.push(product(&half));
                assert!(same_bits(&all[all.len() - 1], &product(&full)), "{m}x{n}x{k}");
            }
            all
        });
    }
}

#[test]
fn numbers_beyond_f16_are_refused() {
    let device = one_device();
    let pack = |largest: f32| {
        device.pack_weight(WeightFormat::F16, 3, 8, &|_, rows| {
            rows.fill(largest);
            Ok(())
        })
    };
    assert!(pack(-65_519.0).is_ok());
    let refused = pack(-65_520.0).err().unwrap().to_string();
    assert!(refused.contains("-65520") && refused.contains("65504") && refused.contains("bf16"), "{refused}");
}

/// Groups of codes would make finite numbers of them, and nobody would hear of it.
#[test]
fn numbers_that_are_none_are_not_rounded_to_codes() {
    let device = one_device();
    for format in WeightFormat::ALL {
        let pack = |wrong: f32| {
            device.pack_weight(format, 70, 80, &|range, rows| {
                rows.fill(0.5);
                if range.contains(&66) {
                    rows[(66 - range.start) * 80 + 7] = wrong;
                }
                Ok(())
            })
        };
        let codes = matches!(format, WeightFormat::Int8 | WeightFormat::Int4 | WeightFormat::Int3);
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            match pack(wrong).err().map(|error| error.to_string()) {
                Some(told) => assert!(codes && told.contains("row 66, column 7"), "{told}"),
                None => assert!(!codes, "{} takes {wrong}", format.name()),
            }
        }
        assert!(pack(1.5).is_ok());
    }
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    let (shapes, rows) = sizes();
    let most = *rows.last().unwrap();
    for &(n, k) in shapes {
        let (x, w): (Vec<bf16>, Vec<f32>) = (numbers(1, most * k, 1.0), numbers(2, n * k, 0.02));
        for format in WeightFormat::ALL {
            on_every_device(|device| {
                let packed = pack(device, format, (n, k), &w);
                let product = |x: &[bf16]| {
                    let m = x.len() / k;
                    let mut y = put(device, &vec![f32::NAN; m * n]);
                    device.packed_linear(m, &put(device, x), &packed, None, Activation::Identity, &mut y);
                    get(device, &y)
                };
                let all = product(&x);
                for &m in &rows[..rows.len() - 1] {
                    for first in [0, most - m, (most - m) / 2] {
                        let some = product(&x[first * k..(first + m) * k]);
                        assert!(
                            same_bits(&some, &all[first * n..(first + m) * n]),
                            "{format:?} {n}x{k}: rows {first}.. differ when {m} are multiplied"
                        );
                    }
                }
                vec![all]
            });
        }
    }
}

#[test]
fn embeddings_are_rows_and_sums_of_rows() {
    let (n, k) = (90, 130);
    let (w, table): (Vec<f32>, Vec<f32>) = (numbers(1, n * k, 1.0), numbers(2, 7 * k, 1.0));
    let (ids, ids2) = (whole(1, 20, n), whole(2, 20, 7));
    for (_, out) in on_every_device(|device| {
        let packed = pack(device, WeightFormat::F32, (n, k), &w);
        let mut out = put(device, &vec![f32::NAN; 20 * k]);
        let (table, ids2) = (put(device, &table), put(device, &ids2));
        device.packed_embed(20, &put(device, &ids), &packed, Some((&ids2, &table)), &mut out);
        vec![get(device, &out)]
    }) {
        for (i, got) in out[0].chunks(k).enumerate() {
            let (a, b) = (&w[ids[i] as usize * k..][..k], &table[ids2[i] as usize * k..][..k]);
            assert!(got.iter().zip(a.iter().zip(b)).all(|(got, (a, b))| *got == a + b));
        }
    }
}

#[test]
fn codes_are_packed_as_rounding_would() {
    let device = one_device();
    for &(n, k) in sizes().0 {
        let w: Vec<f32> = numbers(1, n * k, 0.02);
        for format in WeightFormat::CODES {
            let packed = device
                .pack_codes(format, n, k, &mut |range, out| {
                    let count = k.div_ceil(GROUP);
                    for (i, row) in range.enumerate() {
                        for (g, w) in w[row * k..(row + 1) * k].chunks(GROUP).enumerate() {
                            let at = i * count + g;
                            let codes = (&mut out.codes[at * GROUP..][..GROUP]).try_into().unwrap();
                            out.groups[at] = round_group(format, w, codes);
                        }
                    }
                    Ok(())
                })
                .unwrap();
            let rounded = pack(device, format, (n, k), &w);
            assert!(same_bits(&unpacked(device, &packed, (n, k)), &unpacked(device, &rounded, (n, k))));
        }
    }
    let refused = |format, code| {
        let packed = device.pack_codes(format, 3, 64, &mut |_, out| {
            out.codes[70] = code;
            Ok(())
        });
        packed.err().unwrap().to_string()
    };
    let too_large = refused(WeightFormat::Int4, 16);
    assert!(too_large.contains("row 1") && too_large.contains("16"), "{too_large}");
    assert!(
        refused(WeightFormat::Int3, 8).contains("code 8")
            && refused(WeightFormat::F32, 0).contains("no codes")
    );
}

/// Element (row, column) of a random matrix, out of its word: evenly distributed numbers have a deviation of their range by the
/// root of 12.
fn random_element(format: WeightFormat, std: f32, word: u32) -> f32 {
    let range = 12f32.sqrt() * std;
    let Some(bits) = code_bits(format) else {
        let number = (word as i32) as f32 * (range / 4_294_967_296.0);
        return match format {
            WeightFormat::F16 => f16::from_f32(number).to_f32(),
            WeightFormat::Bf16 => bf16::from_f32(number).to_f32(),
            _ => number,
        };
    };
    let codes = (1 << bits) as f32;
    let scale = bf16::from_f32(range / codes);
    let min = bf16::from_f32(-scale.to_f32() * (codes - 1.0) / 2.0);
    Group { scale, min }.value(format, (word >> (32 - bits)) as u8)
}

#[test]
fn random_matrices_are_the_same_on_every_device() {
    const STD: f32 = 0.02;
    let random = |seed| RandomWeights { stream: Stream::new(seed, Purpose::Weights, 5, 0), std: STD };
    for &(n, k) in sizes().0 {
        for format in WeightFormat::ALL {
            let outputs = on_every_device(|device| {
                let [packed, other] = [7, 8]
                    .map(|seed| device.pack_random(format, n, k, random(seed)).expect("a random matrix"));
                assert_eq!(device.packed_bytes(&packed), device.packed_size(format, n, k));
                [packed, other].iter().map(|w| unpacked(device, w, (n, k))).collect()
            });
            let stream = random(7).stream;
            let words = (0..n as u64).flat_map(|row| (0..k).map(move |column| stream.word(row, column)));
            let want: Vec<f32> = words.map(|word| random_element(format, STD, word)).collect();
            for (isa, got) in outputs {
                assert!(same_bits(&got[0], &want), "{isa:?} {format:?} {n}x{k}");
                assert!(n * k == 1 || got[1] != want, "{isa:?} {format:?} {n}x{k}: another seed");
            }
            if n * k > 10_000 {
                let squares: f64 = want.iter().map(|w| (*w as f64).powi(2)).sum();
                let std = (squares / want.len() as f64).sqrt() / STD as f64;
                assert!((std - 1.0).abs() < 0.02, "{format:?} {n}x{k}: {std} times the deviation");
            }
        }
    }
    let empty = one_device().pack_random(WeightFormat::Int4, 0, 64, random(7));
    assert!(empty.err().unwrap().to_string().contains("0 x 64"));
}

#[test]
fn failing_readers_and_empty_matrices_are_refused() {
    let device = one_device();
    let broken = device.pack_weight(WeightFormat::Int4, 100, 64, &|_, _| anyhow::bail!("the file ends"));
    assert_eq!(broken.err().unwrap().to_string(), "the file ends");
    let empty = device.pack_weight(WeightFormat::F32, 0, 64, &|_, _| Ok(()));
    assert!(empty.err().unwrap().to_string().contains("0 x 64"));
}

#[test]
fn what_was_written_is_used_where_it_lies() {
    let file = tempfile::tempfile().unwrap();
    for &(n, k) in sizes().0 {
        let (x, w): (Vec<bf16>, Vec<f32>) = (numbers(1, 5 * k, 1.0), numbers(2, n * k, 0.02));
        for format in WeightFormat::ALL {
            on_every_device(|device| {
                let size = device.packed_size(format, n, k);
                let written = Mutex::new(vec![0xaa; size]);
                let read = |range: std::ops::Range<usize>, out: &mut [f32]| {
                    out.copy_from_slice(&w[range.start * k..range.end * k]);
                    Ok(())
                };
                let write = |at: usize, bytes: &[u8]| {
                    written.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
                    Ok(())
                };
                device.pack_weight_to(format, n, k, &read, &write).unwrap();
                file.set_len(0).unwrap();
                file.write_all_at(&written.into_inner().unwrap(), 64).unwrap();
                let mapped = Mapped::open(&file).unwrap();
                let part = |range| device.packed_from(format, n, k, mapped.part(range).unwrap());
                let (there, here) = (part(64..64 + size).unwrap(), pack(device, format, (n, k), &w));
                assert_eq!((device.packed_bytes(&there), device.packed_bytes(&here)), (size, size));
                let product = |w: &ChipPacked| {
                    let mut y = put(device, &vec![f32::NAN; 5 * n]);
                    device.packed_linear(5, &put(device, &x), w, None, Activation::Identity, &mut y);
                    get(device, &y)
                };
                let all = vec![product(&there), unpacked(device, &there, (n, k))];
                assert!(same_bits(&all[0], &product(&here)), "{format:?} {n}x{k}");
                assert!(same_bits(&all[1], &unpacked(device, &here, (n, k))), "{format:?} {n}x{k}");
                let short = part(64..60 + size).err().unwrap().to_string();
                assert!(short.contains(&size.to_string()), "{short}");
                assert!(part(62..62 + size).err().unwrap().to_string().contains("cannot be used"));
                assert!(mapped.part(64..65 + size).is_none());
                all
            });
        }
    }
}

#[test]
fn failing_writers_are_heard() {
    let device = one_device();
    let read = |_: std::ops::Range<usize>, rows: &mut [f32]| {
        rows.fill(0.5);
        Ok(())
    };
    let full = device.pack_weight_to(WeightFormat::Int8, 1000, 64, &read, &|at, _| {
        anyhow::ensure!(at < 5000, "the disk is full");
        Ok(())
    });
    assert_eq!(full.unwrap_err().to_string(), "the disk is full");
}
