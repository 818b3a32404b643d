//! All ranks of a run.

use crate::environment::{Launch, launch};
use crate::flights::Exchanged;
use crate::group::Group;
use crate::label::{Label, Operation};
use crate::left::Left;
use crate::lost::Lost;
use crate::meeting::{BrokenOff, Meeting};
use crate::mpi::Mpi;
use crate::reactor::{Command, Limits, Reactor};
use crate::tcp::Tcp;
use crate::trace::Trace;
use crate::transport::{Transport, Waker};
use crate::watcher::Watcher;
use anyhow::{Context, Result, anyhow};
use ferropt_device::Departure;
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How to join the others.
#[derive(Clone, Copy, Debug)]
pub struct Join {
    /// Without a sign of life from a rank for so long, it is given up.
    pub timeout: Duration,
    /// A rank that lives, but does not do what this one waits for, is given up after so long.
    pub patience: Duration,
    /// How long to wait for all ranks to be there at first.
    pub meeting: Duration,
}

impl Default for Join {
    fn default() -> Self {
        Join {
            timeout: Duration::from_secs(120),
            patience: Duration::from_secs(1800),
            meeting: Duration::from_secs(300),
        }
    }
}

/// What this rank has sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// In which group.
    pub group: &'static str,
    /// By which operation.
    pub operation: Operation,
    /// Bytes that this rank has sent.
    pub bytes: u64,
    /// How often.
    pub calls: u64,
}

/// This process among all ranks of a run. Clones are the same; when the last one is dropped, this rank says goodbye.
#[derive(Clone)]
pub struct World(Arc<Inner>);

