//! The service makes no progress at all: it is stopped, or its threads wait for each other.

use std::net::SocketAddr;

use super::{
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{culprit, far_end, lock, unclosed::Unclosed, wait},
};
use crate::{
    cause::Cause,
    diagnose::{
        case::Case,
        classify::Resource,
        wait_graph::{ChainEnd, Step},
    },
    event::{Activity, Confidence, explain::Unit},
    queue::Kind,
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::ConsumerStalled,
    suggested_by: &[Activity::Stopped],
    supported_by: &[Activity::Stopped],
};

/// The threads were stopped for most of the time: SIGSTOP, a debugger, a frozen control group.
pub(super) const STOPPED: Rule = Rule {
    cause: &CAUSE,
    name: "stopped for most of the time",
    scope: Scope::Served,
    basis: Basis::Fact,
    test: |case, checks| {
        /// More than half: whatever else they did is not why the queue fills.
        const MIN_STOPPED: f64 = 0.5;
        let stopped = case.share(Activity::Stopped);
        checks
            .more_than("time stopped", stopped, MIN_STOPPED, Unit::Ratio)
            .then(|| Finding::blaming(culprit::own_process(case), restart).share(stopped))
    },
};

/// The service says that nobody takes items from a queue inside it.
pub(super) const NO_CONSUMERS: Rule = Rule {
    cause: &CAUSE,
    name: "no consumers",
    scope: Scope::Kinds(&[Kind::App]),
    basis: Basis::Fact,
    test: |case, checks| {
        let key = &case.episode.key;
        let mut queues = case.inputs.of(key.target, Kind::App);
        let (_, reading) = queues.find(|(other, _)| *other == key)?;
        let consumers = reading.extra.iter().find(|(name, _)| *name == "consumers");
        let Some((_, consumers)) = consumers else {
            checks.unknown("consumers", Unit::Count);
            return None;
        };
        let none = checks.at_most("consumers", *consumers, 0.0, Unit::Count);
        // Queues of failed or delayed messages have none by design.
        let Some(since_ns) = reading.no_consumers_ns else {
            checks.is("it had consumers before", false, true);
            return None;
        };
        // A restart of the consumers may show none at one instant: two answers decide.
        let lasts = checks.more_than(
            "time without consumers",
            since_ns as f64,
            0.0,
            Unit::Nanoseconds,
        );
        // Others may take items without being registered.
        let departures = case.episode.departures;
        let nothing = match departures {
            Some(left) => checks.at_most("departures", left as f64, 0.0, Unit::Count),
            None => true,
        };
        let confidence = match departures {
            Some(_) => Confidence::High,
            None => Confidence::Medium,
        };
        (none && lasts && nothing).then(|| {
            Finding::new(format!(
                "Nobody takes items from {}: start its consumers, or find out why they ended.",
                key.id
            ))
            .fact("the queue has no consumers any more".to_owned())
            .at_most(confidence)
        })
    },
};

/// A cycle of waiting is a deadlock only if the threads have been observed for at least this time, ns: at one instant, those of an
/// event loop may seem to wait for each other while data is on its way.
const MIN_DEADLOCK_NS: u64 = 1_000_000_000;

/// The wait chain leads back to threads that are part of it: a deadlock.
pub(super) const DEADLOCKED: Rule = Rule {
    cause: &CAUSE,
    name: "a cycle of waiting",
    scope: Scope::Served,
    basis: Basis::Fact,
    test: |case, checks| {
        let cycle = case
            .last()
            .is_some_and(|last| last.end == Some(ChainEnd::Cycle));
        let first = case.first()?;
        let itself = case.last().and_then(|last| own_address(case, last));
        let (from_ns, to_ns) = case.time();
        let is_cycle = checks.is("the wait chain is a cycle", cycle, true);
        let lasts = checks.at_least(
            "time observed",
            to_ns.saturating_sub(from_ns) as f64,
            MIN_DEADLOCK_NS as f64,
            Unit::Nanoseconds,
        );
        (is_cycle && lasts).then(|| {
            if let Some(address) = itself {
                return Finding::blaming(culprit::own_process(case), |_| {
                    format!(
                        "The service calls itself at {address}, and only the threads that wait could serve these calls. Call the function directly, or serve these calls from separate workers; a restart helps only until the next burst."
                    )
                })
                .share(first.share);
            }
            Finding::blaming(lock::end_of_chain(case), |who| {
                format!(
                    "This is a deadlock and does not resolve by itself: dump the stacks of {who} (gdb -p PID, py-spy dump), then restart it."
                )
            })
            .share(first.share)
        })
    },
};

