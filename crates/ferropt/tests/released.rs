//! The released OPT-125m, for those who have it: what metaseq and Hugging Face recorded of it.
//!
//! `FERROPT_OPT_125M` names its Hugging Face folder, or any other form of it with `vocab.json` and `merges.txt` beside it.

use serde_json::Value;
use std::process::Command;

/// "The man turned on the faucet so the toilet filled with water." in metaseq's `gpu_tests/test_hub_utils.py`: ids behind
/// `</s>`, where each token's text begins, and the log-probabilities that half precision gave.
const SENTENCE: &str = "The man turned on the faucet so the toilet filled with water.";
const IDS: [u64; 15] = [133, 313, 1224, 15, 5, 856, 17527, 594, 98, 5, 11471, 3820, 19, 514, 4];
const OFFSETS: [usize; 15] = [0, 3, 7, 14, 17, 21, 23, 26, 28, 31, 35, 42, 49, 54, 60];
const LOG_PROBS: [f64; 15] = [
    -2.43628, -6.02416, -7.71286, -4.20710, -1.18839, -6.65264, -0.98518, -0.04523, -4.71834, -2.66825,
    -4.96067, -7.00266, -1.14637, -1.36873, -1.11964,
];
/// Its tolerance.
const ROUGHLY: f64 = 1e-2;

/// Hugging Face's `test_modeling_opt.py`: ten tokens in all, `</s>` among them, greedily.
const CONTINUED: [(&str, &str); 4] = [
    ("Today is a beautiful day and I want", " to"),
    ("In the city of", " New York, the city"),
    ("Paris is the capital of France and", " the capital"),
    ("Computers and mobile phones have taken", " over the"),
];

#[test]
fn opt_125m_says_what_was_recorded() {
    let Some(folder) = std::env::var_os("FERROPT_OPT_125M") else {
        println!("skipped: FERROPT_OPT_125M does not name a folder of OPT-125m");
        return;
    };
    let generate = |args: &[&str]| -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferropt"));
        command.args(["generate", "--preset", "125m", "--weights", "f32", "--greedy", "--json", "--model"]);
        let out = command.arg(&folder).args(args).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    };

    let read = generate(&["--max-tokens", "0", "--log-probs", "0", "--echo", SENTENCE]);
    let tokens = &read["prompt_log_probs"].as_array().unwrap()[1..];
    let ids: Vec<u64> = tokens.iter().map(|token| token["id"].as_u64().unwrap()).collect();
    assert_eq!(ids, IDS);
    let mut offset = 0;
    for (place, token) in tokens.iter().enumerate() {
        let text = token["text"].as_str().unwrap();
        assert_eq!((offset, &SENTENCE[offset..offset + text.len()]), (OFFSETS[place], text));
        offset += text.len();
        let (got, want) = (token["log_prob"].as_f64().unwrap(), LOG_PROBS[place]);
        assert!((got - want).abs() < ROUGHLY, "{text:?} has log-probability {got}, recorded was {want}");
    }

    for (prompt, want) in CONTINUED {
        let ids = generate(&["--max-tokens", "0", "--log-probs", "0", "--echo", prompt]);
        let left = 10 - ids["prompt_log_probs"].as_array().unwrap().len();
        let made = generate(&["--max-tokens", &left.to_string(), prompt]);
        assert_eq!(made["text"], want, "behind {prompt:?}");
    }
}
