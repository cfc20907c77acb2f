//! The exact waits of threads in the report, with the estimate from samples beside them.

use std::collections::BTreeMap;

use crate::{
    queue::syscalls,
    sample::{
        Architecture, Distribution, ExactWait, ExactWaitKind, HookReport, Sample, Target, TargetId,
        WaitParty, WorstWait,
    },
    text::{bounded, count, duration},
};

/// Kinds of waits that are kept. The hooks have no more histograms at a time; those of processes that exit add up.
const MAX_KEYS: usize = 4_096;
/// Calls per service in the report.
const MAX_CALLS: usize = 8;
/// Longest path of a file in a row, in bytes.
const MAX_PATH_BYTES: usize = 60;

/// What the hooks have measured, added up.
#[derive(Default)]
pub(super) struct ExactWaits {
    waits: BTreeMap<Key, ExactWait>,
    /// Kinds of waits that did not fit.
    dropped: u64,
    covered_ns: u64,
    last: Option<HookReport>,
    architecture: Architecture,
    /// Run delay and dispatches of each thread in the last sample, and their growth by process while hooks were attached.
    threads: BTreeMap<(u32, u32), (u64, u64)>,
    estimate: BTreeMap<u32, (u64, u64)>,
}

type Key = (TargetId, u32, ExactWaitKind, Option<u16>, Option<u64>);

impl ExactWaits {
    /// Adds a sample.
    pub(super) fn observe(&mut self, sample: &Sample) {
        self.architecture = sample.architecture;
        if let Some(report) = &sample.hooks {
            self.covered_ns = self.covered_ns.saturating_add(report.interval_ns);
            for wait in &report.waits {
                self.add(wait);
            }
            self.last = Some(HookReport {
                waits: Vec::new(),
                ..report.clone()
            });
        }
        let is_attached = self.last.as_ref().is_some_and(|last| last.is_attached);
        if sample.scans.threads && is_attached {
            self.estimate(sample);
        }
    }

    fn add(&mut self, wait: &ExactWait) {
        let key = (wait.target, wait.tgid, wait.kind, wait.call, wait.object);
        if let Some(known) = self.waits.get_mut(&key) {
            known.distribution.add(&wait.distribution);
            known.path = wait.path.clone().or(known.path.take());
            let wait_ns = |worst: &Option<WorstWait>| worst.as_ref().map(|worst| worst.wait_ns);
            if wait_ns(&known.worst) < wait_ns(&wait.worst) {
                known.worst.clone_from(&wait.worst);
            }
        } else if self.waits.len() < MAX_KEYS {
            self.waits.insert(key, wait.clone());
        } else {
            self.dropped += 1;
        }
    }

    /// Adds up what the kernel accounts to each thread anyway.
    fn estimate(&mut self, sample: &Sample) {
        let now = sample.threads.iter();
        let now: BTreeMap<_, _> = now
            .map(|thread| {
                let id = (thread.tgid, thread.tid);
                (id, (thread.run_delay_ns, thread.dispatches))
            })
            .collect();
        for (id, (delay_ns, dispatches)) in &now {
            if let Some((delay_before_ns, before)) = self.threads.get(id) {
                let sum = self.estimate.entry(id.0).or_default();
                sum.0 = sum
                    .0
                    .saturating_add(delay_ns.saturating_sub(*delay_before_ns));
                sum.1 = sum.1.saturating_add(dispatches.saturating_sub(*before));
            }
        }
        self.threads = now;
    }

    /// The state of the hooks; nothing if they were not requested.
    pub(super) fn summary(&self) -> Option<String> {
        let last = self.last.as_ref()?;
        if self.covered_ns == 0 {
            return Some(format!("Hooks were not attached: {}.", last.reason));
        }
        let mut text = format!("Hooks measured for {}", duration(self.covered_ns));
        if last.is_attached {
            text += &format!(
                ", and took {:.2}% of the machine's CPU time (budget {:.2}%)",
                last.share * 100.0,
                last.budget * 100.0
            );
        } else {
            text += &format!("; they are detached now: {}", last.reason);
        }
        let lost = last.lost.iter().filter(|loss| loss.count > 0);
        let lost: Vec<String> = lost
            .map(|loss| format!("{} {}", count(loss.count), loss.reason.replace('_', " ")))
            .collect();
        if !lost.is_empty() {
            text += &format!("; not measured: {}", lost.join(", "));
        }
        if self.dropped > 0 {
            text += &format!(
                "; {} kinds of waits beyond the limit of the report",
                count(self.dropped)
            );
        }
        Some(text + ".")
    }

    /// All waits, with the name of the system call.
    pub(super) fn all(&self) -> impl Iterator<Item = (&ExactWait, String)> {
        self.waits.values().map(|wait| {
            let call = wait.call.map(|number| call_name(self.architecture, number));
            (wait, call.unwrap_or_else(|| "none".to_owned()))
        })
    }

    /// Label and text of each row about a target; none if nothing was measured.
    pub(super) fn rows(&self, target: &Target) -> Vec<(&'static str, String)> {
        let of_target = self.waits.values().filter(|wait| wait.target == target.id);
        let (for_cpu, blocked): (Vec<&ExactWait>, Vec<&ExactWait>) =
            of_target.partition(|wait| is_for_cpu(wait.kind));
        let mut rows = self.cpu_rows(target, &for_cpu);
        rows.extend(self.blocked_rows(&blocked));
        rows
    }

