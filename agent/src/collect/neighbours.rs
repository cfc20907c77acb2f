//! Processes that may keep focused targets waiting. They are found along connections, pipes, unix sockets and locks, and stay watched
//! while they are within reach.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    MS, focus::Focus, holders::Holders, notices::Notices, peers::Peers, processes::Processes,
};
use crate::{
    sample::{LockWait, Sample},
    target::{End, HostView, MAX_NEIGHBOURS, ends, find_neighbours},
};

/// How long a neighbour stays watched after it was last reached, ns: longer than the longest interval between searches.
const NEIGHBOUR_RETENTION_NS: u64 = 10_000 * MS;

#[derive(Default)]
pub(super) struct Neighbours {
    /// Neighbours that no selector names, by tgid.
    added: BTreeMap<u32, Added>,
    /// tgids of neighbours that are part of a selected target.
    selected: BTreeSet<u32>,
    /// What each process (tgid) holds open and may be waiting on.
    ends: Vec<(u32, End)>,
    /// The holders of the locks that each process waits for.
    lock_holders: Vec<(u32, End)>,
    /// The processes that take items from the queues inside each process.
    consumers: Vec<(u32, End)>,
}

/// A process that is watched only as a neighbour.
#[derive(Clone, Copy, Debug)]
struct Added {
    /// Distinguishes it from a later process with the same tgid.
    start_ns: u64,
    reached_ns: u64,
}

impl Neighbours {
    /// tgids to watch although no selector names them: still alive, and reached less than [`NEIGHBOUR_RETENTION_NS`] ago.
    pub(super) fn added(&mut self, now_ns: u64, processes: &Processes) -> BTreeSet<u32> {
        self.expire(now_ns, |tgid| Some(processes.get(tgid)?.start_ns));
        self.added.keys().copied().collect()
    }

    /// tgids of neighbours that are part of a selected target.
    pub(super) fn selected(&self) -> &BTreeSet<u32> {
        &self.selected
    }

    /// Adds what a scan over files found. `is_served(netns, port)`: whether a process listens there.
    pub(super) fn set_ends(&mut self, sample: &Sample, is_served: impl Fn(u32, u16) -> bool) {
        self.ends = ends(&sample.connections, &sample.pipes, &sample.unix, is_served);
        self.ends.extend(&self.lock_holders);
        self.ends.extend(&self.consumers);
    }

    /// Updates the processes that take items from the queues inside services.
    pub(super) fn set_consumers(&mut self, consumers: impl Iterator<Item = (u32, End)>) {
        self.consumers = consumers.collect();
    }

    /// Updates the holders of the locks that processes wait for. `None`: they wait for none.
    pub(super) fn set_lock_holders(&mut self, waits: Option<&[LockWait]>) {
        let waits = waits.unwrap_or_default().iter();
        let holders = waits.filter_map(|wait| Some((wait.tgid, End::Process(wait.holder.tgid()?))));
        let holders: BTreeSet<(u32, End)> = holders.collect();
        self.lock_holders = holders.into_iter().collect();
    }

    /// Finds the neighbours of all focused targets; returns whether there are new ones to watch.
    pub(super) fn find(
        &mut self,
        now_ns: u64,
        focus: &Focus,
        processes: &mut Processes,
        holders: &Holders,
        peers: &Peers,
        notices: &mut Notices,
    ) -> bool {
        let (mut focused, mut selected) = (BTreeSet::new(), BTreeSet::new());
        for target in processes
            .targets()
            .iter()
            .filter(|target| !target.is_neighbour)
        {
            selected.extend(target.tgids.iter().copied());
            if focus.is_focused(target.id) {
                focused.extend(target.tgids.iter().copied());
            }
        }
        let (all, discovery) = processes.all_and_discovery();
        let host = HostView {
            processes: all,
            ends: &self.ends,
            peers: peers.found_peers(),
            holders: holders.holders(),
            listeners: holders.listeners(),
            own_pid: std::process::id(),
        };
        let found = find_neighbours(&focused, &selected, &host, &mut |a, b| {
            discovery.is_same_program(a, b)
        });
        if found.left_out > 0 {
            let count = found.left_out;
            notices.report_once("too_many_neighbours", || {
                format!(
                    "limit of {MAX_NEIGHBOURS} neighbour processes reached: {count} are not watched"
                )
            });
        }
        let (selected, added): (BTreeSet<u32>, BTreeSet<u32>) = found
            .tgids
            .into_iter()
            .partition(|tgid| selected.contains(tgid));
        self.selected = selected;
        let started = added
            .into_iter()
            .filter_map(|tgid| Some((tgid, processes.get(tgid)?.start_ns)));
        self.add(now_ns, started)
    }

