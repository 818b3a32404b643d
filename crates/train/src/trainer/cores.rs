//! How many threads each of several ranks on a machine takes.

use anyhow::Result;
use ferropt_mesh::{Label, World};
use std::num::NonZero;

/// Threads of this rank, unless the user says how many: its part of the cores that it may run on, which it shares with the
/// ranks of the same machine that may run on the same ones. Who starts ranks with cores of their own is thus believed.
///
/// # Errors
/// When a rank is lost.
pub(super) fn threads(world: &World, wanted: Option<usize>) -> Result<Option<usize>> {
    if world.size() == 1 {
        return Ok(wanted);
    }
    let members: Vec<usize> = (0..world.size()).collect();
    let mine = place();
    let places = world.group(&members, "all")?.gather_bytes(Label::new("cores"), mine.as_bytes())?;
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

    #[test]
    fn ranks_of_a_machine_share_its_cores() {
        let cores = std::thread::available_parallelism().unwrap().get();
        let ranks: Vec<_> = World::local(3)
            .unwrap()
            .into_iter()
            .map(|world| {
                std::thread::spawn(move || {
                    (threads(&world, None).unwrap(), threads(&world, Some(7)).unwrap())
                })
            })
            .collect();
        for rank in ranks {
            assert_eq!(rank.join().unwrap(), (Some((cores / 3).max(1)), Some(7)));
        }
        assert_eq!(threads(&World::solo(), None).unwrap(), None);
    }
}