    fn cpu_rows(&self, target: &Target, waits: &[&ExactWait]) -> Vec<(&'static str, String)> {
        let sum = |is: &dyn Fn(ExactWaitKind) -> bool| {
            let mut sum = Distribution::default();
            for wait in waits.iter().filter(|wait| is(wait.kind)) {
                sum.add(&wait.distribution);
            }
            sum
        };
        let all = sum(&|_| true);
        if all.count == 0 {
            return Vec::new();
        }
        let of_target = target
            .tgids
            .iter()
            .filter_map(|tgid| self.estimate.get(tgid));
        let (delay_ns, dispatches) = of_target.fold((0_u64, 0_u64), |sum, of_process| {
            (
                sum.0.saturating_add(of_process.0),
                sum.1.saturating_add(of_process.1),
            )
        });
        let estimate = delay_ns
            .checked_div(dispatches)
            .map_or_else(String::new, |mean_ns| {
                format!(" (estimate from samples: mean {})", duration(mean_ns))
            });
        let mut rows = vec![("CPU wait", format!("{}{estimate}", words(&all)))];
        for (kind, when) in [
            (ExactWaitKind::Woken, "after wake-ups"),
            (ExactWaitKind::Preempted, "after preemption"),
        ] {
            let part = sum(&|of| of == kind);
            if part.count > 0 {
                rows.push(("", format!("{when}: {}", words(&part))));
            }
        }
        let worst = waits.iter().filter_map(|wait| wait.worst.as_ref());
        if let Some(worst) = worst.max_by_key(|worst| worst.wait_ns) {
            rows.push(("", longest(worst)));
        }
        rows
    }

    fn blocked_rows(&self, waits: &[&ExactWait]) -> Vec<(&'static str, String)> {
        let mut waits = waits.to_vec();
        waits.sort_by_key(|wait| std::cmp::Reverse(wait.distribution.total_ns));
        let shown = waits.iter().take(MAX_CALLS).enumerate();
        let mut rows: Vec<(&'static str, String)> = shown
            .map(|(index, wait)| {
                let label = if index == 0 { "blocked" } else { "" };
                let total = duration(wait.distribution.total_ns);
                let what = self.object_of(wait);
                // Not `woken by`: the wake-up may have been passed to the CPU that this thread was running on.
                let waker = wait.worst.as_ref().and_then(|worst| worst.waker.as_ref());
                let woken = waker.map_or_else(String::new, |waker| {
                    format!(", woken while {} was running", party(waker))
                });
                (
                    label,
                    format!("{what}: {total} in {}{woken}", words(&wait.distribution)),
                )
            })
            .collect();
        if let more @ 1.. = waits.len().saturating_sub(MAX_CALLS) {
            rows.push(("", format!("… and {more} more")));
        }
        rows
    }

    /// `read fd 7 (/var/log/db)`, `futex 0x7f00c0de`.
    fn object_of(&self, wait: &ExactWait) -> String {
        let call = match wait.call {
            Some(number) => call_name(self.architecture, number),
            None => "no system call".to_owned(),
        };
        let io = match wait.kind {
            ExactWaitKind::BlockedIo => " (I/O)",
            _ => "",
        };
        let object = match (wait.object, &wait.path) {
            (None, None) => String::new(),
            (Some(address), None) if call == "futex" => format!(" {address:#x}"),
            (Some(fd), None) => format!(" fd {fd}"),
            (fd, Some(path)) => {
                let fd = fd.unwrap_or(0);
                format!(" fd {fd} ({})", bounded(path, MAX_PATH_BYTES))
            }
        };
        format!("{call}{object}{io}")
    }
}

/// The name of a system call.
fn call_name(architecture: Architecture, number: u16) -> String {
    let name = syscalls::name(architecture, i32::from(number));
    name.map_or_else(|| format!("system call {number}"), str::to_owned)
}

fn is_for_cpu(kind: ExactWaitKind) -> bool {
    matches!(kind, ExactWaitKind::Woken | ExactWaitKind::Preempted)
}

/// `1,204 waits, mean 1.2ms, p50 …, p99 …, longest …`.
fn words(waits: &Distribution) -> String {
    let time = |ns: Option<u64>| ns.map_or_else(|| "-".to_owned(), duration);
    format!(
        "{} {}, mean {}, p50 {}, p99 {}, longest {}",
        count(waits.count),
        if waits.count == 1 { "wait" } else { "waits" },
        time(waits.mean_ns()),
        time(waits.quantile_ns(0.5)),
        time(waits.quantile_ns(0.99)),
        duration(waits.max_ns),
    )
}

/// Who had the CPU during the longest wait for it.
fn longest(worst: &WorstWait) -> String {
    let waited = format!(
        "longest: thread {} waited {} for CPU {}",
        worst.tid,
        duration(worst.wait_ns),
        worst.cpu
    );
    match &worst.culprit {
        Some(culprit) => format!(
            "{waited}, which {} had until then, for {} of that time",
            party(culprit),
            duration(worst.culprit_ns)
        ),
        None => format!("{waited}, which was idle until then"),
    }
}

fn party(party: &WaitParty) -> String {
    let name = match party.comm.as_str() {
        "" => "thread",
        name => name,
    };
    format!("{name} ({})", party.tid)
}
