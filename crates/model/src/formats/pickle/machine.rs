//! The stack machine that a pickle is a program for.

use super::{Id, Span, Value, short};
use anyhow::{Context, Result, bail, ensure};
use std::collections::HashMap;

/// Most values.
const MAX_VALUES: usize = 1 << 24;

/// Longest text that is kept, and longest name of a class, bytes: no key or name of a checkpoint is longer, and a few bytes of a
/// pickle suffice to use one again.
const LONGEST_TEXT: usize = 4096;
const LONGEST_NAME: u32 = 256;

const NONE: Id = 0;
const FALSE: Id = 1;
const TRUE: Id = 2;
const OTHER: Id = 3;

pub(super) struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack at MARK.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Machine<'a> {
        Machine {
            bytes,
            at: 0,
            values: vec![Value::None, Value::Bool(false), Value::Bool(true), Value::Other],
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        }
    }

    /// Byte of the next instruction.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// The table of values, and the one that is on top of the stack.
    pub(super) fn finish(mut self) -> Result<(Vec<Value>, Id)> {
        let root = self.pop()?;
        Ok((self.values, root))
    }

    fn take(&mut self, n: usize) -> Result<&[u8]> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.bytes.len());
        let end = end.with_context(|| {
            format!("the pickle is cut short: {n} bytes at {} of {}", self.at, self.bytes.len())
        })?;
        let bytes = &self.bytes[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    /// An unsigned little-endian number of `n` bytes.
    fn number(&mut self, n: usize) -> Result<u64> {
        Ok(self.take(n)?.iter().rev().fold(0, |x, b| x << 8 | u64::from(*b)))
    }

    fn length(&mut self, n: usize) -> Result<usize> {
        Ok(usize::try_from(self.number(n)?)?)
    }

    fn span(&mut self, len: usize) -> Result<Span> {
        let start = self.at;
        let text = self.take(len)?;
        ensure!(std::str::from_utf8(text).is_ok(), "a text is not UTF-8");
        Ok(Span { start: start as u32, len: len as u32 })
    }

    fn line(&mut self) -> Result<Span> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().position(|b| *b == b'\n').context("a name has no end")?;
        let span = self.span(len)?;
        self.at += 1;
        Ok(span)
    }

    fn push(&mut self, value: Value) -> Result<()> {
        ensure!(self.values.len() < MAX_VALUES, "it has more than {MAX_VALUES} values");
        self.values.push(value);
        self.stack.push((self.values.len() - 1) as Id);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        ensure!(self.stack.len() > floor, "it takes a value from an empty stack");
        self.stack.pop().context("it takes a value from an empty stack")
    }

    fn top(&self) -> Result<Id> {
        self.stack.last().copied().context("it looks at an empty stack")
    }

    /// The values above the last mark, which goes.
    fn above_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().context("it goes back to a mark that was not set")?;
        Ok(self.stack.split_off(mark))
    }

    fn tuple(&mut self, n: usize) -> Result<()> {
        let mut items = (0..n).map(|_| self.pop()).collect::<Result<Vec<Id>>>()?;
        items.reverse();
        self.push(Value::Tuple(items))
    }

    fn text(&mut self, bytes_of_length: usize) -> Result<()> {
        let len = self.length(bytes_of_length)?;
        let span = self.span(len)?;
        if len > LONGEST_TEXT {
            self.stack.push(OTHER);
            return Ok(());
        }
        self.push(Value::Text(span))
    }

    fn skip(&mut self, bytes_of_length: usize) -> Result<()> {
        let len = self.length(bytes_of_length)?;
        self.take(len)?;
        self.stack.push(OTHER);
        Ok(())
    }

    fn long(&mut self, bytes_of_length: usize) -> Result<()> {
        let len = self.length(bytes_of_length)?;
        let bytes = self.take(len)?;
        if bytes.len() > 8 {
            self.stack.push(OTHER);
            return Ok(());
        }
        let mut wide = [if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 }; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)))
    }

    fn append(&mut self, new: &[Id]) -> Result<()> {
        let to = self.top()?;
        // A subclass of list is a record of a call; what it would hold is nothing that weights need.
        if let Some(Value::List(items)) = self.values.get_mut(to as usize) {
            items.extend_from_slice(new);
        }
        Ok(())
    }

    fn set_items(&mut self, new: &[Id]) -> Result<()> {
        let to = self.top()?;
        ensure!(new.len().is_multiple_of(2), "a dictionary has a key without a value");
        if let Some(Value::Dict(items)) = self.values.get_mut(to as usize) {
            items.extend(new.chunks_exact(2).map(|pair| (pair[0], pair[1])));
        }
        Ok(())
    }

    fn put(&mut self, index: u64) -> Result<()> {
        let id = self.top()?;
        self.memo.insert(u32::try_from(index)?, id);
        Ok(())
    }

    fn get(&mut self, index: u64) -> Result<()> {
        let id = u32::try_from(index).ok().and_then(|index| self.memo.get(&index));
        let id = *id.with_context(|| format!("it recalls value {index}, which it did not keep"))?;
        self.stack.push(id);
        Ok(())
    }

    fn global(&mut self, module: Span, name: Span) -> Result<()> {
        ensure!(
            module.len.max(name.len) <= LONGEST_NAME,
            "it imports a name of {} bytes; {LONGEST_NAME} are the most that can be read",
            module.len.max(name.len)
        );
        allowed(module.of(self.bytes), name.of(self.bytes))?;
        self.push(Value::Global(module, name))
    }

    fn call(&mut self, callee: Id, args: Id) -> Result<()> {
        let Some(Value::Global(module, name)) = self.values.get(callee as usize) else {
            bail!("it calls something that is no class or function");
        };
        match (module.of(self.bytes), name.of(self.bytes)) {
            ("collections", "OrderedDict" | "defaultdict") | ("builtins" | "__builtin__", "dict") => {
                self.push(Value::Dict(Vec::new()))
            }
            _ => self.push(Value::Call { callee, args, state: NONE }),
        }
    }

    /// One instruction; false when it was STOP. The letters are those of Python's `pickletools`.
    pub(super) fn step(&mut self) -> Result<bool> {
        match self.byte()? {
            b'.' => return Ok(false),
            0x80 => {
                let protocol = self.byte()?;
                ensure!((2..=5).contains(&protocol), "it has protocol {protocol}; 2 to 5 can be read");
            }
            0x95 => {
                self.take(8)?; // FRAME: a hint for buffering
            }
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                self.pop()?;
            }
            b'1' => {
                self.above_mark()?;
            }
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            b'N' => self.stack.push(NONE),
            0x88 => self.stack.push(TRUE),
            0x89 => self.stack.push(FALSE),
            b'J' => {
                let n = self.number(4)? as u32 as i32;
                self.push(Value::Int(n.into()))?;
            }
            b'K' => {
                let n = self.number(1)?;
                self.push(Value::Int(n as i64))?;
            }
            b'M' => {
                let n = self.number(2)?;
                self.push(Value::Int(n as i64))?;
            }
            0x8a => self.long(1)?,
            0x8b => self.long(4)?,
            b'G' => {
                let bits = self.number(8)?.swap_bytes();
                self.push(Value::Float(f64::from_bits(bits)))?;
            }
            0x8c => self.text(1)?,
            b'X' => self.text(4)?,
            0x8d => self.text(8)?,
            b'U' | b'C' => self.skip(1)?,
            b'T' | b'B' => self.skip(4)?,
            0x8e | 0x96 => self.skip(8)?,
            b']' => self.push(Value::List(Vec::new()))?,
            b'}' => self.push(Value::Dict(Vec::new()))?,
            b')' => self.push(Value::Tuple(Vec::new()))?,
            0x8f => self.stack.push(OTHER), // EMPTY_SET
            0x85 => self.tuple(1)?,
            0x86 => self.tuple(2)?,
            0x87 => self.tuple(3)?,
            b't' => {
                let items = self.above_mark()?;
                self.push(Value::Tuple(items))?;
            }
            b'l' => {
                let items = self.above_mark()?;
                self.push(Value::List(items))?;
            }
            b'd' => {
                let items = self.above_mark()?;
                self.push(Value::Dict(Vec::new()))?;
                self.set_items(&items)?;
            }
            0x91 => {
                self.above_mark()?; // FROZENSET
                self.stack.push(OTHER);
            }
            0x90 => {
                self.above_mark()?; // ADDITEMS, to a set
            }
            b'a' => {
                let item = self.pop()?;
                self.append(&[item])?;
            }
            b'e' => {
                let items = self.above_mark()?;
                self.append(&items)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items(&[key, value])?;
            }
            b'u' => {
                let items = self.above_mark()?;
                self.set_items(&items)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (self.values.get(module as usize), self.values.get(name as usize)) {
                    (Some(Value::Text(module)), Some(Value::Text(name))) => self.global(*module, *name)?,
                    _ => bail!("it imports by something that is no text"),
                }
            }
            // REDUCE calls, NEWOBJ makes an object without calling its constructor: records alike.
            b'R' | 0x81 => {
                let (args, callee) = (self.pop()?, self.pop()?);
                self.call(callee, args)?;
            }
            0x92 => {
                let (_keywords, args, callee) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(callee, args)?;
            }
            b'b' => {
                let new = self.pop()?;
                let to = self.top()?;
                if let Some(Value::Call { state, .. }) = self.values.get_mut(to as usize) {
                    *state = new;
                }
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Value::Persistent(id))?;
            }
            b'q' => {
                let index = self.number(1)?;
                self.put(index)?;
            }
            b'r' => {
                let index = self.number(4)?;
                self.put(index)?;
            }
            0x94 => self.put(self.memo.len() as u64)?,
            b'h' => {
                let index = self.number(1)?;
                self.get(index)?;
            }
            b'j' => {
                let index = self.number(4)?;
                self.get(index)?;
            }
            other => bail!("instruction {other:#04x} is not one that checkpoints are written with"),
        }
        Ok(true)
    }
}

