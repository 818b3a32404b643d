//! Against Hugging Face's `OPTForCausalLM` and PyTorch, with the fixtures of `scripts/make_fixtures.py`: logits, loss,
//! every gradient and 20 AdamW steps, in f32 to rounding, in bf16 with no larger errors than PyTorch's own autocast, and in f16
//! with much smaller ones; and the texts that the models write greedily.
//!
//! `FERROPT_FIXTURES` names a folder of other cases made by the script.

mod fixture;
mod greedy;
mod learner;

use ferropt_device::cpu::{CpuDevice, CpuOptions, Isa};
use ferropt_device::{Chip, DType, Device, Element, PAGE, Segment, WeightFormat, bf16, f16};
use ferropt_model::{Cache, Decoder, Matrices, Memory, Recompute};
use fixture::{Fixture, all};
use learner::Learner;

/// Largest difference of a logit, f32 (rule 1 of the design).
const LOGIT: f64 = 1e-4;
/// Relative error of a gradient tensor, f32 (rule 1 of the design).
const GRADIENT: f64 = 1e-5;
/// A key bias shifts all scores of a row alike, so its gradient is zero and what is computed is rounding noise.
const NOISE: f64 = 1e-6;
/// How much larger than PyTorch's our bf16 errors may be: on average over all parameters and cases, and at most. Where
/// rounding turns a ReLU on or off for one of the two only, all gradients before it move by some percent.
const ROUGHLY: f64 = 1.4;
const AT_MOST: f64 = 3.5;

/// The processor with each instruction set that it has, or the device that `FERROPT_TEST_DEVICE` names.
fn devices() -> Vec<Chip> {
    if let Ok(name) = std::env::var("FERROPT_TEST_DEVICE") {
        let which = name.parse().expect("a device's name in FERROPT_TEST_DEVICE");
        return vec![Chip::open(which, Some(2), false).expect("the device that is to be tested")];
    }
    let open = |isa| CpuDevice::new(CpuOptions { isa: Some(isa), threads: Some(2), pin: false });
    let processor = |isa| Chip::Cpu(open(isa).expect("an available instruction set"));
    Isa::available().into_iter().map(processor).collect()
}

fn norm(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// Norm of the difference.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    norm(a.iter().zip(b).map(|(a, b)| *a as f64 - *b as f64))
}

fn norm32(values: &[f32]) -> f64 {
    norm(values.iter().map(|v| *v as f64))
}

/// Logits that take part in the loss: what stands behind padding is nobody's.
fn used<'a>(fixture: &'a Fixture, logits: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
    let vocab = fixture.config.vocab;
    let rows = fixture.targets.iter().enumerate().filter(|(_, t)| **t != ferropt_device::IGNORE);
    rows.flat_map(move |(row, _)| logits[row * vocab..(row + 1) * vocab].iter().copied())
}

#[test]
fn f32_logits_losses_and_gradients() {
    for device in devices() {
        for f in all() {
            let what = format!("{} on {}", f.name, device.describe());
            let mut learner = Learner::<f32>::new(&device, &f, Recompute::None);
            let logits = learner.logits(&device, &f);
            for (got, want) in used(&f, &logits).zip(used(&f, &f.values("logits"))) {
                assert!((got as f64 - want as f64).abs() <= LOGIT, "{what}: logit {got}, not {want}");
            }
            let loss = learner.train(&device, &f);
            let want = f.values("loss")[0] as f64;
            assert!((loss - want).abs() < 1e-6 * want, "{what}: loss {loss}, not {want}");
            for (name, got) in learner.gradients(&device) {
                let want = f.values(&format!("grad.{name}"));
                let (error, size) = (distance(&got, &want), norm32(&want));
                assert!(
                    error <= GRADIENT * size + if name.ends_with("k_proj.bias") { NOISE } else { 0.0 },
                    "{what}: gradient of {name} is off by {error:e} of {size:e}"
                );
            }
        }
    }
}

/// A fixture's model, to be read only.
fn decoder(device: &Chip, f: &Fixture, format: WeightFormat) -> Decoder<Chip> {
    let table = f.config.parameters();
    let values: Vec<Vec<f32>> =
        table.iter().map(|p| p.names.iter().flat_map(|name| f.values(name)).collect()).collect();
    let read = |index: usize, rows: std::ops::Range<usize>, out: &mut [f32]| {
        let width = table[index].elements() / table[index].shape[0];
        out.copy_from_slice(&values[index][rows.start * width..rows.end * width]);
        Ok(())
    };
    Decoder::new(device, &f.config, format, &read, Matrices::Rows).unwrap()
}

