//! What the ranks of a run tell each other in a step: formulas, to be compared with what is counted.

use crate::config::Resolved;
use ferropt_device::DType;
use ferropt_mesh::{Operation, SMALL_SUM, Traffic};
use ferropt_model::{Held, Place, Recompute, gathers, schedule};
use serde::Serialize;

/// Bytes that one rank sends in a step, by group and operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Communication {
    /// Whole layers and ends, gathered from their shards (FSDP).
    pub shard_gather: u64,
    /// Gradients, summed into shards (FSDP).
    pub shard_scatter: u64,
    /// Rows that the parts of a layer gather (tensor and sequence parallelism).
    pub tensor_gather: u64,
    /// Rows that they sum.
    pub tensor_scatter: u64,
    /// Gradients of what every part has.
    pub tensor_reduce: u64,
    /// Gradients of replicas.
    pub replicate_reduce: u64,
    /// Rows that go to the next stage.
    pub pipeline_send: u64,
    /// Gradients of the embedding table, which the last stage has too.
    pub tied_reduce: u64,
}

/// Operations in the order of the fields, with the names of their groups.
const OPERATIONS: [(&str, Operation); 8] = [
    ("shard", Operation::AllGather),
    ("shard", Operation::ReduceScatter),
    ("tensor", Operation::AllGather),
    ("tensor", Operation::ReduceScatter),
    ("tensor", Operation::AllReduce),
    ("replicate", Operation::AllReduce),
    ("pipeline", Operation::Send),
    ("tied", Operation::AllReduce),
];

impl Communication {
    /// What a run's first rank sends, with matrices and activations of type `compute`. Others in its stage send as much.
    pub(crate) fn new(resolved: &Resolved, compute: DType) -> Communication {
        let (model, options, axes) = (&resolved.model, resolved.options(), resolved.axes);
        let part = resolved.part();
        let held = model.held(part);
        let passes = resolved.accumulation() as u64;
        let (f32, compute) = (DType::F32.size() as u64, compute.size() as u64);
        let (parts, shards) = (axes.tensor as u64, axes.shard as u64);
        let stages = axes.pipeline;
        // The first stage's layers; with a single one it has the LM head too.
        let here = part.stage.end - part.stage.start;
        let (layers, head) = (here as u64, u64::from(stages == 1));

        // FSDP. A unit's buffers are gathered from the other ranks' shards, and its gradients are sent to them.
        let shard = |of_layer: bool, gradient: bool| -> u64 {
            let unit = held.iter().filter(|h| h.parameter.layer() == of_layer.then_some(0));
            let size = |h: &Held| if gradient || !h.parameter.is_matrix() { f32 } else { compute };
            unit.map(|h| h.shard_len as u64 * size(h)).sum()
        };
        // Two layers stay: a pass begins with those that the one before it ended with.
        let tasks = schedule(Place { rank: 0, of: stages }, passes as usize);
        let gathered = gathers(&tasks, here);
        let shard_gather = (shards - 1) * (gathered * shard(true, false) + shard(false, false));
        let shard_scatter = (shards - 1) * passes * (layers * shard(true, true) + shard(false, true));

        // Tensor parallelism. A rank sends its own rows, or its share of another's, to each other part: forward twice in both
        // blocks of a layer, backward thrice, since what was gathered is gathered again instead of kept.
        let rows = (options.batch * options.seq) as u64 / parts;
        let wide = (parts - 1) * rows * model.width as u64 * compute;
        let narrow = (parts - 1) * rows * model.embedding_width as u64 * compute;
        let post = u64::from(model.post_norm);
        let (again_gather, again_scatter) = match options.recompute {
            // But for the last layer's, which are still there.
            Recompute::Full => ((layers - 1) * 2, (layers - 1) * (1 + post)),
            _ => (0, 0),
        };
        let tensor_gather = passes * ((6 * layers + again_gather) * wide + (1 + head + post) * narrow);
        let tensor_scatter = passes * ((4 * layers + again_scatter) * wide + (1 + head) * narrow);

        let reduce = |ranks: u64, which: &dyn Fn(&Held) -> bool| -> u64 {
            held.iter()
                .filter(|h| h.shard_len > 0 && which(h))
                .map(|h| reduced(ranks, h.shard_len as u64, f32))
                .sum()
        };
        Communication {
            shard_gather,
            shard_scatter,
            tensor_gather,
            tensor_scatter,
            tensor_reduce: reduce(parts, &Held::is_whole),
            replicate_reduce: reduce(axes.replicate as u64, &|_| true),
            pipeline_send: if stages == 1 { 0 } else { passes * rows * model.width as u64 * f32 },
            tied_reduce: if stages == 1 { 0 } else { reduce(2, &|h| h.index == 0) },
        }
    }

    /// What was counted.
    pub(crate) fn counted(traffic: &[Traffic]) -> Communication {
        let bytes = OPERATIONS.map(|(group, operation)| {
            let same = |t: &&Traffic| t.group == group && t.operation == operation;
            traffic.iter().find(same).map_or(0, |t| t.bytes)
        });
        Communication {
            shard_gather: bytes[0],
            shard_scatter: bytes[1],
            tensor_gather: bytes[2],
            tensor_scatter: bytes[3],
            tensor_reduce: bytes[4],
            replicate_reduce: bytes[5],
            pipeline_send: bytes[6],
            tied_reduce: bytes[7],
        }
    }

    /// Names for people, with bytes.
    pub(crate) fn parts(&self) -> [(&'static str, u64); 8] {
        [
            ("weights gathered", self.shard_gather),
            ("gradients scattered", self.shard_scatter),
            ("rows gathered", self.tensor_gather),
            ("rows summed", self.tensor_scatter),
            ("gradients of parts", self.tensor_reduce),
            ("gradients of replicas", self.replicate_reduce),
            ("rows passed on", self.pipeline_send),
            ("gradients of the head", self.tied_reduce),
        ]
    }

    /// Bytes of all together.
    pub fn total(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }
}

/// Bytes that the first rank sends in an all-reduce of so many elements: small ones go to everyone; of larger ones the sums of
/// equal parts are made, then gathered.
fn reduced(ranks: u64, elements: u64, size: u64) -> u64 {
    if ranks == 1 {
        return 0;
    }
    if elements * size <= SMALL_SUM as u64 {
        return (ranks - 1) * elements * size;
    }
    // The last part may be shorter; the first rank has a whole one.
    let part = elements.div_ceil(ranks);
    (elements - part + (ranks - 1) * part) * size
}
