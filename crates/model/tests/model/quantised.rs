//! Matrices that were rounded before: the same bits as rounding on the way in, and better ones by GPTQ.

use super::*;
use ferropt_model::{Rounded, RoundingError, Walk};
use std::ops::Range;

/// The configurations of this file, with LM heads of their own too, and a wider one whose groups of 64 are many.
fn models() -> Vec<Config> {
    let [pre, post] = configs();
    let wide = Config { width: 192, heads: 3, feed_forward: 256, embedding_width: 192, ..pre.clone() };
    let own = [pre.clone(), post.clone()].map(|config| Config { own_head: true, ..config });
    [pre, post, wide].into_iter().chain(own).collect()
}

struct Values(Vec<Parameter>, Vec<Vec<f32>>);

impl Values {
    fn new(config: &Config) -> Values {
        let table = config.parameters();
        let all = table.iter().enumerate().map(|(i, p)| values(p, i)).collect();
        Values(table, all)
    }

    fn read(&self, index: usize, rows: Range<usize>, out: &mut [f32]) -> anyhow::Result<()> {
        let width = self.0[index].elements() / self.0[index].shape[0];
        out.copy_from_slice(&self.1[index][rows.start * width..rows.end * width]);
        Ok(())
    }

    /// Every matrix, rounded by `round`.
    fn rounded(&self, mut round: impl FnMut(usize) -> Rounded) -> Vec<Option<Rounded>> {
        self.0.iter().enumerate().map(|(i, p)| p.is_weight().then(|| round(i))).collect()
    }

    fn nearest(&self, format: WeightFormat) -> Vec<Option<Rounded>> {
        self.rounded(|i| Rounded::nearest(format, &self.1[i], self.0[i].shape[1], 2).unwrap())
    }
}

/// Logits of a text, `[T, V]`, with weights in a format, or as codes.
fn logits(
    device: &CpuDevice,
    config: &Config,
    format: WeightFormat,
    codes: Option<&[Option<Rounded>]>,
    tokens: &[u32],
) -> Vec<f32> {
    let values = Values::new(config);
    let read = |index: usize, rows: Range<usize>, out: &mut [f32]| values.read(index, rows, out);
    let decoder = match codes {
        None => Decoder::new(device, config, format, &read, Matrices::Rows).unwrap(),
        Some(codes) => {
            let give = |index: usize, rows: Range<usize>, to: ferropt_device::quantise::Codes<'_>| {
                let matrix = codes[index].as_ref().unwrap();
                let count = matrix.row_groups();
                let at = rows.start * count..rows.end * count;
                to.codes.copy_from_slice(&matrix.codes[64 * at.start..64 * at.end]);
                to.groups.copy_from_slice(&matrix.groups[at]);
                Ok(())
            };
            let never = |index: usize, rows: Range<usize>, out: &mut [f32]| {
                assert!(!values.0[index].is_weight(), "a matrix of codes was read as numbers");
                values.read(index, rows, out)
            };
            Decoder::new(device, config, format, &never, Matrices::Codes(&give)).unwrap()
        }
    };
    logits::of::<bf16>(device, &decoder, tokens)
}

#[test]
fn codes_are_what_rounding_in_memory_makes() {
    let device = device();
    for config in models() {
        let tokens = ids(4, 37, 61);
        for format in WeightFormat::CODES {
            let nearest = Values::new(&config).nearest(format);
            let (codes, memory) = (
                logits(&device, &config, format, Some(&nearest), &tokens),
                logits(&device, &config, format, None, &tokens),
            );
            assert!(codes == memory, "{format:?} of {config:?}");
        }
    }
}

fn gptq(
    config: &Config,
    format: WeightFormat,
    texts: &[Vec<u32>],
    threads: usize,
) -> (Vec<Option<Rounded>>, RoundingError) {
    let options = CpuOptions { threads: Some(threads), ..CpuOptions::default() };
    let (device, values) = (CpuDevice::new(options).unwrap(), Values::new(config));
    let read = |index: usize, rows: Range<usize>, out: &mut [f32]| values.read(index, rows, out);
    let mut told = Vec::new();
    let mut progress = |done, all| told.push((done, all));
    let mut walk = Walk::new(&device, config, format, texts, threads, &read, &mut progress).unwrap();
    let mut error = RoundingError::default();
    let rounded = values.rounded(|index| {
        let (rounded, of) = walk.round(index).unwrap();
        error = error.and(of);
        rounded
    });
    let again = format!("{:#}", walk.round(0).unwrap_err());
    assert!(again.contains("asked for twice"), "{again}");
    let (done, all) = told.last().unwrap();
    assert!(done == all && told.is_sorted(), "{told:?}");
    (rounded, error)
}

/// What reaches a matrix decides how it is rounded, so other text comes out nearer to the original.
#[test]
fn gptq_changes_outputs_less_than_rounding_to_nearest() {
    let device = device();
    for config in models() {
        let texts: Vec<Vec<u32>> = (0..60).map(|i| ids(100 + i, 20 + i % 20, 61)).collect();
        let others: Vec<Vec<u32>> = (0..8).map(|i| ids(1000 + i, 30, 61)).collect();
        for format in WeightFormat::CODES {
            let (rounded, error) = gptq(&config, format, &texts, 2);
            let nearest = Values::new(&config).nearest(format);
            let changed = |codes: &[Option<Rounded>]| -> f64 {
                let squares = |tokens: &Vec<u32>| -> f64 {
                    let want = logits(&device, &config, WeightFormat::Bf16, None, tokens);
                    let got = logits(&device, &config, format, Some(codes), tokens);
                    want.iter().zip(&got).map(|(a, b)| ((a - b) as f64).powi(2)).sum()
                };
                others.iter().map(squares).sum()
            };
            let (ours, plain) = (changed(&rounded), changed(&nearest));
            println!("{format:?}, width {}: {ours:.4} and {plain:.4} to nearest, {error:?}", config.width);
            // With 8 bits what activations lose is as much.
            let limit = if format == WeightFormat::Int8 { 1.1 } else { 0.8 };
            assert!(ours < limit * plain, "{format:?}, width {}: {ours}, {plain} to nearest", config.width);
            let (changed, all) = error.outputs.unwrap();
            let few = if format == WeightFormat::Int3 { 0.03 } else { 0.01 };
            assert!(changed > 0.0 && changed < few * all, "{error:?}");
            assert!(error.weights.0 > 0.0 && error.weights.0 < 0.1 * error.weights.1, "{error:?}");
        }
    }
}

#[test]
fn threads_do_not_matter() {
    for config in models() {
        let texts: Vec<Vec<u32>> = (0..5).map(|i| ids(i, 7 + i, 61)).collect();
        let [one, two] = [1, 2].map(|threads| gptq(&config, WeightFormat::Int4, &texts, threads));
        assert!(one == two);
    }
}

#[test]
fn texts_that_no_model_can_read_are_refused() {
    let [config, _] = configs();
    let (device, values) = (device(), Values::new(&config));
    let refused = |texts: &[Vec<u32>], part: &str| {
        let read = |index: usize, rows: Range<usize>, out: &mut [f32]| values.read(index, rows, out);
        let mut progress = |_, _| {};
        let walk = Walk::new(&device, &config, WeightFormat::Int4, texts, 1, &read, &mut progress);
        let message = format!("{:#}", walk.err().unwrap());
        assert!(message.contains(part), "{message}");
    };
    refused(&[], "no text");
    refused(&[vec![]], "no text");
    refused(&[vec![1, 2], vec![61]], "61");
    refused(&[vec![1; 41]], "40 positions");
}
