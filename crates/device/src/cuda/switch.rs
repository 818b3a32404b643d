//! Switches in the environment.

use anyhow::{Result, bail};

/// Whether a variable leaves on what it is about; `off` says what its 0 asks for.
///
/// # Errors
/// When it is something else than 0 or 1.
pub(super) fn is_on(variable: &str, off: &str) -> Result<bool> {
    match std::env::var(variable).as_deref() {
        Err(_) | Ok("1") => Ok(true),
        Ok("0") => Ok(false),
        Ok(other) => bail!("{variable} is {other:?}; expected 1, as when it is unset, or 0 to {off}"),
    }
}
