//! Reading fixtures.

use ferropt_device::{IGNORE, bf16};
use ferropt_model::Config;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// One case.
pub struct Fixture {
    pub name: String,
    pub config: Config,
    pub optimizer: Optimizer,
    pub batch: usize,
    pub seq: usize,
    pub tokens: Vec<u32>,
    pub targets: Vec<u32>,
    parameters: Vec<String>,
    bytes: Vec<u8>,
}

#[derive(Deserialize)]
pub struct Optimizer {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

#[derive(Deserialize)]
struct Sizes {
    vocab: usize,
    width: usize,
    layers: usize,
    heads: usize,
    ffn: usize,
    embed_width: usize,
    post_ln: bool,
    max_seq: usize,
}

/// The folder of cases.
pub fn folder() -> PathBuf {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    std::env::var_os("FERROPT_FIXTURES").map_or(committed, PathBuf::from)
}

/// Every case of the folder.
pub fn all() -> Vec<Fixture> {
    let folder = folder();
    let listing = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<PathBuf> = listing.map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    assert!(!files.is_empty(), "no fixtures in {}", folder.display());
    files.iter().map(|file| Fixture::open(file)).collect()
}

impl Fixture {
    fn open(path: &Path) -> Fixture {
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().expect("metadata");
        let sizes: Sizes = serde_json::from_str(&metadata["config"]).unwrap();
        let config = Config {
            layers: sizes.layers,
            heads: sizes.heads,
            width: sizes.width,
            feed_forward: sizes.ffn,
            embedding_width: sizes.embed_width,
            post_norm: sizes.post_ln,
            own_head: false,
            vocab: sizes.vocab,
            positions: sizes.max_seq,
            dropout: 0.0,
            attention_dropout: 0.0,
        };
        let mut fixture = Fixture {
            name: path.file_stem().unwrap().to_string_lossy().into(),
            config,
            optimizer: serde_json::from_str(&metadata["optimizer"]).unwrap(),
            parameters: serde_json::from_str(&metadata["params"]).unwrap(),
            batch: 0,
            seq: 0,
            tokens: Vec::new(),
            targets: Vec::new(),
            bytes,
        };
        let tensors = SafeTensors::deserialize(&fixture.bytes).unwrap();
        let [batch, seq] = tensors.tensor("tokens").unwrap().shape().try_into().unwrap();
        let ids = |name: &str| -> Vec<u32> {
            let view = tensors.tensor(name).unwrap();
            assert_eq!(view.dtype(), Dtype::I32);
            let ids = view.data().chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()));
            ids.map(|id| if id == -100 { IGNORE } else { id as u32 }).collect()
        };
        let (tokens, targets) = (ids("tokens"), ids("targets"));
        (fixture.batch, fixture.seq, fixture.tokens, fixture.targets) = (batch, seq, tokens, targets);
        fixture
    }

    /// A tensor of f32 or bf16.
    pub fn values(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = tensors.tensor(name).unwrap_or_else(|e| panic!("{}: {name}: {e}", self.name));
        match view.dtype() {
            Dtype::F32 => {
                view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
            }
            Dtype::BF16 => view
                .data()
                .chunks_exact(2)
                .map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32())
                .collect(),
            other => panic!("{name} is {other:?}"),
        }
    }

    /// A tensor of f64.
    pub fn values64(&self, name: &str) -> Vec<f64> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = tensors.tensor(name).unwrap();
        assert_eq!(view.dtype(), Dtype::F64);
        view.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// Row of a parameter in the tensors that have one for each.
    pub fn parameter(&self, name: &str) -> usize {
        self.parameters.iter().position(|p| p == name).unwrap_or_else(|| panic!("no parameter {name}"))
    }
}
