//! SYN queues: handshakes in progress on each listening address.
//!
//! The kernel counts them per listener (`reqsk_queue_len`) and limits them by the same backlog as the accept queue
//! (inet_csk_reqsk_queue_is_full). Beyond the limit it sends SYN cookies or drops, and counts both only per network
//! namespace. Their age is unknown without a hook: half-open requests are in the kernel's table of all connections, which
//! a scan of files does not reach.

use crate::hash::HashMap;
use std::{collections::BTreeMap, net::SocketAddr};

use super::{Kind, QueueId, Reading, Sink, Source, Targets};
use crate::sample::{Listener, Network, Sample, TargetId};

#[derive(Default)]
pub(super) struct Syn {
    listeners: HashMap<u64, Known>,
    networks: HashMap<u32, Network>,
}

/// State kept per listening socket.
struct Known {
    target: TargetId,
    full: bool,
    seen_ns: u64,
}

/// Counters of a network namespace since the previous sample, and the listener that they are attributed to.
#[derive(Default)]
struct Counted {
    drops: u64,
    cookies: u64,
    claimant: Option<Claim>,
    /// Number of listeners that the counts may belong to.
    listeners: u64,
}

/// How likely the counts of the namespace belong to a listener.
#[derive(Clone, Copy)]
struct Claim {
    cookie: u64,
    full: bool,
    fill: f64,
    depth: u32,
}

/// All listening sockets of one target on one address. There are several with SO_REUSEPORT.
#[derive(Default)]
struct Group {
    depth: u64,
    limit: u64,
    fill: f64,
    full: bool,
    losses: u64,
    cookies: u64,
    losses_shared: bool,
    elapsed_ns: Option<u64>,
    sockets: u32,
}

impl Source for Syn {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if !sample.scans.files && !sample.scans.focused_sockets {
            return;
        }
        let watched: Vec<(TargetId, &Listener, u32)> = sample
            .listeners
            .iter()
            .filter_map(|listener| {
                let known = self.listeners.get(&listener.cookie);
                let target = targets
                    .of(listener.tgid)
                    .or(known.map(|known| known.target))?;
                targets.get(target)?;
                Some((target, listener, listener.half_open?))
            })
            .collect();
        let counted = self.counted(sample, &watched);
        let mut groups: BTreeMap<(TargetId, SocketAddr), Group> = BTreeMap::new();
        let mut listeners = HashMap::with_capacity_and_hasher(watched.len(), Default::default());
        for (target, listener, half_open) in watched {
            let group = groups.entry((target, listener.address)).or_default();
            group.add(listener, half_open, self.listeners.get(&listener.cookie));
            if let Some(counted) = counted.get(&listener.netns) {
                group.claim(listener, counted);
            }
            let now = Known {
                target,
                full: is_full(half_open, listener.limit),
                seen_ns: listener.seen_ns,
            };
            listeners.insert(listener.cookie, now);
        }
        self.listeners = listeners;
        for ((target, address), group) in &groups {
            sink.put(
                *target,
                Kind::Syn,
                &QueueId::Local(*address),
                group.reading(),
            );
        }
        sink.forget_unseen(Kind::Syn);
    }
}

impl Syn {
    /// What each network namespace counted, attributed to the listener with the fullest queue. If unwatched services also
    /// listen there, it is only attributed to a listener that is or was full.
    fn counted(
        &mut self,
        sample: &Sample,
        watched: &[(TargetId, &Listener, u32)],
    ) -> HashMap<u32, Counted> {
        let mut counted: HashMap<u32, Counted> = HashMap::default();
        for now in &sample.networks {
            if let Some(before) = self.networks.get(&now.netns) {
                let grown = Counted {
                    drops: now.syn_drops.saturating_sub(before.syn_drops),
                    cookies: now.syn_cookies.saturating_sub(before.syn_cookies),
                    claimant: None,
                    listeners: u64::from(now.others),
                };
                counted.insert(now.netns, grown);
            }
        }
        for (_, listener, half_open) in watched {
            let Some(counted) = counted.get_mut(&listener.netns) else {
                continue;
            };
            let known = self.listeners.get(&listener.cookie);
            let claim = Claim {
                cookie: listener.cookie,
                full: is_full(*half_open, listener.limit) || known.is_some_and(|known| known.full),
                fill: fill(*half_open, listener.limit),
                depth: *half_open,
            };
            counted.listeners += 1;
            if counted
                .claimant
                .is_none_or(|best| claim.is_likelier_than(&best))
            {
                counted.claimant = Some(claim);
            }
        }
        for network in sample.networks.iter().filter(|network| network.others > 0) {
            if let Some(counted) = counted.get_mut(&network.netns) {
                counted.claimant = counted.claimant.filter(|claim| claim.full);
            }
        }
        self.networks = sample
            .networks
            .iter()
            .map(|network| (network.netns, *network))
            .collect();
        counted
    }
}

impl Claim {
    fn is_likelier_than(&self, other: &Self) -> bool {
        self.full
            .cmp(&other.full)
            .then(self.fill.total_cmp(&other.fill))
            .then(self.depth.cmp(&other.depth))
            .is_gt()
    }
}

