//! Whose turn it is: a bounded queue before an engine that is fair to clients.
//!
//! Each client has a counter of the tokens that were computed for it, and whoever has had the least goes next (Sheng et al.,
//! "Fairness in Serving Large Language Models", 2024). Within a client the order is that of arrival. Who comes after a
//! pause starts level with those that are there, so nobody saves up turns. Knows nothing of models, threads or time.
//!
//! Who has many turns in the queue cannot keep others out of it: when it is full, who has none in it still gets in, and so does
//! who has no more than a share of it, which is the queue over all who wait. A turn of many texts begins as soon as one place
//! is free. It takes the others as they become free, since nobody else begins before as many are free as it wants; so nobody
//! has to wait until all are free at the same time.

use std::collections::{BTreeMap, VecDeque};

/// Clients that are remembered while they have nothing here.
const REMEMBERED: usize = 4096;

/// A queue whose turns are told by handing back what was given at arrival, a `W`.
pub(crate) struct Queue<W> {
    /// Texts that the engine computes at a time.
    places: usize,
    /// Turns that may wait, apart from the shares of those who come to a full queue.
    limit: usize,
    /// Places of all turns that have begun; more than there are when the last one wanted more than were free.
    taken: usize,
    waiting: usize,
    clients: BTreeMap<String, Client<W>>,
    count: u64,
}

struct Client<W> {
    /// Tokens that were computed for it.
    served: u64,
    /// Turns that it has.
    running: usize,
    waiting: VecDeque<Waiting<W>>,
}

struct Waiting<W> {
    number: u64,
    places: usize,
    waiter: W,
}

impl<W> Client<W> {
    fn is_here(&self) -> bool {
        self.running > 0 || !self.waiting.is_empty()
    }
}

/// More would wait than may.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full {
    /// How many are waiting.
    pub(crate) waiting: usize,
}

impl<W> Queue<W> {
    /// For an engine that computes `places` texts at a time; `limit` turns may wait.
    pub(crate) fn new(places: usize, limit: usize) -> Queue<W> {
        Queue { places: places.max(1), limit, taken: 0, waiting: 0, clients: BTreeMap::new(), count: 0 }
    }

    /// Turns that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Lines up for a turn for each entry of `turns`, which says how many texts it is. All of them or, when that are too
    /// many, none. Returns their numbers; who has one leaves with [`Queue::leave`] or [`Queue::done`].
    pub(crate) fn arrive(&mut self, client: &str, turns: Vec<(usize, W)>) -> Result<Vec<u64>, Full> {
        let free = self.places.saturating_sub(self.taken);
        // What finds a place at once does not wait.
        let at_once = if self.waiting > 0 { 0 } else { beginning(turns.iter().map(|turn| turn.0), free) };
        let more = turns.len() - at_once;
        if self.waiting + more > self.limit && !self.has_a_share_for(client, more) {
            return Err(Full { waiting: self.waiting });
        }
        let level = self.clients.values().filter(|c| c.is_here()).map(|c| c.served).min();
        self.forget(level);
        let entry = self.clients.entry(client.into()).or_insert(Client {
            served: 0,
            running: 0,
            waiting: VecDeque::new(),
        });
        if !entry.is_here() {
            entry.served = entry.served.max(level.unwrap_or(0));
        }
        let first = self.count;
        for (places, waiter) in turns {
            // A request may be of more texts than there are places; then it has to do with all of them.
            let places = places.clamp(1, self.places);
            entry.waiting.push_back(Waiting { number: self.count, places, waiter });
            self.count += 1;
            self.waiting += 1;
        }
        Ok((first..self.count).collect())
    }

    /// Whether so many more turns of a client may wait although the queue is full.
    fn has_a_share_for(&self, client: &str, more: usize) -> bool {
        let own = self.clients.get(client).map_or(0, |c| c.waiting.len());
        let others = self.clients.iter().filter(|(name, c)| *name != client && !c.waiting.is_empty()).count();
        // Somebody else must have filled it, or it would have no limit.
        others > 0 && (own == 0 || own + more <= self.limit / (others + 1))
    }

