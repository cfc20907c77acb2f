//! Contended locks: futexes that threads wait for while another thread holds them.
//!
//! Most futexes are not locks: condition variables, semaphores and the parked threads of an idle pool use futex, too. A
//! lock is recognized by its value ([`Futex`]). A waiter whose voluntary context switches have not changed since an
//! earlier sample has waited the whole time.

use crate::hash::HashMap;
use std::collections::BTreeMap;

use super::{
    Kind, QueueId, Reading, Sink, Source, Targets,
    syscalls::{Futex, Lock, doing},
};
use crate::{
    sample::{Sample, State, TargetId, Wait},
    text::harmless,
};

/// How long a lock is still reported after its last waiter left, ns: even a busy lock has no waiters in many samples.
const IDLE_RETENTION_NS: u64 = 5_000_000_000;
/// Maximum number of locks tracked, over all targets. It bounds the memory.
const MAX_LOCKS: usize = 4096;
/// Wake-ups per second from which a timed waiter counts as retrying. CPython's waiters for the interpreter lock give up
/// every 5 ms (200 per second); a quarter of that allows for delays.
const MIN_RETRIES_PER_S: u64 = 50;
/// Minimum and maximum number of CPUs used by a process whose threads cannot run in parallel: about one, with a margin
/// for I/O and for native code that runs without the interpreter lock.
const SERIALIZED_CPUS: (f64, f64) = (0.5, 1.2);
/// Shortest period over which CPU usage is measured, ns: several timer ticks.
const MIN_USAGE_PERIOD_NS: u64 = 50_000_000;
/// Size and alignment, in bytes, of the pair of futexes in a glibc condition variable. Waiters alternate between the two.
const CONDVAR_PAIR_BYTES: u64 = 8;

#[derive(Default)]
pub(super) struct Locks {
    /// By process and address.
    locks: BTreeMap<(u32, u64), Known>,
    /// By process and thread.
    waiters: HashMap<(u32, u32), Waiter>,
    /// By process.
    usage: HashMap<u32, CpuUsage>,
    seen_ns: Option<u64>,
}

/// CPU time used by all threads of a process.
#[derive(Clone, Copy)]
struct CpuUsage {
    since_ns: u64,
    cpu_ns: u64,
    /// It was about one CPU, see [`SERIALIZED_CPUS`].
    one_cpu: bool,
}

/// State kept per lock.
struct Known {
    target: TargetId,
    /// When it last had a waiter.
    used_ns: u64,
    waiters: u64,
    owner: Option<u32>,
    /// Since when the owner has not changed and no waiter has left.
    held_since_ns: u64,
    /// Its value may be a lock's or a counter's, but it has behaved like a lock.
    proven: bool,
}

/// State kept per waiting thread.
#[derive(Clone, Copy)]
struct Waiter {
    address: u64,
    voluntary: u64,
    since_ns: u64,
}

/// One futex at one sample.
#[derive(Default)]
struct FutexSample<'a> {
    waiters: u64,
    /// Waiters that waited here at the previous sample and have not been woken since.
    stayed: u64,
    oldest_age_ns: u64,
    oldest: Option<&'a Wait>,
    owner: Option<u32>,
    certain: bool,
    proven: bool,
    /// Waiters that retry, see [`MIN_RETRIES_PER_S`].
    retrying: u64,
}

/// The threads of one process at one sample.
#[derive(Default)]
struct Process<'a> {
    by_own_tid: HashMap<u32, &'a Wait>,
    running: u64,
    cpu_ns: u64,
    one_cpu: bool,
}

