//! Steps: plan, guess, compute, choose, tell.

use crate::choose::{Asked, Chooser, Scratches, on_all_threads};
use crate::draft::{self, Draft};
use crate::embed::Pool;
use crate::ends::Ends;
use crate::event::Event;
use crate::pace::Pace;
use crate::parameters::{Capacity, Refusal, Request};
use crate::request::{Running, Texts};
use crate::scheduler::{Key, Limits, Load, Plan, Scheduler};
use crate::text::Token;
use anyhow::{Context, Result};
use ferropt_data::Tokenizer;
use ferropt_device::{Device, Element, PAGE, Segment};
use ferropt_model::{Cache, Decoder, Memory};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How an engine is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// What a step may do at most.
    pub limits: Limits,
    /// Tokens whose keys and values there is room for, in all sequences together; rounded up to whole pages.
    pub cache_tokens: usize,
    /// Tokens that a draft guesses at most, ahead of each text.
    pub draft_tokens: usize,
    /// How long texts that are being generated may wait for a piece of a prompt, which is made shorter for it, but not shorter
    /// than some tens of tokens, nor than eight for each of the texts, or of the prompts that wait for the places, if these are more.
    /// Absent: prompts are read as fast as can be.
    pub pause: Option<Duration>,
    /// Whether the cache's memory is taken from the system at once, rather than page by page as texts need it.
    pub reserve: bool,
    /// What ends a text.
    pub ends: Ends,
}

impl Options {
    /// For `sequences` texts at a time, each of `longest` tokens at most.
    pub fn new(sequences: usize, longest: usize) -> Options {
        let limits = Limits { tokens: TOKENS.max(sequences), sequences, reuse: true };
        // A page more for each: while it is copied, a page that two texts have in common is there twice.
        let cache_tokens = sequences * (longest.next_multiple_of(PAGE) + PAGE);
        let ends = Ends::default();
        Options { limits, cache_tokens, draft_tokens: DRAFT_TOKENS, pause: None, reserve: false, ends }
    }
}

/// Tokens that a draft guesses at most unless told otherwise. How many are worth it is found out; more hardly ever are.
pub const DRAFT_TOKENS: usize = 8;

/// Tokens of a step: enough for products to be limited by arithmetic, few enough that those who generate hardly wait.
const TOKENS: usize = 1024;
/// Rows whose logits are computed at a time.
const HEAD_ROWS: usize = 128;

/// A model at work on many requests.
///
/// Nothing here depends on when a step happens or what else is in it: a request gives the same tokens alone, in any
/// batch, in pieces of any size, when it loses its place in the cache and starts anew, and with any draft or none.
pub struct Engine<'t, D: Device, E: Element> {
    device: D,
    decoder: Decoder<D>,
    cache: Cache<D, E>,
    memory: Memory<D, E>,
    draft: Option<Draft<D, E>>,
    tokenizer: &'t Tokenizer,
    scheduler: Scheduler,
    pace: Pace,
    elsewhere: Arc<AtomicUsize>,
    capacity: Capacity,
    requests: BTreeMap<u64, Running<'t>>,
    /// Requests so far.
    count: u64,
    /// Ids that may be chosen: a model may have more rows than the tokenizer has tokens.
    known: usize,
    ends: Ends,
    scratches: Scratches,
    /// Tokens that the draft guessed so far, and how many of them were right.
    drafted: u64,
    accepted: u64,
    /// Events that are not handed out yet.
    events: Vec<(u64, Event)>,
}

/// What is wanted of the logits of a row.
struct Wanted {
    row: u32,
    key: Key,
    what: What,
}

/// How many of the first of what is wanted are chosen together, at most so many: what is chosen behind a guess depends on what was
/// chosen in its place, so that a text's guesses are not parted. They are fewer than that.
fn together(wanted: &[Wanted], most: usize) -> usize {
    let count = wanted.len().min(most);
    let joined = |at: usize| match (&wanted[at - 1].what, wanted.get(at).map(|next| &next.what)) {
        (What::Next { work, .. }, Some(What::Next { work: next, .. })) => work == next,
        _ => false,
    };
    (1..=count).rev().find(|at| !joined(*at)).unwrap_or(count)
}

