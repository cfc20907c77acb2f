//! Event loops: threads that wait for events in epoll_wait. Measures how long a turn of the loop takes, and detects turns
//! that do not end.
//!
//! A turn is the time between two calls of epoll_wait. The kernel does not count these calls. It counts voluntary
//! context switches, one for each call that had to wait. A loop under load finds events ready at each call and hardly
//! ever waits. So the progress of its connections counts as turns as well, and so do connections that came and went between two
//! scans; otherwise a healthy loop at full speed would look like one long turn.
//!
//! What waits for the end of a turn are the files that epoll lists as ready. Their number is counted by the file scan.

use crate::hash::HashMap;
use std::{collections::BTreeMap, sync::Arc};

use rustc_hash::FxHashMap;

use super::{
    Kind, Previous, QueueId, Reading, Sink, Source, Targets, UTILIZATION,
    syscalls::{CallClass, Futex, Lock, call_of, descriptor, doing},
};
use crate::{
    in_order::InOrder,
    sample::{Epoll, Sample, State, TargetId, Wait},
};

/// Turns shorter than this, ns, are normal work. It is the limit of a "long task" in browsers (W3C Long Tasks API).
const LONG_TURN_NS: u64 = 50_000_000;
/// Recent samples, one bit each, by which an event loop is recognized.
const RECENT_SAMPLES: u32 = 32;
/// Consecutive samples at which a loop is parked elsewhere, after which it no longer counts as a loop.
const MAX_PARKED_SAMPLES: u32 = 8;
/// Event loops reported per process. A process with more has a pool of them.
const MAX_PER_PROCESS: u32 = 64;

#[derive(Default)]
pub(super) struct EventLoops {
    threads: HashMap<(u32, u32), Known>,
    processes: FxHashMap<u32, Process>,
    connections: InOrder<Position>,
    unseen: Unseen,
    /// Ready files of each epoll instance, by process and descriptor, at the last file scan.
    ready: FxHashMap<(u32, u32), Epoll>,
    /// Number of file scans so far.
    scans: u64,
    /// Time of the last file scan.
    files_ns: Option<u64>,
    /// Connections have been scanned since the threads were sampled.
    fresh: bool,
}

/// How far a connection has been read and written.
#[derive(Clone, Copy)]
struct Position {
    /// The last scan that saw it.
    scan: u64,
    read: u32,
    written: u32,
}

/// Whether a thread is an event loop: its recent samples found it in epoll_wait often enough.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct EpollHistory {
    /// One bit per recent sample: set if it was in epoll_wait.
    in_epoll: u32,
    /// Number of valid bits.
    samples: u32,
    /// Consecutive samples at which it was parked.
    parked: u32,
    is_loop: bool,
}

/// What a thread of an event loop is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TurnState {
    /// In epoll_wait: no event is ready.
    Waiting,
    /// On a condition variable or similar. Runtimes that pass epoll_wait between threads (Go, tokio) park the others there.
    Parked,
    /// In a turn, running or runnable.
    Computing,
    /// In a turn, and asleep in another system call, waiting for a lock or disk, or stopped.
    Blocked,
}

/// State kept per thread.
struct Known {
    name: Arc<str>,
    epoll_history: EpollHistory,
    voluntary: u64,
    seen_ns: u64,
    /// Start of the current turn.
    since_ns: u64,
    /// It waited for events at the last sample, or did nothing.
    waited: bool,
    turns: Turns,
    busy_ns: u64,
    /// The descriptor that it last waited on in epoll_wait.
    epoll: Option<u32>,
}

/// Connections that no scan has seen, because they were accepted and closed between two of them.
#[derive(Default)]
struct Unseen {
    /// Connections that each target accepted since the last scan, and how many of them that scan saw. The former is an upper bound
    /// where listeners that are not watched share the network namespace.
    accepted: BTreeMap<TargetId, u64>,
    seen: BTreeMap<TargetId, u64>,
}

/// State kept per process.
#[derive(Default)]
struct Process {
    target: Option<TargetId>,
    /// Accepted connections.
    accepted: u32,
    /// Event loops.
    loops: u32,
    /// Connections read from, written to, or accepted since the thread samples last used this count.
    progress: u64,
}

/// The turns of one thread since the last scan of its connections.
#[derive(Clone, Copy, Debug, Default)]
struct Turns {
    busy_ns: u64,
    voluntary: u64,
    /// Mean turn of the previous period.
    mean_ns: Option<u64>,
}

