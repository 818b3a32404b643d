//! Reads pickles, protocols 2 to 5, without executing anything.
//!
//! A pickle is a program for a small stack machine, and Python's own reader lets it import and call whatever it
//! likes. This one only builds a table of values. A call stays a record of what would have been called with what
//! ([`Value::Call`]); whoever wants a tensor looks for the one constructor that makes it and reads its arguments.
//! Names outside of what checkpoints contain are refused on sight, even in parts that nobody looks at.
//!
//! Values live in one table and name each other by number, so that neither building nor freeing a deeply nested or
//! cyclic pickle recurses, and each byte of input makes at most one value of [`Value`]'s size.

mod machine;
pub(super) mod write;

use anyhow::{Context, Result, ensure};
use machine::Machine;

/// Most bytes of a pickle. Those of real checkpoints, which hold no tensor data, have a few MB at most.
const MAX_BYTES: usize = 1 << 30;

/// Number of a value in the table.
pub(super) type Id = u32;

/// Place of a text in the pickle.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    start: u32,
    len: u32,
}

/// A value.
#[derive(Debug)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(Span),
    List(Vec<Id>),
    Tuple(Vec<Id>),
    /// In the order of insertion; a key may occur more than once, and the last one counts.
    Dict(Vec<(Id, Id)>),
    /// A class or function by name.
    Global(Span, Span),
    /// What calling `callee` would have made, and the state it was given.
    Call {
        callee: Id,
        args: Id,
        state: Id,
    },
    /// A reference to data outside of the pickle.
    Persistent(Id),
    /// Bytes, sets, large integers: nothing that weights are described with.
    Other,
}

/// A pickle's values.
pub(super) struct Pickle<'a> {
    bytes: &'a [u8],
    values: Vec<Value>,
    root: Id,
}

