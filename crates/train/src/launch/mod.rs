//! Many processes for one run: starting them, watching them, and starting them again.
//!
//! [`Group`] is one start: N processes of this program on this machine, each told by the environment which rank it is, as
//! torchrun does. [`supervise`] makes such starts until the run is done, or until starting again is no use.
//! Neither knows what the ranks compute; they go by exit statuses:
//!
//! | status | meaning | started again |
//! |---|---|---|
//! | 0 | done, or stopped as a person asked | no |
//! | [`WRONG`] | a configuration, data or a run folder that is wrong | no |
//! | 2 | wrong usage | no |
//! | [`GAVE_UP`] | training went wrong again and again ([`GaveUp`]) | no |
//! | [`AGAIN`] | a rank was lost, a scheduler asked for the machine, or a mirror was out of reach | yes |
//! | a signal, a panic (101) | a crash | yes |

mod cores;
mod group;
mod output;
mod supervisor;

pub use group::{End, Failure, Group};
pub use supervisor::{Supervision, supervise};

use crate::checkpoint::mirror::Unreachable;
use crate::recovery::GaveUp;
use anyhow::{Context, Error, Result};
use ferropt_device::Failure as DeviceFailure;
use ferropt_mesh::Lost;
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

/// Something that the user gave is wrong.
pub const WRONG: u8 = 1;
/// Training went wrong again and again.
pub const GAVE_UP: u8 = 3;
/// Start me again: `EX_TEMPFAIL` of `sysexits.h`, the status that schedulers are told to requeue at.
pub const AGAIN: u8 = 75;

/// The status to end with for an error; of one that another rank has given up for, that rank's.
pub fn status(error: &Error) -> u8 {
    if error.chain().any(|cause| cause.is::<GaveUp>()) {
        GAVE_UP
    } else if let Some(lost) = error.chain().find_map(|cause| cause.downcast_ref::<Lost>()) {
        lost.status().unwrap_or(AGAIN)
    } else if error.chain().any(|cause| cause.is::<DeviceFailure>() || cause.is::<Unreachable>()) {
        AGAIN
    } else {
        WRONG
    }
}

/// Variable that tells a rank the process that launched it.
const LAUNCHER: &str = "FERROPT_LAUNCHER";

/// In a rank that a [`Group`] started: SIGTERM comes when the launcher dies, however it dies, so that nothing is left running.
///
/// # Errors
/// When the launcher is gone already.
pub fn end_with_launcher() -> Result<()> {
    let named = std::env::var(LAUNCHER).ok().and_then(|pid| pid.parse::<i32>().ok());
    let Some(launcher) = named else { return Ok(()) };
    set_parent_process_death_signal(Some(Signal::TERM)).context("cannot watch the launcher")?;
    let parent = getppid().map(Pid::as_raw_nonzero);
    anyhow::ensure!(
        parent.is_some_and(|parent| parent.get() == launcher),
        "the process {launcher} that launched this rank is gone"
    );
    Ok(())
}
