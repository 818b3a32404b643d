//! Attention over whole sequences, and of new tokens over a paged cache.

use bytemuck::NoUninit;

use super::kernels::args;
use super::workspace::Scratch;
use super::{CudaBuf, CudaDevice, DropoutWords, name, optional};
use crate::{AttentionShape, Buffer, DType, Dropout, Element, PAGE, Placed};

/// Queries and keys of a tile, and threads of a block; see kernels/attention.cuh.
const QUERIES: usize = 16;
const KEYS: usize = 32;
const THREADS: usize = 128;
/// Threads of a block of attention over pages, which its warps share out.
const PAGED_THREADS: usize = 256;
/// The widest head that kernels exist for.
const WIDEST: usize = 256;

/// Rows of a tile on tensor cores, and the queries of one whose keys stay; see kernels/attention_mma.cuh.
const TILE: usize = 64;
const FEW: usize = 32;

/// Whether tensor cores can be used: halves, and heads as OPT has them.
fn on_tensor_cores<E: Element>(width: usize) -> bool {
    matches!(E::DTYPE, DType::Bf16 | DType::F16) && matches!(width, 64 | 80 | 128)
}

/// Bytes of so many rows of a head in shared memory, in halves, their ends being spread over the banks.
fn staged(rows: usize, width: usize) -> usize {
    2 * rows * (width + 8)
}

/// `Heads` of kernels/attention.cuh.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Heads {
    seq: u32,
    heads: u32,
    width: u32,
    before: u32,
    among: u32,
    scale: f32,
}

impl Heads {
    fn new(s: AttentionShape) -> Heads {
        Heads {
            seq: s.seq as u32,
            heads: s.heads as u32,
            width: s.width as u32,
            before: s.among.0 as u32,
            among: s.among.1 as u32,
            scale: 1.0 / (s.width as f32).sqrt(),
        }
    }
}

/// Blocks for tiles of so many rows: all in x, of which a GPU takes 2^31; of the others 65,535.
fn blocks(s: AttentionShape, tile: usize) -> (usize, usize) {
    (s.seq.div_ceil(tile) * s.batch * s.heads, 1)
}

/// A kernel's name for elements `E` and heads of this width.
fn named<E: Element>(kernel: &str, width: usize) -> String {
    assert!(width <= WIDEST, "heads of width {width}; on a GPU they may be at most {WIDEST} wide");
    let rounded = if width <= 64 { 64 } else { width.next_power_of_two() };
    format!("{kernel}_{}_{rounded}", name::<E>())
}

/// Bytes of shared memory of the backward pass without tensor cores.
fn backward_shared(width: usize) -> usize {
    4 * (2 * QUERIES * width + 2 * KEYS * (width + 1) + 2 * QUERIES * KEYS)
}

/// Why a GPU whose blocks have at most so many bytes of shared memory cannot make that pass, if it cannot.
fn too_wide(width: usize, gpu: &str, most: usize) -> Option<String> {
    let wanted = backward_shared(width);
    let fits = (1..width).rev().find(|width| backward_shared(*width) <= most).unwrap_or_default();
    (wanted > most).then(|| {
        format!(
            "training heads of width {width} takes {wanted} bytes of shared memory; a block has at most {most} on {gpu}: use more \
             heads, at most {fits} wide, or a GPU such as A100 or H100"
        )
    })
}

/// Bytes of workspace of the backward pass.
pub(super) fn workspace_bytes(s: AttentionShape) -> usize {
    4 * s.batch * s.heads * s.seq
}

pub(super) fn forward<E: Element>(
    d: &CudaDevice,
    s: AttentionShape,
    qkv: &CudaBuf<E>,
    doc_start: Option<&CudaBuf<u32>>,
    dropout: Option<Dropout>,
    out: &mut CudaBuf<E>,
    lse: &mut CudaBuf<f32>,
) {
    let (tokens, all) = (s.batch * s.seq, s.heads * s.width);
    let arguments = args![
        qkv.at(0, tokens * 3 * all),
        optional(doc_start, tokens),
        Heads::new(s),
        DropoutWords::new(dropout),
        out.at(0, tokens * all),
        lse.at(0, tokens * s.heads)
    ];
    if on_tensor_cores::<E>(s.width) {
        let kernel = format!("attention_mma_{}_{}", name::<E>(), s.width);
        return d.kernels.launch(
            &kernel,
            blocks(s, TILE),
            (THREADS, 1),
            staged(2 * TILE, s.width),
            arguments,
        );
    }
    let shared = 4 * (QUERIES * s.width + KEYS * (2 * s.width + 1) + QUERIES * KEYS);
    d.kernels.launch(&named::<E>("attention", s.width), blocks(s, QUERIES), (THREADS, 1), shared, arguments);
}

