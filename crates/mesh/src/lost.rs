//! The error of a rank that is lost.

use std::fmt;

/// Another rank is lost or cannot be reached; the text says which, and what it was doing. Nothing is wrong with this rank, and
/// starting all of them again may help: a program can tell this from other errors by `error.chain()`.
#[derive(Debug)]
pub struct Lost(pub String);

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Lost {}