enum What {
    /// The log-probability of this token of the prompt, which follows it.
    Echo(usize),
    /// What follows it, which is behind so many of the guesses of this work of the plan.
    Next { work: usize, guessed: usize },
}

impl<'t, D: Device, E: Element> Engine<'t, D, E> {
    /// Sets up an engine; all its memory is allocated here. A `draft` is a smaller model that knows the same tokens by the
    /// same ids, perhaps not all of them; it guesses ahead, which changes no text.
    ///
    /// # Errors
    /// When the options allow nothing, or memory is short.
    pub fn new(
        device: D,
        decoder: Decoder<D>,
        draft: Option<Decoder<D>>,
        tokenizer: &'t Tokenizer,
        options: Options,
    ) -> Result<Self> {
        let config = decoder.config();
        let pages = options.cache_tokens.div_ceil(PAGE);
        let scheduler = Scheduler::new(options.limits, pages)?;
        let memory = Memory::new(&device, config, options.limits.tokens, HEAD_ROWS)?;
        let mut cache = Cache::new(&device, config, pages)?;
        let capacity = Capacity {
            vocab: config.vocab,
            positions: config.positions,
            pages,
            sequences: options.limits.sequences,
            step_tokens: options.limits.tokens,
            width: config.embedding_width,
        };
        let known = tokenizer.vocab_size().min(config.vocab);
        let mut draft = match draft {
            Some(draft) => {
                let sizes =
                    draft::Sizes { pages, rows: options.limits.tokens, known, ahead: options.draft_tokens };
                Some(Draft::new(&device, draft, &decoder, sizes)?)
            }
            None => None,
        };
        if options.reserve {
            cache.reserve(&device);
            if let Some(draft) = &mut draft {
                draft.reserve(&device);
            }
        }
        Ok(Engine {
            device,
            decoder,
            cache,
            memory,
            draft,
            tokenizer,
            scheduler,
            pace: Pace::new(options.pause),
            elsewhere: Arc::default(),
            capacity,
            requests: BTreeMap::new(),
            count: 0,
            known,
            ends: options.ends,
            scratches: Scratches::default(),
            drafted: 0,
            accepted: 0,
            events: Vec::new(),
        })
    }

    /// What it runs on.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// What it can do for one request.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Where whoever keeps prompts back for it tells how many they are: the more wait, the more of a step reads prompts.
    pub fn elsewhere(&self) -> &Arc<AtomicUsize> {
        &self.elsewhere
    }

    /// How busy it is.
    pub fn load(&self) -> Load {
        let (drafted_tokens, accepted_tokens) = (self.drafted, self.accepted);
        Load { drafted_tokens, accepted_tokens, ..self.scheduler.load() }
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.events.is_empty()
    }

    /// Takes a request, and returns its number.
    ///
    /// # Errors
    /// When something is wrong with it.
    pub fn submit(&mut self, request: Request) -> Result<u64, Refusal> {
        request.check(&self.capacity)?;
        let number = self.count;
        self.count += 1;
        let mut running = Running::new(request, self.capacity.positions, self.tokenizer, self.ends);
        // Tokens behind which something is wanted are computed, even if an earlier text has them.
        let pooled = running.pool.as_ref().and_then(Pool::next);
        let reusable = match running.next_echo().map(|at| at.saturating_sub(1)).or(pooled) {
            Some(at) => at,
            None => usize::MAX,
        };
        self.events.extend(running.take_echo().map(|event| (number, event)));
        let tokens = running.to_read().to_vec();
        if running.limit == 0 && running.pool.is_none() {
            running.begin();
        }
        if !tokens.is_empty() {
            let scope = running.parameters().scope;
            self.scheduler.add(Key { request: number, part: 0 }, tokens, scope, reusable);
        }
        self.requests.insert(number, running);
        self.finish_if_done(number);
        Ok(number)
    }

    /// Ends a request; nothing more is heard of it.
    pub fn cancel(&mut self, number: u64) {
        self.scheduler.remove_request(number);
        self.requests.remove(&number);
        self.events.retain(|(n, _)| *n != number);
    }

