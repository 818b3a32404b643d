//! Quantised folders.

use super::*;
use ferropt_device::WeightFormat;
use ferropt_device::quantise::{Codes, GROUP, Group, code_bits};
use ferropt_model::formats::{CalibrationText, Quantisation, Rounding, Tensor, quantise};
use ferropt_model::{Parameter, Rounded};
use serde_json::{Value, json};

fn matrix(source: &Source, parameter: &Parameter, format: WeightFormat) -> Rounded {
    let mut w = vec![0.0; parameter.elements()];
    source.read_rows(parameter, 0, &mut w).unwrap();
    Rounded::nearest(format, &w, parameter.shape[1], 2).unwrap()
}

/// Rounds to nearest into a new folder.
fn rounded(source: &Source, destination: &Path, format: WeightFormat, max_shard_bytes: u64) -> Source {
    let table = source.config().parameters();
    let mut asked = Vec::new();
    let mut round = |index: usize| {
        asked.push(index);
        Ok(matrix(source, &table[index], format))
    };
    let mut told = Vec::new();
    let how = Quantisation::new(format, None);
    let progress = &mut |done, all| told.push((done, all));
    let written = quantise(source, destination, &how, None, max_shard_bytes, &mut round, progress).unwrap();
    assert!(written.files.iter().all(|f| f.is_file()), "{written:?}");
    let &(done, all) = told.last().unwrap();
    assert!(done == all && told.is_sorted(), "{told:?}");
    assert_eq!(asked.last(), Some(&0), "the embeddings come last");
    let opened = open(destination);
    assert_eq!(opened.bytes(), all);
    opened
}

/// What is read is what was rounded, in one file or several, and everything else keeps its bits.
#[test]
fn quantised_folders_hold_what_was_rounded() {
    for model in MODELS {
        for (from, max) in [("hf", 1 << 30), ("mp2", 400)] {
            let source = open(fixture(&format!("{model}/{from}")));
            for format in WeightFormat::CODES {
                let dir = tempfile::tempdir().unwrap();
                let opened = rounded(&source, &dir.path().join("q"), format, max);
                assert_eq!(opened.files().len() > 2, max == 400, "{:?}", opened.files());
                assert_eq!(opened.config(), source.config());
                assert_eq!(opened.format(), Format::Quantised(format));
                let how = opened.quantisation().unwrap();
                assert_eq!((how.weights().unwrap(), how.rounding), (format, Rounding::Nearest));
                for parameter in source.config().parameters() {
                    if !parameter.is_weight() {
                        let [before, after] = [&source, &opened].map(|s| {
                            let mut values = vec![0.0; parameter.elements()];
                            s.read_rows(&parameter, 0, &mut values).unwrap();
                            let dtypes = parameter.names.iter().map(|name| s.tensor(name).unwrap().dtype());
                            (values, dtypes.collect::<Vec<_>>())
                        });
                        assert!(before == after, "{:?}", parameter.names);
                        continue;
                    }
                    let want = matrix(&source, &parameter, format);
                    let (n, count) = (parameter.shape[0], want.row_groups());
                    // All rows, and a window that begins and ends within stacked tensors.
                    for rows in [0..n, n / 4..n * 3 / 4] {
                        let mut got = Rounded {
                            codes: vec![77; rows.len() * count * GROUP],
                            groups: vec![Group { scale: half(9), min: half(9) }; rows.len() * count],
                            ..want.clone()
                        };
                        let to = Codes { codes: &mut got.codes, groups: &mut got.groups };
                        opened.read_codes(&parameter, rows.start, to).unwrap();
                        let mut values = vec![0.0; rows.len() * want.k];
                        opened.read_rows(&parameter, rows.start, &mut values).unwrap();
                        let mut row = vec![0.0; want.k];
                        for (i, values) in values.chunks(want.k).enumerate() {
                            want.row(rows.start + i, &mut row);
                            assert_eq!(values, row, "{:?}", parameter.names);
                            got.row(i, &mut row);
                            assert_eq!(values, row, "{:?}", parameter.names);
                        }
                    }
                }
                assert_eq!(verify(&opened, &mut |_, _| {}).unwrap(), Vec::<String>::new());
                let differences = compare(&source, &opened, &mut |_, _| {}).unwrap();
                assert!(differences.iter().all(|d| d.tensor.ends_with(".weight")), "{differences:?}");
            }
        }
    }
}

