//! One request on its way: what was asked for, what has come of it, and what it still waits for.

use crate::adjust::end_allowed;
use crate::beam::{Ended, Search};
use crate::draft::ACCEPTANCE;
use crate::embed::Pool;
use crate::ends::Ends;
use crate::event::{Event, Finish, Usage};
use crate::parameters::{Parameters, Request};
use crate::sampler::Place;
use crate::text::{Output, Piece, Token};
use ferropt_data::Tokenizer;

/// A request in work.
pub(crate) struct Running<'t> {
    pub(crate) request: Request,
    tokenizer: &'t Tokenizer,
    ends: Ends,
    /// Tokens at most, and why a text ends there.
    pub(crate) limit: usize,
    full: Finish,
    /// Tokens of the prompt that were asked for and are known, until they are handed out, and how many there were.
    echoed: Vec<Token>,
    known: usize,
    pub(crate) texts: Texts<'t>,
    /// With `pooling`, instead of texts.
    pub(crate) pool: Option<Pool>,
    pub(crate) usage: Usage,
}

/// Texts behind the prompt.
pub(crate) enum Texts<'t> {
    /// Not before the prompt is read.
    None,
    /// Each on its own; number `c` is the sequence with part `c`.
    Sampled(Vec<Choice<'t>>),
    /// Beam search.
    Beams(Beams),
}

/// A text that is sampled.
pub(crate) struct Choice<'t> {
    output: Output<'t>,
    /// Its tokens.
    pub(crate) generated: Vec<u32>,
    /// Sum of log-probabilities and how many, that of the end included; if they decide what is given back.
    sum: (f64, usize),
    /// Share of guesses of its tokens that were right of late.
    acceptance: f32,
    /// What is kept until all texts can be compared.
    kept: Piece,
    pub(crate) finish: Option<Finish>,
}

/// The live texts of a search.
pub(crate) struct Beams {
    pub(crate) search: Search,
    /// Part of each one's sequence.
    pub(crate) parts: Vec<u64>,
    /// The likeliest tokens behind each, where they are known.
    likeliest: Vec<Option<Vec<Token>>>,
    next_part: u64,
}

/// What becomes of a search's sequences.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Moves {
    /// Sequences that are made from others, with their last token.
    pub(crate) forks: Vec<(u64, u64)>,
    /// The token that each goes on with.
    pub(crate) tokens: Vec<(u64, u32)>,
    /// Sequences that end.
    pub(crate) ends: Vec<u64>,
}

impl<'t> Running<'t> {
    pub(crate) fn new(request: Request, positions: usize, tokenizer: &'t Tokenizer, ends: Ends) -> Self {
        // The last token needs no position: nothing is computed from it.
        let room = positions + 1 - request.prompt.len();
        let (limit, full) = match request.parameters.max_tokens {
            Some(max) if max <= room => (max, Finish::MaxTokens),
            _ => (room, Finish::Positions),
        };
        let usage = Usage { prompt: request.prompt.len(), ..Usage::default() };
        let pool = request.parameters.pooling.map(|pooling| Pool::new(pooling, &request.prompt));
        let mut running = Running {
            request,
            tokenizer,
            ends,
            limit,
            full,
            echoed: Vec::new(),
            known: 0,
            texts: Texts::None,
            pool,
            usage,
        };
        running.echo_plainly();
        running
    }

    pub(crate) fn parameters(&self) -> &Parameters {
        &self.request.parameters
    }

    /// Tokens that are to be computed before the first one is chosen: without one to choose, the last needs no computing.
    pub(crate) fn to_read(&self) -> &[u32] {
        let prompt = &self.request.prompt;
        if self.pool.is_some() {
            return prompt;
        }
        let scored = self.limit > 0 || self.next_echo().is_some();
        match (self.limit, scored) {
            (0, false) => &[],
            (0, true) => &prompt[..prompt.len() - 1],
            _ => prompt,
        }
    }

    /// The token of the prompt whose log-probability is wanted next.
    pub(crate) fn next_echo(&self) -> Option<usize> {
        let at = self.parameters().echo? + self.known;
        (at < self.request.prompt.len()).then_some(at)
    }

    /// Notes what is known about the token of [`Running::next_echo`].
    pub(crate) fn echo(&mut self, token: Token) {
        self.echoed.push(token);
        self.known += 1;
    }

    /// Echo of what needs no computing: all without log-probabilities, else a first token, which follows nothing.
    fn echo_plainly(&mut self) {
        let Some(from) = self.parameters().echo else { return };
        let plain = match (self.parameters().log_probs, from) {
            (None, _) => &self.request.prompt[from..],
            (Some(_), 0) => &self.request.prompt[..1],
            _ => return,
        };
        self.echoed = plain.iter().map(|id| Token { id: *id, log_prob: None, top: Vec::new() }).collect();
        self.known = self.echoed.len();
    }

