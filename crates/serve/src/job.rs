//! The prompts of one request on their way: queue, engine, events; and their end whenever nobody waits for them.

use crate::app::Phase;
use crate::error::ApiError;
use crate::metrics::ModelMetrics;
use crate::models::Live;
use crate::outbox::{Kept, Reader};
use crate::queue::Work;
use crate::record::{Record, Tokens};
use crate::routes::Call;
use crate::turn::Turn;
use ferropt_engine::{Event, Request, Token};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

/// What comes of a prompt: its number in the request, and what. On the way it is kept for a client that may be slow.
type Message = Result<(usize, Event), ApiError>;
type OnTheWay = Result<(usize, Event, Kept), ApiError>;

/// Prompts being computed. Dropping it frees whatever they have, at once.
pub(crate) struct Job {
    live: Arc<Live>,
    events: mpsc::UnboundedReceiver<OnTheWay>,
    /// Prompts that are not complete.
    left: usize,
    submitted: Arc<Submitted>,
    feeder: AbortHandle,
    deadline: Instant,
    limit: Duration,
    phase: watch::Receiver<Phase>,
    record: Arc<Record>,
}

/// Numbers of what the engine has of a job; none is added after the end.
struct Submitted(Mutex<Option<Vec<u64>>>);

impl Job {
    /// Lines up for an engine.
    ///
    /// # Errors
    /// 429 when more would wait than may.
    pub(crate) fn start(call: &Call, live: Arc<Live>, requests: Vec<Request>) -> Result<Job, ApiError> {
        let (app, record) = (&call.app, &call.record);
        let works: Vec<Work> = requests.iter().map(work).collect();
        // Of many prompts some wait, and others follow as these have their turns.
        let (first, later) = works.split_at(works.len().min((app.limits.queue / 4).max(1)));
        let turns = live.gate.line_up(&call.client, first).map_err(|full| {
            let message = format!(
                "{} prompts are waiting for the model, and {} more of this client would be over the limit of {} and its share of \
                 them; try again later",
                full.waiting,
                first.len(),
                app.limits.queue
            );
            ApiError::too_many("queue_full", live.gate.seconds_to_wait(), message)
        })?;
        let (sender, events) = mpsc::unbounded_channel();
        let submitted = Arc::new(Submitted(Mutex::new(Some(Vec::new()))));
        let left = requests.len();
        let feeder = Feeder {
            live: live.clone(),
            sender,
            submitted: submitted.clone(),
            client: call.client.clone(),
            record: record.clone(),
            reader: call.reader.clone(),
            patience: app.limits.queue_time,
        };
        let feeder = tokio::spawn(feeder.feed(requests, turns, later.to_vec())).abort_handle();
        Ok(Job {
            live,
            events,
            left,
            submitted,
            feeder,
            deadline: record.started + app.limits.request_time,
            limit: app.limits.request_time,
            phase: app.phase.subscribe(),
            record: record.clone(),
        })
    }

    /// Waits for the next event; none after the end of the last prompt.
    ///
    /// # Errors
    /// When the engine fails, time is over, or the server ends. Nothing comes after an error.
    pub(crate) async fn next(&mut self) -> Option<Message> {
        if self.left == 0 {
            // Before the client sees the end.
            self.record.complete();
            return None;
        }
        let message = tokio::select! {
            biased;
            message = self.events.recv() => {
                let message = message.unwrap_or_else(|| Err(ApiError::internal("the engine has ended")));
                message.map(|(prompt, event, _)| (prompt, event))
            }
            _ = self.phase.wait_for(|phase| *phase == Phase::Ending) => {
                Err(ApiError::unavailable("server_stopped", Some(5), "the server was stopped before the text was complete"))
            }
            _ = tokio::time::sleep_until(self.deadline.into()) => {
                let seconds = self.limit.as_secs_f64();
                Err(ApiError::over(format!("the request was not complete after {seconds} s, which is the limit")))
            }
        };
        match &message {
            Ok((_, Event::Done(_))) => self.left -= 1,
            Ok((_, Event::Failed(why))) => {
                self.left = 0;
                return Some(Err(ApiError::internal(format!("the engine failed: {why}"))));
            }
            Ok(_) => {}
            Err(_) => self.left = 0,
        }
        Some(message)
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.feeder.abort();
        let numbers = self.submitted.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        for number in numbers.into_iter().flatten() {
            self.live.engine.cancel(number);
        }
        if self.left > 0 {
            self.live.metrics.cancelled.inc();
        } else {
            self.record.complete();
        }
    }
}

/// Hands prompts to the engine as their turns come.
struct Feeder {
    live: Arc<Live>,
    sender: mpsc::UnboundedSender<OnTheWay>,
    submitted: Arc<Submitted>,
    client: Arc<str>,
    record: Arc<Record>,
    reader: Arc<Reader>,
    patience: Duration,
}

