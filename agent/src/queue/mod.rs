//! The queue model: from the raw facts of a sample to queues with depth, limit, rates, wait and losses.
//!
//! One module per source of facts. Each keeps what it must remember between ticks (counters to subtract, when
//! a head last moved) and writes one [`Reading`] per queue it saw. Pure: no clock, no kernel, no I/O.
#![forbid(unsafe_code)]

mod accept;
mod conversations;
mod disk;
mod downstream;
mod endpoint;
mod eventloop;
mod fd;
mod head;
mod identity;
mod inflight;
mod inflow;
mod kind;
mod lock;
mod memory;
mod pipe;
mod requests;
mod runqueue;
mod starvation;
mod stream;
mod syn;
pub(crate) mod syscalls;
mod targets;
mod udp;
mod unix;
mod unix_listener;
mod uring;
#[cfg(test)]
mod watched;
mod workers;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

pub use identity::{QueueId, QueueKey, RingHalf, UnixEnd};
pub use kind::{Judged, Kind};
use rustc_hash::FxHashMap;
use serde::Serialize;
pub use targets::Targets;

use crate::sample::{Sample, TargetId};

/// Queues of one kind that one target may have; what is beyond is counted, not shown.
pub const MAX_QUEUES_PER_KIND: usize = 256;

/// Of what does the work (workers, a loop, CPUs): the share that is at work, among a reading's further measures.
pub const UTILIZATION: &str = "utilization";

/// Of connections that carry requests: those answered per second, hidden ones too, as far as they can be told.
pub const RESPONSES_PER_S: &str = "responses_per_s";

/// What one tick tells of one queue. `None` is "not known", never 0.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Reading {
    /// In [`Reading::unit`], as `limit`.
    pub depth: u64,
    pub limit: Option<u64>,
    /// What depth and limit count, where the kernel limits this queue by something else than [`Kind::unit`] says.
    pub unit: Option<&'static str>,
    /// Depth over limit of the fullest part: one socket of several that serve one port, one connection of many.
    pub fill: Option<f64>,
    /// At the limit: the next arrival is refused, or its sender blocks.
    pub full: bool,
    /// Since the previous reading, in the unit of the depth (for the run queue: dispatches).
    pub arrivals: Option<u64>,
    pub departures: Option<u64>,
    /// Time since the previous reading, ns; `None` for the first.
    pub elapsed_ns: Option<u64>,
    /// Pieces of work taken from the queue since the previous reading (accepts, reads), at least.
    pub served: Option<u64>,
    /// Who takes from the queue, at most: the target's threads.
    pub servers: u32,
    /// How long what leaves now has waited, or what comes now will: measured where it can be, else by Little's law. ns.
    pub wait_ns: Option<u64>,
    /// Age of what has waited longest, ns.
    pub oldest_age_ns: Option<u64>,
    /// Age of each piece of work that waits and that the kernel timed, ns, oldest first: accept queues alone have them.
    pub ages_ns: Vec<u64>,
    /// Lost since the previous reading.
    pub losses: u64,
    /// The part of the queue that is worst off, in words: `fd 12 from 10.0.0.9:41234`.
    pub worst: Option<String>,
    /// Further measures of this kind, by their JSON key.
    pub extra: Vec<(&'static str, f64)>,
}

impl Reading {
    /// A further measure of this kind.
    pub fn extra(&self, key: &str) -> Option<f64> {
        let mut all = self.extra.iter();
        all.find_map(|(name, value)| (*name == key).then_some(*value))
    }
}

/// The readings of one tick.
#[derive(Debug, Default)]
pub struct Readings {
    pub queues: Vec<(Arc<QueueKey>, Reading)>,
    /// Queues that were there and are no longer.
    pub gone: Vec<Arc<QueueKey>>,
    /// Queues beyond [`MAX_QUEUES_PER_KIND`], not shown.
    pub beyond_bound: usize,
    /// Every request that waits for its answer, of the targets that are looked at closely; `None` where this sample did
    /// not tell.
    pub awaited: Option<Vec<Awaited>>,
}

