//! `ferropt checkpoint` on a run that this test trains, and on files that torch wrote.

mod lab;

use lab::{Lab, ferropt, text};
use safetensors::{SafeTensors, tensor::TensorView};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

fn checkpoint(args: &[&str]) -> Output {
    ferropt().arg("checkpoint").args(args).output().unwrap()
}

fn ok(args: &[&str]) -> String {
    let out = checkpoint(args);
    assert!(out.status.success(), "{args:?}: {}", text(&out));
    String::from_utf8(out.stdout).unwrap()
}

fn fails(args: &[&str], parts: &[&str]) {
    let out = checkpoint(args);
    let text = text(&out);
    assert!(!out.status.success() && !text.contains("panicked"), "{args:?}: {text}");
    assert!(parts.iter().all(|part| text.contains(part)), "{args:?}: {text} should have {parts:?}");
}

fn fixture(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/formats");
    root.join(path).display().to_string()
}

/// A folder of Hugging Face's is found by its name, laid out as their tools lay out what they download.
#[test]
fn a_downloaded_model_is_found_by_its_name() {
    let lab = Lab::new();
    lab.train(&lab.config("run", 10), &[]);
    let hf = lab.path("hf");
    ok(&["convert", &lab.path("run").display().to_string(), &hf.display().to_string(), "--to", "hf"]);
    let model = lab.path("hub/models--someone--opt-tiny");
    let (snapshot, blobs) = (model.join("snapshots/27dcfa74"), model.join("blobs"));
    for folder in [&snapshot, &blobs, &model.join("refs")] {
        std::fs::create_dir_all(folder).unwrap();
    }
    std::fs::write(model.join("refs/main"), "27dcfa74").unwrap();
    for (i, file) in std::fs::read_dir(&hf).unwrap().enumerate() {
        let file = file.unwrap();
        std::fs::rename(file.path(), blobs.join(i.to_string())).unwrap();
        let target = Path::new("../../blobs").join(i.to_string());
        std::os::unix::fs::symlink(target, snapshot.join(file.file_name())).unwrap();
    }
    let generate = |model: &str, variable: &str, folder: &str| {
        let args = ["generate", "--model", model, "--greedy", "--max-tokens", "8", "x"];
        ferropt().args(args).env_remove("HF_HUB_CACHE").env(variable, lab.path(folder)).output().unwrap()
    };
    let whole = generate(&lab.path("run").display().to_string(), "HF_HUB_CACHE", "hub");
    assert!(whole.status.success(), "{}", text(&whole));
    for (variable, folder) in [("HF_HUB_CACHE", "hub"), ("HF_HOME", "")] {
        let named = generate("someone/opt-tiny", variable, folder);
        assert!(named.status.success() && named.stdout == whole.stdout, "{}", text(&named));
    }
    // What names a model names its tokenizer too.
    let (run, hub) = (lab.path("run").display().to_string(), lab.path("hub"));
    let beside = |args: &[&str]| {
        let out = ferropt().args(args).env("HF_HUB_CACHE", &hub).output().unwrap();
        assert!(out.status.success(), "{args:?}: {}", text(&out));
        out.stdout
    };
    let name = "someone/opt-tiny";
    let args = ["generate", "--model", &run, "--tokenizer", name, "--greedy", "--max-tokens", "8", "x"];
    assert_eq!(beside(&args), whole.stdout);
    let small = lab.path("int8").display().to_string();
    beside(&["checkpoint", "quantize", &run, &small, "--weights", "int8", "--tokenizer", name]);
    let config = lab.config("again", 1).display().to_string();
    let set = format!("data.tokenizer=\"{name}\"");
    let dry = ["train", &config, "--set", &set, "--dry-run"];
    let said = ferropt().args(dry).env("HF_HUB_CACHE", &hub).output().unwrap();
    assert!(said.status.success() && !text(&said).contains("data.tokenizer is not there"), "{}", text(&said));
    beside(&["train", &config, "--set", &set]);

    let missing = generate("someone/opt-large", "HF_HUB_CACHE", "hub");
    assert!(!missing.status.success() && text(&missing).contains("hf download someone/opt-large"));
}

