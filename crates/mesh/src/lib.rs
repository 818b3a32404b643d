//! Many processes: the ranks of a run, groups of them, and collective operations.
//!
//! A [`World`] is all ranks. [`World::join`] finds out from the environment who started this process and who the others are:
//! `mpirun`, `srun`, or whoever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun and Kubernetes do.
//! A [`Mesh`] arranges them along axes, and has the [`Group`]s that this rank belongs to.
//!
//! Operations take a buffer and give it back when they are done; until then this rank may compute. A thread moves
//! the bytes, over TCP or MPI, and watches over the other ranks: when one is lost, every operation ends in an error that says
//! which, and what it was doing, instead of hanging.
//! Memory of devices that the processor does not reach is exchanged by the devices themselves where they can ([`Mesh::linked`]),
//! otherwise copies of it are.

mod environment;
mod flights;
mod frame;
mod group;
mod label;
mod left;
mod linked;
mod lost;
mod meeting;
mod memory;
mod mesh;
mod mpi;
mod pending;
mod reactor;
mod route;
mod tcp;
mod together;
mod trace;
mod transport;
mod watcher;
mod world;

pub use group::{Group, SMALL_SUM};
pub use label::{Label, Operation};
pub use lost::Lost;
pub use mesh::{Axes, Mesh};
pub use pending::Pending;
pub use together::Together;
pub use trace::{Span, Trace};
pub use world::{Join, Traffic, World};
