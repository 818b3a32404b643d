//! Models whose LM head is a matrix of its own, against what Hugging Face's transformers computed with them.

use super::*;
use ferropt_device::cpu::{CpuDevice, CpuOptions};
use ferropt_device::quantise::Codes;
use ferropt_device::{WeightFormat, bf16};
use ferropt_model::formats::{Quantisation, quantise};
use ferropt_model::{Decoder, Matrices, Model, Rounded, Walk};
use std::ops::Range;

fn model(name: &str) -> PathBuf {
    fixture(&format!("{name}-own-head/hf"))
}

fn device() -> CpuDevice {
    CpuDevice::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap()
}

/// Texts, and the logits of each of their tokens, `[T, V]`.
fn recorded(name: &str) -> Vec<(Vec<u32>, Vec<f32>)> {
    let bytes = fs::read(model(name).join("recorded.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (tokens, logits) = (file.tensor("tokens").unwrap(), file.tensor("logits").unwrap());
    let [_, seq, vocab] = logits.shape() else { panic!("{:?}", logits.shape()) };
    let tokens = tokens
        .data()
        .chunks(4 * seq)
        .map(|row| row.chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>());
    let logits = logits
        .data()
        .chunks(4 * seq * vocab)
        .map(|rows| rows.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>());
    tokens.zip(logits).collect()
}

/// Logits of all tokens of a text, with weights in a format, which a quantised folder has already.
fn logits(source: &Source, format: WeightFormat, tokens: &[u32]) -> Vec<f32> {
    let (device, config) = (device(), source.config());
    let table = config.parameters();
    let read =
        |index: usize, rows: Range<usize>, out: &mut [f32]| source.read_rows(&table[index], rows.start, out);
    let codes =
        |index: usize, rows: Range<usize>, to: Codes<'_>| source.read_codes(&table[index], rows.start, to);
    let matrices = match source.quantisation() {
        Some(_) => Matrices::Codes(&codes),
        None => Matrices::Rows,
    };
    let decoder = Decoder::new(&device, config, format, &read, matrices).unwrap();
    match format {
        WeightFormat::F32 | WeightFormat::F16 => logits::of::<f32>(&device, &decoder, tokens),
        _ => logits::of::<bf16>(&device, &decoder, tokens),
    }
}

/// Root mean square of the differences, as a share of the numbers.
fn off(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let squares = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|x| (x as f64).powi(2)).sum::<f64>();
    let errors = squares(&mut got.iter().zip(want).map(|(a, b)| a - b));
    (errors / squares(&mut want.iter().copied())).sqrt()
}

#[test]
fn logits_are_those_of_transformers_in_every_format_of_weights() {
    for name in MODELS {
        let source = open(model(name));
        assert!(source.config().own_head, "{name}");
        for (tokens, want) in recorded(name) {
            for (format, limit) in [
                (WeightFormat::F32, 1e-5),
                (WeightFormat::F16, 0.004),
                (WeightFormat::Bf16, 0.03),
                (WeightFormat::Int8, 0.04),
                (WeightFormat::Int4, 0.3),
                (WeightFormat::Int3, 0.6),
            ] {
                let error = off(&logits(&source, format, &tokens), &want);
                println!("{name} {format:?}: {error:.2e}");
                assert!(error < limit, "{name} {format:?}: {error}");
            }
        }
    }
}

#[test]
fn they_are_converted_there_and_back() {
    for name in MODELS {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let source = open(model(name));
        write(&source, &at("straight"), &to(Target::Safetensors));
        for target in [Target::Safetensors, Target::TorchBin] {
            let options = Options { max_shard_bytes: 900, ..to(target) };
            let there = write(&source, &at(&format!("{target:?}")), &options);
            assert!(there.files().len() > 1 && there.config().own_head);
            assert_same(&source, &there);
            assert_eq!(verify(&there, &mut |_, _| {}).unwrap(), Vec::<String>::new());
            let back = at(&format!("{target:?}-back"));
            write(&there, &back, &to(Target::Safetensors));
            assert_eq!(contents(&back), contents(&at("straight")));
        }
        let target = to(Target::Metaseq { parts: None });
        let error = convert(&source, &at("metaseq"), &target, &mut |_, _| {}).unwrap_err();
        assert!(format!("{error:#}").contains("LM head is a matrix of its own"), "{error:#}");
    }
}

/// By rounding to nearest the same bits as in memory; by GPTQ the head by what reaches it.
#[test]
fn they_are_quantised_with_their_heads() {
    for name in MODELS {
        let dir = tempfile::tempdir().unwrap();
        let source = open(model(name));
        let table = source.config().parameters();
        let read = |index: usize, rows: Range<usize>, out: &mut [f32]| {
            source.read_rows(&table[index], rows.start, out)
        };
        let (format, text) = (WeightFormat::Int4, recorded(name));
        let texts: Vec<Vec<u32>> = text.iter().map(|(tokens, _)| tokens.clone()).collect();
        let nearest = |index: usize| {
            let mut w = vec![0.0; table[index].elements()];
            read(index, 0..table[index].shape[0], &mut w)?;
            Rounded::nearest(format, &w, table[index].shape[1], 1)
        };
        let (device, mut progress) = (device(), |_, _| {});
        let mut walk = Walk::new(&device, source.config(), format, &texts, 2, &read, &mut progress).unwrap();
        let how = Quantisation::new(format, None);
        let quantised = |to: &str, round: &mut dyn FnMut(usize) -> anyhow::Result<Rounded>| {
            let to = dir.path().join(to);
            quantise(&source, &to, &how, None, 1 << 30, round, &mut |_, _| {}).unwrap();
            open(to)
        };
        let (plain, gptq) =
            (quantised("nearest", &mut |i| nearest(i)), quantised("gptq", &mut |i| Ok(walk.round(i)?.0)));
        for opened in [&plain, &gptq] {
            assert_eq!(opened.config(), source.config());
            assert_eq!(opened.tensors().last().unwrap().0, "lm_head.weight");
        }
        let errors = |source: &Source| {
            text.iter().map(|(tokens, want)| off(&logits(source, format, tokens), want)).collect::<Vec<_>>()
        };
        for (tokens, _) in &text {
            assert!(logits(&source, format, tokens) == logits(&plain, format, tokens), "{name}");
        }
        let (of_plain, of_gptq) = (errors(&plain), errors(&gptq));
        println!("{name}: {of_plain:?} to nearest, {of_gptq:?} by GPTQ");
        assert!(of_gptq.iter().zip(&of_plain).all(|(gptq, plain)| gptq < plain), "{name}");
    }
}

#[test]
fn they_are_not_trained() {
    let error = Model::<_, f32>::zeros(&device(), open(model("pre")).config()).err().unwrap();
    assert!(error.to_string().contains("tie_word_embeddings = false"), "{error}");
}
