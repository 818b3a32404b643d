//! What a run will take, computed from the tables that allocation uses, without allocating: parameters, memory by
//! part, floating-point operations in both conventions, time.

mod communication;

pub use communication::Communication;

use crate::checkpoint::{Share, human_bytes};
use crate::collect::writers;
use crate::config::{Precision, Resolved};
use crate::optimizer::Settings;
use ferropt_device::{AttentionShape, DType, Device, Element, bf16, f16};
use ferropt_model::{
    ActivationTable, Config, Held, Offload, Options, Parameter, Part, Recompute, boundary_buffers,
    layers_at_once,
};
use serde::Serialize;
use std::fmt;

/// Share of the measured matrix-product peak that a whole step is assumed to reach, for estimates of time.
const ASSUMED_SHARE: f64 = 0.75;

/// What a run will take.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// Name of the preset, or the sizes.
    pub model: String,
    /// Exact number of parameters.
    pub parameters: u64,
    /// Device, for people.
    pub device: String,
    /// Work per step.
    pub batch: BatchPlan,
    /// How the ranks are arranged; none for a run of one.
    pub ranks: Option<Ranks>,
    /// Bytes by part, of the rank that it is for.
    pub memory: Memory,
    /// Work per token.
    pub flops_per_token: Flops,
    /// How long it will take.
    pub time: Time,
}

/// How ranks share out a run, and what they tell each other for it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ranks {
    /// All ranks.
    pub number: usize,
    /// Ranks that divide matrices.
    pub tensor: usize,
    /// Ranks that share out weights.
    pub shard: usize,
    /// Replicas.
    pub replicate: usize,
    /// Stages that divide the layers.
    pub pipeline: usize,
    /// Bytes that each rank sends in a step.
    pub communication: Communication,
}

/// Tokens per step and how they are divided.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BatchPlan {
    /// Tokens of one optimiser step.
    pub tokens_per_step: u64,
    /// T, tokens per sequence.
    pub sequence: usize,
    /// Sequences of one forward and backward pass.
    pub micro_batch: usize,
    /// Passes per step, of each rank.
    pub accumulation: usize,
    /// Optimiser steps of the run.
    pub steps: u64,
    /// Tokens of the run.
    pub tokens: u64,
}

/// Bytes by part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// Weights in the compute type, vectors in f32.
    pub weights: u64,
    /// Low halves of bf16 and f16 weights that make them f32 masters.
    pub masters: u64,
    /// Layers and ends that are whole at a time, and their gradients, where ranks share them out or the host has them.
    pub units: u64,
    /// Gradients, f32.
    pub gradients: u64,
    /// Moments of the optimiser, f32.
    pub moments: u64,
    /// Activations of the micro-batches that are under way at once, their gradients, and what goes between stages.
    pub activations: u64,
    /// What kernels use beside their arguments.
    pub workspace: u64,
    /// Host copy of the rank's share of the state while a checkpoint is written.
    pub checkpoint: u64,
    /// What else is in the host's memory instead of the device's.
    pub offload: Offload,
    /// All that is in the device's own memory; none where it has none of its own.
    pub device: Option<u64>,
    /// All that is in the host's.
    pub host: u64,
    /// All of it.
    pub total: u64,
}

/// Floating-point operations per token, forward and backward, in two conventions; multiply and add are two operations.
///
/// The *whole square* counts T x T attention scores, as Megatron-LM and the OPT paper do. The *causal half* counts what
/// causal attention needs, and what is executed here.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Flops {
    /// What the model needs, whole square: three times the forward pass (Chowdhery et al., 2022; "MFU").
    pub model: f64,
    /// The same with recomputation (Narayanan et al., 2021; "HFU").
    pub hardware: f64,
    /// What the model needs, causal half.
    pub model_causal: f64,
    /// The same with recomputation: what is executed. Shares of the measured peak are of this.
    pub hardware_causal: f64,
}

/// How long a run will take.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Time {
    /// Peak of the matrix-product instruction measured on this rank's device, FLOP/s.
    pub peak_flops: f64,
    /// Share of it that is assumed.
    pub assumed_share: f64,
    /// Tokens per second of all ranks at that share.
    pub tokens_per_second: f64,
    /// Seconds of the whole run.
    pub seconds: f64,
}

