//! The thread that moves bytes: it owns the transport and the memory of operations under way, posts all their transfers at
//! once, and watches over the other ranks. It waits for no device, because it is who ends what devices wait for when a rank is
//! lost: memory that it has is [at rest](ferropt_device::AtRest), and it gives none back to a device.

use crate::flights::{Exchanged, Flights};
use crate::frame::{HEADER, Header, Kind};
use crate::group::LARGEST_GATHERED;
use crate::label::{Label, Operation};
use crate::left::Left;
use crate::lost::{LONGEST_REASON, Lost};
use crate::trace::Trace;
use crate::transport::Transport;
use anyhow::{Error, anyhow};
use ferropt_device::{DType, Link};
use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::io::ErrorKind;
use std::ops::Range;
use std::sync::mpsc::{Receiver, SendError, Sender, TryRecvError};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

/// How often ranks say that they live.
const BEAT: Duration = Duration::from_secs(1);
/// A rank that has not looked around for so long was stopped, or had no processor.
const STANDSTILL: Duration = Duration::from_secs(3);
/// How long a rank that ends waits for its last transfers.
const FAREWELL: Duration = Duration::from_secs(10);
/// Payloads up to this many bytes travel with their header.
const SMALL: usize = 4096;

/// Memory of an operation.
pub(crate) trait Memory: Send {
    fn bytes(&self) -> &[u8];
    fn bytes_mut(&mut self) -> &mut [u8];
    /// To be given back.
    fn into_any(self: Box<Self>) -> Box<dyn Any + Send>;
}

/// Bytes that were received apart, aligned for any element.
#[derive(Default)]
pub(crate) struct Piece {
    words: Vec<u64>,
    len: usize,
}

impl Piece {
    fn resize(&mut self, len: usize) {
        self.words.resize(len.div_ceil(8), 0);
        self.len = len;
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len]
    }
}

/// Where a received payload goes.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// To these bytes of the memory.
    Memory(Range<usize>),
    /// To a piece of its own, of so many bytes, or as many as come.
    Piece(usize, Option<usize>),
}

/// An operation to be done.
pub(crate) struct Job {
    pub(crate) operation: Operation,
    pub(crate) group: &'static str,
    pub(crate) label: Label,
    /// Type of the memory's elements; none of plain bytes.
    pub(crate) dtype: Option<DType>,
    pub(crate) memory: Box<dyn Memory>,
    /// Ranks of the world, and which bytes of the memory they get.
    pub(crate) sends: Vec<(usize, Range<usize>)>,
    /// Ranks of the world, and where what they send goes.
    pub(crate) receives: Vec<(usize, Place)>,
    /// Whether ranks that live are waited for as long as it takes.
    pub(crate) whenever: bool,
    /// Told of the end.
    pub(crate) done: Sender<Result<Finished, Failed>>,
}

/// An operation's memory and pieces, after the last transfer.
pub(crate) struct Finished {
    pub(crate) memory: Box<dyn Memory>,
    pub(crate) pieces: Vec<Piece>,
}

/// Why an operation did not end well, and its memory, which whoever asked gives back, unless a part of it is still being sent.
pub(crate) struct Failed {
    why: Lost,
    memory: Option<Box<dyn Memory>>,
}

impl Failed {
    /// Gives the memory back, on this thread.
    pub(crate) fn into_lost(self) -> Lost {
        drop(self.memory);
        self.why
    }
}

/// What the thread is told.
pub(crate) enum Command {
    Post(Job),
    /// Devices of some ranks are linked.
    Open(Weak<dyn Link>),
    /// They exchange something.
    Exchanged(Arc<Exchanged>),
    /// What this rank does.
    Beat(Label),
    /// This rank gives up.
    Abandon(Lost),
}

/// How long others may be silent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Without a sign of life.
    pub(crate) silence: Duration,
    /// Alive, but without what this rank waits for.
    pub(crate) patience: Duration,
}

struct Active {
    job: Job,
    pieces: Vec<Piece>,
    /// Transfers to go.
    left: usize,
    posted: Instant,
}

struct Outgoing {
    /// Header, and the payload if it is small.
    head: Vec<u8>,
    /// Larger payload: of which job, and which bytes of its memory.
    rest: Option<Range<usize>>,
    job: Option<u64>,
    sent: usize,
}

