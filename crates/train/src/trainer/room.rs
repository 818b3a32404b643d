//! Whether a run fits into its machine's memory. Linux gives out more than there is, and kills without a word who uses it, so that
//! is asked before anything is allocated.

use super::cores;
use crate::checkpoint::human_bytes;
use crate::config::{Precision, Recompute, Resolved, Weights};
use crate::planner::Plan;
use anyhow::{Context, Result, bail};
use ferropt_mesh::{Group, Label};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;

/// What a rank takes, and where.
#[derive(Serialize, Deserialize)]
struct Demand {
    machine: String,
    container: String,
    bytes: u64,
}

/// Bytes that can still be taken, where the system tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Free {
    machine: Option<u64>,
    /// Within the limits of this process's control group, which those of a container or a job are.
    container: Option<u64>,
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
    let mine = Demand { machine: cores::machine(), container: cores::container(), bytes: plan.memory.host };
    let told = all.gather_bytes(Label::new("memory"), &serde_json::to_vec(&mine)?)?;
    let demands: Vec<Demand> = told
        .iter()
        .map(|told| serde_json::from_slice(told))
        .collect::<Result<_, _>>()
        .context("a rank told something unknown")?;
    match shortage(&mine, &demands, free) {
        Some(shortage) => bail!("{}", shortage.message(resolved, plan)),
        None => Ok(()),
    }
}

/// What [`check`] would refuse a run of one rank for, if it were started on this machine now.
pub(super) fn short_of(resolved: &Resolved, plan: &Plan) -> Option<String> {
    let mine = Demand { machine: String::new(), container: String::new(), bytes: plan.memory.host };
    Some(shortage(&mine, std::slice::from_ref(&mine), Free::now())?.message(resolved, plan))
}

/// The narrower of the places where `mine` and the demands beside it do not fit.
fn shortage(mine: &Demand, demands: &[Demand], free: Free) -> Option<Shortage> {
    let place = |available: Option<u64>, here: &dyn Fn(&Demand) -> bool| {
        let here: Vec<u64> =
            demands.iter().filter(|demand| here(demand)).map(|demand| demand.bytes).collect();
        let needed = here.iter().fold(0, |sum: u64, bytes| sum.saturating_add(*bytes));
        Some(Shortage { needed, available: available?, ranks: here.len() })
    };
    let places = [
        place(free.machine, &|demand| demand.machine == mine.machine),
        place(free.container, &|demand| demand.container == mine.container),
    ];
    let short = places.into_iter().flatten().filter(|place| place.needed > place.available);
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
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Free { machine, container: within(&groups, Path::new("/sys/fs/cgroup")) }
    }
}

/// Linux's estimate of what can be taken without swapping.
fn meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The least that control groups leave: those that `/proc/self/cgroup` names, and those around them. In a container what it
/// names may lie outside of what is mounted; the container's own group is then the root.
fn within(groups: &str, mounted: &Path) -> Option<u64> {
    let left = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
        let (root, files) = match controllers {
            "" => (mounted.to_path_buf(), ["memory.max", "memory.current", "inactive_file"]),
            _ if controllers.split(',').any(|name| name == "memory") => {
                let files = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"];
                (mounted.join("memory"), files)
            }
            _ => return None,
        };
        let all = Path::new(path).ancestors();
        all.filter_map(|group| left_by(&root.join(group), files)).min()
    };
    groups.lines().filter_map(left).min()
}

/// What one group leaves: pages of files that are not in use are given up for what is asked for.
fn left_by(group: &Path, [limit, usage, inactive]: [&str; 3]) -> Option<u64> {
    let number = |file: &str| fs::read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok();
    let (limit, usage) = (number(limit)?, number(usage)?);
    let statistics = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let inactive =
        statistics.lines().find_map(|line| line.strip_prefix(inactive)?.trim().parse::<u64>().ok());
    Some(limit.saturating_sub(usage.saturating_sub(inactive.unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(machine: &str, container: &str, bytes: u64) -> Demand {
        Demand { machine: machine.into(), container: container.into(), bytes }
    }

    #[test]
    fn ranks_share_their_machine_and_their_container() {
        let demands =
            [demand("a", "x", 40), demand("a", "x", 40), demand("a", "y", 40), demand("b", "z", 40)];
        let short = |machine, container| shortage(&demands[0], &demands, Free { machine, container });
        assert_eq!(short(Some(120), Some(80)), None, "it fits exactly");
        assert_eq!(short(None, None), None, "nobody tells");
        assert_eq!(short(Some(119), None), Some(Shortage { needed: 120, available: 119, ranks: 3 }));
        assert_eq!(short(Some(120), Some(79)), Some(Shortage { needed: 80, available: 79, ranks: 2 }));
        assert_eq!(short(Some(100), Some(9)), Some(Shortage { needed: 80, available: 9, ranks: 2 }));
        let huge = [demand("a", "x", u64::MAX), demand("a", "x", 1)];
        assert!(shortage(&huge[0], &huge, Free { machine: Some(5), container: None }).is_some());
    }

    #[test]
    fn what_the_system_tells_is_read() {
        assert_eq!(meminfo("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:    7 kB\n"), Some(7 * 1024));
        assert_eq!(meminfo("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn the_narrowest_control_group_counts() {
        let folder = tempfile::tempdir().unwrap();
        let group = |path: &str, files: [(&str, &str); 3]| {
            let path = folder.path().join(path);
            fs::create_dir_all(&path).unwrap();
            for (file, text) in files {
                fs::write(path.join(file), text).unwrap();
            }
        };
        let stat = "anon 10\ninactive_file 30\nactive_file 5\n";
        group("job", [("memory.max", "1000\n"), ("memory.current", "400\n"), ("memory.stat", stat)]);
        group("job/step", [("memory.max", "max\n"), ("memory.current", "400\n"), ("memory.stat", stat)]);
        assert_eq!(within("0::/job/step\n", folder.path()), Some(630));
        assert_eq!(within("0::/elsewhere\n", folder.path()), None);
        // A container of the older kind sees its own group as the root, whatever its name is outside.
        let stat = "inactive_file 1\ntotal_inactive_file 50\n";
        let files =
            [("memory.limit_in_bytes", "300\n"), ("memory.usage_in_bytes", "100\n"), ("memory.stat", stat)];
        group("memory", files);
        assert_eq!(within("5:cpu:/a\n4:memory:/docker/123\n", folder.path()), Some(250));
        group("", [("memory.max", "90\n"), ("memory.current", "100\n"), ("memory.stat", "")]);
        assert_eq!(within("0::/job/step\n", folder.path()), Some(0), "more is used than allowed");
    }
}