fn half(bits: u16) -> ferropt_device::bf16 {
    ferropt_device::bf16::from_bits(bits)
}

/// The values, from the bytes alone, as docs/formats.md describes them.
#[test]
fn the_layout_is_as_documented() {
    let dir = tempfile::tempdir().unwrap();
    for format in WeightFormat::CODES {
        let folder = dir.path().join(format.name());
        let opened = rounded(&open(fixture("pre/hf")), &folder, format, 1 << 30);
        let bytes = fs::read(folder.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let number = |bytes: &[u8]| f32::from_bits(u32::from(bytes[0]) << 16 | u32::from(bytes[1]) << 24);
        let bits = code_bits(format).unwrap();
        let mut matrices = 0;
        for (name, tensor) in opened.tensors() {
            let Tensor::Rounded(_) = tensor else { continue };
            let part = |end: &str| file.tensor(&format!("{name}.{end}"));
            let (codes, scales) = (part("codes").unwrap(), part("scales").unwrap());
            let [n, k] = tensor.shape()[..] else { panic!("{:?}", tensor.shape()) };
            assert!(k <= 64, "one group in a row");
            assert_eq!(codes.shape(), [n, (k * bits).div_ceil(8)]);
            let mut values = vec![0.0; n * k];
            tensor.read_rows(0, &mut values).unwrap();
            for i in 0..n {
                for j in 0..k {
                    let scale = number(&scales.data()[2 * i..]);
                    let row = codes.data().chunks(codes.data().len() / n).nth(i).unwrap();
                    let bit = |at: usize| (row[at / 8] >> (at % 8) & 1) as usize;
                    let code = (0..bits).map(|b| bit(j * bits + b) << b).sum::<usize>() as f32;
                    let value = match format {
                        WeightFormat::Int8 => scale * (code - 128.0),
                        _ => scale * code + number(&part("minima").unwrap().data()[2 * i..]),
                    };
                    assert_eq!(values[i * k + j], value, "{name} {i} {j}");
                }
            }
            matrices += 1;
        }
        // The embeddings, and q, k, v, out, fc1 and fc2 of two layers.
        assert_eq!(matrices, 13);
    }
}

/// A quantised folder in which things can be changed.
fn folder(format: WeightFormat) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    rounded(&open(fixture("pre/hf")), &dir.path().join("q"), format, 1 << 30);
    dir
}

fn change_config(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    fs::write(&path, json.to_string()).unwrap();
}

#[test]
fn configurations_of_other_quantisations_are_refused() {
    let cases: [(&str, Value, &[&str]); 13] = [
        ("quant_method", json!("gptq"), &["\"gptq\"", "not read here"]),
        ("quant_method", json!(null), &["unknown method"]),
        ("version", json!(2), &["version = 2", "reads 1"]),
        ("version", json!("1"), &["quantization_config is wrong"]),
        ("weights", json!("int2"), &["\"int2\"", "int8, int4 and int3"]),
        ("weights", json!("int8"), &["embed_tokens.weight.codes", "[24, 4]", "[24, 8]"]),
        ("weights", json!("int3"), &["embed_tokens.weight.codes", "[24, 4]", "[24, 3]"]),
        ("group_size", json!(32), &["group_size = 32", "64"]),
        ("rounding", json!("up"), &["up", "nearest"]),
        ("bits", json!(4), &["bits"]),
        ("files", json!({}), &["model.safetensors", "not among the files"]),
        (
            "files",
            json!({ "model.safetensors": { "bytes": 9, "crc32": "" } }),
            &["8544 bytes", "says 9", "cut short"],
        ),
        ("files", json!(null), &["quantization_config is wrong"]),
    ];
    for (key, value, parts) in cases {
        let dir = folder(WeightFormat::Int4);
        let folder = dir.path().join("q");
        change_config(&folder, |json| json["quantization_config"][key] = value.clone());
        let message = refusal(&folder);
        let named = message.contains("config.json") || message.contains(folder.to_str().unwrap());
        assert!(named && parts.iter().all(|p| message.contains(p)), "{key} = {value}: {message}");
    }
    let dir = folder(WeightFormat::Int4);
    change_config(&dir.path().join("q"), |json| {
        json["quantization_config"]["files"]["x.safetensors"] = json!({ "bytes": 1, "crc32": "" });
    });
    assert!(refusal(dir.path().join("q")).contains("x.safetensors, which is missing"));
    // Another model's configuration: the sizes do not fit.
    let dir = folder(WeightFormat::Int8);
    change_config(&dir.path().join("q"), |json| json["ffn_dim"] = json!(16));
    assert!(refusal(dir.path().join("q")).contains("fc1.weight.codes"));
    // Without a word about it, codes are no weights.
    let dir = folder(WeightFormat::Int8);
    change_config(&dir.path().join("q"), |json| json["quantization_config"] = json!(null));
    let message = refusal(dir.path().join("q"));
    assert!(message.contains("U8") && message.contains("codes"), "{message}");
}

