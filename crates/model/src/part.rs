//! What a process holds of a model that is divided among many: with tensor parallelism (Shoeybi et al., 2019,
//! "Megatron-LM") a part of each matrix, and with fully sharded data parallelism (Rajbhandari et al., 2020, "ZeRO", stage
//! 3; Zhao et al., 2023, "PyTorch FSDP") a shard of that.

use crate::config::Config;
use crate::parameters::{Parameter, Split};
use anyhow::{Result, ensure};
use ferropt_device::Strided;
use ferropt_mesh::Axes;
use std::ops::Range;

/// Shards are as many elements as a multiple of this, so that they begin on cache lines.
const ALIGNED: usize = 32;

/// A process's number among those that divide something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number, from 0.
    pub rank: usize,
    /// How many there are.
    pub of: usize,
}

impl Place {
    /// The only one.
    pub const ALONE: Place = Place { rank: 0, of: 1 };
}

/// Some of the layers, one after the other, with what comes before the first and behind the last of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Among those that divide the layers.
    pub place: Place,
    /// First layer.
    pub start: usize,
    /// Layer behind the last.
    pub end: usize,
}

impl Stage {
    /// All of them, however many.
    pub const WHOLE: Stage = Stage { place: Place::ALONE, start: 0, end: usize::MAX };

    /// A stage of a model of so many layers, which are dealt out as evenly as can be: where some have one more, the first have, so
    /// that none takes more memory than the first of all.
    pub fn new(place: Place, layers: usize) -> Stage {
        let at = |rank: usize| rank * (layers / place.of) + rank.min(layers % place.of);
        Stage { place, start: at(place.rank), end: at(place.rank + 1) }
    }

    /// Whether it begins with the embeddings.
    pub fn is_first(self) -> bool {
        self.place.rank == 0
    }

    /// Whether it ends with the LM head.
    pub fn is_last(self) -> bool {
        self.place.rank + 1 == self.place.of
    }

    fn holds(self, parameter: &Parameter) -> bool {
        match (parameter.layer(), &parameter.names[0]) {
            (Some(layer), _) => (self.start..self.end).contains(&layer),
            // The LM head is the embedding table again.
            (None, name) if name.contains("embed_tokens") => self.is_first() || self.is_last(),
            (None, name) if name.contains("embed_positions") || name.contains("project_in") => {
                self.is_first()
            }
            (None, _) => self.is_last(),
        }
    }
}

/// The part of a model that a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Among those that divide the matrices.
    pub tensor: Place,
    /// Among those that share out what is left.
    pub shard: Place,
    /// Which layers.
    pub stage: Stage,
}

impl Part {
    /// All of it.
    pub const WHOLE: Part = Part { tensor: Place::ALONE, shard: Place::ALONE, stage: Stage::WHOLE };

    /// What a rank of a mesh holds of a model of so many layers; see [`ferropt_mesh::Mesh`] for the order of the ranks.
    pub fn of_rank(axes: Axes, layers: usize, rank: usize) -> Part {
        let tensor = Place { rank: rank % axes.tensor, of: axes.tensor };
        let shard = Place { rank: rank / axes.tensor % axes.shard, of: axes.shard };
        let data_and_tensor = axes.tensor * axes.shard * axes.replicate;
        let stage = Place { rank: rank / data_and_tensor, of: axes.pipeline };
        Part { tensor, shard, stage: Stage::new(stage, layers) }
    }

    /// Refuses a tensor parallelism or a pipeline that does not divide the model.
    ///
    /// # Errors
    /// Names the size that cannot be divided.
    pub fn check(self, config: &Config) -> Result<()> {
        let (parts, stages) = (self.tensor.of, self.stage.place.of);
        ensure!(
            (1..=config.layers).contains(&stages),
            "a pipeline of {stages} stages cannot share out the model's {} layers; choose at most as many",
            config.layers
        );
        let sizes = [
            ("heads", config.heads),
            ("feed-forward width", config.feed_forward),
            ("vocabulary", config.vocab),
        ];
        for (name, size) in sizes {
            ensure!(
                parts > 0 && size.is_multiple_of(parts),
                "a tensor parallelism of {parts} does not divide the model: its {name} is {size}; choose a divisor of its \
                 {} heads, {} feed-forward units and {} tokens of vocabulary",
                config.heads,
                config.feed_forward,
                config.vocab
            );
        }
        Ok(())
    }
}

/// A parameter, as a process holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct Held {
    /// The whole parameter.
    pub parameter: Parameter,
    /// Its number in the parameter table, which names its streams of random numbers.
    pub index: usize,
    /// Elements of the tensor-parallel part.
    pub part_elements: usize,
    /// Elements of a shard's buffer: the same for all, so that the last ones may have some to spare, which are 0.
    pub shard_len: usize,
    /// Which elements of the part are this process's.
    pub shard: Range<usize>,
    /// Where the part lies in the parameter.
    part: Strided,
    /// Whether this process is the one that speaks for these elements among those that have them: of what all tensor-parallel
    /// parts have the first, and of the embedding table the first stage.
    pub speaks: bool,
}