struct Incoming {
    header: Header,
    any_length: bool,
    whenever: bool,
    place: Place,
    job: u64,
    posted: Instant,
}

/// What is being read.
enum Reading {
    Header {
        bytes: [u8; HEADER],
        got: usize,
    },
    /// A payload that nobody has asked for yet; the transport keeps it.
    Unasked(Header),
    Payload {
        job: u64,
        place: Place,
        got: usize,
    },
    Reason {
        bytes: Vec<u8>,
        got: usize,
    },
}

impl Reading {
    const START: Reading = Reading::Header { bytes: [0; HEADER], got: 0 };
}

struct Peer {
    out: VecDeque<Outgoing>,
    incoming: VecDeque<Incoming>,
    reading: Reading,
    /// When it last sent anything, what it said that it does, and for which rank it waits.
    heard: Instant,
    doing: String,
    waits: Option<usize>,
    /// It has said goodbye, or hung up.
    gone: bool,
}

pub(crate) struct Reactor {
    rank: usize,
    transport: Box<dyn Transport>,
    commands: Receiver<Command>,
    peers: Vec<Peer>,
    jobs: HashMap<u64, Active>,
    /// Memory of jobs that have failed when a frame of theirs was half sent.
    half_sent: HashMap<u64, Box<dyn Memory>>,
    next_job: u64,
    flights: Flights,
    doing: String,
    limits: Limits,
    trace: Trace,
    left: Left,
    /// Why nothing works any more.
    failed: Arc<OnceLock<Lost>>,
    /// How long all of this process has stood still, as a whole job does that is suspended.
    asleep: Duration,
}

impl Reactor {
    pub(crate) fn new(
        rank: usize,
        size: usize,
        transport: Box<dyn Transport>,
        commands: Receiver<Command>,
        limits: Limits,
        trace: Trace,
        left: Left,
        failed: Arc<OnceLock<Lost>>,
    ) -> Reactor {
        let peer = |_| Peer {
            out: VecDeque::new(),
            incoming: VecDeque::new(),
            reading: Reading::START,
            heard: Instant::now(),
            doing: String::new(),
            waits: None,
            gone: false,
        };
        Reactor {
            rank,
            transport,
            commands,
            peers: (0..size).map(peer).collect(),
            jobs: HashMap::new(),
            half_sent: HashMap::new(),
            next_job: 0,
            flights: Flights::default(),
            doing: String::new(),
            limits,
            trace,
            left,
            failed,
            asleep: Duration::ZERO,
        }
    }

    /// Works until nobody can give commands any more.
    pub(crate) fn run(mut self) {
        let mut beat = Instant::now();
        let mut closing = None;
        loop {
            let open = self.take_commands();
            if !open && closing.is_none() {
                closing = Some(Instant::now());
            }
            let moved = self.move_bytes();
            self.flights.settle();
            let now = Instant::now();
            if let Some(since) = closing {
                // A rank that is lost hears nothing any more; the others are to hear why this one ends.
                let lost = self.failed.get().and_then(Lost::rank);
                let mut others = self.others().filter(|rank| Some(*rank) != lost);
                let sent = others.all(|rank| self.peers[rank].out.is_empty());
                let done = self.has_failed() || self.jobs.is_empty() && self.flights.is_empty();
                if sent && done || now - since > FAREWELL {
                    self.part();
                    self.flights.part(FAREWELL);
                    self.left.leave(std::mem::take(&mut self.half_sent));
                    return self.transport.close(!self.has_failed());
                }
            }
            if now - beat >= BEAT {
                if now - beat > STANDSTILL {
                    self.wake(now, now - beat);
                }
                beat = now;
                self.look_around(now);
            }
            if !moved {
                let reads: Vec<usize> = self.others().filter(|rank| self.wants_to_read(*rank)).collect();
                let writes: Vec<usize> =
                    self.others().filter(|rank| !self.peers[*rank].out.is_empty()).collect();
                let at_most = if closing.is_some() { BEAT / 20 } else { BEAT.saturating_sub(now - beat) };
                if let Err(error) = self.transport.wait(&reads, &writes, at_most) {
                    self.fail(Lost::new(format!("the connections to the other ranks failed: {error}")));
                }
            }
        }
    }