    /// The prompt's tokens, once all that were asked for are known.
    pub(crate) fn take_echo(&mut self) -> Option<Event> {
        let complete = self.parameters().echo.is_some() && self.next_echo().is_none();
        (complete && !self.echoed.is_empty()).then(|| Event::Prompt(std::mem::take(&mut self.echoed)))
    }

    /// Makes the texts that follow the prompt if that was read just now. Returns the numbers of those beside the first that
    /// go on behind the prompt at once; nothing if they were there.
    pub(crate) fn begin_if_read(&mut self) -> Option<std::ops::Range<u64>> {
        if !matches!(self.texts, Texts::None) {
            return None;
        }
        self.begin();
        match &self.texts {
            Texts::Sampled(choices) => Some(1..choices.len() as u64),
            _ => Some(1..1),
        }
    }

    /// Where the token of a sampled text is chosen that follows some guesses.
    pub(crate) fn place<'a>(&'a self, number: u64, guessed: &'a [u32]) -> Option<Place<'a>> {
        let Texts::Sampled(choices) = &self.texts else { return None };
        let (prompt, choice) = (&self.request.prompt, number as usize);
        Some(Place { prompt, generated: &choices.get(choice)?.generated, guessed, choice, ends: &self.ends })
    }

    /// Makes the texts that follow the prompt.
    pub(crate) fn begin(&mut self) {
        let p = self.parameters();
        self.texts = match p.beams.filter(|_| self.limit > 0) {
            Some(width) => {
                let search = Search::new(width, p.n, self.limit, p.length_penalty as f64, self.ends);
                Texts::Beams(Beams { search, parts: vec![0], likeliest: vec![None], next_part: 1 })
            }
            None => {
                let finish = (self.limit == 0).then_some(self.full);
                let choice = |_| Choice {
                    output: Output::new(self.tokenizer, &p.stop),
                    generated: Vec::new(),
                    sum: (0.0, 0),
                    acceptance: ACCEPTANCE,
                    kept: Piece::default(),
                    finish,
                };
                let texts = if self.limit > 0 { p.computed() } else { p.n };
                Texts::Sampled((0..texts).map(choice).collect())
            }
        };
    }

    /// Whether texts are compared before they are given back.
    pub(crate) fn compares(&self) -> bool {
        self.parameters().beams.is_some() || self.parameters().computed() > self.parameters().n
    }

    /// Whether tokens of a text may be guessed: how many that are of use beside the one that is sure to come, and the share of
    /// guesses that were right of late.
    pub(crate) fn guessable(&self, number: u64) -> Option<(usize, f32)> {
        let Texts::Sampled(choices) = &self.texts else { return None };
        let choice = choices.get(number as usize)?;
        Some((self.limit.saturating_sub(choice.generated.len() + 1), choice.acceptance))
    }

    /// Notes that tokens of a text were guessed.
    pub(crate) fn guessed(&mut self, number: u64, count: usize) {
        self.usage.drafted += count;
        if let (0, Texts::Sampled(choices)) = (count, &mut self.texts) {
            // What was not worth guessing is tried again some time later.
            let acceptance = &mut choices[number as usize].acceptance;
            *acceptance += 0.01 * (ACCEPTANCE - *acceptance);
        }
    }

    /// Notes whether a guess of a text's next token was right.
    pub(crate) fn checked(&mut self, number: u64, right: bool) {
        self.usage.accepted += usize::from(right);
        if let Texts::Sampled(choices) = &mut self.texts {
            let acceptance = &mut choices[number as usize].acceptance;
            *acceptance += 0.1 * (f32::from(right) - *acceptance);
        }
    }

    /// Appends a token to a sampled text; returns whether it goes on.
    pub(crate) fn push(&mut self, number: usize, token: Token, events: &mut Vec<Event>) -> bool {
        let compares = self.compares();
        let (limit, full, ends) = (self.limit, self.full, self.ends);
        let p = &self.request.parameters;
        let (min, log_probs, ignore_end) = (p.min_tokens, p.log_probs.is_some(), p.ignore_end);
        let tell_end = log_probs && p.tell_end;
        let Texts::Sampled(choices) = &mut self.texts else { return false };
        let Some(choice) = choices.get_mut(number) else { return false };
        choice.sum.0 += token.log_prob.unwrap_or(0.0) as f64;
        choice.sum.1 += 1;
        let id = token.id;
        let token = Token { log_prob: token.log_prob.filter(|_| log_probs), ..token };
        let (mut pieces, mut end) = (Vec::new(), None);
        if ends.contains(id) && !ignore_end {
            choice.finish = Some(Finish::EndOfText);
            self.usage.generated += usize::from(tell_end);
            end = tell_end.then(|| Piece { text: String::new(), tokens: vec![token] });
        } else {
            choice.generated.push(id);
            self.usage.generated += 1;
            let (piece, stopped) = choice.output.push(token, choice.generated.len() > min);
            pieces.push(piece);
            choice.finish = match stopped {
                true => Some(Finish::Stop),
                false => (choice.generated.len() == limit).then_some(full),
            };
        }
        if choice.finish.is_some_and(|finish| finish != Finish::Stop) {
            pieces.push(choice.output.finish());
        }
        pieces.extend(end);
        for piece in pieces.into_iter().filter(|piece| !piece.is_empty()) {
            if compares {
                choice.kept.append(piece);
            } else {
                events.push(Event::Text { choice: number, piece });
            }
        }
        if let Some(finish) = choice.finish.filter(|_| !compares) {
            events.push(Event::End { choice: number, finish });
        }
        choice.finish.is_none()
    }