    /// Whose turn it is now, with how many places each takes.
    pub(crate) fn next(&mut self) -> Option<(W, usize)> {
        if self.taken >= self.places {
            return None;
        }
        let waiting = self.clients.values_mut().filter(|c| !c.waiting.is_empty());
        let client = waiting.min_by_key(|c| (c.served, c.waiting[0].number))?;
        let turn = client.waiting.pop_front()?;
        client.running += 1;
        self.taken += turn.places;
        self.waiting -= 1;
        Some((turn.waiter, turn.places))
    }

    /// Notes that tokens were computed for a client.
    pub(crate) fn charge(&mut self, client: &str, tokens: u64) {
        if let Some(client) = self.clients.get_mut(client) {
            client.served += tokens;
        }
    }

    /// A turn needs so many places no more, but is not over.
    pub(crate) fn free(&mut self, places: usize) {
        self.taken -= places;
    }

    /// A turn is over.
    pub(crate) fn done(&mut self, client: &str, places: usize) {
        self.taken -= places;
        if let Some(client) = self.clients.get_mut(client) {
            client.running -= 1;
        }
    }

    /// Somebody gave up waiting.
    pub(crate) fn leave(&mut self, client: &str, number: u64) {
        if let Some(client) = self.clients.get_mut(client)
            && let Some(at) = client.waiting.iter().position(|turn| turn.number == number)
        {
            client.waiting.remove(at);
            self.waiting -= 1;
        }
    }

    /// Forgets clients that are not here: those who would start level anyway, and all when they are too many.
    fn forget(&mut self, level: Option<u64>) {
        let many = self.clients.len() > REMEMBERED;
        self.clients.retain(|_, c| c.is_here() || (!many && level.is_some_and(|level| c.served > level)));
    }
}

