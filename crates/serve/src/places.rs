//! Places for connections: so many in all, so many of one address, and a few beyond them on which only probes are answered.

use crate::app::Limits;
use crate::error::ApiError;
use prometheus_client::metrics::counter::Counter;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Connections beyond the limits, on which only probes are answered: whoever watches over the server would otherwise take one that
/// is busy for one that is dead, and end it.
const SPARE: usize = 8;

/// All places.
pub(crate) struct Places {
    all: Arc<Semaphore>,
    limit: usize,
    spare: Arc<Semaphore>,
    of_one: usize,
    /// Places that addresses have.
    taken: Mutex<HashMap<IpAddr, usize>>,
    /// Connections of addresses that had as many as they may have.
    excess: Counter,
}

/// The place of a connection, which is free when this is dropped.
pub(crate) struct Place {
    /// Which limit it is beyond, if it is.
    pub(crate) beyond: Option<Beyond>,
    _permit: OwnedSemaphorePermit,
    _one: Option<One>,
}

/// A limit on connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beyond {
    /// Of all clients.
    All,
    /// Of one address.
    One,
}

/// One of an address' places.
struct One {
    places: Arc<Places>,
    address: IpAddr,
}

impl Places {
    /// As many as the limits say; `excess` counts connections beyond that of one address.
    pub(crate) fn new(limits: &Limits, excess: Counter) -> Arc<Places> {
        let limit = limits.connections.clamp(1, Semaphore::MAX_PERMITS);
        let (all, spare) = (Arc::new(Semaphore::new(limit)), Arc::new(Semaphore::new(SPARE)));
        Arc::new(Places {
            all,
            limit,
            spare,
            of_one: limits.client_connections,
            taken: Mutex::default(),
            excess,
        })
    }

    /// A place for a connection from an address, which waits while all are taken. None when the address has its share of them, for
    /// which nobody behind it is to wait, and no spare one is free either.
    pub(crate) async fn take(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let Some(one) = self.one(network(address)) else {
            self.excess.inc();
            let permit = self.spare.clone().try_acquire_owned().ok()?;
            return Some(Place { beyond: Some(Beyond::One), _permit: permit, _one: None });
        };
        let (permit, beyond) = tokio::select! {
            biased;
            permit = self.all.clone().acquire_owned() => (permit, None),
            permit = self.spare.clone().acquire_owned() => (permit, Some(Beyond::All)),
        };
        // They are never closed.
        Some(Place { beyond, _permit: permit.ok()?, _one: Some(one) })
    }

    /// One of those that an address may have.
    fn one(self: &Arc<Self>, address: IpAddr) -> Option<One> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let own = taken.entry(address).or_default();
        if *own >= self.of_one {
            return None;
        }
        *own += 1;
        Some(One { places: self.clone(), address })
    }

    /// Waits until all places are free.
    pub(crate) async fn empty(&self) {
        let _ = self.all.acquire_many(u32::try_from(self.limit).unwrap_or(u32::MAX)).await;
        let _ = self.spare.acquire_many(SPARE as u32).await;
    }
}

impl Drop for One {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = taken.get_mut(&self.address) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.address);
            }
        }
    }
}

impl Beyond {
    /// What is answered to all but probes.
    pub(crate) fn refusal(self, limits: &Limits) -> ApiError {
        let advice = "close those that you do not need, or try again later";
        match self {
            Beyond::All => {
                let message =
                    format!("there are {} connections, which is the limit; {advice}", limits.connections);
                ApiError::unavailable("too_many_connections", Some(1), message)
            }
            Beyond::One => {
                let most = limits.client_connections;
                let message =
                    format!("your address has {most} connections, which is the limit for one; {advice}");
                ApiError::too_many("client_connections", 1, message)
            }
        }
    }
}

/// What connections and turns are counted by: the address, or the first half of it where a client has all that begin so.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from(u128::from(address) >> 64 << 64).into(),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_known_by_its_address_or_its_network() {
        let same = |a: &str, b: &str| network(a.parse().unwrap()) == network(b.parse().unwrap());
        assert!(same("10.0.0.1", "::ffff:10.0.0.1") && same("2001:db8::1", "2001:db8::ffff:2"));
        assert!(!same("10.0.0.1", "10.0.0.2") && !same("2001:db8::1", "2001:db8:0:1::1"));
    }

    #[tokio::test]
    async fn places_are_taken_given_back_and_forgotten() {
        let limits = Limits { connections: 3, client_connections: 2, ..Limits::default() };
        let (excess, [a, b]) = (Counter::default(), [1, 2].map(|last| IpAddr::from([10, 0, 0, last])));
        let places = Places::new(&limits, excess.clone());
        let beyond = |place: &Option<Place>| place.as_ref().and_then(|place| place.beyond);
        let (first, second) = (places.take(a).await, places.take(a).await);
        assert_eq!((beyond(&first), beyond(&second), excess.get()), (None, None, 0));
        let mut more = Vec::new();
        for _ in 0..SPARE {
            more.push(places.take(a).await);
            assert_eq!(beyond(more.last().unwrap()), Some(Beyond::One));
        }
        assert!(places.take(a).await.is_none(), "nobody waits for it");
        assert_eq!(excess.get(), SPARE as u64 + 1);
        more.pop();
        let (third, fourth) = (places.take(b).await, places.take(b).await);
        assert_eq!((beyond(&third), beyond(&fourth)), (None, Some(Beyond::All)));
        drop((first, fourth));
        assert_eq!(beyond(&places.take(a).await), None);
        drop((second, third, more));
        places.empty().await;
        assert!(places.taken.lock().unwrap().is_empty());
    }
}
