use super::*;
use ferropt_device::rng::{Purpose, Stream};
use std::collections::HashMap;

/// Random whole numbers.
struct Dice(Stream, u64);

impl Dice {
    fn new(seed: u64) -> Dice {
        Dice(Stream::new(seed, Purpose::Sampling, 0, 0), 0)
    }

    /// One below `sides`.
    fn roll(&mut self, sides: usize) -> usize {
        self.1 += 1;
        self.0.word(self.1, 0) as usize % sides
    }
}

/// What a cache would hold, told by tokens, and what every sequence wants to become.
struct World {
    scheduler: Scheduler,
    cache: Vec<[Option<u32>; PAGE]>,
    goals: HashMap<Key, usize>,
    limits: Limits,
    accepted: usize,
}

/// What is guessed at a place: seldom something else than another text may have there.
fn guess(i: usize) -> u32 {
    i as u32 % 2
}

impl World {
    fn new(limits: Limits, pages: usize) -> World {
        let scheduler = Scheduler::new(limits, pages).unwrap();
        World { scheduler, cache: vec![[None; PAGE]; pages], goals: HashMap::new(), limits, accepted: 0 }
    }

    /// One step; returns its number of tokens.
    fn step(&mut self, dice: &mut Dice) -> usize {
        let beside = 1 + dice.roll(100);
        let mut plan = self.scheduler.plan(0, |_| beside);
        if dice.roll(3) > 0 {
            self.scheduler.look_ahead(&mut plan, |_, _| dice.roll(100));
        }
        for (from, to) in &plan.copies {
            self.cache[*to as usize] = self.cache[*from as usize];
        }
        let mut writers = HashMap::new();
        for work in &plan.work {
            let s = self.scheduler.sequence(work.key).unwrap();
            assert_eq!(s.computed, work.past);
            for i in work.past..work.past + work.count {
                let page = s.pages[i / PAGE];
                let writer = writers.entry(page).or_insert(work.key);
                assert_eq!(
                    (*writer, self.scheduler.pages.users(page)),
                    (work.key, 1),
                    "a shared page is written"
                );
                self.cache[page as usize][i % PAGE] = Some(s.tokens[i]);
            }
            for i in work.past + work.count..work.past + work.count + work.ahead {
                let page = s.pages[i / PAGE];
                assert_eq!(self.scheduler.pages.users(page), 1, "a guess is written to a shared page");
                self.cache[page as usize][i % PAGE] = Some(guess(i));
            }
        }
        for work in &plan.work {
            let s = self.scheduler.sequence(work.key).unwrap();
            for (i, token) in s.tokens[..work.past + work.count].iter().enumerate() {
                assert_eq!(
                    self.cache[s.pages[i / PAGE] as usize][i % PAGE],
                    Some(*token),
                    "{:?} at {i}",
                    work.key
                );
            }
        }
        let tokens: usize = plan.work.iter().map(|w| w.count + w.ahead).sum();
        assert!(tokens <= self.limits.tokens, "{tokens} tokens in a step of {}", self.limits.tokens);
        self.scheduler.done(&plan);
        for work in &plan.work {
            let s = self.scheduler.sequence(work.key).unwrap();
            if s.pending() > 0 {
                continue;
            }
            // The first of the guesses are right.
            let (end, goal) = (s.tokens.len(), self.goals[&work.key]);
            for i in end..goal.min(end + dice.roll(work.ahead + 1)) {
                self.scheduler.accept(work.key, guess(i));
                self.accepted += 1;
            }
            let s = self.scheduler.sequence(work.key).unwrap();
            if s.tokens.len() >= goal {
                self.scheduler.remove(work.key);
                self.goals.remove(&work.key);
            } else {
                self.scheduler.push(work.key, dice.roll(3) as u32);
            }
        }
        // Of those that go on, nothing but what is computed has pages.
        for work in &plan.work {
            if let Some(s) = self.scheduler.sequence(work.key).filter(|s| s.generates()) {
                assert_eq!(s.pages.len(), s.computed.div_ceil(PAGE), "{:?}", work.key);
            }
        }
        self.check();
        tokens
    }

