//! Requests in flight that cannot be judged: many, and old, but neither growing nor shrinking, and their baseline was not
//! observed.
//!
//! They may be a backlog, or the service may be slow by design. So they are reported as `no_baseline`, without a verdict.

use std::sync::Arc;

use super::{
    inputs::{Inputs, endpoint_of},
    topology::Topology,
};
use crate::{
    detect::Waiting,
    queue::{Kind, QueueKey, Targets},
    sample::TargetId,
};

/// Fewer requests in flight are not reported.
const MIN_REQUESTS: u64 = 5;
/// Median age of the requests below which they are not reported, ns: a wait that a person would ask about.
const MIN_MEDIAN_AGE_NS: u64 = 1_000_000_000;

/// A queue of many old requests that neither grows nor shrinks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoBaseline {
    pub key: Arc<QueueKey>,
    pub waiting: Waiting,
    /// The endpoint with the most outstanding calls of the same service.
    pub calls: Option<Calls>,
}

/// Calls on one endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calls {
    /// `127.0.0.1:9000`.
    pub endpoint: String,
    /// The process that answers them, if it is on this machine: `python3 (812)`.
    pub process: Option<String>,
    pub outstanding: u64,
    pub connections: Option<u64>,
}

/// Those of the queues at level ok that are to be reported.
pub(super) fn of(
    ok: Vec<(Arc<QueueKey>, Waiting)>,
    inputs: &Inputs,
    (topology, targets): (&Topology, &Targets),
) -> Vec<NoBaseline> {
    let is_old = |waiting: &Waiting| {
        waiting.depth >= MIN_REQUESTS && waiting.median_age_ns >= MIN_MEDIAN_AGE_NS
    };
    // A service that is watched only because another waits for it appears in that one's report.
    let is_selected = |key: &QueueKey| {
        let target = targets.get(key.target);
        target.is_some_and(|target| !target.is_neighbour)
    };
    ok.into_iter()
        .filter(|(key, waiting)| is_old(waiting) && is_selected(key))
        .map(|(key, waiting)| NoBaseline {
            calls: calls(key.target, inputs, (topology, targets)),
            key,
            waiting,
        })
        .collect()
}

fn calls(
    target: TargetId,
    inputs: &Inputs,
    (topology, targets): (&Topology, &Targets),
) -> Option<Calls> {
    let (key, reading) = inputs
        .of(target, Kind::Downstream)
        .filter(|(_, reading)| reading.depth > 0)
        .max_by_key(|(key, reading)| (reading.depth, Arc::clone(key)))?;
    let remote = key.id.remote();
    let mut links = topology.links().map(|(_, link)| link);
    let link = links.find(|link| {
        !link.accepted && Some(link.remote) == remote && targets.of(link.tgid) == Some(target)
    });
    let end = link.and_then(|link| topology.other_end(link));
    Some(Calls {
        process: end.map(|end| topology.process(end.tgid, targets)),
        endpoint: endpoint_of(key),
        outstanding: reading.depth,
        connections: reading.limit,
    })
}
