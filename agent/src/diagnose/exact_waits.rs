//! The waits of focused services that hooks measured, as evidence beside what samples show. Empty in the glance tier.

use std::collections::{BTreeMap, VecDeque};

use crate::{
    cause::Cause,
    sample::{Distribution, ExactWait, ExactWaitKind, HookReport, TargetId, WorstWait},
    text::{count, duration},
};

/// Reports are kept for this time, ns: as long as the longest window that a verdict is made from.
const KEPT_NS: u64 = 20_000_000_000;
/// The thread that had the CPU during the longest waits is known from this many of them on. There is one a second for each
/// process and kind of wait.
const MIN_WORST_WAITS: usize = 3;
/// It must have had the CPU for this share of them.
const MIN_CULPRIT_SHARE: f64 = 0.5;

/// What a thread waited for. Waits in futex are left out: idle threads wait there, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Cpu,
    Io,
}

/// Waits of one class.
#[derive(Debug, Default)]
struct Waits {
    distribution: Distribution,
    /// The longest of each process.
    worst: Vec<WorstWait>,
}

/// What one report covers.
#[derive(Debug)]
struct Reported {
    at_ns: u64,
    interval_ns: u64,
    waits: BTreeMap<(TargetId, Class), Waits>,
}

#[derive(Debug, Default)]
pub(super) struct ExactWaits(VecDeque<Reported>);

impl ExactWaits {
    /// Adds what hooks measured until then.
    pub(super) fn read(
        &mut self,
        at_ns: u64,
        report: &HookReport,
        in_focus: impl Fn(TargetId) -> bool,
    ) {
        let mut waits: BTreeMap<_, Waits> = BTreeMap::new();
        for wait in report.waits.iter().filter(|wait| in_focus(wait.target)) {
            if let Some(class) = class(wait) {
                let sum = waits.entry((wait.target, class)).or_default();
                sum.distribution.add(&wait.distribution);
                sum.worst.extend(wait.worst.clone());
            }
        }
        if report.interval_ns > 0 {
            self.0.push_back(Reported {
                at_ns,
                interval_ns: report.interval_ns,
                waits,
            });
        }
        let is_old = |first: &Reported| at_ns.saturating_sub(first.at_ns) > KEPT_NS;
        while self.0.front().is_some_and(is_old) {
            self.0.pop_front();
        }
    }

    /// The reports that overlap with this time.
    fn within(&self, (from_ns, to_ns): (u64, u64)) -> impl Iterator<Item = &Reported> {
        self.0.iter().filter(move |report| {
            report.at_ns > from_ns && report.at_ns.saturating_sub(report.interval_ns) < to_ns
        })
    }

    /// The waits that this cause is about, in words. `None`: none was measured.
    pub(super) fn words(&self, target: TargetId, cause: Cause, time: (u64, u64)) -> Option<String> {
        let (class, what) = match cause {
            Cause::CpuStarved | Cause::CpuBound | Cause::CpuThrottled => (Class::Cpu, "for a CPU"),
            Cause::DiskSlow => (Class::Io, "for I/O"),
            _ => return None,
        };
        let mut covered_ns = 0_u64;
        let mut sum = Distribution::default();
        let mut worst: Option<&WorstWait> = None;
        for report in self.within(time) {
            covered_ns = covered_ns.saturating_add(report.interval_ns);
            if let Some(waits) = report.waits.get(&(target, class)) {
                sum.add(&waits.distribution);
                worst = worst
                    .into_iter()
                    .chain(&waits.worst)
                    .max_by_key(|worst| worst.wait_ns);
            }
        }
        let mean = duration(sum.mean_ns()?);
        let p99 = duration(sum.quantile_ns(0.99)?);
        let longest = worst.map_or_else(String::new, longest);
        Some(format!(
            "hooks measured {} waits {what} in {}: mean {mean}, p99 {p99}{longest}",
            count(sum.count),
            duration(covered_ns),
        ))
    }

    /// The process that had the CPU for most of the longest waits for one, if it is not the service's own.
    pub(super) fn has_the_cpu(
        &self,
        target: TargetId,
        time: (u64, u64),
        is_own: impl Fn(u32) -> bool,
    ) -> Option<u32> {
        let waits = self
            .within(time)
            .filter_map(|report| report.waits.get(&(target, Class::Cpu)));
        let worst: Vec<&WorstWait> = waits.flat_map(|waits| &waits.worst).collect();
        if worst.len() < MIN_WORST_WAITS {
            return None;
        }
        let mut had_ns: BTreeMap<u32, u64> = BTreeMap::new();
        for one in &worst {
            if let Some(culprit) = &one.culprit {
                let sum = had_ns.entry(culprit.tgid).or_default();
                *sum = sum.saturating_add(one.culprit_ns);
            }
        }
        let waited_ns = worst
            .iter()
            .fold(0_u64, |sum, one| sum.saturating_add(one.wait_ns));
        let (tgid, had_ns) = had_ns.into_iter().max_by_key(|(_, ns)| *ns)?;
        let is_most = had_ns as f64 >= waited_ns as f64 * MIN_CULPRIT_SHARE;
        (is_most && !is_own(tgid)).then_some(tgid)
    }
}