    /// Every user of every page is accounted for.
    fn check(&self) {
        let mut users = vec![0; self.cache.len()];
        let mut scopes = HashMap::new();
        for s in self.scheduler.sequences.values() {
            s.pages.iter().for_each(|page| users[*page as usize] += 1);
            let is_its_own = |page: &u32| *scopes.entry(*page).or_insert(s.scope) == s.scope;
            assert!(s.pages.iter().all(is_its_own), "two scopes share a page");
            assert!(s.running || s.pages.is_empty());
        }
        for (page, users) in users.iter().enumerate() {
            assert_eq!(self.scheduler.pages.users(page as u32), *users, "page {page}");
        }
        let unused = users.iter().filter(|users| **users == 0).count();
        assert_eq!(self.scheduler.pages.available(), unused);
        assert!(self.scheduler.load().running <= self.limits.sequences);
    }
}

#[test]
fn random_lives_of_sequences_end_and_leak_nothing() {
    let (mut reused, mut preemptions, mut accepted) = (0, 0, 0);
    for seed in 0..100 {
        let mut dice = Dice::new(seed);
        let sequences = 1 + dice.roll(6);
        let limits = Limits { tokens: sequences + dice.roll(100), sequences, reuse: seed % 3 != 0 };
        let pages = 6 + dice.roll(10);
        let mut world = World::new(limits, pages);
        let mut steps = 0;
        let (mut request, mut part) = (0, 0);
        while request < 40 || !world.goals.is_empty() {
            if request < 40 && dice.roll(3) == 0 {
                // Few different tokens, so that texts begin alike.
                let len = 1 + dice.roll(6 * PAGE - 20);
                let kind = dice.roll(2) as u32;
                let tokens = (0..len).map(|i| if i < 150 { kind } else { dice.roll(2) as u32 }).collect();
                let key = Key { request, part: 0 };
                let reusable = if dice.roll(4) == 0 { dice.roll(len) } else { usize::MAX };
                world.scheduler.add(key, tokens, Scope([dice.roll(2) as u8; 32]), reusable);
                world.goals.insert(key, (len + dice.roll(100)).min(6 * PAGE));
                request += 1;
            }
            let alive: Vec<Key> = world.scheduler.sequences.keys().copied().collect();
            if !alive.is_empty() && part < 30 && dice.roll(8) == 0 {
                let from = alive[dice.roll(alive.len())];
                part += 1;
                let to = Key { request: from.request, part };
                world.scheduler.fork(from, to);
                world.goals.insert(to, world.goals[&from]);
                // As after a choice of another token.
                if world.scheduler.sequences[&to].pending() == 0 {
                    world.scheduler.push(to, 9);
                    world.scheduler.push(from, 8);
                }
            }
            if !alive.is_empty() && dice.roll(30) == 0 {
                let key = alive[dice.roll(alive.len())];
                world.scheduler.remove(key);
                world.goals.remove(&key);
            }
            world.check();
            let busy = !world.goals.is_empty();
            assert!(
                world.step(&mut dice) > 0 || !busy,
                "seed {seed}: nothing is done though something is there"
            );
            steps += 1;
            assert!(steps < 200_000, "seed {seed}: it does not end");
        }
        let load = world.scheduler.load();
        assert_eq!((load.running, load.waiting, load.pages), (0, 0, 0));
        assert!(limits.reuse || load.reused_tokens == 0);
        reused += load.reused_tokens;
        preemptions += load.preemptions;
        accepted += world.accepted;
    }
    assert!(
        reused > 1000 && preemptions > 100 && accepted > 1000,
        "too tame: {reused} tokens reused, {preemptions} preemptions, {accepted} guesses"
    );
}

fn keys(plan: &Plan) -> Vec<(u64, usize, usize)> {
    plan.work.iter().map(|w| (w.key.request, w.past, w.count)).collect()
}

fn key(request: u64) -> Key {
    Key { request, part: 0 }
}

