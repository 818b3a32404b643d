//! How ranks find each other over TCP.
//!
//! ```text
//! rank r -> rank 0        version, token, number of ranks; rank, address, host
//! rank 0 -> rank r        "ranks", and rank, address and host of each; or "wrong" or "taken", and why it is not let in
//! rank r -> rank q < r    as to rank 0; nothing is answered
//! ```

use crate::frame::{HEADER, Header, Kind};
use crate::lost::{LONGEST_REASON, Lost};
use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{fmt, thread};

/// Between attempts to reach a rank that does not listen yet, and looks at what else there is.
const AGAIN: Duration = Duration::from_millis(50);
/// How long a connection may take to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(5);
/// How long a name may be unknown: that of a machine that is still starting.
const UNKNOWN: Duration = Duration::from_secs(60);
/// First bytes of an introduction.
const MAGIC: &[u8; 8] = b"ferropt1";
/// Ranks of other versions may talk otherwise.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Longest introduction: the addresses of all ranks, of which there may be many thousands.
const LONGEST: u64 = 1 << 22;
/// How many that were not let in are told of.
const TOLD: usize = 5;

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

/// All other ranks.
pub(crate) struct Met {
    /// By rank; none for this one.
    pub(crate) peers: Vec<Option<TcpStream>>,
    /// By rank.
    pub(crate) hosts: Vec<String>,
}

/// The meeting was broken off, as it was asked to be.
#[derive(Debug)]
pub(crate) struct BrokenOff;

impl fmt::Display for BrokenOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("stopped before all ranks were there")
    }
}

impl std::error::Error for BrokenOff {}

/// What a rank says of itself.
struct Introduction {
    rank: usize,
    address: SocketAddr,
    host: String,
}

/// Who was at the door: a rank, or one that was not let in, and why.
type Comer = Result<(TcpStream, Introduction), String>;

impl Meeting {
    /// Meets the other ranks, unless it is to be `stopped`.
    ///
    /// # Errors
    /// [`BrokenOff`] where it was; [`Lost`] where ranks do not come in time, or go away again, or rank 0 cannot be reached;
    /// others where this rank is none of them. The message says who is missing.
    pub(crate) fn meet(&self, stopped: &dyn Fn() -> bool) -> Result<Met> {
        let listener = if self.rank == 0 { Some(self.listen()?) } else { None };
        self.meet_at(listener, stopped)
    }

    /// The same, where rank 0 listens already.
    pub(crate) fn meet_at(&self, listener: Option<TcpListener>, stopped: &dyn Fn() -> bool) -> Result<Met> {
        let mut party = Party {
            meeting: self,
            until: Instant::now() + self.deadline,
            stopped,
            peers: (0..self.size).map(|_| None).collect(),
            known: (0..self.size).map(|_| None).collect(),
        };
        let met = match listener {
            Some(listener) => party.lead(&listener),
            None => party.follow(),
        };
        // Where all are stopped, one sees that another is gone before it is told itself.
        ensure!(met.is_ok() || !stopped(), BrokenOff);
        met?;
        let hosts = party.known.into_iter().map(|one| one.map_or_else(String::new, |one| one.host)).collect();
        Ok(Met { peers: party.peers, hosts })
    }

    /// Rank 0's door. A name leads to all addresses of this machine, which may know itself by one that no other can reach, such as
    /// Debian's 127.0.1.1, or not at all, as where it is a service's.
    fn listen(&self) -> Result<TcpListener> {
        let at = |address: IpAddr| TcpListener::bind((address, self.port));
        let anywhere = || at(Ipv6Addr::UNSPECIFIED.into()).or_else(|_| at(Ipv4Addr::UNSPECIFIED.into()));
        let listener = match self.address.parse() {
            Ok(address) => at(address).or_else(|_| anywhere()),
            Err(_) => anywhere(),
        };
        listener.map_err(|error| {
            let at = format!("{}:{}", self.address, self.port);
            lost(format!(
                "rank 0 cannot listen on {at}: {error}; give all ranks another port in FERROPT_PORT, or end what uses it, such as \
                 another rank 0"
            ))
        })
    }

