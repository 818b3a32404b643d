//! Training of OPT models, from a configuration file to a run folder that holds checkpoints and curves.

pub mod bench;
pub mod checkpoint;
mod collect;
pub mod config;
mod hub;
pub mod inference;
pub mod launch;
pub mod logbook;
pub mod loss_scale;
pub mod models;
pub mod optimizer;
pub mod planner;
pub mod quantise;
pub mod quickstart;
pub mod recovery;
pub mod schedule;
pub mod signals;
mod stacked;
pub mod telemetry;
pub mod trainer;
pub mod weight_cache;
