//! What of a run's state is in the host's memory instead of the device's: the one place that decides it.

use anyhow::Result;
use ferropt_device::{Device, Element};
use serde::{Deserialize, Serialize};

/// What is kept in the host's memory, so that a device of little memory can train a large model (Ren et al., 2021,
/// "ZeRO-Offload"; Rajbhandari et al., 2021, "ZeRO-Infinity"). It does not change a bit of what is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Offload {
    /// Nothing.
    #[default]
    None,
    /// What the optimiser remembers: moments, and low halves of bf16 weights. An update reads and writes them there.
    Optimizer,
    /// That, and weights and sums of gradients: of those the ends of the model and a few layers are on the device at a time.
    All,
}

impl Offload {
    /// Whether what the optimiser remembers is in the host's memory.
    pub fn has_state(self) -> bool {
        self != Offload::None
    }

    /// Whether weights and sums of gradients are.
    pub fn has_weights(self) -> bool {
        self == Offload::All
    }

    /// Zeroed memory for what the optimiser remembers.
    ///
    /// # Errors
    /// When memory is short; the message says how much was asked for.
    pub fn state<D: Device, T: Element>(self, device: &D, len: usize) -> Result<D::Buf<T>> {
        if self.has_state() { device.alloc_host(len) } else { device.alloc(len) }
    }

    /// Zeroed memory for weights, or for sums of gradients.
    ///
    /// # Errors
    /// As [`Offload::state`].
    pub fn weights<D: Device, T: Element>(self, device: &D, len: usize) -> Result<D::Buf<T>> {
        if self.has_weights() { device.alloc_host(len) } else { device.alloc(len) }
    }
}
