//! The rules, in the order in which they are evaluated. The first that fires decides.
//!
//! The order within a block matters. Rules of blocks about different kinds of queues, or different main activities,
//! never apply to the same case. To add a cause: write its file, list its rules here, and add its row to
//! `crate::cause`, its page to `docs/reference/causes` and a scenario that plants it.

use super::{
    accelerator_bound, consumer_stalled, cpu_bound, cpu_starved, cpu_throttled, disk_slow,
    downstream_slow, event_loop_blocked, fd_exhausted, lock_contention, memory_stalled,
    network_limited, output_blocked, peer_not_reading, peer_not_sending, pool_exhausted,
    ports_exhausted, producer_surge, rule::Rule, undersized_limit,
};
use crate::{cause::Cause, event::Activity};

/// A decision list.
pub(super) const RULES: &[&Rule] = &[
    // 1. Queues that explain themselves, or that the other end explains.
    &fd_exhausted::OWN_QUEUE,
    &memory_stalled::OWN_QUEUE,
    &disk_slow::OWN_QUEUE,
    &downstream_slow::NOT_ACCEPTED,
    &network_limited::SEND_QUEUE,
    &peer_not_reading::SEND_QUEUE,
    &output_blocked::PIPE,
    &consumer_stalled::NO_CONSUMERS,
    // 2. Facts that hold however the threads spend their time.
    &fd_exhausted::NONE_LEFT_TO_ACCEPT,
    &consumer_stalled::STOPPED,
    &pool_exhausted::HELD_BY_CLIENTS,
    &consumer_stalled::DEADLOCKED,
    &memory_stalled::GROUP_STALLS,
    &ports_exhausted::NONE_LEFT,
    &network_limited::TRACKING_TABLE,
    &undersized_limit::BACKLOG,
    // 3. Threads that wait for an accelerator: they may seem to use a CPU.
    &accelerator_bound::THREADS_WAIT,
    // 4. Threads that need a CPU: a garbage collector that stops all others, an interpreter's lock, a single long turn; then
    //    who keeps the CPU from them; then how they use it.
    &cpu_bound::COLLECTING,
    &lock_contention::TAKING_TURNS,
    &event_loop_blocked::ONE_THREAD,
    &cpu_throttled::QUOTA,
    &cpu_starved::OTHERS_HAVE_THE_CPU,
    &event_loop_blocked::ONE_WORKER,
    &cpu_bound::ONE_WORKER,
    &event_loop_blocked::LONG_TURN,
    &producer_surge::COMPUTING,
    &cpu_bound::BUSY,
    // 5. Threads that wait for a lock: what its holder waits for, else the lock.
    &downstream_slow::LOCK_HOLDER_WAITS,
    &accelerator_bound::LOCK_HOLDER_WAITS,
    &disk_slow::LOCK_HOLDER_WAITS,
    &output_blocked::LOCK_HOLDER_WAITS,
    &peer_not_reading::LOCK_HOLDER_WAITS,
    &consumer_stalled::LOCK_HOLDER_STOPPED,
    &consumer_stalled::LOCK_HOLDER_EXITED,
    &lock_contention::THREADS_WAIT,
    // 6. Threads that wait for something else.
    &disk_slow::THREADS_WAIT,
    &output_blocked::THREADS_WAIT,
    &network_limited::WRITERS_WAIT,
    &peer_not_reading::WRITERS_WAIT,
    &peer_not_sending::REQUESTS_INCOMPLETE,
    &consumer_stalled::STOPPED_AT_TIMES,
    // 7. Threads that wait for another service, for something inside the process, or for work: an exhausted pool
    //    explains each, and arrivals above their baseline explain the first two.
    &consumer_stalled::RESPONSES_NOT_READ,
    &pool_exhausted::HELD,
    &consumer_stalled::ASLEEP,
    &pool_exhausted::CONNECTIONS_OF_QUEUE,
    &producer_surge::CALLING,
    &pool_exhausted::ALL_IN_USE,
    &downstream_slow::THREADS_WAIT,
    &producer_surge::WAITING,
    &undersized_limit::WORKERS,
    &consumer_stalled::SOCKET_NOT_SERVED,
    &consumer_stalled::NOT_CLOSED,
    &undersized_limit::KEPT_ALIVE,
    &peer_not_sending::SILENT_PEERS,
    &consumer_stalled::NOTHING_TAKEN,
];

/// The cause that an activity suggests if nothing else is known.
pub(super) fn suggested_by(activity: Activity) -> Cause {
    RULES
        .iter()
        .map(|rule| rule.cause)
        .find(|cause| cause.suggested_by.contains(&activity))
        .map_or(Cause::Unknown, |cause| cause.cause)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::{super::rule::CauseInfo, *};

    /// Each cause once.
    fn causes() -> BTreeMap<Cause, &'static CauseInfo> {
        let causes = RULES.iter().map(|rule| (rule.cause.cause, rule.cause));
        causes.collect()
    }

    #[test]
    fn every_cause_but_unknown_has_a_rule() {
        let with_a_rule: BTreeSet<Cause> = causes().into_keys().collect();
        let all: BTreeSet<Cause> = Cause::ALL.iter().copied().collect();
        let without: Vec<&Cause> = all.difference(&with_a_rule).collect();
        assert_eq!(without, [&Cause::Unknown]);
    }

    #[test]
    fn an_activity_suggests_at_most_one_cause_and_supports_it() {
        for activity in Activity::ALL {
            let causes = causes();
            let suggested = causes
                .values()
                .filter(|cause| cause.suggested_by.contains(activity));
            let suggested: Vec<_> = suggested.collect();
            assert!(suggested.len() <= 1, "{activity:?}");
            let supports = |cause: &&&CauseInfo| cause.supported_by.contains(activity);
            assert!(suggested.iter().all(supports), "{activity:?}");
        }
    }

    #[test]
    fn names_of_rules_are_unique_within_their_cause() {
        let names: BTreeSet<(Cause, &str)> = RULES
            .iter()
            .map(|rule| (rule.cause.cause, rule.name))
            .collect();
        assert_eq!(names.len(), RULES.len());
    }
}
