//! Steps: plan, compute, choose, tell.

use crate::parameters::{Capacity, Refusal, Request};
use crate::request::{Event, Running, Texts};
use crate::sampler::{Place, Sampler, takes_largest, top};
use crate::scheduler::{Key, Limits, Load, Plan, Scheduler};
use crate::text::Token;
use anyhow::{Context, Result};
use ferropt_data::{EOS, Tokenizer};
use ferropt_device::{Device, Element, PAGE, Segment};
use ferropt_model::{Cache, Decoder, Logits, Memory};
use std::collections::BTreeMap;

/// How an engine is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// What a step may do at most.
    pub limits: Limits,
    /// Tokens whose keys and values there is room for, in all sequences together; rounded up to whole pages.
    pub cache_tokens: usize,
}

impl Options {
    /// For `sequences` texts at a time, each of `longest` tokens at most.
    pub fn new(sequences: usize, longest: usize) -> Options {
        let limits = Limits { tokens: TOKENS.max(sequences), sequences, reuse: true };
        // A page more for each: while it is copied, a page that two texts have in common is there twice.
        Options { limits, cache_tokens: sequences * (longest.next_multiple_of(PAGE) + PAGE) }
    }
}

/// Tokens of a step: enough for products to be limited by arithmetic, few enough that those who generate hardly wait.
const TOKENS: usize = 512;
/// Rows whose logits are computed at a time.
const HEAD_ROWS: usize = 128;

/// A model at work on many requests.
///
/// Nothing here depends on when a step happens or what else is in it: a request gives the same tokens alone, in any
/// batch, in pieces of any size, and when it loses its place in the cache and starts anew.
pub struct Engine<'t, D: Device, E: Element> {
    device: D,
    decoder: Decoder<D>,
    cache: Cache<D, E>,
    memory: Memory<D, E>,
    tokenizer: &'t Tokenizer,
    scheduler: Scheduler,
    capacity: Capacity,
    requests: BTreeMap<u64, Running<'t>>,
    /// Requests so far.
    count: u64,
    /// Ids that may be chosen: a model may have more rows than the tokenizer has tokens.
    known: usize,
    sampler: Sampler,
    /// Logits of one row.
    logits: Vec<f32>,
    /// Events that are not handed out yet.
    events: Vec<(u64, Event)>,
}

/// A row whose logits are wanted.
struct Wanted {
    row: u32,
    key: Key,
    /// The token of the prompt that follows it, or else what follows is to be chosen.
    echo: Option<usize>,
}

impl<'t, D: Device, E: Element> Engine<'t, D, E> {
    /// Sets up an engine; all its memory is allocated here.
    ///
    /// # Errors
    /// When the options allow nothing, or memory is short.
    pub fn new(device: D, decoder: Decoder<D>, tokenizer: &'t Tokenizer, options: Options) -> Result<Self> {
        let config = decoder.config();
        let pages = options.cache_tokens.div_ceil(PAGE);
        let scheduler = Scheduler::new(options.limits, pages)?;
        let memory = Memory::new(&device, config, options.limits.tokens, HEAD_ROWS)?;
        let cache = Cache::new(&device, config, pages)?;
        let capacity = Capacity {
            vocab: config.vocab,
            positions: config.positions,
            pages,
            sequences: options.limits.sequences,
        };
        let known = tokenizer.vocab_size().min(config.vocab);
        Ok(Engine {
            device,
            decoder,
            cache,
            memory,
            tokenizer,
            scheduler,
            capacity,
            requests: BTreeMap::new(),
            count: 0,
            known,
            sampler: Sampler::default(),
            logits: Vec::new(),
            events: Vec::new(),
        })
    }

    /// What it can do for one request.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// How busy it is.
    pub fn load(&self) -> Load {
        self.scheduler.load()
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
        let mut running = Running::new(request, self.capacity.positions, self.tokenizer);
        // Tokens behind which something is wanted are computed, even if an earlier text has them.
        let reusable = match running.next_echo() {
            Some(at) => at.saturating_sub(1),
            None => usize::MAX,
        };
        self.events.extend(running.take_echo().map(|event| (number, event)));
        let tokens = running.to_read().to_vec();
        if running.limit == 0 {
            running.begin();
        }
        if !tokens.is_empty() {
            self.scheduler.add(Key { request: number, part: 0 }, tokens, reusable);
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
        let plan = self.scheduler.plan();
        if !plan.work.is_empty() {
            self.cache.copy(&self.device, &plan.copies);
            self.compute(&plan)?;
            self.scheduler.done(&plan);
            let wanted = self.wanted(&plan);
            for rows in wanted.chunks(self.memory.head_rows()) {
                self.choose(rows)?;
            }
        }
        Ok(std::mem::take(&mut self.events))
    }

    fn compute(&mut self, plan: &Plan) -> Result<()> {
        let (mut tokens, mut segments) = (Vec::new(), Vec::new());
        for work in &plan.work {
            let sequence = self.scheduler.sequence(work.key).context("a sequence is gone")?;
            tokens.extend_from_slice(&sequence.tokens()[work.past..work.past + work.count]);
            segments.push(Segment { rows: work.count, past: work.past, pages: sequence.pages() });
        }
        self.decoder.forward(&self.device, &tokens, &segments, &mut self.cache, &mut self.memory)
    }

    /// The rows of a step whose logits somebody wants.
    fn wanted(&self, plan: &Plan) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        let mut first = 0;
        for work in &plan.work {
            let (key, end) = (work.key, work.past + work.count);
            let row = |position: usize| (first + position - work.past) as u32;
            if let Some(running) = self.requests.get(&key.request) {
                if let Some(next) = running.next_echo() {
                    let rows = next.max(work.past + 1)..(end + 1).min(running.request.prompt.len());
                    wanted.extend(rows.map(|at| Wanted { row: row(at - 1), key, echo: Some(at) }));
                }
                let all = self.scheduler.sequence(key).map_or(0, |s| s.tokens().len());
                if end == all && running.limit > 0 {
                    wanted.push(Wanted { row: row(end - 1), key, echo: None });
                }
            }
            first += work.count;
        }
        wanted
    }