/// A request that waits for its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Awaited {
    pub target: TargetId,
    pub tgid: u32,
    /// Of the connection.
    pub cookie: u64,
    /// The target is to answer it; else it waits for the answer.
    pub accepted: bool,
    /// It has been read.
    pub read: bool,
    /// CLOCK_MONOTONIC, ns.
    pub began_ns: u64,
}

/// All queues of all targets.
pub struct Model {
    targets: Targets,
    keys: Keys,
    sources: Vec<Box<dyn Source>>,
    focus_scope: BTreeSet<TargetId>,
    before: Before,
}

/// All sources, in the order in which they read a sample.
///
/// One dependency fixes the order: the accept queues are read after the TCP connections (`Streams`), which count the
/// new ones among the accepted ([`Sink::new`]). The other sources do not depend on each other within a sample. Their
/// order, from the far end of the path that work takes to its beginning, is the order of [`Readings::queues`], in which
/// queues that saturate in the same sample open their episodes.
fn sources() -> Vec<Box<dyn Source>> {
    vec![
        Box::<uring::Uring>::default(),
        Box::<fd::Files>::default(),
        Box::<memory::Memory>::default(),
        Box::<disk::Disk>::default(),
        Box::<lock::Locks>::default(),
        Box::<runqueue::RunQueues>::default(),
        Box::<eventloop::EventLoops>::default(),
        Box::<workers::Workers>::default(),
        // Yields `inflight` and `downstream`.
        Box::<conversations::Conversations>::default(),
        Box::<pipe::Pipes>::default(),
        // Yields `unix`, and `accept` for unix listeners.
        Box::<unix::Unix>::default(),
        Box::<udp::Udp>::default(),
        // Yields `recv` and `send`.
        Box::<stream::Streams>::default(),
        Box::<accept::Accept>::default(),
        Box::<syn::Syn>::default(),
    ]
}

/// Reads the queues of one kind (or of several that come from the same facts) from samples, and keeps what it must
/// remember between them.
trait Source: Send {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>);
}

impl Default for Model {
    fn default() -> Self {
        Self {
            targets: Targets::default(),
            keys: Keys::default(),
            focus_scope: BTreeSet::new(),
            before: Before::default(),
            sources: sources(),
        }
    }
}

impl Model {
    /// Takes in one sample.
    pub fn read(&mut self, sample: &Sample) -> Readings {
        let mut out = Readings::default();
        if let Some(targets) = &sample.targets {
            self.targets.replace(targets);
            self.keys.retain_targets(&self.targets, &mut out.gone);
        }
        self.targets.learn(sample);
        let mut sink = Sink {
            keys: &mut self.keys,
            out: &mut out,
            new: NewConnections::new(),
            accepted: Accepted::new(),
            before: &self.before,
            focus_scope: &self.focus_scope,
        };
        for source in &mut self.sources {
            source.read(sample, &self.targets, &mut sink);
        }
        self.before = Before {
            new: sample.walks.files.then_some(sink.new),
            accepted: sink.accepted,
        };
        out
    }

    /// Tells each request of these targets from now on.
    pub fn set_focus_scope(&mut self, at: BTreeSet<TargetId>) {
        self.focus_scope = at;
    }

    /// The targets as last told.
    pub fn targets(&self) -> &Targets {
        &self.targets
    }
}

/// Accepted connections not seen at the last walk over files, per network namespace and local port.
type NewConnections = HashMap<(u32, u16), u64>;

/// Connections that a service took since the last look, whether or not they are still there, by its network namespace and
/// port; `None` where that is not known.
type Accepted = BTreeMap<(TargetId, u32, u16), Option<u64>>;

/// What the sample before told of new connections.
#[derive(Default)]
struct Before {
    /// `None`: it did not look at all of them.
    new: Option<NewConnections>,
    accepted: Accepted,
}

/// Where the kinds' modules put what they read.
struct Sink<'a> {
    keys: &'a mut Keys,
    out: &'a mut Readings,
    /// What the connections tell the accept queue.
    new: NewConnections,
    /// What the accept queue tells the requests, which are read before it: at the next sample.
    accepted: Accepted,
    before: &'a Before,
    /// Targets of which each request is to be told.
    focus_scope: &'a BTreeSet<TargetId>,
}

