//! Reading and writing the formats that OPT is found in, against files that torch and transformers wrote
//! (`scripts/make_format_fixtures.py`).

use ferropt_model::Config;
use ferropt_model::formats::{
    Dtype, Format, Options, Source, Target, compare, convert, safetensors_header, verify,
};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

#[path = "common/logits.rs"]
mod logits;
#[path = "formats/own_head.rs"]
mod own_head;
#[path = "formats/quantised.rs"]
mod quantised;

const MODELS: [&str; 2] = ["pre", "post"];

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats").join(path)
}

/// Folders of a model, each in another format.
fn folders(model: &str) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        fs::read_dir(fixture(model)).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(folders.len() >= 5, "{folders:?}");
    folders
}

fn open(path: impl AsRef<Path>) -> Source {
    Source::open(path.as_ref(), None).unwrap_or_else(|e| panic!("{}: {e:#}", path.as_ref().display()))
}

fn refusal(path: impl AsRef<Path>) -> String {
    match Source::open(path.as_ref(), None) {
        Ok(_) => panic!("{} was opened", path.as_ref().display()),
        Err(error) => format!("{error:#}"),
    }
}

fn to(target: Target) -> Options {
    Options { target, dtype: None, max_shard_bytes: 1 << 30 }
}

fn write(source: &Source, destination: &Path, options: &Options) -> Source {
    let mut told = Vec::new();
    let converted = convert(source, destination, options, &mut |done, all| told.push((done, all))).unwrap();
    let &(done, all) = told.last().unwrap();
    assert!(done == all && told.is_sorted(), "{told:?}");
    assert!(converted.files.iter().all(|f| f.is_file()) && converted.bytes > all, "{converted:?}");
    open(destination)
}

fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.map(|f| (f.file_name().unwrap().to_str().unwrap().into(), fs::read(&f).unwrap())).collect()
}

fn assert_same(a: &Source, b: &Source) {
    assert_eq!(a.config(), b.config(), "{}", b.path().display());
    let differences = compare(a, b, &mut |_, _| {}).unwrap();
    assert!(differences.is_empty(), "{} and {}: {differences:?}", a.path().display(), b.path().display());
    for ((name, a), (_, b)) in a.tensors().zip(b.tensors()) {
        assert_eq!(a.dtype(), b.dtype(), "{name}");
    }
}

/// A copy of a fixture folder in which files can be changed.
fn copy(folder: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in contents(&fixture(folder)) {
        fs::write(dir.path().join(name), content).unwrap();
    }
    dir
}

/// Replaces bytes by as many others, everywhere in a file.
fn edit(path: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let mut bytes = fs::read(path).unwrap();
    let places: Vec<usize> =
        (0..bytes.len() - from.len()).filter(|i| bytes[*i..].starts_with(from.as_bytes())).collect();
    assert!(!places.is_empty(), "{from:?} is not in {}", path.display());
    for place in places {
        bytes[place..place + to.len()].copy_from_slice(to.as_bytes());
    }
    fs::write(path, bytes).unwrap();
}

/// Threads and requests may share an open model.
#[test]
fn sources_are_shared_between_threads() {
    let source = open(fixture("pre/mp2"));
    let sum = |name: &str| {
        let tensor = source.tensor(name).unwrap();
        let mut values = vec![0.0; tensor.rows() * tensor.columns()];
        tensor.read_rows(0, &mut values).unwrap();
        values.iter().sum::<f32>()
    };
    let name = "model.decoder.layers.1.fc2.weight";
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| sum(name))).collect();
        assert!(threads.into_iter().all(|thread| thread.join().unwrap() == sum(name)));
    });
}

