//! Work beside other work: on two streams, one for each way that copies go, so that both directions of the bus are used.
//!
//! What begins there waits for all that the GPU was told before, and nothing waits for it until [`Transfer::hold_back`] says so.
//! Meanwhile this thread's operations go to that stream; those that use workspace are refused, since the stream of
//! operations uses it at the same time.

use std::cell::Cell;
use std::ptr::null;
use std::sync::Arc;

use anyhow::Result;

use super::driver::{Gpu, Handle};
use super::event::{Aside, Event};
use crate::{Lane, Transfer};

thread_local! {
    /// Of which GPU this thread's operations go to which lane, if they do.
    static HERE: Cell<(*const Gpu, Option<Lane>)> = const { Cell::new((null(), None)) };
}

impl Gpu {
    /// The stream of what this thread has done beside other work, where it does.
    pub(super) fn lane(&self) -> Option<Handle> {
        let (gpu, lane) = HERE.get();
        let lane = lane.filter(|_| std::ptr::eq(gpu, self))?;
        self.lanes.get().map(|lanes| lanes[lane as usize])
    }

    /// To be called by what cannot be done beside other work.
    ///
    /// # Panics
    /// When it is.
    pub(super) fn in_order(&self, what: &str) {
        assert!(self.lane().is_none(), "{what} is among what is done beside other work (Device::beside)");
    }

    fn make_lanes(&self) -> Result<[Handle; 2]> {
        Ok([self.new_stream()?, self.new_stream()?])
    }

    /// Gives the operations of `work` to a lane.
    pub(super) fn beside(self: &Arc<Gpu>, lane: Lane, work: &mut dyn FnMut()) -> Box<dyn Transfer> {
        /// Goes back to where it was, also where an operation unwinds.
        struct Back((*const Gpu, Option<Lane>));
        impl Drop for Back {
            fn drop(&mut self) {
                HERE.set(self.0);
            }
        }
        self.outside("work beside other work");
        let stream = self.lanes.get_or_init(|| self.must(self.make_lanes()))[lane as usize];
        self.must(Event::at_end_of(self, self.stream()).and_then(|before| before.hold_back(stream)));
        let back = Back(HERE.replace((Arc::as_ptr(self), Some(lane))));
        work();
        drop(back);
        Box::new(self.must(Aside::until_now(self, stream)))
    }

    fn must<T>(&self, result: Result<T>) -> T {
        result.unwrap_or_else(|error| self.fail(&format!("nothing can be done beside other work: {error:#}")))
    }
}
