//! A share of the machine's cores for each rank.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Cores that this process may run on.
fn allowed() -> Vec<usize> {
    let set = sched_getaffinity(None).unwrap_or_default();
    (0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect()
}

/// Cores of rank `rank` of `ranks` out of `cores`: as many as `threads` says, else an equal share, at least one. Ranks share
/// cores only where there are too few.
fn share(cores: &[usize], rank: usize, ranks: usize, threads: Option<usize>) -> Vec<usize> {
    let each = threads.unwrap_or(cores.len() / ranks).clamp(1, cores.len().max(1));
    (0..each).filter_map(|i| cores.get((rank * each + i) % cores.len().max(1)).copied()).collect()
}

/// Calls `start` while the calling thread is bound to its rank's cores: a process that it starts inherits them.
pub(super) fn on_share<T>(rank: usize, ranks: usize, threads: Option<usize>, start: impl FnOnce() -> T) -> T {
    let all = allowed();
    bind(&share(&all, rank, ranks, threads));
    let started = start();
    bind(&all);
    started
}

/// Where the system refuses, the rank runs wherever it may.
fn bind(cores: &[usize]) {
    let mut set = CpuSet::new();
    cores.iter().for_each(|&core| set.set(core));
    if !cores.is_empty() {
        let _ = sched_setaffinity(None, &set);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_equal_and_apart_while_there_are_enough() {
        let cores: Vec<usize> = vec![0, 1, 4, 5, 6, 7, 9];
        assert_eq!(share(&cores, 0, 2, None), [0, 1, 4]);
        assert_eq!(share(&cores, 1, 2, None), [5, 6, 7]);
        assert_eq!(share(&cores, 1, 2, Some(2)), [4, 5]);
        assert_eq!(share(&[2, 3], 3, 4, None), [3], "more ranks than cores");
        assert_eq!(share(&[2, 3], 0, 1, Some(9)), [2, 3]);
        assert!(share(&[], 0, 1, None).is_empty());
    }

    #[test]
    fn the_caller_gets_its_cores_back() {
        let before = allowed();
        let during = on_share(1, 2, Some(1), allowed);
        assert_eq!(during.len(), 1);
        assert_eq!(allowed(), before);
    }
}