/// The safetensors crate, which knows nothing of OPT, finds the values that `read_rows` does.
#[test]
fn values_are_those_of_the_file() {
    let source = open(fixture("pre/hf"));
    let bytes = fs::read(fixture("pre/hf/model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for parameter in source.config().parameters() {
        let raw: Vec<u8> =
            parameter.names.iter().flat_map(|name| file.tensor(name).unwrap().data().to_vec()).collect();
        let expected: Vec<f32> = raw.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let mut all = vec![0.0; parameter.elements()];
        source.read_rows(&parameter, 0, &mut all).unwrap();
        assert_eq!(all, expected, "{:?}", parameter.names);
        // A window that begins and ends within stacked tensors.
        let columns = parameter.shape.get(1).copied().unwrap_or(1);
        let (first, last) = (parameter.shape[0] / 4, parameter.shape[0] * 3 / 4);
        let mut rows = vec![0.0; (last - first) * columns];
        source.read_rows(&parameter, first, &mut rows).unwrap();
        assert_eq!(rows, expected[first * columns..last * columns], "{:?}", parameter.names);
        let error = source.read_rows(&parameter, 1, &mut all).unwrap_err();
        assert!(error.to_string().contains("rows"), "{error}");
    }
}

/// 25.7 GB of zeros that take no room on the disk: opening must not read them.
#[test]
fn a_13b_folder_opens_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::preset("13b").unwrap();
    let tensors = config.parameters().into_iter().flat_map(|p| {
        let shape = p.part_shape();
        p.names.into_iter().map(move |name| (name, safetensors::Dtype::BF16, shape.clone()))
    });
    let header = safetensors_header(tensors).unwrap();
    fs::write(dir.path().join("model.safetensors"), &header).unwrap();
    let file = fs::File::options().write(true).open(dir.path().join("model.safetensors")).unwrap();
    if let Err(error) = file.set_len(header.len() as u64 + 2 * config.parameter_count()) {
        println!("skipped: no file of 26 GB can be made in {} ({error})", dir.path().display());
        return;
    }
    fs::write(dir.path().join("config.json"), config.hugging_face().to_string()).unwrap();
    let started = std::time::Instant::now();
    let source = open(dir.path());
    let parameters = config.parameters();
    let mut row = vec![1.0; config.width];
    source.read_rows(&parameters[parameters.len() - 3], 17, &mut row[..1]).unwrap();
    source.read_rows(&parameters[0], 50_000, &mut row).unwrap();
    assert!(row.iter().all(|x| *x == 0.0));
    // It takes milliseconds; a slow machine may be busy with other tests.
    assert!(started.elapsed().as_secs_f64() < 2.0, "{:?}", started.elapsed());
}

#[test]
fn every_format_holds_the_same_model() {
    for model in MODELS {
        let reference = open(fixture(&format!("{model}/hf")));
        assert_eq!(reference.config().post_norm, model == "post");
        for folder in folders(model) {
            let source = open(&folder);
            assert_same(&reference, &source);
            assert_eq!(verify(&source, &mut |_, _| {}).unwrap(), Vec::<String>::new());
            let name = folder.file_name().unwrap().to_str().unwrap();
            let expected = match name {
                "hf" | "sharded" => Format::Safetensors,
                "bin" => Format::TorchBin,
                "singleton" => Format::Metaseq { parts: 1, shards: 1 },
                "mp2" => Format::Metaseq { parts: 2, shards: 1 },
                "mp4" => Format::Metaseq { parts: 4, shards: 1 },
                "fsdp" => Format::Metaseq { parts: 2, shards: 3 },
                other => panic!("a folder {other}"),
            };
            assert_eq!(source.format(), expected);
        }
    }
}

#[test]
fn one_file_of_a_checkpoint_opens_all_of_it() {
    let whole = open(fixture("pre/mp2"));
    for path in ["pre/mp2/reshard-model_part-1.pt", "pre/mp2/reshard.pt", "pre/hf/model.safetensors"] {
        assert_same(&whole, &open(fixture(path)));
    }
    assert!(refusal(fixture("pre/mp2/other.pt")).contains("no file or folder"));
    assert!(refusal(fixture("pre")).contains("holds no model"));
    assert!(refusal(fixture("pre/hf/config.json")).contains("no file of a model"));
}

