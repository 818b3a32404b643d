//! The queue of one model, waited for.

use crate::queue::{Full, Queue, Work};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Lets requests through to an engine when it is their turn.
pub(crate) struct Turnstile {
    inner: Mutex<Inner>,
}

/// Tells, and is told, that a turn has come, with what it takes.
type Teller = oneshot::Sender<Work>;
type Told = oneshot::Receiver<Work>;

struct Inner {
    queue: Queue<Teller>,
    /// Where the engine is told how many turns wait.
    elsewhere: Arc<AtomicUsize>,
    /// When a turn ended last, and the mean time between two ends.
    ended: Option<Instant>,
    between: Duration,
}

impl Inner {
    /// Tells those whose turn it is.
    fn let_through(&mut self) {
        while let Some((waiter, work)) = self.queue.next() {
            // Whoever drops a turn takes it out of the queue first, so somebody is there.
            let _ = waiter.send(work);
        }
        self.elsewhere.store(self.queue.waiting(), Ordering::Relaxed);
    }
}

/// For each of `works`, with which it is told that its turn has come.
fn channels(works: &[Work]) -> (Vec<(Work, Teller)>, Vec<Told>) {
    let one = |work: &Work| {
        let (sender, told) = oneshot::channel();
        ((*work, sender), told)
    };
    works.iter().map(one).unzip()
}

/// A place in the queue, then in the engine; given back when dropped.
pub(crate) struct Turn {
    gate: Arc<Turnstile>,
    client: Arc<str>,
    number: u64,
    told: Told,
    /// What it takes of the engine.
    work: Option<Work>,
}

impl Turnstile {
    /// See [`Queue::new`]; `elsewhere` is told how many wait.
    pub(crate) fn new(most: Work, limit: usize, elsewhere: Arc<AtomicUsize>) -> Arc<Turnstile> {
        let inner = Inner { queue: Queue::new(most, limit), elsewhere, ended: None, between: Duration::ZERO };
        Arc::new(Turnstile { inner: Mutex::new(inner) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lines up for a turn for each of `works`. All or none.
    pub(crate) fn line_up(self: &Arc<Self>, client: &Arc<str>, works: &[Work]) -> Result<Vec<Turn>, Full> {
        let (senders, told) = channels(works);
        let mut inner = self.lock();
        let numbers = inner.queue.arrive(client, senders)?;
        Ok(self.turns(inner, client, numbers, told))
    }

    /// Lines up in the places of turns that have come, so that as many wait as before.
    pub(crate) fn follow(self: &Arc<Self>, client: &Arc<str>, works: &[Work]) -> Vec<Turn> {
        let (senders, told) = channels(works);
        let mut inner = self.lock();
        let numbers = inner.queue.enter(client, senders);
        self.turns(inner, client, numbers, told)
    }

    fn turns(
        self: &Arc<Self>,
        mut inner: MutexGuard<'_, Inner>,
        client: &Arc<str>,
        numbers: Vec<u64>,
        told: Vec<Told>,
    ) -> Vec<Turn> {
        inner.let_through();
        let turn =
            |(number, told)| Turn { gate: self.clone(), client: client.clone(), number, told, work: None };
        numbers.into_iter().zip(told).map(turn).collect()
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
        if self.work.is_none() {
            // The sender is in the queue until it is used.
            self.work = (&mut self.told).await.ok();
        }
    }

    /// Gives back the places in the engine beyond those of `texts`, which are all that it still has.
    pub(crate) fn keep(&mut self, texts: usize) {
        let own = self.work.map_or(0, |work| work.texts);
        self.free(Work { texts: own.saturating_sub(texts.max(1)), unread: 0 });
    }

    /// Notes that its prompt was read.
    pub(crate) fn read(&mut self) {
        let unread = self.work.map_or(0, |work| work.unread);
        self.free(Work { texts: 0, unread });
    }

    fn free(&mut self, less: Work) {
        let Some(own) = self.work.as_mut().filter(|_| less != Work::default()) else { return };
        *own -= less;
        let mut inner = self.gate.lock();
        inner.queue.free(less);
        inner.let_through();
    }

    /// Notes that tokens were computed.
    pub(crate) fn charge(&self, tokens: usize) {
        self.gate.lock().queue.charge(&self.client, tokens as u64);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut inner = self.gate.lock();
        match self.work.or_else(|| self.told.try_recv().ok()) {
            Some(work) => {
                inner.queue.done(&self.client, work);
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
    async fn a_prompt_that_was_read_makes_room_for_the_next() {
        let elsewhere = Arc::new(AtomicUsize::new(0));
        let gate = Turnstile::new(Work { texts: 9, unread: 10 }, 9, elsewhere.clone());
        let mut turns = gate.line_up(&"c".into(), &[Work { texts: 2, unread: 10 }; 3]).unwrap();
        turns[0].comes().await;
        assert_eq!(gate.waiting(), 2);
        turns[0].read();
        turns[0].read();
        turns[1].comes().await;
        assert_eq!((gate.waiting(), elsewhere.load(Ordering::Relaxed)), (1, 1));
        // One that is given up is not read any more either.
        drop(turns.remove(1));
        turns[1].comes().await;
    }

    #[tokio::test]
    async fn turns_come_are_given_up_and_given_back() {
        let texts = |texts| [Work { texts, unread: 0 }];
        let gate = Turnstile::new(Work { texts: 1, unread: 1 }, 2, Arc::default());
        let client: Arc<str> = "c".into();
        let mut first = gate.line_up(&client, &texts(1)).unwrap().remove(0);
        first.comes().await;
        let mut rest = gate.line_up(&client, &[texts(1), texts(1)].concat()).unwrap();
        assert_eq!(gate.line_up(&client, &texts(1)).err().unwrap(), Full { waiting: 2 });
        first.keep(0);
        let (mut third, mut second) = (rest.pop().unwrap(), rest.pop().unwrap());
        let soon = Duration::from_millis(20);
        assert!(tokio::time::timeout(soon, second.comes()).await.is_err());
        drop(first);
        second.comes().await;
        // It is told, but never looks.
        drop(second);
        assert!(gate.waiting() == 0);
        let fourth = gate.line_up(&client, &texts(1)).unwrap().remove(0);
        assert!(tokio::time::timeout(soon, async { third.comes().await }).await.is_ok());
        drop(fourth);
        drop(third);
        let mut last = gate.line_up(&client, &texts(5)).unwrap().remove(0);
        last.comes().await;
    }
}