impl<'a> Pickle<'a> {
    /// Reads a pickle.
    ///
    /// # Errors
    /// When it is cut short or wrong, or names something that no checkpoint contains.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Pickle<'a>> {
        ensure!(bytes.len() <= MAX_BYTES, "the pickle has {} bytes, more than {MAX_BYTES}", bytes.len());
        let mut machine = Machine::new(bytes);
        loop {
            let at = machine.position();
            if !machine.step().with_context(|| format!("the pickle is not valid at byte {at}"))? {
                break;
            }
        }
        let (values, root) = machine.finish()?;
        Ok(Pickle { bytes, values, root })
    }

    /// What the pickle is.
    pub(super) fn root(&self) -> Id {
        self.root
    }

    pub(super) fn value(&self, id: Id) -> &Value {
        self.values.get(id as usize).unwrap_or(&Value::Other)
    }

    /// The text of a value that is one.
    pub(super) fn text(&self, id: Id) -> Option<&'a str> {
        match self.value(id) {
            Value::Text(span) => Some(span.of(self.bytes)),
            _ => None,
        }
    }

    /// The integer of a value that is one.
    pub(super) fn int(&self, id: Id) -> Option<i64> {
        match self.value(id) {
            Value::Int(n) => Some(*n),
            _ => None,
        }
    }

    /// The size of a value that is one.
    pub(super) fn size(&self, id: Id) -> Option<usize> {
        self.int(id).and_then(|n| usize::try_from(n).ok())
    }

    /// The number of a value that is one.
    pub(super) fn number(&self, id: Id) -> Option<f64> {
        match self.value(id) {
            Value::Float(x) => Some(*x),
            Value::Int(n) => Some(*n as f64),
            _ => None,
        }
    }

    /// The items of a list or tuple.
    pub(super) fn items(&self, id: Id) -> Option<&[Id]> {
        match self.value(id) {
            Value::List(items) | Value::Tuple(items) => Some(items),
            _ => None,
        }
    }

    /// Number of values in the table.
    pub(super) fn len(&self) -> usize {
        self.values.len()
    }

    /// The sizes in a list or tuple of up to 8; torch.Size is a call around one.
    pub(super) fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        let id = match self.value(id) {
            Value::Call { callee, args, .. } if self.global(*callee)? == ("torch", "Size") => {
                *self.items(*args)?.first()?
            }
            _ => id,
        };
        let items = self.items(id).filter(|items| items.len() <= 8)?;
        items.iter().map(|x| self.size(*x)).collect()
    }

    /// Keys and values of a dictionary.
    pub(super) fn dict(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.value(id) {
            Value::Dict(items) => Some(items),
            _ => None,
        }
    }

    /// Module and name of a class or function.
    pub(super) fn global(&self, id: Id) -> Option<(&'a str, &'a str)> {
        match self.value(id) {
            Value::Global(module, name) => Some((module.of(self.bytes), name.of(self.bytes))),
            _ => None,
        }
    }

    /// The value under a key of a dictionary, or of an object that keeps its attributes in one: argparse's Namespace,
    /// dataclasses, and omegaconf's nodes, which wrap every dictionary and value once more.
    pub(super) fn get(&self, id: Id, key: &str) -> Option<Id> {
        let mut items = self.dict(id);
        if let Value::Call { state, .. } = self.value(id) {
            items = self.dict(*state);
            if let Some(content) = items.and_then(|items| self.find(items, "_content")) {
                items = self.dict(content);
            }
        }
        let found = self.find(items?, key)?;
        let wrapped = match self.value(found) {
            Value::Call { state, .. } => self.dict(*state).and_then(|items| self.find(items, "_val")),
            _ => None,
        };
        Some(wrapped.unwrap_or(found))
    }

    fn find(&self, items: &[(Id, Id)], key: &str) -> Option<Id> {
        items.iter().rev().find(|(k, _)| self.text(*k) == Some(key)).map(|(_, v)| *v)
    }

    /// What a value is, for messages.
    pub(super) fn describe(&self, id: Id) -> String {
        match self.value(id) {
            Value::None => "None".into(),
            Value::Bool(b) => if *b { "True" } else { "False" }.into(),
            Value::Int(n) => n.to_string(),
            Value::Float(x) => x.to_string(),
            Value::Text(span) => format!("{:?}", short(span.of(self.bytes))),
            Value::List(_) => "a list".into(),
            Value::Tuple(_) => "a tuple".into(),
            Value::Dict(_) => "a dictionary".into(),
            Value::Global(module, name) => {
                format!("the name {}.{}", short(module.of(self.bytes)), short(name.of(self.bytes)))
            }
            Value::Call { callee, .. } => match self.global(*callee) {
                Some((module, name)) => format!("made by {}.{}", short(module), short(name)),
                None => "made by something unknown".into(),
            },
            Value::Persistent(_) => "a storage".into(),
            Value::Other => "of another kind".into(),
        }
    }
}

/// At most 60 characters of a text that a file chose.
pub(super) fn short(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.into(),
    }
}

