//! The queue of one model, waited for.

use crate::queue::{Full, Queue};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Lets requests through to an engine when it is their turn.
pub(crate) struct Turnstile {
    inner: Mutex<Inner>,
}

struct Inner {
    queue: Queue<oneshot::Sender<usize>>,
    /// When a turn ended last, and the mean time between two ends.
    ended: Option<Instant>,
    between: Duration,
}

impl Inner {
    /// Tells those whose turn it is.
    fn let_through(&mut self) {
        while let Some((waiter, places)) = self.queue.next() {
            // Whoever drops a turn takes it out of the queue first, so somebody is there.
            let _ = waiter.send(places);
        }
    }
}

/// A place in the queue, then in the engine; given back when dropped.
pub(crate) struct Turn {
    gate: Arc<Turnstile>,
    client: Arc<str>,
    number: u64,
    told: oneshot::Receiver<usize>,
    /// Places in the engine that it has.
    places: Option<usize>,
}

impl Turnstile {
    /// See [`Queue::new`].
    pub(crate) fn new(places: usize, limit: usize) -> Arc<Turnstile> {
        let inner = Inner { queue: Queue::new(places, limit), ended: None, between: Duration::ZERO };
        Arc::new(Turnstile { inner: Mutex::new(inner) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lines up, for each of `texts` with so many texts. All or none.
    pub(crate) fn line_up(
        self: &Arc<Self>,
        client: &Arc<str>,
        texts: impl IntoIterator<Item = usize>,
    ) -> Result<Vec<Turn>, Full> {
        let (senders, receivers): (Vec<_>, Vec<_>) = texts
            .into_iter()
            .map(|texts| {
                let (sender, told) = oneshot::channel();
                ((texts, sender), told)
            })
            .unzip();
        let mut inner = self.lock();
        let numbers = inner.queue.arrive(client, senders)?;
        inner.let_through();
        let turn =
            |(number, told)| Turn { gate: self.clone(), client: client.clone(), number, told, places: None };
        Ok(numbers.into_iter().zip(receivers).map(turn).collect())
    }

    /// Turns that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.lock().queue.waiting()
    }

    /// Seconds in which those who wait now will about have had their turn.
    pub(crate) fn seconds_to_wait(&self) -> u64 {
        let inner = self.lock();
        let wait = inner.between * inner.queue.waiting() as u32;
        (wait.as_secs_f64().ceil() as u64).clamp(1, 60)
    }
}

impl Turn {
    /// Waits until it is there. Nothing is lost when the waiting is given up and begun again.
    pub(crate) async fn comes(&mut self) {
        if self.places.is_none() {
            // The sender is in the queue until it is used.
            self.places = (&mut self.told).await.ok();
        }
    }

    /// Gives back the places in the engine beyond `places`, for which it has no more texts.
    pub(crate) fn keep(&mut self, places: usize) {
        let Some(own) = &mut self.places else { return };
        if let Some(more) = own.checked_sub(places.max(1)).filter(|more| *more > 0) {
            *own -= more;
            let mut inner = self.gate.lock();
            inner.queue.free(more);
            inner.let_through();
        }
    }

    /// Notes that tokens were computed.
    pub(crate) fn charge(&self, tokens: usize) {
        self.gate.lock().queue.charge(&self.client, tokens as u64);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut inner = self.gate.lock();
        match self.places.or_else(|| self.told.try_recv().ok()) {
            Some(places) => {
                inner.queue.done(&self.client, places);
                let now = Instant::now();
                if let Some(ended) = inner.ended.replace(now) {
                    inner.between = (inner.between * 7 + (now - ended).min(Duration::from_secs(60))) / 8;
                }
            }
            None => inner.queue.leave(&self.client, self.number),
        }
        inner.let_through();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn turns_come_are_given_up_and_given_back() {
        let gate = Turnstile::new(1, 2);
        let client: Arc<str> = "c".into();
        let mut first = gate.line_up(&client, [1]).unwrap().remove(0);
        first.comes().await;
        let mut rest = gate.line_up(&client, [1, 1]).unwrap();
        assert_eq!(gate.line_up(&client, [1]).err().unwrap(), Full { waiting: 2 });
        first.keep(0);
        let (mut third, mut second) = (rest.pop().unwrap(), rest.pop().unwrap());
        let soon = Duration::from_millis(20);
        assert!(tokio::time::timeout(soon, second.comes()).await.is_err());
        drop(first);
        second.comes().await;
        // It is told, but never looks.
        drop(second);
        assert!(gate.waiting() == 0);
        let fourth = gate.line_up(&client, [1]).unwrap().remove(0);
        assert!(tokio::time::timeout(soon, async { third.comes().await }).await.is_ok());
        drop(fourth);
        drop(third);
        let mut last = gate.line_up(&client, [5]).unwrap().remove(0);
        last.comes().await;
    }
}
