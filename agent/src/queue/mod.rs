//! The queue model: turns the raw facts of a sample into queues with depth, limit, rates, wait and losses.
//!
//! There is one module per source of facts. Each keeps state between samples, such as counters to subtract or the time
//! at which the head of a queue last moved, and writes one [`Reading`] per queue.
//!
//! **Invariant:** this module is pure: no clock, no kernel, no I/O. Time comes with the sample.
#![forbid(unsafe_code)]

mod accept;
mod app;
mod conversations;
mod disk;
mod downstream;
mod endpoint;
mod eventloop;
mod fd;
mod groups;
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

use crate::hash::HashMap;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

pub use conversations::{MAX_SIZE_DEVIATION, SIZE_TIME_CONSTANT_NS};
pub(crate) use downstream::LocalListeners;
pub use identity::{QueueId, QueueKey, RingHalf, UnixEnd};
pub use kind::{Criterion, Kind};
use rustc_hash::FxHashMap;
use serde::Serialize;
pub use targets::Targets;

use crate::sample::{Sample, TargetId};

/// Queues of one kind that are reported per target. Further ones are only counted, so that a service with thousands of
/// endpoints cannot exhaust the memory of the agent or of a metrics store.
pub const MAX_QUEUES_PER_KIND: usize = 256;

/// JSON key, in [`Reading::extra`], of the utilization (0 to 1) of workers, an event loop, or CPUs.
pub const UTILIZATION: &str = "utilization";

/// JSON key, in [`Reading::extra`], of the responses per second on connections that carry requests. It includes an
/// estimate of requests that began and ended between two samples.
pub const RESPONSES_PER_S: &str = "responses_per_s";
/// JSON key, in [`Reading::extra`], of the bytes per second that were sent in these responses.
pub const RESPONSE_BYTES_PER_S: &str = "response_bytes_per_s";
/// JSON key, in [`Reading::extra`], of the share of the time in which some task stalled for memory.
pub const STALL_SHARE: &str = "stall_share";

/// The state of one queue at one sample. `None` means unknown, never 0.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Reading {
    /// Items in the queue, in [`Reading::unit`].
    pub depth: u64,
    /// Capacity, in [`Reading::unit`].
    pub limit: Option<u64>,
    /// Unit of depth and limit, where it differs from [`Kind::unit`].
    pub unit: Option<&'static str>,
    /// Depth ÷ limit of the fullest part: of several sockets that serve one port, or of many connections.
    pub fill: Option<f64>,
    /// The queue is at its limit: the next arrival is refused, or its sender blocks.
    pub full: bool,
    /// Arrivals since the previous reading, in the unit of the depth (for the run queue: dispatches).
    pub arrivals: Option<u64>,
    /// Departures since the previous reading, in the unit of the depth.
    pub departures: Option<u64>,
    /// Further work that may have arrived and departed since the previous reading.
    #[serde(skip)]
    pub hidden: Hidden,
    /// Upper bound of the work that was begun and completed since the previous reading without being seen, where its number is
    /// unknown. 0 if the service was idle.
    #[serde(skip)]
    pub unseen_at_most: u64,
    /// Time since the previous reading, ns; `None` for the first.
    pub elapsed_ns: Option<u64>,
    /// Lower bound of the dequeue operations (accepts, reads) since the previous reading.
    pub served: Option<u64>,
    /// Upper bound of the number of threads that serve the queue.
    pub servers: u32,
    /// Queueing delay now, ns: measured where the kernel allows it, otherwise estimated by Little's law.
    pub wait_ns: Option<u64>,
    /// Age of the oldest item that waits, ns.
    pub oldest_age_ns: Option<u64>,
    /// Ages of the items that wait, ns, oldest first. Only TCP accept queues, requests in flight and outstanding calls have
    /// them; of requests and calls, the oldest 1,024.
    pub ages_ns: Vec<u64>,
    /// For how long a queue inside a service has had no consumers, ns: from the first answer that reports none to the
    /// last one. `None`: it has consumers, or nobody was ever seen to take items from it.
    #[serde(skip)]
    pub no_consumers_ns: Option<u64>,
    /// Items lost since the previous reading.
    pub losses: u64,
    /// The worst part of the queue, for display: `fd 12 from 10.0.0.9:41234`.
    pub worst: Option<String>,
    /// Further measures that only some kinds have, by their JSON key.
    pub extra: Vec<(&'static str, f64)>,
}

