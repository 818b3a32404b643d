//! Whole tensors out of what many ranks hold, each at the rank that writes it.

use crate::checkpoint::deal;
use anyhow::{Context, Result};
use ferropt_device::{Device, Element};
use ferropt_mesh::{Label, Mesh};
use ferropt_model::{Held, Part};

/// Brings tensors together: every parameter has one rank that writes it, so that all ranks write about as much.
pub(crate) struct Collector {
    mesh: Mesh,
    /// Rank that writes each parameter.
    writers: Vec<usize>,
    layers: usize,
}

/// The rank of so many that writes each parameter.
pub(crate) fn writers(table: &[Held], ranks: usize) -> Vec<usize> {
    let sizes: Vec<u64> = table.iter().map(|held| held.parameter.elements() as u64).collect();
    deal(&sizes, ranks)
}

impl Collector {
    /// Shares out parameters among the ranks of a mesh.
    pub(crate) fn new(mesh: Mesh, table: &[Held]) -> Collector {
        let layers = table.iter().filter_map(|held| held.parameter.layer()).max().map_or(0, |last| last + 1);
        Collector { writers: writers(table, mesh.world.size()), mesh, layers }
    }

    /// All values of a parameter, on the rank that writes it, given the shard of every rank; nothing on the others. Called on
    /// all ranks, for the same parameters in the same order.
    ///
    /// # Errors
    /// When another rank is lost.
    pub(crate) fn whole<D: Device, T: Element>(
        &self,
        device: &D,
        held: &Held,
        mut shard: Vec<T>,
    ) -> Result<Option<Vec<T>>> {
        let all = &self.mesh.all;
        if all.size() == 1 {
            return Ok(Some(shard));
        }
        let (me, writer, label) = (all.rank(), self.writers[held.index], Label::of("checkpoint", held.index));
        shard.truncate(held.shard.len());
        // Replicas have the same; the first of them gives.
        let givers = (0..all.size()).filter_map(|rank| {
            let axes = self.mesh.axes;
            let part = Part::of_rank(axes, self.layers, rank);
            let theirs = Held::new(held.parameter.clone(), held.index, part);
            (axes.replica(rank) == 0 && theirs.speaks && !theirs.shard.is_empty()).then_some((rank, theirs))
        });
        if me != writer {
            if givers.into_iter().any(|(rank, _)| rank == me) {
                let mut buffer = device.alloc(shard.len())?;
                device.upload(&mut buffer, 0, &shard);
                all.send(label, writer, buffer).wait()?;
            }
            return Ok(None);
        }
        let mut coming = Vec::new();
        let mut values = vec![T::default(); held.parameter.elements()];
        let mut put = |theirs: &Held, shard: &[T]| {
            for (at, start, len) in theirs.pieces() {
                values[start..start + len].copy_from_slice(&shard[at..at + len]);
            }
        };
        for (rank, theirs) in givers {
            if rank == me {
                put(&theirs, &shard);
            } else {
                coming.push((all.receive(label, rank, device.alloc::<T>(theirs.shard.len())?), theirs));
            }
        }
        for (buffer, theirs) in coming {
            let buffer = buffer.wait().context("a part of a checkpoint did not come")?;
            let mut shard = vec![T::default(); theirs.shard.len()];
            device.download(&buffer, 0, &mut shard);
            put(&theirs, &shard);
        }
        Ok(Some(values))
    }
}
