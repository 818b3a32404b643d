//! Operations of a group that start together.

use crate::group::{Group, Pending, summing};
use crate::label::Label;
use crate::route::Boarding;
use anyhow::Result;
use ferropt_device::{Buffer, Element, Exchange};

/// Operations of a group that start together with [`Together::start`], where devices do them: starting one takes the processor as
/// long as starting a dozen. Others start at once. All ranks begin the same ones together, in the same order.
#[must_use = "operations between devices begin with `start`"]
pub struct Together<'g> {
    group: &'g Group,
    boarding: Option<Boarding<'g>>,
}

impl Group {
    /// Operations that are going to start together.
    pub fn together(&self) -> Together<'_> {
        Together { group: self, boarding: None }
    }
}

impl Together<'_> {
    /// [`Group::all_gather`].
    pub fn all_gather<T: Element, B: Buffer<T> + 'static>(&mut self, label: Label, buffer: B) -> Pending<B> {
        match self.group.route(&buffer) {
            Some(route) => {
                let boarding = self.boarding.get_or_insert_with(|| Boarding::new(self.group, route));
                let sent = self.group.sent_in_parts(buffer.len());
                boarding.board::<T, B>(Exchange::AllGather, label, buffer, sent)
            }
            None => self.group.all_gather(label, buffer),
        }
    }

    /// [`Group::reduce_scatter`].
    pub fn reduce_scatter<T: Element, B: Buffer<T> + 'static>(
        &mut self,
        label: Label,
        buffer: B,
    ) -> Pending<B> {
        match self.group.route(&buffer) {
            Some(route) if summing(T::DTYPE).is_ok() => {
                let boarding = self.boarding.get_or_insert_with(|| Boarding::new(self.group, route));
                let sent = self.group.sent_in_parts(buffer.len());
                boarding.board::<T, B>(Exchange::ReduceScatter, label, buffer, sent)
            }
            _ => self.group.reduce_scatter(label, buffer),
        }
    }

    /// Starts what has not started yet.
    ///
    /// # Errors
    /// When it does not start, or another rank is lost. Then none of the operations ends well.
    pub fn start(self) -> Result<()> {
        self.boarding.map_or(Ok(()), Boarding::start)
    }
}
