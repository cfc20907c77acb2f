//! Locks: futexes that threads wait for while another thread holds them.
//!
//! Most futexes are no locks: condition variables, semaphores and parked threads of an idle pool wait in futex, too.
//! What tells a lock is its value ([`Futex`]). A waiter that has not been woken since an earlier look (its voluntary
//! switches stand) has waited all the time.

use std::collections::{BTreeMap, HashMap};

use super::{
    Kind, QueueId, Reading, Sink, Source, Targets,
    syscalls::{Futex, Lock, doing},
};
use crate::{
    sample::{Sample, State, TargetId, Wait},
    text::harmless,
};

/// A lock that nobody waits for is shown for so long after: a busy one is free at every other look.
const KEEP_NS: u64 = 5_000_000_000;
/// Locks remembered at most.
const MAX_LOCKS: usize = 4096;
/// A waiter that is woken so often keeps asking: one for the interpreter lock of CPython gives up every 5 ms. Per second.
const ASKING_PER_S: u64 = 50;
/// Of one CPU, what threads use together that cannot run in parallel: at least and at most, over at least so long.
const ONE_CPU: (f64, f64) = (0.5, 1.2);
const PACE_NS: u64 = 50_000_000;
/// Both halves of a condition variable lie in one such block: its waiters change from one to the other.
const CONDITION_BLOCK: u64 = 8;

#[derive(Default)]
pub(super) struct Locks {
    /// By process and address.
    locks: BTreeMap<(u32, u64), Known>,
    /// By process and thread.
    waiters: HashMap<(u32, u32), Waiter>,
    /// By process.
    paces: HashMap<u32, Pace>,
    seen_ns: Option<u64>,
}

/// CPU time that all threads of a process used.
#[derive(Clone, Copy)]
struct Pace {
    since_ns: u64,
    cpu_ns: u64,
    /// As much as one CPU has.
    one_cpu: bool,
}

/// What is remembered of one lock.
struct Known {
    target: TargetId,
    /// When it last had a waiter.
    used_ns: u64,
    waiters: u64,
    owner: Option<u32>,
    /// Since when that owner was seen, and no waiter has left.
    held_since_ns: u64,
    /// A value that a counter may have, too, has proved to be a lock's.
    proven: bool,
}

/// What is remembered of one waiting thread.
#[derive(Clone, Copy)]
struct Waiter {
    address: u64,
    voluntary: u64,
    since_ns: u64,
}

/// One address in one look.
#[derive(Default)]
struct Look<'a> {
    waiters: u64,
    /// Waiters that waited here at the last look, and have not been woken since.
    stayed: u64,
    oldest_age_ns: u64,
    oldest: Option<&'a Wait>,
    owner: Option<u32>,
    certain: bool,
    proven: bool,
    /// Waiters that keep asking.
    asking: u64,
}

/// The threads of one process at one look.
#[derive(Default)]
struct Process<'a> {
    by_own_tid: HashMap<u32, &'a Wait>,
    running: u64,
    cpu_ns: u64,
    one_cpu: bool,
}

