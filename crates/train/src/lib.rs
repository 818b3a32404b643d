//! Training of OPT models, from a configuration file to a run folder that holds checkpoints and curves.

pub mod checkpoint;
pub mod config;
pub mod schedule;
pub mod signals;
pub mod telemetry;
