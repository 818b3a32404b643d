//! Exit statuses, which schedulers and supervisors act on; `docs/cluster.md` lists them.

use ferropt_train::recovery::GaveUp;
use std::process::ExitCode;

/// Training went wrong again and again; starting again would not help.
pub(crate) const GAVE_UP: u8 = 3;

/// The status that says how it ended: 1, or one that says more.
pub(crate) fn code(error: &anyhow::Error) -> ExitCode {
    if error.chain().any(|cause| cause.is::<GaveUp>()) { ExitCode::from(GAVE_UP) } else { ExitCode::FAILURE }
}
