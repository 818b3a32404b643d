//! Control groups, by which containers, jobs and services limit what their processes take. A group's limit is for all that is in
//! it and in the groups below it together.

use super::cores;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A control group that this process is in, or one around that.
pub(super) struct Container {
    /// The same for all processes in it, whatever name they see it by, and no other group's on any machine.
    pub(super) id: String,
    folder: PathBuf,
    /// Whether its files are those of the second version of control groups.
    second: bool,
}

/// Those that may limit a resource, "memory" or "cpu".
pub(super) fn around(resource: &str) -> Vec<Container> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    find(&groups, Path::new("/sys/fs/cgroup"), resource)
}

/// Those that `/proc/self/cgroup` names, and those around them. In a container what it names may lie outside of what is mounted;
/// the container's own group is then the root.
fn find(groups: &str, mounted: &Path, resource: &str) -> Vec<Container> {
    let around = |line: &str| -> Option<Vec<Container>> {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
        let second = controllers.is_empty();
        let root = match second {
            true => mounted.to_path_buf(),
            false if controllers.split(',').any(|name| name == resource) => mounted.join(resource),
            false => return None,
        };
        let all = Path::new(path).ancestors();
        Some(all.filter_map(|group| Container::at(root.join(group), second)).collect())
    };
    groups.lines().filter_map(around).flatten().collect()
}

impl Container {
    fn at(folder: PathBuf, second: bool) -> Option<Container> {
        let found = fs::metadata(&folder).ok()?;
        let id = format!("{} {} {}", cores::machine(), found.dev(), found.ino());
        Some(Container { id, folder, second })
    }

    /// Bytes that can still be taken in it, where they are limited. Pages of files that are not in use are given up for what is
    /// asked for.
    pub(super) fn free_memory(&self) -> Option<u64> {
        let [limit, usage, inactive] = match self.second {
            true => ["memory.max", "memory.current", "inactive_file"],
            false => ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"],
        };
        let number = |file: &str| self.read(file)?.trim().parse::<u64>().ok();
        let (limit, usage) = (number(limit)?, number(usage)?);
        let statistics = self.read("memory.stat").unwrap_or_default();
        let inactive =
            statistics.lines().find_map(|line| line.strip_prefix(inactive)?.trim().parse::<u64>().ok());
        Some(limit.saturating_sub(usage.saturating_sub(inactive.unwrap_or(0))))
    }

    /// Cores that all in it may keep busy, where they are limited.
    pub(super) fn cores(&self) -> Option<usize> {
        let text = match self.second {
            true => self.read("cpu.max")?,
            false => format!("{} {}", self.read("cpu.cfs_quota_us")?.trim(), self.read("cpu.cfs_period_us")?),
        };
        let (quota, period) = text.trim().split_once(' ')?;
        quota.parse::<usize>().ok()?.checked_div(period.parse().ok()?)
    }

    fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.folder.join(file)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_that_of_its_group_and_of_all_around_it() {
        let folder = tempfile::tempdir().unwrap();
        let group = |path: &str, files: &[(&str, &str)]| {
            let path = folder.path().join(path);
            fs::create_dir_all(&path).unwrap();
            files.iter().for_each(|(file, text)| fs::write(path.join(file), text).unwrap());
        };
        let of = |groups: &str, resource: &str| find(groups, folder.path(), resource);
        let memory =
            |groups: &str| -> Vec<_> { of(groups, "memory").iter().map(Container::free_memory).collect() };
        let cores = |groups: &str| -> Vec<_> { of(groups, "cpu").iter().map(Container::cores).collect() };
        let stat = "anon 10\ninactive_file 30\nactive_file 5\n";
        let used = |limit| [("memory.max", limit), ("memory.current", "400\n"), ("memory.stat", stat)];
        group("job", &used("1000\n"));
        group("job", &[("cpu.max", "850000 100000\n")]);
        group("job/one", &used("max\n"));
        group("job/one", &[("cpu.max", "max 100000\n")]);
        group("job/two", &[]);
        assert_eq!(memory("0::/job/one\n"), [None, Some(630), None]);
        assert_eq!(cores("0::/job/one\n"), [None, Some(8), None]);
        assert_eq!(memory("0::/elsewhere\n"), [None]);
        let ids = |groups| -> Vec<_> { of(groups, "cpu").into_iter().map(|group| group.id).collect() };
        let (one, two) = (ids("0::/job/one\n"), ids("0::/job/two\n"));
        assert!(one[0] != two[0] && one[1..] == two[1..], "they share the job: {one:?}, {two:?}");
        // A container of the first version sees its own group as the root, whatever its name is outside.
        group(
            "memory",
            &[
                ("memory.limit_in_bytes", "300\n"),
                ("memory.usage_in_bytes", "100\n"),
                ("memory.stat", "inactive_file 1\ntotal_inactive_file 50\n"),
            ],
        );
        group("cpu", &[("cpu.cfs_quota_us", "200000\n"), ("cpu.cfs_period_us", "100000\n")]);
        let first = "5:cpu,cpuacct:/docker/123\n4:memory:/docker/123\n";
        assert_eq!((memory(first), cores(first)), (vec![Some(250)], vec![Some(2)]));
        group("cpu", &[("cpu.cfs_quota_us", "-1\n")]);
        assert_eq!(cores(first), [None]);
        group("", &[("memory.max", "90\n"), ("memory.current", "100\n"), ("memory.stat", "")]);
        assert_eq!(memory("0::/job/one\n")[2], Some(0), "more is used than allowed");
    }
}
