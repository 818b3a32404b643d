//! Energy of a run on many ranks.

use super::cores;
use crate::telemetry::{Energy, Meter};
use anyhow::Result;
use ferropt_mesh::Group;

/// What all ranks have used.
pub(super) struct Used {
    /// What this one has used; of the first one, what the run had used before as well.
    meter: Meter,
    /// What the others have used in this start, as far as they have told.
    others: Energy,
}

impl Used {
    /// Starts counting; `before` this start the run had used so much. `watts` are those of a busy core, for an estimate.
    ///
    /// # Errors
    /// When a rank is lost.
    pub(super) fn start(all: &Group, before: Energy, watts: f64) -> Result<Used> {
        let before = if all.rank() == 0 { before } else { Energy::default() };
        let meter = Meter::start(before, watts, cores::first_here(all)?);
        Ok(Used { meter, others: Energy::default() })
    }

    /// What this rank has used up to now, for the others.
    pub(super) fn own(&mut self) -> Energy {
        self.meter.read()
    }

    /// Takes note of what all ranks told, in their order; `own` is this one.
    pub(super) fn hear(&mut self, own: usize, told: impl Iterator<Item = Energy>) {
        let others = told.enumerate().filter(|(rank, _)| *rank != own);
        self.others = others.fold(Energy::default(), |sum, (_, energy)| sum + energy);
    }

    /// What all have used: this one up to now, the others up to when they told it.
    pub(super) fn read(&mut self) -> Energy {
        self.meter.read() + self.others
    }

    /// [`Meter::tick`].
    pub(super) fn tick(&mut self) {
        self.meter.tick();
    }

    /// [`Meter::describe`].
    pub(super) fn describe(&self) -> String {
        self.meter.describe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferropt_mesh::Mesh;

    #[test]
    fn all_ranks_are_counted_once() {
        let before = Energy { joules: 100.0, estimated: false };
        let mut used = Used::start(&Mesh::solo().all, before, 1e-9).unwrap();
        let own = used.own();
        assert!(own.joules >= 100.0);
        let told = [own, Energy { joules: 2.0, estimated: false }, Energy { joules: 3.0, estimated: true }];
        for _ in 0..2 {
            used.hear(0, told.into_iter());
        }
        let all = used.read();
        assert!(all.estimated && all.joules - used.own().joules <= 5.0 && all.joules >= 105.0, "{all:?}");
    }
}
