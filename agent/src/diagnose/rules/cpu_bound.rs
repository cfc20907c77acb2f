//! The service computes, and has the CPU to do so.

use super::{
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{
        capacity::Capacity,
        cpu::{self, CpuTime},
    },
};
use crate::{
    cause::Cause,
    diagnose::{case::Case, classify::Thread, profile::ThreadProfile, thread_names, words},
    event::{Activity, Culprit, CulpritKind, DrivenBy, explain::Unit},
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::CpuBound,
    suggested_by: &[Activity::OnCpu, Activity::RunnableOwn],
    supported_by: &[Activity::OnCpu, Activity::RunnableOwn],
};

/// The collector of the service's runtime has the CPU, and all its other threads are stopped meanwhile.
pub(super) const COLLECTING: Rule = Rule {
    cause: &CAUSE,
    name: "busy collecting garbage",
    scope: Scope::Served,
    basis: Basis::Time,
    test: |case, checks| {
        /// For more than half of the time that work waits, nothing else of the service can run. A queue that fills in pauses and
        /// drains between them is empty for the rest of the time.
        const MIN_COLLECTING: f64 = 0.5;
        /// But at least this share of all time: three times what HotSpot's collectors aim at at most (G1: GCTimeRatio=12, 8%).
        const MIN_OF_ALL: f64 = 0.25;
        let least = (MIN_COLLECTING * (1.0 - case.episode.empty_share)).max(MIN_OF_ALL);
        let Some((collector, share)) = busiest_collector(case) else {
            checks.unknown(
                "time of a collector on a CPU or waiting for one",
                Unit::Ratio,
            );
            return None;
        };
        checks
            .more_than(
                "time of a collector on a CPU or waiting for one",
                share,
                least,
                Unit::Ratio,
            )
            .then(|| {
                let culprit = Culprit {
                    target: Some(case.target()),
                    pid: Some(collector.0),
                    ..Culprit::named(CulpritKind::Thread, words::thread(case, collector))
                };
                Finding::blaming(culprit, |who| {
                    format!(
                        "{who} collects garbage, and all other threads are stopped meanwhile: the heap is nearly full. Enlarge it (-Xmx) if there is memory, find what fills it (jcmd PID GC.class_histogram), or allocate less; more CPUs or threads do not help."
                    )
                })
                .share(share)
                .fact(format!(
                    "the garbage collector needs a CPU {} of the time, and nothing else in the service runs meanwhile",
                    words::percent(share)
                ))
            })
    },
};

/// The collecting thread that needs a CPU for most of the time, and the share.
fn busiest_collector(case: Case<'_>) -> Option<(Thread, f64)> {
    let tgids = &case.view.targets.get(case.target())?.tgids;
    let needs_cpu = |profile: &ThreadProfile| -> f64 {
        let needed = [Activity::OnCpu, Activity::RunnableOwn].into_iter();
        needed.map(|activity| profile.share_of(activity)).sum()
    };
    let collectors = tgids.iter().flat_map(|tgid| {
        let threads = || case.view.window.of_process(*tgid);
        let names = threads().filter_map(|(thread, _)| case.view.profile.comm(thread));
        let names: Vec<&str> = names.collect();
        threads().filter(move |(thread, _)| {
            let name = case.view.profile.comm(*thread).unwrap_or_default();
            thread_names::is_collector(name, &names)
        })
    });
    collectors
        .map(|(thread, profile)| (thread, needs_cpu(profile)))
        .max_by(|a, b| a.1.total_cmp(&b.1))
}

/// The worker of a listening socket that fills has the CPU and accepts, while the sockets of other workers are empty.
pub(super) const ONE_WORKER: Rule = Rule {
    cause: &CAUSE,
    name: "one of several workers is busy computing",
    scope: Scope::MainActivity(&[Activity::OnCpu, Activity::RunnableOwn]),
    basis: Basis::Time,
    test: |case, checks| {
        checks
            .is(
                "a listening socket fills while others are empty",
                case.uneven_workers().is_some(),
                true,
            )
            .then(|| {
                Finding::blaming(cpu::busiest(case), |who| {
                    format!(
                        "{who} computes all the time while other workers are idle: the kernel assigns connections to listening sockets by a hash of their addresses, so few or long-lived connections spread unevenly. Let all workers accept from one socket, without SO_REUSEPORT, or close long-lived connections now and then. More CPUs and a longer backlog do not help."
                    )
                })
                .share(CpuTime::of(case).needed)
            })
    },
};

/// Threads mainly need the CPU, and no earlier rule found anything that keeps it from them.
pub(super) const BUSY: Rule = Rule {
    cause: &CAUSE,
    name: "busy computing",
    scope: Scope::Cpu,
    basis: Basis::Time,
    test: |case, checks| {
        let needed = CpuTime::of(case).needed;
        checks.context("time using or wanting a CPU", Some(needed), Unit::Ratio);
        Some(Finding::blaming(cpu::busiest(case), |who| advice(case, who)).share(needed))
    },
};

fn advice(case: Case<'_>, who: &str) -> String {
    let more = Capacity::of(case)
        .filter(|_| case.episode.driven_by == DrivenBy::Producer)
        .map_or_else(String::new, |capacity| format!(" {}.", capacity.words()));
    format!(
        "{who} computes all the time: profile it (perf top -p PID), or give the service more CPUs; more threads alone do not help.{more}"
    )
}
