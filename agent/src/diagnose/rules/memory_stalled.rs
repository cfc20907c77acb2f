//! The service waits for memory: reclaim at its limit, or swapping.

use super::rule::{Basis, CauseInfo, Finding, Rule, Scope};
use crate::{cause::Cause, event::Activity, queue::Kind};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::MemoryStalled,
    suggested_by: &[Activity::Memory],
    supported_by: &[Activity::Memory],
};

/// The queue that fills is the one for memory itself.
pub(super) const OWN_QUEUE: Rule = Rule {
    cause: &CAUSE,
    name: "memory is the queue",
    scope: Scope::Kinds(&[Kind::Memory]),
    basis: Basis::Fact,
    test: |_, _| Some(finding()),
};

/// Most of the threads' time goes into waiting for memory.
pub(super) const THREADS_WAIT: Rule = Rule {
    cause: &CAUSE,
    name: "threads wait for memory",
    scope: Scope::MainActivity(&[Activity::Memory]),
    basis: Basis::Time,
    test: |_, _| Some(finding()),
};

fn finding() -> Finding {
    Finding::new(
        "Raise the memory limit (memory.max, memory.limit_in_bytes) or make the service use less; find what grew.",
    )
}
