//! A decoder's matrices as a device lays them out, one behind the other: what a file can hold so that nothing has to be
//! read, rounded and packed again.

use crate::config::Config;
use crate::decode::ReadRows;
use crate::parameters::Parameter;
use anyhow::{Context, Result, ensure};
use ferropt_device::{Device, Mapped, WeightFormat, WritePiece};
use std::ops::Range;

/// Matrices begin at multiples of this: a page of memory.
const ALIGNMENT: usize = 4096;

/// Where each matrix lies among the bytes of all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// Number in the parameter table, and place.
    places: Vec<(usize, Range<usize>)>,
}

/// Matrices that are ready to be used where they lie.
#[derive(Clone, Debug)]
pub struct Ready {
    places: Places,
    bytes: Mapped,
}

/// The matrices, with their numbers.
fn matrices(config: &Config) -> impl Iterator<Item = (usize, Parameter)> {
    let all = config.parameters().into_iter().enumerate();
    all.filter(|(_, p)| p.is_weight())
}

impl Places {
    /// Follow from the model's sizes, the format and the device's layout.
    pub fn new<D: Device>(device: &D, config: &Config, format: WeightFormat) -> Places {
        let mut end = 0;
        let place = |(index, parameter): (usize, Parameter)| {
            let start = end;
            end += device.packed_size(format, parameter.shape[0], parameter.shape[1]);
            let place = start..end;
            end = end.next_multiple_of(ALIGNMENT);
            (index, place)
        };
        Places { places: matrices(config).map(place).collect() }
    }

    /// Bytes of all.
    pub fn bytes(&self) -> usize {
        self.places.last().map_or(0, |(_, place)| place.end)
    }

    /// Reads and packs all matrices; `write` takes the pieces.
    ///
    /// # Errors
    /// When `read` or `write` fails; the message names the parameter.
    pub fn write<D: Device>(
        &self,
        device: &D,
        config: &Config,
        format: WeightFormat,
        read: &ReadRows<'_>,
        write: &WritePiece<'_>,
    ) -> Result<()> {
        for ((index, parameter), (_, place)) in matrices(config).zip(&self.places) {
            let rows = |rows: Range<usize>, out: &mut [f32]| read(index, rows, out);
            let piece = |at: usize, bytes: &[u8]| write(place.start + at, bytes);
            let packed = device.pack_weight_to(format, parameter.shape[0], parameter.shape[1], &rows, &piece);
            packed.with_context(|| parameter.names.join(", "))?;
        }
        Ok(())
    }

    /// What [`Places::write`] wrote.
    ///
    /// # Errors
    /// When there are more or fewer bytes than that.
    pub fn ready(self, bytes: Mapped) -> Result<Ready> {
        let (has, needs) = (bytes.bytes().len(), self.bytes());
        ensure!(has == needs, "there are {has} bytes of packed matrices, but the model has {needs}");
        Ok(Ready { places: self, bytes })
    }
}

impl Ready {
    /// Matrix `[n, k]`, parameter number `index`.
    pub(crate) fn matrix<D: Device>(
        &self,
        device: &D,
        index: usize,
        format: WeightFormat,
        n: usize,
        k: usize,
    ) -> Result<D::Packed> {
        let place = self.places.places.iter().find(|(i, _)| *i == index).map(|(_, place)| place.clone());
        let bytes = place.and_then(|place| self.bytes.part(place));
        device.packed_from(format, n, k, bytes.context("it is not among the packed matrices")?)
    }
}