    /// What this rank says to others.
    fn introduction(&self, me: &Introduction) -> String {
        format!("{VERSION}\t{}\t{}\t{}", self.token, self.size, me.line())
    }

    /// Who is at the door. One of Ferropt's ranks that is none of this run is told why.
    fn admit(&self, mut stream: TcpStream) -> Result<Comer> {
        stream.set_nonblocking(false)?;
        let until = Instant::now() + INTRODUCTION;
        let text = hear(&mut Until { stream: &stream, until, stopped: &|| false })?;
        let mut words = text.splitn(4, '\t');
        let mut word = || words.next().context("no introduction");
        let (version, token, size) = (word()?, word()?, word()?);
        let one = Introduction::parse(word()?).context("no introduction")?;
        let wrong = if version != VERSION {
            format!(
                "rank {} runs version {version} of Ferropt, rank {} version {VERSION}",
                one.rank, self.rank
            )
        } else if token != self.token {
            format!(
                "rank {} is of another run: its FERROPT_TOKEN, SLURM_JOB_ID or port is another one",
                one.rank
            )
        } else if size != self.size.to_string() {
            format!(
                "rank {} is one of {size} ranks (WORLD_SIZE), rank {} one of {}",
                one.rank, self.rank, self.size
            )
        } else {
            return Ok(Ok((stream, one)));
        };
        // One that does not listen need not know.
        let _ = say(&mut stream, &format!("wrong\t{wrong}"));
        Ok(Err(format!("{wrong} (on {})", one.host)))
    }
}

/// Ranks that have come so far, as one of them sees it.
struct Party<'m> {
    meeting: &'m Meeting,
    until: Instant,
    stopped: &'m dyn Fn() -> bool,
    peers: Vec<Option<TcpStream>>,
    known: Vec<Option<Introduction>>,
}

