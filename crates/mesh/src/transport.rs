//! What carries bytes between ranks.

use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Interrupts a wait, from any thread.
pub(crate) type Waker = Arc<dyn Fn() + Send + Sync>;

/// Carries bytes between the ranks of a world: to and from each rank a stream, in order. Owned and used by one thread.
pub(crate) trait Transport: Send {
    /// Sends some of the bytes to a rank without waiting, and returns how many; 0 if none can be taken now.
    fn write(&mut self, to: usize, bytes: &[u8]) -> io::Result<usize>;
    /// Receives some bytes from a rank without waiting, and returns how many; 0 if there are none now. An
    /// [`io::ErrorKind::UnexpectedEof`] says that there will never be more.
    fn read(&mut self, from: usize, into: &mut [u8]) -> io::Result<usize>;
    /// Waits until there is something to read or room to write, with one of these ranks, or the waker is called, or the
    /// time is over.
    fn wait(&mut self, reads: &[usize], writes: &[usize], at_most: Duration) -> io::Result<()>;
    /// What ends a [`Transport::wait`].
    fn waker(&self) -> Waker;
    /// Name for people: "TCP".
    fn name(&self) -> String;
    /// Host of a rank; empty where it is not known.
    fn host(&self, rank: usize) -> &str;
    /// The end; `clean` if nothing has failed.
    fn close(&mut self, _clean: bool) {}
}
