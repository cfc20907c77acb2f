//! What is shown of the waits that hooks have measured in the last second.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, btree_map::Entry},
};

use serde::{Deserialize, Serialize};

use crate::{
    queue::syscalls,
    sample::{Architecture, ExactWait, ExactWaitKind, HookReport, TargetId},
};

/// System calls per service: those with the longest waits in sum.
const MAX_CALLS: usize = 4;

/// The waits of a service for a CPU, or in one system call for one file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Wait {
    /// `run_queue` or `blocked`.
    pub kind: String,
    /// The system call that its threads were blocked in; `none` outside of any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub call: Option<String>,
    /// What the call's descriptor refers to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    pub count: u64,
    pub total_ns: u64,
    pub p50_ns: u64,
    pub p99_ns: u64,
    pub max_ns: u64,
    /// Of the longest wait for a CPU: the thread that had it until then, and how long during the wait.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub culprit: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub culprit_tid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub culprit_ns: Option<u64>,
}

/// The service, whether its threads were blocked, and of those the system call and its file.
type Key<'a> = (TargetId, bool, Option<u16>, Option<&'a str>);

/// The waits of each service: for a CPU, then those in system calls, the longest in sum first.
pub(super) fn by_target(
    report: &HookReport,
    architecture: Architecture,
) -> BTreeMap<TargetId, Vec<Wait>> {
    let mut sums: BTreeMap<Key<'_>, ExactWait> = BTreeMap::new();
    for wait in &report.waits {
        let key = (
            wait.target,
            is_blocked(wait.kind),
            wait.call,
            wait.path.as_deref(),
        );
        match sums.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(wait.clone());
            }
            Entry::Occupied(mut entry) => add(entry.get_mut(), wait),
        }
    }
    let mut all: BTreeMap<TargetId, Vec<Wait>> = BTreeMap::new();
    for sum in sums.into_values() {
        all.entry(sum.target)
            .or_default()
            .push(shown(&sum, architecture));
    }
    for waits in all.values_mut() {
        waits.sort_by_key(|wait| (wait.call.is_some(), Reverse(wait.total_ns)));
        let for_cpu = waits.iter().take_while(|wait| wait.call.is_none()).count();
        waits.truncate(for_cpu + MAX_CALLS);
    }
    all
}

fn is_blocked(kind: ExactWaitKind) -> bool {
    matches!(kind, ExactWaitKind::Blocked | ExactWaitKind::BlockedIo)
}

fn add(sum: &mut ExactWait, wait: &ExactWait) {
    sum.distribution.add(&wait.distribution);
    let longest_ns = |of: &ExactWait| of.worst.as_ref().map(|worst| worst.wait_ns);
    if longest_ns(sum) < longest_ns(wait) {
        sum.worst.clone_from(&wait.worst);
    }
}

fn shown(wait: &ExactWait, architecture: Architecture) -> Wait {
    let waits = &wait.distribution;
    let is_blocked = is_blocked(wait.kind);
    let worst = wait.worst.as_ref().filter(|_| !is_blocked);
    let culprit = worst.and_then(|worst| worst.culprit.as_ref());
    Wait {
        kind: if is_blocked { "blocked" } else { "run_queue" }.to_owned(),
        call: is_blocked.then(|| match wait.call {
            Some(number) => syscalls::name(architecture, i32::from(number))
                .map_or_else(|| number.to_string(), str::to_owned),
            None => "none".to_owned(),
        }),
        path: wait.path.clone(),
        count: waits.count,
        total_ns: waits.total_ns,
        p50_ns: waits.quantile_ns(0.5).unwrap_or(0),
        p99_ns: waits.quantile_ns(0.99).unwrap_or(0),
        max_ns: waits.max_ns,
        culprit: culprit.map(|culprit| culprit.comm.clone()),
        culprit_tid: culprit.map(|culprit| culprit.tid),
        culprit_ns: culprit.and(worst).map(|worst| worst.culprit_ns),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{Distribution, WaitParty, WorstWait};

    fn wait(kind: ExactWaitKind, call: Option<u16>, waits: &[(u64, u64)]) -> ExactWait {
        let max_ns = waits.last().map_or(0, |(wait_ns, _)| *wait_ns);
        ExactWait {
            target: 1,
            kind,
            call,
            distribution: Distribution {
                count: waits.iter().map(|(_, count)| count).sum(),
                total_ns: waits.iter().map(|(wait_ns, count)| wait_ns * count).sum(),
                max_ns,
                waits: waits.to_vec(),
            },
            worst: Some(WorstWait {
                wait_ns: max_ns,
                culprit: Some(WaitParty {
                    tid: max_ns as u32,
                    comm: "backup".to_owned(),
                    ..WaitParty::default()
                }),
                ..WorstWait::default()
            }),
            ..ExactWait::default()
        }
    }

    #[test]
    fn waits_for_a_cpu_come_first_and_are_added_up_over_processes() {
        let mut waits = vec![
            wait(ExactWaitKind::Blocked, Some(0), &[(1_000_000, 3)]),
            wait(ExactWaitKind::Woken, None, &[(10, 2)]),
            wait(ExactWaitKind::Preempted, None, &[(30, 1)]),
            // A page fault.
            wait(ExactWaitKind::BlockedIo, None, &[(5_000_000, 1)]),
        ];
        waits.extend((10..20).map(|call| wait(ExactWaitKind::Blocked, Some(call), &[(1, 1)])));
        let report = HookReport {
            waits,
            ..HookReport::default()
        };
        let all = by_target(&report, Architecture::default());
        let calls: Vec<Option<&str>> = all[&1].iter().map(|wait| wait.call.as_deref()).collect();
        assert_eq!(calls[..3], [None, Some("none"), Some("read")]);
        assert_eq!(calls.len(), 1 + MAX_CALLS);
        let for_cpu = &all[&1][0];
        assert_eq!((for_cpu.kind.as_str(), for_cpu.count), ("run_queue", 3));
        assert_eq!((for_cpu.p50_ns, for_cpu.max_ns), (10, 30));
        assert_eq!(for_cpu.culprit_tid, Some(30), "that of the longest wait");
        assert_eq!(all[&1][1].culprit, None, "only a CPU has a culprit");
        assert!(by_target(&HookReport::default(), Architecture::default()).is_empty());
    }
}
