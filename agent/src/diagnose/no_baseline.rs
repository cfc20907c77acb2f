//! Requests in flight of which it cannot be told whether they are a jam: what is usual for them was not seen, and what was
//! seen does not decide. A service that is slow by design looks the same, so it is said, and not judged.

use std::sync::Arc;

use super::{
    inputs::{Facts, endpoint},
    topology::Topology,
};
use crate::{
    detect::Waiting,
    queue::{Kind, QueueKey, Targets},
    sample::TargetId,
};

/// Fewer requests are not worth a word.
const MANY: u64 = 5;
/// Half of them wait for so long, ns: a person would ask why.
const LONG_NS: u64 = 1_000_000_000;

/// Many requests that wait for long, and stand still.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoBaseline {
    pub key: Arc<QueueKey>,
    pub waiting: Waiting,
    /// The calls of the same service of which most are outstanding.
    pub calls: Option<Calls>,
}

/// Calls on one endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calls {
    /// `127.0.0.1:9000`.
    pub endpoint: String,
    /// Who answers them, where that is on this machine: `python3 (812)`.
    pub process: Option<String>,
    pub outstanding: u64,
    pub connections: Option<u64>,
}

/// Those of `ok` that are worth a word.
pub(super) fn of(
    ok: Vec<(Arc<QueueKey>, Waiting)>,
    facts: &Facts,
    (world, targets): (&Topology, &Targets),
) -> Vec<NoBaseline> {
    let is_long = |waiting: &Waiting| waiting.depth >= MANY && waiting.median_age_ns >= LONG_NS;
    // What is looked at for what another waits for has its place in that one's words.
    let asked_for = |key: &QueueKey| {
        let target = targets.get(key.target);
        target.is_some_and(|target| !target.followed)
    };
    ok.into_iter()
        .filter(|(key, waiting)| is_long(waiting) && asked_for(key))
        .map(|(key, waiting)| NoBaseline {
            calls: calls(key.target, facts, (world, targets)),
            key,
            waiting,
        })
        .collect()
}

fn calls(
    target: TargetId,
    facts: &Facts,
    (world, targets): (&Topology, &Targets),
) -> Option<Calls> {
    let (key, reading) = facts
        .of(target, Kind::Downstream)
        .filter(|(_, reading)| reading.depth > 0)
        .max_by_key(|(key, reading)| (reading.depth, Arc::clone(key)))?;
    let remote = key.id.remote();
    let mut links = world.links().map(|(_, link)| link);
    let link = links.find(|link| {
        !link.accepted && Some(link.remote) == remote && targets.of(link.tgid) == Some(target)
    });
    let end = link.and_then(|link| world.other_end(link));
    Some(Calls {
        process: end.map(|end| world.process(end.tgid, targets)),
        endpoint: endpoint(key),
        outstanding: reading.depth,
        connections: reading.limit,
    })
}
