//! The waits of focused services that hooks measured, as evidence beside what samples show. Empty in the glance tier.

use std::collections::{BTreeMap, VecDeque};

use crate::{
    cause::Cause,
    event::{MeasuredKind, MeasuredWaits},
    sample::{Distribution, ExactWait, ExactWaitKind, HookReport, TargetId, WorstWait},
    text::{count, duration},
};

/// Reports are kept for this time, ns: as long as the longest window that a verdict is made from.
const KEPT_NS: u64 = 20_000_000_000;
/// Reports with a longest wait that are needed to judge who had the CPU.
const MIN_REPORTS: usize = 3;
/// They must cover this share of the window: hooks may have been attached late, or detached because of their cost.
const MIN_COVERED_SHARE: f64 = 0.5;
/// A process must have had the CPU for this share of the time that other services had it to be named.
const MIN_CULPRIT_SHARE: f64 = 0.5;
/// And for this share of the longest waits: hooks see only the last thread before the one that waited, and where several take turns,
/// each has a part of the wait. The recorded incident `cpu-neighbour-hooks` tests the value: there it is 17%.
const MIN_NAMED_SHARE: f64 = 0.1;
/// The longest waits decide the cause if who had the CPU is known for this share of them.
const SURE_KNOWN_SHARE: f64 = 0.5;
/// They stand for the others if they are at least this share of the time of all waits: one long wait a second behind a timer job
/// says little about a thousand short ones.
const SURE_LONGEST_SHARE: f64 = 0.2;

/// Different lengths of waits that are kept for an episode. Hooks have 832; a recording may contain any.
const MAX_LENGTHS: usize = 1_024;

