//! Sizes of a model, and the models that have names.

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// Rows of the position table before that of the first token: fairseq, where OPT comes from, numbers positions from
/// the padding id plus one.
pub const POSITION_OFFSET: usize = 2;

/// Sizes of an OPT model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// L, layers.
    pub layers: usize,
    /// H, attention heads.
    pub heads: usize,
    /// C, width of the residual stream; a multiple of H.
    pub width: usize,
    /// F, width between the two feed-forward products.
    pub feed_forward: usize,
    /// W, width of the token embeddings. Where it is not C, two products without bias lead from W to C and back (350m).
    pub embedding_width: usize,
    /// Layer norm behind each block's residual sum, and none at the end (350m), instead of before each block.
    pub post_norm: bool,
    /// The LM head is a matrix of its own, instead of the embedding table once more. For inference alone.
    #[serde(default, skip_serializing_if = "is_false")]
    pub own_head: bool,
    /// V, rows of the embedding table.
    pub vocab: usize,
    /// Longest sequence. The table of positions has two more rows; the first token uses row 2.
    pub positions: usize,
    /// Dropout after attention's output product and after the feed-forward block, in training.
    pub dropout: f64,
    /// Dropout on attention probabilities, in training.
    pub attention_dropout: f64,
}

/// Sizes that were written before there was such a thing say nothing of it.
fn is_false(value: &bool) -> bool {
    !value
}

/// A model with a name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preset {
    /// What users call it.
    pub name: &'static str,
    /// L.
    pub layers: usize,
    /// H.
    pub heads: usize,
    /// C.
    pub width: usize,
    /// W.
    pub embedding_width: usize,
    /// See [`Config::post_norm`].
    pub post_norm: bool,
}

const fn pre_norm(name: &'static str, layers: usize, heads: usize, width: usize) -> Preset {
    Preset { name, layers, heads, width, embedding_width: width, post_norm: false }
}

/// All models with names: small ones for tests and first steps, then the released OPT sizes.
pub const PRESETS: [Preset; 12] = [
    pre_norm("tiny", 2, 2, 64),
    pre_norm("mini", 4, 4, 256),
    pre_norm("small", 6, 6, 384),
    pre_norm("125m", 12, 12, 768),
    Preset { name: "350m", layers: 24, heads: 16, width: 1024, embedding_width: 512, post_norm: true },
    pre_norm("1.3b", 24, 32, 2048),
    pre_norm("2.7b", 32, 32, 2560),
    pre_norm("6.7b", 32, 32, 4096),
    pre_norm("13b", 40, 40, 5120),
    pre_norm("30b", 48, 56, 7168),
    pre_norm("66b", 64, 72, 9216),
    pre_norm("175b", 96, 96, 12288),
];

/// Rows of OPT's embedding table: 50,265 tokens, filled up to a multiple of 8 and of the tensor-parallel parts.
const OPT_VOCAB: usize = 50_272;
/// OPT's longest sequence.
const OPT_POSITIONS: usize = 2048;
/// OPT's dropout, both kinds.
const OPT_DROPOUT: f64 = 0.1;

/// Operations of a forward pass per token; a multiplication and an addition are two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ForwardFlops {
    /// Linear layers, and the embedding projections.
    pub products: f64,
    /// Attention over the whole T x T square, of which a causal model needs half.
    pub attention: f64,
    /// LM head.
    pub head: f64,
}

impl ForwardFlops {
    /// All of it, with the whole attention square.
    pub fn total(&self) -> f64 {
        self.products + self.attention + self.head
    }
}

impl Preset {
    /// The sizes, with OPT's vocabulary, positions and dropout.
    pub fn config(&self) -> Config {
        Config {
            layers: self.layers,
            heads: self.heads,
            width: self.width,
            feed_forward: 4 * self.width,
            embedding_width: self.embedding_width,
            post_norm: self.post_norm,
            own_head: false,
            vocab: OPT_VOCAB,
            positions: OPT_POSITIONS,
            dropout: OPT_DROPOUT,
            attention_dropout: OPT_DROPOUT,
        }
    }
}

impl Config {
    /// The model of that name.
    ///
    /// ```
    /// let config = ferropt_model::Config::preset("125m")?;
    /// assert_eq!(config.parameter_count(), 125_239_296);
    /// # Ok::<(), anyhow::Error>(())
    /// ```
    ///
    /// # Errors
    /// Names the nearest preset and all others.
    pub fn preset(name: &str) -> Result<Config> {
        if let Some(preset) = PRESETS.iter().find(|p| p.name == name) {
            return Ok(preset.config());
        }
        let distance = |p: &&Preset| strsim::damerau_levenshtein(&name.to_lowercase(), p.name);
        let nearest = PRESETS.iter().min_by_key(distance).map_or("125m", |p| p.name);
        let all: Vec<&str> = PRESETS.iter().map(|p| p.name).collect();
        bail!("there is no model named {name:?}; did you mean {nearest:?}? The names are {}", all.join(", "))
    }

    /// D, width of one head.
    pub fn head_width(&self) -> usize {
        self.width / self.heads
    }

    /// Whether products lead from the embeddings' width to the model's and back.
    pub fn has_projections(&self) -> bool {
        self.embedding_width != self.width
    }

