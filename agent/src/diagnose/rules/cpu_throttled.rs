//! The CPU quota of the service's control group is used up.

use super::{
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{cpu::CpuTime, culprit},
};
use crate::{
    cause::Cause,
    diagnose::case::Case,
    event::{Activity, Culprit, CulpritKind},
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::CpuThrottled,
    suggested_by: &[Activity::Throttled],
    supported_by: &[Activity::Throttled],
};

pub(super) const QUOTA: Rule = Rule {
    cause: &CAUSE,
    name: "the CPU quota is used up",
    scope: Scope::Cpu,
    basis: Basis::Time,
    test: |case, checks| {
        CpuTime::of(case)
            .is_throttled(checks)
            .then(|| finding(case))
    },
};

fn finding(case: Case<'_>) -> Finding {
    let quota = quota_cpus(case);
    Finding::blaming(culprit(case), |_| advice(case, quota))
        .fact(quota.map(|quota| format!("its quota is {quota:.2} CPUs")))
}

fn culprit(case: Case<'_>) -> Option<Culprit> {
    let target = case.view.targets.get(case.target())?;
    let group = target.cgroup.as_ref()?;
    Some(Culprit {
        target: Some(case.target()),
        container: culprit::container(case, case.target()),
        ..Culprit::named(CulpritKind::Cgroup, format!("the CPU quota of {group}"))
    })
}

fn quota_cpus(case: Case<'_>) -> Option<f64> {
    let target = case.view.targets.get(case.target())?;
    let quota = case.inputs.cgroup(target)?.quota_millicpus?;
    Some(quota as f64 / 1e3)
}

fn advice(case: Case<'_>, quota: Option<f64>) -> String {
    /// The demand while throttled is a lower bound: at least this much more than the quota is needed.
    const MIN_RAISE: f64 = 1.2;
    let Some(quota) = quota.filter(|_| case.first().is_some()) else {
        return "Raise the CPU quota of its control group (cpu.max, cpu.cfs_quota_us).".to_owned();
    };
    let wanted = case.share(Activity::OnCpu) + case.share(Activity::Throttled);
    let wanted = wanted * case.threads() as f64;
    format!(
        "Raise the CPU quota of its control group (cpu.max, cpu.cfs_quota_us) from {quota:.2} to about {:.2} CPUs, or lower the load.",
        wanted.max(quota * MIN_RAISE)
    )
}
