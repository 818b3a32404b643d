//! Energy of a run: measured where the processor tells, else estimated and marked as such.
//!
//! **Measured**: Linux's power capping interface (RAPL counters of Intel and AMD), packages plus separate DRAM zones.
//! It counts the whole machine, other processes included. Most systems let only root read it.
//! **Estimated**: processor time of this process times a constant, [`DEFAULT_WATTS_PER_CORE`] unless
//! the configuration says otherwise (`energy.watts`).
//!
//! Energy of GPUs is not counted, also of a run that computes on them: it belongs with the CUDA device, which knows which
//! GPUs the run uses.

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time between two readings by [`Meter::tick`] at least.
const TICK: Duration = Duration::from_secs(1);

/// Watts of a busy core, with its share of caches and memory: server processors of 2020 to 2024 have a design power
/// of 3.5 to 7 W per core (EPYC 9654: 360 W / 96; Xeon 8480+: 350 W / 56), laptops are within it.
pub const DEFAULT_WATTS_PER_CORE: f64 = 5.0;

/// An amount of energy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Energy {
    /// Joules.
    pub joules: f64,
    /// True when it follows, in part at least, from processor time and a constant, not from a counter.
    pub estimated: bool,
}

impl std::ops::Add for Energy {
    type Output = Energy;

    fn add(self, other: Energy) -> Energy {
        Energy { joules: self.joules + other.joules, estimated: self.estimated || other.estimated }
    }
}

/// Adds up the energy of a run.
#[derive(Debug)]
pub struct Meter {
    joules: f64,
    estimated: bool,
    source: Source,
    last_read: Instant,
}

#[derive(Debug)]
enum Source {
    Rapl(Vec<Zone>),
    Estimate { watts: f64, cpu_seconds: f64, why: String },
}

/// A RAPL counter.
#[derive(Debug)]
struct Zone {
    name: String,
    counter: PathBuf,
    /// The counter goes back to 0 after this value, in microjoules.
    range: u64,
    last: u64,
}

impl Meter {
    /// Starts counting from `already` (what the run used before it was interrupted). `watts` is the power of a busy
    /// core for the estimate. Of several processes of a run on a machine, one counts for the `whole_machine` where there are
    /// counters; estimates are of each process alone.
    pub fn start(already: Energy, watts: f64, whole_machine: bool) -> Meter {
        Meter::start_at(Path::new("/sys/class/powercap"), already, watts, whole_machine)
    }

    fn start_at(powercap: &Path, already: Energy, watts: f64, whole_machine: bool) -> Meter {
        let source = match zones(powercap) {
            Ok(zones) => Source::Rapl(if whole_machine { zones } else { Vec::new() }),
            Err(why) => Source::Estimate { watts, cpu_seconds: cpu_seconds(), why },
        };
        let measured = matches!(source, Source::Rapl(_));
        // A sum with an estimated part is an estimate.
        let estimated = !measured || (already.estimated && already.joules > 0.0);
        Meter { joules: already.joules, estimated, source, last_read: Instant::now() }
    }

    /// Energy up to now. Call it or [`Meter::tick`] at least every minute: a counter that wraps around twice in between
    /// loses one turn (262 kJ on many processors, 10 minutes at 440 W; some count 65 kJ).
    pub fn read(&mut self) -> Energy {
        self.last_read = Instant::now();
        self.joules += match &mut self.source {
            Source::Rapl(zones) => zones.iter_mut().map(Zone::advance).sum::<u64>() as f64 * 1e-6,
            Source::Estimate { watts, cpu_seconds: last, .. } => {
                let now = cpu_seconds();
                let busy = now - std::mem::replace(last, now);
                *watts * busy
            }
        };
        Energy { joules: self.joules, estimated: self.estimated }
    }

    /// Follows the counters in the middle of long work, so that none wraps around twice unseen. Call it as often as is
    /// convenient: it reads them once a second at most.
    pub fn tick(&mut self) {
        if self.last_read.elapsed() >= TICK {
            self.read();
        }
    }

    /// Where the figures come from, for the start of a run.
    pub fn describe(&self) -> String {
        match &self.source {
            Source::Rapl(zones) => {
                let names: Vec<&str> = zones.iter().map(|zone| zone.name.as_str()).collect();
                format!("measured by RAPL ({}), whole machine", names.join(", "))
            }
            Source::Estimate { watts, why, .. } => {
                format!("estimated at {watts} W per busy core ({why}); set energy.watts to what yours draws")
            }
        }
    }
}

impl Zone {
    /// Microjoules since the last call. A read that fails counts nothing now and is caught up by the next.
    fn advance(&mut self) -> u64 {
        let Ok(now) = number(&self.counter) else { return 0 };
        let last = std::mem::replace(&mut self.last, now);
        now.checked_sub(last).unwrap_or_else(|| self.range.saturating_sub(last) + now)
    }
}

/// Counters that together are the machine, each joule once: packages, and DRAM, which no package includes. Core and
/// uncore zones are parts of packages, and psys contains them.
fn zones(powercap: &Path) -> Result<Vec<Zone>, String> {
    let listing = fs::read_dir(powercap).map_err(|_| "this system has no energy counters".to_string())?;
    let mut folders: Vec<PathBuf> = listing.filter_map(|entry| Some(entry.ok()?.path())).collect();
    folders.sort();
    let mut zones = Vec::new();
    for folder in folders {
        // `intel-rapl-mmio:N` shows the same packages a second time.
        if !folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with("intel-rapl:")) {
            continue;
        }
        let Ok(name) = fs::read_to_string(folder.join("name")) else { continue };
        let name = name.trim().to_string();
        if !name.starts_with("package") && name != "dram" {
            continue;
        }
        let counter = folder.join("energy_uj");
        let last = number(&counter).map_err(|error| {
            format!("{} cannot be read: {error}; run as root to measure", counter.display())
        })?;
        let range = number(&folder.join("max_energy_range_uj")).unwrap_or(u64::from(u32::MAX));
        zones.push(Zone { name, counter, range, last });
    }
    if zones.is_empty() { Err("this system has no energy counters".into()) } else { Ok(zones) }
}

