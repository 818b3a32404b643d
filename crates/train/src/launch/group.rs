//! One start of all ranks of a run on this machine.

use super::output::{Relay, log_file};
use super::{AGAIN, LAUNCHER, cores};
use crate::signals::Stop;
use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsString;
use std::fmt;
use std::io::PipeWriter;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// How often the ranks are looked at.
const PACE: Duration = Duration::from_millis(20);
/// Where they have not been for so long, this process was stopped itself, as a whole job is that is suspended.
const STANDSTILL: Duration = Duration::from_secs(3);

/// N processes of one program.
#[derive(Clone, Debug)]
pub struct Group {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// How many processes; `None` for one that is told of no ranks.
    pub ranks: Option<usize>,
    /// Threads of each, where the configuration says so; they decide the cores that it gets.
    pub threads: Option<usize>,
    /// Folder of the logs of all ranks but the first, whose output is shown as it is.
    pub logs: PathBuf,
    /// How long ranks may take to end when they are asked to, before they are killed.
    pub grace: Duration,
    /// How long a process may be stopped (SIGSTOP) before it counts as hanging.
    pub hang: Duration,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With a status.
    Status(i32),
    /// By a signal.
    Signal(i32),
    /// It was stopped, and was killed for it.
    Hung,
    /// It could not be started.
    NotStarted,
}

/// The first rank that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Its number.
    pub rank: usize,
    /// How it ended.
    pub end: End,
    /// The error that it printed; the first rank's is on the terminal already.
    pub error: String,
}

impl End {
    /// Whether starting again may help.
    pub fn may_start_again(self) -> bool {
        match self {
            // 101 is what a Rust program panics with.
            End::Status(status) => status == i32::from(AGAIN) || status == 101,
            End::Signal(_) | End::Hung | End::NotStarted => true,
        }
    }

    /// The status to end with, if this decides it.
    pub fn status(self) -> u8 {
        match self {
            End::Status(status) => u8::try_from(status).unwrap_or(super::WRONG),
            End::Signal(_) | End::Hung | End::NotStarted => AGAIN,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            End::Status(status) if status == i32::from(AGAIN) => {
                write!(f, "ended and wants to be started again (status {status})")
            }
            End::Status(status) => write!(f, "ended with status {status}"),
            End::Signal(9) => f.write_str("was killed (SIGKILL), perhaps for want of memory"),
            End::Signal(signal) => write!(f, "was killed by signal {signal}"),
            End::Hung => f.write_str("was stopped for too long and has been killed"),
            End::NotStarted => f.write_str("could not be started"),
        }
    }
}

/// A process that was started.
struct Rank {
    child: Child,
    relay: Option<Relay>,
    end: Option<End>,
    /// Since when it has been stopped.
    stopped: Option<Instant>,
}

