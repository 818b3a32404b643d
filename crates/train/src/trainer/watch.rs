//! What a run takes and what its ranks tell each other, counted in its first step and traced in the first few.

use crate::checkpoint::human_bytes;
use crate::planner::{Communication, Plan};
use anyhow::{Result, anyhow};
use ferropt_device::Device;
use ferropt_mesh::{Label, Mesh, Trace};
use std::path::{Path, PathBuf};

/// Looks at the first steps of a start.
pub(super) struct Watch {
    /// What each rank should send in a step; none once it was compared.
    planned: Option<Communication>,
    /// Bytes that the device's own memory should need at most; none once they were compared, or where it has none.
    memory: Option<u64>,
    /// Steps that are still to be traced.
    traced: u64,
    /// Whether some are.
    begun: bool,
}

impl Watch {
    /// Looks at what `plan` foresees, and traces so many steps.
    pub(super) fn new(mesh: &Mesh, plan: &Plan, traced: u64) -> Watch {
        if traced > 0 {
            mesh.world.trace().start(mesh.world.rank());
        }
        let planned = plan.ranks.as_ref().map(|ranks| ranks.communication.clone());
        Watch { planned, memory: plan.memory.device, traced, begun: false }
    }

    /// A step begins.
    pub(super) fn begin(&mut self, mesh: &Mesh) {
        self.begun = true;
        if self.planned.is_some() {
            mesh.world.reset_traffic();
        }
    }

    /// All gradients are summed. Returns what was sent for them, and whether that is what was planned, once.
    pub(super) fn summed(&mut self, mesh: &Mesh) -> Option<String> {
        let planned = self.planned.take()?;
        let counted = Communication::counted(&mesh.world.traffic());
        let bytes = human_bytes(counted.total());
        Some(if counted == planned {
            format!("each rank sends {bytes} in a step, as planned")
        } else {
            format!(
                "warning: each rank sends {bytes} in a step, but planned was {planned:?}, and counted {counted:?}"
            )
        })
    }

    /// The optimiser's first step is done. Returns how much of the device's own memory is taken, if it has any, once.
    pub(super) fn updated(&mut self, device: &impl Device) -> Option<String> {
        let (planned, taken) = (self.memory.take()?, device.memory_taken()?);
        Some(format!("GPU's memory: {} taken, {} planned", human_bytes(taken), human_bytes(planned)))
    }

    /// A step is done. Once all that are traced are, writes the trace, and returns what people are to know of it.
    ///
    /// # Errors
    /// When a rank is lost.
    pub(super) fn done(&mut self, mesh: &Mesh, run: &Path) -> Result<Option<String>> {
        match self.traced {
            0 => Ok(None),
            1 => self.write(mesh, run),
            _ => {
                self.traced -= 1;
                Ok(None)
            }
        }
    }

    /// The run ends. Writes the trace of fewer steps than were to be traced, if it has come to any.
    ///
    /// # Errors
    /// When a rank is lost.
    pub(super) fn close(&mut self, mesh: &Mesh, run: &Path) -> Result<Option<String>> {
        if self.traced > 0 && self.begun { self.write(mesh, run) } else { Ok(None) }
    }

    /// Writes `trace.json` into the run folder. What goes wrong with it is no reason to end a run.
    fn write(&mut self, mesh: &Mesh, run: &Path) -> Result<Option<String>> {
        self.traced = 0;
        let file = |rank: usize| run.join(format!(".trace-{rank:05}.json"));
        let written = mesh.world.trace().write(&file(mesh.world.rank()));
        let why = written.err().map(|error| format!("{error:#}")).unwrap_or_default();
        let told = mesh.all.gather_bytes(Label::new("trace"), why.as_bytes())?;
        if mesh.world.rank() > 0 {
            return Ok(None);
        }
        let files: Vec<PathBuf> = (0..mesh.world.size()).map(file).collect();
        let merged = run.join("trace.json");
        let made = match told.iter().position(|why| !why.is_empty()) {
            Some(rank) => Err(anyhow!("rank {rank}: {}", String::from_utf8_lossy(&told[rank]))),
            None => Trace::merge(&files.iter().map(PathBuf::as_path).collect::<Vec<_>>(), &merged),
        };
        for file in files {
            // What is left of it harms nothing.
            let _ = std::fs::remove_file(file);
        }
        Ok(Some(match made {
            Ok(()) => format!("trace: {}", merged.display()),
            Err(error) => format!("warning: there is no trace of this start, training goes on: {error:#}"),
        }))
    }
}