/// Threads were stopped for part of the time, but for longer than they did anything else.
pub(super) const STOPPED_AT_TIMES: Rule = Rule {
    cause: &CAUSE,
    name: "stopped at times",
    scope: Scope::MainActivity(&[Activity::Stopped]),
    basis: Basis::Time,
    test: |case, _| Some(Finding::blaming(culprit::own_process(case), restart)),
};

/// Threads wait for a lock whose holder is stopped.
pub(super) const LOCK_HOLDER_STOPPED: Rule = Rule {
    cause: &CAUSE,
    name: "the lock holder is stopped",
    scope: Scope::MainActivity(&[Activity::Lock]),
    basis: Basis::Time,
    test: |case, checks| {
        lock::held_while(
            case,
            checks,
            ("the lock holder is stopped", Activity::Stopped),
            |_| lock::end_of_chain(case),
            restart,
        )
    },
};

/// Threads wait for a lock in shared memory whose holder has exited without releasing it: they wait forever.
pub(super) const LOCK_HOLDER_EXITED: Rule = Rule {
    cause: &CAUSE,
    name: "the lock holder has exited",
    scope: Scope::MainActivity(&[Activity::Lock]),
    basis: Basis::Time,
    test: |case, checks| {
        let holder = lock::exited_holder(case);
        checks.is("the lock holder has exited", holder.is_some(), true);
        let holder = holder?;
        let first = case.first()?;
        let finding = Finding::blaming(culprit::lock(case, case.last()?), |who| {
            format!(
                "Nobody will release {who}: restart all processes that share it. A robust mutex (PTHREAD_MUTEX_ROBUST) survives the end of its holder."
            )
        });
        let fact = format!("thread {holder}, which holds the lock, has exited");
        Some(
            finding
                .share(first.share)
                .fact(fact)
                .at_most(Confidence::Medium),
        )
    },
};

/// Responses of another service are not read, and nothing outside the process keeps it from reading them.
pub(super) const RESPONSES_NOT_READ: Rule = Rule {
    cause: &CAUSE,
    name: "responses are not read",
    scope: Scope::MainActivity(&[Activity::Asleep, Activity::Inside]),
    basis: Basis::Time,
    test: |case, checks| {
        let first = case.first()?;
        checks
            .is(
                "the queue holds responses of another service",
                far_end::holds_responses(case),
                true,
            )
            .then(|| Finding::blaming(culprit::own_process(case), restart).share(first.share))
    },
};

/// Nobody accepts from some listening sockets of an address, and nobody is busy: a worker has exited and its socket is still
/// open in another process, or a worker has stopped accepting.
pub(super) const SOCKET_NOT_SERVED: Rule = Rule {
    cause: &CAUSE,
    name: "a listening socket that nobody accepts from",
    scope: Scope::MainActivity(&[Activity::Idle]),
    basis: Basis::Time,
    test: |case, checks| {
        let is_long = wait::is_long(case, checks);
        checks.is(
            "some listening sockets fill while others are empty",
            case.uneven.is_some(),
            true,
        );
        let accepts = case.uneven?.accepts_per_s;
        let none = checks.at_most(
            "accepts from those that fill, per second",
            accepts,
            0.0,
            Unit::Count,
        );
        (is_long && none).then(|| {
            Finding::blaming(culprit::own_process(case), |who| {
                format!(
                    "No worker of {who} accepts from this socket, and the kernel goes on assigning connections to it: restart the service, so that each listening socket has a worker again. A longer backlog only lengthens the wait."
                )
            })
            .share(case.share(Activity::Idle))
            .at_most(Confidence::Medium)
        })
    },
};

