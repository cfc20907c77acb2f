//! The listening sockets of one address, where there are several (SO_REUSEPORT).
//!
//! Each has an accept queue of its own. The kernel assigns a connection to one of them by a hash of its addresses, whatever
//! the workers do, and never moves it. So a worker that does not accept keeps its share of the connections waiting, while
//! others are idle. The queue of the address is the sum over its sockets; this module keeps them apart.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use super::seconds::Seconds;
use crate::{
    hash::HashMap,
    queue::Targets,
    sample::{Listener, Sample, TargetId},
};

/// Maximum number of sockets counted in one second; further ones are ignored.
const MAX_SOCKETS: usize = 4_096;
/// Samples of a socket below which nothing is concluded.
const MIN_SAMPLES: u32 = 8;
/// A queue that is empty in less than this share of its samples is a standing one; see also `undersized_limit`.
const MAX_EMPTY_OF_STANDING: f64 = 0.2;
/// A queue that is empty in at least this share of its samples has a worker with time to spare.
const MIN_EMPTY_OF_FREE: f64 = 0.8;
/// Share of the waiting connections that are in the standing queues. Recorded incidents have 0.99 and more.
const MIN_WAITING: f64 = 0.9;

#[derive(Default)]
pub(super) struct ListeningSockets {
    /// What was seen of each socket, by service, address and cookie.
    seconds: Seconds<BTreeMap<(TargetId, SocketAddr, u64), Count>>,
    /// Depth of each socket in the latest sample, by its cookie.
    depths: HashMap<u64, u32>,
    /// When an accept queue of a service in focus was last full, or may have been, CLOCK_MONOTONIC, ns, by service and port.
    full_ns: BTreeMap<(TargetId, u16), Option<u64>>,
}

/// What was seen of one socket.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    /// A process that holds it.
    tgid: u32,
    samples: u32,
    empty: u32,
    /// Sum of the depths.
    waiting: u64,
    /// Samples in which it was less deep than in the one before: connections were accepted from it.
    accepted: u32,
}

/// Some sockets of an address have a standing queue, while others are empty.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Uneven {
    /// All sockets of the address.
    pub(super) sockets: usize,
    /// Those with a standing queue.
    pub(super) standing: usize,
    /// Those that are nearly always empty.
    pub(super) free: usize,
    /// Share of the waiting connections that are in the standing queues, 0 to 1.
    pub(super) waiting: f64,
    /// How often connections were seen to be accepted from the standing queues, per second.
    pub(super) accepts_per_s: f64,
    /// Processes that hold the sockets with a standing queue, if these hold none of the others.
    pub(super) holders: BTreeSet<u32>,
}

impl ListeningSockets {
    /// Adds one sample, as far as its listeners belong to services in focus.
    pub(super) fn read(
        &mut self,
        sample: &Sample,
        targets: &Targets,
        focus_scope: &BTreeSet<TargetId>,
    ) {
        let in_focus = |listener: &Listener| {
            let target = targets.of(listener.tgid)?;
            focus_scope.contains(&target).then_some(target)
        };
        let sockets = self.seconds.at(sample.mono_ns);
        let before = std::mem::take(&mut self.depths);
        self.full_ns
            .retain(|(target, _), _| focus_scope.contains(target));
        for listener in &sample.listeners {
            let Some(target) = in_focus(listener) else {
                continue;
            };
            let port = (target, listener.address.port());
            if self.full_ns.contains_key(&port) || self.full_ns.len() < MAX_SOCKETS {
                // Before its first sample it may have been full.
                let before_ns = sample.mono_ns.saturating_sub(1);
                let full_ns = self.full_ns.entry(port).or_insert(Some(before_ns));
                let is_full = listener.depth > listener.limit;
                *full_ns = is_full.then_some(sample.mono_ns).or(*full_ns);
            }
            let key = (target, listener.address, listener.cookie);
            if !sockets.contains_key(&key) && sockets.len() >= MAX_SOCKETS {
                continue;
            }
            let count = sockets.entry(key).or_default();
            count.tgid = listener.tgid;
            count.samples += 1;
            count.empty += u32::from(listener.depth == 0);
            count.waiting += u64::from(listener.depth);
            let fell = before
                .get(&listener.cookie)
                .is_some_and(|depth| listener.depth < *depth);
            count.accepted += u32::from(fell);
            self.depths.insert(listener.cookie, listener.depth);
        }
    }

    /// Whether an accept queue of this port was full at or after this time, ns. `None`: it was not sampled.
    pub(super) fn was_full(&self, target: TargetId, port: u16, since_ns: u64) -> Option<bool> {
        let full_ns = self.full_ns.get(&(target, port))?;
        Some(full_ns.is_some_and(|full_ns| full_ns >= since_ns))
    }