#[test]
fn those_that_generate_are_served_beside_long_prompts() {
    let mut s = Scheduler::new(Limits { tokens: 10, sequences: 3, reuse: true }, 100).unwrap();
    s.add(key(0), vec![1; 25], Scope::default(), usize::MAX);
    s.add(key(1), vec![2; 2], Scope::default(), usize::MAX);
    let plan = s.plan(0, |_| usize::MAX);
    assert_eq!(keys(&plan), [(0, 0, 10)], "first come, first served");
    s.done(&plan);
    let plan = s.plan(0, |_| usize::MAX);
    s.done(&plan);
    let plan = s.plan(0, |_| usize::MAX);
    assert_eq!(keys(&plan), [(0, 20, 5), (1, 0, 2)]);
    s.done(&plan);
    s.push(key(0), 3);
    s.push(key(1), 3);
    s.add(key(2), vec![4; 50], Scope::default(), usize::MAX);
    s.add(key(3), vec![4; 50], Scope::default(), usize::MAX);
    let plan = s.plan(0, |_| usize::MAX);
    assert_eq!(keys(&plan), [(0, 25, 1), (1, 2, 1), (2, 0, 8)], "and no fourth sequence");
    // Planned anew, as nothing of it was done.
    assert_eq!(
        keys(&s.plan(0, |_| 5)),
        [(0, 25, 1), (1, 2, 1), (2, 0, 5)],
        "a short wait for those that generate"
    );
    let asked = std::cell::Cell::new(0);
    let texts_beside = |s: &mut Scheduler, elsewhere: usize| {
        s.plan(elsewhere, |texts| {
            asked.set(texts);
            5
        });
        asked.get()
    };
    s.remove(key(1));
    assert_eq!(texts_beside(&mut s, 0), 2, "two wait, more than generate");
    assert_eq!(texts_beside(&mut s, 7), 3, "as many as there are places for");
}

#[test]
fn the_youngest_gives_way_and_finds_its_pages_again() {
    let mut s = Scheduler::new(Limits { tokens: 1000, sequences: 4, reuse: true }, 4).unwrap();
    s.add(key(0), vec![1; 100], Scope::default(), usize::MAX);
    let plan = s.plan(0, |_| usize::MAX);
    s.done(&plan);
    s.add(key(1), vec![2; 63], Scope::default(), usize::MAX);
    let plan = s.plan(0, |_| usize::MAX);
    assert_eq!(keys(&plan), [(1, 0, 63)]);
    s.done(&plan);
    for _ in 0..29 {
        s.push(key(0), 1);
    }
    s.push(key(1), 2);
    let plan = s.plan(0, |_| usize::MAX);
    assert_eq!(keys(&plan), [(0, 100, 29), (1, 63, 1)], "the last page");
    s.done(&plan);
    for _ in 0..64 {
        s.push(key(0), 1);
    }
    s.push(key(1), 2);
    let plan = s.plan(0, |_| usize::MAX);
    assert_eq!(keys(&plan), [(0, 129, 64)], "no room for the younger");
    s.done(&plan);
    assert_eq!((s.load().preemptions, s.load().waiting), (1, 1));
    s.remove(key(0));
    // Its only full page was taken by the older one, so all of it is computed again.
    assert_eq!(keys(&s.plan(0, |_| usize::MAX)), [(1, 0, 65)]);
}

#[test]
fn a_text_that_begins_like_an_earlier_one_goes_on_from_there() {
    let mut s = Scheduler::new(Limits { tokens: 1000, sequences: 4, reuse: true }, 20).unwrap();
    s.add(key(0), vec![1; 200], Scope::default(), usize::MAX);
    let plan = s.plan(0, |_| usize::MAX);
    s.done(&plan);
    s.remove(key(0));
    s.add(key(1), vec![1; 200], Scope::default(), usize::MAX);
    s.add(key(2), vec![1; 192], Scope::default(), usize::MAX);
    s.add(key(3), vec![1; 200], Scope::default(), 100);
    assert_eq!(
        keys(&s.plan(0, |_| usize::MAX)),
        [(1, 192, 8), (2, 128, 64), (3, 64, 136)],
        "the last token is computed, and what may not be taken"
    );
    assert_eq!(s.load().reused_tokens, 192 + 128 + 64);
    s.add(key(4), vec![1; 200], Scope([1; 32]), usize::MAX);
    assert_eq!(keys(&s.plan(0, |_| 1000))[3..], [(4, 0, 200)], "of another scope nothing is found");
}

#[test]
fn limits_that_allow_nothing_are_refused() {
    let refused = |tokens, sequences| {
        Scheduler::new(Limits { tokens, sequences, reuse: true }, 1).err().unwrap().to_string()
    };
    assert!(refused(5, 0).contains("sequences = 0"));
    assert!(refused(5, 6).contains("5 tokens") && refused(5, 6).contains("6 sequences"));
}
