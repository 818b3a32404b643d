//! Ranks that talk over TCP: a connection between any two.

use crate::meeting::{Meeting, Met};
use crate::transport::{Transport, Waker};
use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between looks at whether the others have ended.
const AGAIN: Duration = Duration::from_millis(50);
/// How long a rank that ends waits for the others to end too.
const LINGER: Duration = Duration::from_secs(2);
/// What a call of the system takes at most, so that no rank keeps the others waiting.
const AT_ONCE: usize = 1 << 20;

/// Connections to all other ranks.
pub(crate) struct Tcp {
    peers: Vec<Option<TcpStream>>,
    hosts: Vec<String>,
    woken: UnixStream,
    waker: Arc<UnixStream>,
}

impl Tcp {
    /// Meets the other ranks, unless it is to be `stopped`.
    ///
    /// # Errors
    /// Those of [`Meeting::meet`].
    pub(crate) fn meet(meeting: &Meeting, stopped: &dyn Fn() -> bool) -> Result<Tcp> {
        Tcp::new(meeting.meet(stopped)?)
    }

    /// The same, where rank 0 listens already.
    pub(crate) fn meet_at(meeting: &Meeting, listener: Option<TcpListener>) -> Result<Tcp> {
        Tcp::new(meeting.meet_at(listener, &|| false)?)
    }

    fn new(met: Met) -> Result<Tcp> {
        let Met { peers, hosts } = met;
        for stream in peers.iter().flatten() {
            stream.set_read_timeout(None)?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
        }
        let (woken, waker) = UnixStream::pair().context("cannot make a pipe")?;
        woken.set_nonblocking(true)?;
        waker.set_nonblocking(true)?;
        Ok(Tcp { peers, hosts, woken, waker: Arc::new(waker) })
    }
}

fn nothing_now(result: io::Result<usize>) -> io::Result<usize> {
    match result {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        other => other,
    }
}

impl Transport for Tcp {
    fn write(&mut self, to: usize, bytes: &[u8]) -> io::Result<usize> {
        let stream = self.peers[to].as_mut().ok_or(ErrorKind::NotConnected)?;
        nothing_now(stream.write(&bytes[..bytes.len().min(AT_ONCE)]))
    }

    fn read(&mut self, from: usize, into: &mut [u8]) -> io::Result<usize> {
        let stream = self.peers[from].as_mut().ok_or(ErrorKind::NotConnected)?;
        let most = into.len().min(AT_ONCE);
        match stream.read(&mut into[..most]) {
            Ok(0) if most > 0 => Err(ErrorKind::UnexpectedEof.into()),
            other => nothing_now(other),
        }
    }

    fn wait(&mut self, reads: &[usize], writes: &[usize], at_most: Duration) -> io::Result<()> {
        let mut flags = vec![PollFlags::empty(); self.peers.len()];
        reads.iter().for_each(|rank| flags[*rank] |= PollFlags::IN);
        writes.iter().for_each(|rank| flags[*rank] |= PollFlags::OUT);
        let mut watched = vec![PollFd::new(&self.woken, PollFlags::IN)];
        let peers = self.peers.iter().zip(flags).filter(|(_, flags)| !flags.is_empty());
        watched.extend(peers.filter_map(|(stream, flags)| Some(PollFd::new(stream.as_ref()?, flags))));
        let time = Timespec { tv_sec: at_most.as_secs() as i64, tv_nsec: at_most.subsec_nanos().into() };
        match poll(&mut watched, Some(&time)) {
            Err(error) if error != rustix::io::Errno::INTR => return Err(error.into()),
            _ => {}
        }
        // Calls since the last wait; which ones does not matter.
        let mut calls = [0; 64];
        while nothing_now((&self.woken).read(&mut calls))? == calls.len() {}
        Ok(())
    }

    fn waker(&self) -> Waker {
        let waker = self.waker.clone();
        Arc::new(move || {
            // A full pipe wakes as well.
            let _ = (&*waker).write(&[1]);
        })
    }

    fn close(&mut self, _: bool) {
        // A connection that is closed while there is something to be read takes with it what the other end has not read yet. So
        // this end only stops writing, and reads until the others have done the same, or for a moment.
        let until = Instant::now() + LINGER;
        let mut open: Vec<usize> = (0..self.peers.len()).filter(|rank| self.peers[*rank].is_some()).collect();
        for stream in self.peers.iter().flatten() {
            // One that is gone need not be told.
            let _ = stream.shutdown(Shutdown::Write);
        }
        let mut nothing = vec![0; 1 << 16];
        while !open.is_empty() && Instant::now() < until {
            open.retain(|rank| {
                loop {
                    match self.read(*rank, &mut nothing) {
                        Ok(0) => break true,
                        Ok(_) => {}
                        Err(_) => break false,
                    }
                }
            });
            if self.wait(&open, &[], AGAIN).is_err() {
                return;
            }
        }
    }

    fn name(&self) -> String {
        "TCP".into()
    }

    fn host(&self, rank: usize) -> &str {
        &self.hosts[rank]
    }
}