    /// Refuses sizes that make no model.
    ///
    /// # Errors
    /// Names the size, its value and what it may be.
    pub fn check(&self) -> Result<()> {
        for (name, size) in [
            ("layers", self.layers),
            ("heads", self.heads),
            ("width", self.width),
            ("feed_forward", self.feed_forward),
            ("embedding_width", self.embedding_width),
            ("positions", self.positions),
        ] {
            ensure!(size > 0, "{name} = 0, but it is at least 1");
            // Sizes in bytes must stay far from overflow, whatever they are multiplied by.
            ensure!(size <= 1 << 24, "{name} = {size} is more than {}", 1 << 24);
        }
        ensure!(
            self.width.is_multiple_of(self.heads),
            "width = {} is not a multiple of heads = {}; the nearest multiples are {} and {}",
            self.width,
            self.heads,
            (self.width / self.heads).max(1) * self.heads,
            (self.width / self.heads + 1) * self.heads
        );
        ensure!(
            (4..=1 << 24).contains(&self.vocab),
            "vocab = {}, but it lies between 4 (the special tokens) and {}",
            self.vocab,
            1 << 24
        );
        for (name, p) in [("dropout", self.dropout), ("attention_dropout", self.attention_dropout)] {
            ensure!(
                (0.0..1.0).contains(&p),
                "{name} = {p} is not a probability in [0, 1); OPT uses {OPT_DROPOUT}"
            );
        }
        Ok(())
    }

    /// Exact number of parameters; an LM head that is the embedding table counts once.
    pub fn parameter_count(&self) -> u64 {
        self.parameters().iter().map(|p| p.elements() as u64).sum()
    }

    /// Floating-point operations of the forward pass per token of a sequence of `seq` tokens.
    pub fn forward_flops(&self, seq: usize) -> ForwardFlops {
        let [l, c, f, w, v, t] =
            [self.layers, self.width, self.feed_forward, self.embedding_width, self.vocab, seq]
                .map(|x| x as f64);
        let projections = if self.has_projections() { 2.0 * c * w } else { 0.0 };
        ForwardFlops {
            products: 2.0 * (l * (4.0 * c * c + 2.0 * c * f) + projections),
            // Scores and values: each a product of T x C x T.
            attention: 2.0 * l * 2.0 * t * c,
            head: 2.0 * v * w,
        }
    }

    /// `config.json` as Hugging Face's `OPTForCausalLM` reads it.
    pub fn hugging_face(&self) -> serde_json::Value {
        serde_json::json!({
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "activation_function": "relu",
            "attention_dropout": self.attention_dropout,
            "bos_token_id": 2,
            "do_layer_norm_before": !self.post_norm,
            "dropout": self.dropout,
            "eos_token_id": 2,
            "ffn_dim": self.feed_forward,
            "hidden_size": self.width,
            "init_std": crate::parameters::INITIAL_STD,
            "layerdrop": 0.0,
            "max_position_embeddings": self.positions,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "pad_token_id": 1,
            "tie_word_embeddings": !self.own_head,
            "vocab_size": self.vocab,
            "word_embed_proj_dim": self.embedding_width,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The released sizes, from V*C + 2050*C + L(12C^2 + 13C) + 2C; 350m as its checkpoint counts.
    #[test]
    fn parameter_counts_are_exact() {
        for (name, count) in [
            ("125m", 125_239_296),
            ("350m", 331_196_416),
            ("1.3b", 1_315_758_080),
            ("2.7b", 2_651_596_800),
            ("6.7b", 6_658_473_984),
            ("13b", 12_853_473_280),
            ("30b", 29_974_540_288),
            ("66b", 65_719_701_504),
            ("175b", 174_604_468_224),
        ] {
            let config = Config::preset(name).unwrap();
            config.check().unwrap();
            if !config.post_norm {
                let [v, c, l] = [config.vocab, config.width, config.layers].map(|x| x as u64);
                assert_eq!(
                    config.parameter_count(),
                    v * c + 2050 * c + l * (12 * c * c + 13 * c) + 2 * c,
                    "{name}"
                );
            }
            assert_eq!(config.parameter_count(), count, "{name}");
        }
    }

    /// 6 FLOPs per parameter and token in training, of which a third is forward, plus attention.
    #[test]
    fn forward_flops_are_twice_the_matrices_and_attention() {
        for name in ["125m", "350m"] {
            let config = Config::preset(name).unwrap();
            let flops = config.forward_flops(1024);
            let matrices =
                config.parameters().into_iter().enumerate().filter(|(i, p)| p.is_matrix() && *i != 1);
            let matrices: usize = matrices.map(|(_, p)| p.elements()).sum();
            assert_eq!(flops.products + flops.head, 2.0 * matrices as f64, "{name}");
            assert_eq!(flops.attention, (4 * config.layers * config.width * 1024) as f64, "{name}");
        }
    }

    #[test]
    fn wrong_names_and_sizes_are_refused_with_what_would_be_right() {
        let message = Config::preset("1.3B").unwrap_err().to_string();
        assert!(message.contains("\"1.3b\"") && message.contains("175b"), "{message}");
        let base = Config::preset("tiny").unwrap();
        for (wrong, parts) in [
            (Config { heads: 3, ..base.clone() }, &["width = 64", "heads = 3", "63", "66"][..]),
            (Config { layers: 0, ..base.clone() }, &["layers = 0"]),
            (Config { vocab: 3, ..base.clone() }, &["vocab = 3"]),
            (Config { dropout: 1.0, ..base.clone() }, &["dropout = 1", "0.1"]),
            (Config { positions: usize::MAX, ..base.clone() }, &["positions"]),
        ] {
            let message = wrong.check().unwrap_err().to_string();
            assert!(parts.iter().all(|p| message.contains(p)), "{message}");
        }
    }
}