    /// Computes one step, and returns what has come of it for which request.
    ///
    /// # Errors
    /// When the device fails. No request can go on then.
    pub fn step(&mut self) -> Result<Vec<(u64, Event)>> {
        let start = Instant::now();
        let mut plan =
            self.scheduler.plan(self.elsewhere.load(Ordering::Relaxed), |texts| self.pace.beside(texts));
        if !plan.work.is_empty() {
            self.cache.copy(&self.device, &plan.copies);
            let guesses = self.guess(&mut plan)?;
            self.compute(&plan, &guesses)?;
            self.scheduler.done(&plan);
            self.pool(&plan, &guesses)?;
            let wanted = self.wanted(&plan, &guesses);
            let mut left = wanted.as_slice();
            while !left.is_empty() {
                let (rows, later) = left.split_at(together(left, self.memory.head_rows()));
                self.choose(rows, &guesses)?;
                left = later;
            }
            // A text that is generated has one row, and its guesses.
            let prompts = plan.work.iter().map(|work| work.count).filter(|count| *count > 1).sum();
            let others =
                plan.work.iter().zip(&guesses).map(|(w, g)| usize::from(w.count == 1) + g.len()).sum();
            self.pace.took(prompts, others, start.elapsed());
        }
        Ok(std::mem::take(&mut self.events))
    }

    /// What the draft guesses behind each work of a plan.
    fn guess(&mut self, plan: &mut Plan) -> Result<Vec<Vec<u32>>> {
        let mut guesses = vec![Vec::new(); plan.work.len()];
        let Some(draft) = &mut self.draft else { return Ok(guesses) };
        let requests = &self.requests;
        let guessable = |key: Key| requests.get(&key.request)?.guessable(key.part);
        let rows = plan.work.iter().map(|work| work.count).sum();
        let texts = plan.work.iter().filter(|work| guessable(work.key).is_some()).count();
        self.scheduler.look_ahead(plan, |key, sequence| match guessable(key) {
            Some((useful, acceptance)) => {
                draft.worth(sequence.tokens().len(), useful, acceptance, rows, texts)
            }
            None => 0,
        });
        draft.copy(&self.device, &plan.copies);
        let (mut ahead, mut texts) = (Vec::new(), Vec::new());
        for (number, work) in plan.work.iter().enumerate() {
            let sequence = self.scheduler.sequence(work.key).context("a sequence is gone")?;
            draft.overwritten(sequence.pages(), work.past);
            let Some(running) = requests.get(&work.key.request).filter(|_| work.ahead > 0) else { continue };
            let Some(place) = running.place(work.key.part, &[]) else { continue };
            let (tokens, pages, parameters) = (sequence.tokens(), sequence.pages(), running.parameters());
            ahead.push(number);
            texts.push(draft::Text { tokens, pages, ahead: work.ahead, parameters, place });
        }
        for (number, made) in ahead.into_iter().zip(draft.guess(&self.device, &self.scratches, &texts)?) {
            guesses[number] = made;
        }
        self.drafted += guesses.iter().map(|guesses| guesses.len() as u64).sum::<u64>();
        for (work, guesses) in plan.work.iter().zip(&guesses) {
            if let Some(running) = self.requests.get_mut(&work.key.request) {
                running.guessed(work.key.part, guesses.len());
            }
        }
        Ok(guesses)
    }

    fn compute(&mut self, plan: &Plan, guesses: &[Vec<u32>]) -> Result<()> {
        let (mut tokens, mut segments) = (Vec::new(), Vec::new());
        for (work, guesses) in plan.work.iter().zip(guesses) {
            let sequence = self.scheduler.sequence(work.key).context("a sequence is gone")?;
            tokens.extend_from_slice(&sequence.tokens()[work.past..work.past + work.count]);
            tokens.extend_from_slice(guesses);
            let rows = work.count + guesses.len();
            segments.push(Segment { rows, past: work.past, pages: sequence.pages() });
        }
        self.decoder.forward(&self.device, &tokens, &segments, &mut self.cache, &mut self.memory)
    }

