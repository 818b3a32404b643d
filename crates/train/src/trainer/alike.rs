//! Whether all ranks were given the same: ranks with different configurations, data or checkpoints would train a model that is
//! nobody's, or wait for each other in vain.

use super::compatible::{flat, shown};
use super::data::{Data, HeldOut};
use crate::config::Resolved;
use anyhow::{Context, Result, bail};
use ferropt_device::Which;
use ferropt_mesh::{Group, Label};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Keys and sections that are a rank's own affair: what its machine has, and where things lie there. What lies there is compared.
const OWN: [&str; 8] = [
    "run.threads",
    "run.device",
    "run.dir",
    "data.train",
    "data.tokenizer",
    "data.validation",
    "data.cache",
    "energy",
];

/// Refuses ranks that have another configuration than the first, or another version of this program.
///
/// # Errors
/// Names the ranks, the keys and their values; on all ranks the same. Or a rank is lost.
pub(super) fn configured(all: &Group, resolved: &Resolved) -> Result<()> {
    let mut mine = flat(&serde_json::to_value(&resolved.config)?);
    mine.retain(|key, _| !own(key));
    // Which GPU a rank has is its own affair; whether it has one decides how the ranks exchange memory.
    let kind = match resolved.device {
        Which::Cpu => "cpu",
        Which::Cuda(_) => "cuda",
    };
    mine.insert("run.device".into(), kind.into());
    mine.insert("the version of Ferropt".into(), env!("CARGO_PKG_VERSION").into());
    let told = all.gather_bytes(Label::new("configuration"), &serde_json::to_vec(&mine)?)?;
    compare(&told).context("give all ranks the same program, configuration and options")
}

/// Refuses ranks that have other data than the first, wherever it lies. A rank may have to tokenise its own first.
///
/// # Errors
/// As [`configured`].
pub(super) fn fed(all: &Group, data: &Data) -> Result<()> {
    let sets = data.validation.iter().map(|HeldOut { name, loader, checksum }| {
        let content = json!({
            "tokens": loader.tokens(), "documents": loader.documents(), "text_bytes": loader.text_bytes(),
            "checksum": checksum,
        });
        (name.clone(), content)
    });
    let sets: BTreeMap<String, Value> = sets.collect();
    let mine = flat(&json!({ "data": { "train": data.identity, "validation": sets } }));
    let told = all.gather_bytes_whenever(Label::new("identity"), &serde_json::to_vec(&mine)?)?;
    compare(&told).context("give all ranks the same texts and the same tokenizer")
}

/// Refuses ranks that would go on from another checkpoint (roll-backs, step) than the first, or from none.
///
/// # Errors
/// As [`configured`].
pub(super) fn resumed(all: &Group, from: Option<(u64, u64)>) -> Result<()> {
    let mine =
        from.map(|(rollbacks, step)| json!({ "checkpoint": { "step": step, "rollbacks": rollbacks } }));
    let mine = flat(&mine.unwrap_or_else(|| json!({})));
    let told = all.gather_bytes_whenever(Label::new("resume"), &serde_json::to_vec(&mine)?)?;
    compare(&told).context(
        "the ranks found different checkpoints to go on from; see that all of them can read the whole run folder, and give \
         the same command again",
    )
}

fn own(key: &str) -> bool {
    OWN.iter().any(|own| key.strip_prefix(own).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

/// Compares what ranks told, as JSON, with what the first one did.
fn compare(told: &[Vec<u8>]) -> Result<()> {
    let parse = |(rank, bytes): (usize, &Vec<u8>)| -> Result<BTreeMap<String, Value>> {
        serde_json::from_slice(bytes).with_context(|| format!("rank {rank} told something unknown"))
    };
    let told = told.iter().enumerate().map(parse).collect::<Result<Vec<_>>>()?;
    let Some((first, others)) = told.split_first() else { return Ok(()) };
    let Some((rank, other)) = (1..).zip(others).find(|(_, other)| *other != first) else { return Ok(()) };
    let keys: BTreeSet<&String> = first.keys().chain(other.keys()).collect();
    let differing = keys.into_iter().filter(|key| first.get(*key) != other.get(*key));
    let lines: Vec<String> = differing
        .map(|key| {
            let (there, here) = (shown(other.get(key)), shown(first.get(key)));
            format!("\n  {key} is {there} on rank {rank} and {here} on rank 0")
        })
        .collect();
    bail!("rank {rank} differs from rank 0:{}", lines.concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferropt_mesh::World;

    fn told(values: &[Value]) -> Vec<Vec<u8>> {
        values.iter().map(|value| serde_json::to_vec(&flat(value)).unwrap()).collect()
    }

    #[test]
    fn what_differs_is_named_with_both_values() {
        let one = json!({"optimizer": {"lr": 0.005}, "run": {"seed": 1}});
        compare(&told(&[one.clone(), one.clone(), one.clone()])).unwrap();
        let other = json!({"optimizer": {"lr": 0.5}, "run": {"seed": 1}, "log": {"trace": 2}});
        let message = compare(&told(&[one.clone(), one, other])).unwrap_err().to_string();
        for part in [
            "rank 2 differs",
            "optimizer.lr is 0.5 on rank 2 and 0.005 on rank 0",
            "log.trace is 2 on rank 2 and not set on rank 0",
        ] {
            assert!(message.contains(part), "{message}");
        }
        assert!(!message.contains("run.seed"), "{message}");
    }

    #[test]
    fn ranks_that_would_go_on_from_different_checkpoints_are_refused_on_all() {
        let refused = |from: [Option<(u64, u64)>; 2]| -> Vec<String> {
            let worlds = World::local(2).unwrap();
            std::thread::scope(|scope| {
                let rank = |(world, from): (World, Option<(u64, u64)>)| {
                    scope.spawn(move || resumed(&world.group(&[0, 1], "all").unwrap(), from))
                };
                let threads: Vec<_> = worlds.into_iter().zip(from).map(rank).collect();
                let results = threads.into_iter().map(|thread| thread.join().unwrap());
                results.filter_map(Result::err).map(|error| format!("{error:#}")).collect()
            })
        };
        let first = Some((1, 20));
        assert!(refused([first, first]).is_empty() && refused([None, None]).is_empty());
        for (other, says) in [
            (Some((1, 10)), "checkpoint.step is 10 on rank 1 and 20 on rank 0"),
            (Some((0, 20)), "checkpoint.rollbacks is 0 on rank 1 and 1 on rank 0"),
            (None, "checkpoint.step is not set on rank 1 and 20 on rank 0"),
        ] {
            let errors = refused([first, other]);
            assert!(errors.len() == 2 && errors.iter().all(|error| error.contains(says)), "{errors:?}");
        }
    }

    #[test]
    fn only_what_is_a_ranks_own_is_left_out() {
        assert!(own("run.threads") && own("data.validation.books") && own("energy.watts"));
        assert!(!own("run.seed") && !own("data.train_more") && !own("recovery.enabled"));
    }

    #[test]
    fn keys_that_are_left_out_exist() {
        for key in OWN.iter().filter(|key| key.contains('.')) {
            let parsed = crate::config::Config::parse("", &[format!("{key}=x")]);
            let message = parsed.err().map(|e| format!("{e:#}")).unwrap_or_default();
            assert!(!message.contains("unknown key"), "{key}: {message}");
        }
    }
}