/// From every format to every other, and back: the same bits, and the same files as straight from the first.
#[test]
fn conversions_lose_nothing() {
    let metaseq = |parts| Target::Metaseq { parts };
    for model in MODELS {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let reference = open(fixture(&format!("{model}/hf")));
        write(&reference, &at("straight"), &to(Target::Safetensors));
        let mut targets = vec![Target::Safetensors, Target::TorchBin, metaseq(None), metaseq(Some(1))];
        targets.push(metaseq(Some(2)));
        targets.extend((model == "pre").then_some(metaseq(Some(4))));
        for (i, folder) in folders(model).iter().enumerate() {
            let source = open(folder);
            for (j, target) in targets.iter().enumerate() {
                let there = write(&source, &at(&format!("{i}-{j}")), &to(*target));
                assert_same(&reference, &there);
                assert_eq!(verify(&there, &mut |_, _| {}).unwrap(), Vec::<String>::new());
                write(&there, &at(&format!("{i}-{j}-back")), &to(Target::Safetensors));
                assert_eq!(
                    contents(&at(&format!("{i}-{j}-back"))),
                    contents(&at("straight")),
                    "{} {target:?}",
                    folder.display()
                );
            }
        }
    }
}

#[test]
fn shards_stay_below_the_limit_and_have_an_index() {
    let dir = tempfile::tempdir().unwrap();
    let source = open(fixture("pre/mp4"));
    for (target, index) in [
        (Target::Safetensors, "model.safetensors.index.json"),
        (Target::TorchBin, "pytorch_model.bin.index.json"),
    ] {
        let place = dir.path().join(index);
        let options = Options { max_shard_bytes: 2000, ..to(target) };
        let sharded = write(&source, &place, &options);
        assert_same(&source, &sharded);
        assert!(sharded.files().len() > 2, "{:?}", sharded.files());
        let json: serde_json::Value = serde_json::from_slice(&fs::read(place.join(index)).unwrap()).unwrap();
        assert_eq!(json["metadata"]["total_size"], source.bytes());
        let tensors = source.tensors().count();
        assert_eq!(json["weight_map"].as_object().unwrap().len(), tensors);
        // Saved once more as one file, as transformers does it: shards go, and the index stays.
        let whole = dir.path().join("whole").join(index);
        let one = write(&source, &whole, &to(target));
        for file in sharded.files() {
            fs::remove_file(file).unwrap();
        }
        fs::copy(&one.files()[0], place.join(one.files()[0].file_name().unwrap())).unwrap();
        assert_same(&source, &open(&place));
    }
}

#[test]
fn types_change_only_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let source = open(fixture("pre/hf"));
    for dtype in [Dtype::F16, Dtype::BF16] {
        let options = Options { dtype: Some(dtype), ..to(Target::Metaseq { parts: Some(2) }) };
        let half = write(&source, &at(dtype.name()), &options);
        assert_eq!(half.dtype(), Some(dtype));
        let differences = compare(&source, &half, &mut |_, _| {}).unwrap();
        let limit = if dtype == Dtype::F16 { 2f32.powi(-11) } else { 2f32.powi(-8) };
        // Values are below 4 or so, normally distributed.
        assert!(differences.iter().all(|d| d.largest <= 8.0 * limit), "{differences:?}");
        assert!(differences.len() > 20, "{differences:?}");
        // What fits the narrow type comes back from the wide one to the bit.
        let wide = Options { dtype: Some(Dtype::F32), ..to(Target::TorchBin) };
        let wide = write(&half, &at(&format!("{dtype}-wide")), &wide);
        assert_eq!(compare(&half, &wide, &mut |_, _| {}).unwrap(), []);
    }
    let large = copy("pre/hf");
    let path = large.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&70_000f32.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let options = Options { dtype: Some(Dtype::F16), ..to(Target::Safetensors) };
    let error = convert(&open(large.path()), &at("overflow"), &options, &mut |_, _| {}).unwrap_err();
    let message = format!("{error:#}");
    assert!(message.contains("70000") && message.contains("tensor model.decoder"), "{message}");
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_str().unwrap().contains("overflow")), "{left:?}");
}

