//! Exit statuses, which schedulers and supervisors act on; `docs/cluster.md` lists them.

use ferropt_train::launch::{GAVE_UP, WRONG};
use ferropt_train::recovery::GaveUp;

/// The status for an error.
pub(crate) fn status(error: &anyhow::Error) -> u8 {
    if error.chain().any(|cause| cause.is::<GaveUp>()) { GAVE_UP } else { WRONG }
}