    /// Does with some rows' logits what is wanted.
    fn choose(&mut self, wanted: &[Wanted]) -> Result<()> {
        let rows: Vec<u32> = wanted.iter().map(|w| w.row).collect();
        let logits = self.decoder.head(&self.device, &rows, &mut self.memory)?;
        let mut chooser = Chooser {
            logits,
            row: 0,
            known: self.known,
            sampler: &mut self.sampler,
            scratch: &mut self.logits,
        };
        for (row, Wanted { key, echo, .. }) in wanted.iter().enumerate() {
            chooser.row = row;
            let Some(running) = self.requests.get_mut(&key.request) else { continue };
            let mut events = Vec::new();
            match echo {
                Some(at) => {
                    let (id, count) = (running.request.prompt[*at], running.parameters().log_probs);
                    running.echo(chooser.token(id, true, count));
                    events.extend(running.take_echo());
                }
                None => go_on(*key, running, &mut chooser, &mut self.scheduler, &mut events),
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

/// Chooses what follows a sequence, in all texts that are at this place.
fn go_on<D: Device>(
    key: Key,
    running: &mut Running<'_>,
    chooser: &mut Chooser<'_, D>,
    scheduler: &mut Scheduler,
    events: &mut Vec<Event>,
) {
    let begins = matches!(running.texts, Texts::None);
    if begins {
        running.begin();
    }
    let at = |part: u64| Key { part, ..key };
    match &running.texts {
        Texts::None => {}
        Texts::Sampled(choices) => {
            let numbers = if begins { 0..choices.len() } else { key.part as usize..key.part as usize + 1 };
            let mut next = Vec::new();
            for number in numbers {
                let Texts::Sampled(choices) = &running.texts else { continue };
                let place = Place {
                    prompt: &running.request.prompt,
                    generated: &choices[number].generated,
                    guessed: &[],
                    choice: number,
                };
                let p = running.parameters();
                let id = chooser.pick(p, place);
                let token = chooser.token(id, running.compares(), p.log_probs);
                if running.push(number, token, events) {
                    next.push((number as u64, id));
                }
            }
            // All that begin here have the prompt in common, also when the first of them has ended.
            next.iter()
                .filter(|(part, _)| *part != key.part)
                .for_each(|(part, _)| scheduler.fork(key, at(*part)));
            next.iter().for_each(|(part, id)| scheduler.push(at(*part), *id));
            if !next.iter().any(|(part, _)| *part == key.part) {
                scheduler.remove(key);
            }
        }
        Texts::Beams(beams) => {
            let count = beams.search.candidates();
            let likeliest = chooser.likeliest(count, running.end_allowed(), running.parameters().log_probs);
            let Some(moves) = running.extend(key.part, likeliest) else { return };
            moves.forks.iter().for_each(|(from, to)| scheduler.fork(at(*from), at(*to)));
            moves.tokens.iter().for_each(|(part, id)| scheduler.push(at(*part), *id));
            moves.ends.iter().for_each(|part| scheduler.remove(at(*part)));
        }
    }
}

/// Reads and chooses from the logits of one row.
struct Chooser<'a, D: Device> {
    logits: Logits<'a, D>,
    row: usize,
    known: usize,
    sampler: &'a mut Sampler,
    scratch: &'a mut Vec<f32>,
}

impl<D: Device> Chooser<'_, D> {
    fn pick(&mut self, p: &crate::Parameters, place: Place<'_>) -> u32 {
        let largest = self.logits.largest(self.row);
        if takes_largest(p, place.generated.len()) && (largest as usize) < self.known {
            return largest;
        }
        self.logits.read(self.row, self.scratch);
        self.sampler.pick(p, place, &mut self.scratch[..self.known])
    }

    /// A token with its log-probability, if `needed` or asked for, and the likeliest ones beside it.
    fn token(&mut self, id: u32, needed: bool, log_probs: Option<usize>) -> Token {
        let log_prob = (needed || log_probs.is_some()).then(|| self.logits.log_prob(self.row, id));
        Token { id, log_prob, top: self.top(log_probs.unwrap_or(0)) }
    }

    fn top(&mut self, count: usize) -> Vec<(u32, f32)> {
        if count <= 1 {
            let largest = self.logits.largest(self.row);
            return (0..count).map(|_| (largest, self.logits.log_prob(self.row, largest))).collect();
        }
        self.logits.read(self.row, self.scratch);
        let lse = self.logits.log_sum_exp(self.row);
        top(self.scratch, count).into_iter().map(|(id, logit)| (id, logit - lse)).collect()
    }

    /// The likeliest tokens that may be chosen.
    fn likeliest(&mut self, count: usize, end_allowed: bool, log_probs: Option<usize>) -> Vec<Token> {
        let beside = self.top(log_probs.unwrap_or(0));
        self.logits.read(self.row, self.scratch);
        let lse = self.logits.log_sum_exp(self.row);
        let known = &mut self.scratch[..self.known];
        if !end_allowed {
            known[EOS as usize] = f32::NEG_INFINITY;
        }
        let likeliest = top(known, count).into_iter().filter(|(_, logit)| *logit > f32::NEG_INFINITY);
        likeliest.map(|(id, logit)| Token { id, log_prob: Some(logit - lse), top: beside.clone() }).collect()
    }
}
