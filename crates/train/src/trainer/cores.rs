//! How many threads each of several ranks on a machine takes.

use anyhow::Result;
use ferropt_mesh::{Group, Label};
use std::num::NonZero;

/// Threads of this rank, unless the user says how many: its part of the cores that it may run on, which it shares with the
/// ranks of the same machine that may run on the same ones. Who starts ranks with cores of their own is thus believed.
///
/// # Errors
/// When a rank is lost.
pub(super) fn threads(all: &Group, wanted: Option<usize>) -> Result<Option<usize>> {
    if all.size() == 1 {
        return Ok(wanted);
    }
    let mine = place();
    let places = all.gather_bytes(Label::new("cores"), mine.as_bytes())?;
    let sharing = places.iter().filter(|place| **place == mine.as_bytes()).count();
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    Ok(wanted.or(Some((cores / sharing.max(1)).max(1))))
}

/// What names this machine, as it runs now, and the cores that this process may run on.
fn place() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let status = read("/proc/self/status");
    let cores = status.lines().find(|line| line.starts_with("Cpus_allowed_list")).unwrap_or_default();
    format!("{} {cores}", read("/proc/sys/kernel/random/boot_id").trim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferropt_mesh::{Mesh, World};

    #[test]
    fn ranks_of_a_machine_share_its_cores() {
        let cores = std::thread::available_parallelism().unwrap().get();
        let ranks: Vec<_> = World::local(3)
            .unwrap()
            .into_iter()
            .map(|world| {
                std::thread::spawn(move || {
                    let all = world.group(&[0, 1, 2], "all").unwrap();
                    (threads(&all, None).unwrap(), threads(&all, Some(7)).unwrap())
                })
            })
            .collect();
        for rank in ranks {
            assert_eq!(rank.join().unwrap(), (Some((cores / 3).max(1)), Some(7)));
        }
        assert_eq!(threads(&Mesh::solo().all, None).unwrap(), None);
    }
}