impl Plan {
    /// Works out what `resolved` takes on the `device` of one of its ranks.
    pub(crate) fn new<D: Device>(resolved: &Resolved, rank: usize, device: &D) -> Plan {
        match resolved.config.run.precision {
            Precision::F32 => Plan::of::<D, f32>(resolved, rank, device),
            Precision::Bf16 => Plan::of::<D, bf16>(resolved, rank, device),
            Precision::F16 => Plan::of::<D, f16>(resolved, rank, device),
        }
    }

    fn of<D: Device, E: Element>(resolved: &Resolved, rank: usize, device: &D) -> Plan {
        let options = resolved.options();
        let flops = Flops::per_token(&resolved.model, &options);
        let peak = device.measured_peak::<E>();
        let axes = resolved.axes;
        let number = axes.tensor * resolved.data_ranks() * axes.pipeline;
        let ranks = (number > 1).then(|| Ranks {
            number,
            tensor: axes.tensor,
            shard: axes.shard,
            replicate: axes.replicate,
            pipeline: axes.pipeline,
            communication: Communication::new(resolved, E::DTYPE),
        });
        let tokens_per_second = peak * number as f64 * ASSUMED_SHARE / flops.hardware_causal;
        let tokens = resolved.steps * resolved.batch_tokens();
        Plan {
            model: resolved.model_name(),
            parameters: resolved.model.parameter_count(),
            device: device.describe(),
            batch: BatchPlan {
                tokens_per_step: resolved.batch_tokens(),
                sequence: resolved.seq,
                micro_batch: resolved.micro_batch,
                accumulation: resolved.accumulation(),
                steps: resolved.steps,
                tokens,
            },
            ranks,
            memory: Memory::of::<D, E>(
                &resolved.model,
                resolved.part(),
                Share { rank, of: number },
                &options,
                &resolved.optimizer,
                device,
            ),
            flops_per_token: flops,
            time: Time {
                peak_flops: peak,
                assumed_share: ASSUMED_SHARE,
                tokens_per_second,
                seconds: tokens as f64 / tokens_per_second,
            },
        }
    }
}

impl Flops {
    /// Work of one token in passes over sequences of `options.seq` tokens.
    pub fn per_token(model: &Config, options: &Options) -> Flops {
        let forward = model.forward_flops(options.seq);
        let [layers, c, f] = [model.layers, model.width, model.feed_forward].map(|x| x as f64);
        // The last layer's activations are still there. Before a layer norm (pre-norm) the output of a layer is kept,
        // so its second feed-forward product is not needed again.
        let last_product = if model.post_norm { 2.0 } else { 1.0 };
        let products_again = (layers - 1.0) * 2.0 * (4.0 * c * c + last_product * c * f);
        let count = |attention: f64| {
            let needed = 3.0 * (forward.products + attention + forward.head);
            let attention_again = attention * (layers - 1.0) / layers;
            let again = match options.recompute {
                Recompute::None => 0.0,
                Recompute::Selective => attention_again,
                Recompute::Full => products_again + attention_again,
            };
            (needed, needed + again)
        };
        let (model, hardware) = count(forward.attention);
        // Row t of the square has t + 1 of T scores that count.
        let half = (options.seq as f64 + 1.0) / (2.0 * options.seq as f64);
        let (model_causal, hardware_causal) = count(forward.attention * half);
        Flops { model, hardware, model_causal, hardware_causal }
    }
}

