//! What machine code for a GPU says of itself: an ELF of 64 bits, little-endian.

use std::ffi::{CStr, CString};

/// SHT_SYMTAB.
const SYMBOLS: usize = 2;
/// STB_GLOBAL with STT_FUNC.
const GLOBAL_FUNCTION: u8 = 1 << 4 | 2;

/// Names of the kernels in machine code: what its table of symbols has of global functions. None where it is something else.
pub(super) fn kernels_in(code: &[u8]) -> Vec<CString> {
    let global_functions = || {
        let elf = Elf::of(code)?;
        let functions = elf.symbols()?.filter(|symbol| symbol[4] == GLOBAL_FUNCTION);
        functions.map(|symbol| elf.name_of(symbol)).collect::<Option<Vec<_>>>()
    };
    global_functions().unwrap_or_default()
}

/// Bytes of local memory that each function's frame takes: arrays that are not registers, and registers that were short.
#[cfg(test)]
pub(super) fn frames_in(code: &[u8]) -> Option<Vec<(CString, usize)>> {
    /// EIFMT_SVAL, and EIATTR_FRAME_SIZE: the number of a symbol, and bytes.
    const WITH_SIZE: u8 = 4;
    const FRAME: u8 = 0x11;
    let elf = Elf::of(code)?;
    let symbols: Vec<&[u8]> = elf.symbols()?.collect();
    let mut left = elf.content(elf.named(c".nv.info")?)?;
    let mut frames = Vec::new();
    while let [form, attribute, ..] = *left {
        let size = if form == WITH_SIZE { number(left, 2, 2)? } else { 0 };
        if (form, attribute) == (WITH_SIZE, FRAME) {
            let symbol = symbols.get(number(left, 4, 4)?)?;
            frames.push((elf.name_of(symbol)?, number(left, 8, 4)?));
        }
        left = left.get(4 + size..)?;
    }
    Some(frames)
}

struct Elf<'a> {
    code: &'a [u8],
    sections: Vec<&'a [u8]>,
}

impl<'a> Elf<'a> {
    fn of(code: &'a [u8]) -> Option<Elf<'a>> {
        if !code.starts_with(b"\x7fELF") {
            return None;
        }
        let (table, size, count) = (number(code, 40, 8)?, number(code, 58, 2)?, number(code, 60, 2)?);
        let sections = code.get(table..)?.chunks_exact(size.max(1)).take(count).collect();
        Some(Elf { code, sections })
    }

    fn content(&self, section: &[u8]) -> Option<&'a [u8]> {
        self.code.get(number(section, 24, 8)?..)?.get(..number(section, 32, 8)?)
    }

    /// The table of symbols.
    fn table(&self) -> Option<&'a [u8]> {
        self.sections.iter().find(|section| number(section, 4, 4) == Some(SYMBOLS)).copied()
    }

    fn symbols(&self) -> Option<impl Iterator<Item = &'a [u8]> + use<'a>> {
        Some(self.content(self.table()?)?.chunks_exact(24))
    }

    fn name_of(&self, symbol: &[u8]) -> Option<CString> {
        let names = self.content(self.sections.get(number(self.table()?, 40, 4)?)?)?;
        text(names, number(symbol, 0, 4)?).map(CStr::to_owned)
    }

    #[cfg(test)]
    fn named(&self, name: &CStr) -> Option<&'a [u8]> {
        let names = self.content(self.sections.get(number(self.code, 62, 2)?)?)?;
        let is_it = |section: &&&[u8]| number(section, 0, 4).and_then(|at| text(names, at)) == Some(name);
        self.sections.iter().find(is_it).copied()
    }
}

fn number(bytes: &[u8], at: usize, size: usize) -> Option<usize> {
    let mut word = [0; 8];
    word[..size].copy_from_slice(bytes.get(at..at.checked_add(size)?)?);
    usize::try_from(u64::from_le_bytes(word)).ok()
}

fn text(bytes: &[u8], at: usize) -> Option<&CStr> {
    CStr::from_bytes_until_nul(bytes.get(at..)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_machine_code_has_no_kernels() {
        for code in [&b"emulated"[..], b"", b"\x7fELF", &[b"\x7fELF", &[0xff; 200][..]].concat()] {
            assert!(kernels_in(code).is_empty());
        }
    }
}
