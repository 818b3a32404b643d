//! What a transfer is of, for people.

use std::fmt;

/// What a collective operation is of: "layer 7". Both ends of a transfer must agree on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// Of what.
    pub what: &'static str,
    /// Which one, where there are several.
    pub index: Option<usize>,
}

impl Label {
    /// Of the only thing of that name.
    pub const fn new(what: &'static str) -> Label {
        Label { what, index: None }
    }

    /// Of one of many.
    pub const fn of(what: &'static str, index: usize) -> Label {
        Label { what, index: Some(index) }
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.index {
            None => f.write_str(self.what),
            Some(index) => write!(f, "{} {index}", self.what),
        }
    }
}

/// A collective operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// Every rank gets the parts of all.
    AllGather,
    /// Every rank gets its part of a sum.
    ReduceScatter,
    /// Every rank gets a sum.
    AllReduce,
    /// Every rank gets what one has.
    Broadcast,
    /// One rank gets what another has.
    Send,
    /// Every rank gets a few numbers or bytes of all.
    Gather,
}

impl Operation {
    pub(crate) const ALL: [Operation; 6] = [
        Operation::AllGather,
        Operation::ReduceScatter,
        Operation::AllReduce,
        Operation::Broadcast,
        Operation::Send,
        Operation::Gather,
    ];

    /// Name for people.
    pub fn name(self) -> &'static str {
        match self {
            Operation::AllGather => "all-gather",
            Operation::ReduceScatter => "reduce-scatter",
            Operation::AllReduce => "all-reduce",
            Operation::Broadcast => "broadcast",
            Operation::Send => "transfer",
            Operation::Gather => "gathering",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