impl Memory {
    /// Bytes of a rank that holds `part` of `model`, trains it with compute type `E`, and writes its `share` of a checkpoint.
    pub fn of<D: Device, E: Element>(
        model: &Config,
        part: Part,
        share: Share,
        options: &Options,
        optimizer: &Settings,
        device: &D,
    ) -> Memory {
        let table = model.held(part);
        let sum = |bytes: &dyn Fn(&Parameter) -> usize| {
            table.iter().map(|h| (h.shard_len * bytes(&h.parameter)) as u64).sum::<u64>()
        };
        let of_matrices = |bytes: usize| sum(&|p| if p.is_matrix() { bytes } else { 0 });
        let (parts, shards) = (part.tensor.of, part.shard.of);
        let here = Config { layers: part.stage.end.min(model.layers) - part.stage.start, ..model.clone() };
        let (f32, compute) = (DType::F32.size(), E::DTYPE.size());
        let splits = optimizer.splits(E::DTYPE);
        let of_weight = |p: &Parameter| if p.is_matrix() { compute } else { f32 };
        let weights = sum(&of_weight);
        let masters = if splits { of_matrices(DType::I16.size()) } else { 0 };
        let moments = optimizer.moments() as u64 * sum(&|_| f32);
        // Whole parameters, as this rank collects them. A weight and its low half are 4 bytes, as is the f32 that is written.
        let of_master = |p: &Parameter| {
            of_weight(p)
                + if splits && p.is_matrix() { DType::I16.size() } else { 0 }
                + f32 * optimizer.moments()
        };
        let written = table.iter().zip(writers(&table, share.of)).filter(|(_, writer)| *writer == share.rank);
        let checkpoint =
            written.map(|(h, _)| (h.parameter.elements() * of_master(&h.parameter)) as u64).sum();
        let rows = options.batch * options.seq;
        let widest = (model.feed_forward / parts).max(3 * model.width / parts).max(model.width);
        let attention = AttentionShape {
            batch: options.batch,
            seq: options.seq,
            heads: model.heads / parts,
            width: model.head_width(),
            among: (0, model.heads),
        };
        // The ends and some layers are whole at a time, with gradients: `ferropt_model`'s units.
        let whole = |layers: usize, bytes: &dyn Fn(&Parameter) -> usize| {
            let times = |h: &Held| match h.parameter.layer() {
                None => layers.min(1),
                // The first stage has the first layer.
                Some(0) => layers,
                Some(_) => 0,
            };
            table.iter().map(|h| (times(h) * h.shard_len * shards * bytes(&h.parameter)) as u64).sum::<u64>()
        };
        let at_once = layers_at_once(shards, options.offload);
        let units = whole(at_once, &of_weight) + whole(at_once, &|_| f32);
        let stage = part.stage.place;
        let between_stages = boundary_buffers(stage) * rows / parts * model.width * f32;
        let mut memory = Memory {
            weights,
            units,
            masters,
            gradients: sum(&|_| f32),
            moments,
            // As many micro-batches are under way as there are stages from this one on.
            activations: (stage.of - stage.rank) as u64
                * ActivationTable::training(&here, options.batch, options.seq, options.recompute, parts)
                    .bytes(E::DTYPE)
                + between_stages as u64,
            workspace: device.workspace_bytes::<E>(
                rows,
                widest,
                model.vocab / parts,
                model.embedding_width,
                attention,
            ) as u64,
            checkpoint,
            offload: options.offload,
            // Where the processor's memory is the device's, all is the host's.
            device: device.memory_taken().map(|_| 0),
            host: 0,
            total: 0,
        };
        memory.host = memory.parts(true).map(|(_, bytes)| bytes).sum();
        memory.device = memory.device.map(|_| memory.parts(false).map(|(_, bytes)| bytes).sum());
        memory.total = memory.device.unwrap_or(0) + memory.host;
        memory
    }

    /// What is in the host's memory, or what is in the device's own.
    fn parts(&self, on_host: bool) -> impl Iterator<Item = (&'static str, u64)> {
        let (offload, one_memory) = (self.offload, self.device.is_none());
        let parts = [
            ("weights", self.weights, offload.has_weights()),
            ("master halves", self.masters, offload.has_state()),
            ("whole units", self.units, false),
            ("gradients", self.gradients, offload.has_weights()),
            ("moments", self.moments, offload.has_state()),
            ("activations", self.activations, false),
            ("kernel workspace", self.workspace, false),
            ("checkpoint snapshot", self.checkpoint, true),
        ];
        let here = move |(_, _, moved): &(_, _, bool)| (*moved || one_memory) == on_host;
        parts.into_iter().filter(here).map(|(name, bytes, _)| (name, bytes))
    }

    /// What takes most of the host's memory, and its bytes.
    pub(crate) fn largest_on_host(&self) -> (&'static str, u64) {
        self.parts(true).max_by_key(|(_, bytes)| *bytes).unwrap_or_default()
    }

