//! Threads that run one kernel after another.
//!
//! A decoder step is hundreds of kernels of 0.01 to 100 ms, so starting one must cost microseconds: workers spin
//! for a while after each job before they sleep. The caller is worker 0.

use std::arch::x86_64::_mm_sfence;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::simd::prefetch_l2;

/// Spins before a waiting worker sleeps: tens of microseconds, longer than the gaps between kernels of a step.
const SPINS: u32 = 20_000;

/// Most threads of a device.
pub const MOST_THREADS: usize = 1024;

/// So many threads, or as many as the machine offers. Fails when it is no number of threads.
pub fn threads(wanted: Option<usize>) -> anyhow::Result<usize> {
    let available = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = wanted.unwrap_or(available);
    anyhow::ensure!(
        (1..=MOST_THREADS).contains(&threads),
        "threads = {threads}: expected 1 to {MOST_THREADS} (this machine offers {available})"
    );
    Ok(threads)
}

/// The job of the moment: a borrowed closure whose lifetime [`Pool::run`] guards.
type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    job: Mutex<Option<SendJob>>,
    /// Number of jobs started; workers wait for it to change.
    epoch: AtomicU32,
    running: AtomicU32,
    panicked: AtomicBool,
    stop: AtomicBool,
    asleep: Vec<AtomicBool>,
    ahead: Vec<Ahead>,
}

/// Addresses that a thread has yet to bring near while it waits, the next one and where they end.
#[derive(Default)]
#[repr(align(64))]
struct Ahead {
    next: AtomicUsize,
    end: AtomicUsize,
}

impl Ahead {
    /// One round of waiting: another cache line, if any is left.
    fn wait(&self) {
        let next = self.next.load(Relaxed);
        if next < self.end.load(Relaxed) {
            prefetch_l2(std::ptr::without_provenance::<u8>(next));
            self.next.store(next + 64, Relaxed);
        } else {
            std::hint::spin_loop();
        }
    }
}

#[derive(Clone, Copy)]
struct SendJob(Job);
// SAFETY: the closure is Sync, and `run` does not return before every worker has left it.
unsafe impl Send for SendJob {}

/// A fixed set of threads.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One job at a time, also when several threads share the device.
    turn: Mutex<()>,
}