fn class(wait: &ExactWait) -> Option<Class> {
    match wait.kind {
        ExactWaitKind::Woken | ExactWaitKind::Preempted => Some(Class::Cpu),
        ExactWaitKind::BlockedIo => Some(Class::Io),
        ExactWaitKind::Blocked => None,
    }
}

/// `, longest 12 ms, of which spin (815) had the CPU for 11 ms`.
fn longest(worst: &WorstWait) -> String {
    let longest = format!(", longest {}", duration(worst.wait_ns));
    match &worst.culprit {
        Some(culprit) => format!(
            "{longest}, of which {} ({}) had the CPU for {}",
            culprit.comm,
            culprit.tid,
            duration(worst.culprit_ns)
        ),
        None => longest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::WaitParty;

    const MS: u64 = 1_000_000;
    const SECOND: u64 = 1_000 * MS;

    fn wait(kind: ExactWaitKind, wait_ms: u64, culprit: Option<u32>) -> ExactWait {
        ExactWait {
            target: 1,
            tgid: 10,
            kind,
            distribution: Distribution {
                count: 1,
                total_ns: wait_ms * MS,
                max_ns: wait_ms * MS,
                waits: vec![(wait_ms * MS, 1)],
            },
            worst: Some(WorstWait {
                wait_ns: wait_ms * MS,
                culprit: culprit.map(|tgid| WaitParty {
                    tgid,
                    tid: tgid,
                    comm: "spin".to_owned(),
                }),
                culprit_ns: wait_ms * MS,
                ..WorstWait::default()
            }),
            ..ExactWait::default()
        }
    }

    /// A second with these waits after another.
    fn measured(waits: impl IntoIterator<Item = ExactWait>) -> ExactWaits {
        let mut exact = ExactWaits::default();
        for (wait, second) in waits.into_iter().zip(1..) {
            let report = HookReport {
                interval_ns: SECOND,
                waits: vec![wait],
                ..HookReport::default()
            };
            exact.read(second * SECOND, &report, |target| target == 1);
        }
        exact
    }

    #[test]
    fn the_waits_of_a_cause_within_a_window_are_added_up() {
        let exact = measured([
            wait(ExactWaitKind::Woken, 2, Some(20)),
            wait(ExactWaitKind::Preempted, 4, Some(20)),
            wait(ExactWaitKind::BlockedIo, 90, None),
            wait(ExactWaitKind::Woken, 6, Some(20)),
        ]);
        let words = |cause, to: u64| exact.words(1, cause, (SECOND, to * SECOND));
        assert_eq!(
            words(Cause::CpuStarved, 9).unwrap(),
            "hooks measured 2 waits for a CPU in 3.0 s: mean 5.0 ms, p99 6.0 ms, longest 6.0 ms, of which spin (20) had the CPU for 6.0 ms"
        );
        let io = words(Cause::DiskSlow, 9).unwrap();
        assert!(
            io.contains("1 waits for I/O") && io.contains("longest 90"),
            "{io}"
        );
        assert_eq!(words(Cause::DownstreamSlow, 9), None);
        assert_eq!(exact.words(2, Cause::CpuStarved, (0, 9 * SECOND)), None);
    }

    #[test]
    fn the_process_that_had_the_cpu_for_most_of_the_longest_waits_is_named() {
        let of = |culprits: [Option<u32>; 4]| {
            let waits = culprits.map(|culprit| wait(ExactWaitKind::Woken, 5, culprit));
            let exact = measured(waits);
            exact.has_the_cpu(1, (0, 9 * SECOND), |tgid| tgid == 10)
        };
        assert_eq!(of([Some(20), Some(20), Some(30), None]), Some(20));
        assert_eq!(of([Some(20), Some(30), Some(40), None]), None);
        assert_eq!(
            of([Some(10), Some(10), Some(10), Some(20)]),
            None,
            "its own"
        );
        let too_few = measured([wait(ExactWaitKind::Woken, 5, Some(20))]);
        assert_eq!(too_few.has_the_cpu(1, (0, 9 * SECOND), |_| false), None);
    }

    #[test]
    fn old_reports_and_services_out_of_focus_are_forgotten() {
        let mut exact = measured([wait(ExactWaitKind::Woken, 5, Some(20))]);
        let other = HookReport {
            interval_ns: SECOND,
            waits: vec![ExactWait {
                target: 2,
                ..wait(ExactWaitKind::Woken, 5, None)
            }],
            ..HookReport::default()
        };
        exact.read(30 * SECOND, &other, |target| target == 1);
        assert_eq!(exact.0.len(), 1);
        assert!(exact.0.iter().all(|report| report.waits.is_empty()));
    }
}
