//! Weight matrices that are only read, as products on a GPU want them: rows of numbers, or of codes with the groups' numbers
//! behind all rows.
//!
//! A row of codes is its groups in order, each of two units whose words lie as [`crate::places`] says. Then come the scales of
//! all groups of all rows and, below 8 bits, their minima.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, bail, ensure};
use bytemuck::NoUninit;

use super::driver::Address;
use super::kernels::args;
use super::workspace::Scratch;
use super::{CudaBuf, CudaDevice, StreamWords, name, optional};
use crate::element::check_rows;
use crate::places::{self, UNIT};
use crate::quantise::{self, Codes, GROUP, Group, code_bits, has_minima};
use crate::rng::BLOCK;
use crate::{
    Activation, DType, Element, Mapped, RandomWeights, ReadRows, WeightFormat, WritePiece, bf16, f16,
};

/// Rows that a thread packs at once.
const ROWS: usize = 16;
/// Warps of a block of the products without tensor cores, each of which has a column, and of rounding.
const WARPS: usize = 4;
/// Rows of activations that meet a row of weights while it is in registers, where there is more than one.
const TOGETHER: usize = 8;
/// Of the products on tensor cores (kernels/packed_mma.cu): threads of a block; columns of one for some rows, and those rows, as
/// many times as the kernel's name says; columns and rows of one for many.
const THREADS: usize = 256;
const COLUMNS: usize = 16;
const SOME: usize = 8;
const MANY: usize = 128;

/// A matrix `[n, k]` in a GPU's memory.
pub struct CudaPacked {
    format: WeightFormat,
    n: usize,
    k: usize,
    words: CudaBuf<u32>,
}

/// Where the parts of a packed matrix begin, in bytes, and where it ends.
#[derive(Clone, Copy)]
struct Layout {
    format: WeightFormat,
    k: usize,
    scales: usize,
    minima: usize,
    end: usize,
}

impl Layout {
    fn new(format: WeightFormat, n: usize, k: usize) -> Layout {
        let scales = n * Layout::row_bytes(format, k);
        let of_groups = (2 * n * k.div_ceil(GROUP)).next_multiple_of(4);
        let (minima, end) = match format {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => {
                (scales, scales.next_multiple_of(4))
            }
            WeightFormat::Int8 => (scales + of_groups, scales + of_groups),
            WeightFormat::Int4 | WeightFormat::Int3 => (scales + of_groups, scales + 2 * of_groups),
        };
        Layout { format, k, scales, minima, end }
    }

    /// Bytes of a row's numbers or codes.
    fn row_bytes(format: WeightFormat, k: usize) -> usize {
        match code_bits(format) {
            Some(bits) => k.div_ceil(GROUP) * GROUP * bits / 8,
            None if format == WeightFormat::F32 => 4 * k,
            None => 2 * k,
        }
    }

    /// Hands rows of codes to `write`, units as words.
    fn write_codes(
        &self,
        first: usize,
        codes: &[u8],
        groups: &[Group],
        write: &WritePiece<'_>,
    ) -> Result<()> {
        let count = self.k.div_ceil(GROUP);
        let at = first * Layout::row_bytes(self.format, self.k);
        let numbers = |of: fn(&Group) -> bf16| groups.iter().map(of).collect::<Vec<bf16>>();
        if let Some(bits @ ..8) = code_bits(self.format) {
            let mut words = vec![0; codes.len() / UNIT * bits];
            for (codes, words) in codes.as_chunks().0.iter().zip(words.chunks_exact_mut(bits)) {
                places::put(bits, codes, |word, bits| words[word] |= bits);
            }
            write(at, bytemuck::cast_slice(&words))?;
        } else {
            write(at, codes)?;
        }
        if has_minima(self.format) {
            write(self.minima + 2 * first * count, bytemuck::cast_slice(&numbers(|g| g.min)))?;
        }
        write(self.scales + 2 * first * count, bytemuck::cast_slice(&numbers(|g| g.scale)))
    }