impl Sink<'_> {
    fn put(&mut self, target: TargetId, kind: Kind, id: &QueueId, reading: Reading) {
        self.put_with(target, kind, id, || reading);
    }

    /// The same, where there may be many more queues than are shown: of those, none is read.
    fn put_with(
        &mut self,
        target: TargetId,
        kind: Kind,
        id: &QueueId,
        reading: impl FnOnce() -> Reading,
    ) {
        match self.keys.get(target, kind, id) {
            Some(key) => self.out.queues.push((key, reading())),
            None => self.out.beyond_bound += 1,
        }
    }

    /// After a complete walk: what of this kind was not put now is gone.
    fn forget_unseen(&mut self, kind: Kind) {
        self.forget_unseen_where(kind, |_| true);
    }

    /// The same, where several sources yield queues of this kind: only those whose identities are this source's.
    fn forget_unseen_where(&mut self, kind: Kind, is_own: impl Fn(&QueueId) -> bool) {
        let of_kind = self.out.queues.iter().filter(|(key, _)| key.kind == kind);
        // Keys are shared: equal ones are the same allocation.
        let mut seen: Vec<*const QueueKey> = of_kind.map(|(key, _)| Arc::as_ptr(key)).collect();
        seen.sort_unstable();
        let gone = self.keys.remove(
            |_, of| of == kind,
            |key| is_own(&key.id) && seen.binary_search(&Arc::as_ptr(key)).is_err(),
        );
        self.out.gone.extend(gone);
    }
}

/// One shared key per queue, and the bound on how many there are.
#[derive(Default)]
struct Keys {
    /// Each inner map has at most [`MAX_QUEUES_PER_KIND`] entries, so that a fast hash is safe although others choose
    /// paths and addresses.
    known: FxHashMap<(TargetId, Kind), FxHashMap<QueueId, Arc<QueueKey>>>,
}

impl Keys {
    /// The key of this queue; `None` for a new one beyond the bound.
    fn get(&mut self, target: TargetId, kind: Kind, id: &QueueId) -> Option<Arc<QueueKey>> {
        let ids = self.known.entry((target, kind)).or_default();
        if let Some(key) = ids.get(id) {
            return Some(Arc::clone(key));
        }
        if ids.len() >= MAX_QUEUES_PER_KIND {
            return None;
        }
        let key = Arc::new(QueueKey::new(target, kind, id.clone()));
        ids.insert(id.clone(), Arc::clone(&key));
        Some(key)
    }

    /// Removes and returns the keys that go, in their order, among the queues of these targets and kinds.
    fn remove(
        &mut self,
        among: impl Fn(TargetId, Kind) -> bool,
        goes: impl Fn(&Arc<QueueKey>) -> bool,
    ) -> Vec<Arc<QueueKey>> {
        let mut gone = Vec::new();
        for ((target, kind), ids) in &mut self.known {
            if !among(*target, *kind) {
                continue;
            }
            ids.retain(|_, key| {
                let stays = !goes(key);
                if !stays {
                    gone.push(Arc::clone(key));
                }
                stays
            });
        }
        gone.sort_unstable();
        gone
    }

    fn retain_targets(&mut self, targets: &Targets, gone: &mut Vec<Arc<QueueKey>>) {
        let is_gone = |target, _| targets.get(target).is_none();
        gone.extend(self.remove(is_gone, |_| true));
        self.known
            .retain(|(target, _), _| targets.get(*target).is_some());
    }
}

/// `after - before` of a counter modulo 2^32.
fn advance(before: u32, after: u32) -> u64 {
    u64::from(after.wrapping_sub(before))
}

/// Little's law: the wait of what comes now, when so much departed in the time since the last look.
fn little(depth: u64, departed: u64, elapsed_ns: Option<u64>) -> Option<u64> {
    elapsed_ns
        .filter(|_| departed > 0)
        .map(|elapsed| (depth as f64 / departed as f64 * elapsed as f64) as u64)
}