    fn has_failed(&self) -> bool {
        self.failed.get().is_some()
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.peers.len()).filter(move |other| *other != rank)
    }

    fn wants_to_read(&self, rank: usize) -> bool {
        let peer = &self.peers[rank];
        let unasked = matches!(peer.reading, Reading::Unasked(_)) && peer.incoming.is_empty();
        !peer.gone && (!unasked || self.has_failed())
    }

    /// False when nobody can give commands any more.
    fn take_commands(&mut self) -> bool {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Post(job)) => self.post(job),
                Ok(Command::Open(link)) => {
                    self.flights.open(link);
                    if self.has_failed() {
                        self.flights.abort();
                    }
                }
                Ok(Command::Exchanged(exchanged)) => self.flights.start(exchanged),
                Ok(Command::Beat(label)) => self.doing = label.to_string(),
                Ok(Command::Abandon(reason)) => self.fail(reason),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn post(&mut self, job: Job) {
        if let Some(reason) = self.failed.get() {
            return self.tell(&job.done, Err(Failed { why: reason.clone(), memory: Some(job.memory) }));
        }
        let id = self.next_job;
        self.next_job += 1;
        let now = Instant::now();
        for (to, range) in &job.sends {
            let header = Header::data(job.operation, job.group, job.label, job.dtype, range.len());
            let mut head = header.to_bytes().to_vec();
            let small = range.len() <= SMALL;
            if small {
                head.extend_from_slice(&job.memory.bytes()[range.clone()]);
            }
            let rest = (!small).then(|| range.clone());
            self.peers[*to].out.push_back(Outgoing { head, rest, job: Some(id), sent: 0 });
        }
        for (from, place) in &job.receives {
            let len = match place {
                Place::Memory(range) => Some(range.len()),
                Place::Piece(_, len) => *len,
            };
            let header = Header::data(job.operation, job.group, job.label, job.dtype, len.unwrap_or(0));
            self.peers[*from].incoming.push_back(Incoming {
                header,
                any_length: len.is_none(),
                whenever: job.whenever,
                place: place.clone(),
                job: id,
                posted: now,
            });
        }
        let pieces = job.receives.iter().filter(|(_, place)| matches!(place, Place::Piece(..))).count();
        let pieces = (0..pieces).map(|_| Piece::default()).collect();
        let left = job.sends.len() + job.receives.len();
        let lost = job.receives.iter().map(|(rank, _)| *rank).find(|rank| self.peers[*rank].gone);
        let what = format!("the {} of {}", job.operation, job.label);
        self.jobs.insert(id, Active { job, pieces, left, posted: now });
        if let Some(rank) = lost {
            self.fail(Lost::of(rank, format!("{} has ended, and {what} waits for it", self.name(rank))));
        }
    }

    /// Whether anything moved.
    fn move_bytes(&mut self) -> bool {
        let mut moved = false;
        for rank in self.others() {
            loop {
                // What a rank that is gone has sent before is read before writing to it fails.
                match self.receive_some(rank).and_then(|got| Ok(got | self.send_some(rank)?)) {
                    Ok(true) => moved = true,
                    Ok(false) => break,
                    Err(error) => {
                        self.lost(rank, &error);
                        break;
                    }
                }
            }
        }
        moved
    }

    fn send_some(&mut self, rank: usize) -> Result<bool, Error> {
        let Some(out) = self.peers[rank].out.front_mut() else { return Ok(false) };
        let head = out.head.len();
        let rest = out.rest.clone().unwrap_or(0..0);
        let memory = |job| match self.jobs.get(&job) {
            Some(active) => Some(&active.job.memory),
            None => self.half_sent.get(&job),
        };
        let bytes = match (out.sent.checked_sub(head), out.job.and_then(memory)) {
            (None, _) => &out.head[out.sent..],
            (Some(sent), Some(memory)) => &memory.bytes()[rest.start + sent..rest.end],
            (Some(_), None) => &[],
        };
        let sent = if bytes.is_empty() { 0 } else { self.transport.write(rank, bytes)? };
        out.sent += sent;
        if out.sent == head + rest.len() {
            let job = out.job;
            self.peers[rank].out.pop_front();
            job.into_iter().for_each(|job| self.transferred(job));
            return Ok(true);
        }
        Ok(sent > 0)
    }

    fn receive_some(&mut self, rank: usize) -> Result<bool, Error> {
        let failed = self.has_failed();
        let peer = &mut self.peers[rank];
        if peer.gone {
            return Ok(false);
        }
        if failed {
            // Of no use any more, but while it is not read the other one cannot say why it ends.
            return Ok(self.transport.read(rank, &mut [0; 1 << 16])? > 0);
        }
        let got = match &mut peer.reading {
            Reading::Header { bytes, got } => {
                let more = self.transport.read(rank, &mut bytes[*got..])?;
                *got += more;
                if *got == HEADER {
                    let header = Header::from_bytes(bytes);
                    let header = header.ok_or_else(|| anyhow!("it sent something that is no frame"))?;
                    peer.heard = Instant::now();
                    self.begin(rank, header)?;
                }
                more
            }
            Reading::Unasked(header) => {
                if peer.incoming.is_empty() {
                    return Ok(false);
                }
                let header = header.clone();
                self.begin(rank, header)?;
                return Ok(true);
            }
            Reading::Payload { job, place, got } => {
                let (job, active) = (*job, self.jobs.get_mut(job));
                let into = match (place, active) {
                    (Place::Memory(range), Some(active)) => &mut active.job.memory.bytes_mut()[range.clone()],
                    (Place::Piece(index, _), Some(active)) => active.pieces[*index].bytes_mut(),
                    (_, None) => &mut [],
                };
                let more = if *got < into.len() { self.transport.read(rank, &mut into[*got..])? } else { 0 };
                *got += more;
                if more > 0 {
                    peer.heard = Instant::now();
                }
                if *got == into.len() {
                    peer.reading = Reading::START;
                    self.transferred(job);
                    return Ok(true);
                }
                more
            }
            Reading::Reason { bytes, got } => {
                let more = self.transport.read(rank, &mut bytes[*got..])?;
                *got += more;
                if *got == bytes.len() {
                    let told = Lost::from_bytes(bytes);
                    peer.gone = true;
                    let name = self.name(rank);
                    self.fail(told.retold(|reason| format!("{name} gave up: {reason}")));
                    return Ok(true);
                }
                more
            }
        };
        Ok(got > 0)
    }

    /// A header has come.
    fn begin(&mut self, rank: usize, header: Header) -> Result<(), Error> {
        let known = self.peers.len();
        let peer = &mut self.peers[rank];
        match header.kind {
            Kind::Beat => {
                peer.doing = header.label;
                peer.waits = header.group.parse().ok().filter(|rank| *rank < known);
                peer.reading = Reading::START;
            }
            Kind::Bye => {
                peer.gone = true;
                peer.reading = Reading::START;
                if let Some(incoming) = peer.incoming.front() {
                    let waits = format!("this rank waits for {}", incoming.header.describe());
                    self.fail(Lost::of(rank, format!("{} has ended its work, but {waits}", self.name(rank))));
                }
            }
            Kind::Abandon => {
                let bytes = vec![0; header.len.min(LONGEST_REASON as u64) as usize];
                peer.reading = Reading::Reason { bytes, got: 0 };
            }
            Kind::Data(_) => {
                let Some(incoming) = peer.incoming.pop_front() else {
                    peer.reading = Reading::Unasked(header);
                    return Ok(());
                };
                let Incoming { header: expected, any_length, place, job, .. } = incoming;
                let same = Header { len: expected.len, ..header.clone() } == expected
                    && (any_length || header.len == expected.len);
                if !same {
                    return Err(anyhow!(
                        "it sends {}, but this rank expects {}: the two have different configurations or programs",
                        header.describe(),
                        expected.describe()
                    ));
                }
                if let (Place::Piece(index, _), Some(active)) = (&place, self.jobs.get_mut(&job)) {
                    // What others announce is believed up to what this rank could expect.
                    if header.len > LARGEST_GATHERED && any_length {
                        return Err(anyhow!("it sends {}, which is too much", header.describe()));
                    }
                    active.pieces[*index].resize(header.len as usize);
                }
                peer.reading = Reading::Payload { job, place, got: 0 };
            }
        }
        Ok(())
    }

    /// A transfer of a job is done.
    fn transferred(&mut self, id: u64) {
        let Some(active) = self.jobs.get_mut(&id) else { return };
        active.left -= 1;
        if active.left == 0
            && let Some(Active { job, pieces, posted, .. }) = self.jobs.remove(&id)
        {
            let bytes = job.sends.iter().map(|(_, range)| range.len()).sum();
            self.trace.communication(job.operation, job.group, job.label, bytes, posted);
            self.tell(&job.done, Ok(Finished { memory: job.memory, pieces }));
        }
    }

    /// Tells whoever asked, who may not care any more.
    fn tell(&self, done: &Sender<Result<Finished, Failed>>, end: Result<Finished, Failed>) {
        if let Err(SendError(end)) = done.send(end) {
            self.left.leave(end);
        }
    }

    fn name(&self, rank: usize) -> String {
        let mut known = Vec::new();
        match self.transport.host(rank) {
            "" => {}
            host => known.push(format!("on {host}")),
        }
        match &self.peers[rank].doing {
            doing if doing.is_empty() => {}
            doing => known.push(format!("last heard of at {doing}")),
        }
        if known.is_empty() { format!("rank {rank}") } else { format!("rank {rank} ({})", known.join(", ")) }
    }

    fn lost(&mut self, rank: usize, error: &Error) {
        let ended = |error: &std::io::Error| {
            matches!(
                error.kind(),
                ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
            )
        };
        let name = self.name(rank);
        let waits = match self.waits_for(rank) {
            Some(what) => format!("; this rank waits for {what}"),
            None => String::new(),
        };
        let broken = error.downcast_ref::<std::io::Error>();
        self.fail(match broken.is_some_and(ended) {
            true => Lost::of(rank, format!("{name} is gone: its process has ended{waits}")),
            false => Lost::new(format!("{name} is lost: {error:#}{waits}")),
        });
        // One that is there, but talks of something else, is told.
        if broken.is_some() {
            self.peers[rank].gone = true;
            self.peers[rank].out.clear();
        }
    }

    /// What this rank waits for from another.
    fn waits_for(&self, rank: usize) -> Option<String> {
        let peer = &self.peers[rank];
        if let Reading::Payload { job, .. } = &peer.reading
            && let Some(active) = self.jobs.get(job)
        {
            return Some(format!("the {} of {}", active.job.operation, active.job.label));
        }
        let posted = peer.incoming.front().map(|incoming| incoming.header.describe());
        posted.or_else(|| self.flights.waits_for(rank))
    }

    /// The rank that this one has waited for longest, of those that are not waited for as long as it takes.
    fn awaited(&self) -> Option<usize> {
        let posted = |rank: usize| {
            let first = self.peers[rank].incoming.front().filter(|incoming| !incoming.whenever);
            Some((first?.posted, rank))
        };
        self.others().filter_map(posted).min().map(|(_, rank)| rank)
    }

    /// Whom a rank waits for, as far as ranks have said, if that is neither itself nor this one: one that waits for nobody.
    fn behind(&self, rank: usize) -> Option<usize> {
        let mut last = rank;
        // Ranks may also wait for each other.
        for _ in 0..self.peers.len() {
            match self.peers[last].waits {
                None => return Some(last).filter(|last| *last != rank),
                Some(next) if next == self.rank => return None,
                Some(next) => last = next,
            }
        }
        None
    }

    /// This process has stood still for so long that it may itself have been stopped, and the others with it. What they were
    /// late for meanwhile does not count.
    fn wake(&mut self, now: Instant, still: Duration) {
        self.asleep += still;
        for peer in &mut self.peers {
            peer.heard = now;
            peer.incoming.iter_mut().for_each(|incoming| incoming.posted = now);
        }
    }

    /// Says that this rank lives, and looks for those that do not.
    fn look_around(&mut self, now: Instant) {
        let beat = Header::beat(&self.doing, self.awaited()).to_bytes();
        for rank in self.others() {
            if self.has_failed() {
                return;
            }
            let peer = &mut self.peers[rank];
            if peer.gone {
                self.miss(rank, now);
                continue;
            }
            if peer.out.is_empty() {
                peer.out.push_back(Outgoing { head: beat.to_vec(), rest: None, job: None, sent: 0 });
            }
            // What is not read cannot be heard.
            let unasked = matches!(peer.reading, Reading::Unasked(_));
            let silent = now.saturating_duration_since(peer.heard);
            let waits = peer.incoming.front().filter(|incoming| !incoming.whenever);
            let waited = waits.map(|incoming| now.saturating_duration_since(incoming.posted));
            let seconds = |time: Duration| format!("{:.0} s", time.as_secs_f64());
            if silent > self.limits.silence && !unasked {
                let waits = self.waits_for(rank).map(|what| format!("; this rank waits for {what}"));
                let (name, waits) = (self.name(rank), waits.unwrap_or_default());
                self.fail(Lost::of(rank, format!("{name} has not answered for {}{waits}", seconds(silent))));
            } else if waited.is_some_and(|waited| waited > self.limits.patience) {
                let what = self.waits_for(rank).unwrap_or_default();
                let waited = seconds(waited.unwrap_or_default());
                let behind = self.behind(rank);
                let why = behind.map_or_else(String::new, |behind| {
                    format!("; that one waits too, in the end for {}", self.name(behind))
                });
                self.fail(Lost::of(
                    behind.unwrap_or(rank),
                    format!("{} is alive, but for {waited} this rank waits for {what}{why}", self.name(rank)),
                ));
            }
        }
        if let Some(trouble) = self.flights.trouble(now, self.limits.patience.saturating_add(self.asleep)) {
            self.fail(Lost::new(trouble));
        }
    }

    /// Looks for exchanges between devices that wait for a rank that has ended its work. What it has sent before may still be on
    /// its way.
    fn miss(&mut self, rank: usize, now: Instant) {
        let silent = now.saturating_duration_since(self.peers[rank].heard);
        if silent > FAREWELL
            && let Some(what) = self.flights.waits_for(rank)
        {
            let name = self.name(rank);
            self.fail(Lost::of(rank, format!("{name} has ended its work, but this rank waits for {what}")));
        }
    }

    /// From now on every operation ends in this error, here and on the other ranks.
    fn fail(&mut self, reason: Lost) {
        // Known before anything ends, so that nobody takes what an aborted exchange left for a result.
        if self.failed.set(reason.clone()).is_err() {
            return;
        }
        self.flights.abort();
        let text = reason.to_bytes();
        let mut head = Header::control(Kind::Abandon, &self.doing, text.len()).to_bytes().to_vec();
        head.extend_from_slice(&text);
        for rank in self.others() {
            let peer = &mut self.peers[rank];
            peer.incoming.clear();
            // A frame that is half sent comes to its end, or no other could follow.
            let half_sent = peer.out.front().is_some_and(|out| out.sent > 0 && !peer.gone);
            peer.out.truncate(usize::from(half_sent));
            if !peer.gone {
                peer.out.push_back(Outgoing { head: head.clone(), rest: None, job: None, sent: 0 });
            }
        }
        for (id, Active { job, .. }) in std::mem::take(&mut self.jobs) {
            let sends = |peer: &Peer| peer.out.front().is_some_and(|out| out.job == Some(id));
            let memory = if self.peers.iter().any(sends) {
                self.half_sent.insert(id, job.memory);
                None
            } else {
                Some(job.memory)
            };
            self.tell(&job.done, Err(Failed { why: reason.clone(), memory }));
        }
    }

    /// Says goodbye, and waits a moment until that is on its way.
    fn part(&mut self) {
        let bye = Header::control(Kind::Bye, &self.doing, 0).to_bytes().to_vec();
        let others: Vec<usize> = self.others().filter(|rank| !self.peers[*rank].gone).collect();
        let failed = self.has_failed();
        for rank in &others {
            let peer = &mut self.peers[*rank];
            if !failed && peer.out.is_empty() {
                peer.out.push_back(Outgoing { head: bye.clone(), rest: None, job: None, sent: 0 });
            }
        }
        let started = Instant::now();
        loop {
            let mut left = Vec::new();
            for &rank in &others {
                // Errors are those of ranks that are gone already.
                while self.send_some(rank).is_ok_and(|moved| moved) {}
                if !self.peers[rank].out.is_empty() {
                    left.push(rank);
                }
            }
            if left.is_empty() || started.elapsed() > BEAT {
                return;
            }
            // If waiting fails, so does what is waited for.
            let _ = self.transport.wait(&[], &left, BEAT / 20);
        }
    }
}

#[cfg(test)]
mod tests;