    /// Rounds rows and hands them to `write`.
    fn write_rows(&self, first: usize, rows: &[f32], write: &WritePiece<'_>) -> Result<()> {
        let at = first * Layout::row_bytes(self.format, self.k);
        check_rows(self.format, first, self.k, rows)?;
        match self.format {
            WeightFormat::F32 => write(at, bytemuck::cast_slice(rows)),
            WeightFormat::F16 => {
                let rounded: Vec<f16> = rows.iter().map(|x| f16::from_f32(*x)).collect();
                write(at, bytemuck::cast_slice(&rounded))
            }
            WeightFormat::Bf16 => {
                let rounded: Vec<bf16> = rows.iter().map(|x| bf16::from_f32(*x)).collect();
                write(at, bytemuck::cast_slice(&rounded))
            }
            WeightFormat::Int8 | WeightFormat::Int4 | WeightFormat::Int3 => {
                let count = self.k.div_ceil(GROUP);
                let all = rows.len() / self.k * count;
                let (mut codes, mut groups) = (vec![0; all * GROUP], Vec::with_capacity(all));
                let pieces = rows.chunks_exact(self.k).flat_map(|row| row.chunks(GROUP));
                for (w, codes) in pieces.zip(codes.as_chunks_mut().0) {
                    groups.push(quantise::round_group(self.format, w, codes));
                }
                self.write_codes(first, &codes, &groups, write)
            }
        }
    }

    /// What no row writes to: numbers of odd count end within a word.
    fn write_ends(&self, n: usize, write: &WritePiece<'_>) -> Result<()> {
        let of_groups = 2 * n * self.k.div_ceil(GROUP);
        let ends = match self.format {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => vec![(self.scales, self.end)],
            WeightFormat::Int8 => vec![(self.scales + of_groups, self.end)],
            WeightFormat::Int4 | WeightFormat::Int3 => {
                vec![(self.scales + of_groups, self.minima), (self.minima + of_groups, self.end)]
            }
        };
        ends.into_iter().filter(|(at, end)| at < end).try_for_each(|(at, end)| write(at, &[0; 4][..end - at]))
    }
}

/// Bytes of a packed matrix.
pub(super) fn size(format: WeightFormat, n: usize, k: usize) -> usize {
    Layout::new(format, n, k).end
}

/// What decides how matrices look, beside format and sizes. Raised when the same sizes get another layout.
pub(super) const LAYOUT: &str = "cuda 1";

fn check_sizes(n: usize, k: usize) -> Result<()> {
    ensure!(n > 0 && k > 0, "a weight matrix of {n} x {k} has no elements");
    Ok(())
}

