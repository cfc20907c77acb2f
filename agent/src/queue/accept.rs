//! TCP accept queues: connections that have completed the handshake and wait for the service to accept them.
//!
//! The kernel provides depth, backlog, drops and the age of each waiting connection. It does not count arrivals per
//! listener, so they are derived:
//!
//! - While the head of the queue is older than the sampling interval, every connection that arrived within the interval
//!   still waits behind it. The connections younger than the interval are then exactly the arrivals.
//! - Otherwise, some connections may have arrived and been accepted within the interval. `TcpPassiveOpens` counts them,
//!   but per network namespace, not per listener. The certain arrivals are subtracted, and the rest is divided among the
//!   listeners in proportion to their recent traffic: connections seen waiting, and new ones seen accepted.
//!
//! Losses are overflows of the queue. It takes two counters to find them. A listener's own drop counter includes events
//! that are not losses (with TCP_DEFER_ACCEPT, every bare ACK that ends a handshake). `ListenOverflows` counts only
//! overflows, but per network namespace. An overflow increments both, so a listener's losses are at most the
//! increase of either. That is not enough for a listener with other drops, if listeners that are not watched share the
//! namespace: both counters may increase although its own queue is empty. Such a listener must be at least half full.

use crate::hash::{HashMap, HashSet};
use std::{collections::BTreeMap, net::SocketAddr};

use super::{
    AcceptedCount, Hidden, Kind, NewConnections, QueueId, Reading, Sink, Source, Targets, advance,
    head::Head, littles_law,
};
use crate::{
    ewma::decay,
    sample::{Listener, Network, Sample, TargetId},
};

/// Time constant of a listener's recent traffic, ns: after 10 s, the weight of a connection has decayed to 1/e.
const TRAFFIC_TIME_CONSTANT_NS: f64 = 10e9;
/// A weight below this is forgotten: seven time constants after one connection.
const MIN_TRAFFIC_WEIGHT: f64 = 1e-3;

/// Listening sockets of one target that share an address.
type Groups = BTreeMap<(TargetId, SocketAddr), Group>;

#[derive(Default)]
pub(super) struct Accept {
    listeners: HashMap<u64, Known>,
    networks: HashMap<u32, Network>,
    /// See [`Accept::balance`].
    balances: HashMap<u32, i64>,
    /// Recent connections, decaying, per network namespace and port.
    traffic: HashMap<(u32, u16), f64>,
    /// When `traffic` was last decayed.
    read_ns: u64,
}

/// Arrivals attributed to listeners, per network namespace. `None` if those of any listener are unknown.
#[derive(Default)]
struct Counted(HashMap<u32, Option<u64>>);

impl Counted {
    fn add(&mut self, netns: u32, arrivals: Option<Arrivals>) {
        let sum = self.0.entry(netns).or_insert(Some(0));
        *sum = sum
            .zip(arrivals)
            .map(|(sum, arrivals)| sum + arrivals.count);
    }
}

/// State kept per listening socket.
struct Known {
    target: TargetId,
    depth: u32,
    drops: u32,
    /// Drops of the last interval that no overflow accounts for yet: the namespace counter is read before the listeners.
    unclaimed: u64,
    /// Some of its drops were not overflows, or may not have been.
    has_other_drops: bool,
    seen_ns: u64,
    /// How often the depth fell. It serves as the position of the head where the kernel provides no ages.
    falls: u32,
    head: Head,
}

impl Known {
    /// `has_overflows`: the namespace had overflows in this interval, so drops of the last one may be among them.
    fn after(
        before: Option<&Self>,
        listener: &Listener,
        target: TargetId,
        unclaimed: u64,
        has_overflows: bool,
    ) -> Self {
        let fell = before.is_some_and(|before| listener.depth < before.depth);
        let falls = before
            .map_or(0, |before| before.falls)
            .wrapping_add(u32::from(fell));
        let mut head = before.map_or_else(Head::default, |before| before.head);
        head.observe(falls, listener.depth > 0, listener.seen_ns);
        Self {
            target,
            depth: listener.depth,
            drops: listener.drops,
            unclaimed,
            // What it dropped before it was first observed may have been anything.
            has_other_drops: before.map_or(listener.drops > 0, |before| {
                before.has_other_drops || (before.unclaimed > 0 && !has_overflows)
            }),
            seen_ns: listener.seen_ns,
            falls,
            head,
        }
    }

