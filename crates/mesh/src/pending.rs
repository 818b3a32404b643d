//! Operations that may not be done yet.

use crate::reactor::{Failed, Finished};
use crate::world::{World, thread_has_died};
use anyhow::Result;
use ferropt_device::Flight;
use std::sync::mpsc::Receiver;

/// An operation that may not be done yet. Dropping it is harmless.
#[must_use = "the buffer comes back from `wait`"]
pub struct Pending<B: Send + 'static>(State<B>);

enum State<B: Send + 'static> {
    Ready(Result<B>),
    Waiting(Receiver<Result<Finished, Failed>>, Finish<B>),
    /// Devices do it.
    Flying(Flight<B>, World),
}

/// What is done behind the last transfer, and what is still to come then.
type Finish<B> = Box<dyn FnOnce(Finished) -> Pending<B> + Send>;

impl<B: Send + 'static> Pending<B> {
    /// Waits until it is done and gives the buffer back. Where devices do it, only what they do with the buffer afterwards
    /// waits.
    ///
    /// # Errors
    /// When another rank is lost or does something else; the message names it. Every later operation fails alike.
    pub fn wait(self) -> Result<B> {
        match self.0 {
            State::Ready(result) => result,
            waiting @ State::Waiting(..) => Pending(waiting).proceed().wait(),
            State::Flying(flight, world) => {
                world.give_back();
                world.alive()?;
                flight.land()
            }
        }
    }

    /// Waits for what is under way and starts what follows, if anything does: of a large sum the parts are gathered, once each
    /// rank has summed its own. All ranks call it in the same order. What devices do goes on by itself.
    pub fn proceed(self) -> Self {
        let State::Waiting(done, finish) = self.0 else { return self };
        let finished = done.recv().map_err(thread_has_died);
        match finished.and_then(|finished| finished.map_err(|failed| failed.into_lost().into())) {
            Ok(finished) => finish(finished),
            Err(error) => Pending::ready(Err(error)),
        }
    }

    /// Whether [`Pending::wait`] may keep this thread waiting.
    pub fn keeps_waiting(&self) -> bool {
        matches!(self.0, State::Waiting(..))
    }

    pub(crate) fn ready(result: Result<B>) -> Self {
        Pending(State::Ready(result))
    }

    pub(crate) fn waiting(
        done: Receiver<Result<Finished, Failed>>,
        finish: impl FnOnce(Finished) -> Result<B> + Send + 'static,
    ) -> Self {
        Pending(State::Waiting(done, Box::new(|finished| Pending::ready(finish(finished)))))
    }

    pub(crate) fn flying(flight: Flight<B>, world: &World) -> Self {
        Pending(State::Flying(flight, world.clone()))
    }

    /// Has something else follow on the operation.
    pub(crate) fn then(self, next: impl FnOnce(B) -> Pending<B> + Send + 'static) -> Self {
        match self.0 {
            State::Ready(Ok(buffer)) => next(buffer),
            State::Waiting(done, finish) => {
                Pending(State::Waiting(done, Box::new(|finished| finish(finished).then(next))))
            }
            state => Pending(state),
        }
    }
}