/// Logits of all rows of a fixture through the paged cache, its sequences beside each other and cut into pieces. Hidden states
/// times the embedding table are these logits, too.
fn decoded<E: Element>(device: &Chip, f: &Fixture, format: WeightFormat) -> Vec<f32> {
    let decoder = decoder(device, f, format);
    let embeddings: Vec<f32> =
        f.config.parameters()[0].names.iter().flat_map(|name| f.values(name)).collect();
    let each = f.seq.div_ceil(PAGE);
    let mut cache = Cache::<_, E>::new(device, &f.config, f.batch * each).unwrap();
    let mut memory = Memory::new(device, &f.config, f.batch * f.seq, f.batch * f.seq).unwrap();
    let pages: Vec<u32> = (0..(f.batch * each) as u32).rev().collect();
    let vocab = f.config.vocab;
    let mut all = vec![0.0; f.tokens.len() * vocab];
    for (past, end) in [(0, f.seq / 3), (f.seq / 3, f.seq / 3 + 1), (f.seq / 3 + 1, f.seq)] {
        let rows = end - past;
        let segments: Vec<Segment<'_>> =
            pages.chunks(each).map(|pages| Segment { rows, past, pages }).collect();
        let places: Vec<usize> = (0..f.batch).flat_map(|b| (past..end).map(move |t| b * f.seq + t)).collect();
        let tokens: Vec<u32> = places.iter().map(|place| f.tokens[*place]).collect();
        decoder.forward(device, &tokens, &segments, &mut cache, &mut memory).unwrap();
        let rows: Vec<u32> = (0..places.len() as u32).collect();
        let logits = decoder.head(device, &rows, &mut memory).unwrap();
        let mut row = vec![];
        for (i, place) in places.iter().enumerate() {
            logits.read(i, &mut row);
            all[place * vocab..(place + 1) * vocab].copy_from_slice(&row);
        }
        if E::DTYPE == DType::F32 {
            let hidden = decoder.hidden(device, &rows, &mut memory).unwrap();
            let width = f.config.embedding_width;
            for (hidden, place) in hidden.chunks(width).zip(&places) {
                for (embedding, logit) in embeddings.chunks(width).zip(&all[place * vocab..]) {
                    let product: f64 = hidden.iter().zip(embedding).map(|(a, b)| *a as f64 * *b as f64).sum();
                    assert!(
                        (product - *logit as f64).abs() < LOGIT / 2.0,
                        "{}: {product}, not {logit}",
                        f.name
                    );
                }
            }
        }
    }
    all
}

#[test]
fn logits_through_the_paged_cache() {
    for device in devices() {
        for f in all() {
            let what = format!("{} on {}", f.name, device.describe());
            let want: Vec<f32> = used(&f, &f.values("logits")).collect();
            let got = decoded::<f32>(&device, &f, WeightFormat::F32);
            for (got, want) in used(&f, &got).zip(&want) {
                assert!((got as f64 - *want as f64).abs() <= LOGIT, "{what}: logit {got}, not {want}");
            }
            let theirs: Vec<f32> = used(&f, &f.values("bf16.logits")).collect();
            let got: Vec<f32> = used(&f, &decoded::<bf16>(&device, &f, WeightFormat::Bf16)).collect();
            let (error, allowed) = (distance(&got, &want), ROUGHLY * distance(&theirs, &want));
            assert!(error <= allowed, "{what}: bf16 logits are off by {error:e}, allowed {allowed:e}");
        }
    }
}