/// Bytes sent and calls, by group and operation.
type Counts = BTreeMap<(&'static str, Operation), (u64, u64)>;

struct Inner {
    rank: usize,
    size: usize,
    /// Name of the transport, and of this host.
    transport: String,
    thread: Option<Thread>,
    /// Started with the first exchange between devices. It ends after the reactor, which waits for what is under way.
    watcher: Mutex<Option<Watcher>>,
    traffic: Mutex<Counts>,
    trace: Trace,
    /// Why nothing works any more.
    failed: Arc<OnceLock<Lost>>,
    /// Given back last, when no other thread has any of it.
    left: Left,
}

/// The reactor.
struct Thread {
    commands: Option<Sender<Command>>,
    waker: Waker,
    handle: Option<JoinHandle<()>>,
}

impl World {
    /// One rank, which has everything: no thread, no connection, and every operation is the identity.
    pub fn solo() -> World {
        World(Arc::new(Inner {
            rank: 0,
            size: 1,
            transport: "alone".into(),
            thread: None,
            watcher: Mutex::default(),
            traffic: Mutex::default(),
            trace: Trace::default(),
            failed: Arc::default(),
            left: Left::default(),
        }))
    }

    /// Joins the other ranks, as the environment says: started by `mpirun` over MPI; with RANK, WORLD_SIZE, MASTER_ADDR and
    /// MASTER_PORT, as torchrun and Kubernetes set them, or by `srun`, over TCP. Alone if it says nothing.
    ///
    /// # Errors
    /// When variables contradict each other, a rank does not come in time, or MPI cannot be loaded.
    pub fn join(options: Join) -> Result<World> {
        World::join_unless(|| false, options)?
            .context("nobody stopped the ranks from meeting, and they did not meet")
    }

    /// [`World::join`], unless it is `stopped` before all ranks are there. Over MPI it is not: its library has no way to.
    ///
    /// # Errors
    /// As there.
    pub fn join_unless(stopped: impl Fn() -> bool + Send + 'static, options: Join) -> Result<Option<World>> {
        let joined = match launch(&|name| std::env::var(name).ok())? {
            Launch::Solo => Ok(World::solo()),
            Launch::Mpi { told } => World::start(options, move || {
                let mpi = Mpi::load(told)?;
                Ok((mpi.rank(), mpi.size(), Box::new(mpi)))
            }),
            Launch::Tcp { rank, size, address, port, token } => {
                let meeting = Meeting { rank, size, address, port, token, deadline: options.meeting };
                World::start(options, move || Ok((rank, size, Box::new(Tcp::meet(&meeting, &stopped)?))))
            }
        };
        match joined {
            Err(error) if error.is::<BrokenOff>() => Ok(None),
            joined => joined.map(Some),
        }
    }

    /// Which rank this process will be, and of how many, as far as the environment says it before they meet; MPI's library is
    /// asked then.
    ///
    /// # Errors
    /// When variables contradict each other.
    pub fn foreseen() -> Result<Option<(usize, usize)>> {
        Ok(match launch(&|name| std::env::var(name).ok())? {
            Launch::Solo => Some((0, 1)),
            Launch::Mpi { .. } => None,
            Launch::Tcp { rank, size, .. } => Some((rank, size)),
        })
    }

    /// Ranks that are threads of this process, over TCP: for tests.
    ///
    /// # Errors
    /// When the system gives no port or thread.
    pub fn local(ranks: usize) -> Result<Vec<World>> {
        World::local_with(ranks, Join::default())
    }

    /// [`World::local`], with limits.
    ///
    /// # Errors
    /// As there.
    pub fn local_with(ranks: usize, options: Join) -> Result<Vec<World>> {
        if ranks == 1 {
            return Ok(vec![World::solo()]);
        }
        let listener = TcpListener::bind("127.0.0.1:0").context("no port for the ranks to meet at")?;
        let port = listener.local_addr()?.port();
        let mut listener = Some(listener);
        let meeting = |rank| Meeting {
            rank,
            size: ranks,
            address: "127.0.0.1".into(),
            port,
            token: format!("local {}", std::process::id()),
            deadline: options.meeting,
        };
        std::thread::scope(|scope| {
            let join = |rank: usize| {
                let listener = listener.take();
                let meeting = meeting(rank);
                scope.spawn(move || {
                    World::start(options, move || {
                        Ok((rank, ranks, Box::new(Tcp::meet_at(&meeting, listener)?)))
                    })
                })
            };
            let joining: Vec<_> = (0..ranks).map(join).collect();
            joining.into_iter().map(|rank| rank.join().map_err(|_| anyhow!("a rank died"))?).collect()
        })
    }

    /// Starts the thread, which makes the transport: MPI wants to be started and ended by the same one.
    fn start<F>(options: Join, make: F) -> Result<World>
    where
        F: FnOnce() -> Result<(usize, usize, Box<dyn Transport>)> + Send + 'static,
    {
        let (commands, inbox) = channel();
        let (made, ready) = channel();
        let (trace, failed) = (Trace::default(), Arc::<OnceLock<Lost>>::default());
        let left = Left::default();
        let (recorder, failing, leaving) = (trace.clone(), failed.clone(), left.clone());
        let limits = Limits { silence: options.timeout, patience: options.patience };
        let body = move || {
            let (rank, size, transport) = match make() {
                Ok(made) => made,
                // Whoever waits for it has not gone.
                Err(error) => return drop(made.send(Err(error))),
            };
            let name = match transport.host(rank) {
                "" => format!("over {}", transport.name()),
                host => format!("on {host}, over {}", transport.name()),
            };
            let _ = made.send(Ok((rank, size, transport.waker(), name)));
            Reactor::new(rank, size, transport, inbox, limits, recorder, leaving, failing).run();
        };
        let handle = std::thread::Builder::new()
            .name("ranks".into())
            .spawn(body)
            .context("cannot start the thread that talks to the other ranks")?;
        let (rank, size, waker, transport) = ready.recv().map_err(thread_has_died)??;
        let thread = Some(Thread { commands: Some(commands), waker, handle: Some(handle) });
        let (traffic, watcher) = (Mutex::default(), Mutex::default());
        Ok(World(Arc::new(Inner { rank, size, transport, thread, watcher, traffic, trace, failed, left })))
    }

    /// Number of this rank.
    pub fn rank(&self) -> usize {
        self.0.rank
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.0.size
    }

    /// "rank 3 of 8 on host, over TCP"
    pub fn describe(&self) -> String {
        format!("rank {} of {} {}", self.0.rank, self.0.size, self.0.transport)
    }

    /// Some of the ranks, among them this one, in the same order on all of them.
    ///
    /// # Errors
    /// When a rank is listed twice or does not exist, or this one is not listed.
    pub fn group(&self, members: &[usize], name: &'static str) -> Result<Group> {
        Group::new(self, members, name)
    }

    /// What this rank has sent since the last call of [`World::reset_traffic`], by group and operation.
    pub fn traffic(&self) -> Vec<Traffic> {
        let traffic = self.0.traffic.lock().unwrap_or_else(PoisonError::into_inner);
        let line = |(&(group, operation), &(bytes, calls)): (&(&'static str, Operation), &(u64, u64))| {
            Traffic { group, operation, bytes, calls }
        };
        traffic.iter().map(line).collect()
    }

    /// Counts from zero again.
    pub fn reset_traffic(&self) {
        self.0.traffic.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// When this rank computed and communicated.
    pub fn trace(&self) -> &Trace {
        &self.0.trace
    }

    /// Tells what this rank does: the others say it when they miss it.
    pub fn beat(&self, doing: Label) {
        self.give_back();
        // Of a rank that is failing, nobody needs to know.
        let _ = self.command(Command::Beat(doing));
    }

    /// Gives up, and ends with an exit status: every operation of every rank ends with this reason, and tells this status.
    pub fn abandon(&self, reason: &str, status: u8) {
        // If the thread is gone, so are the connections, which says it as well.
        let _ = self.command(Command::Abandon(Lost::chosen(reason.into(), status)));
    }

    /// Says, whenever it is called, why nothing works any more, if nothing does.
    pub fn lost(&self) -> impl Fn() -> Option<Lost> + Send + Sync + use<> {
        let failed = self.0.failed.clone();
        move || failed.get().cloned()
    }

    pub(crate) fn count(&self, group: &'static str, operation: Operation, bytes: u64) {
        let mut traffic = self.0.traffic.lock().unwrap_or_else(PoisonError::into_inner);
        let (sum, calls) = traffic.entry((group, operation)).or_default();
        *sum += bytes;
        *calls += 1;
    }

    /// Gives back what nobody waited for, if it is over. Callers of operations do it, see [`Left`].
    pub(crate) fn give_back(&self) {
        self.0.left.give_back();
    }

    /// Starts exchanges between devices, which are watched over until they end.
    pub(crate) fn depart(&self, departure: Departure<'_>, exchanged: Exchanged) -> Result<()> {
        let Inner { watcher, trace, left, .. } = &*self.0;
        let watcher = || watcher.lock().unwrap_or_else(PoisonError::into_inner);
        // Before they start: what is under way must not go unwatched.
        if let none @ None = &mut *watcher() {
            *none = Some(Watcher::start(trace.clone(), left.clone())?);
        }
        let (watch, exchanged) = (departure.start()?, Arc::new(exchanged));
        if let Some(watcher) = &*watcher() {
            watcher.watch(watch, exchanged.clone())?;
        }
        self.command(Command::Exchanged(exchanged))
    }

    /// Whether all is well.
    ///
    /// # Errors
    /// Why it is not: a rank is lost, or somebody gave up.
    pub(crate) fn alive(&self) -> Result<()> {
        match self.0.failed.get() {
            None => Ok(()),
            Some(lost) => Err(lost.clone().into()),
        }
    }

    pub(crate) fn command(&self, command: Command) -> Result<()> {
        let Some(Thread { commands: Some(commands), waker, .. }) = &self.0.thread else { return Ok(()) };
        commands.send(command).map_err(thread_has_died)?;
        waker();
        Ok(())
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.commands = None;
        (self.waker)();
        if let Some(handle) = self.handle.take() {
            // It finishes what is under way, and says goodbye; if it has died there is nothing left to do.
            let _ = handle.join();
        }
    }
}

/// What is left to say when the thread of the transport has gone away without a message.
pub(crate) fn thread_has_died<E>(_: E) -> anyhow::Error {
    anyhow!("the thread that talks to the other ranks has died")
}
