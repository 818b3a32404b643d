//! What the ranks of a run tell each other in a step: formulas, to be compared with what is counted.

use crate::config::Resolved;
use ferropt_device::DType;
use ferropt_mesh::{Axes, Operation, SMALL_SUM, Traffic};
use ferropt_model::{Config, Held, Options, Recompute};
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
}

/// Operations in the order of the fields, with the names of their groups.
const OPERATIONS: [(&str, Operation); 6] = [
    ("shard", Operation::AllGather),
    ("shard", Operation::ReduceScatter),
    ("tensor", Operation::AllGather),
    ("tensor", Operation::ReduceScatter),
    ("tensor", Operation::AllReduce),
    ("replicate", Operation::AllReduce),
];

impl Communication {
    /// What a run's ranks send, with matrices and activations of type `compute`.
    pub(crate) fn new(resolved: &Resolved, compute: DType) -> Communication {
        let held = resolved.model.held(resolved.part());
        let passes = resolved.accumulation() as u64;
        Communication::of(&resolved.model, &held, &resolved.options(), resolved.axes, passes, compute)
    }

    /// The same from its parts; `passes` are micro-batches of a rank in a step.
    fn of(
        model: &Config,
        held: &[Held],
        options: &Options,
        axes: Axes,
        passes: u64,
        compute: DType,
    ) -> Communication {
        let (f32, compute) = (DType::F32.size() as u64, compute.size() as u64);
        let (layers, parts, shards) = (model.layers as u64, axes.tensor as u64, axes.shard as u64);

        // FSDP. A unit's buffers are gathered from the other ranks' shards, and its gradients are sent to them.
        let shard = |of_layer: bool, gradient: bool| -> u64 {
            let unit = held.iter().filter(|h| h.parameter.layer() == of_layer.then_some(0));
            let size = |h: &Held| if gradient || !h.parameter.is_matrix() { f32 } else { compute };
            unit.map(|h| h.shard_len as u64 * size(h)).sum()
        };
        // Two layers stay: a pass begins with those that the one before it ended with.
        let gathered = match layers {
            1 => 1,
            _ => layers + (2 * passes - 1) * (layers - 2),
        };
        let shard_gather = (shards - 1) * (gathered * shard(true, false) + shard(false, false));
        let shard_scatter = (shards - 1) * passes * (layers * shard(true, true) + shard(false, true));

        // Tensor parallelism. A rank sends its own rows, or its share of another's, to each other part: forward twice in both
        // blocks of a layer, backward thrice, since what was gathered is gathered again instead of kept.
        let rows = (options.batch * options.seq) as u64 / parts;
        let wide = (parts - 1) * rows * model.width as u64 * compute;
        let narrow = (parts - 1) * rows * model.embedding_width as u64 * compute;
        let post = u64::from(model.post_norm);
        let (again_gather, again_scatter) = match options.recompute {
            Recompute::Full => ((layers - 1) * 2, (layers - 1) * (1 + post)),
            _ => (0, 0),
        };
        let tensor_gather = passes * ((6 * layers + again_gather) * wide + (2 + post) * narrow);
        let tensor_scatter = passes * ((4 * layers + again_scatter) * wide + 2 * narrow);

        let reduce = |ranks: u64, which: &dyn Fn(&Held) -> bool| -> u64 {
            held.iter().filter(|h| which(h)).map(|h| reduced(ranks, h.shard_len as u64, f32)).sum()
        };
        Communication {
            shard_gather,
            shard_scatter,
            tensor_gather,
            tensor_scatter,
            tensor_reduce: reduce(parts, &Held::is_whole),
            replicate_reduce: reduce(axes.replicate as u64, &|_| true),
        }
    }

    /// What was counted.
    pub(crate) fn counted(traffic: &[Traffic]) -> Communication {
        let [shard_gather, shard_scatter, tensor_gather, tensor_scatter, tensor_reduce, replicate_reduce] =
            OPERATIONS.map(|(group, operation)| {
                let same = |t: &&Traffic| t.group == group && t.operation == operation;
                traffic.iter().find(same).map_or(0, |t| t.bytes)
            });
        Communication {
            shard_gather,
            shard_scatter,
            tensor_gather,
            tensor_scatter,
            tensor_reduce,
            replicate_reduce,
        }
    }

    /// Names for people, with bytes.
    pub(crate) fn parts(&self) -> [(&'static str, u64); 6] {
        [
            ("weights gathered", self.shard_gather),
            ("gradients scattered", self.shard_scatter),
            ("rows gathered", self.tensor_gather),
            ("rows summed", self.tensor_scatter),
            ("gradients of parts", self.tensor_reduce),
            ("gradients of replicas", self.replicate_reduce),
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