impl Source for EventLoops {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if sample.scans.files || sample.scans.focused_sockets {
            self.unseen.count(sink.previous);
        }
        if sample.scans.files {
            self.scan_connections(sample, targets);
            let entry = |epoll: &Epoll| ((epoll.tgid, epoll.fd), *epoll);
            self.ready = sample.epolls.iter().map(entry).collect();
        }
        if !sample.scans.waits {
            return;
        }
        let fresh = std::mem::take(&mut self.fresh);
        let mut threads = HashMap::with_capacity_and_hasher(sample.waits.len(), Default::default());
        let mut loops: BTreeMap<u32, u32> = BTreeMap::new();
        for wait in &sample.waits {
            let Some(target) = targets.of(wait.tgid) else {
                continue;
            };
            let before = self.threads.remove(&(wait.tgid, wait.tid));
            let process = self.processes.get(&wait.tgid);
            let moved = fresh && process.is_some_and(|process| process.progress > 0);
            let (known, sampled) = Known::after(before, wait, sample.mono_ns, moved);
            if known.epoll_history.is_loop {
                let shown = loops.entry(wait.tgid).or_default();
                *shown = shown.saturating_add(1);
                if *shown <= MAX_PER_PROCESS {
                    let others = process.is_some_and(|process| process.accepted > 1);
                    let ready = known.epoll.and_then(|fd| self.ready.get(&(wait.tgid, fd)));
                    let reading = known.reading(&sampled, wait, (others, ready), self.files_ns);
                    let id = QueueId::Thread {
                        name: Arc::clone(&known.name),
                        tid: wait.tid,
                    };
                    sink.put(target, Kind::Eventloop, &id, reading);
                } else {
                    sink.out.queues_over_limit += 1;
                }
            }
            threads.insert((wait.tgid, wait.tid), known);
        }
        self.threads = threads;
        for (tgid, process) in &mut self.processes {
            process.loops = loops.get(tgid).copied().unwrap_or(0);
        }
        if fresh {
            self.end_period();
        }
        sink.forget_unseen(Kind::Eventloop);
    }
}

impl EventLoops {
    fn scan_connections(&mut self, sample: &Sample, targets: &Targets) {
        self.scans += 1;
        let mut processes: FxHashMap<u32, Process> = FxHashMap::default();
        for connection in &sample.connections {
            let process = processes.entry(connection.tgid).or_default();
            process.target = targets.of(connection.tgid);
            let is_accepted = targets.listens(connection.netns, connection.local.port());
            process.accepted = process.accepted.saturating_add(u32::from(is_accepted));
            let now = Position {
                scan: self.scans,
                read: connection.copied_seq,
                written: connection.write_seq,
            };
            let stayed = match self.connections.next(connection.cookie) {
                Some(known) => {
                    let before = std::mem::replace(known, now);
                    (before.read, before.written) == (now.read, now.written)
                }
                None => {
                    self.connections.insert(connection.cookie, now);
                    self.unseen.see(process.target.filter(|_| is_accepted));
                    false
                }
            };
            let moved = self.files_ns.is_some() && !stayed;
            process.progress = process.progress.saturating_add(u64::from(moved));
        }
        let scan = self.scans;
        self.connections.retain(|position| position.scan == scan);
        for (tgid, process) in &mut processes {
            // If no thread was sampled since the previous scan, its progress still counts.
            let before = self.processes.get(tgid);
            process.loops = before.map_or(0, |before| before.loops);
            let left = before.map_or(0, |before| before.progress);
            process.progress = process.progress.saturating_add(left);
        }
        self.processes = processes;
        self.files_ns = Some(sample.mono_ns);
        self.fresh = true;
    }

    /// Computes the mean turns of the period since the last scan of connections.
    fn end_period(&mut self) {
        let mut loops: BTreeMap<TargetId, u32> = BTreeMap::new();
        for process in self.processes.values() {
            if let Some(target) = process.target {
                let all = loops.entry(target).or_default();
                *all = all.saturating_add(process.loops);
            }
        }
        for ((tgid, _), known) in &mut self.threads {
            if let Some(process) = self.processes.get(tgid) {
                let share = process.progress / u64::from(process.loops.max(1));
                let unseen = process.target.map_or(0, |target| {
                    let all = loops.get(&target).copied().unwrap_or(0);
                    self.unseen.of(target) / u64::from(all.max(1))
                });
                known.turns.end(share.saturating_add(unseen));
            }
        }
        for process in self.processes.values_mut() {
            process.progress = 0;
        }
        self.unseen.end_period();
    }
}