/// Packs a matrix, some rows on each thread of the processor, and hands the pieces to `write`.
pub(super) fn pack_to(
    d: &CudaDevice,
    format: WeightFormat,
    (n, k): (usize, usize),
    read: &ReadRows<'_>,
    write: &WritePiece<'_>,
) -> Result<()> {
    check_sizes(n, k)?;
    let layout = Layout::new(format, n, k);
    let failure = Mutex::new(None);
    let failed = || failure.lock().unwrap_or_else(PoisonError::into_inner);
    d.pool.for_each(n.div_ceil(ROWS), |task, _| {
        let range = task * ROWS..((task + 1) * ROWS).min(n);
        if failed().is_some() {
            return;
        }
        let mut rows = vec![0.0; range.len() * k];
        let made = read(range.clone(), &mut rows).and_then(|()| layout.write_rows(range.start, &rows, write));
        if let Err(error) = made {
            failed().get_or_insert(error);
        }
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)?;
    layout.write_ends(n, write)
}

impl CudaPacked {
    /// Memory for a matrix, and what writes pieces to it.
    fn empty(d: &CudaDevice, format: WeightFormat, n: usize, k: usize) -> Result<CudaPacked> {
        check_sizes(n, k)?;
        Ok(CudaPacked { format, n, k, words: CudaBuf::new(&d.gpu, size(format, n, k) / 4)? })
    }

    fn put(&self, d: &CudaDevice, at: usize, bytes: &[u8]) {
        d.write(self.words.at(0, 0) + at as u64, bytes);
    }

    pub(super) fn new(
        d: &CudaDevice,
        format: WeightFormat,
        n: usize,
        k: usize,
        read: &ReadRows<'_>,
    ) -> Result<CudaPacked> {
        let packed = CudaPacked::empty(d, format, n, k)?;
        pack_to(d, format, (n, k), read, &|at, bytes| {
            packed.put(d, at, bytes);
            Ok(())
        })?;
        Ok(packed)
    }

    pub(super) fn from_codes(
        d: &CudaDevice,
        format: WeightFormat,
        n: usize,
        k: usize,
        read: &mut dyn FnMut(Range<usize>, Codes<'_>) -> Result<()>,
    ) -> Result<CudaPacked> {
        let Some(most) = quantise::largest_code(format) else {
            bail!("{} has no codes; int8, int4 and int3 do", format.name());
        };
        let packed = CudaPacked::empty(d, format, n, k)?;
        let (layout, count) = (Layout::new(format, n, k), k.div_ceil(GROUP));
        let write: &WritePiece<'_> = &|at, bytes| {
            packed.put(d, at, bytes);
            Ok(())
        };
        let mut codes = vec![0; ROWS * count * GROUP];
        let mut groups = vec![Group { scale: bf16::ZERO, min: bf16::ZERO }; ROWS * count];
        for first in (0..n).step_by(ROWS) {
            let range = first..(first + ROWS).min(n);
            let codes = &mut codes[..range.len() * count * GROUP];
            let groups = &mut groups[..range.len() * count];
            read(range, Codes { codes, groups })?;
            for (row, codes) in codes.chunks_exact_mut(count * GROUP).enumerate() {
                codes[k..].fill(0);
                if let Some(wrong) = codes.iter().find(|code| **code > most) {
                    bail!("row {} has code {wrong}; {} has codes up to {most}", first + row, format.name());
                }
            }
            layout.write_codes(first, codes, groups, write)?;
        }
        layout.write_ends(n, write)?;
        Ok(packed)
    }

    /// Random numbers, by kernels that write them where they belong.
    pub(super) fn random(
        d: &CudaDevice,
        format: WeightFormat,
        n: usize,
        k: usize,
        random: RandomWeights,
    ) -> Result<CudaPacked> {
        let packed = CudaPacked::empty(d, format, n, k)?;
        let [numbers, scales, minima] = packed.parts();
        let (stream, kernel) = (StreamWords::new(random.stream), format!("random_{}", format.name()));
        // A thread makes what four lanes of a generator give, or one.
        match random.group(format) {
            Some(group) => {
                let groups = n * k.div_ceil(GROUP);
                d.by_element(&kernel, 4 * groups, args![numbers, n as u64, k as u32, stream]);
                let fill = |to: Address, value: bf16| {
                    d.by_element("fill_2", groups, args![to, value.to_bits() as u32, groups as u64]);
                };
                fill(scales, group.scale);
                if has_minima(format) {
                    fill(minima, group.min);
                }
            }
            None => {
                let work = n * k.div_ceil(BLOCK) * (BLOCK / 4);
                d.by_element(&kernel, work, args![numbers, n as u64, k as u32, stream, random.step()]);
            }
        }
        Layout::new(format, n, k).write_ends(n, &|at, bytes| {
            packed.put(d, at, bytes);
            Ok(())
        })?;
        Ok(packed)
    }

    /// What was packed before, for the same layout.
    pub(super) fn mapped(
        d: &CudaDevice,
        format: WeightFormat,
        n: usize,
        k: usize,
        bytes: Mapped,
    ) -> Result<CudaPacked> {
        let packed = CudaPacked::empty(d, format, n, k)?;
        let (has, needs) = (bytes.bytes().len(), size(format, n, k));
        ensure!(
            has == needs,
            "{has} bytes were given for a matrix of {n} x {k} in {}, which has {needs}",
            format.name()
        );
        ensure!(
            bytes.bytes().as_ptr().addr().is_multiple_of(4),
            "a packed matrix cannot be used where it lies in its file: it does not begin at a multiple of 4 bytes"
        );
        packed.put(d, 0, bytes.bytes());
        Ok(packed)
    }

    /// Bytes that it takes.
    pub(super) fn bytes(&self) -> usize {
        size(self.format, self.n, self.k)
    }

    /// Addresses of numbers or codes, of scales and of minima.
    fn parts(&self) -> [Address; 3] {
        let layout = Layout::new(self.format, self.n, self.k);
        [0, layout.scales, layout.minima].map(|at| self.words.at(0, 0) + at as u64)
    }
}

/// `Finish` of kernels/packed.cu.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Finish {
    bias: Address,
    residual: Address,
    y: Address,
    relu: u32,
    unused: u32,
}