impl Group {
    fn add(&mut self, listener: &Listener, half_open: u32, known: Option<&Known>) {
        self.sockets += 1;
        self.depth += u64::from(half_open);
        self.limit += u64::from(listener.limit);
        self.fill = self.fill.max(fill(half_open, listener.limit));
        self.full |= is_full(half_open, listener.limit);
        if let Some(known) = known {
            let elapsed_ns = listener.seen_ns.saturating_sub(known.seen_ns);
            self.elapsed_ns = self.elapsed_ns.max(Some(elapsed_ns));
        }
    }

    fn claim(&mut self, listener: &Listener, counted: &Counted) {
        let claims = counted
            .claimant
            .is_some_and(|claim| claim.cookie == listener.cookie);
        if claims {
            self.losses = self.losses.saturating_add(counted.drops);
            self.cookies = self.cookies.saturating_add(counted.cookies);
            self.losses_shared |= counted.drops > 0 && counted.listeners > 1;
        }
    }

    fn reading(&self) -> Reading {
        let mut extra = vec![("sockets", f64::from(self.sockets))];
        if self.cookies > 0 {
            extra.push(("syn_cookies", self.cookies as f64));
        }
        if self.losses_shared {
            extra.push(("losses_shared", 1.0));
        }
        Reading {
            depth: self.depth,
            limit: Some(self.limit),
            fill: Some(self.fill),
            full: self.full,
            elapsed_ns: self.elapsed_ns,
            losses: self.losses,
            extra,
            ..Reading::default()
        }
    }
}

fn fill(half_open: u32, limit: u32) -> f64 {
    f64::from(half_open) / f64::from(limit.max(1))
}

/// Whether the queue is full, as in inet_csk_reqsk_queue_is_full.
fn is_full(half_open: u32, limit: u32) -> bool {
    half_open > 0 && half_open >= limit
}

#[cfg(test)]
mod tests {
    use super::super::{
        Kind,
        watched::{PID, Watched, extra},
    };
    use crate::sample::{Listener, Network, Sample};

    fn listener(cookie: u64, port: u16, half_open: Option<u32>) -> Listener {
        Listener {
            cookie,
            tgid: PID,
            netns: 1,
            address: ([0, 0, 0, 0], port).into(),
            depth: 0,
            limit: 8,
            drops: 0,
            half_open,
            seen_ns: 0,
            ages_ns: Vec::new(),
        }
    }

    fn sample(listeners: Vec<Listener>, syn_drops: u64, others: u32) -> Sample {
        let network = Network {
            netns: 1,
            passive_opens: 0,
            others,
            listen_overflows: 0,
            syn_drops,
            syn_cookies: 3 * syn_drops,
        };
        Sample {
            listeners,
            networks: vec![network],
            ..Sample::default()
        }
    }

    #[test]
    fn sockets_that_share_an_address_are_one_queue_and_the_fullest_decides() {
        let both = vec![listener(1, 80, Some(2)), listener(2, 80, Some(8))];
        let reading = Watched::default().scan_one(Kind::Syn, sample(both, 0, 0));
        assert_eq!((reading.depth, reading.limit), (10, Some(16)));
        assert!(reading.full);
        assert_eq!(reading.fill, Some(1.0));
        assert_eq!((reading.wait_ns, reading.oldest_age_ns), (None, None));
    }

    #[test]
    fn drops_and_cookies_of_the_namespace_are_attributed_to_the_full_listener() {
        let mut watched = Watched::default();
        let both = || vec![listener(1, 80, Some(3)), listener(2, 81, Some(8))];
        let first = watched.scan(Kind::Syn, sample(both(), 100, 0));
        assert!(first.iter().all(|(_, reading)| reading.losses == 0));
        let queues = watched.scan(Kind::Syn, sample(both(), 105, 0));
        assert_eq!(queues[0].1.losses, 0);
        assert_eq!(
            (queues[1].0.as_str(), queues[1].1.losses),
            ("0.0.0.0:81", 5)
        );
        assert_eq!(extra(&queues[1].1, "syn_cookies"), Some(15.0));
        assert_eq!(extra(&queues[1].1, "losses_shared"), Some(1.0));
    }

    #[test]
    fn beside_unwatched_listeners_drops_are_attributed_only_to_a_full_listener() {
        let mut watched = Watched::default();
        let half = |deep| vec![listener(1, 80, Some(deep))];
        watched.scan(Kind::Syn, sample(half(4), 0, 2));
        let reading = watched.scan_one(Kind::Syn, sample(half(4), 7, 2));
        assert_eq!(reading.losses, 0);
        let reading = watched.scan_one(Kind::Syn, sample(half(8), 9, 2));
        assert_eq!(reading.losses, 2);
        let reading = watched.scan_one(Kind::Syn, sample(half(0), 10, 2));
        assert_eq!(reading.losses, 1, "it was full a moment ago");
    }

    #[test]
    fn there_is_no_queue_if_the_kernel_does_not_count_handshakes() {
        let queues = Watched::default().scan(Kind::Syn, sample(vec![listener(1, 80, None)], 0, 0));
        assert!(queues.is_empty());
    }
}