#[test]
fn destinations_are_never_overwritten_and_parts_must_divide() {
    let dir = tempfile::tempdir().unwrap();
    let source = open(fixture("pre/hf"));
    let error = convert(&source, dir.path(), &to(Target::Safetensors), &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("exists already"), "{error}");
    let parts = to(Target::Metaseq { parts: Some(3) });
    let error = convert(&source, &dir.path().join("x"), &parts, &mut |_, _| {}).unwrap_err();
    assert!(format!("{error:#}").contains("heads = 4 does not divide by 3"), "{error:#}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn tokenizer_files_travel_under_the_names_of_the_target() {
    let dir = tempfile::tempdir().unwrap();
    let folder = copy("pre/hf");
    fs::write(folder.path().join("vocab.json"), "{}").unwrap();
    fs::write(folder.path().join("merges.txt"), "#version: 0.2\n").unwrap();
    let there = write(&open(folder.path()), &dir.path().join("m"), &to(Target::Metaseq { parts: None }));
    assert_eq!(fs::read_to_string(dir.path().join("m/gpt2-merges.txt")).unwrap(), "#version: 0.2\n");
    write(&there, &dir.path().join("back"), &to(Target::Safetensors));
    assert_eq!(fs::read_to_string(dir.path().join("back/vocab.json")).unwrap(), "{}");
}

#[test]
fn tokenizers_are_completed_for_transformers_where_nothing_says_what_comes_before_a_text() {
    let dir = tempfile::tempdir().unwrap();
    let token = |id: u32, content: &str| serde_json::json!({ "id": id, "content": content, "special": true });
    let added = [token(1, "<pad>"), token(2, "</s>"), token(3, "<unk>")];
    let given =
        serde_json::json!({ "added_tokens": added, "post_processor": null, "model": { "type": "BPE" } });
    let folder = copy("pre/hf");
    fs::write(folder.path().join("tokenizer.json"), given.to_string()).unwrap();
    let to_folder = |from: &Path, name: &str| {
        write(&open(from), &dir.path().join(name), &to(Target::Safetensors));
        let read = |file: &str| fs::read(dir.path().join(name).join(file));
        (read("tokenizer.json").unwrap(), read("tokenizer_config.json").ok())
    };
    let (tokenizer, config) = to_folder(folder.path(), "completed");
    let json = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).unwrap();
    let ready = json(&tokenizer);
    assert_eq!(ready["post_processor"]["single"][0]["SpecialToken"]["id"], "</s>");
    assert_eq!(ready["post_processor"]["special_tokens"]["</s>"]["ids"], serde_json::json!([2]));
    assert_eq!(ready["model"], given["model"]);
    let config = json(&config.unwrap());
    assert_eq!(config["eos_token"], "</s>");
    assert_eq!(config["pad_token"], "<pad>");

    // What says it itself stays as it is: what was completed, and a tokenizer with another end of texts.
    assert_eq!(to_folder(&dir.path().join("completed"), "again").0, tokenizer);
    let other = given.to_string().replace("\"id\":2", "\"id\":5");
    fs::write(folder.path().join("tokenizer.json"), &other).unwrap();
    assert_eq!(to_folder(folder.path(), "other"), (other.into_bytes(), None));
}