impl Unseen {
    /// Adds the connections that were accepted up to the previous sample.
    fn count(&mut self, previous: &Previous) {
        // Several ports of a target share the counter of their namespace.
        let mut counted = None;
        for ((target, netns, _), of_port) in &previous.accepted {
            let place = Some((*target, *netns));
            let more = match of_port.count {
                Some(count) => count,
                None if counted == place => 0,
                None => {
                    counted = place;
                    of_port.in_namespace
                }
            };
            let accepted = self.accepted.entry(*target).or_default();
            *accepted = accepted.saturating_add(more);
        }
    }

    /// A scan has seen a new connection of this target.
    fn see(&mut self, target: Option<TargetId>) {
        if let Some(target) = target {
            *self.seen.entry(target).or_default() += 1;
        }
    }

    fn of(&self, target: TargetId) -> u64 {
        let seen = self.seen.get(&target).copied().unwrap_or(0);
        let accepted = self.accepted.get(&target).copied().unwrap_or(0);
        accepted.saturating_sub(seen)
    }

    fn end_period(&mut self) {
        self.accepted.clear();
        self.seen.clear();
    }
}

impl EpollHistory {
    /// Records one sample.
    pub(super) fn observe(&mut self, in_epoll: bool, parked: bool) {
        self.in_epoll = self.in_epoll << 1 | u32::from(in_epoll);
        self.samples = self.samples.saturating_add(1).min(RECENT_SAMPLES);
        self.parked = if parked {
            self.parked.saturating_add(1)
        } else {
            0
        };
        let times = self.in_epoll.count_ones();
        if self.parked >= MAX_PARKED_SAMPLES {
            *self = Self::default();
        } else if times >= 3 && times * 4 >= self.samples {
            // It stays a loop during a turn that does not end.
            self.is_loop = true;
        }
    }

    /// Whether the thread is an event loop.
    pub(super) fn is_loop(&self) -> bool {
        self.is_loop
    }
}

impl TurnState {
    fn of(wait: &Wait) -> Self {
        match wait.state {
            State::Running | State::Runnable => return Self::Computing,
            State::Stopped | State::Uninterruptible => return Self::Blocked,
            State::Dead => return Self::Parked,
            State::Sleeping => {}
        }
        match call_of(wait) {
            Some((_, CallClass::Epoll)) => Self::Waiting,
            Some((_, CallClass::Accept | CallClass::Poll)) => Self::Parked,
            // No owner is looked up here: it only matters for an ambiguous futex.
            Some((_, CallClass::Futex)) => match Futex::of(wait, |_| true) {
                Some(Futex {
                    lock: Lock::Yes { .. },
                    ..
                }) => Self::Blocked,
                _ => Self::Parked,
            },
            Some(_) => Self::Blocked,
            // An unknown call may be anything.
            None => Self::Parked,
        }
    }
}

/// One thread at one sample.
struct ThreadSample {
    state: TurnState,
    /// Time since its previous sample.
    elapsed_ns: Option<u64>,
    /// Time of that spent in turns.
    busy_ns: u64,
    voluntary: u64,
}

