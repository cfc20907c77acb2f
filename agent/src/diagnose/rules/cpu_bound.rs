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
    diagnose::case::Case,
    event::{Activity, DrivenBy, explain::Unit},
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::CpuBound,
    suggested_by: &[Activity::OnCpu, Activity::RunnableOwn],
    supported_by: &[Activity::OnCpu, Activity::RunnableOwn],
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
