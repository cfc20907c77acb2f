//! Tracks which targets are focused, and which processes are in the focus scope.
//!
//! A target is *focused* while one of its queues is unhealthy, and for a hold time afterwards. The *focus scope* is the
//! processes of focused targets plus their neighbours: their threads are profiled, their titles are read, and the other
//! ends of their connections are looked up.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};

use rustc_hash::FxHashSet;

use super::MS;
use crate::{
    sample::{Target, TargetId},
    target::ProcessInfo,
};

/// How long a target stays focused after its last unhealthy sample, ns: a queue near a threshold must not toggle profiling.
const FOCUS_RETENTION_NS: u64 = 1_000 * MS;

/// Targets that were reported as unhealthy less than a hold time ago.
#[derive(Debug)]
pub(super) struct FocusedTargets {
    hold_ns: u64,
    /// When each target was last reported, CLOCK_MONOTONIC ns.
    reported_ns: BTreeMap<TargetId, u64>,
}

impl FocusedTargets {
    pub(super) fn new(hold_ns: u64) -> Self {
        Self {
            hold_ns,
            reported_ns: BTreeMap::new(),
        }
    }

    /// Adds the targets that are unhealthy now and drops those whose hold time is over; returns whether any is new.
    pub(super) fn update(
        &mut self,
        now_ns: u64,
        unhealthy: impl Iterator<Item = TargetId>,
    ) -> bool {
        let mut has_new = false;
        for target in unhealthy {
            has_new |= self.reported_ns.insert(target, now_ns).is_none();
        }
        let hold_ns = self.hold_ns;
        self.reported_ns
            .retain(|_, reported_ns| now_ns < reported_ns.saturating_add(hold_ns));
        has_new
    }

    pub(super) fn contains(&self, target: TargetId) -> bool {
        self.reported_ns.contains_key(&target)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.reported_ns.is_empty()
    }
}

/// How long an incident counts as one that has just begun, ns: a verdict takes seconds.
const BEGINNING_NS: u64 = 30_000 * MS;
/// A target that is unhealthy again within this time, ns, is in the same incident.
const SAME_INCIDENT_NS: u64 = 60_000 * MS;

pub(super) struct Focus {
    /// Focuses all targets, whatever the state of their queues.
    all: bool,
    targets: FocusedTargets,
    /// Targets that are in an incident, and when it began, ns.
    in_incident: FocusedTargets,
    begun_ns: BTreeMap<TargetId, u64>,
    /// tgids in the focus scope.
    scope: FxHashSet<u32>,
}

impl Default for Focus {
    fn default() -> Self {
        Self {
            all: false,
            targets: FocusedTargets::new(FOCUS_RETENTION_NS),
            in_incident: FocusedTargets::new(SAME_INCIDENT_NS),
            begun_ns: BTreeMap::new(),
            scope: FxHashSet::default(),
        }
    }
}

impl Focus {
    /// Focuses all targets from now on, whatever the state of their queues.
    pub(super) fn set_all(&mut self, all: bool) {
        self.all = all;
    }

    /// Focuses `unhealthy`, and all selected targets after [`Self::set_all`].
    pub(super) fn set_focused(
        &mut self,
        now_ns: u64,
        unhealthy: &BTreeSet<TargetId>,
        targets: &[Target],
    ) {
        let new = unhealthy
            .iter()
            .filter(|id| !self.in_incident.contains(**id));
        self.begun_ns.extend(new.map(|id| (*id, now_ns)));
        self.in_incident.update(now_ns, unhealthy.iter().copied());
        self.begun_ns.retain(|id, _| self.in_incident.contains(*id));
        let all = targets
            .iter()
            .filter(|target| self.all && !target.is_neighbour);
        let all = all.map(|target| target.id);
        self.targets
            .update(now_ns, unhealthy.iter().copied().chain(all));
    }

    /// Recomputes the scope. `neighbours`: processes of selected targets that are neighbours of a focused one.
    pub(super) fn update_scope(&mut self, targets: &[Target], neighbours: &BTreeSet<u32>) {
        self.scope.clear();
        if self.targets.is_empty() {
            return;
        }
        let targets = targets
            .iter()
            .filter(|target| target.is_neighbour || self.targets.contains(target.id));
        let tgids = targets.flat_map(|target| &target.tgids).chain(neighbours);
        self.scope.extend(tgids);
    }

    /// Whether a focused target became unhealthy a short time ago.
    pub(super) fn is_incident_new(&self, now_ns: u64) -> bool {
        self.begun_ns.iter().any(|(target, begun_ns)| {
            self.targets.contains(*target) && now_ns < begun_ns.saturating_add(BEGINNING_NS)
        })
    }

    /// Whether any target is focused.
    pub(super) fn has_targets(&self) -> bool {
        !self.targets.is_empty()
    }

    pub(super) fn is_focused(&self, target: TargetId) -> bool {
        self.targets.contains(target)
    }

    /// Whether any process is in scope.
    pub(super) fn is_active(&self) -> bool {
        !self.scope.is_empty()
    }

    pub(super) fn contains(&self, tgid: u32) -> bool {
        self.scope.contains(&tgid)
    }

    pub(super) fn scope(&self) -> &FxHashSet<u32> {
        &self.scope
    }

    /// The processes among `watched` that are in scope.
    pub(super) fn in_scope<'a>(&self, watched: &'a [ProcessInfo]) -> Vec<&'a ProcessInfo> {
        let in_scope = watched.iter().filter(|process| self.contains(process.tgid));
        in_scope.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_stays_focused_for_the_hold_time() {
        let mut focused = FocusedTargets::new(10);
        assert!(focused.update(100, [7].into_iter()));
        assert!(!focused.update(109, [].into_iter()));
        assert!(focused.contains(7));
        focused.update(110, [].into_iter());
        assert!(focused.is_empty());
    }

    #[test]
    fn the_scope_is_focused_targets_and_their_neighbours() {
        let target = |id, is_neighbour| Target {
            id,
            tgids: vec![id * 10],
            is_neighbour,
            ..Target::default()
        };
        let targets = [target(1, false), target(2, false), target(3, true)];
        let mut focus = Focus::default();
        focus.update_scope(&targets, &[20].into());
        assert!(!focus.is_active());
        focus.set_focused(0, &[1].into(), &targets);
        focus.update_scope(&targets, &BTreeSet::new());
        assert_eq!(focus.scope(), &[10, 30].into_iter().collect());
        focus.update_scope(&targets, &[20].into());
        assert_eq!(focus.scope(), &[10, 20, 30].into_iter().collect());
    }

    #[test]
    fn an_incident_is_new_for_half_a_minute_while_its_own_target_is_focused() {
        let second = 1_000 * MS;
        let mut focus = Focus::default();
        let mut at = |seconds: u64, unhealthy: &[TargetId]| {
            let now_ns = seconds * second;
            focus.set_focused(now_ns, &unhealthy.iter().copied().collect(), &[]);
            focus.is_incident_new(now_ns)
        };
        assert!(at(0, &[1]));
        // A chronic fault.
        for seconds in 1..100 {
            assert_eq!(at(seconds, &[1]), seconds < 30, "{seconds}");
        }
        // A first sign in another service, gone a second later.
        assert!(at(100, &[1, 2]));
        assert!(!at(102, &[1]));
        assert!(!at(140, &[1, 2]), "the same incident");
    }
}