    /// One of the two memories as a table.
    fn write(&self, f: &mut fmt::Formatter<'_>, title: &str, total: u64, on_host: bool) -> fmt::Result {
        writeln!(f, "{title:<16} {}", human_bytes(total))?;
        for (part, bytes) in self.parts(on_host).filter(|(_, bytes)| *bytes > 0) {
            let share = 100.0 * bytes as f64 / total as f64;
            writeln!(f, "  {part:<20} {:>12}  {share:4.1} %", human_bytes(bytes))?;
        }
        Ok(())
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let b = &self.batch;
        writeln!(f, "model            {} with {} parameters", self.model, grouped(self.parameters))?;
        writeln!(f, "device           {}", self.device)?;
        // Ranks that divide a matrix or the layers compute on the same sequences.
        let shared = match self.ranks.as_ref().map(|r| r.shard * r.replicate) {
            None | Some(1) => String::new(),
            Some(ranks) => format!("{ranks} (shard x replicate) x "),
        };
        writeln!(
            f,
            "tokens per step  {} = {shared}{} passes of {} x {}",
            grouped(b.tokens_per_step),
            b.accumulation,
            b.micro_batch,
            b.sequence
        )?;
        writeln!(f, "steps            {}, {} tokens", grouped(b.steps), grouped(b.tokens))?;
        if let Some(r) = &self.ranks {
            writeln!(
                f,
                "ranks            {} = {} (tensor) x {} (shard) x {} (replicate) x {} (pipeline); what follows is of the first",
                r.number, r.tensor, r.shard, r.replicate, r.pipeline
            )?;
            writeln!(f, "sent per step    {}", human_bytes(r.communication.total()))?;
            for (part, bytes) in r.communication.parts().into_iter().filter(|(_, bytes)| *bytes > 0) {
                writeln!(f, "  {part:<20} {:>12}", human_bytes(bytes))?;
            }
        }
        match self.memory.device {
            None => self.memory.write(f, "memory", self.memory.host, true)?,
            Some(bytes) => {
                self.memory.write(f, "GPU's memory", bytes, false)?;
                self.memory.write(f, "host's memory", self.memory.host, true)?;
            }
        }
        let fl = &self.flops_per_token;
        writeln!(
            f,
            "FLOP per token   {:.4e} model, {:.4e} hardware (whole square of attention)",
            fl.model, fl.hardware
        )?;
        writeln!(
            f,
            "                 {:.4e} model, {:.4e} hardware (causal half, as executed here)",
            fl.model_causal, fl.hardware_causal
        )?;
        let ranks = self.ranks.as_ref().map_or(String::new(), |r| format!("{} x ", r.number));
        write!(
            f,
            "estimated time   {} at {:.0} tokens/s, {:.0} % of the measured peak of {ranks}{:.1} GFLOP/s",
            duration(self.time.seconds),
            self.time.tokens_per_second,
            self.time.assumed_share * 100.0,
            self.time.peak_flops * 1e-9
        )
    }
}