/// Waits of one kind.
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
    waits: BTreeMap<(TargetId, MeasuredKind), Waits>,
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
            if let Some(kind) = kind(wait) {
                let sum = waits.entry((wait.target, kind)).or_default();
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
        let (kind, what) = match cause {
            Cause::CpuStarved | Cause::CpuBound | Cause::CpuThrottled => {
                (MeasuredKind::Cpu, "for a CPU")
            }
            Cause::DiskSlow => (MeasuredKind::Io, "for I/O"),
            _ => return None,
        };
        let mut covered_ns = 0_u64;
        let mut sum = Distribution::default();
        let mut worst: Option<&WorstWait> = None;
        for report in self.within(time) {
            covered_ns = covered_ns.saturating_add(report.interval_ns);
            if let Some(waits) = report.waits.get(&(target, kind)) {
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

    /// The process that had the CPU for most of the time that other services had it during the longest waits. Whether these were the
    /// cause is another question.
    pub(super) fn has_the_cpu(&self, asked: &Asked<'_>) -> Option<u32> {
        let longest = self.longest_for_cpu(asked)?;
        let mut foreign: BTreeMap<u32, u64> = BTreeMap::new();
        for one in &longest {
            let culprit = one.culprit.as_ref();
            if let Some(culprit) = culprit.filter(|culprit| !(asked.is_own)(culprit.tgid)) {
                let sum = foreign.entry(culprit.tgid).or_default();
                *sum = sum.saturating_add(one.culprit_ns);
            }
        }
        let foreign_ns = foreign
            .values()
            .fold(0_u64, |sum, ns| sum.saturating_add(*ns));
        let (tgid, had_ns) = foreign.into_iter().max_by_key(|(_, ns)| *ns)?;
        let is_known = foreign_ns as f64 >= waited_ns(&longest) as f64 * MIN_NAMED_SHARE;
        let is_most = had_ns as f64 >= foreign_ns as f64 * MIN_CULPRIT_SHARE;
        (is_known && is_most).then_some(tgid)
    }

    /// Whether this process had the CPU during one of the longest waits.
    pub(super) fn had_the_cpu(&self, asked: &Asked<'_>, tgid: u32) -> bool {
        let longest = self.longest_for_cpu(asked).unwrap_or_default();
        let mut culprits = longest.iter().filter_map(|one| one.culprit.as_ref());
        culprits.any(|culprit| culprit.tgid == tgid)
    }

    /// The waits for a CPU, and who had it. `None`: hooks measured too few.
    pub(super) fn cpu_waits(&self, asked: &Asked<'_>) -> Option<CpuWaits> {
        let longest = self.longest_for_cpu(asked)?;
        let had_ns = |own: bool| {
            let of = longest.iter().filter(|one| {
                let culprit = one.culprit.as_ref();
                culprit.is_some_and(|culprit| (asked.is_own)(culprit.tgid) == own)
            });
            of.fold(0_u64, |sum, one| sum.saturating_add(one.culprit_ns)) as f64
        };
        let (own_ns, foreign_ns) = (had_ns(true), had_ns(false));
        let known_ns = own_ns + foreign_ns;
        let longest_ns = waited_ns(&longest) as f64;
        let (mut total_ns, mut covered_ns) = (0_u64, 0_u64);
        for report in self.within(asked.time) {
            covered_ns = covered_ns.saturating_add(report.interval_ns);
            if let Some(waits) = report.waits.get(&(asked.target, MeasuredKind::Cpu)) {
                total_ns = total_ns.saturating_add(waits.distribution.total_ns);
            }
        }
        Some(CpuWaits {
            foreign: foreign_ns / known_ns.max(1.0),
            threads: total_ns as f64 / covered_ns.max(1) as f64,
            is_sure: known_ns >= (longest_ns * SURE_KNOWN_SHARE).max(1.0)
                && longest_ns >= total_ns as f64 * SURE_LONGEST_SHARE,
        })
    }

    /// The longest waits for a CPU of the threads that serve the queue, if they were measured in enough of the window.
    fn longest_for_cpu(&self, asked: &Asked<'_>) -> Option<Vec<&WorstWait>> {
        let (from_ns, to_ns) = asked.time;
        let (mut covered_ns, mut reports) = (0_u64, 0);
        let mut longest = Vec::new();
        for report in self.within(asked.time) {
            let began_ns = report.at_ns.saturating_sub(report.interval_ns);
            let within_ns = report
                .at_ns
                .min(to_ns)
                .saturating_sub(began_ns.max(from_ns));
            covered_ns = covered_ns.saturating_add(within_ns);
            let known = longest.len();
            let waits = report.waits.get(&(asked.target, MeasuredKind::Cpu));
            longest.extend(
                waits
                    .into_iter()
                    .flat_map(|waits| &waits.worst)
                    .filter(|one| {
                        let ended_ns = one.mono_ns.clamp(began_ns, report.at_ns);
                        let is_within =
                            ended_ns > from_ns && ended_ns.saturating_sub(one.wait_ns) < to_ns;
                        is_within && (asked.serves)(one.tid)
                    }),
            );
            reports += usize::from(longest.len() > known);
        }
        let window_ns = to_ns.saturating_sub(from_ns);
        let is_covered = covered_ns as f64 >= window_ns as f64 * MIN_COVERED_SHARE;
        (is_covered && reports >= MIN_REPORTS).then_some(longest)
    }
}

/// Whose waits for a CPU, and when.
pub(super) struct Asked<'a> {
    pub(super) target: TargetId,
    /// From and to, CLOCK_MONOTONIC, ns.
    pub(super) time: (u64, u64),
    /// Whether a process belongs to the service.
    pub(super) is_own: &'a dyn Fn(u32) -> bool,
    /// Whether a thread serves the queue. Other threads of the service may wait for other reasons.
    pub(super) serves: &'a dyn Fn(u32) -> bool,
}

/// What hooks measured of the waits of a service for a CPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct CpuWaits {
    /// Share of the longest waits in which other services had the CPU, 0 to 1; its own threads had it for the rest.
    pub(super) foreign: f64,
    /// Mean number of threads of the service that waited, by the sum of all waits.
    pub(super) threads: f64,
    /// The longest waits are a good part of all, and who had the CPU is known for most of them.
    pub(super) is_sure: bool,
}

