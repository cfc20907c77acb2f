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
    diagnose::{
        case::Case, classify::Thread, jvm_counters::Collecting, profile::ThreadProfile,
        thread_names, words,
    },
    event::{Activity, Confidence, Culprit, CulpritKind, DrivenBy, explain::Unit},
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::CpuBound,
    suggested_by: &[Activity::OnCpu, Activity::RunnableOwn],
    supported_by: &[Activity::OnCpu, Activity::RunnableOwn],
};

/// The garbage collector of the service's runtime has the CPU, and all its other threads are stopped meanwhile.
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
        let counted = case.inputs.collecting(collector.0, case.time());
        let counted = counted.map(|counted| Counted::of(counted, share));
        let at_most = counted.as_ref().map(|counted| counted.time.at_most);
        checks.context(
            "time in collections, by the JVM's own counters, at most",
            at_most,
            Unit::Ratio,
        );
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
                let fact = format!(
                    "the garbage collector needs a CPU {} of the time, and nothing else in the service runs meanwhile",
                    words::percent(share)
                );
                let is_contradicted = counted
                    .as_ref()
                    .is_some_and(|counted| counted.agrees == Agreement::Contradicts);
                let finding = Finding::blaming(culprit, |who| {
                    if is_contradicted {
                        format!(
                            "{who} is busy while all other threads are stopped, but the JVM's own counters show little garbage collection: check for heap dumps and thread dumps (jcmd, jmap, a monitoring agent); -Xlog:safepoint shows why threads are stopped. More CPUs or threads do not help."
                        )
                    } else {
                        format!(
                            "{who} collects garbage, and all other threads are stopped meanwhile: the heap is nearly full. Enlarge it (-Xmx) if there is memory, find what fills it (jcmd PID GC.class_histogram), or allocate less; more CPUs or threads do not help."
                        )
                    }
                })
                .share(share);
                match &counted {
                    None => finding.fact(fact),
                    Some(counted) => finding
                        .fact(format!("{fact}; {}", counted.words()))
                        .at_most(counted.max_confidence()),
                }
            })
    },
};

/// What the JVM's own counters say about the share that was sampled.
struct Counted {
    time: Collecting,
    agrees: Agreement,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Agreement {
    Supports,
    /// A garbage collection was in progress when the counters were read, and may account for most of the time.
    Open,
    Contradicts,
}

impl Counted {
    fn of(time: Collecting, sampled: f64) -> Self {
        /// Collections may take less time than their threads need a CPU: these also do what is left after a collection, and the
        /// counters cover another part of the time.
        const MIN_OF_SAMPLED: f64 = 0.5;
        let least = sampled * MIN_OF_SAMPLED;
        let agrees = if time.at_most < least {
            Agreement::Contradicts
        } else if time.at_least >= least {
            Agreement::Supports
        } else {
            Agreement::Open
        };
        Self { time, agrees }
    }

    fn max_confidence(&self) -> Confidence {
        match self.agrees {
            Agreement::Supports | Agreement::Open => Confidence::High,
            // All threads may be stopped for something else: a heap dump, a thread dump, a deoptimization.
            Agreement::Contradicts => Confidence::Low,
        }
    }

    fn words(&self) -> String {
        /// Collections that ended take at least this share of the time, or the counters show nothing yet.
        const MIN_SHOWN: f64 = 0.01;
        if self.agrees == Agreement::Open && self.time.at_least < MIN_SHOWN {
            return "a collection was in progress when the JVM's own counters were read, and they do not count it yet".to_owned();
        }
        let [least, most, stopped] =
            [self.time.at_least, self.time.at_most, self.time.stopped].map(words::percent);
        let range = if least == most {
            most.clone()
        } else {
            format!("{least} to {most}")
        };
        let collections = match self.agrees {
            Agreement::Supports => {
                format!("the JVM's own counters agree: it was in collections {range} of the time")
            }
            Agreement::Open => format!(
                "by the JVM's own counters it was in collections {range} of the time, as one was in progress when they were read"
            ),
            Agreement::Contradicts => format!(
                "the JVM's own counters contradict this: it was in collections at most {most} of the time"
            ),
        };
        format!("{collections}, and all its threads were stopped for at least {stopped}")
    }
}

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