impl Source for Locks {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if !sample.walks.waits {
            return;
        }
        let now_ns = sample.mono_ns;
        let elapsed_ns = self.seen_ns.map(|before| now_ns.saturating_sub(before));
        self.seen_ns = Some(now_ns);
        let mut processes = processes(sample);
        self.pace(&mut processes, now_ns);
        let looks = self.look(sample, &processes, elapsed_ns);
        self.locks
            .retain(|_, known| now_ns.saturating_sub(known.used_ns) < KEEP_NS);
        for ((tgid, address), look) in &looks {
            let Some(process) = processes.get(tgid) else {
                continue;
            };
            let interpreter = look.is_interpreter(process);
            let known = self.locks.get(&(*tgid, *address));
            let is_new = known.is_none();
            let proven = look.proven || known.is_some_and(|known| known.proven);
            let may_be_one = look.oldest.is_some() && look.waiters > 1;
            let shown = look.certain || proven || interpreter || may_be_one;
            let Some(target) = targets.of(*tgid).filter(|_| shown) else {
                continue;
            };
            if is_new && self.locks.len() >= MAX_LOCKS {
                sink.out.beyond_bound += 1;
                continue;
            }
            let known = self
                .locks
                .entry((*tgid, *address))
                .or_insert_with(|| Known::first(target, now_ns));
            known.proven |= look.proven;
            let (left, hold_ns) = known.after(look, now_ns);
            let mut reading = look.reading(known, left, elapsed_ns.filter(|_| !is_new));
            let holder = look.owner.and_then(|owner| process.by_own_tid.get(&owner));
            reading.worst = look.worst(holder.copied(), *tgid);
            if look.owner.is_some() {
                reading.extra.push(("hold_ns", hold_ns as f64));
            }
            if interpreter {
                reading.extra.push(("interpreter_lock", 1.0));
            }
            sink.put(target, Kind::Lock, &id(*tgid, *address), reading);
        }
        for ((tgid, address), known) in &mut self.locks {
            if !looks.contains_key(&(*tgid, *address)) && targets.get(known.target).is_some() {
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
    let mut processes: HashMap<u32, Process<'_>> = HashMap::new();
    for wait in &sample.waits {
        let process = processes.entry(wait.tgid).or_default();
        process.by_own_tid.insert(wait.own_tid, wait);
        process.cpu_ns = process.cpu_ns.saturating_add(wait.cpu_ns);
        process.running += u64::from(matches!(wait.state, State::Running | State::Runnable));
    }
    processes
}

impl Locks {
    fn pace(&mut self, processes: &mut HashMap<u32, Process<'_>>, now_ns: u64) {
        let mut paces = HashMap::with_capacity(processes.len());
        for (tgid, process) in processes {
            let mut pace = self.paces.get(tgid).copied().unwrap_or(Pace {
                since_ns: now_ns,
                cpu_ns: process.cpu_ns,
                one_cpu: false,
            });
            let elapsed_ns = now_ns.saturating_sub(pace.since_ns);
            if elapsed_ns >= PACE_NS {
                let used = process.cpu_ns.saturating_sub(pace.cpu_ns) as f64 / elapsed_ns as f64;
                pace = Pace {
                    since_ns: now_ns,
                    cpu_ns: process.cpu_ns,
                    one_cpu: used >= ONE_CPU.0 && used <= ONE_CPU.1,
                };
            }
            process.one_cpu = pace.one_cpu;
            paces.insert(*tgid, pace);
        }
        self.paces = paces;
    }

    /// All addresses that may be locks.
    fn look<'a>(
        &mut self,
        sample: &'a Sample,
        processes: &HashMap<u32, Process<'_>>,
        elapsed_ns: Option<u64>,
    ) -> BTreeMap<(u32, u64), Look<'a>> {
        let now_ns = sample.mono_ns;
        let mut looks: BTreeMap<(u32, u64), Look<'_>> = BTreeMap::new();
        let mut waiters = HashMap::new();
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
                Lock::No => futex.address - futex.address % CONDITION_BLOCK,
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
            let look = looks.entry((wait.tgid, address)).or_default();
            let asks = before.is_some_and(|before| before.asks(wait, elapsed_ns));
            look.asking += u64::from(futex.timed && asks);
            match futex.lock {
                Lock::No => {
                    look.waiters += 1;
                    continue;
                }
                // A counter moves on when it wakes somebody; a lock's value is what it was.
                Lock::Maybe => look.proven |= before.is_some() && stayed.is_none() && !futex.timed,
                Lock::Yes { owner } => {
                    look.certain = true;
                    look.owner = look.owner.or(owner);
                }
            }
            look.waiters += 1;
            look.stayed += u64::from(stayed.is_some());
            let age_ns = now_ns.saturating_sub(since_ns);
            if look.oldest.is_none() || age_ns > look.oldest_age_ns {
                look.oldest = Some(wait);
                look.oldest_age_ns = age_ns;
            }
        }
        self.waiters = waiters;
        // Timed waits that are no lock's are of interest only where they look like the interpreter lock.
        looks.retain(|_, look| look.oldest.is_some() || look.asking > 0);
        looks
    }
}

impl Waiter {
    /// It has been woken again and again since the last look.
    fn asks(&self, wait: &Wait, elapsed_ns: Option<u64>) -> bool {
        let enough = elapsed_ns.map_or(u64::MAX, |elapsed| {
            (elapsed / (1_000_000_000 / ASKING_PER_S)).max(1)
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

    /// Takes in one look; answers how many waiters have left since the last one (at least), and how long the owner has
    /// held it (at least).
    fn after(&mut self, look: &Look<'_>, now_ns: u64) -> (u64, u64) {
        let left = self.waiters.saturating_sub(look.stayed);
        if self.owner != look.owner || left > 0 {
            self.held_since_ns = now_ns;
        }
        self.owner = look.owner;
        self.waiters = look.waiters;
        self.used_ns = now_ns;
        (left, now_ns.saturating_sub(self.held_since_ns))
    }
}

impl Look<'_> {
    /// Threads of an interpreter that keep asking for the one lock that lets them run, while one does (two, where the look
    /// falls between them): together they get no further than one CPU.
    fn is_interpreter(&self, process: &Process<'_>) -> bool {
        let one_runs = process.one_cpu && matches!(process.running, 1 | 2);
        self.oldest.is_none() && self.asking > 0 && one_runs
    }

    fn reading(&self, known: &Known, left: u64, elapsed_ns: Option<u64>) -> Reading {
        // What may be a counter, and what gives up and asks again, shows who waits, and is not judged.
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

    /// The holder and what it does; else the thread that has waited longest.
    fn worst(&self, holder: Option<&Wait>, tgid: u32) -> Option<String> {
        match (holder, self.owner, self.oldest) {
            (Some(holder), ..) => Some(format!(
                "thread {} ({}) of process {tgid} holds it, itself {}",
                holder.tid,
                harmless(&holder.comm),
                doing(holder)
            )),
            (None, Some(owner), _) => Some(format!("thread {owner} of process {tgid} holds it")),
            (None, None, Some(oldest)) => Some(format!(
                "thread {} ({}) of process {tgid} waits",
                oldest.tid,
                harmless(&oldest.comm)
            )),
            (None, None, None) => None,
        }
    }
}

/// A lock that nobody waits for at this look.
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