    /// Notes the likeliest tokens behind the text of a sequence; when those of all texts are known, the search goes on.
    pub(crate) fn extend(&mut self, part: u64, likeliest: Vec<Token>) -> Option<Moves> {
        let Texts::Beams(beams) = &mut self.texts else { return None };
        let place = beams.parts.iter().position(|p| *p == part)?;
        beams.likeliest[place] = Some(likeliest);
        if beams.likeliest.iter().any(Option::is_none) {
            return None;
        }
        let known: Vec<Vec<Token>> = beams.likeliest.drain(..).flatten().collect();
        let old = std::mem::take(&mut beams.parts);
        let (parents, longer) = beams.search.advance(&known);
        let mut moves = Moves::default();
        let mut used = vec![false; old.len()];
        for (parent, text) in parents.into_iter().zip(beams.search.live()) {
            let part = if std::mem::replace(&mut used[parent], true) {
                beams.next_part += 1;
                moves.forks.push((old[parent], beams.next_part - 1));
                beams.next_part - 1
            } else {
                old[parent]
            };
            beams.parts.push(part);
            moves.tokens.extend(text.tokens.last().map(|token| (part, token.id)));
        }
        moves.ends = old.into_iter().zip(used).filter(|(_, used)| !used).map(|(part, _)| part).collect();
        beams.likeliest = vec![None; beams.parts.len()];
        self.usage.generated += longer;
        Some(moves)
    }

    /// Ends that must not come next behind texts of a search.
    pub(crate) fn left_out(&self) -> Option<&Ends> {
        let Texts::Beams(beams) = &self.texts else { return None };
        let written = beams.search.live().first().map_or(0, |text| text.tokens.len());
        (!end_allowed(self.parameters(), written)).then_some(&self.ends)
    }

    /// The last events, once all is complete.
    pub(crate) fn finish(&mut self) -> Option<Vec<Event>> {
        if let Some(pool) = &self.pool {
            return Some(vec![Event::Embedding(pool.vector()?), Event::Done(self.usage)]);
        }
        let complete = match &self.texts {
            Texts::None => false,
            Texts::Sampled(choices) => choices.iter().all(|choice| choice.finish.is_some()),
            Texts::Beams(beams) => beams.search.live().is_empty(),
        };
        if !complete {
            return None;
        }
        let mut events = Vec::new();
        let mut give = |choice: usize, piece: Piece, finish: Finish| {
            if !piece.is_empty() {
                events.push(Event::Text { choice, piece });
            }
            events.push(Event::End { choice, finish });
        };
        let compares = self.compares();
        match std::mem::replace(&mut self.texts, Texts::None) {
            Texts::Beams(beams) => {
                for (number, Ended { text, complete, .. }) in beams.search.best().into_iter().enumerate() {
                    let finish = if complete { Finish::EndOfText } else { self.full };
                    give(number, self.written(text.tokens), finish);
                }
            }
            Texts::Sampled(mut choices) if compares => {
                // Stable, so that of equal ones the first is given back.
                let mean = |c: &Choice<'_>| c.sum.0 / c.sum.1.max(1) as f64;
                choices.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
                for (number, choice) in choices.into_iter().take(self.parameters().n).enumerate() {
                    give(number, choice.kept, choice.finish.unwrap_or(self.full));
                }
            }
            Texts::Sampled(choices) if self.limit == 0 => {
                (0..choices.len()).for_each(|number| give(number, Piece::default(), self.full));
            }
            _ => {}
        }
        events.push(Event::Done(self.usage));
        Some(events)
    }

    /// A complete text of some tokens.
    fn written(&self, tokens: Vec<Token>) -> Piece {
        let log_probs = self.parameters().log_probs.is_some();
        let mut output = Output::new(self.tokenizer, &[]);
        let mut text = Piece::default();
        for token in tokens {
            let token = Token { log_prob: token.log_prob.filter(|_| log_probs), ..token };
            text.append(output.push(token, false).0);
        }
        text.append(output.finish());
        text
    }
}
