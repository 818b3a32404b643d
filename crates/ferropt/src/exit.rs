//! Exit statuses, which schedulers and supervisors act on; `docs/cluster.md` lists them.

use ferropt_device::Failure;
use ferropt_mesh::Lost;
use ferropt_train::launch::{AGAIN, GAVE_UP, WRONG};
use ferropt_train::recovery::GaveUp;

/// The status for an error.
pub(crate) fn status(error: &anyhow::Error) -> u8 {
    let is = |kind: fn(&(dyn std::error::Error + 'static)) -> bool| error.chain().any(kind);
    if is(|cause| cause.is::<GaveUp>()) {
        GAVE_UP
    } else if is(|cause| cause.is::<Lost>() || cause.is::<Failure>()) {
        AGAIN
    } else {
        WRONG
    }
}
