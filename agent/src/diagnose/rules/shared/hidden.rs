//! Facts that a verdict would need and that the agent cannot see from where it runs. Not seen is not the same as absent.

use std::net::SocketAddr;

use crate::{
    cause::Cause,
    diagnose::{
        case::Case,
        wait_graph::{ChainEnd, Step},
    },
    event::{Activity, Confidence},
    queue::Kind,
    sample::HiddenFact,
};

/// The highest confidence that a verdict may have, given what is hidden.
pub(in crate::diagnose::rules) fn max_confidence(case: Case<'_>, cause: Cause) -> Confidence {
    let decisive = facts(case, cause).any(|(fact, _)| fact != HiddenFact::OuterIoLimits);
    if decisive || hides_the_other_end(case) {
        Confidence::Low
    } else {
        Confidence::High
    }
}

/// What is hidden, for the evidence.
pub(in crate::diagnose::rules) fn words(case: Case<'_>, cause: Cause) -> Vec<String> {
    let mut words: Vec<String> = facts(case, cause)
        .map(|(fact, group)| {
            let what = match fact {
                HiddenFact::CpuQuota => "the CPU quota",
                HiddenFact::MemoryLimit => "the memory limit",
                HiddenFact::IoLimits => "the I/O limits",
                HiddenFact::OuterIoLimits | HiddenFact::Processes => {
                    "the I/O limits of the parents"
                }
            };
            format!(
                "hidden from the agent: {what} of control group {group} (see `tailback doctor`)"
            )
        })
        .collect();
    words.sort();
    words.dedup();
    if hides_the_other_end(case) {
        words.push(
            "hidden from the agent: processes outside its pid namespace (see `tailback doctor`)"
                .to_owned(),
        );
    }
    words
}

/// The hidden facts that matter at either end of the wait chain, and the control group whose facts they are.
fn facts(case: Case<'_>, cause: Cause) -> impl Iterator<Item = (HiddenFact, &str)> {
    let ends = [case.first(), case.last()].into_iter().flatten();
    ends.flat_map(move |step| {
        let target = step.target.unwrap_or(case.target());
        let target = case.view.targets.get(target);
        let hidden = wanted(case, cause, step)
            .into_iter()
            .filter_map(move |fact| {
                let target = target.filter(|target| case.inputs.is_hidden(target, fact))?;
                Some((fact, target.cgroup.as_deref()?))
            });
        hidden.collect::<Vec<_>>()
    })
}

/// The facts that would decide between this cause and another.
fn wanted(case: Case<'_>, cause: Cause, step: &Step) -> Vec<HiddenFact> {
    let mut wanted = Vec::new();
    let needs_cpu =
        Activity::NEEDS_CPU.contains(&step.activity) || case.episode.key.kind == Kind::Runqueue;
    if needs_cpu && cause != Cause::CpuThrottled {
        wanted.push(HiddenFact::CpuQuota);
    }
    // Threads whose pages are evicted and read again wait for the disk. If the disk is fast, they are mostly seen on a CPU.
    if matches!(
        step.activity,
        Activity::Disk | Activity::Unknown | Activity::OnCpu | Activity::RunnableOwn
    ) {
        wanted.push(HiddenFact::MemoryLimit);
    }
    if step.activity == Activity::Disk {
        wanted.extend([HiddenFact::IoLimits, HiddenFact::OuterIoLimits]);
    }
    wanted
}

/// Whether the wait chain ends at a process of this machine that the agent does not see.
fn hides_the_other_end(case: Case<'_>) -> bool {
    let Some(ChainEnd::Remote(name)) = case.last().and_then(|last| last.end.as_ref()) else {
        return false;
    };
    let is_local = name
        .parse::<SocketAddr>()
        .is_ok_and(|address| address.ip().to_canonical().is_loopback());
    is_local && case.inputs.hides_processes()
}
