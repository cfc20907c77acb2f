//! The queue of a proxy or of a connection pool: its items are served over connections that the service has opened itself. Which of
//! these belong to the queue, what is in progress on them, and who is at their other ends.
//!
//! The service names an end of each connection, or the address of each server. Where it names none, all its connections count, and
//! only if they lead to one place. Where what is in progress leads to several places and none of them has most of the waiting, the
//! connections do not say who holds the queue up, unless all of them wait for the same.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use super::topology::{DNS_PORT, Link, STREAMING_NS, Topology, canonical};
use crate::{
    queue::Targets,
    sample::TargetId,
    text::{count, duration},
};

/// Times of connections are as coarse as the kernel's timer (10 ms at CONFIG_HZ=100), and two connections are scanned at two moments.
const SAME_MOMENT_NS: u64 = 20_000_000;
/// A connection on which data moved more recently than this, ns, is in use: far above the pause between two queries.
const MIN_SILENT_NS: u64 = 1_000_000_000;
/// Most places named in the evidence, and most of those that are all followed.
const MAX_PLACES: usize = 4;

/// The connections of one queue.
#[derive(Clone, Debug)]
pub(super) struct Served {
    /// The service named them.
    pub(super) is_named: bool,
    pub(super) connections: u64,
    /// Those with a call without a response, or with a response under way.
    pub(super) busy: u64,
    /// Those that have carried nothing for a while, with their other end idle in a transaction.
    pub(super) held: u64,
    /// How long the longest of these transactions has been idle, ns.
    pub(super) held_ns: u64,
    /// Those that have carried nothing for a while, a response last, in a transaction or not; and for how long the first of them, ns.
    pub(super) silent: u64,
    pub(super) silent_ns: u64,
    /// The process of a client that has them, if it is the same for all of which it is known.
    pub(super) holder: Option<u32>,
    remotes: BTreeSet<SocketAddr>,
    /// Where the busy ones lead, those with most waiting first.
    places: Vec<Place>,
}

/// Where some of the busy connections lead: one service, process, or address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) at: At,
    /// A process there, or the address.
    name: String,
    /// The connections, the one with the oldest call first.
    pub(super) cookies: Vec<u64>,
    /// Age of the oldest call, ns; and of all calls in total.
    oldest_ns: u64,
    total_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum At {
    Service(TargetId),
    Process(u32),
    /// Not on this machine, not visible, or not reached: the data is on its way.
    Address(SocketAddr),
}

impl Served {
    /// `ends`: what the service names, local or remote addresses.
    pub(super) fn of(
        target: TargetId,
        ends: &[SocketAddr],
        now_ns: u64,
        (topology, targets): (&Topology, &Targets),
    ) -> Self {
        let ends: BTreeSet<SocketAddr> = ends.iter().copied().map(canonical).collect();
        let is_named = |link: &Link| {
            ends.contains(&canonical(link.local)) || ends.contains(&canonical(link.remote))
        };
        let could_be =
            |link: &Link| link.remote.port() != DNS_PORT && topology.own_end(link).is_none();
        let ours = |link: &Link| match ends.is_empty() {
            true => could_be(link),
            false => is_named(link),
        };
        let links: Vec<(u64, &Link)> = topology
            .links()
            .filter(|(_, link)| !link.accepted && targets.of(link.tgid) == Some(target))
            .filter(|(_, link)| ours(link))
            .collect();
        let mut served = Self {
            is_named: !ends.is_empty(),
            connections: links.len() as u64,
            busy: 0,
            held: 0,
            held_ns: 0,
            silent: 0,
            silent_ns: 0,
            holder: None,
            remotes: links
                .iter()
                .map(|(_, link)| canonical(link.remote))
                .collect(),
            places: Vec::new(),
        };
        let mut places: BTreeMap<At, Vec<(u64, u64)>> = BTreeMap::new();
        let mut silent = Vec::new();
        for (cookie, link) in links {
            if let Some(age_ns) = in_progress_ns(cookie, link, now_ns, topology) {
                served.busy += 1;
                let at = place(cookie, link, (topology, targets));
                places.entry(at).or_default().push((age_ns, cookie));
                continue;
            }
            // Between two statements of a transaction that goes on.
            if link.since_data_ns < MIN_SILENT_NS {
                continue;
            }
            if let Some(since_ns) = idle_in_transaction_since_ns(link, topology) {
                served.held += 1;
                let idle_ns = now_ns.saturating_sub(since_ns).max(link.since_data_ns);
                served.held_ns = served.held_ns.max(idle_ns);
                silent.push(link);
            } else if !link.sent_last {
                silent.push(link);
            }
        }
        served.silent = silent.len() as u64;
        let silent_ns = silent.iter().map(|link| link.since_data_ns);
        served.silent_ns = silent_ns.max().unwrap_or(0);
        served.holder = holder(target, &silent, (topology, targets));
        served.places = places
            .into_iter()
            .map(|(at, calls)| Place::new(at, calls, (topology, targets)))
            .collect();
        served.places.sort_by_key(|place| Reverse(place.total_ns));
        served
    }

    /// The place where most of the waiting is. `None`: nothing is in progress, or several places have a good part of it.
    pub(super) fn place(&self) -> Option<&Place> {
        let total_ns: u128 = self
            .places
            .iter()
            .map(|place| u128::from(place.total_ns))
            .sum();
        let first = self.places.first()?;
        // Two thirds: at least twice as much as all others together.
        let has_most = u128::from(first.total_ns) * 3 >= total_ns * 2;
        (self.places.len() == 1 || has_most && self.is_named).then_some(first)
    }