impl Feeder {
    /// The first requests have `turns`; each of the `later` ones lines up when another one's turn has come.
    async fn feed(self, requests: Vec<Request>, turns: Vec<Turn>, later: Vec<Work>) {
        let (mut turns, mut later) = (VecDeque::from(turns), later.into_iter());
        for (index, request) in requests.into_iter().enumerate() {
            let Some(mut turn) = turns.pop_front() else { return };
            // Those behind the first wait for their own kind too, so only the request's time limits them.
            if index > 0 {
                turn.comes().await;
            } else if tokio::time::timeout(self.patience, turn.comes()).await.is_err() {
                let message = format!(
                    "the request waited {} s for its turn, which is the limit",
                    self.patience.as_secs_f64()
                );
                let error = ApiError::too_many("queue_time", self.live.gate.seconds_to_wait(), message);
                // If nobody is there, nobody has to be told.
                let _ = self.sender.send(Err(error));
                return;
            } else if let Some(seconds) = self.record.note_time("queue_seconds") {
                self.live.metrics.queued.observe(seconds);
            }
            turns.extend(self.live.gate.follow(&self.client, later.next().as_slice()));
            self.submit(index, request, turn);
        }
    }

    fn submit(&self, index: usize, request: Request, turn: Turn) {
        let mut submitted = self.submitted.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(numbers) = submitted.as_mut() else { return };
        let (sender, reader) = (self.sender.clone(), self.reader.clone());
        let mut meter = Meter::new(&self.live, &self.record, turn, &request);
        let sink = move |event: Event| {
            meter.count(&event);
            // It tells clients nothing.
            if event == Event::Read {
                return !sender.is_closed();
            }
            let kept = reader.keep(size(&event));
            sender.send(Ok((index, event, kept))).is_ok()
        };
        match self.live.engine.submit_to(request, sink) {
            Ok(number) => numbers.push(number),
            // It was checked before, but the engine has the last word.
            Err(refusal) => {
                let error = ApiError::field(refusal.parameter, refusal.message);
                let _ = self.sender.send(Err(error));
            }
        }
    }
}

/// Bytes of memory that an event has, nearly.
fn size(event: &Event) -> usize {
    let token = |token: &Token| size_of::<Token>() + size_of_val(token.top.as_slice());
    let more = match event {
        Event::Prompt(tokens) => tokens.iter().map(token).sum(),
        Event::Text { piece, .. } => piece.text.len() + piece.tokens.iter().map(token).sum::<usize>(),
        Event::Embedding(vector) => size_of_val(vector.as_slice()),
        Event::Read | Event::End { .. } | Event::Done(_) | Event::Failed(_) => 0,
    };
    size_of::<Event>() + more
}

/// Texts that the engine computes for a prompt.
pub(crate) fn texts(request: &Request) -> usize {
    request.parameters.beams.unwrap_or(1).max(request.parameters.computed())
}

/// What a prompt takes of the engine.
fn work(request: &Request) -> Work {
    Work { texts: texts(request), unread: request.prompt.len() }
}

/// Counts what the engine does for a prompt. It has the turn, which ends when the engine lets go of both.
struct Meter {
    turn: Turn,
    metrics: ModelMetrics,
    /// Not kept alive, so that it is not the engine's thread that ends a request.
    record: Weak<Record>,
    tokens: Arc<Tokens>,
    /// Texts that are not complete, each of which takes a place.
    texts: usize,
    /// Whether the texts are chosen among others, so that none is given out before all are complete: then the first token says
    /// nothing of how soon one comes.
    compared: bool,
    /// When each text had its last token.
    last: Vec<Option<Instant>>,
    charged: usize,
}

impl Meter {
    fn new(live: &Live, record: &Arc<Record>, turn: Turn, request: &Request) -> Meter {
        turn.charge(request.prompt.len());
        live.metrics.prompt_tokens.inc_by(request.prompt.len() as u64);
        record.tokens.prompt.fetch_add(request.prompt.len(), Ordering::Relaxed);
        Meter {
            turn,
            metrics: live.metrics.clone(),
            record: Arc::downgrade(record),
            tokens: record.tokens.clone(),
            texts: texts(request),
            compared: request.parameters.beams.is_some()
                || request.parameters.computed() > request.parameters.n,
            last: vec![None; request.parameters.n],
            charged: 0,
        }
    }

    fn count(&mut self, event: &Event) {
        match event {
            Event::Text { choice, piece } => {
                let (now, tokens) = (Instant::now(), piece.tokens.len());
                match self.last.get_mut(*choice).and_then(|last| last.replace(now)) {
                    Some(last) => (0..tokens).for_each(|_| {
                        self.metrics.between_tokens.observe((now - last).as_secs_f64() / tokens as f64);
                    }),
                    None if self.compared => {}
                    None => {
                        let record = self.record.upgrade();
                        if let Some(seconds) =
                            record.and_then(|record| record.note_time("first_token_seconds"))
                        {
                            self.metrics.first_token.observe(seconds);
                        }
                    }
                }
                self.charge(tokens);
            }
            // Texts that were not given back were computed, too.
            Event::Done(usage) => self.charge(usage.generated.saturating_sub(self.charged)),
            Event::End { .. } => {
                self.texts = self.texts.saturating_sub(1);
                self.turn.keep(self.texts);
            }
            Event::Read => self.turn.read(),
            Event::Prompt(_) | Event::Embedding(_) | Event::Failed(_) => {}
        }
    }

    fn charge(&mut self, tokens: usize) {
        self.charged += tokens;
        self.turn.charge(tokens);
        self.tokens.generated.fetch_add(tokens, Ordering::Relaxed);
        self.metrics.generated_tokens.inc_by(tokens as u64);
    }
}