impl Held {
    /// What is held of parameter number `index` by `part`.
    pub fn new(parameter: Parameter, index: usize, part: Part) -> Held {
        let Place { rank, of } = part.tensor;
        let (elements, rows) = (parameter.elements(), parameter.shape[0]);
        let columns = elements / rows;
        let (part_elements, place) = match parameter.split {
            Split::Whole => (elements, Strided::WHOLE),
            Split::Rows => {
                // Of each of the stacked tensors.
                let stride = elements / parameter.names.len();
                let run = stride / of;
                (elements / of, Strided { first: rank * run, run, stride, skip: 0 })
            }
            Split::Columns => {
                let run = columns / of;
                (elements / of, Strided { first: rank * run, run, stride: columns, skip: 0 })
            }
        };
        let held = part.stage.holds(&parameter);
        let part_elements = if held { part_elements } else { 0 };
        let shard_len = match part.shard.of {
            1 => part_elements,
            shards => part_elements.div_ceil(shards).next_multiple_of(ALIGNED),
        };
        let at = |rank: usize| (rank * shard_len).min(part_elements);
        Held {
            index,
            part_elements,
            shard_len,
            shard: at(part.shard.rank)..at(part.shard.rank + 1),
            part: place,
            // The last stage's table is the first one's.
            speaks: (rank == 0 || parameter.split != Split::Whole)
                && (part.stage.is_first() || !parameter.names[0].contains("embed_tokens")),
            parameter,
        }
    }

    /// Where the shard lies in the parameter.
    pub fn place(&self) -> Strided {
        self.part.after(self.shard.start)
    }

    /// The shard's elements, as pieces that follow each other in the parameter: where each begins in the shard, where in
    /// the parameter, and its length.
    pub fn pieces(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        self.place().pieces(0..self.shard.len())
    }

    /// [`Held::pieces`] of the tensor-parallel part.
    pub fn part_pieces(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        self.part.pieces(0..self.part_elements)
    }

    /// Whether all tensor-parallel parts have all of it, and the parts of its gradient are to be added up.
    pub fn is_whole(&self) -> bool {
        self.parameter.split == Split::Whole
    }
}

impl Config {
    /// What `part` holds of every parameter.
    pub fn held(&self, part: Part) -> Vec<Held> {
        let table = self.parameters().into_iter().enumerate();
        table.map(|(index, parameter)| Held::new(parameter, index, part)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every element is in one shard of one part, or, if it is whole, in one shard of every part.
    #[test]
    fn shards_make_the_whole() {
        let base =
            Config { heads: 4, vocab: 24, positions: 7, feed_forward: 40, ..Config::preset("tiny").unwrap() };
        for config in [base.clone(), Config { post_norm: true, embedding_width: 24, ..base }] {
            for (parts, shards, stages) in
                [(1, 1, 1), (2, 1, 2), (1, 3, 1), (2, 4, 1), (4, 2, 2), (4, 5, 1), (1, 1, 2)]
            {
                let places = |of| (0..of).map(move |rank| Place { rank, of });
                for (index, parameter) in config.parameters().into_iter().enumerate() {
                    let mut held = vec![0; parameter.elements()];
                    let mut spoken = vec![0; parameter.elements()];
                    let mut lengths = Vec::new();
                    for (tensor, stage) in places(parts).flat_map(|t| places(stages).map(move |s| (t, s))) {
                        let stage = Stage::new(stage, config.layers);
                        Part { tensor, stage, ..Part::WHOLE }.check(&config).unwrap();
                        for shard in places(shards) {
                            let h = Held::new(parameter.clone(), index, Part { tensor, shard, stage });
                            let pieces: Vec<_> = h.pieces().collect();
                            assert_eq!(pieces.iter().map(|p| p.2).sum::<usize>(), h.shard.len());
                            let elements = |pieces: &mut dyn Iterator<Item = (usize, usize, usize)>| {
                                pieces.flat_map(|(_, start, len)| start..start + len).collect::<Vec<_>>()
                            };
                            let of_part = elements(&mut h.part_pieces());
                            assert!(of_part[h.shard.clone()] == elements(&mut h.pieces()));
                            assert!(h.shard.len() <= h.shard_len);
                            if h.part_elements > 0 {
                                lengths.push(h.shard_len);
                            }
                            for (_, start, len) in pieces {
                                held[start..start + len].iter_mut().for_each(|n| *n += 1);
                                spoken[start..start + len].iter_mut().for_each(|n| *n += h.speaks as usize);
                            }
                        }
                    }
                    let twice = stages > 1 && parameter.names[0].contains("embed_tokens");
                    let times = if parameter.split == Split::Whole { parts } else { 1 + twice as usize };
                    assert!(held.iter().all(|n| *n == times), "{:?}", parameter.names);
                    assert!(spoken.iter().all(|n| *n == 1), "{:?}", parameter.names);
                    assert!(lengths.iter().all(|len| *len == lengths[0]));
                }
            }
        }
    }

    #[test]
    fn layers_are_dealt_out_evenly_the_first_stages_first() {
        for (layers, stages, expected) in
            [(5, 2, &[3, 2][..]), (12, 8, &[2, 2, 2, 2, 1, 1, 1, 1]), (6, 3, &[2, 2, 2]), (3, 3, &[1, 1, 1])]
        {
            let stages: Vec<Stage> =
                (0..stages).map(|rank| Stage::new(Place { rank, of: stages }, layers)).collect();
            let lengths: Vec<usize> = stages.iter().map(|stage| stage.end - stage.start).collect();
            assert_eq!(lengths, expected);
            assert!(stages.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert_eq!((stages[0].start, stages[stages.len() - 1].end), (0, layers));
        }
    }

    #[test]
    fn what_does_not_divide_is_named() {
        let config = Config { heads: 4, vocab: 50, ..Config::preset("tiny").unwrap() };
        let message = Part { tensor: Place { rank: 0, of: 4 }, ..Part::WHOLE }.check(&config).unwrap_err();
        assert!(message.to_string().contains("its vocabulary is 50"), "{message}");
    }
}