    /// Adds hidden states to the vectors that are made of prompts.
    fn pool(&mut self, plan: &Plan, guesses: &[Vec<u32>]) -> Result<()> {
        let mut first = 0;
        for (work, guesses) in plan.work.iter().zip(guesses) {
            let end = work.past + work.count;
            let row = |position: usize| (first + position - work.past) as u32;
            let running = self.requests.get_mut(&work.key.request);
            if let Some(pool) = running.and_then(|running| running.pool.as_mut()) {
                while let Some(next) = pool.next().filter(|next| (work.past..end).contains(next)) {
                    let rows: Vec<u32> = (next..end.min(next + self.memory.head_rows())).map(row).collect();
                    let hidden = self.decoder.hidden(&self.device, &rows, &mut self.memory)?;
                    pool.add(&hidden, hidden.len() / rows.len());
                }
                self.finish_if_done(work.key.request);
            }
            first += work.count + guesses.len();
        }
        Ok(())
    }

    /// What is wanted of which rows of a step. Texts behind prompts that are read begin here.
    fn wanted(&mut self, plan: &Plan, guesses: &[Vec<u32>]) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        let mut first = 0;
        for (number, work) in plan.work.iter().enumerate() {
            let (key, end) = (work.key, work.past + work.count);
            let row = |position: usize| (first + position - work.past) as u32;
            if let Some(running) = self.requests.get_mut(&key.request) {
                if let Some(next) = running.next_echo() {
                    let rows = next.max(work.past + 1)..(end + 1).min(running.request.prompt.len());
                    wanted.extend(rows.map(|at| Wanted { row: row(at - 1), key, what: What::Echo(at) }));
                }
                let all = self.scheduler.sequence(key).map_or(0, |s| s.tokens().len());
                if end == all && running.limit > 0 {
                    let next = |guessed| What::Next { work: number, guessed };
                    let places = 0..=guesses[number].len();
                    wanted.extend(places.map(|i| Wanted { row: row(end - 1 + i), key, what: next(i) }));
                    if let Some(others) = running.begin_if_read() {
                        self.events.push((key.request, Event::Read));
                        for part in others {
                            let key = Key { part, ..key };
                            self.scheduler.fork(work.key, key);
                            wanted.push(Wanted { row: row(end - 1), key, what: next(0) });
                        }
                    }
                }
            }
            first += work.count + guesses[number].len();
        }
        wanted
    }

    /// Does with some rows' logits what is wanted.
    fn choose(&mut self, wanted: &[Wanted], guesses: &[Vec<u32>]) -> Result<()> {
        let mut rows: Vec<u32> = Vec::new();
        let mut places = Vec::new();
        for w in wanted {
            // Texts that begin behind the same prompt look at the same row.
            if rows.last() != Some(&w.row) {
                rows.push(w.row);
            }
            places.push(rows.len() - 1);
        }
        let logits = self.decoder.head(&self.device, &rows, &mut self.memory)?;
        for (w, row) in wanted.iter().zip(&places) {
            if !logits.log_sum_exp(*row).is_finite() && self.requests.remove(&w.key.request).is_some() {
                self.scheduler.remove_request(w.key.request);
                self.events.push((w.key.request, Event::Failed(NO_NUMBERS.into())));
            }
        }
        let chooser = Chooser { logits, known: self.known, scratches: &self.scratches };
        let requests = &self.requests;
        let (mut picked, mut next, mut asked) = (vec![None; wanted.len()], Vec::new(), Vec::new());
        for (i, Wanted { key, what, .. }) in wanted.iter().enumerate() {
            if let What::Next { work, guessed } = what
                && let Some(running) = requests.get(&key.request)
                && let Some(place) = running.place(key.part, &guesses[*work][..*guessed])
            {
                next.push(i);
                asked.push(Asked { row: places[i], parameters: running.parameters(), place });
            }
        }
        for (i, id) in next.into_iter().zip(chooser.pick(&self.device, &asked)) {
            picked[i] = Some(id);
        }
        let found = on_all_threads(&self.device, wanted.len(), |i| {
            let Wanted { key, what, .. } = &wanted[i];
            let Some(running) = requests.get(&key.request) else { return Vec::new() };
            find(&chooser, places[i], running, what, picked[i])
        });
        for (Wanted { key, what, .. }, found) in wanted.iter().zip(found) {
            let Some(running) = self.requests.get_mut(&key.request) else { continue };
            let mut events = Vec::new();
            match what {
                What::Echo(_) => {
                    found.into_iter().for_each(|token| running.echo(token));
                    events.extend(running.take_echo());
                }
                What::Next { work, guessed } => {
                    let before = running.usage.accepted;
                    go_on(*key, running, found, &guesses[*work], *guessed, &mut self.scheduler, &mut events);
                    self.accepted += (running.usage.accepted - before) as u64;
                }
            }
            self.events.extend(events.into_iter().map(|event| (key.request, event)));
        }
        for w in wanted {
            self.finish_if_done(w.key.request);
        }
        Ok(())
    }

    fn finish_if_done(&mut self, number: u64) {
        let Some(running) = self.requests.get_mut(&number) else { return };
        if running.limit == 0 && running.next_echo().is_some() && !running.to_read().is_empty() {
            return;
        }
        if let Some(events) = running.finish() {
            self.events.extend(events.into_iter().map(|event| (number, event)));
            self.scheduler.remove_request(number);
            self.requests.remove(&number);
        }
    }
}

