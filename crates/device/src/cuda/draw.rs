//! Choosing tokens, a block for each.

use bytemuck::NoUninit;

use super::kernels::args;
use super::workspace::Scratch;
use super::{CudaBuf, CudaDevice, StreamWords};
use crate::Draw;

/// Threads of a block: as many as one may have, since few tokens are chosen at a time.
const THREADS: usize = 1024;

/// `Draw` of kernels/draw.cu.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Words {
    blocks: StreamWords,
    tokens: StreamWords,
    place: u64,
    row: u32,
    without: u32,
    top_k: u32,
    scale: f32,
    top_p: f32,
    min_p: f32,
}

impl Words {
    fn new(row: usize, draw: &Draw) -> Words {
        let race = draw.race();
        Words {
            blocks: StreamWords::new(race.blocks),
            tokens: StreamWords::new(race.tokens),
            place: race.place,
            row: row as u32,
            without: draw.without.unwrap_or(u32::MAX),
            top_k: draw.top_k.map_or(u32::MAX, |k| k.min(u32::MAX as usize) as u32),
            scale: draw.scale(),
            top_p: draw.top_p,
            min_p: draw.min_p,
        }
    }
}

/// [`crate::Device::draw`].
pub(super) fn draw(
    d: &CudaDevice,
    (width, known): (usize, usize),
    logits: &CudaBuf<f32>,
    draws: &[(usize, Draw)],
) -> Vec<u32> {
    let mut ids = vec![0; draws.len()];
    let Some(rows) = draws.iter().map(|(row, _)| row + 1).max() else { return ids };
    let words: Vec<Words> = draws.iter().map(|(row, draw)| Words::new(*row, draw)).collect();
    let mut workspace = d.workspace();
    let (bytes, results) = (size_of_val(&words[..]), 4 * draws.len());
    let asked = workspace.take(Scratch::Draws, bytes + results);
    let chosen = asked + bytes as u64;
    let weights = workspace.take(Scratch::Weights, 4 * known * draws.len());
    d.write::<u8>(asked, bytemuck::cast_slice(&words));
    let (width, known, logits) = (width as u32, known as u32, logits.at(0, rows * width));
    d.kernels.launch(
        "draw",
        (draws.len(), 1),
        (THREADS, 1),
        0,
        args![logits, width, known, asked, weights, chosen],
    );
    d.read(chosen, &mut ids);
    ids
}
