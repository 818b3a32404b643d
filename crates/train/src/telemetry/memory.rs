//! Memory of this process.

/// Most memory that the process had resident at any time, in bytes, where the system tells.
pub fn peak_resident_bytes() -> Option<u64> {
    parse(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// Linux's `VmHWM` line ("high-water mark"), in kB.
fn parse(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_high_water_mark() {
        assert_eq!(parse("VmPeak:\t  200 kB\nVmHWM:\t    1234 kB\nVmRSS:\t 100 kB\n"), Some(1234 * 1024));
        assert_eq!(parse("VmRSS:\t 100 kB\n"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn grows_with_use() {
        let before = peak_resident_bytes().unwrap();
        let size = 64 << 20;
        let block = std::hint::black_box(vec![1u8; before as usize + size]);
        assert!(peak_resident_bytes().unwrap() >= before + size as u64);
        drop(block);
    }
}
