//! One turn (iteration) of an event loop keeps every other request waiting.

use super::{
    checks::Checks,
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::cpu::{self, CpuTime},
};
use crate::{
    cause::Cause,
    diagnose::case::Case,
    event::{Activity, explain::Unit},
    queue::Kind,
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::EventLoopBlocked,
    suggested_by: &[],
    supported_by: &[Activity::OnCpu],
};

/// The only thread has been in one turn for a long time. This is tested before the rules of CPU starvation: work that
/// waits for one turn of the loop does so no matter who else wants the CPU.
pub(super) const ONE_THREAD: Rule = Rule {
    cause: &CAUSE,
    name: "the only thread does not return to its loop",
    scope: Scope::Cpu,
    basis: Basis::Time,
    test: |case, checks| {
        cpu::is_one_long_turn(case, checks).then(|| finding(case).share(CpuTime::of(case).needed))
    },
};

/// Few or no connections are accepted from some listening sockets of an address, while others are empty. The worker of the former
/// is away from its loop: it computes, or waits for something other than a service, a lock or a disk.
pub(super) const ONE_WORKER: Rule = Rule {
    cause: &CAUSE,
    name: "one of several workers does not return to its loop",
    scope: Scope::MainActivity(&[
        Activity::OnCpu,
        Activity::RunnableOwn,
        Activity::Asleep,
        Activity::Inside,
        Activity::Unknown,
    ]),
    basis: Basis::Time,
    test: |case, checks| {
        /// A worker that returns to its loop once a second accepts more often.
        const MAX_ACCEPTS_PER_S: f64 = 1.0;
        let uneven = case.uneven_workers();
        checks.is(
            "a listening socket fills while others are empty",
            uneven.is_some(),
            true,
        );
        let accepts = uneven?.accepts_per_s;
        let needs_cpu = CpuTime::of(case).needed >= 0.5;
        let seldom = checks.at_most(
            "accepts from it, per second",
            accepts,
            MAX_ACCEPTS_PER_S,
            Unit::Count,
        );
        (seldom || !needs_cpu).then(|| uneven_finding(case))
    },
};

fn uneven_finding(case: Case<'_>) -> Finding {
    let busy = 1.0 - case.share(Activity::Idle);
    Finding {
        includes: &[Cause::CpuBound, Cause::UndersizedLimit],
        ..Finding::blaming(cpu::busiest(case), |who| {
            format!(
                "{who} is busy with one task while the other workers are idle. The connections that the kernel has assigned to its listening socket wait for it: find the handler (py-spy dump, gdb -p PID) and move it out of the workers that accept. Or let all workers accept from one socket, without SO_REUSEPORT. A longer backlog only lengthens the wait."
            )
        })
    }
    .share(busy)
}

/// An event loop of the service had a long turn. Earlier rules have ruled out that others keep the CPU from it.
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
