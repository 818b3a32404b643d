//! Operations that the devices of a group do themselves.

use crate::flights::{Exchanged, Part};
use crate::group::Group;
use crate::label::{Label, Operation};
use crate::pending::Pending;
use anyhow::Result;
use ferropt_device::{Buffer, Departure, Element, Exchange, Link};
use std::sync::Arc;

/// How the devices of a group are linked.
#[derive(Clone)]
pub(crate) enum Linked {
    /// They are not.
    No,
    /// All of them together.
    All(Arc<dyn Link>),
    /// Each with its neighbours.
    Neighbours(Vec<Neighbour>),
}

/// A member that this rank's device sends to and receives from, on a link for each, in which the sender is the first.
#[derive(Clone)]
pub(crate) struct Neighbour {
    pub(crate) member: usize,
    pub(crate) to: Arc<dyn Link>,
    pub(crate) from: Arc<dyn Link>,
}

/// A link for an operation, and the members that the operation waits for.
pub(crate) struct Route<'g> {
    link: &'g dyn Link,
    others: Vec<usize>,
}

impl Group {
    /// Between all members, if their devices exchange this buffer.
    pub(crate) fn route<T: Element>(&self, buffer: &impl Buffer<T>) -> Option<Route<'_>> {
        match &self.inner().linked {
            Linked::All(link) if buffer.located().is_some() => {
                Some(Route { link: &**link, others: self.others().collect() })
            }
            _ => None,
        }
    }

    /// To a member, if devices send it this buffer.
    pub(crate) fn route_to<T: Element>(&self, member: usize, buffer: &impl Buffer<T>) -> Option<Route<'_>> {
        let neighbour = self.neighbour(member, buffer)?;
        Some(Route { link: &*neighbour.to, others: vec![member] })
    }

    /// From a member, if devices receive this buffer.
    pub(crate) fn route_from<T: Element>(&self, member: usize, buffer: &impl Buffer<T>) -> Option<Route<'_>> {
        let neighbour = self.neighbour(member, buffer)?;
        Some(Route { link: &*neighbour.from, others: vec![member] })
    }

    fn neighbour<T: Element>(&self, member: usize, buffer: &impl Buffer<T>) -> Option<&Neighbour> {
        match &self.inner().linked {
            Linked::Neighbours(all) if buffer.located().is_some() => all.iter().find(|n| n.member == member),
            _ => None,
        }
    }

    /// Has the devices exchange a buffer; `sent` elements count as sent by this rank.
    pub(crate) fn exchange<T: Element, B: Buffer<T> + 'static>(
        &self,
        route: Route<'_>,
        exchange: Exchange,
        label: Label,
        buffer: B,
        sent: usize,
    ) -> Pending<B> {
        let mut boarding = Boarding::new(self, route);
        let pending = boarding.board::<T, B>(exchange, label, buffer, sent);
        match boarding.start() {
            Ok(()) => pending,
            Err(error) => Pending::ready(Err(error)),
        }
    }
}

/// Exchanges on a link that are going to start together.
pub(crate) struct Boarding<'g> {
    group: &'g Group,
    others: Vec<usize>,
    departure: Departure<'g>,
    parts: Vec<Part>,
}

impl<'g> Boarding<'g> {
    pub(crate) fn new(group: &'g Group, route: Route<'g>) -> Self {
        Boarding { group, others: route.others, departure: Departure::new(route.link), parts: Vec::new() }
    }

    /// Adds a buffer, of which `sent` elements count as sent by this rank.
    pub(crate) fn board<T: Element, B: Buffer<T> + 'static>(
        &mut self,
        exchange: Exchange,
        label: Label,
        buffer: B,
        sent: usize,
    ) -> Pending<B> {
        let (world, operation) = (self.group.world(), operation(exchange));
        let (len, sent) = (buffer.len() * size_of::<T>(), sent * size_of::<T>());
        match self.departure.board::<T, B>(exchange, buffer) {
            Ok(flight) => {
                world.count(self.group.inner().name, operation, sent as u64);
                self.parts.push(Part { operation, label, dtype: T::DTYPE, len, sent });
                Pending::flying(flight, world)
            }
            Err(error) => Pending::ready(Err(error)),
        }
    }

    /// Starts them.
    pub(crate) fn start(self) -> Result<()> {
        let Boarding { group, others, departure, parts } = self;
        let Some(Part { operation, label, .. }) = parts.first() else { return Ok(()) };
        let (world, name) = (group.world(), group.inner().name);
        let what = format!("the {operation} of {label} in group {name} does not start");
        let others = others.iter().map(|member| group.world_rank(*member)).collect();
        world.give_back();
        world.alive()?;
        let departed = world.depart(departure, Exchanged::now(name, parts, others));
        // What was aborted failed for the reason that all were.
        departed.map_err(|error| world.alive().err().unwrap_or_else(|| error.context(what)))
    }
}

/// What an exchange is called here.
fn operation(exchange: Exchange) -> Operation {
    match exchange {
        Exchange::AllGather => Operation::AllGather,
        Exchange::ReduceScatter => Operation::ReduceScatter,
        Exchange::AllReduce => Operation::AllReduce,
        Exchange::Broadcast { .. } => Operation::Broadcast,
        Exchange::Send { .. } | Exchange::Receive { .. } => Operation::Send,
    }
}
