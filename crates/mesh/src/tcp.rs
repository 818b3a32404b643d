//! Ranks that talk over TCP: a connection between any two, made with the help of rank 0.

use crate::transport::{Transport, Waker};
use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// Between attempts to reach a rank that does not listen yet.
const AGAIN: Duration = Duration::from_millis(50);
/// How long a rank that ends waits for the others to end too.
const LINGER: Duration = Duration::from_secs(2);
/// How long a connection may take to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(5);
/// First bytes of an introduction.
const MAGIC: &[u8; 8] = b"ferropt1";
/// Longest introduction: the addresses of all ranks, of which there may be many thousands.
const LONGEST: u64 = 1 << 22;
/// What a call of the system takes at most, so that no rank keeps the others waiting.
const AT_ONCE: usize = 1 << 20;

/// Who this rank is, and where rank 0 listens.
#[derive(Clone, Debug)]
pub(crate) struct Meeting {
    pub(crate) rank: usize,
    pub(crate) size: usize,
    pub(crate) address: String,
    pub(crate) port: u16,
    /// Tells ranks of this run from strangers.
    pub(crate) token: String,
    /// How long to wait for the others.
    pub(crate) deadline: Duration,
}

/// Connections to all other ranks.
pub(crate) struct Tcp {
    peers: Vec<Option<TcpStream>>,
    hosts: Vec<String>,
    woken: UnixStream,
    waker: Arc<UnixStream>,
}

/// What a rank says of itself.
struct Introduction {
    rank: usize,
    address: SocketAddr,
    host: String,
}

impl Tcp {
    /// Meets the other ranks.
    ///
    /// # Errors
    /// When they do not come in time, or rank 0's address cannot be used; the message says who is missing.
    pub(crate) fn meet(meeting: &Meeting) -> Result<Tcp> {
        let until = Instant::now() + meeting.deadline;
        let listener = if meeting.rank == 0 { Some(meeting.listen()?) } else { None };
        Tcp::meet_at(meeting, listener, until)
    }

    /// The same, where rank 0 listens already.
    pub(crate) fn meet_at(meeting: &Meeting, listener: Option<TcpListener>, until: Instant) -> Result<Tcp> {
        let mut peers: Vec<Option<TcpStream>> = (0..meeting.size).map(|_| None).collect();
        let mut known: Vec<Option<Introduction>> = (0..meeting.size).map(|_| None).collect();
        match listener {
            Some(listener) => {
                let address = listener.local_addr()?;
                known[0] = Some(Introduction { rank: 0, address, host: host_name() });
                meeting.accept(&listener, 1..meeting.size, until, &mut peers, &mut known)?;
                let list: Vec<String> = known.iter().flatten().map(Introduction::line).collect();
                for stream in peers.iter_mut().flatten() {
                    say(stream, &list.join("\t"))?;
                }
            }
            None => {
                let mut first = meeting.reach_first(until)?;
                // Higher ranks reach this one where it reached rank 0 from.
                let listener = TcpListener::bind((first.local_addr()?.ip(), 0))
                    .context("cannot listen for the other ranks")?;
                let me =
                    Introduction { rank: meeting.rank, address: listener.local_addr()?, host: host_name() };
                say(&mut first, &format!("{}\t{}", meeting.token, me.line()))?;
                let list = hear(&mut Until(&first, until)).context("rank 0 did not tell who is there")?;
                for line in list.split('\t') {
                    let one = Introduction::parse(line).context("rank 0 told something unknown")?;
                    let place = known.get_mut(one.rank).context("rank 0 told of a rank beyond the last")?;
                    *place = Some(one);
                }
                peers[0] = Some(first);
                for rank in 1..meeting.rank {
                    let one = known[rank]
                        .as_ref()
                        .with_context(|| format!("rank 0 did not tell of rank {rank}"))?;
                    let mut stream = reach(one.address, until)
                        .with_context(|| format!("cannot reach rank {rank} on {}", one.host))?;
                    say(&mut stream, &format!("{}\t{}", meeting.token, me.line()))?;
                    peers[rank] = Some(stream);
                }
                meeting.accept(&listener, meeting.rank + 1..meeting.size, until, &mut peers, &mut known)?;
            }
        }
        for stream in peers.iter().flatten() {
            stream.set_read_timeout(None)?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
        }
        let (woken, waker) = UnixStream::pair().context("cannot make a pipe")?;
        woken.set_nonblocking(true)?;
        waker.set_nonblocking(true)?;
        let hosts = known.into_iter().map(|one| one.map_or_else(String::new, |one| one.host)).collect();
        Ok(Tcp { peers, hosts, woken, waker: Arc::new(waker) })
    }
}

impl Meeting {
    /// Rank 0's door.
    fn listen(&self) -> Result<TcpListener> {
        let at = (self.address.as_str(), self.port);
        // The name may be one of this machine that it does not know itself by, as a service's is.
        let listener = TcpListener::bind(at).or_else(|_| TcpListener::bind(("0.0.0.0", self.port)));
        listener.with_context(|| {
            format!(
                "rank 0 cannot listen on {}:{}; choose another MASTER_PORT, or end what uses it",
                self.address, self.port
            )
        })
    }