/// Why a request fails whose logits are infinite or no numbers.
const NO_NUMBERS: &str = "the model's logits are no numbers: a weight is damaged, or sums overflow. \
                          `ferropt checkpoint verify` names weights that are no numbers";

/// The tokens that are wanted of a row: one, which is `picked` already if it is not the prompt's, or behind a text of a search the
/// likeliest.
fn find<D: Device>(
    chooser: &Chooser<'_, D>,
    row: usize,
    running: &Running<'_>,
    what: &What,
    picked: Option<u32>,
) -> Vec<Token> {
    let p = running.parameters();
    match (what, &running.texts) {
        (What::Echo(at), _) => vec![chooser.token(row, running.request.prompt[*at], true, p.log_probs)],
        (_, Texts::Beams(beams)) => {
            chooser.likeliest(row, beams.search.candidates(), running.left_out(), p.log_probs)
        }
        (What::Next { .. }, _) => {
            picked.map(|id| chooser.token(row, id, running.compares(), p.log_probs)).into_iter().collect()
        }
    }
}

/// Lets a text go on with what was found behind `guessed` of its guesses.
fn go_on(
    key: Key,
    running: &mut Running<'_>,
    found: Vec<Token>,
    guesses: &[u32],
    guessed: usize,
    scheduler: &mut Scheduler,
    events: &mut Vec<Event>,
) {
    if let Texts::Beams(_) = running.texts {
        let at = |part: u64| Key { part, ..key };
        let Some(moves) = running.extend(key.part, found) else { return };
        moves.forks.iter().for_each(|(from, to)| scheduler.fork(at(*from), at(*to)));
        moves.tokens.iter().for_each(|(part, id)| scheduler.push(at(*part), *id));
        moves.ends.iter().for_each(|part| scheduler.remove(at(*part)));
        return;
    }
    // Behind a guess that was wrong, or a text that has ended, there is nothing.
    if guessed > 0 && scheduler.sequence(key).is_none_or(|s| s.pending() > 0) {
        return;
    }
    for token in found {
        let id = token.id;
        let right = guesses.get(guessed).map(|guess| *guess == id);
        right.into_iter().for_each(|right| running.checked(key.part, right));
        match (running.push(key.part as usize, token, events), right) {
            (true, Some(true)) => scheduler.accept(key, id),
            (true, _) => scheduler.push(key, id),
            (false, _) => scheduler.remove(key),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_of_a_text_are_chosen_together() {
        let key = Key { request: 1, part: 0 };
        let echo = |at: usize| Wanted { row: at as u32, key, what: What::Echo(at) };
        let next = |work: usize, guesses: usize| {
            (0..=guesses).map(move |guessed| Wanted { row: 0, key, what: What::Next { work, guessed } })
        };
        let wanted: Vec<Wanted> =
            (1..6).map(echo).chain(next(1, 2)).chain(next(2, 0)).chain(next(3, 3)).collect();
        let cut = |most: usize| {
            let (mut parts, mut left) = (Vec::new(), wanted.as_slice());
            while !left.is_empty() {
                parts.push(together(left, most));
                left = &left[parts[parts.len() - 1]..];
            }
            parts
        };
        assert_eq!(cut(4), [4, 4, 1, 4]);
        assert_eq!(cut(7), [5, 4, 4]);
        assert_eq!(cut(100), [13]);
    }
}
