//! Operations of a group that start together.

use crate::group::{Group, summing};
use crate::label::Label;
use crate::pending::Pending;
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
        let sent = self.group.sent_in_parts(buffer.len());
        match self.board::<T, B>(Exchange::AllGather, label, buffer, sent) {
            Ok(pending) => pending,
            Err(buffer) => self.group.all_gather(label, buffer),
        }
    }

    /// [`Group::reduce_scatter`].
    pub fn reduce_scatter<T: Element, B: Buffer<T> + 'static>(
        &mut self,
        label: Label,
        buffer: B,
    ) -> Pending<B> {
        let sent = self.group.sent_in_parts(buffer.len());
        match self.board::<T, B>(Exchange::ReduceScatter, label, buffer, sent) {
            Ok(pending) => pending,
            Err(buffer) => self.group.reduce_scatter(label, buffer),
        }
    }

    /// [`Group::all_reduce`].
    pub fn all_reduce<T: Element, B: Buffer<T> + 'static>(&mut self, label: Label, buffer: B) -> Pending<B> {
        let sent = self.group.sent_in_sum::<T>(buffer.len());
        match self.board::<T, B>(Exchange::AllReduce, label, buffer, sent) {
            Ok(pending) => pending,
            Err(buffer) => self.group.all_reduce(label, buffer),
        }
    }

    /// Takes a buffer along, of which `sent` elements count as sent by this rank.
    ///
    /// # Errors
    /// The buffer, where devices do not do that with it.
    fn board<T: Element, B: Buffer<T> + 'static>(
        &mut self,
        exchange: Exchange,
        label: Label,
        buffer: B,
        sent: usize,
    ) -> Result<Pending<B>, B> {
        let sums = matches!(exchange, Exchange::ReduceScatter | Exchange::AllReduce);
        match self.group.route(&buffer) {
            Some(route) if !sums || summing(T::DTYPE).is_ok() => {
                let boarding = self.boarding.get_or_insert_with(|| Boarding::new(self.group, route));
                Ok(boarding.board::<T, B>(exchange, label, buffer, sent))
            }
            _ => Err(buffer),
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