pub(super) fn backward<E: Element>(
    d: &CudaDevice,
    s: AttentionShape,
    qkv: &CudaBuf<E>,
    doc_start: Option<&CudaBuf<u32>>,
    dropout: Option<Dropout>,
    out: &CudaBuf<E>,
    lse: &CudaBuf<f32>,
    dout: &CudaBuf<E>,
    dqkv: &mut CudaBuf<E>,
) {
    let (tokens, all) = (s.batch * s.seq, s.heads * s.width);
    let (rows, heads) = (tokens * s.heads, Heads::new(s));
    if !on_tensor_cores::<E>(s.width)
        && let Some(reason) = too_wide(s.width, &d.gpu.name, d.gpu.shared)
    {
        crate::failure::fail(reason);
    }
    let mut workspace = d.workspace();
    let delta = workspace.take(Scratch::Delta, workspace_bytes(s));
    let arguments = args![out.at(0, tokens * all), dout.at(0, tokens * all), heads, delta, rows as u64];
    let kernel = format!("attention_delta_{}", name::<E>());
    d.kernels.launch(&kernel, (rows.div_ceil(THREADS / 32), 1), (THREADS, 1), 0, arguments);
    let plain = |kernel, tile| (named::<E>(kernel, s.width), tile, backward_shared(s.width));
    let mma = |kernel, rows| (format!("{kernel}_{}_{}", name::<E>(), s.width), TILE, staged(rows, s.width));
    let kernels = if on_tensor_cores::<E>(s.width) {
        [mma("attention_mma_dq", 2 * TILE), mma("attention_mma_dkv", 2 * TILE + 2 * FEW)]
    } else {
        [plain("attention_dq", QUERIES), plain("attention_dkv", KEYS)]
    };
    for (kernel, tile, shared) in kernels {
        let arguments = args![
            qkv.at(0, tokens * 3 * all),
            optional(doc_start, tokens),
            heads,
            DropoutWords::new(dropout),
            lse.at(0, rows),
            delta,
            dout.at(0, tokens * all),
            dqkv.at(0, tokens * 3 * all)
        ];
        d.kernels.launch(&kernel, blocks(s, tile), (THREADS, 1), shared, arguments);
    }
}

pub(super) fn paged<E: Element>(
    d: &CudaDevice,
    heads: usize,
    width: usize,
    places: Placed<'_, CudaDevice>,
    qkv: &CudaBuf<E>,
    k_pages: &mut CudaBuf<E>,
    v_pages: &mut CudaBuf<E>,
    out: &mut CudaBuf<E>,
) {
    let (rows, all) = (places.rows, heads * width);
    places.check(k_pages.len(), v_pages.len(), all * PAGE);
    let (qkv, places) = (qkv.at(0, rows * 3 * all), places.words.at(0, 2 * rows));
    let (k, v, h, w) = (k_pages.at(0, 0), v_pages.at(0, 0), heads as u32, width as u32);
    d.by_row(&format!("append_{}", name::<E>()), rows, all, args![qkv, places, h, w, k, v]);
    let scale = 1.0 / (width as f32).sqrt();
    let arguments = args![qkv, places, h, w, scale, k, v, out.at(0, rows * all)];
    d.kernels.launch(&named::<E>("attend", width), (rows, heads), (PAGED_THREADS, 1), 0, arguments);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_that_a_gpu_cannot_train_are_refused_with_what_it_could() {
        // What compute capability 8.6 and 8.9 have, and 8.0.
        let (few, many) = (99 << 10, 163 << 10);
        assert_eq!(backward_shared(WIDEST), 102_656);
        assert_eq!(too_wide(WIDEST, "A100", many), None);
        assert_eq!(too_wide(252, "RTX 4090", few), None);
        let reason = too_wide(WIDEST, "RTX 4090", few).unwrap();
        for part in ["width 256", "102656 bytes", "at most 101376 on RTX 4090", "at most 252 wide"] {
            assert!(reason.contains(part), "{reason}");
        }
    }
}