impl Pool {
    /// `threads` workers, the caller of [`Pool::run`] being one of them. With `pin`, worker i is bound to the i-th
    /// processor that the process may use; the caller stays unbound, because threads that it starts would inherit
    /// the binding.
    pub fn new(threads: usize, pin: bool) -> Self {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            job: Mutex::new(None),
            epoch: AtomicU32::new(0),
            running: AtomicU32::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            asleep: (0..threads).map(|_| AtomicBool::new(false)).collect(),
            ahead: (0..threads).map(|_| Ahead::default()).collect(),
        });
        let cpus = if pin { allowed_cpus() } else { Vec::new() };
        let workers = (1..threads)
            .filter_map(|id| {
                let (shared, cpu) = (shared.clone(), cpus.get(id).copied());
                let work = move || {
                    if let Some(cpu) = cpu {
                        bind_to(cpu);
                    }
                    shared.work(id);
                };
                std::thread::Builder::new().name(format!("kernel-{id}")).spawn(work).ok()
            })
            .collect();
        Pool { shared, workers, turn: Mutex::new(()) }
    }

    /// Number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `f(thread)` once on every thread and waits for all.
    pub fn run(&self, f: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() {
            f(0);
            return end_streams();
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let s = &self.shared;
        // SAFETY: only the lifetime changes; the wait for `running` below ends after the last use.
        let job = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(f) };
        *s.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(SendJob(job));
        s.running.store(self.workers.len() as u32, SeqCst);
        s.epoch.fetch_add(1, SeqCst);
        for (i, worker) in self.workers.iter().enumerate() {
            if s.asleep[i + 1].load(SeqCst) {
                worker.thread().unpark();
            }
        }
        // The workers must have left the closure before its borrow ends, also when the caller's share panics.
        let mine = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| f(0)));
        end_streams();
        let mut spins = 0u32;
        while s.running.load(Acquire) != 0 {
            spins += 1;
            if spins > SPINS { std::thread::yield_now() } else { s.ahead[0].wait() }
        }
        if let Err(panic) = mine {
            std::panic::resume_unwind(panic);
        }
        assert!(!s.panicked.load(SeqCst), "a kernel thread panicked");
    }

    /// Runs `f(task, thread)` for every task below `tasks`; threads take the next task when they are free.
    pub fn for_each(&self, tasks: usize, f: impl Fn(usize, usize) + Sync) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(|task| f(task, 0));
            return end_streams();
        }
        let next = AtomicUsize::new(0);
        self.run(&|thread| {
            loop {
                let task = next.fetch_add(1, Relaxed);
                if task >= tasks {
                    break;
                }
                f(task, thread);
            }
        });
    }

    /// The same for tasks that are best done in order, because each brings to the caches what the next will read: every
    /// thread begins with neighbours of its own, and takes from the end of others' when it has done them.
    pub fn for_neighbours(&self, tasks: usize, f: impl Fn(usize, usize) + Sync) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(|task| f(task, 0));
            return end_streams();
        }
        let count = self.threads().min(SHARES);
        let shares: [Share; SHARES] =
            std::array::from_fn(|i| Share::new(if i < count { self.share(tasks, i) } else { 0..0 }));
        self.run(&|thread| {
            let own = thread % count;
            while let Some(task) = shares[own].first() {
                f(task, thread);
            }
            for other in (own + 1..own + count).map(|i| &shares[i % count]) {
                while let Some(task) = other.last() {
                    f(task, thread);
                }
            }
        });
    }

    /// The tasks that a thread begins with in [`Pool::for_neighbours`].
    pub fn share(&self, tasks: usize, thread: usize) -> Range<usize> {
        let count = self.threads().min(SHARES);
        let own = thread % count;
        tasks * own / count..tasks * (own + 1) / count
    }

    /// Which addresses each thread brings to its second-level cache while it waits, from now on.
    pub fn expect(&self, addresses: impl Fn(usize) -> Range<usize>) {
        for (thread, ahead) in self.shared.ahead.iter().enumerate() {
            let Range { start, end } = addresses(thread);
            ahead.end.store(0, Relaxed);
            ahead.next.store(start, Relaxed);
            ahead.end.store(end, Relaxed);
        }
    }

    /// Runs `f(range)` for ranges of `size` (the last may be shorter) that cover `0..len`. The ranges do not depend on
    /// the number of threads.
    pub fn for_chunks(&self, len: usize, size: usize, f: impl Fn(std::ops::Range<usize>) + Sync) {
        self.for_each(len.div_ceil(size), |task, _| f(task * size..len.min((task + 1) * size)));
    }
}

/// Most parts that tasks are divided into; more threads have some in common.
const SHARES: usize = 64;

/// Tasks that are left of a thread's own, first and end in one word, on a cache line of its own.
#[repr(align(64))]
struct Share(AtomicU64);

impl Share {
    fn new(tasks: Range<usize>) -> Self {
        Share(AtomicU64::new((tasks.start as u64) << 32 | tasks.end as u64))
    }

    fn take(&self, from: impl Fn(u32, u32) -> (u32, u32, u32)) -> Option<usize> {
        let mut taken = 0;
        let update = |word: u64| {
            let (first, end) = ((word >> 32) as u32, word as u32);
            (first < end).then(|| {
                let (task, first, end) = from(first, end);
                taken = task;
                (first as u64) << 32 | end as u64
            })
        };
        self.0.fetch_update(Relaxed, Relaxed, update).ok().map(|_| taken as usize)
    }

    fn first(&self) -> Option<usize> {
        self.take(|first, end| (first, first + 1, end))
    }

    fn last(&self) -> Option<usize> {
        self.take(|first, end| (end - 1, first, end - 1))
    }
}

/// What this thread has written past the caches is there, for every thread that is told of it after this.
fn end_streams() {
    // SAFETY: every x86-64 processor has it.
    unsafe { _mm_sfence() }
}