impl Party<'_> {
    /// Rank 0: waits for all, and tells each who the others are.
    fn lead(&mut self, listener: &TcpListener) -> Result<()> {
        let address = listener.local_addr()?;
        self.known[0] = Some(Introduction { rank: 0, address, host: host_name() });
        self.accept(listener, 1..self.meeting.size)?;
        for (rank, stream) in self.peers.iter_mut().enumerate() {
            if let Some(stream) = stream {
                let here = stream.local_addr()?.ip().to_canonical();
                let lines = self.known.iter().flatten().map(|one| one.known_by(here).line());
                let list: Vec<String> = ["ranks".into()].into_iter().chain(lines).collect();
                say(stream, &list.join("\t"))
                    .map_err(|error| Lost::of(rank, format!("rank {rank} is gone: {error:#}")))?;
            }
        }
        Ok(())
    }

    /// Other ranks: comes to rank 0, then to those below this one, and waits for those above.
    fn follow(&mut self) -> Result<()> {
        let Meeting { rank: me, size, .. } = *self.meeting;
        let mut first = self.reach_first()?;
        // Higher ranks reach this one where it reached rank 0 from; from other machines by another address, if it shares rank 0's and
        // MASTER_ADDR is a name.
        let here = first.local_addr()?;
        let mut door = here;
        door.set_port(0);
        if here.ip().is_loopback() && self.meeting.address.parse::<IpAddr>().is_err() {
            door.set_ip(match here {
                SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            });
        }
        let listener = TcpListener::bind(door).context("cannot listen for the other ranks")?;
        let mut address = here;
        address.set_port(listener.local_addr()?.port());
        let own = Introduction { rank: me, address, host: host_name() };
        let introduction = self.meeting.introduction(&own);
        say(&mut first, &introduction).map_err(|error| lost(format!("rank 0 is gone: {error:#}")))?;
        let told = hear(&mut Until { stream: &first, until: self.until, stopped: self.stopped });
        let told = told.map_err(|error| match error.is::<BrokenOff>() {
            true => error,
            false => lost(format!("rank 0 did not tell rank {me} who is there: {error:#}")),
        })?;
        let list = match told.split_once('\t') {
            Some(("ranks", list)) => list,
            Some(("wrong", why)) => bail!("rank 0 does not let rank {me} in: {why}"),
            Some(("taken", why)) => return Err(lost(format!("rank 0 does not let rank {me} in: {why}"))),
            _ => bail!("rank 0 told something unknown: it runs another version of Ferropt"),
        };
        for line in list.split('\t') {
            let mut one = Introduction::parse(line).context("rank 0 told something unknown")?;
            // The link of a link-local address has another number on each machine. On this one it is the link to rank 0.
            if let (SocketAddr::V6(there), SocketAddr::V6(here)) = (&mut one.address, here) {
                there.set_scope_id(here.scope_id());
            }
            let place = self.known.get_mut(one.rank).context("rank 0 told of a rank beyond the last")?;
            *place = Some(one);
        }
        self.peers[0] = Some(first);
        for rank in 1..me {
            let one = self.known[rank].as_ref();
            let one = one.with_context(|| format!("rank 0 did not tell of rank {rank}"))?;
            let (address, host) = (one.address, one.host.clone());
            let mut stream = self.reach(rank, address, &host)?;
            say(&mut stream, &introduction)
                .map_err(|error| Lost::of(rank, format!("rank {rank} on {host} is gone: {error:#}")))?;
            self.peers[rank] = Some(stream);
        }
        self.accept(&listener, me + 1..size)
    }

    /// Between two attempts: whether it is worth going on.
    fn look(&mut self) -> Result<()> {
        ensure!(!(self.stopped)(), BrokenOff);
        let gone = hung_up(self.peers.iter().flatten());
        let there = (0..self.peers.len()).filter(|rank| self.peers[*rank].is_some());
        let gone: Vec<usize> = there.zip(gone).filter_map(|(rank, gone)| gone.then_some(rank)).collect();
        for rank in gone {
            let stream = self.peers[rank].take();
            let one = self.known[rank].take();
            // Nobody but rank 0 knows of it yet, so another may come in its place.
            if self.meeting.rank > 0 {
                let host = one.map_or_else(String::new, |one| one.host);
                let gone =
                    format!("rank {rank} (on {host}) is gone: its process has ended while the ranks met");
                let told = stream.as_ref().and_then(last_words);
                let told =
                    told.map(|told| told.retold(|why| format!("rank {rank} (on {host}) gave up: {why}")));
                return Err(told.unwrap_or(Lost::of(rank, gone)).into());
            }
        }
        Ok(())
    }

    /// Reaches rank 0, which may still be starting.
    fn reach_first(&mut self) -> Result<TcpStream> {
        let Meeting { rank, ref address, port, .. } = *self.meeting;
        let name = format!("{address}:{port} (MASTER_ADDR, and MASTER_PORT or what follows from the job)");
        let (started, mut known) = (Instant::now(), false);
        loop {
            self.look()?;
            let last = match (address.as_str(), port).to_socket_addrs() {
                Ok(addresses) => {
                    known = true;
                    let tried = addresses.map(|address| connect(&address));
                    match tried.reduce(|a, b| a.or(b)) {
                        Some(Ok(stream)) => return Ok(stream),
                        Some(Err(error)) => error,
                        None => io::Error::from(ErrorKind::AddrNotAvailable),
                    }
                }
                Err(error) => error,
            };
            if !known && started.elapsed() > UNKNOWN {
                let time = UNKNOWN.as_secs();
                return Err(lost(format!(
                    "rank {rank} looks for rank 0 at {name}, but for {time} s there has been no such host: {last}; set \
                     MASTER_ADDR to rank 0's host"
                )));
            }
            if Instant::now() >= self.until {
                return Err(lost(format!("rank {rank} cannot reach rank 0 at {name}: {last}")));
            }
            thread::sleep(AGAIN);
        }
    }

    /// Reaches a rank that rank 0 told of.
    fn reach(&mut self, rank: usize, address: SocketAddr, host: &str) -> Result<TcpStream> {
        loop {
            self.look()?;
            match connect(&address) {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() >= self.until => {
                    return Err(lost(format!("cannot reach rank {rank} on {host} at {address}: {error}")));
                }
                Err(_) => thread::sleep(AGAIN),
            }
        }
    }

    /// Lets ranks in until all of `awaited` are there. Who is none of them is shown out, and keeps nobody waiting: each has a
    /// thread of its own to introduce itself to.
    fn accept(&mut self, listener: &TcpListener, awaited: Range<usize>) -> Result<()> {
        listener.set_nonblocking(true)?;
        let (door, admitted) = mpsc::channel::<Comer>();
        let (mut refused, mut trouble) = (Vec::new(), String::new());
        loop {
            self.look()?;
            for comer in admitted.try_iter() {
                let comer = comer.and_then(|(stream, one)| self.seat(stream, one, &awaited));
                refused.extend(comer.err().filter(|why| !refused.contains(why)));
            }
            let missing: Vec<String> =
                awaited.clone().filter(|rank| self.peers[*rank].is_none()).map(|r| r.to_string()).collect();
            if missing.is_empty() {
                return Ok(());
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    let (meeting, door) = (self.meeting.clone(), door.clone());
                    let admit = move || {
                        if let Ok(comer) = meeting.admit(stream) {
                            // Nobody waits any more once all are there.
                            let _ = door.send(comer);
                        }
                    };
                    thread::Builder::new()
                        .name("introduction".into())
                        .spawn(admit)
                        .context("cannot start a thread for a connection")?;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(AGAIN / 10),
                // One that hung up at once, or too many at a time: both pass.
                Err(error) => {
                    trouble = format!("; connections could not be accepted: {error}");
                    thread::sleep(AGAIN);
                }
            }
            if Instant::now() >= self.until {
                refused.truncate(TOLD);
                let refused = match refused.is_empty() {
                    true => String::new(),
                    false => format!("; not let in: {}", refused.join("; ")),
                };
                return Err(lost(format!(
                    "rank {} waited {:.0} s for {} of the {} ranks, which did not come: {}; start them all, with the same \
                     MASTER_ADDR and MASTER_PORT and a RANK of their own{refused}{trouble}",
                    self.meeting.rank,
                    self.meeting.deadline.as_secs_f64(),
                    missing.len(),
                    self.meeting.size,
                    missing.join(", ")
                )));
            }
        }
    }

    /// Gives a rank its place. One that is there already, or has been and is gone, makes a difference.
    fn seat(
        &mut self,
        mut stream: TcpStream,
        one: Introduction,
        awaited: &Range<usize>,
    ) -> Result<(), String> {
        let Introduction { rank, host, .. } = &one;
        let here = if *rank == self.meeting.rank { self.known[*rank].as_ref() } else { None };
        let taken = match (here, self.peers.get(*rank)) {
            (Some(other), _) => Some(other),
            (None, Some(Some(other))) if !hung_up([other]).contains(&true) => self.known[*rank].as_ref(),
            _ => None,
        };
        let why = match taken {
            Some(other) => format!(
                "rank {rank} is there already, on {}: two processes have RANK={rank}, or one of an earlier start still runs",
                other.host
            ),
            None if !awaited.contains(rank) => format!("rank {rank} has no business here"),
            None => {
                let rank = *rank;
                (self.peers[rank], self.known[rank]) = (Some(stream), Some(one));
                return Ok(());
            }
        };
        // One that does not listen need not know.
        let _ = say(&mut stream, &format!("taken\t{why}"));
        Err(format!("a second one on {host}, for {why}"))
    }
}

