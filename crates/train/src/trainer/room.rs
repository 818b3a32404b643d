//! Whether a run fits into its machine's memory. Linux gives out more than there is, and kills without a word who uses it, so that
//! is asked before anything is allocated.

use super::{containers, cores};
use crate::checkpoint::human_bytes;
use crate::config::{Precision, Recompute, Resolved, Weights};
use crate::planner::Plan;
use anyhow::{Context, Result, bail};
use ferropt_mesh::{Group, Label};
use serde::{Deserialize, Serialize};
use std::fs;

/// What a rank takes, and where.
#[derive(Serialize, Deserialize)]
struct Demand {
    machine: String,
    /// Ids of the containers around it.
    containers: Vec<String>,
    bytes: u64,
}

/// Bytes that can still be taken, where the system tells.
struct Free {
    machine: Option<u64>,
    /// Within the limits of the containers around this process, by their ids.
    containers: Vec<(String, Option<u64>)>,
}

/// A run that does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shortage {
    needed: u64,
    available: u64,
    /// Ranks that need it together.
    ranks: usize,
}

/// Refuses a run whose ranks on this machine, or in this container, take more of the host's memory together than there is.
///
/// # Errors
/// Says how much is needed and available, what takes most, and what takes less. Or a rank is lost.
pub(super) fn check(all: &Group, resolved: &Resolved, plan: &Plan) -> Result<()> {
    if !resolved.config.run.check_memory {
        return Ok(());
    }
    // Before the exchange: once it is over, other ranks begin to allocate.
    let free = Free::now();
    let mine = free.demand(plan.memory.host);
    let told = all.gather_bytes(Label::new("memory"), &serde_json::to_vec(&mine)?)?;
    let demands: Vec<Demand> = told
        .iter()
        .map(|told| serde_json::from_slice(told))
        .collect::<Result<_, _>>()
        .context("a rank told something unknown")?;
    match shortage(&mine, &demands, &free) {
        Some(shortage) => bail!("{}", shortage.message(resolved, plan)),
        None => Ok(()),
    }
}

/// What [`check`] would refuse a run of one rank for, if it were started on this machine now.
pub(super) fn short_of(resolved: &Resolved, plan: &Plan) -> Option<String> {
    let free = Free::now();
    let mine = free.demand(plan.memory.host);
    Some(shortage(&mine, std::slice::from_ref(&mine), &free)?.message(resolved, plan))
}

/// The narrowest of the places where `mine` and the demands beside it do not fit.
fn shortage(mine: &Demand, demands: &[Demand], free: &Free) -> Option<Shortage> {
    let place = |available: Option<u64>, here: &dyn Fn(&Demand) -> bool| {
        let here: Vec<u64> =
            demands.iter().filter(|demand| here(demand)).map(|demand| demand.bytes).collect();
        let needed = here.iter().fold(0, |sum: u64, bytes| sum.saturating_add(*bytes));
        Some(Shortage { needed, available: available?, ranks: here.len() })
    };
    let machine = place(free.machine, &|demand| demand.machine == mine.machine);
    let containers =
        free.containers.iter().map(|(id, free)| place(*free, &|demand| demand.containers.contains(id)));
    let short = containers.chain([machine]).flatten().filter(|place| place.needed > place.available);
    short.min_by_key(|place| place.available)
}

impl Shortage {
    fn message(self, resolved: &Resolved, plan: &Plan) -> String {
        let run = &resolved.config.run;
        let (part, bytes) = plan.memory.largest_on_host();
        let (whose, each) = match self.ranks {
            1 => (String::new(), ""),
            ranks => (format!(" for its {ranks} ranks here"), " in each"),
        };
        let halves = run.precision == Precision::Bf16 && run.weights == Some(Weights::Split);
        // Activations and weights are a GPU's own affair.
        let here = plan.memory.device.is_none();
        let ways = [
            (here && run.recompute != Recompute::Full, "run.recompute = \"full\""),
            (here && resolved.micro_batch > 1, "a smaller batch.micro_batch"),
            (halves, "run.weights = \"bf16-stochastic\""),
            (true, "a smaller model, or more ranks on more machines, which share it out"),
        ];
        let ways: Vec<&str> = ways.into_iter().filter(|(helps, _)| *helps).map(|(_, way)| way).collect();
        format!(
            "this run needs {} of memory{whose}, and {} are available here now. The largest part is its {part} \
             ({}{each}). Less is needed with {}; --dry-run shows all parts. run.check_memory = false starts it nevertheless",
            human_bytes(self.needed),
            human_bytes(self.available),
            human_bytes(bytes),
            ways.join(", "),
        )
    }
}

impl Free {
    fn now() -> Free {
        let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| meminfo(&text));
        let containers = containers::around("memory").into_iter();
        let containers = containers.map(|container| (container.id.clone(), container.free_memory()));
        Free { machine, containers: containers.collect() }
    }

    /// What a rank here tells the others.
    fn demand(&self, bytes: u64) -> Demand {
        let containers = self.containers.iter().map(|(id, _)| id.clone()).collect();
        Demand { machine: cores::machine(), containers, bytes }
    }
}

/// Linux's estimate of what can be taken without swapping.
fn meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(machine: &str, containers: &[&str], bytes: u64) -> Demand {
        let containers = containers.iter().map(|id| id.to_string()).collect();
        Demand { machine: machine.into(), containers, bytes }
    }

    #[test]
    fn ranks_share_their_machine_and_the_containers_around_them() {
        let demands = [
            demand("a", &["x", "job"], 40),
            demand("a", &["x", "job"], 40),
            demand("a", &["y", "job"], 40),
            demand("a", &["z"], 40),
            demand("b", &["w"], 40),
        ];
        let short = |machine, x, job| {
            let containers = vec![("x".to_string(), x), ("job".to_string(), job)];
            let short = shortage(&demands[0], &demands, &Free { machine, containers })?;
            Some((short.needed, short.available, short.ranks))
        };
        assert_eq!(short(Some(160), Some(80), Some(120)), None, "it fits exactly");
        assert_eq!(short(None, None, None), None, "nobody tells");
        assert_eq!(short(Some(159), None, None), Some((160, 159, 4)));
        assert_eq!(short(Some(160), Some(79), None), Some((80, 79, 2)));
        assert_eq!(short(Some(160), Some(80), Some(119)), Some((120, 119, 3)));
        assert_eq!(short(Some(100), Some(9), Some(50)), Some((80, 9, 2)));
        let huge = [demand("a", &[], u64::MAX), demand("a", &[], 1)];
        assert!(shortage(&huge[0], &huge, &Free { machine: Some(5), containers: Vec::new() }).is_some());
    }

    #[test]
    fn what_the_system_tells_is_read() {
        assert_eq!(meminfo("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:    7 kB\n"), Some(7 * 1024));
        assert_eq!(meminfo("MemTotal: 9 kB\n"), None);
    }
}