/// A run goes to every format and back, and generates the same text from its own folder before and after.
#[test]
fn a_run_leaves_in_every_format() {
    let lab = Lab::new();
    lab.train(&lab.config("run", 10), &[]);
    let at = |name: &str| lab.path(name).display().to_string();
    let run = at("run");
    let shown = ok(&["inspect", &run]);
    for part in
        ["step        10", "Hugging Face, safetensors", "2 layers, 2 heads, width 32", "tokenizer.json"]
    {
        assert!(shown.contains(part), "{shown}");
    }
    let json: serde_json::Value = serde_json::from_str(&ok(&["inspect", &run, "--json"])).unwrap();
    assert_eq!((&json["step"], &json["config"]["width"]), (&10.into(), &32.into()));
    let table = ok(&["inspect", &run, "--checkpoint", "5", "--tensors"]);
    assert!(table.contains("step        5") && table.contains("[260, 32]"), "{table}");

    ok(&["convert", &run, &at("hf"), "--to", "hf"]);
    ok(&["convert", &at("hf"), &at("parts"), "--to", "metaseq", "--parts", "2"]);
    ok(&["convert", &at("parts"), &at("one"), "--to", "metaseq"]);
    fails(&["convert", &at("hf"), &at("x"), "--to", "metaseq", "--max-shard-size", "1GB"], &["--parts"]);
    ok(&["convert", &at("one"), &at("bin"), "--to", "hf-bin", "--max-shard-size", "40KB"]);
    ok(&["convert", &at("bin"), &at("back"), "--to", "hf"]);
    for name in ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"] {
        let read = |folder: &str| std::fs::read(PathBuf::from(at(folder)).join(name)).unwrap();
        assert!(read("hf") == read("back"), "{name} is not what it was");
    }
    for name in ["hf", "parts", "one", "bin"] {
        assert!(ok(&["verify", &at(name)]).contains("is sound"));
        assert!(ok(&["verify", &run, &at(name)]).contains("the same values"));
    }
    assert!(ok(&["verify", &run]).contains("is sound"));
    fails(&["verify", &at("hf"), &run, "--checkpoint", "5"], &["no run folder"]);
    fails(&["convert", &run, &at("hf"), "--to", "hf"], &["hf", "exists already"]);
    ok(&["convert", &run, &at("earlier"), "--to", "hf", "--checkpoint", "5"]);
    fails(&["verify", &at("hf"), &at("earlier")], &["tensors differ", "embed_tokens.weight", "8,320"]);

    // Halves lose bits as bf16, which is said unless it was asked for, and none as f16.
    ok(&["convert", &at("hf"), &at("halves"), "--to", "hf", "--dtype", "f16"]);
    for (model, weights, told) in [
        ("halves", &[][..], true),
        ("halves", &["--weights", "f32"], false),
        ("halves", &["--weights", "f16"], false),
        ("halves", &["--weights", "bf16"], false),
        ("hf", &[], false),
    ] {
        let model = at(model);
        let args = [&["generate", "--model", &model, "--max-tokens", "1", "x"], weights].concat();
        let out = ferropt().args(&args).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        let notes = said.matches("`--weights f16` keeps all").count();
        assert!(out.status.success() && notes == usize::from(told), "{args:?}: {said}");
    }
    let scored = |weights: &str| {
        let args = ["score", "--model", &at("halves"), "--weights", weights, &at("held-out.txt")];
        let out = ferropt().args(args).output().unwrap();
        assert!(out.status.success(), "{}", text(&out));
        String::from_utf8(out.stdout).unwrap()
    };
    assert_eq!(scored("f16"), scored("f32"));
    assert_ne!(scored("bf16"), scored("f32"));

    // Damage that no size tells: converting and verifying read the bytes, and name the file. Like everywhere, the newest
    // whole checkpoint is taken unless a step is named.
    let file = lab.path("run/checkpoints/step-00000010/model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let end = bytes.len();
    bytes[end - 1] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let out = checkpoint(&["convert", &run, &at("whole"), "--to", "hf"]);
    for part in ["passed over", "step 5", "step-00000010/model.safetensors", "CRC-32C"] {
        assert!(out.status.success() && text(&out).contains(part), "{}", text(&out));
    }
    assert!(ok(&["verify", &at("whole"), &at("earlier")]).contains("the same values"));
    let named = ["convert", &run, &at("damaged"), "--to", "hf", "--checkpoint", "10"];
    fails(&named, &["step-00000010/model.safetensors", "CRC-32C"]);
    fails(&["verify", &run], &["step-00000010/model.safetensors", "CRC-32C", "not sound"]);
    // Damage that the size tells: the older checkpoint is taken, and said to be.
    std::fs::write(&file, "short").unwrap();
    let out = checkpoint(&["inspect", &run]);
    assert!(text(&out).contains("passed over") && text(&out).contains("step        5"), "{}", text(&out));
    fails(&["verify", &run], &["step-00000010/model.safetensors", "not sound"]);
    // A checkpoint on a disk that is not there.
    let newest = file.parent().unwrap();
    std::fs::remove_dir_all(newest).unwrap();
    std::os::unix::fs::symlink(lab.path("gone"), newest).unwrap();
    let out = checkpoint(&["inspect", &run]);
    assert!(text(&out).contains("passed over") && text(&out).contains("step        5"), "{}", text(&out));
    fails(&["inspect", &run, "--checkpoint", "77"], &["step 77"]);
}