impl Introduction {
    fn line(&self) -> String {
        format!("{} {} {}", self.rank, self.address, self.host)
    }

    /// The same for a rank that reaches rank 0 at `address`. Who is on rank 0's machine, and has an address that is good there only,
    /// is reached at rank 0's.
    fn known_by(&self, address: IpAddr) -> Introduction {
        let inside = self.address.ip().is_loopback() && !address.is_loopback();
        let address = if inside { (address, self.address.port()).into() } else { self.address };
        Introduction { rank: self.rank, address, host: self.host.clone() }
    }

    fn parse(line: &str) -> Option<Introduction> {
        let mut words = line.splitn(3, ' ');
        let rank = words.next()?.parse().ok()?;
        let address = words.next()?.parse().ok()?;
        Some(Introduction { rank, address, host: words.next()?.into() })
    }
}

fn lost(reason: String) -> anyhow::Error {
    Lost::new(reason).into()
}

fn connect(address: &SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(address, INTRODUCTION)?;
    // Where nobody listens, the system may choose that very port for this end, and connect it to itself.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(ErrorKind::ConnectionRefused.into());
    }
    Ok(stream)
}

/// Which connections the other end has closed, even where there is something left to be read.
fn hung_up<'s>(streams: impl IntoIterator<Item = &'s TcpStream>) -> Vec<bool> {
    let mut watched: Vec<_> =
        streams.into_iter().map(|stream| PollFd::new(stream, PollFlags::RDHUP)).collect();
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let polled = poll(&mut watched, Some(&at_once)).is_ok();
    let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    watched.iter().map(|watched| polled && watched.revents().intersects(gone)).collect()
}

