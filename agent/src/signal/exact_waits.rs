//! Exact waits of threads as histograms for metrics, and what the hooks that measure them cost.

use std::collections::{BTreeMap, BTreeSet};

use prost_types::Timestamp;

use super::{
    exposition::{Exemplar, Exposition, Type, label_pairs},
    histogram::Histogram,
};
use crate::{
    queue::syscalls,
    sample::{Architecture, ExactWait, ExactWaitKind, HookReport, TargetId, WorstWait},
};

/// Upper bounds of the buckets, seconds.
const BOUNDS: [f64; 16] = [
    1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 0.25, 1.0, 2.5,
    10.0,
];
/// Bound on the number of histograms, and on those of one service: a process can be made to block in any system call.
const MAX_SERIES: usize = 2_000;
/// See [`MAX_SERIES`]. Further system calls are counted together.
const MAX_SERIES_OF_TARGET: usize = 64;
/// The label of those.
const OTHER_CALLS: &str = "other";
/// Nanoseconds per second.
const SECOND: f64 = 1e9;
/// Until an exemplar is this old, seconds, only a longer wait replaces it. The scrape interval that the guide recommends.
const EXEMPLAR_KEPT_S: i64 = 15;
/// Characters of a thread's name in an exemplar, whose labels Prometheus limits to 128. A name has 15; escaped, it may have more.
const MAX_NAME_CHARS: usize = 32;

/// The state of the hooks, and the waits since the agent's start.
#[derive(Debug, Default)]
pub struct ExactWaits {
    /// `None`: the tier is glance.
    pub report: Option<HookReport>,
    of: BTreeMap<Series, Histogram>,
    /// Waits that did not fit.
    omitted: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Series {
    target: TargetId,
    kind: ExactWaitKind,
    /// The name of a system call; its number if it has none here.
    call: String,
}

impl ExactWaits {
    /// Adds what was measured since the last report, until this CLOCK_MONOTONIC and Unix time, ns. Services that are gone are
    /// forgotten.
    pub(super) fn add(
        &mut self,
        report: &HookReport,
        at: (u64, u64),
        architecture: Architecture,
        targets: &BTreeSet<TargetId>,
    ) {
        self.of.retain(|series, _| targets.contains(&series.target));
        for wait in &report.waits {
            let mut series = series(wait, architecture);
            let is_full = || self.of_target(wait.target) >= MAX_SERIES_OF_TARGET;
            if wait.call.is_some() && !self.of.contains_key(&series) && is_full() {
                OTHER_CALLS.clone_into(&mut series.call);
            }
            if !self.of.contains_key(&series) && self.of.len() >= MAX_SERIES {
                self.omitted = self.omitted.saturating_add(wait.distribution.count);
                continue;
            }
            let histogram = self.of.entry(series);
            let histogram = histogram.or_insert_with(|| Histogram::new(&BOUNDS));
            histogram.add(&wait.distribution);
            if let Some(worst) = &wait.worst {
                keep_longest(histogram, exemplar(worst, at));
            }
        }
        self.report = Some(HookReport {
            waits: Vec::new(),
            ..report.clone()
        });
    }

    /// Histograms of a service.
    fn of_target(&self, target: TargetId) -> usize {
        let first = Series {
            target,
            kind: ExactWaitKind::Woken,
            call: String::new(),
        };
        let from_first = self.of.range(first..);
        from_first
            .take_while(|(series, _)| series.target == target)
            .count()
    }

    /// All metrics of the hooks; none in the glance tier. `name` is that of a service.
    pub(super) fn render(&self, all: &mut Exposition, name: impl Fn(TargetId) -> Option<String>) {
        let Some(report) = &self.report else { return };
        let family = all.family(
            "tailback_run_queue_wait_seconds",
            Type::Histogram,
            "Time that runnable threads waited for a CPU, measured by hooks.",
        );
        for (series, histogram) in &self.of {
            let after = match series.kind {
                ExactWaitKind::Woken => "wakeup",
                ExactWaitKind::Preempted => "preemption",
                _ => continue,
            };
            if let Some(target) = name(series.target) {
                let labels = [("target", &*target), ("after", after)];
                family.add_histogram(&labels, histogram.exposed());
            }
        }
        let family = all.family(
            "tailback_blocked_seconds",
            Type::Histogram,
            "Time that threads were blocked in system calls, measured by hooks.",
        );
        for (series, histogram) in &self.of {
            let io = match series.kind {
                ExactWaitKind::Blocked => "false",
                ExactWaitKind::BlockedIo => "true",
                _ => continue,
            };
            if let Some(target) = name(series.target) {
                let labels = [("target", &*target), ("call", &series.call), ("io", io)];
                family.add_histogram(&labels, histogram.exposed());
            }
        }
        self.of_hooks(all, report);
    }