#[test]
fn f32_twenty_adamw_steps() {
    for device in devices() {
        for f in all() {
            let what = format!("{} on {}", f.name, device.describe());
            let mut learner = Learner::<f32>::new(&device, &f, Recompute::None);
            let losses = f.values("loss20");
            // Relative to the first: rounding errors grow while losses shrink.
            let slack = 5e-6 * losses[0] as f64;
            for (step, want) in losses.into_iter().enumerate() {
                let loss = learner.train(&device, &f);
                assert!((loss - want as f64).abs() < slack, "{what}, step {step}: loss {loss}, not {want}");
                learner.step(&device, &f, step as u64 + 1);
            }
            let norms = f.values64("after20_norms");
            for (name, got) in learner.masters(&device) {
                let want = f.values(&format!("after20.{name}"));
                let row = f.parameter(&name);
                let (size, moved) = (norms[2 * row], norms[2 * row + 1]);
                // AdamW makes whole steps of a key bias's noise.
                let most = 20.0 * f.optimizer.lr * (got.len() as f64).sqrt();
                let slack = if name.ends_with("k_proj.bias") { most } else { 1e-2 * moved };
                let error = distance(&got[..want.len()], &want);
                assert!(error <= slack, "{what}: {name} is off by {error:e} after moving by {moved:e}");
                let got = norm32(&got);
                assert!((got - size).abs() <= slack, "{what}: {name} has norm {got}, not {size}");
            }
        }
    }
}

/// Errors against those of PyTorch's bf16, of which half may be `finer` times as large. A ReLU that flips moves some as much in any
/// type.
fn check_halves<E: Element>(finer: f64) {
    for device in devices() {
        let mut ratios = Vec::new();
        for f in all() {
            let what = format!("{} on {}", f.name, device.describe());
            let mut learner = Learner::<E>::new(&device, &f, Recompute::None);
            let exact: Vec<f32> = used(&f, &f.values("logits")).collect();
            let got: Vec<f32> = used(&f, &learner.logits(&device, &f)).collect();
            let theirs: Vec<f32> = used(&f, &f.values("bf16.logits")).collect();
            let (error, allowed) = (distance(&got, &exact), ROUGHLY / finer * distance(&theirs, &exact));
            assert!(error <= allowed, "{what}: logits are off by {error:e}, allowed {allowed:e}");
            let errors = f.values64("bf16.grad_errors");
            let exact_loss = f.values("loss20");
            for (step, theirs) in f.values("bf16.loss20").into_iter().enumerate() {
                let loss = learner.train(&device, &f);
                if step == 0 {
                    for (name, got) in learner.gradients(&device) {
                        let row = f.parameter(&name);
                        let theirs = errors[2 * row];
                        let error = distance(&got, &f.values(&format!("grad.{name}")));
                        if name.ends_with("k_proj.bias") {
                            assert!(
                                error < 1e-2 / finer,
                                "{what}: gradient of {name} is {error:e}, expected noise around 0"
                            );
                            continue;
                        }
                        ratios.push(error / theirs);
                        let allowed = AT_MOST * theirs + 1e-5;
                        assert!(
                            error <= allowed,
                            "{what}: gradient of {name} is off by {error:e}, PyTorch's by {theirs:e}"
                        );
                    }
                }
                // Small differences grow from step to step, on either side.
                let growing = if step == 0 { 1e-3 } else { 5e-3 };
                let rounding = (theirs - exact_loss[step]).abs() as f64;
                let allowed = (2.0 * rounding + growing * exact_loss[0] as f64) / finer;
                let error = (loss - exact_loss[step] as f64).abs();
                assert!(
                    error <= allowed,
                    "{what}, step {step}: loss {loss}, PyTorch {theirs}, f32 {}",
                    exact_loss[step]
                );
                learner.step(&device, &f, step as u64 + 1);
            }
        }
        let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
        ratios.sort_by(f64::total_cmp);
        let median = ratios[ratios.len() / 2];
        assert!(
            mean < ROUGHLY && median < ROUGHLY / finer,
            "{}: errors of gradients are {mean} times PyTorch's on average, {median} times in the middle",
            device.describe()
        );
    }
}

#[test]
fn bf16_is_as_exact_as_pytorch() {
    check_halves::<bf16>(1.0);
}

#[test]
fn f16_is_several_times_as_exact() {
    check_halves::<f16>(4.0);
}

#[test]
fn recomputation_changes_no_bit() {
    fn check<E: Element>(device: &Chip, f: &Fixture) {
        let run = |recompute| {
            let mut learner = Learner::<E>::with_dropout(device, f, recompute);
            let loss = learner.train(device, f);
            (loss.to_bits(), learner.gradients(device))
        };
        let kept = run(Recompute::None);
        for recompute in [Recompute::Selective, Recompute::Full] {
            assert!(run(recompute) == kept, "{}, {recompute:?}, {}", f.name, E::DTYPE);
        }
    }
    for device in devices() {
        for f in all() {
            check::<f32>(&device, &f);
            check::<bf16>(&device, &f);
            check::<f16>(&device, &f);
        }
    }
}