/// A run in 8, 4 and 3 bits: what the folders say and hold, and that they compute what rounding in memory does, to the bit.
#[test]
fn a_run_is_quantised() {
    let lab = Lab::new();
    lab.train(&lab.config("run", 20), &[]);
    let at = |name: &str| lab.path(name).display().to_string();
    let (run, texts, held_out) = (at("run"), at("texts"), at("held-out.txt"));
    let scores = |model: &str, more: &[&str]| -> (String, f64) {
        let out = ferropt().args(["score", "--model", model, &held_out]).args(more).output().unwrap();
        assert!(out.status.success(), "{}", text(&out));
        let said = String::from_utf8(out.stderr).unwrap();
        let number = said.split("perplexity ").nth(1).and_then(|rest| rest.split(',').next());
        (String::from_utf8(out.stdout).unwrap(), number.unwrap_or_else(|| panic!("{said}")).parse().unwrap())
    };
    for weights in ["int8", "int4", "int3"] {
        let folder = at(weights);
        let said = ok(&["quantize", &run, &folder, "--weights", weights]);
        for part in [weights, "rounded to nearest", "q_proj, k_proj, v_proj", "embed_tokens", " %"] {
            assert!(said.contains(part), "{said}");
        }
        assert!(scores(&folder, &[]) == scores(&run, &["--weights", weights]), "{weights} has other bits");
        assert!(ok(&["verify", &folder]).contains("is sound"));
        let shown = ok(&["inspect", &folder, "--tensors"]);
        assert!(shown.contains(&format!("13 of {weights}")) && shown.contains("tokenizer.json"), "{shown}");
        let out = ferropt().args(["generate", "--model", &folder, "The cat"]).output().unwrap();
        assert!(out.status.success(), "{}", text(&out));
    }
    // By text, into several files, and told to programs.
    let folder = at("gptq");
    let words =
        ["quantize", &run, &folder, "--weights", "int4", "--calibrate", &texts, "--tokens", "2000", "--json"];
    let said = ok(&[&words[..], &["--max-shard-size", "20KB"]].concat());
    let json: serde_json::Value = serde_json::from_str(&said).unwrap();
    let how = &json["quantization_config"];
    assert_eq!((&how["rounding"], &how["calibration"]["tokens"]), (&"gptq".into(), &2000.into()), "{json}");
    for kind in ["q_proj, k_proj, v_proj", "out_proj", "fc1", "fc2", "embed_tokens"] {
        let error = &json["errors"][kind];
        assert!(error["outputs"].as_f64().unwrap() < error["numbers"].as_f64().unwrap(), "{kind}: {error}");
    }
    assert!(
        json["bytes"].as_u64() < json["source_bytes"].as_u64() && json["files"].as_array().unwrap().len() > 4
    );
    let shown = ok(&["inspect", &folder]);
    assert!(shown.contains("by GPTQ on 2000 tokens of") && shown.contains(&texts), "{shown}");
    let (original, quantised) = (scores(&run, &[]).1, scores(&folder, &[]).1);
    assert!((quantised / original - 1.0).abs() < 0.05, "perplexity {quantised}, {original} before");

    let out = ferropt().args(["generate", "--model", &folder, "--weights", "bf16", "x"]).output().unwrap();
    let said = text(&out);
    assert!(
        !out.status.success() && said.contains("cannot be bf16 again") && said.contains("GPTQ"),
        "{said}"
    );
    fails(&["convert", &folder, &at("back"), "--to", "hf"], &["quantised", "made from"]);
    fails(&["quantize", &folder, &at("again"), "--weights", "int8"], &["quantised already"]);
    fails(&["quantize", &run, &folder, "--weights", "int8"], &["gptq", "exists already"]);
    let (out, nowhere) = (at("out"), at("nowhere.txt"));
    let quantize = |more: &[&str], parts: &[&str]| {
        fails(&[&["quantize", &run, &out, "--weights", "int4"], more].concat(), parts);
    };
    quantize(&["--method", "gptq"], &["--calibrate"]);
    quantize(&["--method", "nearest", "--calibrate", &texts], &["looks at no text"]);
    quantize(&["--tokens", "9"], &["--calibrate"]);
    quantize(&["--text-field", "body"], &["--calibrate"]);
    let bodies = at("bodies.jsonl");
    std::fs::write(&bodies, "{\"body\": \"The cat sat on the mat.\", \"id\": 1}\n".repeat(9)).unwrap();
    quantize(&["--calibrate", &bodies], &["bodies.jsonl", "line 1", "`text`", "body, id", "--text-field"]);
    quantize(&["--calibrate", &texts, "--tokens", "0"], &["2 at least"]);
    quantize(&["--calibrate", &nowhere], &["nowhere.txt"]);
    quantize(&["--calibrate", &texts, "--tokenizer", &nowhere], &["nowhere.txt"]);
    fails(&["quantize", &run, &out, "--weights", "bf16"], &["bf16", "int8, int4, int3"]);
    assert!(!Path::new(&out).exists());
    let named = ["--calibrate", &bodies, "--text-field", "body"];
    ok(&[&["quantize", &run, &out, "--weights", "int4"][..], &named].concat());
}