    /// Time since the depth last fell, ns, if connections wait and the kernel provides no ages.
    fn untimed_age_ns(&self, listener: &Listener) -> Option<u64> {
        let untimed = listener.depth > 0 && listener.ages_ns.is_empty();
        untimed.then(|| self.head.age_ns(listener.seen_ns))
    }
}

/// All listening sockets of one target on one address. There are several with SO_REUSEPORT.
#[derive(Default)]
struct Group {
    netns: u32,
    port: u16,
    depth: u64,
    limit: u64,
    fill: f64,
    full: bool,
    ages_ns: Vec<u64>,
    untimed_ns: Option<u64>,
    losses: u64,
    /// Change of depth since the previous sample, over the sockets in both.
    depth_change: i64,
    /// Arrivals known for certain.
    certain: u64,
    /// Sockets at which further connections may have arrived and been accepted within the interval.
    uncertain: u32,
    elapsed_ns: Option<u64>,
    sockets: u32,
}

impl Source for Accept {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if !sample.scans.files && !sample.scans.focused_sockets {
            return;
        }
        let mut groups = Groups::new();
        let mut seen =
            HashSet::with_capacity_and_hasher(sample.listeners.len(), Default::default());
        let increases = self.counters(sample);
        let mut overflows = Overflows::of(sample, &self.listeners, &increases);
        // Full listeners first: overflows are most likely theirs.
        let (full, rest): (Vec<_>, Vec<_>) = sample
            .listeners
            .iter()
            .partition(|listener| is_full(listener));
        for listener in full.into_iter().chain(rest) {
            let known = self.listeners.get(&listener.cookie);
            let Some(target) = targets
                .of(listener.tgid)
                .or(known.map(|known| known.target))
            else {
                continue;
            };
            if targets.get(target).is_none() {
                continue;
            }
            let (lost, unclaimed) = overflows.take(listener, known);
            let has_overflows = increases
                .get(&listener.netns)
                .is_none_or(|network| network.listen_overflows > 0);
            let now = Known::after(known, listener, target, unclaimed, has_overflows);
            groups.entry((target, listener.address)).or_default().add(
                listener,
                known,
                lost,
                now.untimed_age_ns(listener),
            );
            seen.insert(listener.cookie);
            self.listeners.insert(listener.cookie, now);
        }
        // A scan of focused sockets finds no new listener. But it visits every listener that a file scan has found and that
        // still exists, so one that is absent is gone.
        self.listeners.retain(|cookie, _| seen.contains(cookie));
        self.remember_traffic(&groups, &sink.new, sample.mono_ns);
        let mut counted = Counted::default();
        let shared = Shared::between(&groups, &self.traffic);
        for ((target, address), group) in &groups {
            // If unwatched services also listen in the namespace, its counter cannot be divided.
            let opened = increases
                .get(&group.netns)
                .filter(|network| network.others == 0)
                .map(|network| {
                    network
                        .passive_opens
                        .saturating_add_signed(self.balance(group.netns))
                });
            let arrivals = shared.arrivals(group, opened);
            counted.add(group.netns, arrivals);
            let reading = group.reading(arrivals, targets.threads(*target));
            let place = (*target, group.netns, group.port);
            let accepted = sink.accepted.entry(place).or_insert_with(|| AcceptedCount {
                count: Some(0),
                in_namespace: increases
                    .get(&group.netns)
                    .map_or(0, |network| network.passive_opens),
            });
            accepted.count = accepted
                .count
                .zip(reading.departures)
                .map(|(sum, count)| sum.saturating_add(count));
            sink.put(*target, Kind::Accept, &QueueId::Local(*address), reading);
        }
        self.carry_balances(&increases, &counted);
        sink.forget_unseen_where(Kind::Accept, |id| matches!(id, QueueId::Local(_)));
    }
}