    /// At least half of the connections are idle in a transaction.
    pub(super) fn is_held(&self) -> bool {
        self.held > 0 && self.held * 2 >= self.connections
    }

    /// At least half of the connections are silent.
    pub(super) fn is_silent(&self) -> bool {
        self.silent > 0 && self.silent * 2 >= self.connections
    }

    /// All places, if the service has named its connections, and there are few.
    pub(super) fn all_places(&self) -> &[Place] {
        match self.is_named && self.places.len() <= MAX_PLACES {
            true => &self.places,
            false => &[],
        }
    }

    /// Whether a connection of the queue leads to this address.
    pub(super) fn leads_to(&self, remote: SocketAddr) -> bool {
        self.remotes.contains(&canonical(remote))
    }

    /// What the connections show if they do not lead to one place.
    pub(super) fn words(&self) -> Option<String> {
        if self.place().is_some() || self.is_held() || self.is_silent() {
            return None;
        }
        if self.connections == 0 {
            return Some("the service has no connection to a server of the queue".to_owned());
        }
        if self.places.is_empty() {
            return Some(format!(
                "nothing is in progress on its {} connections to servers",
                count(self.connections)
            ));
        }
        let places = self.places.iter().take(MAX_PLACES);
        let places: Vec<String> = places
            .map(|place| {
                format!(
                    "{} of {}, the oldest for {}",
                    count(place.cookies.len() as u64),
                    place.name,
                    duration(place.oldest_ns)
                )
            })
            .collect();
        Some(format!(
            "calls are outstanding at several servers, and no one has most of the waiting: {}",
            places.join("; ")
        ))
    }
}

impl Place {
    /// `calls`: the age of each call, ns, and its connection.
    fn new(at: At, mut calls: Vec<(u64, u64)>, (topology, targets): (&Topology, &Targets)) -> Self {
        calls.sort_unstable_by_key(|(age_ns, cookie)| (Reverse(*age_ns), *cookie));
        let total_ns = calls
            .iter()
            .fold(0_u64, |sum, (age_ns, _)| sum.saturating_add(*age_ns));
        let name = match at {
            At::Service(target) => {
                let first = targets.get(target).and_then(|target| target.tgids.first());
                first.map_or_else(String::new, |tgid| topology.process(*tgid, targets))
            }
            At::Process(tgid) => topology.process(tgid, targets),
            At::Address(address) => address.to_string(),
        };
        Self {
            at,
            name,
            oldest_ns: calls.first().map_or(0, |(age_ns, _)| *age_ns),
            total_ns,
            cookies: calls.into_iter().map(|(_, cookie)| cookie).collect(),
        }
    }
}

/// How long the call on a connection has been in progress, ns; at least 1. `None`: there is none.
fn in_progress_ns(cookie: u64, link: &Link, now_ns: u64, topology: &Topology) -> Option<u64> {
    let pending = topology.awaited(cookie).map(|pending| pending.began_ns);
    let since_ns = pending.or_else(|| topology.connecting_since_ns(cookie));
    let streams = link.since_data_ns < STREAMING_NS;
    match since_ns {
        Some(since_ns) => Some(now_ns.saturating_sub(since_ns).max(1)),
        None if streams => Some(link.since_data_ns.max(1)),
        None => None,
    }
}

fn idle_in_transaction_since_ns(link: &Link, topology: &Topology) -> Option<u64> {
    topology.idle_in_transaction_since_ns(topology.other_end(link)?.tgid)
}

fn place(cookie: u64, link: &Link, (topology, targets): (&Topology, &Targets)) -> At {
    let end = topology.other_end(link).map(|end| end.tgid);
    let listener = || match topology.is_on_its_way(link, cookie, targets) {
        true => None,
        false => topology.listener_of(link),
    };
    match end.or_else(listener) {
        Some(tgid) => targets.of(tgid).map_or(At::Process(tgid), At::Service),
        None => At::Address(canonical(link.remote)),
    }
}

/// The process of the client that has these connections. The service passes each response on at once, so the client's connection
/// last carried data at the same moment as the server's; and that client waits for nothing.
fn holder(
    target: TargetId,
    held: &[&Link],
    (topology, targets): (&Topology, &Targets),
) -> Option<u32> {
    // One that is not on this machine is as good a candidate as any other.
    let mut clients: BTreeMap<u64, BTreeSet<Option<u32>>> = BTreeMap::new();
    for (cookie, link) in topology.links() {
        let ours = link.accepted && targets.of(link.tgid) == Some(target);
        if ours && !link.is_unread && topology.awaited(cookie).is_none() {
            let at = clients.entry(link.since_data_ns / SAME_MOMENT_NS);
            let end = topology.other_end(link).map(|end| end.tgid);
            at.or_default().insert(end);
        }
    }
    let mut holders = BTreeSet::new();
    let moments: BTreeSet<u64> = held
        .iter()
        .map(|link| link.since_data_ns / SAME_MOMENT_NS)
        .collect();
    for moment in moments {
        let at_once = clients.range(moment.saturating_sub(1)..=moment.saturating_add(1));
        holders.extend(at_once.flat_map(|(_, ends)| ends));
    }
    let services: BTreeSet<Option<(Option<TargetId>, u32)>> = holders
        .iter()
        .map(|tgid| {
            let tgid = (*tgid)?;
            let service = targets.of(tgid);
            Some((service, if service.is_some() { 0 } else { tgid }))
        })
        .collect();
    match services.len() {
        1 => holders.into_iter().next().flatten(),
        _ => None,
    }
}