/// Bytes of workspace for rounding activations.
pub(super) fn rounded_bytes(m: usize, k: usize) -> usize {
    m * k.div_ceil(GROUP) * (GROUP + 8)
}

/// `y[m, n] = act(x * w^T + bias) + residual`.
pub(super) fn multiply<E: Element, O: Element>(
    d: &CudaDevice,
    m: usize,
    x: &CudaBuf<E>,
    w: &CudaPacked,
    bias: Option<&CudaBuf<f32>>,
    act: Activation,
    residual: Option<&CudaBuf<f32>>,
    y: &mut CudaBuf<O>,
) {
    let (n, k) = (w.n, w.k);
    let x = x.at(0, m * k);
    let finish = Finish {
        bias: optional(bias, n),
        residual: optional(residual, m * n),
        y: y.at(0, m * n),
        relu: (act == Activation::Relu) as u32,
        unused: 0,
    };
    let [numbers, scales, minima] = w.parts();
    let (format, rows, columns) = (w.format.name(), m as u32, n as u32);
    if quantise::largest_code(w.format).is_none() {
        let (kernel, blocks, threads) = match (w.format, E::DTYPE) {
            (WeightFormat::Bf16, DType::Bf16) => match many(d, m, n) {
                Some(blocks) => ("many".into(), blocks, THREADS),
                None => some(m, n),
            },
            _ => {
                let together = if m == 1 { 1 } else { TOGETHER };
                (together.to_string(), (n.div_ceil(WARPS), m.div_ceil(together)), 32 * WARPS)
            }
        };
        let kernel = format!("packed_{format}_{}_{}_{kernel}", name::<E>(), name::<O>());
        let arguments = args![numbers, x, rows, columns, k as u32, finish];
        return d.kernels.launch(&kernel, blocks, (threads, 1), 0, arguments);
    }
    let groups = k.div_ceil(GROUP);
    let mut workspace = d.workspace();
    let codes = workspace.take(Scratch::Rounded, rounded_bytes(m, k));
    let of_rows = codes + (m * groups * GROUP) as u64;
    let rounded = [codes, of_rows, of_rows + (4 * m * groups) as u64];
    let arguments = args![x, rows, k as u32, rounded[0], rounded[1], rounded[2]];
    let kernel = format!("round_rows_{}", name::<E>());
    d.kernels.launch(&kernel, ((m * groups).div_ceil(WARPS), 1), (32 * WARPS, 1), 0, arguments);
    let (kernel, blocks, threads) = some(m, n);
    let kernel = format!("packed_{format}_{}_{kernel}", name::<O>());
    let arguments = args![numbers, scales, minima, rounded, rows, columns, groups as u32, finish];
    d.kernels.launch(&kernel, blocks, (threads, 1), 0, arguments);
}

/// End of the name, blocks and threads of a kernel for some rows. With many it is the slower one, but has the same bits.
fn some(m: usize, n: usize) -> (String, (usize, usize), usize) {
    let times = if m <= SOME { 1 } else { 4 };
    (times.to_string(), (n.div_ceil(COLUMNS), m.div_ceil(times * SOME)), THREADS)
}

/// Blocks of the kernel for many rows, where there are enough to keep the GPU's multiprocessors busy.
fn many(d: &CudaDevice, m: usize, n: usize) -> Option<(usize, usize)> {
    let blocks = (n.div_ceil(MANY), m.div_ceil(MANY));
    (m > 4 * SOME && 2 * blocks.0 * blocks.1 >= d.gpu.multiprocessors).then_some(blocks)
}

/// Rows `ids` of `w`, plus rows of a second table.
pub(super) fn embed(
    d: &CudaDevice,
    rows: usize,
    ids: &CudaBuf<u32>,
    w: &CudaPacked,
    second: Option<(&CudaBuf<u32>, &CudaBuf<f32>)>,
    out: &mut CudaBuf<f32>,
) {
    let (ids2, table2) = second.map_or((0, 0), |(ids, table)| (ids.at(0, rows), table.at(0, 0)));
    let [numbers, scales, minima] = w.parts();
    let arguments =
        args![numbers, scales, minima, ids.at(0, rows), ids2, table2, out.at(0, rows * w.k), w.k as u32];
    d.by_row(&format!("packed_embed_{}", w.format.name()), rows, w.k, arguments);
}