impl Group {
    /// Starts all ranks and waits for all of them. When one fails, the others are asked to end, and killed if they do
    /// not. A `stop` is passed on to all of them.
    ///
    /// # Errors
    /// When the system gives no port or no pipe, or a log cannot be written; no rank is started then. What becomes of the ranks
    /// is in the result: how the first one failed, or that all are done.
    pub fn run(&self, stop: &Stop) -> Result<Option<Failure>> {
        let mut ranks = Vec::new();
        let port = free_port()?;
        let mut failed = None;
        let output = |rank| if rank == 0 { Ok(None) } else { Relay::start(&self.logs, rank).map(Some) };
        let outputs: Vec<_> = (0..self.ranks.unwrap_or(1)).map(output).collect::<Result<_>>()?;
        for (rank, output) in outputs.into_iter().enumerate() {
            match self.start(rank, port, output) {
                Ok(started) => ranks.push(started),
                Err(error) => {
                    failed = Some(Failure { rank, end: End::NotStarted, error: format!("{error:#}") });
                    break;
                }
            }
        }
        let mut told_to_stop = false;
        // When those that are still there are killed.
        let mut deadline = failed.is_some().then(|| self.end(&mut ranks, Signal::TERM));
        let mut looked = Instant::now();
        while ranks.iter().any(|rank| rank.end.is_none()) {
            std::thread::sleep(PACE);
            if std::mem::replace(&mut looked, Instant::now()).elapsed() > STANDSTILL {
                ranks.iter_mut().for_each(|rank| rank.stopped = None);
            }
            if let (None, Some((rank, end))) = (&failed, self.look(&mut ranks)) {
                failed = Some(Failure { rank, end, error: String::new() });
                if !told_to_stop {
                    deadline = Some(self.end(&mut ranks, Signal::TERM));
                } else if end != End::Status(AGAIN.into()) {
                    // They have been asked already, and asking twice means at once.
                    deadline = Some(Instant::now() + self.grace);
                }
            }
            if !told_to_stop && stop.requested() {
                told_to_stop = true;
                signal_all(&mut ranks, if stop.terminated() { Signal::TERM } else { Signal::INT });
            }
            if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                signal_all(&mut ranks, Signal::KILL);
            }
        }
        // A person who asks for an end may catch ranks that are not prepared for it yet, and others that miss those.
        let as_asked = |end: End| match end {
            End::Signal(signal) => signal == Signal::INT.as_raw(),
            End::Status(status) => status == i32::from(AGAIN),
            End::Hung | End::NotStarted => false,
        };
        let by_hand = stop.requested() && !stop.terminated();
        let failed = failed.filter(|failure: &Failure| !(by_hand && as_asked(failure.end)));
        let mut errors: Vec<String> =
            ranks.into_iter().map(|rank| rank.relay.map_or(String::new(), Relay::error)).collect();
        Ok(failed.map(|failure| match failure.end {
            End::NotStarted => failure,
            _ => Failure { error: std::mem::take(&mut errors[failure.rank]), ..failure },
        }))
    }

    fn start(&self, rank: usize, port: u16, output: Option<(Relay, PipeWriter)>) -> Result<Rank> {
        let mut command = Command::new(&self.program);
        // A group of its own: Ctrl-C then comes from here alone, once.
        command.args(&self.arguments).process_group(0).env(LAUNCHER, std::process::id().to_string());
        if let Some(ranks) = self.ranks {
            let own = [
                ("RANK", rank.to_string()),
                ("WORLD_SIZE", ranks.to_string()),
                ("LOCAL_RANK", rank.to_string()),
                ("LOCAL_WORLD_SIZE", ranks.to_string()),
                ("MASTER_ADDR", "127.0.0.1".into()),
                ("FERROPT_PORT", port.to_string()),
            ];
            command.envs(own);
        }
        let relay = match output {
            None => None,
            Some((relay, output)) => {
                command.stdout(output.try_clone().context("cannot share a pipe")?).stderr(output);
                command.stdin(std::process::Stdio::null());
                Some(relay)
            }
        };
        let mut spawn = || command.spawn();
        let child = match self.ranks {
            Some(ranks) => cores::on_share(rank, ranks, self.threads, spawn),
            None => spawn(),
        };
        let child =
            child.with_context(|| format!("cannot start {} as rank {rank}", self.program.display()))?;
        Ok(Rank { child, relay, end: None, stopped: None })
    }

    /// Takes note of ranks that have ended. Of those that failed just now, the one that is most likely the cause: one that
    /// was killed rather than one that ends because another is gone; and where all ended for that, one that is stopped, which
    /// they did not hear of any more. That one is killed.
    fn look(&self, ranks: &mut [Rank]) -> Option<(usize, End)> {
        let mut failures = Vec::new();
        for (number, rank) in ranks.iter_mut().enumerate().filter(|(_, rank)| rank.end.is_none()) {
            // A process that cannot be waited for is not there.
            let status = rank.child.try_wait().unwrap_or(Some(ExitStatus::from_raw(9)));
            match status {
                Some(status) => {
                    let end = match (status.code(), status.signal()) {
                        _ if rank.stopped.is_some_and(|since| since.elapsed() > self.hang) => End::Hung,
                        (Some(code), _) => End::Status(code),
                        (None, signal) => End::Signal(signal.unwrap_or_default()),
                    };
                    rank.end = Some(end);
                    if end != End::Status(0) {
                        failures.push((number, end));
                    }
                }
                None if is_stopped(&rank.child) => {
                    let since = *rank.stopped.get_or_insert_with(Instant::now);
                    if since.elapsed() > self.hang {
                        signal(&rank.child, Signal::KILL);
                    }
                }
                None => rank.stopped = None,
            }
        }
        let cause = |end: End| match end {
            End::Signal(_) | End::Hung | End::NotStarted => 0,
            End::Status(status) if status == i32::from(AGAIN) => 2,
            End::Status(_) => 1,
        };
        let first = failures.into_iter().min_by_key(|&(rank, end)| (cause(end), rank))?;
        let stopped = ranks.iter().position(|rank| rank.end.is_none() && rank.stopped.is_some());
        match stopped {
            Some(stopped) if first.1 == End::Status(AGAIN.into()) => {
                signal(&ranks[stopped].child, Signal::KILL);
                Some((stopped, End::Hung))
            }
            _ => Some(first),
        }
    }

    /// Asks all to end. Returns when those that have not are to be killed.
    fn end(&self, ranks: &mut [Rank], how: Signal) -> Instant {
        signal_all(ranks, how);
        Instant::now() + self.grace
    }

    /// What a person would read about a failure: who, how, and what it said.
    pub fn describe(&self, failure: &Failure) -> String {
        let Failure { rank, end, error } = failure;
        let who = if self.ranks.is_some() { format!("rank {rank}") } else { "the process".into() };
        let log = match (rank, error.is_empty()) {
            (0, true) => String::new(),
            (_, true) => format!("; see {}", log_file(&self.logs, *rank).display()),
            (_, false) => format!(":\n{error}"),
        };
        format!("{who} {end}{log}")
    }
}

fn signal_all(ranks: &mut [Rank], how: Signal) {
    ranks.iter().filter(|rank| rank.end.is_none()).for_each(|rank| signal(&rank.child, how));
}

/// Of a child that has not been waited for, so that its number is still its own.
fn signal(child: &Child, how: Signal) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, how);
    }
}

/// Whether a process is stopped, as SIGSTOP does; never where there is no `/proc`.
fn is_stopped(child: &Child) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
    // "pid (name) state": names may hold anything, so from the last parenthesis on.
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
}

/// A port that nobody uses now, for the ranks to meet at.
fn free_port() -> Result<u16> {
    let found = std::net::TcpListener::bind(("127.0.0.1", 0)).and_then(|socket| socket.local_addr());
    Ok(found.context("cannot find a free port for the ranks to meet at")?.port())
}

#[cfg(test)]
mod tests;