    /// Forgets how neighbours are reached: no target is focused any more. Added ones stay watched for their retention
    /// time.
    pub(super) fn clear(&mut self) {
        self.selected.clear();
        self.ends.clear();
        self.lock_holders.clear();
        self.consumers.clear();
    }

    /// Adds processes (tgid, start time); returns whether any is new. Beyond [`MAX_NEIGHBOURS`], drops those that were reached
    /// longest ago.
    fn add(&mut self, now_ns: u64, processes: impl Iterator<Item = (u32, u64)>) -> bool {
        let mut has_new = false;
        for (tgid, start_ns) in processes {
            let added = Added {
                start_ns,
                reached_ns: now_ns,
            };
            has_new |= self.added.insert(tgid, added).is_none();
        }
        while self.added.len() > MAX_NEIGHBOURS {
            let oldest = self.added.iter().min_by_key(|(_, added)| added.reached_ns);
            let Some(oldest) = oldest.map(|(tgid, _)| *tgid) else {
                break;
            };
            self.added.remove(&oldest);
        }
        has_new
    }

    /// Drops neighbours that have ended or were not reached recently. `start_ns_of`: when the process with a tgid started.
    fn expire(&mut self, now_ns: u64, start_ns_of: impl Fn(u32) -> Option<u64>) {
        self.added.retain(|tgid, added| {
            start_ns_of(*tgid) == Some(added.start_ns)
                && now_ns < added.reached_ns + NEIGHBOUR_RETENTION_NS
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000 * MS;

    fn tgids(neighbours: &Neighbours) -> Vec<u32> {
        neighbours.added.keys().copied().collect()
    }

    #[test]
    fn a_neighbour_lingers_for_ten_seconds_after_it_was_last_reached() {
        let mut neighbours = Neighbours::default();
        assert!(neighbours.add(SECOND, [(7, 1), (8, 1)].into_iter()));
        assert!(!neighbours.add(5 * SECOND, [(8, 1)].into_iter()));
        neighbours.expire(10 * SECOND, |_| Some(1));
        assert_eq!(tgids(&neighbours), [7, 8]);
        neighbours.expire(11 * SECOND, |_| Some(1));
        assert_eq!(tgids(&neighbours), [8]);
        neighbours.expire(15 * SECOND, |_| Some(1));
        assert!(neighbours.added.is_empty());
    }

    #[test]
    fn a_process_with_a_reused_pid_is_not_a_neighbour() {
        let mut neighbours = Neighbours::default();
        neighbours.add(SECOND, [(7, 1)].into_iter());
        neighbours.expire(SECOND, |_| Some(2));
        assert!(neighbours.added.is_empty());
    }

    #[test]
    fn beyond_the_limit_those_reached_longest_ago_are_dropped() {
        let mut neighbours = Neighbours::default();
        let many = |from: u32| (from..from + MAX_NEIGHBOURS as u32).map(|tgid| (tgid, 1));
        neighbours.add(SECOND, many(1));
        neighbours.add(2 * SECOND, many(40));
        let expected: Vec<u32> = many(40).map(|(tgid, _)| tgid).collect();
        assert_eq!(tgids(&neighbours), expected);
    }
}