fn number(path: &Path) -> std::io::Result<u64> {
    let text = fs::read_to_string(path)?;
    text.trim().parse().map_err(std::io::Error::other)
}

/// Processor time of all threads of this process.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone(root: &Path, folder: &str, name: &str, microjoules: u64) {
        let folder = root.join(folder);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("name"), format!("{name}\n")).unwrap();
        fs::write(folder.join("energy_uj"), format!("{microjoules}\n")).unwrap();
        fs::write(folder.join("max_energy_range_uj"), "262143328850\n").unwrap();
    }

    #[test]
    fn adds_packages_and_dram_once_and_wraps_around() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        zone(root, "intel-rapl:0", "package-0", 262_143_000_000);
        zone(root, "intel-rapl:0:0", "core", 1);
        zone(root, "intel-rapl:0:1", "dram", 5_000_000);
        zone(root, "intel-rapl:1", "psys", 1);
        zone(root, "intel-rapl-mmio:0", "package-0", 1);
        fs::create_dir(root.join("intel-rapl")).unwrap();
        let mut meter = Meter::start_at(root, Energy { joules: 100.0, estimated: false }, 5.0, true);
        assert_eq!(meter.describe(), "measured by RAPL (package-0, dram), whole machine");
        assert_eq!(meter.read(), Energy { joules: 100.0, estimated: false });

        zone(root, "intel-rapl:0", "package-0", 2_000_000); // 0.32885 J to the end of the range, and 2 J
        zone(root, "intel-rapl:0:0", "core", 9_000_000);
        zone(root, "intel-rapl:0:1", "dram", 6_500_000);
        zone(root, "intel-rapl:1", "psys", 9_000_000);
        let energy = meter.read();
        assert!((energy.joules - (100.0 + 2.32885 + 1.5)).abs() < 1e-9, "{energy:?}");

        // A failed read is caught up.
        fs::write(root.join("intel-rapl:0/energy_uj"), "?").unwrap();
        assert_eq!(meter.read(), energy);
        zone(root, "intel-rapl:0", "package-0", 7_000_000);
        assert!((meter.read().joules - energy.joules - 5.0).abs() < 1e-9);
    }

    #[test]
    fn ticks_see_every_turn_of_a_counter() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        zone(root, "intel-rapl:0", "package-0", 262_143_000_000);
        let mut meter = Meter::start_at(root, Energy::default(), 5.0, true);
        for turn in 0..3 {
            let joules = f64::from(turn) * 262_143.328_850;
            for (microjoules, more) in [(262_143_000_000, 0.0), (2_000_000, 2.328_850)] {
                let before = meter.joules;
                zone(root, "intel-rapl:0", "package-0", microjoules);
                meter.last_read = Instant::now() + 100 * TICK;
                meter.tick();
                assert_eq!(meter.joules, before, "a second has not passed");
                meter.last_read = Instant::now() - TICK;
                meter.tick();
                assert!((meter.joules - joules - more).abs() < 1e-3, "{turn}: {}", meter.joules);
            }
        }
    }

    #[test]
    fn estimates_from_processor_time_where_there_is_no_counter() {
        let root = tempfile::tempdir().unwrap();
        let mut meter = Meter::start_at(&root.path().join("none"), Energy::default(), 1000.0, true);
        assert!(meter.describe().contains("estimated at 1000 W per busy core"), "{}", meter.describe());
        let before = cpu_seconds();
        while cpu_seconds() < before + 0.05 {
            std::hint::black_box(before);
        }
        let energy = meter.read();
        assert!(energy.estimated && energy.joules >= 50.0, "{energy:?}");
    }

    #[test]
    fn a_machine_is_counted_once() {
        let root = tempfile::tempdir().unwrap();
        let meters = [true, false].map(|whole_machine| {
            zone(root.path(), "intel-rapl:0", "package-0", 0);
            Meter::start_at(root.path(), Energy::default(), 5.0, whole_machine)
        });
        zone(root.path(), "intel-rapl:0", "package-0", 3_000_000);
        let read = meters.map(|mut meter| meter.read());
        assert_eq!(read, [3.0, 0.0].map(|joules| Energy { joules, estimated: false }));
    }

    #[test]
    fn an_unreadable_counter_says_so() {
        let root = tempfile::tempdir().unwrap();
        zone(root.path(), "intel-rapl:0", "package-0", 1);
        fs::write(root.path().join("intel-rapl:0/energy_uj"), "no number").unwrap();
        let meter = Meter::start_at(root.path(), Energy::default(), 5.0, true);
        assert!(meter.describe().contains("energy_uj cannot be read"), "{}", meter.describe());
    }

    #[test]
    fn a_sum_with_an_estimated_part_is_an_estimate() {
        let root = tempfile::tempdir().unwrap();
        zone(root.path(), "intel-rapl:0", "package-0", 1);
        let mut meter = Meter::start_at(root.path(), Energy { joules: 7.0, estimated: true }, 5.0, true);
        assert_eq!(meter.read(), Energy { joules: 7.0, estimated: true });
    }
}
