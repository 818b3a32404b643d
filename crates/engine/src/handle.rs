//! An engine on a thread of its own.

use crate::engine::{Engine, Options};
use crate::event::{Event, Finish, Usage};
use crate::parameters::{Capacity, Refusal, Request};
use crate::scheduler::Load;
use crate::text::{Piece, Token};
use anyhow::{Context, Result, bail};
use ferropt_data::Tokenizer;
use ferropt_device::{Device, Element, Failure, failures};
use ferropt_model::Decoder;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Receives the events of one request; false ends the request.
type Sink = Box<dyn FnMut(Event) -> bool + Send>;

enum Command {
    Submit(u64, Box<Request>, Sink),
    Cancel(u64),
    Stop,
}

/// Takes requests for an engine from any thread. When it is dropped, the engine ends with its current step.
pub struct Handle {
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
    capacity: Capacity,
    elsewhere: Arc<AtomicUsize>,
    count: AtomicU64,
    load: Arc<Mutex<Load>>,
    tokenizer: Arc<Tokenizer>,
}

impl Handle {
    /// Sets up an engine and starts its thread; see [`Engine::new`].
    ///
    /// # Errors
    /// When the options allow nothing, or memory is short.
    pub fn start<D: Device, E: Element>(
        device: D,
        decoder: Decoder<D>,
        draft: Option<Decoder<D>>,
        tokenizer: Arc<Tokenizer>,
        options: Options,
    ) -> Result<Handle> {
        let (commands, received) = channel();
        let (ready, is_ready) = channel();
        let load = Arc::new(Mutex::new(Load::default()));
        let (shared, own) = (load.clone(), tokenizer.clone());
        let work = move || {
            // The engine borrows the tokenizer, so it is made where it works.
            match failures(|| Engine::<D, E>::new(device, decoder, draft, &own, options)) {
                Ok(mut engine) => {
                    *shared.lock().unwrap_or_else(PoisonError::into_inner) = engine.load();
                    if ready.send(Ok((engine.capacity(), engine.elsewhere().clone()))).is_ok() {
                        serve(&mut engine, &received, &shared);
                    }
                }
                // Whoever waits for it is told; nobody else can be.
                Err(error) => drop(ready.send(Err(error))),
            }
        };
        let thread = std::thread::Builder::new().name("engine".into()).spawn(work);
        let thread = thread.context("cannot start the engine's thread")?;
        let (capacity, elsewhere) =
            is_ready.recv().context("the engine's thread ended while it was set up")??;
        let count = AtomicU64::new(0);
        Ok(Handle { commands, thread: Some(thread), capacity, elsewhere, count, load, tokenizer })
    }

    /// The tokenizer of its texts.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// What it can do for one request.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// See [`Engine::elsewhere`].
    pub fn elsewhere(&self) -> &Arc<AtomicUsize> {
        &self.elsewhere
    }

    /// Whether the engine's thread is gone, which a fault in it or of its device can bring about: requests fail from then on.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// How busy it was after its last step.
    pub fn load(&self) -> Load {
        *self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands over a request. Its events are given to `sink` on the engine's thread, which waits for it; when that returns
    /// false, the request is cancelled. Returns the number for [`Handle::cancel`].
    ///
    /// # Errors
    /// When something is wrong with the request.
    pub fn submit_to(
        &self,
        request: Request,
        sink: impl FnMut(Event) -> bool + Send + 'static,
    ) -> Result<u64, Refusal> {
        request.check(&self.capacity)?;
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let sink: Sink = Box::new(sink);
        if let Err(lost) = self.commands.send(Command::Submit(number, Box::new(request), sink))
            && let Command::Submit(_, _, mut sink) = lost.0
        {
            sink(Event::Failed(ENDED.into()));
        }
        Ok(number)
    }

    /// Ends a request; if it is complete already, nothing happens.
    pub fn cancel(&self, number: u64) {
        // An engine that has ended has no requests.
        let _ = self.commands.send(Command::Cancel(number));
    }

    /// Hands over a request whose events can be waited for.
    ///
    /// # Errors
    /// When something is wrong with the request.
    pub fn submit(&self, request: Request) -> Result<Events, Refusal> {
        let (sender, events) = channel();
        let number = self.submit_to(request, move |event| sender.send(event).is_ok())?;
        Ok(Events { events, commands: self.commands.clone(), number })
    }

    /// Computes a request and waits for all of it.
    ///
    /// # Errors
    /// When something is wrong with the request, or the engine fails.
    pub fn complete(&self, request: Request) -> Result<Completion> {
        self.submit(request)?.complete()
    }

    /// Computes many requests, `ahead` of them handed over at a time, and gives what comes of them to `each` in order.
    ///
    /// # Errors
    /// The first error of a request or of `each`, with what is still under way cancelled.
    pub fn complete_all(
        &self,
        requests: impl IntoIterator<Item = Result<Request>>,
        ahead: usize,
        mut each: impl FnMut(Completion) -> Result<()>,
    ) -> Result<()> {
        let mut requests = requests.into_iter();
        let mut under_way = VecDeque::new();
        loop {
            while under_way.len() < ahead.max(1)
                && let Some(request) = requests.next()
            {
                under_way.push_back(self.submit(request?)?);
            }
            let Some(first) = under_way.pop_front() else { return Ok(()) };
            each(first.complete()?)?;
        }
    }
}

const ENDED: &str = "the engine has ended";

impl Drop for Handle {
    fn drop(&mut self) {
        // An engine that has ended needs no telling.
        let _ = self.commands.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // If it panicked, everyone who waited has been told by the end of their events.
            let _ = thread.join();
        }
    }
}

