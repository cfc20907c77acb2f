//! One turn of an event loop keeps every other request waiting.

use super::{
    checks::Checks,
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::cpu::{self, CpuTime},
};
use crate::{cause::Cause, diagnose::case::Case, event::Activity, queue::Kind};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::EventLoopBlocked,
    suggested_by: &[],
    supported_by: &[Activity::OnCpu],
};

/// The only thread has been in one turn for a long time. This is tested before who has the CPU: work that waits for one
/// turn of the loop does not depend on who else wants the CPU.
pub(super) const ONE_THREAD: Rule = Rule {
    cause: &CAUSE,
    name: "the only thread does not return to its loop",
    scope: Scope::Cpu,
    basis: Basis::Time,
    test: |case, checks| {
        cpu::is_one_long_turn(case, checks).then(|| finding(case).share(CpuTime::of(case).needed))
    },
};

/// An event loop of the service had a long turn, and it has the CPU that it wants.
pub(super) const LONG_TURN: Rule = Rule {
    cause: &CAUSE,
    name: "a long turn of an event loop",
    scope: Scope::Cpu,
    basis: Basis::Time,
    test: |case, checks| had_a_long_turn(case, checks).then(|| finding(case)),
};

fn had_a_long_turn(case: Case<'_>, checks: &mut Checks) -> bool {
    let itself = checks.is(
        "the queue is the event loop itself",
        case.episode.key.kind == Kind::Eventloop,
        true,
    );
    let (from_ns, _) = case.time();
    let long = checks.is(
        "or a turn of 100 ms or more was seen",
        case.inputs.had_a_long_turn(case.target(), from_ns),
        true,
    );
    itself || long
}

fn finding(case: Case<'_>) -> Finding {
    Finding {
        includes: &[Cause::CpuBound],
        ..Finding::blaming(cpu::busiest(case), |who| {
            format!(
                "{who} computes in one turn of its event loop, and everything else waits: find the handler (py-spy dump, perf top -p PID) and move it to a worker."
            )
        })
    }
}
