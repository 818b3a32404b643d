//! The ranks of a world in rows and columns: who divides what with whom.

use crate::group::Group;
use crate::world::World;
use anyhow::{Result, ensure};

/// Lengths of a mesh's axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axes {
    /// Ranks that divide the matrices of a layer.
    pub tensor: usize,
    /// Ranks that share out weights, gradients and the optimiser's state.
    pub shard: usize,
    /// Replicas of what they share out.
    pub replicate: usize,
    /// Ranks that divide the layers.
    pub pipeline: usize,
}

impl Axes {
    /// Which replica a rank belongs to, of those that hold the same; see [`Mesh`] for the order of the ranks.
    pub fn replica(self, rank: usize) -> usize {
        rank / (self.tensor * self.shard) % self.replicate
    }
}

/// All ranks, and the groups that this one belongs to.
///
/// Numbers run fastest along the tensor axis, then along shard, replicate and pipeline: those who talk most are
/// neighbours, which launchers put on one host.
#[derive(Clone)]
pub struct Mesh {
    /// All ranks.
    pub world: World,
    /// How they are arranged.
    pub axes: Axes,
    /// Those with which this rank divides matrices.
    pub tensor: Group,
    /// Those with which it shares out weights.
    pub shard: Group,
    /// Those that hold the same.
    pub replicate: Group,
    /// Those that have other sequences: shard and replicate together, shard running faster.
    pub data: Group,
    /// Those that have other layers.
    pub pipeline: Group,
    /// The first and the last of these, where there are several and this rank is one of the two.
    pub ends: Option<Group>,
    /// All ranks as a group.
    pub all: Group,
}

impl Mesh {
    /// Arranges the ranks of a world.
    ///
    /// # Errors
    /// When the axes do not make up the world.
    pub fn new(world: World, axes: Axes) -> Result<Mesh> {
        let Axes { tensor, shard, replicate, pipeline } = axes;
        let (size, me) = (world.size(), world.rank());
        ensure!(
            tensor * shard * replicate * pipeline == size,
            "a mesh of {tensor} (tensor) x {shard} (shard) x {replicate} (replicate) x {pipeline} (pipeline) has {} ranks, but \
             {size} were started",
            tensor * shard * replicate * pipeline
        );
        // Numbers of the ranks that differ from this one along an axis alone, or along neighbouring axes.
        let along = |name, stride: usize, length: usize| {
            let first = me - me / stride % length * stride;
            let members: Vec<usize> = (0..length).map(|step| first + step * stride).collect();
            world.group(&members, name)
        };
        let last = pipeline - 1;
        let across = along("pipeline", tensor * shard * replicate, pipeline)?;
        let ends = match across.rank() {
            rank if last > 0 && (rank == 0 || rank == last) => {
                Some(world.group(&[across.world_rank(0), across.world_rank(last)], "tied")?)
            }
            _ => None,
        };
        Ok(Mesh {
            tensor: along("tensor", 1, tensor)?,
            shard: along("shard", tensor, shard)?,
            replicate: along("replicate", tensor * shard, replicate)?,
            data: along("data", tensor, shard * replicate)?,
            pipeline: across,
            ends,
            all: along("all", 1, size)?,
            world,
            axes,
        })
    }

    /// One rank, which has everything.
    pub fn solo() -> Mesh {
        let world = World::solo();
        let alone = Group::alone(&world);
        let one = || alone.clone();
        let axes = Axes { tensor: 1, shard: 1, replicate: 1, pipeline: 1 };
        Mesh {
            tensor: one(),
            shard: one(),
            replicate: one(),
            data: one(),
            pipeline: one(),
            ends: None,
            all: one(),
            world,
            axes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_are_arranged_and_make_up_the_world() {
        let axes = Axes { tensor: 2, shard: 3, replicate: 1, pipeline: 1 };
        let check = |world: World| {
            let rank = world.rank();
            let mesh = Mesh::new(world.clone(), axes).unwrap();
            let members = |group: &Group| (0..group.size()).map(|m| group.world_rank(m)).collect::<Vec<_>>();
            assert_eq!(members(&mesh.tensor), [rank / 2 * 2, rank / 2 * 2 + 1]);
            assert_eq!(members(&mesh.shard), [rank % 2, rank % 2 + 2, rank % 2 + 4]);
            assert_eq!(members(&mesh.data), members(&mesh.shard));
            assert_eq!(members(&mesh.replicate), [rank]);
            assert_eq!((mesh.tensor.rank(), mesh.shard.rank()), (rank % 2, rank / 2));
            assert_eq!(members(&mesh.all), [0, 1, 2, 3, 4, 5]);
            let wrong = Mesh::new(world, Axes { tensor: 4, ..axes }).err().unwrap().to_string();
            assert!(wrong.contains("12 ranks, but 6 were started"), "{wrong}");
        };
        std::thread::scope(|scope| {
            for world in World::local(6).unwrap() {
                scope.spawn(move || check(world));
            }
        });
    }
}
