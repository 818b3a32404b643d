//! What is computed in each step: which tokens of which sequences, within a budget of tokens and of pages.
//!
//! A sequence is a list of tokens of which the first `computed` have their keys and values in the cache. Whatever is
//! behind them is to be computed: a new prompt, the one token that was chosen last, or, after the sequence had to give
//! its pages away, all of it again. So there is no difference between reading a prompt and generating. Guesses of what
//! comes next are computed behind all tokens; they become tokens only when they are found to be right, and nothing has to
//! be taken back where they are not.
//!
//! Sequences are served in the order of their keys. When pages are short, the youngest gives way: it loses its pages
//! and waits. The oldest can therefore always go on, and everything ends. Attention gives a token the same bits however
//! its sequence is cut, so none of this can be seen in the results.

use crate::pages::{Content, Pages, Scope};
use anyhow::{Result, ensure};
use ferropt_device::PAGE;
use std::collections::BTreeMap;

/// Names a sequence; smaller keys go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Number of the request, in order of arrival.
    pub request: u64,
    /// Number of the sequence within it.
    pub part: u64,
}

/// What a step may do at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens that are computed in one step.
    pub tokens: usize,
    /// Sequences that have pages at one time; at most `tokens`.
    pub sequences: usize,
    /// Whether pages of earlier texts are used again.
    pub reuse: bool,
}

/// A sequence.
#[derive(Debug)]
pub struct Sequence {
    tokens: Vec<u32>,
    computed: usize,
    pages: Vec<u32>,
    /// Pages whose content is known, and what they hold.
    known: usize,
    content: Content,
    /// Earlier texts of it are used again.
    scope: Scope,
    /// No more tokens than these are taken from earlier texts.
    reusable: usize,
    /// Whether it has a place in the cache.
    running: bool,
}

impl Sequence {
    /// All tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Pages, in order.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Tokens that are to be computed.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    fn generates(&self) -> bool {
        self.running && self.pending() == 1
    }

    /// For a prompt that is to be read.
    fn waits(&self) -> bool {
        self.pending() > 0 && !self.generates()
    }
}

/// Tokens of a sequence that are computed in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// The sequence.
    pub key: Key,
    /// Tokens before them.
    pub past: usize,
    /// How many.
    pub count: usize,
    /// For how many guesses behind them there is room.
    pub ahead: usize,
}

/// A step.
#[derive(Debug, Default)]
pub struct Plan {
    /// In the order of keys; the counts are at least 1.
    pub work: Vec<Work>,
    /// Pages that are copied before, from and to, in this order.
    pub copies: Vec<(u32, u32)>,
}

/// Counters since the start, and how things stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Sequences with a place in the cache.
    pub running: usize,
    /// Sequences without.
    pub waiting: usize,
    /// Pages in use.
    pub pages: usize,
    /// Of so many.
    pub total_pages: usize,
    /// Tokens that were not computed because an earlier text had them.
    pub reused_tokens: u64,
    /// Times that a sequence lost its pages.
    pub preemptions: u64,
    /// Tokens that a draft guessed.
    pub drafted_tokens: u64,
    /// Of those, the ones that were right.
    pub accepted_tokens: u64,
}

/// All sequences that are not finished.
pub struct Scheduler {
    limits: Limits,
    pages: Pages,
    sequences: BTreeMap<Key, Sequence>,
    reused: u64,
    preemptions: u64,
}

impl Scheduler {
    /// Without sequences, over a cache of `pages` pages.
    ///
    /// # Errors
    /// When the limits would allow nothing.
    pub fn new(limits: Limits, pages: usize) -> Result<Scheduler> {
        ensure!(limits.sequences > 0, "sequences = 0, but at least one must have a place in the cache");
        ensure!(
            limits.tokens >= limits.sequences,
            "{} tokens a step are fewer than {} sequences, each of which needs one; raise the one or lower the other",
            limits.tokens,
            limits.sequences
        );
        Ok(Scheduler {
            limits,
            pages: Pages::new(pages),
            sequences: BTreeMap::new(),
            reused: 0,
            preemptions: 0,
        })
    }

    /// A new sequence, which takes at most `reusable` tokens from earlier texts of its scope.
    pub fn add(&mut self, key: Key, tokens: Vec<u32>, scope: Scope, reusable: usize) {
        let sequence = Sequence {
            tokens,
            computed: 0,
            pages: Vec::new(),
            known: 0,
            content: Content::Beginning(scope),
            scope,
            reusable,
            running: false,
        };
        self.sequences.insert(key, sequence);
    }

