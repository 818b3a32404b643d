//! Where a packed matrix lies.

use crate::Mapped;
use crate::cpu::CpuBuf;

/// Words of a packed matrix, to be read only: in memory of this process, or in a file that others may have mapped too.
pub(super) enum Kept {
    Own(CpuBuf<u32>),
    Mapped(Mapped),
}

impl Kept {
    /// Part of a file; fails where it does not begin and end with a word.
    pub(super) fn mapped(bytes: Mapped) -> anyhow::Result<Kept> {
        if let Err(wrong) = bytemuck::try_cast_slice::<u8, u32>(bytes.bytes()) {
            anyhow::bail!("a packed matrix cannot be used where it lies in its file: {wrong}");
        }
        Ok(Kept::Mapped(bytes))
    }
}

impl std::ops::Deref for Kept {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        match self {
            Kept::Own(memory) => memory,
            Kept::Mapped(bytes) => bytemuck::cast_slice(bytes.bytes()),
        }
    }
}
