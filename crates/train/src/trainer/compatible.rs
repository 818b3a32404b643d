//! Which changes of the configuration a run survives: those after which it still computes what it would have.

use crate::config::Config;
use anyhow::{Result, ensure};
use serde_json::Value;
use std::collections::BTreeMap;

/// Keys and sections that may change between two parts of a run. Data is compared by content, not by path.
const FREE: [&str; 22] = [
    "run.dir",
    "run.steps",
    "run.tokens",
    "run.max_minutes",
    "run.threads",
    "run.check_memory",
    "run.device",
    "run.offload",
    "run.recompute",
    "parallel",
    "batch.micro_batch",
    "data.train",
    "data.tokenizer",
    "data.text_field",
    "data.cache",
    "data.validation",
    "checkpoint",
    "recovery",
    "loss_scale",
    "validation",
    "log",
    "energy",
];

/// Refuses to resume a run after `step` steps, whose resolved configuration was `then`, with one that would have computed
/// something else up to there.
pub(super) fn check(then: &Value, now: &Value, step: u64) -> Result<()> {
    let same_rates = same_rates(then, now, step);
    let (then, now) = (flat(then), flat(now));
    let keys: std::collections::BTreeSet<&String> = then.keys().chain(now.keys()).collect();
    let changed: Vec<&String> = keys
        .into_iter()
        .filter(|key| then.get(*key) != now.get(*key) && !free(key))
        .filter(|key| !(same_rates && key.starts_with("schedule.")))
        .collect();
    let lines = |line: &dyn Fn(&String) -> String, between| {
        changed.iter().map(|key| line(key)).collect::<Vec<_>>().join(between)
    };
    ensure!(
        changed.is_empty(),
        "this run cannot be resumed with a configuration that would have trained another model:\n{}\nGo on with this run by \
         the old values (some follow from the length of the run unless they are set), with this behind the same command: {}\n\
         Or choose another run.dir to start anew",
        lines(&|key| format!("{key} was {} and is {} now", shown(then.get(key)), shown(now.get(key))), "\n"),
        // Nothing behind `=` removes a key.
        lines(&|key| format!("--set {key}={}", then.get(key).map(Value::to_string).unwrap_or_default()), " ")
    );
    Ok(())
}

/// Whether all steps so far had the learning rates, to the bit, that they would have now. So a schedule that is still at its
/// height can be made longer.
fn same_rates(then: &Value, now: &Value, step: u64) -> bool {
    // A configuration that another version wrote may be none to this one.
    let schedule = |value: &Value| serde_json::from_value::<Config>(value.clone()).ok()?.schedule().ok();
    let (Some(then), Some(now)) = (schedule(then), schedule(now)) else { return false };
    (1..=step).all(|step| then.lr(step).to_bits() == now.lr(step).to_bits())
}

fn free(key: &str) -> bool {
    FREE.iter().any(|f| key.strip_prefix(f).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

/// A key's value, for people.
pub(super) fn shown(value: Option<&Value>) -> String {
    value.map_or("not set".into(), Value::to_string)
}

/// `{"a": {"b": 1}}` as `{"a.b": 1}`.
pub(super) fn flat(value: &Value) -> BTreeMap<String, Value> {
    fn walk(path: &str, value: &Value, out: &mut BTreeMap<String, Value>) {
        match value {
            Value::Object(map) => {
                for (key, inner) in map {
                    walk(&if path.is_empty() { key.clone() } else { format!("{path}.{key}") }, inner, out);
                }
            }
            leaf => drop(out.insert(path.into(), leaf.clone())),
        }
    }
    let mut out = BTreeMap::new();
    walk("", value, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_what_changes_the_result_is_refused() {
        let then = json!({"run": {"steps": 10, "seed": 1}, "optimizer": {"lr": 1.0}, "log": {"every": 1}});
        let mut now = then.clone();
        now["run"]["steps"] = json!(20);
        now["log"]["every"] = json!(7);
        now["data"] = json!({"validation": {"books": ["x"]}});
        check(&then, &now, 5).unwrap();
        now["optimizer"]["lr"] = json!(2.0);
        now["run"]["seed"] = json!(3);
        now["schedule"] = json!({"total": 20});
        let message = check(&then, &now, 5).unwrap_err().to_string();
        for part in [
            "optimizer.lr was 1.0 and is 2.0 now",
            "run.seed was 1 and is 3 now",
            "schedule.total was not set and is 20 now",
            "--set optimizer.lr=1.0 --set run.seed=1 --set schedule.total=\n",
        ] {
            assert!(message.contains(part), "{message}");
        }
        assert!(!message.contains("run.steps was"), "{message}");
    }

    #[test]
    fn schedules_are_compared_by_the_rates_of_the_steps_so_far() {
        let config = |kind: &str, total: u64, warmup: u64| {
            json!({
                "batch": {"tokens": 512}, "optimizer": {"lr": 1e-3}, "run": {"steps": total},
                "schedule": {"kind": kind, "warmup": warmup, "total": total, "min_lr": 0.1},
            })
        };
        let wsd = |total: u64, decay: u64| {
            let mut config = config("wsd", total, 5);
            config["schedule"]["decay"] = json!(decay);
            config
        };
        check(&wsd(100, 20), &wsd(200, 40), 80).unwrap();
        for (then, now, step) in [
            (wsd(100, 20), wsd(200, 40), 81),
            (config("linear", 100, 5), config("linear", 200, 5), 6),
            (config("linear", 100, 5), config("linear", 100, 6), 4),
        ] {
            let message = check(&then, &now, step).unwrap_err().to_string();
            assert!(message.contains("schedule."), "{message}");
        }
        check(&config("linear", 100, 5), &config("cosine", 200, 5), 5).unwrap();
    }

    #[test]
    fn keys_that_may_change_exist() {
        for key in FREE {
            let parsed = match key.contains('.') {
                true => crate::config::Config::parse("", &[format!("{key}=x")]),
                false => crate::config::Config::parse(&format!("[{key}]"), &[]),
            };
            let message = parsed.err().map(|e| format!("{e:#}")).unwrap_or_default();
            assert!(!message.contains("unknown key"), "{key}: {message}");
        }
    }
}