impl Source for Locks {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if !sample.scans.waits {
            return;
        }
        let now_ns = sample.mono_ns;
        let elapsed_ns = self.seen_ns.map(|before| now_ns.saturating_sub(before));
        self.seen_ns = Some(now_ns);
        let mut processes = processes(sample);
        self.measure_cpu(&mut processes, now_ns);
        let futexes = self.sample_futexes(sample, &processes, elapsed_ns);
        self.locks
            .retain(|_, known| now_ns.saturating_sub(known.used_ns) < IDLE_RETENTION_NS);
        for ((tgid, address), sampled) in &futexes {
            let Some(process) = processes.get(tgid) else {
                continue;
            };
            let interpreter = sampled.is_interpreter(process);
            let known = self.locks.get(&(*tgid, *address));
            let is_new = known.is_none();
            let proven = sampled.proven || known.is_some_and(|known| known.proven);
            let may_be_lock = sampled.oldest.is_some() && sampled.waiters > 1;
            let shown = sampled.certain || proven || interpreter || may_be_lock;
            let Some(target) = targets.of(*tgid).filter(|_| shown) else {
                continue;
            };
            if is_new && self.locks.len() >= MAX_LOCKS {
                sink.out.queues_over_limit += 1;
                continue;
            }
            let known = self
                .locks
                .entry((*tgid, *address))
                .or_insert_with(|| Known::first(target, now_ns));
            known.proven |= sampled.proven;
            let (left, hold_ns) = known.observe(sampled, now_ns);
            let mut reading = sampled.reading(known, left, elapsed_ns.filter(|_| !is_new));
            let holder = sampled
                .owner
                .and_then(|owner| process.by_own_tid.get(&owner));
            reading.worst = sampled.worst(holder.copied(), *tgid);
            if sampled.owner.is_some() {
                reading.extra.push(("hold_ns", hold_ns as f64));
            }
            if interpreter {
                reading.extra.push(("interpreter_lock", 1.0));
            }
            sink.put(target, Kind::Lock, &id(*tgid, *address), reading);
        }
        for ((tgid, address), known) in &mut self.locks {
            if !futexes.contains_key(&(*tgid, *address)) && targets.get(known.target).is_some() {
                let left = std::mem::take(&mut known.waiters);
                known.owner = None;
                sink.put(
                    known.target,
                    Kind::Lock,
                    &id(*tgid, *address),
                    free(left, elapsed_ns),
                );
            }
        }
        sink.forget_unseen(Kind::Lock);
    }
}

fn id(tgid: u32, address: u64) -> QueueId {
    QueueId::Lock { address, tgid }
}

fn processes(sample: &Sample) -> HashMap<u32, Process<'_>> {
    let mut processes: HashMap<u32, Process<'_>> = HashMap::default();
    for wait in &sample.waits {
        let process = processes.entry(wait.tgid).or_default();
        process.by_own_tid.insert(wait.own_tid, wait);
        process.cpu_ns = process.cpu_ns.saturating_add(wait.cpu_ns);
        process.running += u64::from(matches!(wait.state, State::Running | State::Runnable));
    }
    processes
}

impl Locks {
    fn measure_cpu(&mut self, processes: &mut HashMap<u32, Process<'_>>, now_ns: u64) {
        let mut usage = HashMap::with_capacity_and_hasher(processes.len(), Default::default());
        for (tgid, process) in processes {
            let mut known = self.usage.get(tgid).copied().unwrap_or(CpuUsage {
                since_ns: now_ns,
                cpu_ns: process.cpu_ns,
                one_cpu: false,
            });
            let elapsed_ns = now_ns.saturating_sub(known.since_ns);
            if elapsed_ns >= MIN_USAGE_PERIOD_NS {
                let used = process.cpu_ns.saturating_sub(known.cpu_ns) as f64 / elapsed_ns as f64;
                known = CpuUsage {
                    since_ns: now_ns,
                    cpu_ns: process.cpu_ns,
                    one_cpu: used >= SERIALIZED_CPUS.0 && used <= SERIALIZED_CPUS.1,
                };
            }
            process.one_cpu = known.one_cpu;
            usage.insert(*tgid, known);
        }
        self.usage = usage;
    }

    /// All futexes that may be locks.
    fn sample_futexes<'a>(
        &mut self,
        sample: &'a Sample,
        processes: &HashMap<u32, Process<'_>>,
        elapsed_ns: Option<u64>,
    ) -> BTreeMap<(u32, u64), FutexSample<'a>> {
        let now_ns = sample.mono_ns;
        let mut futexes: BTreeMap<(u32, u64), FutexSample<'_>> = BTreeMap::new();
        let mut waiters = HashMap::default();
        for wait in &sample.waits {
            let is_thread = |tid: u32| {
                processes
                    .get(&wait.tgid)
                    .is_some_and(|process| process.by_own_tid.contains_key(&tid))
            };
            let Some(futex) = Futex::of(wait, is_thread) else {
                continue;
            };
            if futex.lock == Lock::No && !futex.timed {
                continue;
            }
            let address = match futex.lock {
                Lock::No => futex.address - futex.address % CONDVAR_PAIR_BYTES,
                _ => futex.address,
            };
            let before = self
                .waiters
                .get(&(wait.tgid, wait.tid))
                .filter(|before| before.address == address);
            let stayed = before.filter(|before| before.voluntary == wait.voluntary);
            let since_ns = stayed.map_or(now_ns, |before| before.since_ns);
            waiters.insert(
                (wait.tgid, wait.tid),
                Waiter {
                    address,
                    voluntary: wait.voluntary,
                    since_ns,
                },
            );
            let sampled = futexes.entry((wait.tgid, address)).or_default();
            let retries = before.is_some_and(|before| before.retries(wait, elapsed_ns));
            sampled.retrying += u64::from(futex.timed && retries);
            match futex.lock {
                Lock::No => {
                    sampled.waiters += 1;
                    continue;
                }
                // A counter changes when it wakes a waiter; the value of a contended lock does not.
                Lock::Maybe => {
                    sampled.proven |= before.is_some() && stayed.is_none() && !futex.timed;
                }
                Lock::Yes { owner } => {
                    sampled.certain = true;
                    sampled.owner = sampled.owner.or(owner);
                }
            }
            sampled.waiters += 1;
            sampled.stayed += u64::from(stayed.is_some());
            let age_ns = now_ns.saturating_sub(since_ns);
            if sampled.oldest.is_none() || age_ns > sampled.oldest_age_ns {
                sampled.oldest = Some(wait);
                sampled.oldest_age_ns = age_ns;
            }
        }
        self.waiters = waiters;
        // Timed waits on something other than a lock matter only if they resemble the interpreter lock.
        futexes.retain(|_, sampled| sampled.oldest.is_some() || sampled.retrying > 0);
        futexes
    }
}