impl Accept {
    /// How far the namespace's counter was ahead of the attributed arrivals (negative: behind) at the previous sample. It is
    /// read shortly before the listeners, so a connection that arrives in between is seen waiting before it is counted.
    fn balance(&self, netns: u32) -> i64 {
        self.balances.get(&netns).copied().unwrap_or(0)
    }

    /// Carries the difference between counted and attributed arrivals over to the next sample.
    fn carry_balances(&mut self, increases: &HashMap<u32, Network>, counted: &Counted) {
        let balances = increases.iter().filter_map(|(netns, network)| {
            let counted = (*counted.0.get(netns)?)?;
            let opened = network.passive_opens as i64 + self.balance(*netns);
            (network.others == 0).then_some((*netns, opened - counted as i64))
        });
        self.balances = balances.collect();
    }

    fn remember_traffic(&mut self, groups: &Groups, new: &NewConnections, now_ns: u64) {
        let passed_ns = now_ns.saturating_sub(self.read_ns);
        self.read_ns = now_ns;
        let kept = decay(passed_ns, TRAFFIC_TIME_CONSTANT_NS);
        self.traffic.retain(|_, weight| {
            *weight *= kept;
            *weight > MIN_TRAFFIC_WEIGHT
        });
        for group in groups.values() {
            let place = (group.netns, group.port);
            let seen = group.certain + new.get(&place).copied().unwrap_or(0);
            if seen > 0 {
                *self.traffic.entry(place).or_default() += seen as f64;
            }
        }
    }

    /// Growth of the counters since the previous sample, for each network namespace in both samples.
    fn counters(&mut self, sample: &Sample) -> HashMap<u32, Network> {
        let increases = |now: &Network| {
            let before = self.networks.get(&now.netns)?;
            Some(Network {
                netns: now.netns,
                others: now.others,
                passive_opens: now.passive_opens.saturating_sub(before.passive_opens),
                listen_overflows: now.listen_overflows.saturating_sub(before.listen_overflows),
                ..*now
            })
        };
        let increases = sample
            .networks
            .iter()
            .filter_map(increases)
            .map(|network| (network.netns, network))
            .collect();
        self.networks = sample
            .networks
            .iter()
            .map(|network| (network.netns, *network))
            .collect();
        increases
    }
}

impl Group {
    fn add(
        &mut self,
        listener: &Listener,
        known: Option<&Known>,
        losses: u64,
        untimed_age_ns: Option<u64>,
    ) {
        self.losses += losses;
        self.untimed_ns = self.untimed_ns.max(untimed_age_ns);
        self.netns = listener.netns;
        self.port = listener.address.port();
        self.sockets += 1;
        self.depth += u64::from(listener.depth);
        self.limit += u64::from(listener.limit);
        self.fill = self
            .fill
            .max(f64::from(listener.depth) / f64::from(listener.limit.max(1)));
        self.full |= is_full(listener);
        self.ages_ns.extend(&listener.ages_ns);
        self.ages_ns.sort_unstable_by(|a, b| b.cmp(a));
        let Some(known) = known else { return };
        let elapsed = listener.seen_ns.saturating_sub(known.seen_ns);
        self.elapsed_ns = self.elapsed_ns.max(Some(elapsed));
        let depth_change = i64::from(listener.depth) - i64::from(known.depth);
        self.depth_change += depth_change;
        let young = listener
            .ages_ns
            .iter()
            .rev()
            .take_while(|age| **age < elapsed)
            .count() as u64;
        self.certain += young.max(depth_change.max(0) as u64);
        let all_timed = listener.ages_ns.len() as u64 == u64::from(listener.depth);
        let head_stayed = listener.ages_ns.first().is_some_and(|age| *age > elapsed);
        self.uncertain += u32::from(!(all_timed && head_stayed));
    }

