//! Generation, scoring and embedding: many requests at once, each as if it were alone.
//!
//! Small state machines that know nothing of models: [`pages`] (who uses which page of the KV cache, and which pages hold
//! the beginning of a text that may come again), [`scheduler`] (which tokens are computed in the next step), [`sampler`],
//! [`beam`], [`stop`] and [`text`]. [`Engine`] puts them around a decoder and a device, a step at a time; [`Handle`] is an
//! engine on a thread of its own, which takes requests from any thread and hands out events.
//!
//! A request gives the same tokens alone and in any batch: rows of products and of attention have the same bits whatever
//! is computed beside them, and random numbers depend on the request's seed, the number of the text, the place in it and the
//! token. A draft, which guesses ahead, changes no token either.

mod adjust;
pub mod beam;
mod choose;
mod conversation;
mod draft;
mod embed;
mod ends;
mod engine;
mod event;
mod handle;
mod pace;
pub mod pages;
mod parameters;
mod request;
pub mod sampler;
pub mod scheduler;
mod score;
pub mod stop;
pub mod text;

pub use conversation::{Conversation, Speaker};
pub use embed::Pooling;
pub use ends::Ends;
pub use engine::{DRAFT_TOKENS, Engine, Options};
pub use event::{Event, Finish, Usage};
pub use handle::{Completion, Events, Handle, Text};
pub use pages::Scope;
pub use parameters::{
    Capacity, Decay, MOST_CHOICES, MOST_LOG_PROBS, MOST_STOPS, Parameters, Refusal, Request,
};
pub use scheduler::{Limits, Load};
pub use score::{Score, scoring};
pub use text::{Piece, Token};
