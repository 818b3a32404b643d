//! Tokenizer files for Hugging Face's libraries.

use serde_json::{Map, Value, json};

pub(super) const FILE: &str = "tokenizer.json";
pub(super) const VOCABULARY: &str = "vocab.json";
pub(super) const CONFIG: &str = "tokenizer_config.json";

/// What [`for_transformers`] makes.
pub(super) struct Files {
    pub tokenizer: Vec<u8>,
    pub config: Vec<u8>,
}

/// A `tokenizer.json` with which `transformers` does what we do: `</s>` comes before every text, and the special tokens are
/// those of OPT. Without them it makes up a token of its own, which has no embedding. None where there is nothing to
/// do: the file says itself what comes before a text, or `</s>` is another token than OPT's.
pub(super) fn for_transformers(content: &[u8]) -> Option<Files> {
    let mut file: Value = serde_json::from_slice(content).ok()?;
    let added = file.get("added_tokens")?.as_array()?;
    let id = |name: &str| added.iter().find(|token| token["content"] == name)?["id"].as_u64();
    if id("</s>") != Some(2) || !file.get("post_processor").is_none_or(Value::is_null) {
        return None;
    }
    let mut config = json!({ "tokenizer_class": "PreTrainedTokenizerFast" });
    for (role, name) in
        [("bos_token", "</s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"), ("pad_token", "<pad>")]
    {
        if id(name).is_some() {
            config[role] = name.into();
        }
    }
    let end = json!({ "SpecialToken": { "id": "</s>", "type_id": 0 } });
    let text = |id: &str| json!({ "Sequence": { "id": id, "type_id": 0 } });
    file["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [end, text("A")],
        "pair": [end, text("A"), text("B")],
        "special_tokens": { "</s>": { "id": "</s>", "ids": [2], "tokens": ["</s>"] } },
    });
    Some(Files {
        tokenizer: serde_json::to_vec_pretty(&file).ok()?,
        config: serde_json::to_vec_pretty(&config).ok()?,
    })
}

/// A `tokenizer_config.json` with which `transformers` reads OPT's `vocab.json` as we do. Without it the special tokens are
/// GPT-2's, of which `<|endoftext|>` is a word among others in OPT, and nothing comes before a text. None where `</s>` and
/// `<pad>` are other tokens than OPT's.
pub(super) fn of_vocabulary(content: &[u8]) -> Option<Vec<u8>> {
    let vocabulary: Map<String, Value> = serde_json::from_slice(content).ok()?;
    let opt = [("<pad>", 1), ("</s>", 2)].iter().all(|(name, id)| vocabulary.get(*name) == Some(&json!(id)));
    let config = json!({
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": true,
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
        "pad_token": "<pad>",
    });
    opt.then(|| serde_json::to_vec_pretty(&config).ok())?
}