    /// Reaches rank 0, which may still be starting.
    fn reach_first(&self, until: Instant) -> Result<TcpStream> {
        let name = || format!("{}:{} (MASTER_ADDR and MASTER_PORT)", self.address, self.port);
        loop {
            let last = match (self.address.as_str(), self.port).to_socket_addrs() {
                Ok(addresses) => {
                    let tried = addresses.map(|address| TcpStream::connect_timeout(&address, INTRODUCTION));
                    match tried.reduce(|a, b| a.or(b)) {
                        Some(Ok(stream)) => return Ok(stream),
                        Some(Err(error)) => error,
                        None => io::Error::from(ErrorKind::AddrNotAvailable),
                    }
                }
                Err(error) => error,
            };
            if Instant::now() >= until {
                return Err(last)
                    .with_context(|| format!("rank {} cannot reach rank 0 at {}", self.rank, name()));
            }
            thread::sleep(AGAIN);
        }
    }

    /// Lets ranks in until all of `awaited` are there. Who is none of them is shown out, and keeps nobody waiting: each has a
    /// thread of its own to introduce itself to.
    fn accept(
        &self,
        listener: &TcpListener,
        awaited: std::ops::Range<usize>,
        until: Instant,
        peers: &mut [Option<TcpStream>],
        known: &mut [Option<Introduction>],
    ) -> Result<()> {
        listener.set_nonblocking(true)?;
        let (door, admitted) = mpsc::channel::<(TcpStream, Introduction)>();
        loop {
            for (stream, one) in admitted.try_iter() {
                if awaited.contains(&one.rank) && peers[one.rank].is_none() {
                    let rank = one.rank;
                    (peers[rank], known[rank]) = (Some(stream), Some(one));
                }
            }
            let missing: Vec<String> =
                awaited.clone().filter(|rank| peers[*rank].is_none()).map(|rank| rank.to_string()).collect();
            if missing.is_empty() {
                return Ok(());
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    let (meeting, door) = (self.clone(), door.clone());
                    let admit = move || {
                        if let Ok(one) = meeting.admit(stream) {
                            // Nobody waits any more once all are there.
                            let _ = door.send(one);
                        }
                    };
                    thread::Builder::new()
                        .name("introduction".into())
                        .spawn(admit)
                        .context("cannot start a thread for a connection")?;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(AGAIN / 10),
                Err(error) => return Err(error).context("cannot accept connections of other ranks"),
            }
            if Instant::now() >= until {
                bail!(
                    "rank {} waited {:.0} s for {} of the {} ranks, which did not come: {}; start them all, with the same \
                     MASTER_ADDR and MASTER_PORT and a RANK of their own",
                    self.rank,
                    self.deadline.as_secs_f64(),
                    missing.len(),
                    self.size,
                    missing.join(", ")
                );
            }
        }
    }

    /// Who is at the door.
    fn admit(&self, stream: TcpStream) -> Result<(TcpStream, Introduction)> {
        stream.set_nonblocking(false)?;
        let text = hear(&mut Until(&stream, Instant::now() + INTRODUCTION))?;
        let (token, line) = text.split_once('\t').context("no introduction")?;
        ensure!(token == self.token, "of another run");
        Ok((stream, Introduction::parse(line).context("no introduction")?))
    }
}

impl Introduction {
    fn line(&self) -> String {
        format!("{} {} {}", self.rank, self.address, self.host)
    }

    fn parse(line: &str) -> Option<Introduction> {
        let mut words = line.splitn(3, ' ');
        let rank = words.next()?.parse().ok()?;
        let address = words.next()?.parse().ok()?;
        Some(Introduction { rank, address, host: words.next()?.into() })
    }
}

fn reach(address: SocketAddr, until: Instant) -> io::Result<TcpStream> {
    loop {
        match TcpStream::connect_timeout(&address, INTRODUCTION) {
            Err(_) if Instant::now() < until => thread::sleep(AGAIN),
            done => return done,
        }
    }
}

/// Sends a text with its length.
fn say(stream: &mut TcpStream, text: &str) -> Result<()> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&(text.len() as u64).to_le_bytes());
    bytes.extend_from_slice(text.as_bytes());
    stream.write_all(&bytes).context("cannot introduce this rank")
}

/// Reads from a connection until a moment, however many reads it takes.
struct Until<'a>(&'a TcpStream, Instant);

impl Read for Until<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = self.1.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        self.0.set_read_timeout(Some(left))?;
        self.0.read(into)
    }
}

/// Receives a text with its length.
fn hear(stream: &mut Until<'_>) -> Result<String> {
    let mut start = [0; 16];
    stream.read_exact(&mut start).context("the connection ended")?;
    let (magic, len) = start.split_at(8);
    let len = u64::from_le_bytes(len.try_into().unwrap_or_default());
    ensure!(magic == MAGIC && len <= LONGEST, "it is not one of Ferropt's ranks");
    let mut text = vec![0; len as usize];
    stream.read_exact(&mut text).context("the connection ended")?;
    Ok(String::from_utf8(text)?)
}

/// Name of this machine.
fn host_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if name.is_empty() { IpAddr::from([127, 0, 0, 1]).to_string() } else { name.replace(['\t', '\n'], " ") }
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