    fn of_hooks(&self, all: &mut Exposition, report: &HookReport) {
        let mut one = |name: &str, help: &str, value: f64| all.one(name, Type::Gauge, help, value);
        one(
            "tailback_hooks_attached",
            "1 while hooks are attached, else 0.",
            f64::from(u8::from(report.is_attached)),
        );
        one(
            "tailback_hooks_cpu_ratio",
            "CPU time of the hooks as a fraction of the machine's; 0 while they are not attached.",
            report.share,
        );
        one(
            "tailback_hooks_expected_cpu_ratio",
            "The fraction that the hooks are expected to take, attached or not.",
            report.expected_share,
        );
        one(
            "tailback_hooks_cpu_budget_ratio",
            "The fraction that the hooks may take.",
            report.budget,
        );
        let runs = "tailback_hook_runs_total";
        let family = all.family(runs, Type::Counter, "Runs of each hook.");
        for hook in &report.hooks {
            family.add(&[("hook", &hook.name)], hook.runs as f64);
        }
        let time = "tailback_hook_cpu_seconds_total";
        let family = all.family(time, Type::Counter, "CPU time of each hook.");
        for hook in &report.hooks {
            family.add(&[("hook", &hook.name)], hook.cpu_ns as f64 / SECOND);
        }
        let lost = "tailback_hook_lost_total";
        let family = all.family(lost, Type::Counter, "What the hooks did not measure.");
        for loss in &report.lost {
            family.add(&[("reason", &loss.reason)], loss.count as f64);
        }
        family.add(&[("reason", "too_many_series")], self.omitted as f64);
    }
}

/// The longest wait of an interval as an exemplar, with the thread that had the CPU or ended the wait. `at`: CLOCK_MONOTONIC and Unix
/// time, ns.
fn exemplar(worst: &WorstWait, (mono_ns, unix_ns): (u64, u64)) -> Exemplar {
    let mut labels = vec![("tid", worst.tid.to_string())];
    let shown = |comm: &str| comm.chars().take(MAX_NAME_CHARS).collect::<String>();
    if let Some(culprit) = &worst.culprit {
        let seconds = worst.culprit_ns as f64 / SECOND;
        labels.push(("culprit", shown(&culprit.comm)));
        labels.push(("culprit_tid", culprit.tid.to_string()));
        labels.push(("culprit_seconds", format!("{seconds:.6}")));
    } else if let Some(waker) = &worst.waker {
        labels.push(("waker", shown(&waker.comm)));
        labels.push(("waker_tid", waker.tid.to_string()));
    }
    let labels: Vec<(&str, &str)> = labels
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect();
    let at_ns = unix_ns
        .saturating_add(worst.mono_ns)
        .saturating_sub(mono_ns);
    Exemplar {
        label: label_pairs(&labels),
        value: worst.wait_ns as f64 / SECOND,
        timestamp: Some(Timestamp {
            seconds: i64::try_from(at_ns / 1_000_000_000).unwrap_or(i64::MAX),
            nanos: (at_ns % 1_000_000_000) as i32,
        }),
    }
}

/// Replaces the exemplar by a longer wait, or once it is old.
fn keep_longest(histogram: &mut Histogram, new: Exemplar) {
    let seconds = |of: &Exemplar| of.timestamp.map_or(0, |at| at.seconds);
    let is_kept = histogram.exemplar().is_some_and(|known| {
        let age_s = seconds(&new).saturating_sub(seconds(known));
        known.value >= new.value && age_s < EXEMPLAR_KEPT_S
    });
    if !is_kept {
        histogram.set_exemplar(Some(new));
    }
}

fn series(wait: &ExactWait, architecture: Architecture) -> Series {
    let call = wait.call.map(|number| {
        let name = syscalls::name(architecture, i32::from(number));
        name.map_or_else(|| number.to_string(), str::to_owned)
    });
    Series {
        target: wait.target,
        kind: wait.kind,
        call: call.unwrap_or_else(|| "none".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{Distribution, WaitParty};

    fn report(kind: ExactWaitKind, call: Option<u16>, waits: &[(u64, u64)]) -> HookReport {
        HookReport {
            waits: vec![ExactWait {
                target: 1,
                kind,
                call,
                distribution: Distribution {
                    count: waits.iter().map(|(_, count)| count).sum(),
                    total_ns: waits.iter().map(|(wait_ns, count)| wait_ns * count).sum(),
                    max_ns: 0,
                    waits: waits.to_vec(),
                },
                ..ExactWait::default()
            }],
            ..HookReport::default()
        }
    }

    #[test]
    fn waits_add_up_over_the_reports_until_the_service_is_gone() {
        let mut exact = ExactWaits::default();
        let architecture = Architecture::X86_64;
        for waits in [&[(20_000, 3)][..], &[(3_000_000, 1), (20_000_000_000, 1)]] {
            let report = report(ExactWaitKind::Woken, None, waits);
            exact.add(&report, (0, 0), architecture, &[1].into());
        }
        let render = |exact: &ExactWaits| {
            let mut all = Exposition::default();
            exact.render(&mut all, |_| Some("shop".to_owned()));
            all.text()
        };
        let text = render(&exact);
        let labels = "target=\"shop\",after=\"wakeup\"";
        for line in [
            format!("tailback_run_queue_wait_seconds_bucket{{{labels},le=\"0.000025\"}} 3"),
            format!("tailback_run_queue_wait_seconds_bucket{{{labels},le=\"0.005\"}} 4"),
            format!("tailback_run_queue_wait_seconds_count{{{labels}}} 5"),
        ] {
            assert!(text.lines().any(|it| it == line), "{line} in {text}");
        }
        let blocked = report(ExactWaitKind::BlockedIo, Some(0), &[(1_000, 1)]);
        exact.add(&blocked, (0, 0), architecture, &[1].into());
        let line = "tailback_blocked_seconds_count{target=\"shop\",call=\"read\",io=\"true\"} 1";
        assert!(render(&exact).contains(line), "{}", render(&exact));
        let none = BTreeSet::new();
        exact.add(&HookReport::default(), (0, 0), architecture, &none);
        assert!(!render(&exact).contains("shop"), "{}", render(&exact));
    }

    #[test]
    fn a_service_that_blocks_in_many_calls_leaves_room_for_others() {
        let mut exact = ExactWaits::default();
        let architecture = Architecture::X86_64;
        for call in 0..500 {
            let report = report(ExactWaitKind::Blocked, Some(call), &[(1_000, 1)]);
            exact.add(&report, (0, 0), architecture, &[1].into());
        }
        assert_eq!(exact.of_target(1), MAX_SERIES_OF_TARGET + 1);
        let mut all = Exposition::default();
        exact.render(&mut all, |_| Some("shop".to_owned()));
        let text = all.text();
        let others = 500 - MAX_SERIES_OF_TARGET;
        let line = format!(
            "tailback_blocked_seconds_count{{target=\"shop\",call=\"other\",io=\"false\"}} {others}"
        );
        assert!(text.contains(&line), "{text}");
        assert_eq!(exact.omitted, 0);
    }

    #[test]
    fn without_hooks_there_is_no_metric() {
        let mut all = Exposition::default();
        ExactWaits::default().render(&mut all, |_| None);
        assert_eq!(all.text(), "");
    }

    #[test]
    fn the_longest_wait_of_late_is_kept_with_its_culprit_within_the_limit_of_prometheus() {
        let second = 1_000_000_000;
        let worst = |at_s: u64, wait_ns: u64| WorstWait {
            wait_ns,
            mono_ns: at_s * second,
            tid: u32::MAX,
            culprit: Some(WaitParty {
                tgid: u32::MAX,
                tid: u32::MAX,
                comm: "\\x1b".repeat(15),
            }),
            culprit_ns: u64::MAX,
            ..WorstWait::default()
        };
        let mut histogram = Histogram::new(&BOUNDS);
        let mut longest_after = |at_s, wait_ns| {
            // The Unix time is 1,000 s ahead of CLOCK_MONOTONIC; the report comes half a second after the wait.
            let at = (
                at_s * second + second / 2,
                (1_000 + at_s) * second + second / 2,
            );
            keep_longest(&mut histogram, exemplar(&worst(at_s, wait_ns), at));
            let exemplar = histogram.exemplar().unwrap();
            (exemplar.timestamp.unwrap().seconds, exemplar.value)
        };
        assert_eq!(longest_after(1, 5_000_000), (1_001, 0.005));
        assert_eq!(longest_after(2, 4_000_000), (1_001, 0.005), "shorter");
        assert_eq!(longest_after(3, 6_000_000), (1_003, 0.006));
        assert_eq!(longest_after(18, 1_000_000), (1_018, 0.001), "old");
        let labels = &histogram.exemplar().unwrap().label;
        let chars = labels
            .iter()
            .map(|label| label.name.len() + label.value.chars().count());
        assert!(chars.sum::<usize>() <= 128, "{labels:?}");
        assert_eq!(labels[1].name, "culprit");
    }
}