fn waited_ns(longest: &[&WorstWait]) -> u64 {
    let waits = longest.iter().map(|one| one.wait_ns);
    waits.fold(0, u64::saturating_add)
}

/// All waits of one service during an episode.
#[derive(Debug, Default)]
pub(super) struct OfEpisode(BTreeMap<MeasuredKind, (Distribution, Option<WorstWait>)>);

impl OfEpisode {
    /// Adds what hooks measured of this service.
    pub(super) fn read(&mut self, report: &HookReport, target: TargetId) {
        for wait in report.waits.iter().filter(|wait| wait.target == target) {
            let Some(kind) = kind(wait) else { continue };
            let (sum, longest) = self.0.entry(kind).or_default();
            if sum.waits.len() < MAX_LENGTHS {
                sum.add(&wait.distribution);
            }
            let length = |worst: &Option<WorstWait>| worst.as_ref().map(|worst| worst.wait_ns);
            if length(&wait.worst) > length(longest) {
                longest.clone_from(&wait.worst);
            }
        }
    }

    pub(super) fn summaries(&self) -> Vec<MeasuredWaits> {
        let summary =
            |(kind, (sum, longest)): (&MeasuredKind, &(Distribution, Option<WorstWait>))| {
                let longest = longest
                    .as_ref()
                    .filter(|longest| longest.wait_ns >= sum.max_ns);
                Some(MeasuredWaits {
                    kind: *kind,
                    count: sum.count,
                    mean_ns: sum.mean_ns()?,
                    p50_ns: sum.quantile_ns(0.5)?,
                    p99_ns: sum.quantile_ns(0.99)?,
                    max_ns: sum.max_ns,
                    culprit: longest.and_then(|longest| {
                        let culprit = longest.culprit.clone()?;
                        Some((culprit, longest.culprit_ns))
                    }),
                })
            };
        self.0.iter().filter_map(summary).collect()
    }
}