/// Why a rank gave up that has met all others already, and has hung up.
fn last_words(mut stream: &TcpStream) -> Option<Lost> {
    stream.set_read_timeout(Some(AGAIN)).ok()?;
    loop {
        let mut bytes = [0; HEADER];
        stream.read_exact(&mut bytes).ok()?;
        let header = Header::from_bytes(&bytes)?;
        let abandons = header.kind == Kind::Abandon;
        let mut payload = Vec::new();
        let most = if abandons { header.len.min(LONGEST_REASON as u64) } else { header.len };
        match abandons {
            true => drop(stream.take(most).read_to_end(&mut payload).ok()?),
            false => drop(io::copy(&mut stream.take(most), &mut io::sink()).ok()?),
        }
        if abandons {
            return Some(Lost::from_bytes(&payload));
        }
    }
}

/// Sends a text with its length.
fn say(stream: &mut TcpStream, text: &str) -> Result<()> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&(text.len() as u64).to_le_bytes());
    bytes.extend_from_slice(text.as_bytes());
    stream.write_all(&bytes).context("nothing can be said to it")
}

/// Reads from a connection until a moment, however many reads it takes, unless it is stopped.
struct Until<'a> {
    stream: &'a TcpStream,
    until: Instant,
    stopped: &'a dyn Fn() -> bool,
}

impl Read for Until<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            if (self.stopped)() {
                return Err(io::Error::other(BrokenOff));
            }
            let left = self.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left.min(AGAIN)))?;
            match self.stream.read(into) {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                done => return done,
            }
        }
    }
}

/// Receives a text with its length.
fn hear(stream: &mut Until<'_>) -> Result<String> {
    let ended = |error: io::Error| match error.get_ref().is_some_and(|inner| inner.is::<BrokenOff>()) {
        true => anyhow!(BrokenOff),
        false => anyhow!(error).context("the connection ended"),
    };
    let mut start = [0; 16];
    stream.read_exact(&mut start).map_err(ended)?;
    let (magic, len) = start.split_at(8);
    let len = u64::from_le_bytes(len.try_into().unwrap_or_default());
    ensure!(magic == MAGIC && len <= LONGEST, "it is not one of Ferropt's ranks");
    let mut text = vec![0; len as usize];
    stream.read_exact(&mut text).map_err(ended)?;
    Ok(String::from_utf8(text)?)
}

/// Name of this machine.
fn host_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if name.is_empty() { IpAddr::from([127, 0, 0, 1]).to_string() } else { name.replace(['\t', '\n'], " ") }
}

#[cfg(test)]
mod tests;
