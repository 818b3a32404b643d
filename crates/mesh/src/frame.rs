//! What goes over a connection: frames, each a header and a payload.

use crate::label::{Label, Operation};
use ferropt_device::DType;

/// Bytes of a header.
pub(crate) const HEADER: usize = 96;
/// Bytes of the names in it.
const NAME: usize = 32;

/// All types of elements.
const DTYPES: [DType; 5] = [DType::F32, DType::Bf16, DType::U32, DType::I16, DType::F16];

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A part of an operation.
    Data(Operation),
    /// The sender lives; the label is what it does, and the group the rank that it waits for, if it does.
    Beat,
    /// The sender gives up; the payload says why.
    Abandon,
    /// The sender is done, and no frame follows.
    Bye,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Kind::Data(operation) => operation as u8,
            Kind::Beat => 100,
            Kind::Abandon => 101,
            Kind::Bye => 102,
        }
    }

    fn of(code: u8) -> Option<Kind> {
        match code {
            100 => Some(Kind::Beat),
            101 => Some(Kind::Abandon),
            102 => Some(Kind::Bye),
            code => Operation::ALL.into_iter().find(|o| *o as u8 == code).map(Kind::Data),
        }
    }
}

/// Beginning of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    /// Bytes of the payload.
    pub(crate) len: u64,
    /// Type of its elements; none of plain bytes.
    pub(crate) dtype: Option<DType>,
    /// Name of the group.
    pub(crate) group: String,
    /// The label.
    pub(crate) label: String,
}

impl Header {
    pub(crate) fn data(
        operation: Operation,
        group: &str,
        label: Label,
        dtype: Option<DType>,
        len: usize,
    ) -> Header {
        Header {
            dtype,
            kind: Kind::Data(operation),
            len: len as u64,
            group: shortened(group),
            label: shortened(&label.to_string()),
        }
    }

    pub(crate) fn control(kind: Kind, label: &str, len: usize) -> Header {
        Header { kind, len: len as u64, dtype: None, group: String::new(), label: shortened(label) }
    }

    pub(crate) fn beat(doing: &str, waits: Option<usize>) -> Header {
        let group = waits.map(|rank| rank.to_string()).unwrap_or_default();
        Header { group, ..Header::control(Kind::Beat, doing, 0) }
    }

    pub(crate) fn to_bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(b"fopt");
        bytes[4] = self.kind.code();
        bytes[5] = self.dtype.map_or(0, |dtype| 1 + dtype as u8);
        bytes[8..16].copy_from_slice(&self.len.to_le_bytes());
        bytes[16..16 + self.group.len()].copy_from_slice(self.group.as_bytes());
        bytes[16 + NAME..16 + NAME + self.label.len()].copy_from_slice(self.label.as_bytes());
        bytes
    }

    /// Nothing if the bytes are no header.
    pub(crate) fn from_bytes(bytes: &[u8; HEADER]) -> Option<Header> {
        let name = |start: usize| {
            let name = &bytes[start..start + NAME];
            let end = name.iter().position(|b| *b == 0).unwrap_or(NAME);
            std::str::from_utf8(&name[..end]).ok().map(String::from)
        };
        if &bytes[..4] != b"fopt" {
            return None;
        }
        let len = u64::from_le_bytes(bytes[8..16].try_into().ok()?);
        let dtype = match bytes[5] {
            0 => None,
            code => Some(DTYPES.into_iter().find(|dtype| 1 + *dtype as u8 == code)?),
        };
        Some(Header { kind: Kind::of(bytes[4])?, len, dtype, group: name(16)?, label: name(16 + NAME)? })
    }

    /// "the all-gather of layer 7 in group shard, 4096 bytes"
    pub(crate) fn describe(&self) -> String {
        match self.kind {
            Kind::Data(operation) => {
                let of = self.dtype.map_or(String::new(), |dtype| format!(" of {dtype}"));
                format!("the {operation} of {} in group {}, {} bytes{of}", self.label, self.group, self.len)
            }
            other => format!("{other:?}"),
        }
    }
}

/// As much of a name as a header has room for.
fn shortened(name: &str) -> String {
    let mut end = name.len().min(NAME);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name[..end].into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back_and_garbage_does_not() {
        let long = "a name that is longer than a header has room for, and ends in ä";
        for header in [
            Header::data(
                Operation::ReduceScatter,
                "shard",
                Label::of("layer", 7),
                Some(DType::Bf16),
                1 << 40,
            ),
            Header::data(Operation::Send, long, Label::new(long), None, 0),
            Header::control(Kind::Abandon, "step 12", 9),
            Header::beat("step 12", Some(123_456)),
        ] {
            assert_eq!(Header::from_bytes(&header.to_bytes()).as_ref(), Some(&header));
        }
        assert!(Header::from_bytes(&[b'G'; HEADER]).is_none());
        let mut wrong = Header::control(Kind::Bye, "", 0).to_bytes();
        wrong[4] = 77;
        assert!(Header::from_bytes(&wrong).is_none());
    }
}