/// 350m's shape, from metaseq's parts, with a tokenizer from elsewhere.
#[test]
fn parts_of_a_post_norm_model_are_quantised() {
    let lab = Lab::new();
    let at = |name: &str| lab.path(name).display().to_string();
    let config = lab.config("run", 5);
    lab.train(&config, &["model.post_norm=true", "model.embedding_width=16"]);
    ok(&["convert", &at("run"), &at("parts"), "--to", "metaseq", "--parts", "2"]);
    let parts = lab.path("parts");
    let out = ferropt().args(["generate", "--model", &at("parts"), "The cat"]).output().unwrap();
    assert!(out.status.success(), "metaseq's own folder has its tokenizer: {}", text(&out));
    std::fs::remove_file(parts.join("gpt2-unified.json")).unwrap();
    let from = ["quantize", &at("parts"), &at("q"), "--weights", "int4", "--calibrate", &at("texts")];
    fails(&from, &["no tokenizer", "--tokenizer"]);
    let tokenizer = at("tokenizer.json");
    let said = ok(&[&from[..], &["--tokenizer", &tokenizer, "--tokens", "3000"]].concat());
    assert!(said.contains("project_in") && said.contains("project_out"), "{said}");
    let out = ferropt().args(["generate", "--model", &at("q"), "The cat"]).output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
}

