//! Memory that operations use beside their arguments.

use std::sync::Arc;

use super::CudaBuf;
use super::driver::{Address, Gpu};
use crate::Buffer;

/// A piece of workspace.
#[derive(Clone, Copy)]
pub(super) enum Scratch {
    /// Products in f32, on their way to an epilogue.
    Product,
    /// Parts of sums over rows.
    Parts,
    /// Logits of a chunk of rows.
    Logits,
    /// What is known of each row of logits.
    Rows,
    /// Of attention's backward pass, for each query.
    Delta,
    /// Activations in 8 bits.
    Rounded,
    /// Master values on their way.
    Masters,
    /// How tokens are to be chosen, and those that were.
    Draws,
    /// How likely tokens are.
    Weights,
}

const PIECES: usize = 9;

/// Each piece grows to the largest size asked for, in the first step, and is then reused: the work of one stream is done in
/// order, so that the next operation's use of it begins when the last one's is over.
pub(super) struct Workspace {
    gpu: Arc<Gpu>,
    pieces: [Option<CudaBuf<u32>>; PIECES],
    moved: u64,
}

impl Workspace {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Self {
        Workspace { gpu: gpu.clone(), pieces: [const { None }; PIECES], moved: 0 }
    }

    /// A piece of at least so many bytes, with unspecified contents.
    ///
    /// Fails the GPU when memory is short.
    pub(super) fn take(&mut self, which: Scratch, bytes: usize) -> Address {
        let words = bytes.div_ceil(4).max(1);
        let slot = &mut self.pieces[which as usize];
        if slot.as_ref().is_none_or(|piece| piece.len() < words) {
            self.moved += 1;
            // The old piece is given back before the new one is made.
            *slot = None;
            let new = CudaBuf::new(&self.gpu, words);
            *slot = Some(
                new.unwrap_or_else(|e| self.gpu.fail(&format!("no room for kernels' workspace: {e:#}"))),
            );
        }
        slot.as_ref().expect("made above").at(0, words)
    }

    /// How often a piece was made larger. As long as that is the same, all are where they were.
    pub(super) fn moved(&self) -> u64 {
        self.moved
    }

    /// Bytes of all pieces.
    pub(super) fn bytes(&self) -> usize {
        self.pieces.iter().flatten().map(|piece| 4 * piece.len()).sum()
    }
}
