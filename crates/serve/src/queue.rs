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
//!
//! An engine reads prompts in the order in which it gets them, so that it gets few long ones ahead: whoever comes next would wait for
//! all of them.

use std::collections::{BTreeMap, VecDeque};
use std::ops::{AddAssign, SubAssign};

/// Clients that are remembered while they have nothing here.
const REMEMBERED: usize = 4096;

/// What turns take of an engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    /// Texts that are computed at a time.
    pub(crate) texts: usize,
    /// Tokens of prompts that are not read.
    pub(crate) unread: usize,
}

impl Work {
    /// Whether another turn, however large, may begin beside it in an engine that has room for `most`.
    fn leaves_room(self, most: Work) -> bool {
        self.texts < most.texts && self.unread < most.unread
    }
}

impl AddAssign for Work {
    fn add_assign(&mut self, more: Work) {
        self.texts += more.texts;
        self.unread += more.unread;
    }
}

impl SubAssign for Work {
    fn sub_assign(&mut self, less: Work) {
        self.texts -= less.texts;
        self.unread -= less.unread;
    }
}

/// A queue whose turns are told by handing back what was given at arrival, a `W`.
pub(crate) struct Queue<W> {
    /// What the engine has room for.
    most: Work,
    /// Turns that may wait, apart from the shares of those who come to a full queue.
    limit: usize,
    /// What all turns that have begun take; more than there is room for when the last one wanted more than was free.
    taken: Work,
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
    work: Work,
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
    /// For an engine that has room for `most`, which is something of both; `limit` turns may wait.
    pub(crate) fn new(most: Work, limit: usize) -> Queue<W> {
        Queue { most, limit, taken: Work::default(), waiting: 0, clients: BTreeMap::new(), count: 0 }
    }

    /// Turns that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Lines up for a turn for each entry of `turns`, which says what it takes. All of them or, when that are too
    /// many, none. Returns their numbers; who has one leaves with [`Queue::leave`] or [`Queue::done`].
    pub(crate) fn arrive(&mut self, client: &str, turns: Vec<(Work, W)>) -> Result<Vec<u64>, Full> {
        // What finds room at once does not wait.
        let at_once = if self.waiting > 0 { 0 } else { self.beginning(turns.iter().map(|turn| turn.0)) };
        let more = turns.len() - at_once;
        if self.waiting + more > self.limit && !self.has_a_share_for(client, more) {
            return Err(Full { waiting: self.waiting });
        }
        Ok(self.enter(client, turns))
    }

    /// Lines up, however many wait; see [`Queue::arrive`].
    pub(crate) fn enter(&mut self, client: &str, turns: Vec<(Work, W)>) -> Vec<u64> {
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
        for (work, waiter) in turns {
            // A request may be of more texts than are computed at a time; then it has to do with all places.
            let work = Work { texts: work.texts.clamp(1, self.most.texts), ..work };
            entry.waiting.push_back(Waiting { number: self.count, work, waiter });
            self.count += 1;
            self.waiting += 1;
        }
        (first..self.count).collect()
    }

    /// Whether so many more turns of a client may wait although the queue is full.
    fn has_a_share_for(&self, client: &str, more: usize) -> bool {
        let own = self.clients.get(client).map_or(0, |c| c.waiting.len());
        let others = self.clients.iter().filter(|(name, c)| *name != client && !c.waiting.is_empty()).count();
        // Somebody else must have filled it, or it would have no limit.
        others > 0 && (own == 0 || own + more <= self.limit / (others + 1))
    }

    /// Whose turn it is now, with what it takes.
    pub(crate) fn next(&mut self) -> Option<(W, Work)> {
        if !self.taken.leaves_room(self.most) {
            return None;
        }
        let waiting = self.clients.values_mut().filter(|c| !c.waiting.is_empty());
        let client = waiting.min_by_key(|c| (c.served, c.waiting[0].number))?;
        let turn = client.waiting.pop_front()?;
        client.running += 1;
        self.taken += turn.work;
        self.waiting -= 1;
        Some((turn.waiter, turn.work))
    }

    /// How many of some turns, from the first on, begin at once.
    fn beginning(&self, turns: impl Iterator<Item = Work>) -> usize {
        let mut taken = self.taken;
        turns
            .take_while(|work| {
                let begins = taken.leaves_room(self.most);
                taken += *work;
                begins
            })
            .count()
    }