    /// Whether the sockets of an address were used unevenly in this time.
    pub(super) fn uneven(
        &self,
        target: TargetId,
        address: SocketAddr,
        (from_ns, to_ns): (u64, u64),
    ) -> Option<Uneven> {
        let mut sockets: BTreeMap<u64, Count> = BTreeMap::new();
        let mut seconds = 0.0;
        for second in self.seconds.within(from_ns, to_ns) {
            seconds += 1.0;
            let range = (target, address, 0)..=(target, address, u64::MAX);
            for ((.., cookie), count) in second.range(range) {
                sockets.entry(*cookie).or_default().add(count);
            }
        }
        sockets.retain(|_, count| count.samples >= MIN_SAMPLES);
        let (mut standing, mut others) = (Vec::new(), Vec::new());
        for count in sockets.values() {
            if count.empty_share() < MAX_EMPTY_OF_STANDING {
                standing.push(count);
            } else {
                others.push(count);
            }
        }
        let free = others
            .iter()
            .filter(|count| count.empty_share() >= MIN_EMPTY_OF_FREE)
            .count();
        let sum = |counts: &[&Count]| counts.iter().map(|count| count.waiting).sum::<u64>() as f64;
        let waiting = sum(&standing) / (sum(&standing) + sum(&others)).max(1.0);
        if standing.is_empty() || free == 0 || waiting < MIN_WAITING {
            return None;
        }
        let tgids = |counts: &[&Count]| counts.iter().map(|count| count.tgid).collect();
        let (holders, of_others): (BTreeSet<u32>, BTreeSet<u32>) =
            (tgids(&standing), tgids(&others));
        let accepted: u32 = standing.iter().map(|count| count.accepted).sum();
        Some(Uneven {
            sockets: sockets.len(),
            standing: standing.len(),
            free,
            waiting,
            accepts_per_s: f64::from(accepted) / f64::max(seconds, 1.0),
            holders: if holders.is_disjoint(&of_others) {
                holders
            } else {
                BTreeSet::new()
            },
        })
    }
}

impl Count {
    fn add(&mut self, other: &Self) {
        self.tgid = other.tgid;
        self.samples += other.samples;
        self.empty += other.empty;
        self.waiting += other.waiting;
        self.accepted += other.accepted;
    }

    fn empty_share(&self) -> f64 {
        f64::from(self.empty) / f64::from(self.samples.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::Model;
    use crate::sample::{Scans, Target};

    const TICK_NS: u64 = 100_000_000;

    /// Sockets of one address, each with a process that holds it and its depths in turn.
    fn uneven(sockets: &[(u32, &[u32])]) -> Option<Uneven> {
        let address = SocketAddr::from(([127, 0, 0, 1], 80));
        let target = Target {
            id: 1,
            tgids: vec![10, 11, 12, 13],
            ..Target::default()
        };
        let mut model = Model::default();
        let mut all = ListeningSockets::default();
        for tick in 0..40 {
            let listener = |(index, (tgid, depths)): (usize, &(u32, &[u32]))| Listener {
                cookie: index as u64,
                tgid: *tgid,
                netns: 1,
                address,
                depth: depths[tick % depths.len()],
                limit: 100,
                drops: 0,
                half_open: None,
                seen_ns: 0,
                ages_ns: Vec::new(),
            };
            let sample = Sample {
                mono_ns: (tick as u64 + 1) * TICK_NS,
                targets: (tick == 0).then(|| vec![target.clone()]),
                scans: Scans {
                    files: true,
                    ..Scans::default()
                },
                listeners: sockets.iter().enumerate().map(listener).collect(),
                ..Sample::default()
            };
            model.read(&sample);
            all.read(&sample, model.targets(), &BTreeSet::from([1]));
        }
        all.uneven(1, address, (0, 40 * TICK_NS))
    }

    #[test]
    fn one_socket_with_a_standing_queue_beside_empty_ones_is_uneven() {
        let found = uneven(&[(10, &[0]), (11, &[30, 31]), (12, &[0])]).unwrap();
        assert_eq!((found.sockets, found.standing, found.free), (3, 1, 2));
        assert_eq!(found.waiting, 1.0);
        assert_eq!(found.holders, BTreeSet::from([11]));
        assert!(found.accepts_per_s > 1.0, "{found:?}");
        let stuck = uneven(&[(10, &[0]), (11, &[30])]).unwrap();
        assert_eq!(stuck.accepts_per_s, 0.0);
    }

    #[test]
    fn a_process_that_holds_all_sockets_says_nothing_about_one() {
        let found = uneven(&[(10, &[0]), (10, &[30]), (10, &[0])]).unwrap();
        assert_eq!(found.holders, BTreeSet::new());
    }

    #[test]
    fn queues_that_all_stand_or_all_empty_again_are_even() {
        assert_eq!(uneven(&[(10, &[30]), (11, &[20])]), None);
        assert_eq!(uneven(&[(10, &[0, 9]), (11, &[7, 0])]), None);
        assert_eq!(uneven(&[(10, &[30])]), None, "one socket");
        assert_eq!(uneven(&[]), None);
    }
}
