//! Threads that live in epoll_wait: how long a turn of the loop takes, and whether one does not end.
//!
//! A turn is the time between two visits to epoll_wait. The kernel does not count visits. It counts voluntary switches:
//! one for each visit that had to wait. A loop with much to do finds something ready at each visit and hardly ever
//! waits, so what its connections did counts as turns as well; else a healthy loop at full speed would look like one long
//! turn.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use rustc_hash::FxHashMap;

use super::{
    Kind, QueueId, Reading, Sink, Source, Targets, UTILIZATION,
    syscalls::{Does, Futex, Lock, call_of, doing},
};
use crate::{
    in_order::InOrder,
    sample::{Sample, State, Wait},
};

/// A turn up to that is work, as browsers and Node.js have it ("long task").
const TURN_NS: u64 = 50_000_000;
/// Looks by which a loop is known.
const LOOKS: u32 = 32;
/// A loop that is parked elsewhere for so many looks has become something else.
const PARKED: u32 = 8;
/// Loops shown per process: beyond, threads are many, and each is one of a pool.
const MAX_PER_PROCESS: u32 = 64;

#[derive(Default)]
pub(super) struct EventLoops {
    threads: HashMap<(u32, u32), Known>,
    processes: FxHashMap<u32, Process>,
    connections: InOrder<Position>,
    /// Walks over files so far.
    walks: u64,
    files_ns: Option<u64>,
    /// Connections were looked at, and threads not since.
    fresh: bool,
}

/// How far a connection was read and written.
#[derive(Clone, Copy)]
struct Position {
    /// The walk that saw it.
    walk: u64,
    read: u32,
    written: u32,
}

/// Where a thread was at the last looks.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Residence {
    /// One bit for each of the last looks: in epoll_wait.
    seen: u32,
    looks: u32,
    parked: u32,
    lives: bool,
}

/// Where a thread of an event loop is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Nothing is ready.
    Waiting,
    /// On a condition variable or the like: loops that hand epoll_wait from one thread to another (Go, tokio) park so.
    Parked,
    /// In a turn, with a CPU or wanting one.
    Computing,
    /// In a turn, asleep in another system call, waiting for a lock or a disk, or stopped.
    Blocked,
}

/// What is remembered of one thread.
struct Known {
    name: Arc<str>,
    residence: Residence,
    voluntary: u64,
    seen_ns: u64,
    /// Since when its turn has not ended.
    since_ns: u64,
    turns: Turns,
    busy_ns: u64,
}

/// What is remembered of one process, and added up since the last look at its connections.
#[derive(Default)]
struct Process {
    accepted: u32,
    loops: u32,
    /// Connections that were read from, written to, or accepted.
    progress: u64,
}

/// What one thread did since the last look at its connections.
#[derive(Clone, Copy, Debug, Default)]
struct Turns {
    busy_ns: u64,
    voluntary: u64,
    mean_ns: Option<u64>,
}

impl Source for EventLoops {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if sample.walks.files {
            self.look_at_connections(sample, targets);
        }
        if !sample.walks.waits {
            return;
        }
        let fresh = std::mem::take(&mut self.fresh);
        let mut threads = HashMap::with_capacity(sample.waits.len());
        let mut loops: BTreeMap<u32, u32> = BTreeMap::new();
        for wait in &sample.waits {
            let Some(target) = targets.of(wait.tgid) else {
                continue;
            };
            let before = self.threads.remove(&(wait.tgid, wait.tid));
            let process = self.processes.get(&wait.tgid);
            let moved = fresh && process.is_some_and(|process| process.progress > 0);
            let (known, look) = Known::after(before, wait, sample.mono_ns, moved);
            if known.residence.lives {
                let shown = loops.entry(wait.tgid).or_default();
                *shown = shown.saturating_add(1);
                if *shown <= MAX_PER_PROCESS {
                    let others = process.is_some_and(|process| process.accepted > 1);
                    let reading = known.reading(&look, wait, others, self.files_ns);
                    let id = QueueId::Thread {
                        name: Arc::clone(&known.name),
                        tid: wait.tid,
                    };
                    sink.put(target, Kind::Eventloop, &id, reading);
                } else {
                    sink.out.beyond_bound += 1;
                }
            }
            threads.insert((wait.tgid, wait.tid), known);
        }
        self.threads = threads;
        for (tgid, process) in &mut self.processes {
            process.loops = loops.get(tgid).copied().unwrap_or(0);
        }
        if fresh {
            self.end_stretch();
        }
        sink.forget_unseen(Kind::Eventloop);
    }
}

impl EventLoops {
    fn look_at_connections(&mut self, sample: &Sample, targets: &Targets) {
        self.walks += 1;
        let mut processes: FxHashMap<u32, Process> = FxHashMap::default();
        for connection in &sample.connections {
            let process = processes.entry(connection.tgid).or_default();
            if targets.listens(connection.netns, connection.local.port()) {
                process.accepted = process.accepted.saturating_add(1);
            }
            let now = Position {
                walk: self.walks,
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
                    false
                }
            };
            let moved = self.files_ns.is_some() && !stayed;
            process.progress = process.progress.saturating_add(u64::from(moved));
        }
        let walk = self.walks;
        self.connections.retain(|position| position.walk == walk);
        for (tgid, process) in &mut processes {
            // Where no thread was looked at since, what moved then still counts.
            let before = self.processes.get(tgid);
            process.loops = before.map_or(0, |before| before.loops);
            let left = before.map_or(0, |before| before.progress);
            process.progress = process.progress.saturating_add(left);
        }
        self.processes = processes;
        self.files_ns = Some(sample.mono_ns);
        self.fresh = true;
    }

    /// The mean turn since the last look at connections.
    fn end_stretch(&mut self) {
        for ((tgid, _), known) in &mut self.threads {
            if let Some(process) = self.processes.get(tgid) {
                let share = process.progress / u64::from(process.loops.max(1));
                known.turns.end(share);
            }
        }
        for process in self.processes.values_mut() {
            process.progress = 0;
        }
    }
}

