//! What each of several ranks on a machine takes of it: threads, and a GPU.

use super::containers::{self, Container};
use anyhow::{Context, Result};
use ferropt_device::Which;
use ferropt_device::cuda::CudaDevice;
use ferropt_mesh::{Group, Label};
use rustix::thread::sched_getaffinity;

/// Threads of this rank, unless the user says how many: its part of the cores that it may run on, which it shares with the
/// ranks of the same machine that may run on the same ones. Who starts ranks with cores of their own is thus believed. Of the
/// processor time of each container around it, it takes its part among the ranks in that container.
///
/// # Errors
/// When a rank is lost.
pub(super) fn threads(all: &Group, wanted: Option<usize>) -> Result<Option<usize>> {
    if all.size() == 1 {
        return Ok(wanted);
    }
    let (mine, containers) = (place(), containers::around("cpu"));
    let places = all.gather_bytes(Label::new("cores"), mine.as_bytes())?;
    let sharing = places.iter().filter(|place| **place == mine.as_bytes()).count();
    let ids: Vec<&str> = containers.iter().map(|container| &*container.id).collect();
    let told = all.gather_bytes(Label::new("containers"), &serde_json::to_vec(&ids)?)?;
    let told: Vec<Vec<String>> = told
        .iter()
        .map(|told| serde_json::from_slice(told))
        .collect::<Result<_, _>>()
        .context("a rank told something unknown")?;
    let limit = |container: &Container| {
        let together = told.iter().filter(|ids| ids.contains(&container.id)).count();
        Some((container.cores()?, together))
    };
    let limits: Vec<(usize, usize)> = containers.iter().filter_map(limit).collect();
    let cores = sched_getaffinity(None).map_or(1, |set| set.count() as usize);
    Ok(wanted.or(Some(part(cores, sharing, &limits))))
}

/// Threads for one of so many ranks that share this process's cores, and all containers around it.
pub(super) fn among(ranks: usize) -> usize {
    let cores = sched_getaffinity(None).map_or(1, |set| set.count() as usize);
    let limits = containers::around("cpu");
    let limits: Vec<_> = limits.iter().filter_map(|container| Some((container.cores()?, ranks))).collect();
    part(cores, ranks, &limits)
}

/// Threads for one of so many ranks that are `sharing` the same cores, in containers that may each keep so many cores busy, with so
/// many ranks in them.
fn part(cores: usize, sharing: usize, limits: &[(usize, usize)]) -> usize {
    let limits = limits.iter().map(|(cores, together)| cores / together.max(&1));
    limits.fold(cores / sharing.max(1), usize::min).max(1)
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

#[cfg(test)]
mod tests {
    use super::*;
    use ferropt_mesh::{Mesh, World};

    #[test]
    fn ranks_of_a_machine_share_its_cores() {
        let limits: Vec<_> = containers::around("cpu").iter().filter_map(|c| Some((c.cores()?, 3))).collect();
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
            assert_eq!(rank.join().unwrap(), (Some(part(cores, 3, &limits)), Some(7)));
        }
        assert_eq!(threads(&Mesh::solo().all, None).unwrap(), None);
        // Alone, a rank takes what it is told, without a look at what there is.
        assert_eq!(device(&Mesh::solo().all, Which::Cuda(3)).unwrap(), Which::Cuda(3));
    }

    #[test]
    fn a_containers_time_is_shared_among_its_own_ranks() {
        assert_eq!(part(16, 4, &[(4, 1)]), 4, "four containers of 4 processors each on 16 cores");
        assert_eq!(part(16, 4, &[(4, 4)]), 1, "four ranks in one");
        assert_eq!(part(16, 4, &[(6, 1), (8, 4)]), 2, "four ranks of a job, each in a container of its own");
        assert_eq!(part(16, 4, &[]), 4, "no limit");
        assert_eq!(part(4, 1, &[]), 4, "cores of their own");
        assert_eq!(part(2, 3, &[(2, 3)]), 1, "too few cores");
    }
}
