//! Requests in flight: unanswered requests on the connections that a service accepted. This is the queue that fills in
//! an asynchronous server, whose accept and receive queues stay empty.

use super::{
    RESPONSE_BYTES_PER_S, RESPONSES_PER_S, Reading, conversations::GroupSample, littles_law,
};

/// Maximum number of ages listed per queue; bounds the size of a reading.
pub(super) const MAX_AGES: usize = 1_024;

pub(super) fn reading(sample: &GroupSample<'_>) -> Reading {
    let GroupSample { group, now_ns, .. } = *sample;
    let counts = &group.counts;
    let mut extra = vec![
        (
            "connections",
            (counts.request_response() + counts.push) as f64,
        ),
        ("unread", counts.unread as f64),
        ("working", counts.working as f64),
        ("sending", counts.sending as f64),
        ("idle", counts.idle as f64),
        ("unknown", counts.unknown as f64),
        ("push", counts.push as f64),
    ];
    extra.extend(counted(sample, "callers_gone"));
    Reading {
        limit: Some(group.peak).filter(|peak| *peak > 0),
        servers: sample.threads,
        worst: sample
            .oldest
            .map(|(tgid, fd, remote)| format!("process {tgid} fd {fd} with {remote}")),
        extra,
        ..common(sample, now_ns)
    }
}

/// The measures that `inflight` and `downstream` share.
pub(super) fn common(sample: &GroupSample<'_>, now_ns: u64) -> Reading {
    let GroupSample { group, .. } = *sample;
    let known = sample.elapsed_ns.is_some();
    let departures = known.then_some(group.since.answered);
    let depth = group.depth();
    // Only an exact count will do: a lower bound of the departures would yield an upper bound of the wait.
    let exact = departures.filter(|_| !group.since.at_least);
    let wait_ns = if depth == 0 {
        Some(0)
    } else {
        littles_law(depth, exact.unwrap_or(0), sample.elapsed_ns)
            .or_else(|| group.median_age_ns(now_ns))
    };
    Reading {
        depth,
        // The limit is the highest depth seen, not a capacity, so there is no fill.
        fill: None,
        arrivals: known.then_some(group.since.begun),
        departures,
        hidden: group.since.hidden(),
        unseen_at_most: group.since.unseen_at_most,
        elapsed_ns: sample.elapsed_ns,
        served: departures,
        wait_ns,
        oldest_age_ns: group.ages_ns(now_ns).next(),
        ages_ns: group.ages_ns(now_ns).take(MAX_AGES).collect(),
        // A client may give up for its own reasons, and a loss would open an episode. So clients that give up are an extra
        // measure, not losses.
        losses: 0,
        ..Reading::default()
    }
}

/// Measures of what was counted since the last scan of all connections. `lost` is the JSON key of connections that
/// ended with an unanswered request.
pub(super) fn counted(
    sample: &GroupSample<'_>,
    lost: &'static str,
) -> impl Iterator<Item = (&'static str, f64)> {
    let since = sample.group.since;
    let known = sample.elapsed_ns.is_some();
    let answer = since.response_time_ns().map(|ns| ("response_time_ns", ns));
    let at_least = since.at_least.then_some(("at_least", 1.0));
    let elapsed_ns = sample.elapsed_ns;
    let rate = elapsed_ns.and_then(|ns| since.responses_per_s(ns));
    let rate = rate.map(|rate| (RESPONSES_PER_S, rate));
    let bytes = elapsed_ns.and_then(|ns| since.answer_bytes_per_s(ns));
    let bytes = bytes.map(|bytes| (RESPONSE_BYTES_PER_S, bytes));
    let gone = (since.lost > 0).then_some((lost, since.lost as f64));
    [answer, rate, bytes, at_least, gone]
        .into_iter()
        .flatten()
        .filter(move |_| known)
}
