//! What each of several ranks on a machine takes of it: threads, and a GPU.

use anyhow::Result;
use ferropt_device::Which;
use ferropt_device::cuda::CudaDevice;
use ferropt_mesh::{Group, Label};
use rustix::thread::sched_getaffinity;
use std::num::NonZero;

/// Threads of this rank, unless the user says how many: its part of the cores that it may run on, which it shares with the
/// ranks of the same machine that may run on the same ones. Who starts ranks with cores of their own is thus believed. Of a
/// container's processor time it takes its part among the ranks in that container.
///
/// # Errors
/// When a rank is lost.
pub(super) fn threads(all: &Group, wanted: Option<usize>) -> Result<Option<usize>> {
    if all.size() == 1 {
        return Ok(wanted);
    }
    let share = [("cores", place()), ("containers", container())].map(|(what, mine)| {
        let told = all.gather_bytes(Label::new(what), mine.as_bytes())?;
        anyhow::Ok(told.iter().filter(|told| **told == mine.as_bytes()).count())
    });
    let [sharing, together] = share;
    let cores = sched_getaffinity(None).map_or(1, |set| set.count() as usize);
    let allowed = std::thread::available_parallelism().map_or(1, NonZero::get);
    Ok(wanted.or(Some(part(cores, sharing?, allowed, together?))))
}

/// Threads for one of so many ranks that are `sharing` the same cores, and are `together` in a container that is `allowed` to keep
/// so many cores busy, if that is fewer.
fn part(cores: usize, sharing: usize, allowed: usize, together: usize) -> usize {
    let quota = if allowed < cores { allowed / together.max(1) } else { cores };
    (cores / sharing.max(1)).min(quota).max(1)
}

/// The device of this rank. Of a machine's GPUs, from the wanted one on, each of its ranks takes the next one that it sees; where
/// there are fewer than ranks, or a rank was given one of its own, they begin again.
///
/// # Errors
/// When NVIDIA's driver is missing, or a rank is lost.
pub(super) fn device(all: &Group, wanted: Which) -> Result<Which> {
    let Which::Cuda(first) = wanted else { return Ok(wanted) };
    if all.size() == 1 {
        return Ok(wanted);
    }
    Ok(Which::Cuda((first + before(all)?) % CudaDevice::count()?.max(1)))
}

/// Whether no rank before this one is on its machine.
///
/// # Errors
/// When a rank is lost.
pub(super) fn first_here(all: &Group) -> Result<bool> {
    Ok(before(all)? == 0)
}

/// Ranks before this one that are on its machine.
fn before(all: &Group) -> Result<usize> {
    let mine = machine();
    let machines = all.gather_bytes(Label::new("machines"), mine.as_bytes())?;
    Ok(machines[..all.rank()].iter().filter(|machine| **machine == mine.as_bytes()).count())
}

/// What names this machine, as it runs now.
pub(super) fn machine() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_string()
}

/// This machine, and the cores of it that this process may run on.
fn place() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let cores = status.lines().find(|line| line.starts_with("Cpus_allowed_list")).unwrap_or_default();
    format!("{} {cores}", machine())
}

/// This machine, and the group whose limits this process is under: a namespace of its own in most containers.
pub(super) fn container() -> String {
    let namespace = std::fs::read_link("/proc/self/ns/cgroup").unwrap_or_default();
    let group = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    format!("{} {} {group}", machine(), namespace.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferropt_mesh::{Mesh, World};

    #[test]
    fn ranks_of_a_machine_share_its_cores() {
        let allowed = std::thread::available_parallelism().unwrap().get();
        let cores = sched_getaffinity(None).unwrap().count() as usize;
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
            assert_eq!(rank.join().unwrap(), (Some(part(cores, 3, allowed, 3)), Some(7)));
        }
        assert_eq!(threads(&Mesh::solo().all, None).unwrap(), None);
        // Alone, a rank takes what it is told, without a look at what there is.
        assert_eq!(device(&Mesh::solo().all, Which::Cuda(3)).unwrap(), Which::Cuda(3));
    }

    #[test]
    fn a_containers_time_is_shared_among_its_own_ranks() {
        assert_eq!(part(16, 4, 4, 1), 4, "four containers of 4 processors each on 16 cores");
        assert_eq!(part(16, 4, 4, 4), 1, "four ranks in one");
        assert_eq!(part(16, 4, 16, 4), 4, "no limit");
        assert_eq!(part(4, 1, 4, 4), 4, "no limit that shows, and cores of their own");
        assert_eq!(part(2, 3, 2, 3), 1, "too few cores");
    }
}