    /// A new sequence with the tokens of another, and its pages if there is a place for it.
    pub fn fork(&mut self, from: Key, to: Key) {
        let place = self.running() < self.limits.sequences;
        let Some(old) = self.sequences.get(&from) else { return };
        let (tokens, scope, reusable) = (old.tokens.clone(), old.scope, old.reusable);
        if !(place && old.running) {
            return self.add(to, tokens, scope, reusable);
        }
        old.pages.iter().for_each(|page| self.pages.share(*page));
        let (computed, pages, known, content) = (old.computed, old.pages.clone(), old.known, old.content);
        let new = Sequence { tokens, computed, pages, known, content, scope, reusable, running: true };
        self.sequences.insert(to, new);
    }

    /// Appends a token that is to be computed; room for guesses that were not right is given back.
    pub fn push(&mut self, key: Key, token: u32) {
        let Some(sequence) = self.sequences.get_mut(&key) else { return };
        sequence.tokens.push(token);
        let needed = sequence.computed.div_ceil(PAGE).min(sequence.pages.len());
        sequence.pages.drain(needed..).rev().for_each(|page| self.pages.give_back(page));
    }

    /// Appends a token that was computed as a guess, behind a sequence of which all is computed.
    pub fn accept(&mut self, key: Key, token: u32) {
        let Some(sequence) = self.sequences.get_mut(&key) else { return };
        sequence.tokens.push(token);
        self.computed(key, 1);
    }

    /// Forgets a sequence; its pages are free, but keep what they hold for others that begin alike.
    pub fn remove(&mut self, key: Key) {
        self.preempt(key);
        self.sequences.remove(&key);
    }

    /// Forgets all sequences of a request.
    pub fn remove_request(&mut self, request: u64) {
        let all = Key { request, part: 0 }..=Key { request, part: u64::MAX };
        let keys: Vec<Key> = self.sequences.range(all).map(|(key, _)| *key).collect();
        keys.into_iter().for_each(|key| self.remove(key));
    }

    /// A sequence.
    pub fn sequence(&self, key: Key) -> Option<&Sequence> {
        self.sequences.get(&key)
    }

    /// How things stand; of guesses it knows nothing.
    pub fn load(&self) -> Load {
        let running = self.running();
        Load {
            running,
            waiting: self.sequences.len() - running,
            pages: self.pages.total() - self.pages.available(),
            total_pages: self.pages.total(),
            reused_tokens: self.reused,
            preemptions: self.preemptions,
            ..Load::default()
        }
    }

    fn running(&self) -> usize {
        self.sequences.values().filter(|s| s.running).count()
    }

    /// The next step. If it has texts to generate too, it reads at most `beside(texts)` tokens of prompts, for as many as these are,
    /// or as wait, of which `elsewhere` are not here yet, if there are places for them. Nothing to compute: no work. It must be carried
    /// out and then reported with [`Scheduler::done`].
    pub fn plan(&mut self, elsewhere: usize, beside: impl Fn(usize) -> usize) -> Plan {
        let mut plan = Plan::default();
        let keys: Vec<Key> = self.sequences.keys().copied().collect();
        // A sequence that generates gets its token in each step, however long an older one's prompt is.
        let mut kept = self.generating(&keys);
        let wait = elsewhere + keys.iter().filter(|key| self.sequences[key].waits()).count();
        let all = self.limits.tokens;
        let texts = kept.max(wait.min(self.limits.sequences));
        let mut left = if kept > 0 { all.min(kept.saturating_add(beside(texts))) } else { all };
        for (i, key) in keys.iter().enumerate() {
            let (sequence, preemptions) = (&self.sequences[key], self.preemptions);
            kept -= usize::from(sequence.generates());
            if sequence.pending() == 0 {
                continue;
            }
            let most = left.saturating_sub(kept);
            if most == 0 {
                continue;
            }
            if !sequence.running && !self.admit(*key) {
                break;
            }
            let count = self.find_room(*key, most, &mut plan.copies);
            if count > 0 {
                plan.work.push(Work { key: *key, past: self.sequences[key].computed, count, ahead: 0 });
                left -= count;
            }
            if self.preemptions != preemptions {
                kept = self.generating(&keys[i + 1..]);
            }
        }
        plan
    }

    /// How many of some sequences are generating.
    fn generating(&self, keys: &[Key]) -> usize {
        keys.iter().filter(|key| self.sequences[key].generates()).count()
    }

    /// Makes room for guesses behind the sequences of a plan that generate, as many as `wanted` says of each: of what the
    /// others leave, and nobody gives way for it.
    pub fn look_ahead(&mut self, plan: &mut Plan, mut wanted: impl FnMut(Key, &Sequence) -> usize) {
        let mut left = self.limits.tokens - plan.work.iter().map(|work| work.count).sum::<usize>();
        let running = self.running();
        for work in &mut plan.work {
            let Some(s) = self.sequences.get_mut(&work.key).filter(|s| s.generates()) else { continue };
            let (end, most) = (work.past + work.count, wanted(work.key, s).min(left));
            // Those that run may each need a page soon.
            while s.pages.len() * PAGE < end + most && self.pages.available() > running {
                s.pages.extend(self.pages.take());
            }
            work.ahead = most.min(s.pages.len() * PAGE - end);
            left -= work.ahead;
        }
    }