/// metaseq's pair says nothing of what comes before a text, and the defaults of `transformers` are GPT-2's.
#[test]
fn vocabularies_are_completed_for_transformers_where_they_are_opts() {
    let dir = tempfile::tempdir().unwrap();
    let folder = copy("pre/singleton");
    let (vocabulary, merges) = (folder.path().join("gpt2-vocab.json"), folder.path().join("gpt2-merges.txt"));
    fs::write(&merges, "#version: 0.2\n").unwrap();
    let config = |vocab: &str, name: &str| {
        fs::write(&vocabulary, vocab).unwrap();
        write(&open(folder.path()), &dir.path().join(name), &to(Target::Safetensors));
        assert_eq!(fs::read_to_string(dir.path().join(name).join("vocab.json")).unwrap(), vocab);
        let config = fs::read(dir.path().join(name).join("tokenizer_config.json")).ok()?;
        Some(serde_json::from_slice::<serde_json::Value>(&config).unwrap())
    };
    let opt = r#"{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4}"#;
    let completed = config(opt, "completed").unwrap();
    for (key, value) in [("tokenizer_class", "GPT2Tokenizer"), ("bos_token", "</s>"), ("pad_token", "<pad>")]
    {
        assert_eq!(completed[key], value);
    }
    assert_eq!(completed["add_bos_token"], true);
    assert_eq!(config(r#"{"a": 0, "<|endoftext|>": 1}"#, "other"), None);
    // What says it itself stays as it is.
    let own = r#"{"tokenizer_class": "Own"}"#;
    fs::write(folder.path().join("tokenizer_config.json"), own).unwrap();
    assert_eq!(config(opt, "own").unwrap()["tokenizer_class"], "Own");
}

#[test]
fn configurations_that_are_not_computed_are_refused_by_key() {
    for (key, value) in [
        ("activation_function", "\"gelu\""),
        ("enable_bias", "false"),
        ("layer_norm_elementwise_affine", "false"),
        ("_remove_final_layer_norm", "true"),
        ("model_type", "\"llama\""),
        ("hidden_size", "-8"),
        ("num_attention_heads", "3"),
        ("num_hidden_layers", "16777216"),
        ("num_hidden_layers", "1"),
        ("word_embed_proj_dim", "4"),
        ("dropout", "\"much\""),
    ] {
        let folder = copy("pre/hf");
        let path = folder.path().join("config.json");
        let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        json[key] = serde_json::from_str(value).unwrap();
        fs::write(&path, json.to_string()).unwrap();
        let message = refusal(folder.path());
        let named = match key {
            "hidden_size" | "model_type" | "dropout" => key,
            "num_attention_heads" => "heads = 3",
            "word_embed_proj_dim" => "project_in",
            "num_hidden_layers" if value == "1" => "tensor model.decoder.layers.1.",
            _ => key,
        };
        assert!(message.contains(named), "{key} = {value}: {message}");
        assert!(message.contains(folder.path().to_str().unwrap()), "{message}");
    }
}

#[test]
fn wrong_files_are_refused_by_file_and_tensor() {
    let part = "reshard-model_part-1.pt";
    let cases: [(&str, &str, &str, &str, &[&str]); 7] = [
        // A name that no OPT has, in one of the parts.
        ("pre/mp2", part, "layers.1.fc1.weight", "layers.1.fcX.weight", &[part, "layers.1.fc1.weight"]),
        // Something that would have been imported by Python.
        (
            "pre/mp2",
            part,
            "argparse\nNamespace",
            "builtins\nNamespace",
            &[part, "builtins.Namespace", "executed"],
        ),
        // A constructor that makes no tensor that is known.
        (
            "pre/bin",
            "pytorch_model.bin",
            "_rebuild_tensor_v2",
            "_rebuild_tensor_v9",
            &["_v9", "tensor model."],
        ),
        (
            "post/bin",
            "pytorch_model.bin",
            "BFloat16Storage",
            "BFloat64Storage",
            &["BFloat64Storage", "tensor"],
        ),
        ("pre/hf", "model.safetensors", "\"F32\"", "\"I32\"", &["model.safetensors", "I32", "tensor"]),
        ("pre/hf", "model.safetensors", ".fc2.bias", ".fc3.bias", &["fc2.bias"]),
        (
            "pre/fsdp",
            "checkpoint_last-model_part-1-shard2.pt",
            "flat_param_0",
            "flat_param_1",
            &["part-1", "flat_param_0"],
        ),
    ];
    for (folder, file, from, to, parts) in cases {
        let folder = copy(folder);
        edit(&folder.path().join(file), from, to);
        let message = refusal(folder.path());
        assert!(parts.iter().all(|p| message.contains(p)), "{from} to {to}: {message}");
    }
    // Files of two models together.
    let mixed = copy("pre/mp2");
    fs::copy(fixture("post/mp2").join(part), mixed.path().join(part)).unwrap();
    let message = refusal(mixed.path());
    assert!(message.contains(part) || message.contains("do not fit each other"), "{message}");
}

#[test]
fn cut_files_are_refused() {
    for path in ["pre/bin/pytorch_model.bin", "pre/hf/model.safetensors", "pre/mp2/reshard-model_part-0.pt"] {
        let path = Path::new(path);
        let (folder, name) = (path.parent().unwrap().to_str().unwrap(), path.file_name().unwrap());
        let bytes = fs::read(fixture(path.to_str().unwrap())).unwrap();
        for end in [0, 1, 7, 100, bytes.len() / 2, bytes.len() - 1] {
            let folder = copy(folder);
            fs::write(folder.path().join(name), &bytes[..end]).unwrap();
            let message = refusal(folder.path());
            assert!(message.contains(name.to_str().unwrap()), "{end}: {message}");
        }
    }
}

#[test]
fn pointers_of_git_lfs_are_recognised() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:6c0d\nsize 250540281\n";
    for (folder, name) in [
        ("pre/hf", "model.safetensors"),
        ("pre/bin", "pytorch_model.bin"),
        ("pre/mp2", "reshard-model_part-1.pt"),
    ] {
        let folder = copy(folder);
        fs::write(folder.path().join(name), pointer).unwrap();
        let message = refusal(folder.path());
        assert!(message.contains(name) && message.contains("git lfs pull"), "{message}");
    }
}

/// What is done in training alone keeps nobody from using a model.
#[test]
fn dropout_of_layers_and_activations_is_passed_over() {
    let folder = copy("pre/hf");
    let path = folder.path().join("config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    json["layerdrop"] = 0.1.into();
    json["activation_dropout"] = 0.1.into();
    fs::write(&path, json.to_string()).unwrap();
    assert_same(&open(fixture("pre/hf")), &open(folder.path()));
}

/// Opening a pipe would wait for a writer that never comes.
#[test]
fn pipes_are_not_waited_for() {
    for (folder, name) in [
        ("pre/hf", "config.json"),
        ("pre/sharded", "model-00002-of-00002.safetensors"),
        ("pre/mp2", "reshard-model_part-1.pt"),
    ] {
        let folder = copy(folder);
        let path = folder.path().join(name);
        fs::remove_file(&path).unwrap();
        match std::process::Command::new("mkfifo").arg(&path).status() {
            Ok(status) if status.success() => {}
            other => return println!("skipped: no pipe can be made here ({other:?})"),
        }
        let message = refusal(folder.path());
        assert!(message.contains(name) && message.contains("not a file"), "{message}");
    }
}

#[test]
fn an_lm_head_is_the_embeddings_or_is_said_to_be_another() {
    let dir = tempfile::tempdir().unwrap();
    let folder = copy("pre/hf");
    let path = folder.path().join("model.safetensors");
    let tie = |folder: &Path, tied: bool| {
        let config = folder.join("config.json");
        let mut json: serde_json::Value =
            serde_json::from_slice(&fs::read(fixture("pre/hf/config.json")).unwrap()).unwrap();
        json["tie_word_embeddings"] = tied.into();
        fs::write(&config, json.to_string()).unwrap();
    };
    // Where they are equal, that counts, and not what is said.
    tie(folder.path(), false);
    assert_same(&open(fixture("pre/hf")), &open(folder.path()));
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: BTreeMap<String, _> = file.tensors().into_iter().collect();
    let embedding = tensors["model.decoder.embed_tokens.weight"].clone();
    tensors.insert("lm_head.weight".into(), embedding.clone());
    safetensors::serialize_to_file(&tensors, None, &path).unwrap();
    assert_same(&open(fixture("pre/hf")), &open(folder.path()));
    let mut other = embedding.data().to_vec();
    other[5] ^= 1;
    let other = safetensors::tensor::TensorView::new(embedding.dtype(), embedding.shape().to_vec(), &other);
    tensors.insert("lm_head.weight".into(), other.unwrap());
    safetensors::serialize_to_file(&tensors, None, &dir.path().join("model.safetensors")).unwrap();
    tie(dir.path(), false);
    let own = open(dir.path());
    assert!(own.config().own_head);
    assert_eq!(own.tensors().last().unwrap().0, "lm_head.weight");
    let error = compare(&open(fixture("pre/hf")), &own, &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("own_head: true"), "{error}");
    tie(dir.path(), true);
    let message = refusal(dir.path());
    assert!(
        message.contains("lm_head.weight differs") && message.contains("tie_word_embeddings"),
        "{message}"
    );
    let half = &embedding.data()[..embedding.data().len() / 2];
    let half = safetensors::tensor::TensorView::new(embedding.dtype(), vec![12, 8], half);
    tensors.insert("lm_head.weight".into(), half.unwrap());
    safetensors::serialize_to_file(&tensors, None, &dir.path().join("model.safetensors")).unwrap();
    tie(dir.path(), false);
    let message = refusal(dir.path());
    assert!(message.contains("lm_head.weight has shape [12, 8]") && message.contains("[24, 8]"), "{message}");
    // The head alone, as safetensors.torch.save_model writes it.
    let alone = tempfile::tempdir().unwrap();
    let mut tied = tensors.clone();
    tied.remove("model.decoder.embed_tokens.weight");
    tied.insert("lm_head.weight".into(), embedding.clone());
    safetensors::serialize_to_file(&tied, None, &alone.path().join("model.safetensors")).unwrap();
    fs::copy(fixture("pre/hf/config.json"), alone.path().join("config.json")).unwrap();
    assert_same(&open(fixture("pre/hf")), &open(alone.path()));
    // metaseq's head, which has rows of one part only, must be those of the embeddings too.
    let folder = copy("post/singleton");
    let path = folder.path().join("restored.pt");
    let half =
        open(&path).tensor("model.decoder.embed_tokens.weight").unwrap().mapped().unwrap()[..48].to_vec();
    let mut bytes = fs::read(&path).unwrap();
    let places: Vec<usize> = (0..bytes.len() - 48).filter(|i| bytes[*i..].starts_with(&half)).collect();
    assert_eq!(places.len(), 2, "the embeddings and the head");
    bytes[places[1]] ^= 1;
    fs::write(&path, bytes).unwrap();
    let message = refusal(folder.path());
    assert!(message.contains("decoder.output_projection.weight differs"), "{message}");

    tensors.remove("lm_head.weight");
    tensors.insert("score.weight".into(), embedding.clone());
    safetensors::serialize_to_file(&tensors, None, &dir.path().join("model.safetensors")).unwrap();
    assert!(refusal(dir.path()).contains("score.weight"));
}

#[test]
fn verification_finds_what_opening_cannot() {
    // A value that is no number.
    let folder = copy("pre/hf");
    let path = folder.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, &bytes).unwrap();
    let findings = verify(&open(folder.path()), &mut |_, _| {}).unwrap();
    assert!(
        matches!(&findings[..], [one] if one.contains("NaN") && one.contains("tensor model.")),
        "{findings:?}"
    );
    let other = compare(&open(fixture("pre/hf")), &open(folder.path()), &mut |_, _| {}).unwrap();
    assert_eq!((other.len(), other[0].elements), (1, 1));
    assert!(findings[0].contains(&other[0].tensor));

    // A flipped bit in a tensor that every part has: the archive's checksum, and the other part, tell.
    let folder = copy("pre/mp2");
    let path = folder.path().join("reshard-model_part-1.pt");
    let values = open(fixture("pre/hf"));
    let norm = values.tensor("model.decoder.final_layer_norm.bias").unwrap().mapped().unwrap().to_vec();
    let mut bytes = fs::read(&path).unwrap();
    let place = bytes.windows(norm.len()).position(|w| w == norm).unwrap();
    bytes[place] ^= 1;
    fs::write(&path, bytes).unwrap();
    let findings = verify(&open(folder.path()), &mut |_, _| {}).unwrap();
    let all = findings.join("\n");
    assert_eq!(findings.len(), 2, "{all}");
    assert!(all.contains("final_layer_norm.bias of part 1") && all.contains("CRC-32 of"), "{all}");
    let error = compare(&values, &open(fixture("post/hf")), &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("different sizes"), "{error}");
}

/// A checkpoint without a configuration: from beside it, or named, or refused with what would help.
#[test]
fn heads_come_from_somewhere_or_are_asked_for() {
    let folder = copy("pre/singleton");
    edit(&folder.path().join("restored.pt"), "\x03\0\0\0cfg", "\x03\0\0\0xfg");
    let message = refusal(folder.path());
    assert!(message.contains("how many heads") && message.contains("config.json"), "{message}");
    fs::copy(fixture("pre/hf/config.json"), folder.path().join("config.json")).unwrap();
    let source = open(folder.path());
    assert!(source.config_from().ends_with("config.json"));
    let error = Source::open(folder.path(), Some("tiny")).unwrap_err();
    assert!(format!("{error:#}").contains("not those of tiny"), "{error:#}");
    assert!(Source::open(folder.path(), Some("huge")).is_err());
    assert_same(&open(fixture("pre/hf")), &source);
}

/// Only matrices count: vectors are f32 in memory, whatever they were.
#[test]
fn types_of_weights_are_those_of_matrices() {
    let folder = copy("pre/hf");
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let rounded = |names: &dyn Fn(&str) -> bool| {
        let halves = |view: &safetensors::tensor::TensorView<'_>| -> Vec<u8> {
            let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            values.flat_map(|x| half::f16::from_f32(x).to_le_bytes()).collect()
        };
        let tensors = file.tensors();
        let data: Vec<_> = tensors.iter().map(|(name, view)| names(name).then(|| halves(view))).collect();
        let views = tensors.iter().zip(&data).map(|((name, view), data)| {
            let (dtype, bytes) = match data {
                Some(data) => (safetensors::Dtype::F16, &data[..]),
                None => (view.dtype(), view.data()),
            };
            (name.clone(), safetensors::tensor::TensorView::new(dtype, view.shape().to_vec(), bytes).unwrap())
        });
        fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        let source = open(folder.path());
        (source.dtype(), source.weight_types().into_iter().collect::<Vec<_>>())
    };
    let vector = |name: &str| name.ends_with("norm.weight") || name.ends_with("bias");
    assert_eq!(rounded(&|_| true), (Some(Dtype::F16), vec![Dtype::F16]));
    assert_eq!(rounded(&|name| !vector(name)), (None, vec![Dtype::F16]));
    assert_eq!(rounded(&vector), (None, vec![Dtype::F32]));
    assert_eq!(rounded(&|name| name.contains("fc1")), (None, vec![Dtype::F32, Dtype::F16]));
}