    /// Notes that tokens were computed for a client.
    pub(crate) fn charge(&mut self, client: &str, tokens: u64) {
        if let Some(client) = self.clients.get_mut(client) {
            client.served += tokens;
        }
    }

    /// A turn takes so much less, but is not over.
    pub(crate) fn free(&mut self, work: Work) {
        self.taken -= work;
    }

    /// A turn is over, which took so much.
    pub(crate) fn done(&mut self, client: &str, work: Work) {
        self.taken -= work;
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

#[cfg(test)]
mod tests {
    use super::*;

    type Turns = Queue<&'static str>;

    fn texts(texts: usize) -> Work {
        Work { texts, unread: 0 }
    }

    /// For an engine that computes so many texts, whatever their prompts are.
    fn queue<W>(places: usize, limit: usize) -> Queue<W> {
        Queue::new(Work { texts: places, unread: 1 }, limit)
    }

    fn next(queue: &mut Turns) -> Vec<&'static str> {
        std::iter::from_fn(|| queue.next().map(|(waiter, _)| waiter)).collect()
    }

    #[test]
    fn who_had_least_goes_next() {
        let mut queue: Turns = queue(1, 100);
        queue.arrive("greedy", vec![(texts(1), "g"); 20]).unwrap();
        assert_eq!(next(&mut queue), ["g"]);
        queue.charge("greedy", 500);
        queue.arrive("modest", vec![(texts(1), "m"); 4]).unwrap();
        // Level with the other, who came first; then they take turns by what they use.
        let mut order = vec![];
        for _ in 0..8 {
            queue.done(if order.last() == Some(&"m") { "modest" } else { "greedy" }, texts(1));
            let (waiter, _) = queue.next().unwrap();
            let (client, tokens) = if waiter == "m" { ("modest", 50) } else { ("greedy", 100) };
            queue.charge(client, tokens);
            order.push(waiter);
        }
        assert_eq!(order, ["g", "m", "m", "g", "m", "m", "g", "g"]);
    }

    #[test]
    fn nobody_saves_up_turns_or_escapes_what_was_used() {
        let mut queue: Turns = queue(1, 100);
        queue.arrive("a", vec![(texts(1), "a"); 9]).unwrap();
        queue.arrive("b", vec![(texts(1), "b")]).unwrap();
        next(&mut queue);
        queue.charge("a", 1000);
        queue.done("a", texts(1));
        assert_eq!(next(&mut queue), ["b"]);
        queue.charge("b", 5000);
        queue.done("b", texts(1));
        // b comes back at once, and still has had more than a.
        queue.arrive("b", vec![(texts(1), "b")]).unwrap();
        assert_eq!(next(&mut queue), ["a"]);
        // c never came, and is level with a now, not a thousand tokens ahead of it.
        queue.arrive("c", vec![(texts(1), "c"); 2]).unwrap();
        queue.done("a", texts(1));
        queue.charge("a", 1);
        assert_eq!(next(&mut queue), ["c"]);
        queue.charge("c", 2);
        queue.done("c", texts(1));
        assert_eq!(next(&mut queue), ["a"]);
    }

    #[test]
    fn places_and_waiting_turns_are_bounded() {
        let mut queue: Turns = queue(4, 2);
        // Two find places, one waits.
        let numbers = queue.arrive("a", vec![(texts(2), "1"), (texts(2), "2"), (texts(9), "3")]).unwrap();
        assert_eq!(next(&mut queue), ["1", "2"]);
        assert_eq!(queue.waiting(), 1);
        // All or none.
        assert_eq!(queue.arrive("a", vec![(texts(1), "x"), (texts(1), "y")]), Err(Full { waiting: 1 }));
        queue.arrive("b", vec![(texts(1), "4")]).unwrap();
        queue.charge("a", 1);
        queue.done("a", texts(2));
        // The one of nine texts begins beside the other, and takes all four places.
        assert_eq!(next(&mut queue), ["4", "3"]);
        queue.arrive("b", vec![(texts(1), "5")]).unwrap();
        queue.done("b", texts(1));
        queue.done("a", texts(2));
        assert_eq!(next(&mut queue), [""; 0]);
        // It gives them back as its texts end.
        queue.free(texts(1));
        assert_eq!(next(&mut queue), ["5"]);
        // Whoever leaves frees the place in the queue.
        queue.arrive("b", vec![(texts(1), "6")]).unwrap();
        queue.leave("b", numbers[2] + 3);
        assert_eq!(queue.waiting(), 0);
        queue.done("b", texts(1));
        queue.done("a", texts(3));
        assert_eq!((queue.taken, queue.next()), (texts(0), None));
    }

    #[test]
    fn a_full_queue_keeps_nobody_out_who_has_little_in_it() {
        let mut queue: Turns = queue(1, 12);
        queue.arrive("greedy", vec![(texts(1), "g"); 13]).unwrap();
        next(&mut queue);
        assert_eq!(queue.arrive("greedy", vec![(texts(1), "g")]), Err(Full { waiting: 12 }));
        // A share is half of the queue now, and somebody's first request gets in whatever it brings.
        queue.arrive("b", vec![(texts(1), "b"); 5]).unwrap();
        queue.arrive("b", vec![(texts(1), "b")]).unwrap();
        assert_eq!(queue.arrive("b", vec![(texts(1), "b")]), Err(Full { waiting: 18 }));
        queue.arrive("c", vec![(texts(1), "c"); 7]).unwrap();
        assert_eq!(queue.arrive("c", vec![(texts(1), "c")]), Err(Full { waiting: 25 }));
        // So many clients cannot make the queue grow without end.
        for i in 0..50 {
            let client = format!("client {i}");
            while queue.arrive(&client, vec![(texts(1), "x")]).is_ok() {}
        }
        assert!(queue.waiting() <= 25 + 50 + 12, "{}", queue.waiting());
    }

    #[test]
    fn a_turn_of_many_texts_neither_waits_for_all_places_nor_starves() {
        let mut queue: Turns = queue(8, 100);
        queue.arrive("long", vec![(texts(1), "long")]).unwrap();
        assert_eq!(next(&mut queue), ["long"]);
        queue.charge("long", 10);
        queue.arrive("wide", vec![(texts(8), "wide")]).unwrap();
        queue.arrive("short", vec![(texts(1), "short"); 9]).unwrap();
        // Seven places are free: it begins, and the others as soon as the engine is not overbooked.
        assert_eq!(next(&mut queue), ["wide"]);
        queue.free(texts(1));
        assert_eq!(next(&mut queue), [""; 0]);
        queue.free(texts(6));
        assert_eq!(next(&mut queue), ["short"; 6]);
        queue.arrive("wide", vec![(texts(8), "wide again")]).unwrap();
        // With nothing charged, it is the turn of whoever came first; a place is enough for the wide one, too.
        for _ in 0..3 {
            queue.charge("short", 5);
            queue.done("short", texts(1));
        }
        assert_eq!(next(&mut queue), ["wide again"]);
    }

    #[test]
    fn few_long_prompts_are_ahead_of_who_had_least() {
        let mut queue = Turns::new(Work { texts: 100, unread: 2000 }, 100);
        let (long, read) = (Work { texts: 1, unread: 1500 }, Work { texts: 0, unread: 1500 });
        queue.arrive("greedy", vec![(long, "g"); 9]).unwrap();
        assert_eq!(next(&mut queue), ["g"; 2]);
        queue.arrive("modest", vec![(Work { texts: 1, unread: 10 }, "m")]).unwrap();
        queue.charge("greedy", 3000);
        assert_eq!(next(&mut queue), [""; 0]);
        queue.free(read);
        assert_eq!(next(&mut queue), ["m", "g"]);
        // Whoever is gone leaves nothing to be read.
        queue.done("greedy", long);
        assert_eq!((next(&mut queue), queue.taken), (vec!["g"], Work { texts: 4, unread: 3010 }));
        // What finds no room waits, and the queue is bounded.
        let mut queue = Turns::new(Work { texts: 100, unread: 2000 }, 1);
        assert_eq!(queue.arrive("greedy", vec![(long, "g"); 4]), Err(Full { waiting: 0 }));
        queue.arrive("greedy", vec![(long, "g"); 3]).unwrap();
    }

    #[test]
    fn clients_of_long_ago_are_forgotten() {
        let mut queue = queue(1, 10);
        for i in 0..10_000 {
            let client = format!("client {i}");
            queue.arrive(&client, vec![(texts(1), i)]).unwrap();
            assert_eq!(queue.next(), Some((i, texts(1))));
            queue.charge(&client, 5);
            queue.done(&client, texts(1));
        }
        assert!(queue.clients.len() < 10);
    }
}
