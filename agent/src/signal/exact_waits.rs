//! Exact waits of threads as histograms for metrics, and what the hooks that measure them cost.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use super::metrics::{escaped, head};
use crate::{
    queue::syscalls,
    sample::{Architecture, Distribution, ExactWait, ExactWaitKind, HookReport, TargetId},
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

#[derive(Debug, Default)]
struct Histogram {
    /// Waits per bucket; the last one is beyond all bounds.
    counts: [u64; BOUNDS.len() + 1],
    sum_s: f64,
}

impl ExactWaits {
    /// Adds what was measured since the last report. Services that are gone are forgotten.
    pub(super) fn add(
        &mut self,
        report: &HookReport,
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
            if let Some(known) = self.of.get_mut(&series) {
                known.add(&wait.distribution);
            } else if self.of.len() < MAX_SERIES {
                let mut histogram = Histogram::default();
                histogram.add(&wait.distribution);
                self.of.insert(series, histogram);
            } else {
                self.omitted = self.omitted.saturating_add(wait.distribution.count);
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
    pub(super) fn render(&self, text: &mut String, name: impl Fn(TargetId) -> Option<String>) {
        let Some(report) = &self.report else { return };
        const CPU: &str = "tailback_run_queue_wait_seconds";
        head(
            text,
            CPU,
            "histogram",
            "Time that runnable threads waited for a CPU, measured by hooks.",
        );
        for (series, histogram) in &self.of {
            let after = match series.kind {
                ExactWaitKind::Woken => "wakeup",
                ExactWaitKind::Preempted => "preemption",
                _ => continue,
            };
            if let Some(target) = name(series.target) {
                let labels = format!("target=\"{}\",after=\"{after}\"", escaped(&target));
                histogram.render(text, CPU, &labels);
            }
        }
        const BLOCKED: &str = "tailback_blocked_seconds";
        head(
            text,
            BLOCKED,
            "histogram",
            "Time that threads were blocked in system calls, measured by hooks.",
        );
        for (series, histogram) in &self.of {
            let io = match series.kind {
                ExactWaitKind::Blocked => "false",
                ExactWaitKind::BlockedIo => "true",
                _ => continue,
            };
            if let Some(target) = name(series.target) {
                let (target, call) = (escaped(&target), escaped(&series.call));
                let labels = format!("target=\"{target}\",call=\"{call}\",io=\"{io}\"");
                histogram.render(text, BLOCKED, &labels);
            }
        }
        self.of_hooks(text, report);
    }

    fn of_hooks(&self, text: &mut String, report: &HookReport) {
        let mut one = |name: &str, help: &str, value: f64| {
            head(text, name, "gauge", help);
            let _ = writeln!(text, "{name} {value}");
        };
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
        const RUNS: &str = "tailback_hook_runs_total";
        head(text, RUNS, "counter", "Runs of each hook.");
        for hook in &report.hooks {
            let _ = writeln!(
                text,
                "{RUNS}{{hook=\"{}\"}} {}",
                escaped(&hook.name),
                hook.runs
            );
        }
        const TIME: &str = "tailback_hook_cpu_seconds_total";
        head(text, TIME, "counter", "CPU time of each hook.");
        for hook in &report.hooks {
            let seconds = hook.cpu_ns as f64 / SECOND;
            let _ = writeln!(text, "{TIME}{{hook=\"{}\"}} {seconds}", escaped(&hook.name));
        }
        const LOST: &str = "tailback_hook_lost_total";
        head(text, LOST, "counter", "What the hooks did not measure.");
        for loss in &report.lost {
            let _ = writeln!(
                text,
                "{LOST}{{reason=\"{}\"}} {}",
                escaped(&loss.reason),
                loss.count
            );
        }
        let _ = writeln!(
            text,
            "{LOST}{{reason=\"too_many_series\"}} {}",
            self.omitted
        );
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

impl Histogram {
    fn add(&mut self, waits: &Distribution) {
        for (wait_ns, count) in &waits.waits {
            let seconds = *wait_ns as f64 / SECOND;
            let bucket = BOUNDS.iter().position(|bound| seconds <= *bound);
            let sum = &mut self.counts[bucket.unwrap_or(BOUNDS.len())];
            *sum = sum.saturating_add(*count);
        }
        self.sum_s += waits.total_ns as f64 / SECOND;
    }

    fn render(&self, text: &mut String, name: &str, labels: &str) {
        let mut all = 0;
        let bounds = BOUNDS.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (bound, count) in bounds.zip(self.counts) {
            all = count.saturating_add(all);
            let _ = writeln!(text, "{name}_bucket{{{labels},le=\"{bound}\"}} {all}");
        }
        let _ = writeln!(text, "{name}_sum{{{labels}}} {}", self.sum_s);
        let _ = writeln!(text, "{name}_count{{{labels}}} {all}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            exact.add(&report, architecture, &[1].into());
        }
        let render = |exact: &ExactWaits| {
            let mut text = String::new();
            exact.render(&mut text, |_| Some("shop".to_owned()));
            text
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
        exact.add(&blocked, architecture, &[1].into());
        let line = "tailback_blocked_seconds_count{target=\"shop\",call=\"read\",io=\"true\"} 1";
        assert!(render(&exact).contains(line), "{}", render(&exact));
        exact.add(&HookReport::default(), architecture, &BTreeSet::new());
        assert!(!render(&exact).contains("shop"), "{}", render(&exact));
    }

    #[test]
    fn a_service_that_blocks_in_many_calls_leaves_room_for_others() {
        let mut exact = ExactWaits::default();
        let architecture = Architecture::X86_64;
        for call in 0..500 {
            let report = report(ExactWaitKind::Blocked, Some(call), &[(1_000, 1)]);
            exact.add(&report, architecture, &[1].into());
        }
        assert_eq!(exact.of_target(1), MAX_SERIES_OF_TARGET + 1);
        let mut text = String::new();
        exact.render(&mut text, |_| Some("shop".to_owned()));
        let others = 500 - MAX_SERIES_OF_TARGET;
        let line = format!(
            "tailback_blocked_seconds_count{{target=\"shop\",call=\"other\",io=\"false\"}} {others}"
        );
        assert!(text.contains(&line), "{text}");
        assert_eq!(exact.omitted, 0);
    }

    #[test]
    fn without_hooks_there_is_no_metric() {
        let mut text = String::new();
        ExactWaits::default().render(&mut text, |_| None);
        assert_eq!(text, "");
    }
}