impl Waiter {
    /// Whether it has been woken repeatedly since the previous sample.
    fn retries(&self, wait: &Wait, elapsed_ns: Option<u64>) -> bool {
        let enough = elapsed_ns.map_or(u64::MAX, |elapsed| {
            (elapsed / (1_000_000_000 / MIN_RETRIES_PER_S)).max(1)
        });
        wait.voluntary.saturating_sub(self.voluntary) >= enough
    }
}

impl Known {
    fn first(target: TargetId, now_ns: u64) -> Self {
        Self {
            target,
            used_ns: now_ns,
            waiters: 0,
            owner: None,
            held_since_ns: now_ns,
            proven: false,
        }
    }

    /// Records one sample. Returns lower bounds of the number of waiters that have left since the previous sample, and of
    /// the time for which the owner has held the lock, ns.
    fn observe(&mut self, sampled: &FutexSample<'_>, now_ns: u64) -> (u64, u64) {
        let left = self.waiters.saturating_sub(sampled.stayed);
        if self.owner != sampled.owner || left > 0 {
            self.held_since_ns = now_ns;
        }
        self.owner = sampled.owner;
        self.waiters = sampled.waiters;
        self.used_ns = now_ns;
        (left, now_ns.saturating_sub(self.held_since_ns))
    }
}

impl FutexSample<'_> {
    /// Whether this is a global interpreter lock: threads retry it while one thread runs, and the process uses no more than one
    /// CPU. Two threads may run if the sample is taken while the lock changes hands.
    fn is_interpreter(&self, process: &Process<'_>) -> bool {
        let one_runs = process.one_cpu && matches!(process.running, 1 | 2);
        self.oldest.is_none() && self.retrying > 0 && one_runs
    }

    fn reading(&self, known: &Known, left: u64, elapsed_ns: Option<u64>) -> Reading {
        // A possible counter, and a lock whose waiters retry, is reported with its waiters but not judged.
        let is_lock = self.certain || known.proven;
        let arrived = self.waiters.saturating_sub(self.stayed);
        let age_ns = is_lock.then_some(self.oldest_age_ns);
        let mut extra = Vec::new();
        if !is_lock {
            extra.push(("uncertain", 1.0));
        }
        Reading {
            depth: self.waiters,
            limit: Some(1),
            arrivals: elapsed_ns.map(|_| arrived),
            departures: elapsed_ns.map(|_| left),
            elapsed_ns,
            served: elapsed_ns.map(|_| left),
            servers: 1,
            wait_ns: age_ns,
            oldest_age_ns: age_ns,
            extra,
            ..Reading::default()
        }
    }

    /// The holder and what it does, otherwise the waiter that has waited longest.
    fn worst(&self, holder: Option<&Wait>, tgid: u32) -> Option<String> {
        match (holder, self.owner, self.oldest) {
            (Some(holder), ..) => Some(format!(
                "held by thread {} ({}) of process {tgid}, {}",
                holder.tid,
                harmless(&holder.comm),
                doing(holder)
            )),
            (None, Some(owner), _) => Some(format!("held by thread {owner} of process {tgid}")),
            (None, None, Some(oldest)) => Some(format!(
                "thread {} ({}) of process {tgid} waits",
                oldest.tid,
                harmless(&oldest.comm)
            )),
            (None, None, None) => None,
        }
    }
}

/// The reading of a lock without waiters.
fn free(left: u64, elapsed_ns: Option<u64>) -> Reading {
    Reading {
        depth: 0,
        limit: Some(1),
        arrivals: elapsed_ns.map(|_| 0),
        departures: elapsed_ns.map(|_| left),
        elapsed_ns,
        served: elapsed_ns.map(|_| left),
        servers: 1,
        wait_ns: Some(0),
        ..Reading::default()
    }
}

#[cfg(test)]
mod tests;
