//! A folder with a small corpus, a tokenizer and a nano model's configuration, and the real binary to try on them.

#![allow(dead_code)] // each test binary uses its own part

use ferropt_model::{Config, formats};
use ferropt_train::checkpoint::Dtype;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

/// The folder; gone when dropped.
pub struct Lab {
    dir: TempDir,
}

impl Lab {
    /// Writes corpus, held-out text and tokenizer.
    pub fn new() -> Lab {
        let dir = TempDir::new().unwrap();
        let lab = Lab { dir };
        std::fs::create_dir(lab.path("texts")).unwrap();
        for i in 0..4 {
            std::fs::write(lab.path(&format!("texts/{i}.txt")), story(i, 120)).unwrap();
        }
        std::fs::write(lab.path("held-out.txt"), story(99, 40)).unwrap();
        std::fs::write(lab.path("tokenizer.json"), byte_tokenizer()).unwrap();
        lab
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Configuration of a run in `RUN` with `steps` steps; everything not said here is the default. On one thread, as tests run beside
    /// each other and the model is so small that two would mostly wait; `exact.rs` has runs on more.
    pub fn config(&self, run: &str, steps: u64) -> PathBuf {
        let at = |name: &str| self.path(name).display().to_string();
        let text = format!(
            "[model]\nlayers = 2\nheads = 2\nwidth = 32\nvocab = 260\npositions = 64\n\
             [data]\ntrain = '{}'\ntokenizer = '{}'\nvalidation.held-out = '{}'\ncache = '{}'\n\
             [batch]\ntokens = 512\n\
             [optimizer]\nlr = 5e-3\n\
             [run]\ndir = '{}'\nsteps = {steps}\nthreads = 1\n\
             [checkpoint]\nevery = 5\nkeep_last = 2\n\
             [validation]\nevery = 20\nmax_tokens = 1024\n",
            at("texts"),
            at("tokenizer.json"),
            at("held-out.txt"),
            at("cache"),
            at(run),
        );
        let file = self.path(&format!("{}.toml", run.replace('/', "-")));
        std::fs::write(&file, text).unwrap();
        file
    }

    /// A Hugging Face folder `model` with weights enough to be kept when they are ready: 20 million, random, bf16.
    pub fn wide_model(&self) -> PathBuf {
        let config = Config {
            layers: 1,
            heads: 16,
            width: 1024,
            feed_forward: 8192,
            embedding_width: 1024,
            vocab: 260,
            positions: 64,
            ..Config::preset("tiny").unwrap()
        };
        let folder = self.path("model");
        std::fs::create_dir(&folder).unwrap();
        let json = serde_json::json!({
            "model_type": "opt", "num_hidden_layers": 1, "num_attention_heads": 16, "hidden_size": 1024,
            "ffn_dim": 8192, "vocab_size": 260, "max_position_embeddings": 64, "word_embed_proj_dim": 1024,
        });
        std::fs::write(folder.join("config.json"), json.to_string()).unwrap();
        std::fs::write(folder.join("tokenizer.json"), byte_tokenizer()).unwrap();
        let table = config.parameters();
        let tensors = || table.iter().flat_map(|p| p.names.iter().map(|name| (name.clone(), p.part_shape())));
        let listed = tensors().map(|(name, shape)| (name, Dtype::BF16, shape));
        let mut bytes = formats::safetensors_header(listed).unwrap();
        let mut state = 1u32;
        for (name, shape) in tensors() {
            for _ in 0..shape.iter().product() {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let value = (state as i32 as f32) * (0.1 / (1u32 << 31) as f32);
                let value = if name.ends_with("norm.weight") { 1.0 } else { value };
                bytes.extend(((value.to_bits() >> 16) as u16).to_le_bytes());
            }
        }
        std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
        folder
    }

    /// Trains to the end and fails the test when that fails.
    pub fn train(&self, config: &Path, set: &[&str]) -> Output {
        let out = train(config, set).output().unwrap();
        assert!(out.status.success(), "training failed:\n{}", text(&out));
        out
    }

    /// Bytes of every tensor file of a run's checkpoint.
    pub fn tensors(&self, run: &str, step: u64) -> BTreeMap<String, Vec<u8>> {
        let dir = self.path(run).join(format!("checkpoints/step-{step:08}"));
        let files = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let tensors: BTreeMap<_, _> = files
            .map(|f| f.unwrap().path())
            .filter(|f| f.extension().is_some_and(|e| e == "safetensors"))
            .map(|f| (f.file_name().unwrap().to_str().unwrap().to_string(), std::fs::read(&f).unwrap()))
            .collect();
        assert!(tensors.keys().any(|file| file.starts_with("model")), "{} holds no model", dir.display());
        tensors
    }

    /// Lines of metrics.jsonl, the last of which a kill may have torn; 0 if there is no such file yet.
    pub fn told(&self, run: &str) -> usize {
        std::fs::read_to_string(self.path(run).join("metrics.jsonl")).map_or(0, |text| text.lines().count())
    }

    /// Values of `key` of the training steps in metrics.jsonl that have it, with their steps.
    pub fn metric(&self, run: &str, key: &str) -> Vec<(u64, f64)> {
        let lines = std::fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        lines
            .lines()
            .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap_or_else(|e| panic!("{l}: {e}")))
            .filter(|l| l["kind"] == "training")
            .filter_map(|l| Some((l["step"].as_u64()?, l.get(key)?.as_f64()?)))
            .collect()
    }
}

/// The binary.
pub fn ferropt() -> Command {
    Command::new(env!("CARGO_BIN_EXE_ferropt"))
}

/// `ferropt train CONFIG --set ...`
pub fn train(config: &Path, set: &[&str]) -> Command {
    let mut command = ferropt();
    command.arg("train").arg(config);
    for item in set {
        command.arg("--set").arg(item);
    }
    command
}

/// A port of this machine that nobody listens on.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// What a command printed.
pub fn text(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// Sentences of a tiny language, so that there is something to learn.
fn story(seed: usize, sentences: usize) -> String {
    const WHO: [&str; 6] = ["The cat", "A sailor", "My aunt", "The baker", "Our dog", "The old king"];
    const DOES: [&str; 5] = ["sees", "likes", "follows", "forgets", "paints"];
    const WHAT: [&str; 6] = ["the moon", "a red boat", "warm bread", "the sea", "a small bird", "the garden"];
    let mut state = seed as u64 + 1;
    let mut pick = |n: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % n
    };
    (0..sentences).map(|_| format!("{} {} {}.\n", WHO[pick(6)], DOES[pick(5)], WHAT[pick(6)])).collect()
}

/// A byte-level tokenizer without merges: OPT's four special tokens, then a token per byte.
fn byte_tokenizer() -> String {
    // GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on.
    let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    let mut vocab = serde_json::Map::new();
    for (id, special) in ["<s>", "<pad>", "</s>", "<unk>"].into_iter().enumerate() {
        vocab.insert(special.into(), id.into());
    }
    for byte in 0..256 {
        let code = if printable(byte) { byte } else { next };
        next += u32::from(!printable(byte));
        vocab.insert(char::from_u32(code).unwrap().to_string(), (byte + 4).into());
    }
    let special = |id: u32, content: &str| {
        serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<s>"), special(1, "<pad>"), special(2, "</s>"), special(3, "<unk>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    })
    .to_string()
}