/// A count for people: "12,345".
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// "45 seconds", "12 minutes", "5.2 hours", "33 days", "1,234 years".
fn duration(seconds: f64) -> String {
    const UNITS: [(f64, &str); 5] =
        [(1.0, "seconds"), (60.0, "minutes"), (3600.0, "hours"), (86_400.0, "days"), (31_557_600.0, "years")];
    let (unit, name) = UNITS.into_iter().rev().find(|(unit, _)| seconds >= 2.0 * unit).unwrap_or(UNITS[0]);
    let value = seconds / unit;
    if value < 9.95 {
        format!("{value:.1} {name}")
    } else {
        format!("{} {name}", grouped(value.round() as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Data, Group};
    use crate::collect::Collector;
    use crate::optimizer::{Optimizer, Rule};
    use ferropt_device::cpu::{CpuDevice, CpuOptions};
    use ferropt_device::{Buffer, bf16};
    use ferropt_mesh::{Axes, Label, Mesh, World};
    use ferropt_model::{Backprop, Model, Place, Stage, Tensor, Weights};

    const OPTIONS: Options = Options {
        batch: 2,
        seq: 8,
        recompute: Recompute::None,
        stop_at_documents: false,
        offload: Offload::None,
    };
    const SETTINGS: Settings = Settings {
        rule: Rule::AdamW { betas: [0.9, 0.95], eps: 1e-8 },
        weight_decay: 0.1,
        decay_vectors: true,
        clip: 1.0,
        stochastic: false,
        seed: 1,
    };

    fn bytes<E: Element>(weights: &Weights<CpuDevice, E>) -> u64 {
        let bytes = |tensor: Tensor<'_, CpuDevice, E>| match tensor {
            Tensor::Matrix(w) => w.len() * E::DTYPE.size(),
            Tensor::Vector(w) => w.len() * 4,
        };
        weights.tensors().into_iter().map(bytes).sum::<usize>() as u64
    }

    /// Bytes of all tensors of a checkpoint's copy.
    fn copied(saved: &[Group]) -> u64 {
        let size = |data: &Data| data.len() * data.dtype().bitsize() / 8;
        saved.iter().flat_map(|group| &group.tensors).map(|tensor| size(&tensor.data) as u64).sum()
    }

    /// What is planned against the buffers that are made. Activations are allocated from the same table as they are
    /// counted from, and the workspace is checked where the device is.
    fn check<E: Element>(config: &Config, settings: Settings) {
        let device = CpuDevice::new(CpuOptions::default()).unwrap();
        let plan = Memory::of::<_, E>(config, Part::WHOLE, Share::alone(), &OPTIONS, &settings, &device);
        let model = Model::<_, E>::zeros(&device, config).unwrap();
        let optimizer = Optimizer::new(&device, &model, settings).unwrap();
        let backprop = Backprop::<_, E>::new(&device, config, OPTIONS).unwrap();
        assert_eq!(plan.weights, bytes(&model.weights));
        assert_eq!(plan.gradients, bytes(&backprop.gradients));
        assert_eq!((plan.masters, plan.moments), optimizer.bytes());
        let saved = optimizer.save(&device, &model, &Collector::new(Mesh::solo(), model.held())).unwrap();
        assert_eq!(plan.checkpoint, copied(&saved));
        let parts = [plan.weights, plan.masters, plan.gradients, plan.moments, plan.activations];
        assert_eq!(plan.total, parts.iter().sum::<u64>() + plan.workspace + plan.checkpoint);
        // The processor's memory is the host's.
        assert_eq!((plan.device, plan.host), (None, plan.total));
    }

    #[test]
    fn memory_is_what_is_allocated() {
        let pre = Config { vocab: 100, positions: 16, ..Config::preset("tiny").unwrap() };
        let post = Config { post_norm: true, embedding_width: 24, ..pre.clone() };
        for config in [pre, post] {
            check::<f32>(&config, SETTINGS);
            check::<bf16>(&config, SETTINGS);
            check::<bf16>(&config, Settings { stochastic: true, ..SETTINGS });
            check::<bf16>(&config, Settings { rule: Rule::Sgd { momentum: 0.9 }, ..SETTINGS });
            check::<f32>(&config, Settings { rule: Rule::Sgd { momentum: 0.0 }, ..SETTINGS });
        }
    }

    #[test]
    fn no_rank_takes_more_than_the_first_which_is_planned_for() {
        let device = CpuDevice::new(CpuOptions::default()).unwrap();
        let config = Config { layers: 5, vocab: 100, positions: 16, ..Config::preset("tiny").unwrap() };
        for pipeline in 2..=5 {
            let axes = Axes { tensor: 1, shard: 2, replicate: 1, pipeline };
            let of = |rank| {
                let part = Part::of_rank(axes, config.layers, rank);
                let memory =
                    Memory::of::<_, f32>(&config, part, Share::alone(), &OPTIONS, &SETTINGS, &device);
                [memory.weights, memory.gradients, memory.moments, memory.activations]
            };
            for rank in 1..2 * pipeline {
                assert!(
                    of(rank).iter().zip(of(0)).all(|(bytes, first)| *bytes <= first),
                    "{rank} of {axes:?}"
                );
            }
        }
    }

    /// A last stage, whose activations are those of a model of its layers.
    #[test]
    fn what_goes_between_stages_is_counted() {
        let config = Config { layers: 4, vocab: 100, positions: 16, ..Config::preset("tiny").unwrap() };
        let device = CpuDevice::new(CpuOptions::default()).unwrap();
        let planned = |layers: usize, rank: usize, of: usize| {
            let stage = Stage::new(Place { rank, of }, layers);
            let config = Config { layers, ..config.clone() };
            Memory::of::<_, f32>(
                &config,
                Part { stage, ..Part::WHOLE },
                Share::alone(),
                &OPTIONS,
                &SETTINGS,
                &device,
            )
            .activations
        };
        let buffers = 2 * (OPTIONS.batch * OPTIONS.seq * config.width * 4) as u64;
        assert_eq!(planned(4, 1, 2), planned(2, 0, 1) + buffers);
    }

    #[test]
    fn each_rank_plans_the_part_of_a_checkpoint_that_it_copies() {
        let config = Config {
            layers: 2,
            heads: 2,
            width: 32,
            feed_forward: 128,
            embedding_width: 32,
            vocab: 100,
            positions: 16,
            ..Config::preset("tiny").unwrap()
        };
        for (shard, replicate) in [(1, 3), (3, 1)] {
            let axes = Axes { tensor: 1, shard, replicate, pipeline: 1 };
            let ranks = World::local(3).unwrap().into_iter().map(|world| {
                let config = config.clone();
                std::thread::spawn(move || {
                    let (share, mesh) =
                        (Share { rank: world.rank(), of: 3 }, Mesh::new(world, axes).unwrap());
                    let device =
                        CpuDevice::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
                    let part = Part::of_rank(axes, config.layers, share.rank);
                    let plan = Memory::of::<_, bf16>(&config, part, share, &OPTIONS, &SETTINGS, &device);
                    let model = Model::<_, bf16>::part(&device, &config, part, Offload::None).unwrap();
                    let optimizer = Optimizer::new(&device, &model, SETTINGS).unwrap();
                    let collector = Collector::new(mesh.clone(), model.held());
                    let saved = optimizer.save(&device, &model, &collector).unwrap();
                    assert_eq!(plan.checkpoint, copied(&saved), "{share:?}");
                    // The others may not have all of this rank's parts yet.
                    mesh.all.barrier(Label::new("farewell")).unwrap();
                    plan.checkpoint
                })
            });
            let ranks: Vec<_> = ranks.collect();
            let sum: u64 = ranks.into_iter().map(|rank| rank.join().unwrap()).sum();
            assert_eq!(sum, 12 * config.parameter_count(), "{axes:?}");
        }
    }

    /// Megatron-LM's count (Narayanan et al., 2021) with full recomputation is 96 B T L C^2 (1 + T/6C + V/16LC), which
    /// also computes the last layer again and every second feed-forward product, as ours does not.
    #[test]
    fn flops_are_megatrons_but_for_what_is_not_computed_again() {
        let config = Config::preset("175b").unwrap();
        let [l, c, v, t] = [config.layers, config.width, config.vocab, 2048].map(|x| x as f64);
        let full = Options {
            batch: 1,
            seq: 2048,
            recompute: Recompute::Full,
            stop_at_documents: false,
            offload: Offload::None,
        };
        let ours = Flops::per_token(&config, &full);
        let megatron = 96.0 * l * c * c * (1.0 + t / (6.0 * c) + v / (16.0 * l * c));
        let layer = 24.0 * c * c * (1.0 + t / (6.0 * c));
        let skipped = layer + (l - 1.0) * 8.0 * c * c;
        assert!(((ours.hardware + skipped) / megatron - 1.0).abs() < 1e-12, "{ours:?} {megatron:e}");
        let model = 72.0 * l * c * c * (1.0 + t / (6.0 * c) + v / (12.0 * l * c));
        assert!((ours.model / model - 1.0).abs() < 1e-12, "{ours:?} {model:e}");
        let none = Flops::per_token(&config, &Options { recompute: Recompute::None, ..full });
        assert_eq!((none.model, none.model_causal), (none.hardware, none.hardware_causal));
        assert!(ours.model_causal < ours.model && ours.hardware_causal < ours.hardware);
    }

    #[test]
    fn figures_for_people() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(
            [0.0, 119.0, 120.0, 7200.0, 1e6, 1e12].map(duration),
            ["0.0 seconds", "119 seconds", "2.0 minutes", "2.0 hours", "12 days", "31,688 years"]
        );
    }
}