/// Events of a request, in order. Dropping it cancels the request.
pub struct Events {
    events: Receiver<Event>,
    commands: Sender<Command>,
    number: u64,
}

impl Iterator for Events {
    type Item = Event;

    /// Waits for the next one; none after the last.
    fn next(&mut self) -> Option<Event> {
        self.events.recv().ok()
    }
}

impl Events {
    /// Waits for the next one, but not longer than so.
    ///
    /// # Errors
    /// When the time is over, or there are no more.
    pub fn next_within(&mut self, time: Duration) -> Result<Event, RecvTimeoutError> {
        self.events.recv_timeout(time)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // An engine that has ended has no requests.
        let _ = self.commands.send(Command::Cancel(self.number));
    }
}

/// Everything that came of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Completion {
    /// Tokens of the prompt, with `echo`.
    pub prompt: Vec<Token>,
    /// The texts.
    pub choices: Vec<Text>,
    /// The prompt as a vector, with `pooling`.
    pub embedding: Option<Vec<f32>>,
    /// Tokens computed.
    pub usage: Usage,
}

/// A complete text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Text {
    /// Without the prompt, and without the stop string that ended it.
    pub text: String,
    /// The tokens that begin in it.
    pub tokens: Vec<Token>,
    /// Why it ended; absent only until it has.
    pub finish: Option<Finish>,
}

impl Completion {
    /// Adds an event; returns whether it was the last.
    ///
    /// # Errors
    /// When the engine failed.
    pub fn add(&mut self, event: Event) -> Result<bool> {
        match event {
            Event::Prompt(tokens) => self.prompt = tokens,
            Event::Read => {}
            Event::Text { choice, piece: Piece { text, tokens } } => {
                let to = self.choice(choice);
                to.text += &text;
                to.tokens.extend(tokens);
            }
            Event::End { choice, finish } => self.choice(choice).finish = Some(finish),
            Event::Embedding(vector) => self.embedding = Some(vector),
            Event::Done(usage) => {
                self.usage = usage;
                return Ok(true);
            }
            Event::Failed(message) => bail!(message),
        }
        Ok(false)
    }

    fn choice(&mut self, number: usize) -> &mut Text {
        if self.choices.len() <= number {
            self.choices.resize_with(number + 1, Text::default);
        }
        &mut self.choices[number]
    }
}

impl Events {
    /// Waits for all of them.
    ///
    /// # Errors
    /// When the engine fails.
    pub fn complete(self) -> Result<Completion> {
        let mut completion = Completion::default();
        for event in self {
            if completion.add(event)? {
                return Ok(completion);
            }
        }
        bail!(ENDED)
    }
}

/// Steps until it is told to stop.
fn serve<D: Device, E: Element>(
    engine: &mut Engine<'_, D, E>,
    commands: &Receiver<Command>,
    load: &Mutex<Load>,
) {
    // By the engine's numbers: that of the handle, and where events go.
    let mut sinks: HashMap<u64, (u64, Sink)> = HashMap::new();
    loop {
        loop {
            let command = if engine.is_idle() {
                commands.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                commands.try_recv()
            };
            match command {
                Ok(Command::Submit(number, request, mut sink)) => match engine.submit(*request) {
                    Ok(own) => drop(sinks.insert(own, (number, sink))),
                    Err(refusal) => drop(sink(Event::Failed(refusal.message))),
                },
                Ok(Command::Cancel(number)) => {
                    if let Some(own) = sinks.iter().find(|(_, (n, _))| *n == number).map(|(own, _)| *own) {
                        engine.cancel(own);
                        sinks.remove(&own);
                    }
                }
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return,
                Err(TryRecvError::Empty) => break,
            }
            *load.lock().unwrap_or_else(PoisonError::into_inner) = engine.load();
        }
        match failures(|| engine.step()) {
            Ok(events) => {
                for (own, event) in events {
                    let Some((_, sink)) = sinks.get_mut(&own) else { continue };
                    let last = matches!(event, Event::Done(_) | Event::Failed(_));
                    let wanted = sink(event);
                    if last || !wanted {
                        engine.cancel(own);
                        sinks.remove(&own);
                    }
                }
            }
            Err(error) => {
                for (own, (_, mut sink)) in sinks.drain() {
                    engine.cancel(own);
                    sink(Event::Failed(format!("{error:#}")));
                }
                // A device fails for good. Whoever watches over this thread sees its end.
                if error.is::<Failure>() {
                    return;
                }
            }
        }
        *load.lock().unwrap_or_else(PoisonError::into_inner) = engine.load();
    }
}