    /// Notes that a plan was carried out.
    pub fn done(&mut self, plan: &Plan) {
        plan.work.iter().for_each(|work| self.computed(work.key, work.count));
    }

    /// Notes that more tokens of a sequence are computed.
    fn computed(&mut self, key: Key, count: usize) {
        let Some(s) = self.sequences.get_mut(&key) else { return };
        s.computed += count;
        while self.limits.reuse && s.known < s.computed / PAGE {
            let Some(tokens) = page_of(&s.tokens, s.known) else { break };
            s.content = self.pages.hold(s.pages[s.known], s.content, tokens);
            s.known += 1;
        }
    }

    /// Gives a waiting sequence a place, and what is there of it already. Younger ones give way.
    fn admit(&mut self, key: Key) -> bool {
        loop {
            let running = self.running();
            let s = &self.sequences[&key];
            let (mut found, mut content, mut unused) = (Vec::new(), Content::Beginning(s.scope), 0);
            // The last token is always computed, because what follows it is wanted.
            let most = if self.limits.reuse { s.reusable.min(s.tokens.len() - 1) / PAGE } else { 0 };
            while found.len() < most {
                let Some(tokens) = page_of(&s.tokens, found.len()) else { break };
                let Some((next, page)) = self.pages.find(content, tokens) else { break };
                unused += usize::from(self.pages.users(page) == 0);
                found.push(page);
                content = next;
            }
            let needed = s.tokens.len().div_ceil(PAGE) - found.len() + unused;
            // Those that run may each need a page soon; with none running, what is there must do.
            let room = running == 0 || self.pages.available() >= needed + running;
            if running < self.limits.sequences && room {
                found.iter().for_each(|page| self.pages.share(*page));
                let (known, computed) = (found.len(), found.len() * PAGE);
                self.reused += computed as u64;
                if let Some(s) = self.sequences.get_mut(&key) {
                    (s.pages, s.known, s.content, s.computed, s.running) =
                        (found, known, content, computed, true);
                }
                return true;
            }
            if !self.give_way(key) {
                return false;
            }
        }
    }

    /// Pages for the next tokens of a running sequence, `most` at most; returns for how many there is room.
    fn find_room(&mut self, key: Key, most: usize, copies: &mut Vec<(u32, u32)>) -> usize {
        let s = &self.sequences[&key];
        let (computed, count) = (s.computed, s.pending().min(most));
        let last = computed / PAGE;
        // A page that another sequence has too is not written to; a younger one may give way and leave it.
        while let Some(shared) = self.shared(key, last) {
            if let Some(own) = self.pages.take() {
                self.pages.give_back(shared);
                copies.push((shared, own));
                self.pages_of(key)[last] = own;
            } else if !self.give_way(key) {
                return 0;
            }
        }
        let needed = (computed + count).div_ceil(PAGE);
        while self.pages_of(key).len() < needed {
            if let Some(page) = self.pages.take() {
                self.pages_of(key).push(page);
            } else if !self.give_way(key) {
                break;
            }
        }
        count.min(self.pages_of(key).len() * PAGE - computed)
    }

    /// Page number `page` of a sequence, if another one has it too.
    fn shared(&self, key: Key, page: usize) -> Option<u32> {
        self.sequences[&key].pages.get(page).copied().filter(|page| self.pages.users(*page) > 1)
    }

    fn pages_of(&mut self, key: Key) -> &mut Vec<u32> {
        &mut self.sequences.get_mut(&key).expect("the sequence is being planned").pages
    }

    /// Takes the pages of the youngest sequence behind `key` that has any.
    fn give_way(&mut self, key: Key) -> bool {
        let youngest =
            self.sequences.range(key..).rev().find(|(k, s)| **k != key && s.running).map(|(k, _)| *k);
        if let Some(youngest) = youngest {
            self.preempt(youngest);
            self.preemptions += 1;
        }
        youngest.is_some()
    }

    fn preempt(&mut self, key: Key) {
        let Some(s) = self.sequences.get_mut(&key) else { return };
        // The end of a text is less likely to be wanted again than its beginning.
        for page in s.pages.drain(..).rev() {
            self.pages.give_back(page);
        }
        (s.computed, s.known, s.content, s.running) = (0, 0, Content::Beginning(s.scope), false);
    }
}

/// The tokens of page number `page` of a text, if it is full.
fn page_of(tokens: &[u32], page: usize) -> Option<&[u32; PAGE]> {
    tokens.get(page * PAGE..)?.first_chunk()
}

#[cfg(test)]
mod tests;
