//! Run queues: runnable threads of a target that wait for a CPU, and who uses the CPU meanwhile ([`Starvation`]).

use std::collections::{BTreeMap, BTreeSet};

use rustc_hash::FxHashMap;

use super::{
    Hidden, Kind, QueueId, Reading, Sink, Source, Targets, UTILIZATION,
    starvation::{Starvation, ThreadTime},
};
use crate::{
    ewma::Ewma,
    sample::{Sample, TargetId, Thread},
};

/// A target that used a smaller share of a core was idle.
const MIN_WORKING_SHARE: f64 = 0.001;
/// Time constant of that share, ns.
const WORKING_TIME_CONSTANT_NS: f64 = 1e9;

#[derive(Default)]
pub(super) struct RunQueues {
    threads: FxHashMap<(u32, u32), Known>,
    starvation: Starvation,
    /// CPU seconds per second that each target uses.
    cpus_used: BTreeMap<TargetId, Ewma>,
}

/// State kept per thread.
struct Known {
    run_delay_ns: u64,
    dispatches: u64,
    cpu_ns: u64,
    seen_ns: u64,
    /// Start of the current wait: since then it has been runnable at each sample and has not been dispatched.
    waiting_since_ns: Option<u64>,
}

/// All threads of one target.
#[derive(Default)]
struct Group {
    threads: u64,
    waiting: u64,
    delay_ns: u64,
    cpu_ns: u64,
    dispatches: u64,
    elapsed_ns: Option<u64>,
    oldest_age_ns: Option<u64>,
}

impl Source for RunQueues {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if !sample.scans.threads {
            self.starvation.read(sample, targets);
            return;
        }
        let mut groups: BTreeMap<TargetId, Group> = BTreeMap::new();
        let mut known = FxHashMap::default();
        known.reserve(sample.threads.len());
        for thread in &sample.threads {
            let Some(target) = targets.of(thread.tgid) else {
                continue;
            };
            let before = self.threads.get(&(thread.tgid, thread.tid));
            let now = groups
                .entry(target)
                .or_default()
                .add(thread, before, sample.mono_ns);
            known.insert((thread.tgid, thread.tid), now);
        }
        self.threads = known;
        for (target, group) in &groups {
            let time = ThreadTime {
                delay_ns: group.delay_ns,
                cpu_ns: group.cpu_ns,
            };
            self.starvation.grew(*target, time);
        }
        self.starvation.read(sample, targets);
        sink.working = Some(self.working(&groups));
        for (target, group) in groups {
            let cpus = targets.get(target).map_or(1, |target| target.cpus.max(1));
            let mut reading = group.reading(cpus);
            self.starvation.report(target, sample.mono_ns, &mut reading);
            let used = group.cpus_used();
            let share = used
                .zip(self.starvation.usable_cpus(target, cpus))
                .map(|(used, usable)| (UTILIZATION, (used / usable).min(1.0)));
            reading.extra.extend(share);
            sink.put(target, Kind::Runqueue, &QueueId::Threads, reading);
        }
        sink.forget_unseen(Kind::Runqueue);
    }
}

impl RunQueues {
    /// Adds the CPU time that each target used since the previous scan. Returns the targets that are not idle.
    fn working(&mut self, groups: &BTreeMap<TargetId, Group>) -> BTreeSet<TargetId> {
        self.cpus_used
            .retain(|target, _| groups.contains_key(target));
        for (target, group) in groups {
            if let Some((used, elapsed_ns)) = group.cpus_used().zip(group.elapsed_ns) {
                let mean = self.cpus_used.entry(*target);
                mean.or_insert_with(|| Ewma::mean_of(0, 0.0, WORKING_TIME_CONSTANT_NS))
                    .update(used, elapsed_ns);
            }
        }
        let used = self.cpus_used.iter();
        let working = used.filter(|(_, used)| used.value() >= MIN_WORKING_SHARE);
        working.map(|(target, _)| *target).collect()
    }
}

impl Group {
    fn add(&mut self, thread: &Thread, before: Option<&Known>, now_ns: u64) -> Known {
        let waits = thread.runnable && !thread.on_cpu;
        self.threads += 1;
        self.waiting += u64::from(waits);
        let mut waiting_since_ns = waits.then_some(now_ns);
        if let Some(before) = before {
            let dispatched = thread.dispatches.saturating_sub(before.dispatches);
            // The kernel adds a wait to the sum only when it ends.
            let delay_ns = thread.run_delay_ns.saturating_sub(before.run_delay_ns);
            self.delay_ns = self.delay_ns.saturating_add(delay_ns);
            let cpu_ns = thread.cpu_ns.saturating_sub(before.cpu_ns);
            self.cpu_ns = self.cpu_ns.saturating_add(cpu_ns);
            self.dispatches = self.dispatches.saturating_add(dispatched);
            self.elapsed_ns = self
                .elapsed_ns
                .max(Some(now_ns.saturating_sub(before.seen_ns)));
            if waits && dispatched == 0 {
                waiting_since_ns = before.waiting_since_ns.or(waiting_since_ns);
            }
        }
        if let Some(since) = waiting_since_ns {
            self.oldest_age_ns = self.oldest_age_ns.max(Some(now_ns.saturating_sub(since)));
        }
        Known {
            run_delay_ns: thread.run_delay_ns,
            dispatches: thread.dispatches,
            cpu_ns: thread.cpu_ns,
            seen_ns: now_ns,
            waiting_since_ns,
        }
    }

    /// CPU seconds used per second.
    fn cpus_used(&self) -> Option<f64> {
        let elapsed_ns = self.elapsed_ns.filter(|elapsed| *elapsed > 0)?;
        Some(self.cpu_ns as f64 / elapsed_ns as f64)
    }

    fn reading(&self, cpus: u32) -> Reading {
        let known = self.elapsed_ns.is_some();
        let mut extra = vec![
            ("threads", self.threads as f64),
            (
                "runnable_share",
                self.waiting as f64 / self.threads.max(1) as f64,
            ),
        ];
        if let Some(elapsed) = self.elapsed_ns.filter(|elapsed| *elapsed > 0) {
            extra.push(("run_delay_per_s", self.delay_ns as f64 / elapsed as f64));
        }
        Reading {
            depth: self.waiting,
            limit: Some(u64::from(cpus)),
            // A batch job normally has more threads than CPUs. Only their wait counts.
            unit: None,
            fill: None,
            full: false,
            arrivals: known.then_some(self.dispatches),
            departures: known.then_some(self.dispatches),
            hidden: Hidden::Nothing,
            unseen_at_most: 0,
            elapsed_ns: self.elapsed_ns,
            served: known.then_some(self.dispatches),
            servers: cpus,
            wait_ns: known.then(|| self.delay_ns.checked_div(self.dispatches).unwrap_or(0)),
            oldest_age_ns: self.oldest_age_ns,
            ages_ns: Vec::new(),
            no_consumers_ns: None,
            losses: 0,
            worst: None,
            extra,
        }
    }
}