/// Work that came and went between two readings, so that neither arrivals nor departures include it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hidden {
    /// None.
    #[default]
    Nothing,
    /// At most this many items.
    AtMost(u64),
    /// Any number.
    Unknown,
}

impl Reading {
    /// The measure with this JSON key, if the queue has it.
    pub fn extra(&self, key: &str) -> Option<f64> {
        let mut all = self.extra.iter();
        all.find_map(|(name, value)| (*name == key).then_some(*value))
    }
}

/// The readings of one sample.
#[derive(Debug, Default)]
pub struct Readings {
    pub queues: Vec<(Arc<QueueKey>, Reading)>,
    /// Queues that existed at an earlier sample and no longer exist.
    pub gone: Vec<Arc<QueueKey>>,
    /// Queues beyond [`MAX_QUEUES_PER_KIND`], which have no reading.
    pub queues_over_limit: usize,
    /// The unanswered requests of the targets in the focus scope, at most 1,024 of each endpoint, oldest first. `None` if this
    /// sample has no such data.
    pub pending_requests: Option<Vec<PendingRequest>>,
}

/// A request that has not been answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingRequest {
    pub target: TargetId,
    pub tgid: u32,
    /// Socket cookie of its connection.
    pub cookie: u64,
    /// The target accepted the connection, so it has to answer. Otherwise the target sent the request.
    pub accepted: bool,
    /// The target has read the request.
    pub read: bool,
    /// When it began, CLOCK_MONOTONIC, ns.
    pub began_ns: u64,
}

/// All queues of all targets, and the state that their sources keep between samples.
pub struct Model {
    targets: Targets,
    keys: Keys,
    sources: Vec<Box<dyn Source>>,
    focus_scope: BTreeSet<TargetId>,
    previous: Previous,
}

