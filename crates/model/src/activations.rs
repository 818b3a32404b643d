//! The activation table: every buffer that a forward and backward pass uses beside weights and gradients of weights.
//! [`Activations`] allocates from it, the planner adds it up, and nothing else decides a size.

use crate::config::Config;
use anyhow::{Context, Result};
use ferropt_device::{DType, Device, Element};
use std::collections::BTreeMap;

/// Which activations the backward pass computes again instead of keeping them. The gradients are the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// None.
    None,
    /// What is cheap: layer norms and attention (Korthikanti et al., 2022).
    Selective,
    /// All but one row per layer and token (Chen et al., 2016).
    Full,
}

/// Type of an activation's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scalar {
    /// The compute type, f32 or bf16.
    Compute,
    /// f32 whatever the compute type is: the residual stream and statistics.
    F32,
    /// Token ids and positions.
    U32,
}

impl Scalar {
    /// The type, given the compute type.
    pub fn dtype(self, compute: DType) -> DType {
        match self {
            Scalar::Compute => compute,
            Scalar::F32 => DType::F32,
            Scalar::U32 => DType::U32,
        }
    }
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq)]
pub struct Activation {
    /// Unique name.
    pub name: &'static str,
    /// Type of its elements.
    pub scalar: Scalar,
    /// Elements of one copy.
    pub elements: usize,
    /// As many copies as there are layers where the backward pass needs each layer's own, else one.
    pub copies: usize,
}

/// Every buffer of a pass over `[B, T]` tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct ActivationTable(Vec<Activation>);

impl ActivationTable {
    /// Activations and their gradients, for training with micro-batches of `batch` sequences of `seq` tokens, in one of so
    /// many tensor-parallel `parts`.
    pub fn training(config: &Config, batch: usize, seq: usize, recompute: Recompute, parts: usize) -> Self {
        use Scalar::{Compute, F32, U32};
        let (c, w) = (config.width, config.embedding_width);
        // All rows, in divided widths; and the rows that a part has between blocks, in whole widths.
        let (all, n) = (batch * seq, (batch * seq).div_ceil(parts));
        let (divided, f, heads) = (c / parts, config.feed_forward / parts, config.heads / parts);
        let layers = config.layers;
        // Copies of what is kept unless recomputation is `Selective` or more, or only unless it is `Full`.
        let if_none = if recompute == Recompute::None { layers } else { 1 };
        let unless_full = if recompute == Recompute::Full { 1 } else { layers };
        let mut table = ActivationTable(Vec::new());
        let mut add =
            |name, scalar, elements, copies| table.0.push(Activation { name, scalar, elements, copies });

        for name in ["tokens", "targets", "doc_start"] {
            add(name, U32, all, 1);
        }
        add("positions", U32, n, 1);
        if parts > 1 {
            // What goes between the parts: all rows, in whole widths.
            for name in ["gathered", "partial"] {
                add(name, Compute, all * c, 1);
            }
            if config.has_projections() {
                for name in ["gathered_narrow", "partial_narrow"] {
                    add(name, Compute, all * w, 1);
                }
            }
        }
        if config.has_projections() || parts > 1 {
            add("embedded", Compute, n * w, 1);
            add("position_rows", F32, n * c, 1);
        }
        // Residual stream before each layer, and behind the last. With pre-norm it is what the first layer norm reads;
        // with post-norm it follows from `sum2` unless that is not kept either.
        let stream = match (config.post_norm, recompute) {
            (false, _) => layers + 1,
            (true, Recompute::Full) => layers,
            (true, _) => 1,
        };
        add("stream", F32, n * c, stream);
        add("normed1", Compute, n * c, if config.post_norm { unless_full } else { if_none });
        add("qkv", Compute, all * 3 * divided, unless_full);
        add("attended", Compute, all * divided, if_none);
        add("lse", F32, all * heads, if_none);
        // Residual stream between the two blocks of a layer.
        add("mid", F32, n * c, unless_full);
        add("normed2", Compute, n * c, if_none);
        add("relu", Compute, all * f, unless_full);
        if config.post_norm {
            // Residual stream behind the first layer norm, and the second one's input.
            add("between", F32, n * c, 1);
            add("sum2", F32, n * c, unless_full);
        }
        for name in ["mean1", "rstd1", "mean2", "rstd2"] {
            add(name, F32, n, unless_full);
        }
        add("hidden", Compute, n * c, 1);
        if config.has_projections() {
            add("projected", Compute, n * w, 1);
        }
        add("losses", F32, all, 1);

        if !config.post_norm {
            add("final_mean", F32, n, 1);
            add("final_rstd", F32, n, 1);
        }
        // Gradients, each of the activation of that name.
        add("d_stream", F32, n * c, 1);
        if config.post_norm {
            add("d_stream_before", F32, n * c, 1);
        }
        if config.has_projections() {
            add("d_embedded", Compute, n * w, 1);
        }
        add("d_branch", Compute, n * c, 1);
        add("d_relu", Compute, all * f, 1);
        add("d_normed", Compute, n * c, 1);
        add("d_attended", Compute, all * divided, 1);
        add("d_qkv", Compute, all * 3 * divided, 1);
        table
    }

    /// The lines.
    pub fn entries(&self) -> &[Activation] {
        &self.0
    }

    /// Bytes of all of it.
    pub fn bytes(&self, compute: DType) -> u64 {
        let bytes = |a: &Activation| (a.elements * a.copies * a.scalar.dtype(compute).size()) as u64;
        self.0.iter().map(bytes).sum()
    }
}

/// Copies of one activation; layers share the last one where there are fewer copies than layers.
pub(crate) struct Copies<B>(Vec<B>);

impl<B> std::ops::Index<usize> for Copies<B> {
    type Output = B;
    fn index(&self, layer: usize) -> &B {
        &self.0[layer.min(self.0.len() - 1)]
    }
}

impl<B> std::ops::IndexMut<usize> for Copies<B> {
    fn index_mut(&mut self, layer: usize) -> &mut B {
        let last = self.0.len() - 1;
        &mut self.0[layer.min(last)]
    }
}

/// Buffers of the lines of a table, to be taken by name.
pub(crate) struct Allocator<'a, D> {
    device: &'a D,
    lines: BTreeMap<&'static str, Activation>,
}

impl<'a, D: Device> Allocator<'a, D> {
    pub(crate) fn new(device: &'a D, table: ActivationTable) -> Self {
        Allocator { device, lines: table.0.into_iter().map(|line| (line.name, line)).collect() }
    }

    /// All copies of a line.
    pub(crate) fn copies<T: Element>(&mut self, name: &str) -> Result<Copies<D::Buf<T>>> {
        let line = self.lines.remove(name).with_context(|| format!("there is no activation {name}"))?;
        let make = |_| {
            self.device.alloc(line.elements).with_context(|| format!("no room for the activation {name}"))
        };
        Ok(Copies((0..line.copies).map(make).collect::<Result<_>>()?))
    }

    /// The only copy of a line.
    pub(crate) fn one<T: Element>(&mut self, name: &str) -> Result<D::Buf<T>> {
        self.copies(name)?.0.pop().with_context(|| format!("the activation {name} has no copy"))
    }

    /// The only copy of a line that not every model has.
    pub(crate) fn optional<T: Element>(&mut self, name: &str) -> Result<Option<D::Buf<T>>> {
        if self.lines.contains_key(name) { self.one(name).map(Some) } else { Ok(None) }
    }

    /// Lines that nobody took.
    #[cfg(test)]
    pub(crate) fn left(&self) -> Vec<&'static str> {
        self.lines.keys().copied().collect()
    }
}