impl Residence {
    /// Takes in one look.
    pub(super) fn look(&mut self, in_epoll: bool, parked: bool) {
        self.seen = self.seen << 1 | u32::from(in_epoll);
        self.looks = self.looks.saturating_add(1).min(LOOKS);
        self.parked = if parked {
            self.parked.saturating_add(1)
        } else {
            0
        };
        let times = self.seen.count_ones();
        if self.parked >= PARKED {
            *self = Self::default();
        } else if times >= 3 && times * 4 >= self.looks {
            // A loop whose turn does not end is one still.
            self.lives = true;
        }
    }

    /// Whether the thread lives in epoll_wait.
    pub(super) fn lives(&self) -> bool {
        self.lives
    }
}

impl Place {
    fn of(wait: &Wait) -> Self {
        match wait.state {
            State::Running | State::Runnable => return Self::Computing,
            State::Stopped | State::Uninterruptible => return Self::Blocked,
            State::Dead => return Self::Parked,
            State::Sleeping => {}
        }
        match call_of(wait) {
            Some((_, Does::Epoll)) => Self::Waiting,
            Some((_, Does::Accept | Does::Poll)) => Self::Parked,
            // No owner is asked for here: whether a futex is a lock does not hang on it, but for one that may be a counter.
            Some((_, Does::Futex)) => match Futex::of(wait, |_| true) {
                Some(Futex {
                    lock: Lock::Yes { .. },
                    ..
                }) => Self::Blocked,
                _ => Self::Parked,
            },
            Some(_) => Self::Blocked,
            // An unknown call may be anything, no call at all is not known.
            None => Self::Parked,
        }
    }
}

/// What one look tells of a thread.
struct Look {
    place: Place,
    elapsed_ns: Option<u64>,
    /// Of that time, in turns.
    busy_ns: u64,
    voluntary: u64,
}

impl Known {
    /// `moved`: connections of the process were read or written since the last look at them.
    fn after(before: Option<Self>, wait: &Wait, now_ns: u64, moved: bool) -> (Self, Look) {
        let place = Place::of(wait);
        let busy_ns = wait.cpu_ns.saturating_add(wait.run_delay_ns);
        let first = before.is_none();
        let mut known = before.unwrap_or_else(|| Self {
            name: wait.comm.as_str().into(),
            residence: Residence::default(),
            voluntary: wait.voluntary,
            seen_ns: now_ns,
            since_ns: now_ns,
            turns: Turns::default(),
            busy_ns,
        });
        if *known.name != *wait.comm {
            known.name = wait.comm.as_str().into();
        }
        let elapsed_ns = now_ns.saturating_sub(known.seen_ns);
        let voluntary = wait.voluntary.saturating_sub(known.voluntary);
        known
            .residence
            .look(place == Place::Waiting, place == Place::Parked);
        let ended = matches!(place, Place::Waiting | Place::Parked)
            || voluntary > 0
            || (place == Place::Computing && moved);
        if ended {
            known.since_ns = now_ns;
        }
        // Asleep at the look: asleep for the time since the last one, as far as looks can tell.
        let blocked_ns = if place == Place::Blocked {
            elapsed_ns
        } else {
            0
        };
        let worked_ns = busy_ns.saturating_sub(known.busy_ns);
        let in_turns_ns = worked_ns.saturating_add(blocked_ns);
        known.turns.add(in_turns_ns, voluntary);
        known.voluntary = wait.voluntary;
        known.busy_ns = busy_ns;
        known.seen_ns = now_ns;
        let look = Look {
            place,
            elapsed_ns: (!first).then_some(elapsed_ns),
            busy_ns: in_turns_ns,
            voluntary,
        };
        (known, look)
    }

    /// `others`: somebody else waits while one is served. A process with one connection at a time is a worker.
    fn reading(&self, look: &Look, wait: &Wait, others: bool, files_ns: Option<u64>) -> Reading {
        let in_turn = matches!(look.place, Place::Computing | Place::Blocked);
        // Whether connections move is known up to the last look at them.
        let until_ns = match look.place {
            Place::Computing => files_ns.unwrap_or(0).min(self.seen_ns),
            _ => self.seen_ns,
        };
        let oldest_age_ns = in_turn.then(|| until_ns.saturating_sub(self.since_ns));
        let mean_ns = self.turns.mean_ns;
        let mut extra = Vec::new();
        extra.extend(mean_ns.map(|mean_ns| ("turn_ns", mean_ns as f64)));
        if let Some(elapsed_ns) = look.elapsed_ns.filter(|elapsed| *elapsed > 0) {
            let share = look.busy_ns as f64 / elapsed_ns as f64;
            extra.push((UTILIZATION, share.min(1.0)));
        }
        let turns = look.elapsed_ns.map(|_| look.voluntary);
        Reading {
            depth: u64::from(in_turn),
            limit: Some(1),
            arrivals: turns,
            departures: turns,
            elapsed_ns: look.elapsed_ns,
            // Long turns would make their own length the measure of what is long.
            served: None,
            servers: 1,
            wait_ns: mean_ns
                .filter(|_| others)
                .map(|mean_ns| if mean_ns >= TURN_NS { mean_ns } else { 0 }),
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

    /// `progress`: connections that moved meanwhile, this loop's part.
    fn end(&mut self, progress: u64) {
        let turns = self.voluntary.max(progress);
        // A turn that has not ended goes on in the next stretch.
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
