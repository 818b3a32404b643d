//! From events of the engine to an answer: whole, or as server-sent events.

use crate::error::{ApiError, long_response};
use crate::job::Job;
use crate::layout::Layout;
use crate::outbox::Reader;
use crate::record::Record;
use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, Response, header};
use ferropt_data::Tokenizer;
use ferropt_engine::{Event, Piece, Text, Token, Usage};
use futures_util::stream::unfold;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// Texts of a request on their way to the client.
pub(crate) struct Answer {
    pub(crate) job: Job,
    pub(crate) layout: Box<dyn Layout>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) record: Arc<Record>,
    /// Who takes them in.
    pub(crate) reader: Arc<Reader>,
    pub(crate) prompts: usize,
    /// Texts of each prompt.
    pub(crate) n: usize,
    /// Whether a stream tells at its end which tokens were used.
    pub(crate) include_usage: bool,
    /// A stream has a comment when nothing else was sent for so long.
    pub(crate) silence: Duration,
    /// Whether the log has the texts.
    pub(crate) log_texts: bool,
}

/// Tokens, and likely ones beside them, from which writing an answer down would make others wait.
const LONG: usize = 1 << 12;

impl Answer {
    /// Waits for all texts.
    pub(crate) async fn whole(mut self) -> Result<Response<Body>, ApiError> {
        let mut texts = vec![Text::default(); self.prompts * self.n];
        let mut used = Usage::default();
        while let Some(message) = self.job.next().await {
            let (prompt, event) = message?;
            match event {
                Event::Prompt(tokens) => {
                    let echo = self.echo(tokens);
                    for text in &mut texts[prompt * self.n..(prompt + 1) * self.n] {
                        (text.text, text.tokens) = (echo.text.clone(), echo.tokens.clone());
                    }
                }
                Event::Text { choice, piece } => {
                    let text = &mut texts[prompt * self.n + choice];
                    text.text += &piece.text;
                    text.tokens.extend(piece.tokens);
                }
                Event::End { choice, finish } => texts[prompt * self.n + choice].finish = Some(finish),
                Event::Done(usage) => add(&mut used, usage),
                Event::Read | Event::Embedding(_) | Event::Failed(_) => {}
            }
        }
        if self.log_texts {
            self.record.note("texts", texts.iter().map(|text| text.text.as_str()).collect::<Vec<_>>());
        }
        let tokens = texts.iter().flat_map(|text| &text.tokens);
        let entries: usize = tokens.map(|token| 1 + token.top.len()).sum();
        let write = || self.layout.whole(texts, used);
        let json = if entries > LONG { tokio::task::block_in_place(write) } else { write() };
        Ok(long_response(&self.reader, &self.record, json))
    }

    /// Waits a while for the first event, so that what goes wrong before has a status of its own, and sends the rest as it comes.
    pub(crate) async fn stream(mut self) -> Result<Response<Body>, ApiError> {
        let first = match timeout(self.silence, self.job.next()).await {
            Ok(first) => first.transpose()?,
            Err(_) => None,
        };
        let mut stream = Stream {
            begun: vec![false; self.prompts * self.n],
            answer: self,
            used: Usage::default(),
            waiting: VecDeque::new(),
            texts: String::new(),
            over: false,
        };
        if let Some((prompt, event)) = first {
            stream.take(prompt, event);
        }
        let body = unfold(stream, |mut stream| async move {
            let bytes = stream.next().await?;
            Some((Ok::<_, Infallible>(bytes), stream))
        });
        let mut response = Response::new(Body::from_stream(body));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        // nginx would collect events otherwise.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        Ok(response)
    }

    /// The prompt as a piece of text.
    fn echo(&self, tokens: Vec<Token>) -> Piece {
        let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
        Piece { text: self.tokenizer.decode(&ids), tokens }
    }
}

fn add(used: &mut Usage, more: Usage) {
    used.prompt += more.prompt;
    used.generated += more.generated;
}

/// An answer that is sent as it is made. Dropped with the connection, it takes the job with it.
struct Stream {
    answer: Answer,
    /// Texts of which something was sent.
    begun: Vec<bool>,
    used: Usage,
    /// Events that are ready to be sent.
    waiting: VecDeque<Bytes>,
    /// All text, if the log has it.
    texts: String,
    over: bool,
}

impl Stream {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(bytes) = self.waiting.pop_front() {
                return Some(bytes);
            }
            if self.over {
                return None;
            }
            let Ok(message) = timeout(self.answer.silence, self.answer.job.next()).await else {
                return Some(Bytes::from_static(b": still at work\n\n"));
            };
            match message {
                Some(Ok((prompt, event))) => self.take(prompt, event),
                Some(Err(error)) => {
                    self.answer.record.error(&error);
                    self.send(&error.object().to_string());
                    self.end();
                }
                None => {
                    if self.answer.include_usage {
                        self.send(&self.answer.layout.used(self.used));
                    }
                    self.end();
                }
            }
        }
    }

    fn take(&mut self, prompt: usize, event: Event) {
        let first = prompt * self.answer.n;
        match event {
            Event::Prompt(tokens) => {
                let echo = self.answer.echo(tokens);
                (first..first + self.answer.n).for_each(|index| self.piece(index, echo.clone()));
            }
            Event::Text { choice, piece } => self.piece(first + choice, piece),
            Event::End { choice, finish } => {
                self.begin(first + choice);
                let end = self.answer.layout.end(first + choice, finish);
                self.send(&end);
            }
            Event::Done(usage) => add(&mut self.used, usage),
            Event::Read | Event::Embedding(_) | Event::Failed(_) => {}
        }
    }

    fn begin(&mut self, index: usize) {
        if !std::mem::replace(&mut self.begun[index], true)
            && let Some(begin) = self.answer.layout.begin(index)
        {
            self.send(&begin);
        }
    }

    fn piece(&mut self, index: usize, piece: Piece) {
        self.begin(index);
        if self.answer.log_texts {
            self.texts += &piece.text;
        }
        if let Some(event) = self.answer.layout.piece(index, piece) {
            self.send(&event);
        }
    }

    fn send(&mut self, event: &str) {
        // An event can be long, and gets no more memory than it needs.
        let text = ["data: ", event, "\n\n"].concat();
        self.waiting.push_back(self.answer.reader.send(text, &self.answer.record.busy));
    }

    fn end(&mut self) {
        self.waiting.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
        self.over = true;
        if self.answer.log_texts {
            self.answer.record.note("texts", self.texts.as_str());
        }
    }
}