impl Shared {
    fn work(&self, id: usize) {
        let mut seen = 0;
        loop {
            let mut spins = 0u32;
            while self.epoch.load(SeqCst) == seen {
                if self.stop.load(SeqCst) {
                    return;
                }
                spins += 1;
                if spins < SPINS {
                    self.ahead[id].wait();
                    continue;
                }
                // Announce, look again, then sleep: the starter either sees the announcement or we see its epoch.
                self.asleep[id].store(true, SeqCst);
                if self.epoch.load(SeqCst) == seen && !self.stop.load(SeqCst) {
                    std::thread::park();
                }
                self.asleep[id].store(false, SeqCst);
            }
            seen = seen.wrapping_add(1);
            let job = *self.job.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(SendJob(job)) = job {
                // SAFETY: `run` keeps the closure alive until `running` is 0.
                let f = unsafe { &*job };
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| f(id))).is_err() {
                    self.panicked.store(true, SeqCst);
                }
            }
            end_streams();
            self.running.fetch_sub(1, Release);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker that panicked has already been reported by `run`.
            let _ = worker.join();
        }
    }
}

/// Processors that this process may run on; empty where the system does not say.
pub fn allowed_cpus() -> Vec<usize> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: plain system call on a zeroed set of the right size.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) == 0 {
                return (0..libc::CPU_SETSIZE as usize).filter(|&c| libc::CPU_ISSET(c, &set)).collect();
            }
        }
    }
    Vec::new()
}

/// Binds the calling thread to one processor, where that is allowed.
fn bind_to(cpu: usize) {
    #[cfg(target_os = "linux")]
    // SAFETY: plain system call on a zeroed set; a refusal leaves the thread unbound, which is fine.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = cpu;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_many_times() {
        let pool = Pool::new(3, false);
        for round in 0..2000 {
            let tasks = round % 17;
            let counts: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
            pool.for_each(tasks, |task, thread| {
                assert!(thread < 3);
                counts[task].fetch_add(1, Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Relaxed) == 1));
        }
    }

    #[test]
    fn neighbours_run_once_each_also_those_of_a_slow_thread() {
        let pool = Pool::new(3, false);
        for tasks in [0, 1, 2, 3, 17, 300] {
            let counts: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
            let by_slow = AtomicUsize::new(0);
            pool.for_neighbours(tasks, |task, thread| {
                if thread == 0 {
                    by_slow.fetch_add(1, Relaxed);
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                counts[task].fetch_add(1, Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Relaxed) == 1), "of {tasks}: {counts:?}");
            assert!(tasks < 300 || by_slow.into_inner() < 100, "a thread that sleeps did its whole share");
        }
    }

    #[test]
    fn sleeping_workers_wake_up() {
        let pool = Pool::new(2, false);
        for _ in 0..5 {
            std::thread::sleep(std::time::Duration::from_millis(5));
            let ran = AtomicU32::new(0);
            pool.run(&|_| {
                ran.fetch_add(1, Relaxed);
            });
            assert_eq!(ran.load(Relaxed), 2);
        }
    }

    #[test]
    fn who_waits_brings_near_what_is_expected() {
        let pool = Pool::new(2, false);
        let memory = [0u8; 1000];
        let start = memory.as_ptr().addr();
        let left = || {
            let ahead = &pool.shared.ahead[1];
            ahead.end.load(Relaxed).saturating_sub(ahead.next.load(Relaxed))
        };
        pool.expect(|thread| if thread == 1 { start..start + memory.len() } else { 0..0 });
        // The worker may be asleep; behind a job it is not.
        pool.run(&|_| ());
        let begun = std::time::Instant::now();
        while left() > 0 && begun.elapsed().as_secs() < 60 {
            std::thread::yield_now();
        }
        assert_eq!(left(), 0);
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller() {
        let pool = Pool::new(2, false);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.for_each(8, |task, _| assert!(task != 5));
        }));
        assert!(result.is_err());
    }
}