/// Connections that the clients have closed and the service has not use up its own limit of connections.
pub(super) const NOT_CLOSED: Rule = Rule {
    cause: &CAUSE,
    name: "connections are not closed",
    scope: Scope::MainActivity(&[Activity::Idle]),
    basis: Basis::Time,
    test: |case, checks| {
        /// At least half of the connections that it has accepted.
        const MIN_UNCLOSED: f64 = 0.5;
        let is_long = wait::is_long(case, checks);
        let nothing = checks.is(
            "nothing is taken, and no request is in service",
            wait::takes_nothing(case),
            true,
        );
        let unclosed = Unclosed::of(case);
        let connections = unclosed.as_ref().map_or(0, |it| it.accepted);
        let accepted = case.view.topology.links().filter(|(_, link)| {
            link.accepted && case.view.targets.of(link.tgid) == Some(case.target())
        });
        let most = checks.at_least(
            "accepted connections that the peer has closed",
            connections as f64 / accepted.count().max(1) as f64,
            MIN_UNCLOSED,
            Unit::Ratio,
        );
        let unclosed = unclosed?;
        (is_long && nothing && most).then(|| {
            Finding::blaming(unclosed.culprit(case), |_| unclosed.advice(case))
                .fact(unclosed.words())
                .share(case.share(Activity::Idle))
                .at_most(Confidence::Medium)
        })
    },
};

/// The threads idle although work waits, and take none of it.
pub(super) const NOTHING_TAKEN: Rule = Rule {
    cause: &CAUSE,
    name: "idle, and nothing is taken",
    scope: Scope::MainActivity(&[Activity::Idle]),
    basis: Basis::Time,
    test: |case, checks| {
        let is_long = wait::is_long(case, checks);
        // A queue inside a service may not count departures. Its idle consumers then are no proof: some fork a process for each item,
        // and wait for that.
        if case.episode.key.kind == Kind::App && case.episode.departures.is_none() {
            checks.unknown("departures", Unit::Count);
            return None;
        }
        let departures = case.episode.departures.unwrap_or(0);
        let none = checks.at_most("departures", departures as f64, 0.0, Unit::Count);
        (is_long && none).then(|| {
            Finding::blaming(culprit::own_process(case), restart).share(case.share(Activity::Idle))
        })
    },
};

/// The threads sleep although work waits, and take none of it: they back off, or wait for a time.
pub(super) const ASLEEP: Rule = Rule {
    cause: &CAUSE,
    name: "asleep, and nothing is taken",
    scope: Scope::MainActivity(&[Activity::Asleep]),
    basis: Basis::Time,
    test: |case, checks| {
        let is_long = wait::is_long(case, checks);
        let nothing = checks.is(
            "nothing is taken, and no request is in service",
            wait::takes_nothing(case),
            true,
        );
        (is_long && nothing).then(|| {
            Finding::blaming(culprit::own_process(case), |who| {
                format!(
                    "{who} sleeps (nanosleep) and takes nothing: find out what it waits for or retries, in its log or its stacks (gdb -p PID, py-spy dump). More workers would sleep as well."
                )
            })
            .share(case.share(Activity::Asleep))
        })
    },
};

/// The service's own address, if a step waits for a connection to itself, accepted or not.
fn own_address(case: Case<'_>, step: &Step) -> Option<SocketAddr> {
    let Resource::Connection(cookie) = step.resource else {
        return None;
    };
    let link = case.view.topology.link(cookie)?;
    let own = case
        .view
        .topology
        .is_in_its_own_accept_queue(step.target?, link, case.view.targets);
    let accepted = case.view.topology.own_end(link).is_some();
    (own || accepted).then_some(link.remote)
}

fn restart(who: &str) -> String {
    format!(
        "{who} makes no progress: if it is stopped, `kill -CONT` resumes it; otherwise dump its stacks, then restart it. Send callers elsewhere meanwhile."
    )
}