fn kind(wait: &ExactWait) -> Option<MeasuredKind> {
    match wait.kind {
        ExactWaitKind::Woken | ExactWaitKind::Preempted => Some(MeasuredKind::Cpu),
        ExactWaitKind::BlockedIo => Some(MeasuredKind::Io),
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

    fn asked(seconds: u64) -> Asked<'static> {
        Asked {
            target: 1,
            time: (0, seconds * SECOND),
            is_own: &|tgid| tgid == 10,
            serves: &|_| true,
        }
    }

    /// A second with these waits after another.
    fn measured(waits: impl IntoIterator<Item = ExactWait>) -> ExactWaits {
        let mut exact = ExactWaits::default();
        for (mut wait, second) in waits.into_iter().zip(1..) {
            if let Some(worst) = wait.worst.as_mut().filter(|worst| worst.mono_ns == 0) {
                worst.mono_ns = second * SECOND;
            }
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
            exact.has_the_cpu(&asked(5))
        };
        assert_eq!(of([Some(20), Some(20), Some(30), None]), Some(20));
        assert_eq!(of([Some(20), Some(30), Some(40), None]), None);
        assert_eq!(of([Some(10), Some(10), Some(10), Some(20)]), Some(20));
        assert_eq!(of([Some(10), Some(10), None, None]), None);
        let too_few = measured([wait(ExactWaitKind::Woken, 5, Some(20))]);
        assert_eq!(too_few.has_the_cpu(&asked(1)), None);
    }

    #[test]
    fn the_longest_waits_are_divided_between_own_and_foreign_threads() {
        let of = |culprits: [Option<u32>; 4]| {
            let waits = culprits.map(|culprit| wait(ExactWaitKind::Woken, 5, culprit));
            let exact = measured(waits);
            exact.cpu_waits(&asked(5))
        };
        let mixed = of([Some(10), Some(10), Some(10), Some(20)]).unwrap();
        assert!((mixed.foreign - 0.25).abs() < 1e-9, "{mixed:?}");
        assert!((mixed.threads - 0.005).abs() < 1e-9, "{mixed:?}");
        assert!(mixed.is_sure);
        // A CPU that was idle before says nothing.
        let known = of([Some(10), Some(10), None, None]).unwrap();
        assert!(known.foreign < 1e-9 && known.is_sure, "{known:?}");
        let less = of([Some(10), None, None, None]).unwrap();
        assert!(!less.is_sure, "{less:?}");
        assert!(!of([None, None, None, None]).unwrap().is_sure);
    }

    #[test]
    fn waits_that_do_not_represent_the_window_or_the_queue_decide_nothing() {
        let waits = || [(); 4].map(|()| wait(ExactWaitKind::Woken, 5, Some(20)));
        let exact = measured(waits());
        assert!(exact.cpu_waits(&asked(8)).is_some());
        assert_eq!(
            exact.cpu_waits(&asked(9)),
            None,
            "less than half of the window"
        );
        let other_threads = Asked {
            serves: &|tid| tid == 11,
            ..asked(5)
        };
        assert_eq!(exact.cpu_waits(&other_threads), None);
        assert_eq!(exact.has_the_cpu(&other_threads), None);
        // Several waits of one report are of one moment.
        let mut at_once = ExactWaits::default();
        let report = HookReport {
            interval_ns: SECOND,
            waits: waits().to_vec(),
            ..HookReport::default()
        };
        at_once.read(SECOND, &report, |_| true);
        assert_eq!(at_once.cpu_waits(&asked(1)), None);
        // The first of three ended before the window.
        let before = Asked {
            time: (SECOND / 2, 4 * SECOND),
            ..asked(5)
        };
        let mut early = waits();
        for wait in &mut early {
            wait.worst.as_mut().unwrap().mono_ns = SECOND / 4;
        }
        assert_eq!(measured(early[..3].to_vec()).cpu_waits(&before), None);
        // One long wait a second among a thousand short ones.
        let rare = waits().map(|mut wait| {
            wait.distribution.total_ns = 1_000 * MS;
            wait
        });
        assert!(!measured(rare).cpu_waits(&asked(5)).unwrap().is_sure);
    }

    #[test]
    fn an_episode_has_all_its_waits_and_the_culprit_of_the_longest() {
        let mut of_episode = OfEpisode::default();
        assert!(of_episode.summaries().is_empty());
        for (wait_ms, culprit) in [(1, Some(20)), (9, Some(30)), (2, None)] {
            let other = ExactWait {
                target: 2,
                ..wait(ExactWaitKind::Woken, 100, Some(40))
            };
            let report = HookReport {
                waits: vec![wait(ExactWaitKind::Preempted, wait_ms, culprit), other],
                ..HookReport::default()
            };
            of_episode.read(&report, 1);
        }
        let io = HookReport {
            waits: vec![
                wait(ExactWaitKind::BlockedIo, 7, None),
                wait(ExactWaitKind::Blocked, 50, None),
            ],
            ..HookReport::default()
        };
        of_episode.read(&io, 1);
        let [cpu, io] = &of_episode.summaries()[..] else {
            panic!("{of_episode:?}");
        };
        assert_eq!(
            (cpu.kind, cpu.count, cpu.mean_ns),
            (MeasuredKind::Cpu, 3, 4 * MS)
        );
        assert_eq!(
            [cpu.p50_ns, cpu.p99_ns, cpu.max_ns],
            [2 * MS, 9 * MS, 9 * MS]
        );
        let (culprit, culprit_ns) = cpu.culprit.as_ref().unwrap();
        assert_eq!((culprit.tid, *culprit_ns), (30, 9 * MS));
        assert_eq!(
            (io.kind, io.count, io.max_ns),
            (MeasuredKind::Io, 1, 7 * MS)
        );
        assert_eq!(io.culprit, None);
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