/// Refuses what no checkpoint names. Nothing is ever imported or called: this is for a clear word about files that were
/// made to do harm.
fn allowed(module: &str, name: &str) -> Result<()> {
    /// Packages whose classes may stand for parts of a checkpoint that are not weights.
    const PACKAGES: [&str; 9] = [
        "argparse",
        "collections",
        "fairscale",
        "fairseq",
        "metaseq",
        "numpy",
        "omegaconf",
        "torch",
        "typing",
    ];
    /// Types that settings name or are of; protocol 2 has the names of Python 2 for `int`, `str` and `range`.
    const PLAIN: [&str; 19] = [
        "bool",
        "bytearray",
        "bytes",
        "complex",
        "dict",
        "float",
        "frozenset",
        "int",
        "list",
        "long",
        "object",
        "range",
        "set",
        "slice",
        "str",
        "tuple",
        "type",
        "unicode",
        "xrange",
    ];
    const PATHS: [&str; 3] = ["Path", "PosixPath", "PurePosixPath"];
    let package = module.split('.').next().unwrap_or_default();
    let known = match package {
        "__builtin__" if name == "reduce" => true, // of Python 2's names: makes `str | None` of its parts, with or_
        "builtins" | "__builtin__" => PLAIN.contains(&name),
        "_codecs" => name == "encode", // bytes in protocol 2
        "copyreg" | "copy_reg" => name == "_reconstructor", // objects in protocols 0 and 1, which some classes keep to
        "_functools" => name == "reduce",
        "_operator" => ["getitem", "or_"].contains(&name), // makes Optional[str] out of its parts
        "types" => name == "GenericAlias",                 // list[str]
        "pathlib" => ["pathlib", "pathlib._local"].contains(&module) && PATHS.contains(&name),
        _ => PACKAGES.contains(&package),
    };
    ensure!(
        known,
        "it names {}.{}, which no checkpoint needs. Nothing of it was executed; do not load this file with Python \
         unless you trust who made it",
        short(module),
        short(name)
    );
    Ok(())
}
