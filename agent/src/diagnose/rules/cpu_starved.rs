//! Other processes, or the hypervisor, have the CPU that the service's threads want.

use super::{
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::cpu::CpuTime,
};
use crate::{
    cause::Cause,
    diagnose::{case::Case, inputs::Hog, words::percent},
    event::{Activity, Culprit, CulpritKind},
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::CpuStarved,
    suggested_by: &[Activity::RunnableForeign, Activity::Stolen],
    supported_by: &[Activity::RunnableForeign, Activity::Stolen],
};

pub(super) const OTHERS_HAVE_THE_CPU: Rule = Rule {
    cause: &CAUSE,
    name: "others have the CPU",
    scope: Scope::Cpu,
    basis: Basis::Time,
    test: |case, checks| {
        let cpu = CpuTime::of(case);
        cpu.is_starved(checks).then(|| finding(case, &cpu))
    },
};

fn finding(case: Case<'_>, cpu: &CpuTime) -> Finding {
    let (hog, confidence) = cpu.hog(case);
    let fact = hog.as_ref().map(|hog| {
        format!(
            "{} ({}) uses {} of a CPU",
            hog.name,
            hog.tgid,
            percent(hog.share)
        )
    });
    let is_known = hog.is_some();
    Finding::blaming(hog.map(|hog| culprit(case, hog)), |who| {
        let who = if is_known {
            who
        } else {
            "the other processes or virtual machines"
        };
        format!(
            "Move {who} elsewhere, or give this service's control group more weight (cpu.weight, cpu.shares) or its own CPUs."
        )
    })
    .fact(fact)
    .share(cpu.foreign)
    .at_most(confidence)
}

fn culprit(case: Case<'_>, hog: Hog) -> Culprit {
    Culprit {
        target: case.view.targets.of(hog.tgid),
        pid: Some(hog.tgid),
        container: hog.cgroup,
        ..Culprit::named(CulpritKind::Process, format!("{} ({})", hog.name, hog.tgid))
    }
}