    fn reading(&self, arrivals: Option<Arrivals>, servers: u32) -> Reading {
        let count = arrivals.map(|arrivals| arrivals.count);
        let departures = count.map(|count| (count as i64 - self.depth_change).max(0) as u64);
        // The head of the queue is accepted next, so its age is exactly the wait.
        let oldest_age_ns = self
            .ages_ns
            .first()
            .copied()
            .max(self.untimed_ns)
            .filter(|_| self.depth > 0);
        let mut extra = vec![("sockets", f64::from(self.sockets))];
        if let Some(Arrivals { shared: true, .. }) = arrivals {
            extra.push(("arrivals_shared", 1.0));
        }
        Reading {
            depth: self.depth,
            limit: Some(self.limit),
            unit: None,
            fill: Some(self.fill),
            full: self.full,
            arrivals: count,
            departures,
            hidden: Hidden::Nothing,
            unseen_at_most: 0,
            elapsed_ns: self.elapsed_ns,
            served: departures,
            servers,
            wait_ns: if self.depth == 0 {
                Some(0)
            } else {
                oldest_age_ns
                    .or_else(|| littles_law(self.depth, departures.unwrap_or(0), self.elapsed_ns))
            },
            oldest_age_ns,
            ages_ns: self.ages_ns.clone(),
            no_consumers_ns: None,
            losses: self.losses,
            worst: None,
            extra,
        }
    }
}

/// Overflows of one interval that are not attributed to a listener yet, per network namespace.
struct Overflows {
    left: HashMap<u32, u64>,
    /// Network namespaces in which a listener is, or was at the previous sample, at least half full. Only such listeners
    /// are attributed overflows there.
    crowded: HashSet<u32>,
    /// Network namespaces in which services that are not watched listen, too.
    foreign: HashSet<u32>,
}

impl Overflows {
    fn of(sample: &Sample, known: &HashMap<u64, Known>, increases: &HashMap<u32, Network>) -> Self {
        let mut left: HashMap<u32, u64> = increases
            .iter()
            .map(|(netns, network)| (*netns, network.listen_overflows))
            .collect();
        // Without the namespace counters, fall back to the drops of full listeners.
        for listener in sample
            .listeners
            .iter()
            .filter(|listener| !increases.contains_key(&listener.netns))
        {
            if is_full(listener)
                && let Some(known) = known.get(&listener.cookie)
            {
                *left.entry(listener.netns).or_default() += advance(known.drops, listener.drops);
            }
        }
        let crowded = sample
            .listeners
            .iter()
            .filter(|listener| is_crowded(listener, known.get(&listener.cookie)))
            .map(|listener| listener.netns);
        let foreign = increases.iter().filter(|(_, network)| network.others > 0);
        Self {
            left,
            crowded: crowded.collect(),
            foreign: foreign.map(|(netns, _)| *netns).collect(),
        }
    }

    /// Returns the overflows of this listener (as many as it dropped, while any are left), and its drops of this interval
    /// that no overflow accounts for.
    fn take(&mut self, listener: &Listener, known: Option<&Known>) -> (u64, u64) {
        let (Some(known), Some(left)) = (known, self.left.get_mut(&listener.netns)) else {
            return (0, 0);
        };
        let dropped = advance(known.drops, listener.drops);
        let must_be_crowded = self.crowded.contains(&listener.netns)
            || (known.has_other_drops && self.foreign.contains(&listener.netns));
        if must_be_crowded && !is_crowded(listener, Some(known)) {
            return (0, dropped);
        }
        let lost = (dropped + known.unclaimed).min(*left);
        *left -= lost;
        (lost, (dropped + known.unclaimed - lost).min(dropped))
    }
}

/// Whether the listener is at least half full, now or at the previous sample.
fn is_crowded(listener: &Listener, known: Option<&Known>) -> bool {
    let depth = known.map_or(listener.depth, |known| known.depth.max(listener.depth));
    depth > 0 && depth >= listener.limit / 2
}

/// Whether the depth has reached the backlog. The kernel accepts one more, and rejects new connections once the depth exceeds
/// the backlog (sk_acceptq_is_full).
fn is_full(listener: &Listener) -> bool {
    listener.depth > 0 && listener.depth >= listener.limit
}

/// Arrivals of one interval.
#[derive(Clone, Copy)]
struct Arrivals {
    count: u64,
    /// An estimate: part of a count that covers several listeners.
    shared: bool,
}

/// The uncertain arrivals that the listeners of each network namespace share.
struct Shared(HashMap<u32, Pool>);

