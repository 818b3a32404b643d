//! The error of a rank that cannot go on because of another.

use std::fmt;

/// Longest reason that is told and believed.
pub(crate) const LONGEST_REASON: usize = 1 << 16;
/// Bytes in front of the reason, where it is told to other ranks: a status and a rank.
const NUMBERS: usize = 16;
/// Neither of them.
const NONE: u64 = u64::MAX;

/// Another rank is lost or cannot be reached, or has given up; the text says which, and what it was doing. Nothing is wrong with
/// this rank. Unless the other one said that it ends with a [`status`](Lost::status) of its own, starting all of them again may
/// help: a program can tell this from other errors by `error.chain()`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    reason: String,
    status: Option<u8>,
    rank: Option<usize>,
}

impl Lost {
    /// For a reason that is nobody's choice.
    pub(crate) fn new(reason: String) -> Lost {
        Lost { reason, status: None, rank: None }
    }

    /// A rank is gone, silent, or stuck.
    pub(crate) fn of(rank: usize, reason: String) -> Lost {
        Lost { rank: Some(rank), ..Lost::new(reason) }
    }

    /// A rank gives up, and ends with a status.
    pub(crate) fn chosen(reason: String, status: u8) -> Lost {
        Lost { status: Some(status), ..Lost::new(reason) }
    }

    /// The same in other words.
    pub(crate) fn retold(self, say: impl FnOnce(&str) -> String) -> Lost {
        Lost { reason: say(&self.reason), ..self }
    }

    /// The exit status of the rank that gave up; none where a rank is lost.
    pub fn status(&self) -> Option<u8> {
        self.status
    }

    /// The rank that is gone or stuck, and will not do anything any more.
    pub fn rank(&self) -> Option<usize> {
        self.rank
    }

    /// What other ranks are told.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let status = self.status.map_or(NONE, u64::from);
        let rank = self.rank.map_or(NONE, |rank| rank as u64);
        let text = self.reason.as_bytes();
        [&status.to_le_bytes(), &rank.to_le_bytes(), &text[..text.len().min(LONGEST_REASON - NUMBERS)]]
            .concat()
    }

    /// What another rank told.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Lost {
        let number = |place: usize| {
            let bytes = bytes.get(place..place + 8)?.try_into().ok()?;
            Some(u64::from_le_bytes(bytes)).filter(|number| *number != NONE)
        };
        Lost {
            reason: String::from_utf8_lossy(bytes.get(NUMBERS..).unwrap_or_default()).into_owned(),
            status: number(0).and_then(|status| status.try_into().ok()),
            rank: number(8).and_then(|rank| rank.try_into().ok()),
        }
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Lost {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_comes_back() {
        for lost in [
            Lost::new("the cable".into()),
            Lost::of(7, "rank 7 is gone".into()),
            Lost::chosen("no such file".into(), 1),
            Lost::chosen(String::new(), 75).retold(|reason| format!("rank 3 gave up: {reason}")),
        ] {
            assert_eq!(Lost::from_bytes(&lost.to_bytes()), lost);
        }
        assert_eq!(Lost::from_bytes(b"short"), Lost::new(String::new()));
        assert_eq!(Lost::new("x".repeat(2 * LONGEST_REASON)).to_bytes().len(), LONGEST_REASON);
    }
}