impl Known {
    /// `moved`: connections of the process were read or written since their last scan.
    fn after(before: Option<Self>, wait: &Wait, now_ns: u64, moved: bool) -> (Self, ThreadSample) {
        let state = TurnState::of(wait);
        let busy_ns = wait.cpu_ns.saturating_add(wait.run_delay_ns);
        let first = before.is_none();
        let mut known = before.unwrap_or_else(|| Self {
            name: wait.comm.as_str().into(),
            epoll_history: EpollHistory::default(),
            voluntary: wait.voluntary,
            seen_ns: now_ns,
            since_ns: now_ns,
            waited: false,
            turns: Turns::default(),
            busy_ns,
            epoll: None,
        });
        if let (TurnState::Waiting, Some(call)) = (state, &wait.syscall) {
            known.epoll = Some(descriptor(call));
        }
        if *known.name != *wait.comm {
            known.name = wait.comm.as_str().into();
        }
        let elapsed_ns = now_ns.saturating_sub(known.seen_ns);
        let voluntary = wait.voluntary.saturating_sub(known.voluntary);
        known
            .epoll_history
            .observe(state == TurnState::Waiting, state == TurnState::Parked);
        let ended = matches!(state, TurnState::Waiting | TurnState::Parked)
            || voluntary > 0
            || (state == TurnState::Computing && moved);
        let worked_ns = busy_ns.saturating_sub(known.busy_ns);
        if ended {
            known.since_ns = now_ns;
        } else if known.waited && state == TurnState::Computing {
            // It woke up since, and has not slept again: the turn is as old as what it has computed, or waited for a CPU.
            known.since_ns = now_ns.saturating_sub(worked_ns.min(elapsed_ns));
        }
        known.waited = matches!(state, TurnState::Waiting | TurnState::Parked);
        // A thread that is blocked at a sample counts as blocked for the whole interval before it.
        let blocked_ns = if state == TurnState::Blocked {
            elapsed_ns
        } else {
            0
        };
        let in_turns_ns = worked_ns.saturating_add(blocked_ns);
        known.turns.add(in_turns_ns, voluntary);
        known.voluntary = wait.voluntary;
        known.busy_ns = busy_ns;
        known.seen_ns = now_ns;
        let sampled = ThreadSample {
            state,
            elapsed_ns: (!first).then_some(elapsed_ns),
            busy_ns: in_turns_ns,
            voluntary,
        };
        (known, sampled)
    }

    /// `others`: other connections wait while one is served. A process with one connection at a time is a worker. `ready`: the files
    /// of its epoll instance that were ready at the last file scan.
    fn reading(
        &self,
        sampled: &ThreadSample,
        wait: &Wait,
        (others, ready): (bool, Option<&Epoll>),
        files_ns: Option<u64>,
    ) -> Reading {
        let in_turn = matches!(sampled.state, TurnState::Computing | TurnState::Blocked);
        // The progress of connections is known up to their last scan.
        let until_ns = match sampled.state {
            TurnState::Computing => files_ns.unwrap_or(0).min(self.seen_ns),
            _ => self.seen_ns,
        };
        let oldest_age_ns = in_turn.then(|| until_ns.saturating_sub(self.since_ns));
        let mean_ns = self.turns.mean_ns;
        let mut extra = Vec::new();
        extra.extend(mean_ns.map(|mean_ns| ("turn_ns", mean_ns as f64)));
        if let Some(elapsed_ns) = sampled.elapsed_ns.filter(|elapsed| *elapsed > 0) {
            let share = sampled.busy_ns as f64 / elapsed_ns as f64;
            extra.push((UTILIZATION, share.min(1.0)));
        }
        let ready = ready.filter(|_| in_turn);
        extra.extend(ready.map(|epoll| ("ready", f64::from(epoll.ready))));
        extra.extend(ready.filter(|epoll| epoll.more).map(|_| ("at_least", 1.0)));
        let turns = sampled.elapsed_ns.map(|_| sampled.voluntary);
        // What it has taken and not handled is no longer listed: at least one event, if a turn is under way.
        let depth = ready.map_or(0, |epoll| u64::from(epoll.ready));
        Reading {
            depth: depth.max(u64::from(in_turn)),
            arrivals: turns,
            departures: turns,
            elapsed_ns: sampled.elapsed_ns,
            // Not set: long turns would raise their own target delay.
            served: None,
            servers: 1,
            wait_ns: mean_ns
                .filter(|_| others)
                .map(|mean_ns| if mean_ns >= LONG_TURN_NS { mean_ns } else { 0 }),
            oldest_age_ns: oldest_age_ns.filter(|_| others),
            worst: in_turn.then(|| format!("in a turn, {}", doing(wait))),
            extra,
            ..Reading::default()
        }
    }
}

impl Turns {
    fn add(&mut self, busy_ns: u64, voluntary: u64) {
        self.busy_ns = self.busy_ns.saturating_add(busy_ns);
        self.voluntary = self.voluntary.saturating_add(voluntary);
    }

    /// Ends a period. `progress`: this loop's part of the connections that moved in it.
    fn end(&mut self, progress: u64) {
        let turns = self.voluntary.max(progress);
        // A turn that has not ended continues in the next period.
        if let Some(mean_ns) = self.busy_ns.checked_div(turns) {
            *self = Self {
                mean_ns: Some(mean_ns),
                ..Self::default()
            };
        }
    }
}

#[cfg(test)]
mod tests;