#[derive(Default)]
struct Pool {
    /// Groups that may have more arrivals than the certain ones.
    groups: u64,
    /// Certain arrivals of this interval, of all groups.
    certain: u64,
    traffic: f64,
    by_port: HashMap<u16, f64>,
}

impl Shared {
    fn between(groups: &Groups, traffic: &HashMap<(u32, u16), f64>) -> Self {
        let mut pools: HashMap<u32, Pool> = HashMap::default();
        for group in groups.values() {
            let pool = pools.entry(group.netns).or_default();
            pool.certain += group.certain;
            if group.uncertain == 0 {
                continue;
            }
            let weight = traffic
                .get(&(group.netns, group.port))
                .copied()
                .unwrap_or(0.0);
            pool.groups += 1;
            pool.traffic += weight;
            pool.by_port.insert(group.port, weight);
        }
        Self(pools)
    }

    /// Arrivals at this group. `opened` is the number of connections that its namespace counted.
    fn arrivals(&self, group: &Group, opened: Option<u64>) -> Option<Arrivals> {
        group.elapsed_ns?;
        if group.uncertain == 0 {
            return Some(Arrivals {
                count: group.certain,
                shared: false,
            });
        }
        let pool = self.0.get(&group.netns)?;
        let rest = opened?.saturating_sub(pool.certain) as f64;
        let share = if pool.groups == 1 || rest == 0.0 {
            1.0
        } else if pool.traffic > 0.0 {
            pool.by_port.get(&group.port).copied().unwrap_or(0.0) / pool.traffic
        } else {
            // Connections arrived, but none was seen at any of the listeners, so they cannot be attributed.
            return None;
        };
        Some(Arrivals {
            count: group.certain.saturating_add((rest * share).round() as u64),
            shared: pool.groups > 1,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Kind,
        watched::{PID, Watched},
    };
    use crate::sample::{Listener, Network, Sample};

    /// One watched listener with this depth, beside one that is not watched.
    fn sample(depth: u32, drops: u32, listen_overflows: u64) -> Sample {
        let listener = Listener {
            cookie: 1,
            tgid: PID,
            netns: 1,
            address: ([0, 0, 0, 0], 80).into(),
            depth,
            limit: 32,
            drops,
            half_open: None,
            seen_ns: 0,
            ages_ns: Vec::new(),
        };
        let network = Network {
            netns: 1,
            others: 1,
            listen_overflows,
            ..Network::default()
        };
        Sample {
            listeners: vec![listener],
            networks: vec![network],
            ..Sample::default()
        }
    }

    fn losses(samples: &[(u32, u32, u64)]) -> Vec<u64> {
        let mut watched = Watched::default();
        samples
            .iter()
            .map(|(depth, drops, overflows)| {
                let sample = sample(*depth, *drops, *overflows);
                watched.scan_one(Kind::Accept, sample).losses
            })
            .collect()
    }

    #[test]
    fn a_listener_with_other_drops_loses_nothing_by_overflows_of_unwatched_ones() {
        // With TCP_DEFER_ACCEPT each connection is a drop.
        let deferred = [(0, 0, 0), (0, 4, 0), (0, 8, 0), (0, 12, 5), (0, 16, 9)];
        assert_eq!(losses(&deferred), [0, 0, 0, 0, 0]);
        let full = [(0, 0, 0), (0, 4, 0), (0, 8, 0), (33, 12, 2)];
        assert_eq!(losses(&full), [0, 0, 0, 2], "it was full itself");
        let observed_late = [(0, 90, 0), (0, 94, 3), (0, 98, 6)];
        assert_eq!(losses(&observed_late), [0, 0, 0]);
    }

    #[test]
    fn a_listener_whose_drops_are_overflows_need_not_be_full_when_sampled() {
        let burst = [(0, 0, 0), (0, 0, 0), (0, 3, 3), (0, 5, 5)];
        assert_eq!(losses(&burst), [0, 0, 3, 2]);
        // The namespace counter is read before the listener.
        let late = [(0, 0, 0), (0, 3, 0), (0, 3, 3), (0, 5, 5)];
        assert_eq!(losses(&late), [0, 0, 3, 2]);
    }
}