/// With a head whose rows are the embeddings of the next id, a model writes what comes one before in the alphabet.
#[test]
fn a_model_may_have_an_lm_head_of_its_own() {
    let lab = Lab::new();
    let at = |name: &str| lab.path(name).display().to_string();
    lab.train(&lab.config("run", 100), &[]);
    ok(&["convert", &at("run"), &at("hf"), "--to", "hf"]);
    std::fs::create_dir(lab.path("own")).unwrap();
    std::fs::copy(lab.path("hf/tokenizer.json"), lab.path("own/tokenizer.json")).unwrap();
    let config = std::fs::read_to_string(lab.path("hf/config.json")).unwrap();
    let config = config.replace("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    std::fs::write(lab.path("own/config.json"), config).unwrap();
    let bytes = std::fs::read(lab.path("hf/model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: BTreeMap<String, TensorView> = file.tensors().into_iter().collect();
    let embedding = tensors["model.decoder.embed_tokens.weight"].clone();
    let mut next = embedding.data().to_vec();
    next.rotate_left(embedding.data().len() / embedding.shape()[0]);
    let head = TensorView::new(embedding.dtype(), embedding.shape().to_vec(), &next).unwrap();
    tensors.insert("lm_head.weight".into(), head);
    safetensors::serialize_to_file(&tensors, None, &lab.path("own/model.safetensors")).unwrap();

    let letter = |model: &str, more: &[&str]| {
        let model = at(model);
        let args = ["generate", "--model", &model, "--greedy", "--max-tokens", "1", "--json", "The cat "];
        let out = ferropt().args(args).args(more).output().unwrap();
        assert!(out.status.success(), "{}", text(&out));
        let made: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        made["text"].as_str().unwrap().as_bytes()[0]
    };
    let tied = letter("run", &[]);
    for weights in ["f32", "bf16", "int8", "int4"] {
        assert_eq!(letter("own", &["--weights", weights]) + 1, tied, "{weights}");
    }
    let to = ["convert", &at("own"), &at("bin"), "--to", "hf-bin", "--max-shard-size", "20KB"];
    ok(&to);
    let quantised =
        ok(&["quantize", &at("bin"), &at("int8"), "--weights", "int8", "--calibrate", &at("texts")]);
    assert!(quantised.contains("lm_head") && quantised.contains("embed_tokens"), "{quantised}");
    for folder in ["bin", "int8"] {
        assert_eq!(letter(folder, &[]) + 1, tied, "{folder}");
        assert!(ok(&["inspect", &at(folder)]).contains("LM head of its own"));
    }
    assert!(ok(&["verify", &at("bin"), &at("own")]).contains("same"));
    fails(&["convert", &at("own"), &at("parts"), "--to", "metaseq"], &["LM head", "Hugging Face"]);
}

#[test]
fn refusals_say_what_to_do() {
    let lab = Lab::new();
    let out = lab.path("out").display().to_string();
    let empty = lab.path("texts").display().to_string();
    fails(&["inspect", "/nowhere"], &["/nowhere"]);
    fails(&["inspect", &empty], &["holds no model", "model.safetensors"]);
    fails(&["inspect", &fixture("pre/mp2"), "--checkpoint", "1"], &["no run folder"]);
    fails(&["inspect", &fixture("pre/mp2"), "--preset", "1.3B"], &["\"1.3b\""]);
    let source = fixture("pre/mp2");
    fails(&["convert", &source, &out, "--to", "onnx"], &["onnx", "hf-bin"]);
    fails(&["convert", &source, &out], &["--to"]);
    fails(&["convert", &source, &out, "--to", "hf", "--parts", "2"], &["--max-shard-size"]);
    fails(&["convert", &source, &out, "--to", "metaseq", "--parts", "3"], &["heads = 4", "3 parts"]);
    fails(&["convert", &source, &out, "--to", "hf", "--max-shard-size", "5 apples"], &["5GB"]);
    assert!(!Path::new(&out).exists());
    ok(&["convert", &source, &out, "--to", "hf", "--dtype", "f16"]);
    assert!(ok(&["inspect", &out]).contains("36 of f16"), "{}", ok(&["inspect", &out]));
}

/// A preset stands in for a number of heads that nothing states.
#[test]
fn a_preset_does_not_overrule_what_files_state() {
    let lab = Lab::new();
    lab.train(&lab.config("run", 1), &["model.width=64", "model.heads=4"]);
    let at = |name: &str| lab.path(name).display().to_string();
    ok(&["convert", &at("run"), &at("metaseq"), "--to", "metaseq"]);
    fails(&["inspect", &at("metaseq"), "--preset", "tiny"], &["4 heads by cfg in the file", "tiny has 2"]);
    lab.train(&lab.config("two", 1), &["model.width=64"]);
    ok(&["convert", &at("two"), &at("metaseq-of-two"), "--to", "metaseq"]);
    assert!(ok(&["inspect", &at("metaseq-of-two"), "--preset", "tiny"]).contains("2 heads"));
}

/// A model that is opened again, also by several processes at once, gives the same text, and the disk is used as told.
#[test]
fn weights_that_are_ready_are_kept() {
    let lab = Lab::new();
    let (model, cache) = (lab.wide_model().display().to_string(), lab.path("cache"));
    let command = |args: &[&str]| {
        let mut command = ferropt();
        command.env("FERROPT_CACHE", &cache).args(args);
        command
    };
    let generate = ["generate", "--model", &model, "--greedy", "--json", "--max-tokens", "8", "The cat"];
    let made = |out: Output| {
        assert!(out.status.success(), "{}", text(&out));
        let object: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert!(object["load_seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{object}");
        (object["text"].clone(), String::from_utf8(out.stderr).unwrap())
    };
    let want = (made(command(&generate).arg("--no-cache").output().unwrap()).0, String::new());
    assert!(!cache.exists());
    let both =
        [(); 2].map(|()| command(&generate).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    for child in both {
        assert_eq!(made(child.wait_with_output().unwrap()), want);
    }
    assert_eq!(made(command(&generate).output().unwrap()), want);
    assert_eq!(std::fs::read_dir(cache.join("weights")).unwrap().count(), 1);

    let listed = |args: &[&str]| {
        let out = command(&[&["checkpoint", "cache"], args].concat()).output().unwrap();
        assert!(out.status.success(), "{}", text(&out));
        String::from_utf8(out.stdout).unwrap()
    };
    let json: serde_json::Value = serde_json::from_str(&listed(&["--json"])).unwrap();
    let entry = &json["entries"][0];
    assert_eq!((json["entries"].as_array().unwrap().len(), entry["format"].as_str()), (1, Some("bf16")));
    assert!(entry["made_of"][0].as_str().unwrap().ends_with("model/model.safetensors"), "{json}");
    let table = listed(&[]);
    // 40 to 42 MiB: panels are padded to what the processor's registers hold.
    assert!(
        table.contains("bf16") && table.contains("model.safetensors") && table.contains("1 of 4"),
        "{table}"
    );
    assert!(listed(&["--clear"]).contains("removed 4"));
    assert!(listed(&[]).contains("0 of 0 bytes"));

    let with = |variable: &str, value: &str| command(&generate).env(variable, value).output().unwrap();
    let (same, said) = made(with("FERROPT_CACHE_SIZE", "1MB"));
    assert!(same == want.0 && said.contains("warning") && said.contains("FERROPT_CACHE_SIZE"), "{said}");
    assert_eq!(made(with("FERROPT_CACHE", "off")), want);
    assert_eq!(std::fs::read_dir(cache.join("weights")).unwrap().count(), 0);
    for (variable, value) in [("FERROPT_CACHE_SIZE", "much"), ("FERROPT_CACHE", "/dev/null")] {
        let out = with(variable, value);
        assert!(!out.status.success() && text(&out).contains(value) && text(&out).contains(variable));
    }
}
