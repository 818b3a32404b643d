//! Kills at random moments, each resumed: the final weights are those of a run that was never killed, to the bit.

mod lab;

use lab::{Lab, train};
use std::process::Stdio;
use std::time::{Duration, Instant};

const STEPS: u64 = 150;

/// Seconds from the start of the program to its first step: most of it measures the processor's peak.
const START: f64 = 0.3;

/// `FERROPT_KILLS` sets how many; `scripts/kill-test` runs twenty.
#[test]
fn killed_and_resumed_is_bit_identical() {
    let kills: u32 =
        std::env::var("FERROPT_KILLS").ok().map_or(5, |n| n.parse().expect("FERROPT_KILLS is a number"));
    let lab = Lab::new();
    let started = Instant::now();
    lab.train(&lab.config("whole", STEPS), &[]);
    let whole = started.elapsed();

    let config = lab.config("killed", STEPS);
    let seed = std::env::var("FERROPT_SEED").ok().and_then(|s| s.parse().ok());
    let mut state: u64 = seed.unwrap_or_else(|| std::process::id().into());
    println!("{kills} kills, FERROPT_SEED={state}; an uninterrupted run takes {whole:.1?}");
    let same = |why: &str| assert!(lab.tensors("killed", STEPS) == lab.tensors("whole", STEPS), "{why}");
    // On average the kills together use up one run's time, so that one run survives nearly all of them; and each start
    // takes a moment before its first step.
    let longest = (2 * whole / kills.max(1)).as_secs_f64() + 2.0 * START;
    let mut done = 0;
    while done < kills {
        let mut child = train(&config, &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        std::thread::sleep(Duration::from_secs_f64(longest * (state >> 11) as f64 / (1u64 << 53) as f64));
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "resuming failed: {status}");
            same("a run that finished between kills has other bits");
            std::fs::remove_dir_all(lab.path("killed")).unwrap();
        } else {
            child.kill().unwrap();
            child.wait().unwrap();
            done += 1;
            let saved = lab.path("killed/checkpoints");
            let saved = std::fs::read_dir(saved).map_or(0, |list| list.filter(|e| e.is_ok()).count());
            println!("kill {done}: {} lines of metrics, {saved} entries in checkpoints", lab.told("killed"));
        }
    }
    lab.train(&config, &[]);
    same("the resumed run has other bits");
}