impl Span {
    fn of(self, bytes: &[u8]) -> &str {
        let range = self.start as usize..(self.start + self.len) as usize;
        // Checked when the text was read.
        bytes.get(range).and_then(|text| std::str::from_utf8(text).ok()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(bytes: &[u8]) -> String {
        match Pickle::read(bytes) {
            Ok(_) => panic!("{bytes:?} was read"),
            Err(error) => format!("{error:#}"),
        }
    }

    /// `pickle.dumps({"a": [1, -2, 2**40], "b": (None, True, 0.5), "c": {"d": "e"}}, protocol)` with protocols 2 and 5.
    #[test]
    fn plain_values_in_every_protocol() {
        let two: &[u8] = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01]q\x02(K\x01J\xfe\xff\xff\xff\x8a\x06\x00\x00\x00\x00\x00\x01eX\x01\x00\x00\x00bq\x03N\x88G?\xe0\x00\x00\x00\x00\x00\x00\x87q\x04X\x01\x00\x00\x00cq\x05}q\x06X\x01\x00\x00\x00dq\x07X\x01\x00\x00\x00eq\x08su.";
        let five: &[u8] = b"\x80\x05\x95<\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x01a\x94]\x94(K\x01J\xfe\xff\xff\xff\x8a\x06\x00\x00\x00\x00\x00\x01e\x8c\x01b\x94N\x88G?\xe0\x00\x00\x00\x00\x00\x00\x87\x94\x8c\x01c\x94}\x94\x8c\x01d\x94\x8c\x01e\x94su.";
        for bytes in [two, five] {
            let p = Pickle::read(bytes).unwrap();
            let at = |key| p.get(p.root(), key).unwrap();
            let list: Vec<_> = p.items(at("a")).unwrap().iter().map(|id| p.int(*id).unwrap()).collect();
            assert_eq!(list, [1, -2, 1 << 40]);
            let items = p.items(at("b")).unwrap();
            assert!(
                matches!(p.value(items[0]), Value::None) && matches!(p.value(items[1]), Value::Bool(true))
            );
            assert_eq!(p.number(items[2]), Some(0.5));
            assert_eq!(p.text(p.get(at("c"), "d").unwrap()), Some("e"));
            assert!(p.get(p.root(), "z").is_none());
        }
    }

    #[test]
    fn objects_keep_their_attributes_and_nothing_is_called() {
        // An argparse.Namespace with heads = 12, as NEWOBJ and BUILD write it.
        let p = Pickle::read(b"\x80\x02cargparse\nNamespace\n)\x81}X\x05\x00\x00\x00headsK\x0csb.").unwrap();
        assert_eq!(p.get(p.root(), "heads").and_then(|id| p.size(id)), Some(12));
        assert_eq!(p.describe(p.root()), "made by argparse.Namespace");
        // {"cfg": {"model": {"heads": 12}}} in omegaconf's containers and nodes, which know their parents.
        let nested: &[u8] = b"\x80\x02}q\x00X\x03\x00\x00\x00cfgq\x01comegaconf.dictconfig\x0aDictConfig\x0aq\x02)\x81q\x03}q\x04(X\x09\x00\x00\x00_metadataq\x05NX\x07\x00\x00\x00_parentq\x06NX\x08\x00\x00\x00_contentq\x07}q\x08X\x05\x00\x00\x00modelq\x09h\x02)\x81q\x0a}q\x0b(h\x05Nh\x06Nh\x07}q\x0cX\x05\x00\x00\x00headsq\x0dcomegaconf.nodes\x0aAnyNode\x0aq\x0e)\x81q\x0f}q\x10(h\x05Nh\x06h\x0aX\x04\x00\x00\x00_valq\x11K\x0cubsubsubs.";
        let p = Pickle::read(nested).unwrap();
        let model = p.get(p.get(p.root(), "cfg").unwrap(), "model").unwrap();
        assert_eq!(p.get(model, "heads").and_then(|id| p.size(id)), Some(12));
        for (bytes, name) in [
            (&b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R."[..], "os.system"),
            (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", "builtins.eval"),
            (b"\x80\x02c__builtin__\ngetattr\n.", "__builtin__.getattr"),
            (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "posix.system"),
            (b"\x80\x02ctorchvision\nx\n.", "torchvision.x"),
        ] {
            let message = message(bytes);
            assert!(message.contains(name) && message.contains("Nothing of it was executed"), "{message}");
        }
    }

    /// `Namespace(heads=12, save=PosixPath("/a/b"), types=[str, int, type(None), bytes, Optional[str], Dict[str, int], Any],
    /// span=range(3), part=slice(1, 2))` of Python 3.11 in protocols 2 and 4, and `[PosixPath("/a"), int]` of 3.13.
    #[test]
    fn settings_may_have_types_and_paths() {
        let two: &[u8] = b"\x80\x02cargparse\nNamespace\nq\x00)\x81q\x01}q\x02(X\x05\x00\x00\x00headsq\x03K\x0cX\x04\x00\x00\x00saveq\x04cpathlib\nPosixPath\nq\x05X\x01\x00\x00\x00/q\x06X\x01\x00\x00\x00aq\x07X\x01\x00\x00\x00bq\x08\x87q\x09Rq\nX\x05\x00\x00\x00typesq\x0b]q\x0c(c__builtin__\nunicode\nq\x0dc__builtin__\nlong\nq\x0ec__builtin__\ntype\nq\x0fN\x85q\x10Rq\x11c__builtin__\nbytes\nq\x12c_operator\ngetitem\nq\x13ctyping\nUnion\nq\x14h\x0dh\x11\x86q\x15\x86q\x16Rq\x17h\x13ctyping\nDict\nq\x18h\x0dh\x0e\x86q\x19\x86q\x1aRq\x1bctyping\nAny\nq\x1ceX\x04\x00\x00\x00spanq\x1dc__builtin__\nxrange\nq\x1eK\x00K\x03K\x01\x87q\x1fRq X\x04\x00\x00\x00partq!c__builtin__\nslice\nq\"K\x01K\x02N\x87q#Rq$ub.";
        let four: &[u8] = b"\x80\x04\x95/\x01\x00\x00\x00\x00\x00\x00\x8c\x08argparse\x94\x8c\x09Namespace\x94\x93\x94)\x81\x94}\x94(\x8c\x05heads\x94K\x0c\x8c\x04save\x94\x8c\x07pathlib\x94\x8c\x09PosixPath\x94\x93\x94\x8c\x01/\x94\x8c\x01a\x94\x8c\x01b\x94\x87\x94R\x94\x8c\x05types\x94]\x94(\x8c\x08builtins\x94\x8c\x03str\x94\x93\x94h\x11\x8c\x03int\x94\x93\x94h\x11\x8c\x04type\x94\x93\x94N\x85\x94R\x94h\x11\x8c\x05bytes\x94\x93\x94\x8c\x09_operator\x94\x8c\x07getitem\x94\x93\x94\x8c\x06typing\x94\x8c\x05Union\x94\x93\x94h\x13h\x19\x86\x94\x86\x94R\x94h\x1eh\x1f\x8c\x04Dict\x94\x93\x94h\x13h\x15\x86\x94\x86\x94R\x94h\x1f\x8c\x03Any\x94\x93\x94e\x8c\x04span\x94h\x11\x8c\x05range\x94\x93\x94K\x00K\x03K\x01\x87\x94R\x94\x8c\x04part\x94h\x11\x8c\x05slice\x94\x93\x94K\x01K\x02N\x87\x94R\x94ub.";
        for bytes in [two, four] {
            let p = Pickle::read(bytes).unwrap();
            assert_eq!(p.get(p.root(), "heads").and_then(|id| p.size(id)), Some(12));
            let save = p.get(p.root(), "save").unwrap();
            assert_eq!(p.describe(save), "made by pathlib.PosixPath");
        }
        let local: &[u8] = b"\x80\x02]q\x00(cpathlib._local\nPosixPath\nq\x01X\x02\x00\x00\x00/aq\x02\x85q\x03Rq\x04c__builtin__\nlong\nq\x05e.";
        let p = Pickle::read(local).unwrap();
        assert_eq!(p.items(p.root()).unwrap().len(), 2);
        for (bytes, name) in [
            (&b"\x80\x02c_operator\nattrgetter\n."[..], "_operator.attrgetter"),
            (b"\x80\x02cpathlib\nos\n.", "pathlib.os"),
            (b"\x80\x02cpathlib.os\nPath\n.", "pathlib.os.Path"),
            (b"\x80\x02c__builtin__\ncompile\n.", "__builtin__.compile"),
        ] {
            let message = message(bytes);
            assert!(message.contains(name) && message.contains("Nothing of it was executed"), "{message}");
        }
    }

    /// `Namespace(heads=12, types=[str | None, list[str], int | dict[str, int]])` of Python 3.11 in protocols 2 and 4.
    #[test]
    fn settings_may_have_types_that_are_made_of_others() {
        let two: &[u8] = b"\x80\x02cargparse\nNamespace\nq\x00)\x81q\x01}q\x02(X\x05\x00\x00\x00headsq\x03K\x0cX\x05\x00\x00\x00typesq\x04]q\x05(c__builtin__\nreduce\nq\x06c_operator\nor_\nq\x07c__builtin__\nunicode\nq\x08c__builtin__\ntype\nq\x09N\x85q\nRq\x0b\x86q\x0c\x86q\x0dRq\x0ectypes\nGenericAlias\nq\x0fc__builtin__\nlist\nq\x10h\x08\x85q\x11\x86q\x12Rq\x13h\x06h\x07c__builtin__\nlong\nq\x14h\x0fc__builtin__\ndict\nq\x15h\x08h\x14\x86q\x16\x86q\x17Rq\x18\x86q\x19\x86q\x1aRq\x1beub.";
        let four: &[u8] = b"\x80\x04\x95\xde\x00\x00\x00\x00\x00\x00\x00\x8c\x08argparse\x94\x8c\x09Namespace\x94\x93\x94)\x81\x94}\x94(\x8c\x05heads\x94K\x0c\x8c\x05types\x94]\x94(\x8c\n_functools\x94\x8c\x06reduce\x94\x93\x94\x8c\x09_operator\x94\x8c\x03or_\x94\x93\x94\x8c\x08builtins\x94\x8c\x03str\x94\x93\x94h\x0e\x8c\x04type\x94\x93\x94N\x85\x94R\x94\x86\x94\x86\x94R\x94h\x06\x8c\x0cGenericAlias\x94\x93\x94h\x0e\x8c\x04list\x94\x93\x94h\x10\x85\x94\x86\x94R\x94h\nh\x0dh\x0e\x8c\x03int\x94\x93\x94h\x19h\x0e\x8c\x04dict\x94\x93\x94h\x10h \x86\x94\x86\x94R\x94\x86\x94\x86\x94R\x94eub.";
        for bytes in [two, four] {
            let p = Pickle::read(bytes).unwrap();
            assert_eq!(p.get(p.root(), "heads").and_then(|id| p.size(id)), Some(12));
            assert_eq!(p.items(p.get(p.root(), "types").unwrap()).unwrap().len(), 3);
        }
        for (bytes, name) in [
            (&b"\x80\x02c_functools\npartial\n."[..], "_functools.partial"),
            (b"\x80\x02cfunctools\nreduce\n.", "functools.reduce"),
            (b"\x80\x02ctypes\nCodeType\n.", "types.CodeType"),
        ] {
            let message = message(bytes);
            assert!(message.contains(name) && message.contains("Nothing of it was executed"), "{message}");
        }
    }

    #[test]
    fn broken_programs_are_refused() {
        for (bytes, part) in [
            (&b""[..], "cut short"),
            (b"\x80\x02", "cut short"),
            (b"\x80\x00N.", "protocol 0"),
            (b"\x80\x02.", "empty stack"),
            (b"\x80\x02a.", "empty stack"),
            (b"\x80\x02(0.", "empty stack"),
            (b"\x80\x02t.", "mark that was not set"),
            (b"\x80\x02h\x05.", "recalls value 5"),
            (b"\x80\x02X\xff\xff\xff\xffab.", "cut short"),
            (b"\x80\x02X\x02\x00\x00\x00\xff\xff.", "not UTF-8"),
            (b"\x80\x02}(Nu.", "key without a value"),
            (b"\x80\x02NNR.", "calls something"),
            (b"\x80\x02i.", "instruction 0x69"),
            (b"\x80\x02ctorch", "no end"),
        ] {
            let message = message(bytes);
            assert!(message.contains(part), "{bytes:?}: {message}");
        }
    }
}
