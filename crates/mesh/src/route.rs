//! Operations that the devices of a group do themselves.

use crate::flights::Exchanged;
use crate::group::{Group, Pending};
use crate::label::{Label, Operation};
use crate::reactor::Command;
use anyhow::Result;
use ferropt_device::{Buffer, Element, Exchange, Flight, Link};
use std::sync::Arc;
use std::time::Instant;

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
        let (world, group, operation) = (self.world(), self.inner().name, operation(exchange));
        let (len, sent) = (buffer.len() * size_of::<T>(), sent * size_of::<T>());
        world.count(group, operation, sent as u64);
        let start = || -> Result<Flight<B>> {
            world.alive()?;
            let flight = Flight::start::<T>(route.link, exchange, buffer)?;
            let others = route.others.iter().map(|member| self.world_rank(*member)).collect();
            let (dtype, posted, watch) = (T::DTYPE, Instant::now(), flight.watch());
            let exchanged = Exchanged { operation, group, label, dtype, len, sent, others, posted, watch };
            world.command(Command::Exchanged(exchanged))?;
            Ok(flight)
        };
        match start() {
            Ok(flight) => Pending::flying(flight, world),
            // What was aborted failed for the reason that all were.
            Err(error) => Pending::ready(Err(world.alive().err().unwrap_or_else(|| {
                error.context(format!("the {operation} of {label} in group {group} does not start"))
            }))),
        }
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