#[test]
fn damaged_files_are_refused_or_found() {
    let name = "model.safetensors";
    for (from, to, parts) in [
        ("fc1.weight.scales", "fc1.weight.scalex", ["fc1.weight.scales", "no tensor"]),
        ("\"U8\"", "\"I8\"", ["codes", "I8"]),
        ("\"F32\"", "\"U32\"", ["embed_positions", "U32"]),
    ] {
        let dir = folder(WeightFormat::Int4);
        edit(&dir.path().join("q").join(name), from, to);
        let message = refusal(dir.path().join("q"));
        assert!(parts.iter().all(|p| message.contains(p)), "{from}: {message}");
    }
    let dir = folder(WeightFormat::Int4);
    let path = dir.path().join("q").join(name);
    let bytes = fs::read(&path).unwrap();
    for end in [0, 7, 100, bytes.len() - 1] {
        fs::write(&path, &bytes[..end]).unwrap();
        let message = refusal(dir.path().join("q"));
        assert!(message.contains(name) && message.contains(&format!("{end} bytes")), "{message}");
    }
    // Any code is a code: only the checksum tells.
    let mut flipped = bytes.clone();
    *flipped.last_mut().unwrap() ^= 1;
    fs::write(&path, &flipped).unwrap();
    let findings = verify(&open(dir.path().join("q")), &mut |_, _| {}).unwrap();
    assert!(matches!(&findings[..], [one] if one.contains("CRC-32") && one.contains(name)), "{findings:?}");
}

#[test]
fn what_cannot_be_quantised_or_converted_is_refused() {
    let dir = folder(WeightFormat::Int8);
    let opened = open(dir.path().join("q"));
    let at = |name: &str| dir.path().join(name);
    let error = convert(&opened, &at("hf"), &to(Target::Safetensors), &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("int8 in groups of 64, rounded to nearest"), "{error}");
    let how = Quantisation::new(
        WeightFormat::Int4,
        Some(CalibrationText { text: vec!["a.txt".into(), "b".into()], tokens: 5000 }),
    );
    assert_eq!(how.to_string(), "int4 in groups of 64, by GPTQ on 5000 tokens of a.txt, b");
    let refused = |source: &Source, to: &str, how: &Quantisation, max, round: &dyn Fn(usize) -> Rounded| {
        let mut round = |index| if index == 0 { anyhow::bail!("no more") } else { Ok(round(index)) };
        let error = quantise(source, &at(to), how, None, max, &mut round, &mut |_, _| {}).unwrap_err();
        format!("{error:#}")
    };
    let source = open(fixture("pre/hf"));
    let table = source.config().parameters();
    let int4 = |index: usize| matrix(&source, &table[index], WeightFormat::Int4);
    let int8 = |index: usize| matrix(&source, &table[index], WeightFormat::Int8);
    assert!(refused(&opened, "a", &how, 999, &int4).contains("quantised already"));
    assert!(refused(&source, "q", &how, 999, &int4).contains("exists already"));
    assert!(refused(&source, "a", &how, 0, &int4).contains("0 bytes"));
    let message = refused(&source, "a", &how, 999, &int8);
    assert!(message.contains("rounded to int8") && message.contains("q_proj"), "{message}");
    let message = refused(&source, "a", &how, 1 << 30, &int4);
    assert!(message.contains("was not written") && message.contains("no more"), "{message}");
    let half = Quantisation::new(WeightFormat::Bf16, None);
    assert!(refused(&source, "a", &half, 999, &int4).contains("int8, int4 and int3"));
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["q"]);
}
