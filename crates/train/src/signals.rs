//! Ctrl-C, SIGTERM and SIGHUP: the first asks for a clean stop, a second Ctrl-C or SIGTERM ends the process at once.

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A request to stop after the current step, with everything saved.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    requested: Arc<AtomicBool>,
    /// Whether it was SIGTERM or SIGHUP that asked.
    terminated: Arc<AtomicBool>,
    /// Whether signals make the request already.
    by_signals: Arc<AtomicBool>,
}

impl Stop {
    /// Lets SIGINT, SIGTERM and SIGHUP make the request. The second SIGINT or SIGTERM exits with the code a shell expects
    /// (128 + signal); nothing that was saved is lost by that, since checkpoints are renamed into place when whole. SIGHUP
    /// comes once or twice when a terminal or connection is closed, unless `nohup` started the program.
    ///
    /// # Errors
    /// When the system refuses a handler.
    pub fn on_signals(&self) -> Result<()> {
        self.register(&[SIGINT, SIGTERM])
    }

    /// The same for a part of a job, where SIGTERM may come any number of times: a scheduler sends it to all processes, and a
    /// launcher passes it on to them too. Only SIGINT, from a keyboard, is taken as impatience.
    ///
    /// # Errors
    /// When the system refuses a handler.
    pub fn on_signals_of_a_job(&self) -> Result<()> {
        self.register(&[SIGINT])
    }

    /// `impatient` signals exit when the request was made before.
    fn register(&self, impatient: &[i32]) -> Result<()> {
        if self.by_signals.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let register = || -> std::io::Result<()> {
            for signal in impatient {
                // In this order: the first signal finds the flag down, so that only the second exits.
                flag::register_conditional_shutdown(*signal, 128 + signal, self.requested.clone())?;
            }
            let hung_up = (!ignored(SIGHUP)).then_some(SIGHUP);
            for signal in hung_up.into_iter().chain([SIGTERM]) {
                flag::register(signal, self.terminated.clone())?;
                flag::register(signal, self.requested.clone())?;
            }
            flag::register(SIGINT, self.requested.clone())?;
            Ok(())
        };
        register().context("cannot install the handlers of SIGINT, SIGTERM and SIGHUP")
    }

    /// Asks for the stop.
    pub fn request(&self) {
        self.requested.store(true, Ordering::Relaxed);
    }

    /// Whether somebody asked.
    pub fn requested(&self) -> bool {
        self.requested.load(Ordering::Relaxed)
    }

    /// Whether SIGTERM or SIGHUP asked: a scheduler that wants the machine or a connection that is gone, rather than a person
    /// at the keyboard.
    pub fn terminated(&self) -> bool {
        self.terminated.load(Ordering::Relaxed)
    }
}

/// Whether whoever started this process made it deaf to a signal, as `nohup` does to SIGHUP. Where the system does not say
/// so, it may be.
fn ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_none_or(|mask| mask >> (signal - 1) & 1 == 1)
}

/// Ctrl-C that interrupts what is being done, or ends the program while nothing is.
#[derive(Clone, Debug)]
pub struct Interrupt {
    idle: Arc<AtomicBool>,
    asked: Arc<AtomicBool>,
}

impl Interrupt {
    /// Takes over SIGINT. At first nothing is being done.
    ///
    /// # Errors
    /// When the system refuses a handler.
    pub fn new() -> Result<Interrupt> {
        let (idle, asked) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
        flag::register_conditional_default(SIGINT, idle.clone())
            .and_then(|_| flag::register(SIGINT, asked.clone()))
            .context("cannot install the handler of SIGINT")?;
        Ok(Interrupt { idle, asked })
    }

    /// Something is begun, which Ctrl-C will interrupt.
    pub fn begin(&self) {
        self.asked.store(false, Ordering::Relaxed);
        self.idle.store(false, Ordering::Relaxed);
    }

    /// It is over.
    pub fn end(&self) {
        self.idle.store(true, Ordering::Relaxed);
    }

    /// Whether it was interrupted.
    pub fn asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }
}