/// How many of some turns, from the first on, begin while there are `free` places.
fn beginning(turns: impl Iterator<Item = usize>, free: usize) -> usize {
    let mut sum = 0;
    turns
        .take_while(|places| {
            let begins = sum < free;
            sum += places.max(&1);
            begins
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    type Turns = Queue<&'static str>;

    fn next(queue: &mut Turns) -> Vec<&'static str> {
        std::iter::from_fn(|| queue.next().map(|(waiter, _)| waiter)).collect()
    }

    #[test]
    fn who_had_least_goes_next() {
        let mut queue = Turns::new(1, 100);
        queue.arrive("greedy", vec![(1, "g"); 20]).unwrap();
        assert_eq!(next(&mut queue), ["g"]);
        queue.charge("greedy", 500);
        queue.arrive("modest", vec![(1, "m"); 4]).unwrap();
        // Level with the other, who came first; then they take turns by what they use.
        let mut order = vec![];
        for _ in 0..8 {
            queue.done(if order.last() == Some(&"m") { "modest" } else { "greedy" }, 1);
            let (waiter, _) = queue.next().unwrap();
            let (client, tokens) = if waiter == "m" { ("modest", 50) } else { ("greedy", 100) };
            queue.charge(client, tokens);
            order.push(waiter);
        }
        assert_eq!(order, ["g", "m", "m", "g", "m", "m", "g", "g"]);
    }

    #[test]
    fn nobody_saves_up_turns_or_escapes_what_was_used() {
        let mut queue = Turns::new(1, 100);
        queue.arrive("a", vec![(1, "a"); 9]).unwrap();
        queue.arrive("b", vec![(1, "b")]).unwrap();
        next(&mut queue);
        queue.charge("a", 1000);
        queue.done("a", 1);
        assert_eq!(next(&mut queue), ["b"]);
        queue.charge("b", 5000);
        queue.done("b", 1);
        // b comes back at once, and still has had more than a.
        queue.arrive("b", vec![(1, "b")]).unwrap();
        assert_eq!(next(&mut queue), ["a"]);
        // c never came, and is level with a now, not a thousand tokens ahead of it.
        queue.arrive("c", vec![(1, "c"); 2]).unwrap();
        queue.done("a", 1);
        queue.charge("a", 1);
        assert_eq!(next(&mut queue), ["c"]);
        queue.charge("c", 2);
        queue.done("c", 1);
        assert_eq!(next(&mut queue), ["a"]);
    }

    #[test]
    fn places_and_waiting_turns_are_bounded() {
        let mut queue = Turns::new(4, 2);
        // Two find places, one waits.
        let numbers = queue.arrive("a", vec![(2, "1"), (2, "2"), (9, "3")]).unwrap();
        assert_eq!(next(&mut queue), ["1", "2"]);
        assert_eq!(queue.waiting(), 1);
        // All or none.
        assert_eq!(queue.arrive("a", vec![(1, "x"), (1, "y")]), Err(Full { waiting: 1 }));
        queue.arrive("b", vec![(1, "4")]).unwrap();
        queue.charge("a", 1);
        queue.done("a", 2);
        // The one of nine texts begins beside the other, and takes all four places.
        assert_eq!(next(&mut queue), ["4", "3"]);
        queue.arrive("b", vec![(1, "5")]).unwrap();
        queue.done("b", 1);
        queue.done("a", 2);
        assert_eq!(next(&mut queue), [""; 0]);
        // It gives them back as its texts end.
        queue.free(1);
        assert_eq!(next(&mut queue), ["5"]);
        // Whoever leaves frees the place in the queue.
        queue.arrive("b", vec![(1, "6")]).unwrap();
        queue.leave("b", numbers[2] + 3);
        assert_eq!(queue.waiting(), 0);
        queue.done("b", 1);
        queue.done("a", 3);
        assert_eq!((queue.taken, queue.next()), (0, None));
    }

    #[test]
    fn a_full_queue_keeps_nobody_out_who_has_little_in_it() {
        let mut queue = Turns::new(1, 12);
        queue.arrive("greedy", vec![(1, "g"); 13]).unwrap();
        next(&mut queue);
        assert_eq!(queue.arrive("greedy", vec![(1, "g")]), Err(Full { waiting: 12 }));
        // A share is half of the queue now, and somebody's first request gets in whatever it brings.
        queue.arrive("b", vec![(1, "b"); 5]).unwrap();
        queue.arrive("b", vec![(1, "b")]).unwrap();
        assert_eq!(queue.arrive("b", vec![(1, "b")]), Err(Full { waiting: 18 }));
        queue.arrive("c", vec![(1, "c"); 7]).unwrap();
        assert_eq!(queue.arrive("c", vec![(1, "c")]), Err(Full { waiting: 25 }));
        // So many clients cannot make the queue grow without end.
        for i in 0..50 {
            let client = format!("client {i}");
            while queue.arrive(&client, vec![(1, "x")]).is_ok() {}
        }
        assert!(queue.waiting() <= 25 + 50 + 12, "{}", queue.waiting());
    }

    #[test]
    fn a_turn_of_many_texts_neither_waits_for_all_places_nor_starves() {
        let mut queue = Turns::new(8, 100);
        queue.arrive("long", vec![(1, "long")]).unwrap();
        assert_eq!(next(&mut queue), ["long"]);
        queue.charge("long", 10);
        queue.arrive("wide", vec![(8, "wide")]).unwrap();
        queue.arrive("short", vec![(1, "short"); 9]).unwrap();
        // Seven places are free: it begins, and the others as soon as the engine is not overbooked.
        assert_eq!(next(&mut queue), ["wide"]);
        queue.free(1);
        assert_eq!(next(&mut queue), [""; 0]);
        queue.free(6);
        assert_eq!(next(&mut queue), ["short"; 6]);
        queue.arrive("wide", vec![(8, "wide again")]).unwrap();
        // With nothing charged, it is the turn of whoever came first; a place is enough for the wide one, too.
        for _ in 0..3 {
            queue.charge("short", 5);
            queue.done("short", 1);
        }
        assert_eq!(next(&mut queue), ["wide again"]);
    }

    #[test]
    fn clients_of_long_ago_are_forgotten() {
        let mut queue = Queue::new(1, 10);
        for i in 0..10_000 {
            let client = format!("client {i}");
            queue.arrive(&client, vec![(1, i)]).unwrap();
            assert_eq!(queue.next(), Some((i, 1)));
            queue.charge(&client, 5);
            queue.done(&client, 1);
        }
        assert!(queue.clients.len() < 10);
    }
}