/// All sources, in the order in which they read a sample.
///
/// One dependency constrains the order: `Streams` counts the new accepted connections ([`Sink::new`]), and the accept
/// queues read that count, so they come after it. The other sources do not depend on each other within a sample. Their
/// order is that of [`Readings::queues`], and so the order in which queues that saturate in the same sample open their
/// episodes: those nearest the cause first, accept and SYN queues last.
fn sources() -> Vec<Box<dyn Source>> {
    vec![
        Box::<app::Apps>::default(),
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

/// Reads the queues of one kind, or of several that come from the same facts, and keeps state between samples.
trait Source: Send {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>);
}

impl Default for Model {
    fn default() -> Self {
        Self {
            targets: Targets::default(),
            keys: Keys::default(),
            focus_scope: BTreeSet::new(),
            previous: Previous::default(),
            sources: sources(),
        }
    }
}

impl Model {
    /// The queues of one sample. Samples must come in the order of their time.
    pub fn read(&mut self, sample: &Sample) -> Readings {
        let mut out = Readings::default();
        if let Some(targets) = &sample.targets {
            self.targets.replace(targets);
            self.keys.retain_targets(&self.targets, &mut out.gone);
        }
        self.targets.update(sample);
        let mut sink = Sink {
            keys: &mut self.keys,
            out: &mut out,
            new: NewConnections::default(),
            accepted: Accepted::new(),
            working: None,
            previous: &self.previous,
            focus_scope: &self.focus_scope,
        };
        for source in &mut self.sources {
            source.read(sample, &self.targets, &mut sink);
        }
        let (new, accepted, working) = (sink.new, sink.accepted, sink.working);
        // A sample of threads alone counts no connections, and nothing has read the counts of the sample before.
        if sample.scans.files || sample.scans.focused_sockets {
            self.previous.new = sample.scans.files.then_some(new);
            self.previous.accepted = accepted;
        }
        if let Some(working) = working {
            self.previous.working = working;
        }
        out
    }

    /// From now on, [`Readings::pending_requests`] covers these targets.
    pub fn set_focus_scope(&mut self, targets: BTreeSet<TargetId>) {
        self.focus_scope = targets;
    }

    /// The targets of the last sample that listed them.
    pub fn targets(&self) -> &Targets {
        &self.targets
    }
}

/// Accepted connections that the previous file scan did not see, per network namespace and local port.
type NewConnections = HashMap<(u32, u16), u64>;

/// Connections accepted since the previous scan of listeners, still open or not, per service, network namespace and local
/// port.
type Accepted = BTreeMap<(TargetId, u32, u16), AcceptedCount>;

#[derive(Clone, Copy)]
struct AcceptedCount {
    /// `None` if the number is unknown.
    count: Option<u64>,
    /// Connections that entered any accept queue of the namespace. 0 if unknown.
    in_namespace: u64,
}

/// What the last sample with connections counted.
#[derive(Default)]
struct Previous {
    /// `None` if that sample did not include a file scan, and so did not see all connections.
    new: Option<NewConnections>,
    accepted: Accepted,
    /// See [`Sink::working`]; of the last scan over threads.
    working: BTreeSet<TargetId>,
}

/// Collects the readings of all sources, and passes facts from one source to another.
struct Sink<'a> {
    keys: &'a mut Keys,
    out: &'a mut Readings,
    /// Passed from the TCP connections to the accept queues.
    new: NewConnections,
    /// Passed from the accept queues to the requests in flight and the event loops, which are read before them and so use it at
    /// the next sample.
    accepted: Accepted,
    /// The targets that used CPU time in the last second or so ([`runqueue`]). `None` unless this sample scans threads. Passed
    /// from the run queues to the requests in flight, which use it at the next sample.
    working: Option<BTreeSet<TargetId>>,
    previous: &'a Previous,
    /// Targets whose pending requests are listed.
    focus_scope: &'a BTreeSet<TargetId>,
}

impl Sink<'_> {
    fn put(&mut self, target: TargetId, kind: Kind, id: &QueueId, reading: Reading) {
        self.put_with(target, kind, id, || reading);
    }

    /// Like `put`, for sources that may have many more queues than the limit: readings beyond it are not computed.
    fn put_with(
        &mut self,
        target: TargetId,
        kind: Kind,
        id: &QueueId,
        reading: impl FnOnce() -> Reading,
    ) {
        match self.keys.get(target, kind, id) {
            Some(key) => self.out.queues.push((key, reading())),
            None => self.out.queues_over_limit += 1,
        }
    }

    /// Ends the queues of this kind that have no reading in this sample. Only valid after a complete scan.
    fn forget_unseen(&mut self, kind: Kind) {
        self.forget_unseen_where(kind, |_| true);
    }

    /// Like `forget_unseen`, where several sources yield queues of this kind: ends only this source's own.
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
    /// Each inner map has at most [`MAX_QUEUES_PER_KIND`] entries, so an unkeyed hash is safe even though outsiders
    /// choose paths and addresses.
    known: FxHashMap<(TargetId, Kind), FxHashMap<QueueId, Arc<QueueKey>>>,
}

impl Keys {
    /// The key of this queue; `None` if it is new and the bound is reached.
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

    /// Removes the keys for which `goes` holds, among the targets and kinds for which `among` holds. Returns them
    /// sorted.
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

/// Growth of a counter that wraps at 2^32.
fn advance(before: u32, after: u32) -> u64 {
    u64::from(after.wrapping_sub(before))
}

/// The queueing delay by Little's law, ns: depth ÷ departure rate. `None` if nothing departed.
fn littles_law(depth: u64, departed: u64, elapsed_ns: Option<u64>) -> Option<u64> {
    elapsed_ns
        .filter(|_| departed > 0)
        .map(|elapsed| (depth as f64 / departed as f64 * elapsed as f64) as u64)
}
