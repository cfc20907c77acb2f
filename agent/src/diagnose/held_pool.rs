//! A connection pool that is used up without being busy: its connections are checked out and silent while requests wait.
//!
//! The kernel does not know which request has taken a connection. It knows when each connection last carried data, and when
//! each request in flight began. A request that holds a connection began before that connection last carried data. If there
//! are too few such requests, some connections were taken by requests that are over: they were never given back.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use super::{
    inputs::{Inputs, min_inflight},
    topology::{Link, Topology},
};
use crate::{queue::Targets, sample::TargetId};

/// A pool on which data moved more recently than this, ns, is in use. Far above the pause between two calls of one request.
const MIN_SILENT_NS: u64 = 1_000_000_000;
/// A pool that was last used longer than this before the queue began to fill, ns, has nothing to do with it.
const MAX_LEAD_NS: u64 = 1_000_000_000;
/// A single unused connection proves nothing.
const MIN_CONNECTIONS: usize = 2;
/// Times of connections and requests are as coarse as the kernel's timer: 10 ms at CONFIG_HZ=100, the coarsest in use.
const RESOLUTION_NS: u64 = 10_000_000;

/// Connections of one service to one endpoint, all of them silent although requests are in flight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HeldPool {
    pub(super) remote: SocketAddr,
    pub(super) connections: u64,
    /// Time since data last moved on any of them, ns.
    pub(super) silent_ns: u64,
    /// Requests in flight that the service has read.
    pub(super) requests: u64,
    /// Age of the oldest of them, ns.
    pub(super) oldest_ns: u64,
    /// Connections that none of these requests can have taken, because all began later. A lower bound.
    pub(super) orphans: u64,
    /// Connections whose far end reports that it is idle in a transaction.
    pub(super) in_transaction: u64,
    /// Connections that the peer has closed, and the service has not.
    pub(super) closed_by_peer: u64,
    /// Connections with a response that the service has not read.
    pub(super) unread: u64,
    /// Connections of which it is unknown whether a call is outstanding.
    pub(super) unknown: u64,
}

impl HeldPool {
    /// Connections that are evidently taken: a free one shows none of these signs.
    pub(super) fn evident(&self) -> u64 {
        self.in_transaction
            .max(self.unread)
            .max(self.closed_by_peer)
    }

    /// At least half of the connections are evidently taken.
    pub(super) fn is_evident(&self) -> bool {
        self.evident() * 2 >= self.connections
    }

    /// At least half of the connections were taken by requests that are over.
    pub(super) fn is_leaked(&self) -> bool {
        self.orphans * 2 >= self.connections
    }
}

/// The pool of this service that is held while its requests wait. `None`: there is none, or the service waits for something
/// else. `filling_since_ns`: when the queue began to fill.
pub(super) fn of(
    target: TargetId,
    (now_ns, filling_since_ns): (u64, u64),
    inputs: &Inputs,
    (topology, targets): (&Topology, &Targets),
) -> Option<HeldPool> {
    let ours = |tgid: u32| targets.of(tgid) == Some(target);
    let mut began_ns = Vec::new();
    let mut called: BTreeSet<SocketAddr> = BTreeSet::new();
    for (cookie, pending) in topology.all_awaited() {
        if pending.target != target {
            continue;
        }
        if pending.accepted {
            if pending.read {
                began_ns.push(pending.began_ns);
            }
            continue;
        }
        // It waits for a response: that is why its requests wait.
        if now_ns.saturating_sub(pending.began_ns) >= MIN_SILENT_NS {
            return None;
        }
        called.extend(topology.link(cookie).map(|link| link.remote));
    }
    began_ns.sort_unstable();
    let oldest_ns = now_ns.saturating_sub(*began_ns.first()?);
    if oldest_ns < MIN_SILENT_NS {
        return None;
    }
    let mut pools: BTreeMap<SocketAddr, Vec<&Link>> = BTreeMap::new();
    for (_, link) in topology.links() {
        if !link.accepted && ours(link.tgid) && !called.contains(&link.remote) {
            pools.entry(link.remote).or_default().push(link);
        }
    }
    let filling_ns = now_ns.saturating_sub(filling_since_ns).max(oldest_ns);
    let held = pools.into_iter().filter_map(|(remote, links)| {
        let unknown = inputs.steady_pool(target, remote)?;
        let silent_ns = links.iter().map(|link| link.since_data_ns).min()?;
        let in_transaction = links.iter().filter(|link| {
            let end = topology.other_end(link);
            end.is_some_and(|end| topology.idle_in_transaction_since_ns(end.tgid).is_some())
        });
        let pool = HeldPool {
            remote,
            connections: links.len() as u64,
            silent_ns,
            requests: began_ns.len() as u64,
            oldest_ns,
            orphans: orphans(&links, &began_ns, now_ns),
            in_transaction: in_transaction.count() as u64,
            closed_by_peer: links.iter().filter(|link| link.closed_by_peer).count() as u64,
            unread: links.iter().filter(|link| link.is_unread).count() as u64,
            unknown,
        };
        // A service with one connection per worker has as many requests as connections.
        let exceed = pool.requests as f64 >= min_inflight(pool.connections);
        // The pool was used until the requests began to wait.
        let lead_ns = silent_ns.saturating_sub(filling_ns);
        let is_on_their_path = lead_ns <= MAX_LEAD_NS.max(filling_ns / 4);
        let fits = links.len() >= MIN_CONNECTIONS && silent_ns >= MIN_SILENT_NS;
        (fits && (pool.is_evident() || exceed && is_on_their_path)).then_some(pool)
    });
    // Prefer a pool that is evidently taken, then the one that was used last.
    held.max_by_key(|pool| {
        (
            pool.is_evident(),
            std::cmp::Reverse(pool.silent_ns),
            pool.connections,
        )
    })
}

/// How many of these connections no request in flight can have taken. A request that holds a connection began before the
/// connection last carried data, and holds only this one. So if all are held, then at the i-th of these times at least i of
/// the requests had begun.
fn orphans(links: &[&Link], began_ns: &[u64], now_ns: u64) -> u64 {
    let mut used_ns: Vec<u64> = links
        .iter()
        .map(|link| now_ns.saturating_sub(link.since_data_ns))
        .collect();
    used_ns.sort_unstable();
    let missing = used_ns.iter().enumerate().map(|(index, used_ns)| {
        let until_ns = used_ns.saturating_add(RESOLUTION_NS);
        let begun = began_ns.partition_point(|began_ns| *began_ns <= until_ns);
        (index as u64 + 1).saturating_sub(begun as u64)
    });
    missing.max().unwrap_or(0)
}
