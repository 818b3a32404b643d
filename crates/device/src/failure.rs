//! Failures of a device in the middle of its work.
//!
//! Operations return nothing. A processor's cannot fail, and a check behind each of a step's hundreds would be in everybody's
//! way; but a GPU can be lost, or a kernel crash, and nothing that was computed can be trusted then. So the operation that
//! notices unwinds, past everything that was to use its results, to whoever called [`failures`], for whom it is an error like
//! any other. Nothing is printed on the way.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// What a device failed of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure(String);

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

/// Ends the operation under way.
pub(crate) fn fail(reason: String) -> ! {
    resume_unwind(Box::new(Failure(reason)))
}

/// Calls `work`. What it was about to change may be half done when it fails.
///
/// # Errors
/// Those of `work`, and [`Failure`] if a device fails on the way.
pub fn failures<R>(work: impl FnOnce() -> anyhow::Result<R>) -> anyhow::Result<R> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result,
        Err(panic) => match panic.downcast::<Failure>() {
            Ok(failure) => Err(anyhow::Error::new(*failure)),
            Err(panic) => resume_unwind(panic),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_an_error_and_a_panic_stays_one() {
        let error = failures(|| -> anyhow::Result<()> { fail("the GPU is lost".into()) }).unwrap_err();
        assert_eq!(error.downcast_ref::<Failure>(), Some(&Failure("the GPU is lost".into())));
        assert_eq!(failures(|| Ok(3)).unwrap(), 3);
        assert_eq!(
            failures(|| -> anyhow::Result<()> { anyhow::bail!("other") }).unwrap_err().to_string(),
            "other"
        );
        let panic = catch_unwind(|| failures(|| -> anyhow::Result<()> { resume_unwind(Box::new(7)) }));
        assert_eq!(panic.unwrap_err().downcast_ref::<i32>(), Some(&7));
    }
}
