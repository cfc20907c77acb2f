//! Requests not yet answered, on the connections that a service accepted: the depth that fills in an asynchronous
//! server, whose accept and receive queues stay empty.

use super::{RESPONSES_PER_S, Reading, conversations::Told, little};

/// Ages that are listed.
pub(super) const MAX_AGES: usize = 1_024;

pub(super) fn reading(told: &Told<'_>) -> Reading {
    let Told { group, now_ns, .. } = *told;
    let tally = &group.tally;
    let mut extra = vec![
        ("connections", (tally.conversations() + tally.push) as f64),
        ("unread", tally.unread as f64),
        ("working", tally.working as f64),
        ("sending", tally.sending as f64),
        ("idle", tally.idle as f64),
        ("unknown", tally.unknown as f64),
        ("push", tally.push as f64),
    ];
    extra.extend(counted(told, "callers_gone"));
    Reading {
        limit: Some(group.most).filter(|most| *most > 0),
        servers: told.threads,
        worst: told
            .oldest
            .map(|(tgid, fd, remote)| format!("process {tgid} fd {fd} with {remote}")),
        extra,
        ..waiting(told, now_ns)
    }
}

/// What both kinds of conversation have in common.
pub(super) fn waiting(told: &Told<'_>, now_ns: u64) -> Reading {
    let Told { group, .. } = *told;
    let known = told.elapsed_ns.is_some();
    let departures = known.then_some(group.since.answered);
    let depth = group.depth();
    // A rate that is a lower bound would make the wait an upper one.
    let exact = departures.filter(|_| !group.since.at_least);
    let wait_ns = if depth == 0 {
        Some(0)
    } else {
        little(depth, exact.unwrap_or(0), told.elapsed_ns).or_else(|| group.median_age_ns(now_ns))
    };
    Reading {
        depth,
        // The limit is what was seen, not what can be: nothing fills.
        fill: None,
        arrivals: known.then_some(group.since.begun),
        departures,
        elapsed_ns: told.elapsed_ns,
        served: departures,
        wait_ns,
        oldest_age_ns: group.ages_ns(now_ns).next(),
        ages_ns: group.ages_ns(now_ns).take(MAX_AGES).collect(),
        // A caller that gives up is its own affair, and a loss would open an episode: it is told as a measure.
        losses: 0,
        ..Reading::default()
    }
}

/// Measures of what was counted since the last walk over all connections.
pub(super) fn counted(
    told: &Told<'_>,
    lost: &'static str,
) -> impl Iterator<Item = (&'static str, f64)> {
    let since = told.group.since;
    let known = told.elapsed_ns.is_some();
    let answer = since.answer_ns().map(|ns| ("answer_ns", ns));
    let at_least = since.at_least.then_some(("at_least", 1.0));
    let rate = told.elapsed_ns.and_then(|ns| since.responses_per_s(ns));
    let rate = rate.map(|rate| (RESPONSES_PER_S, rate));
    let gone = (since.lost > 0).then_some((lost, since.lost as f64));
    [answer, rate, at_least, gone]
        .into_iter()
        .flatten()
        .filter(move |_| known)
}
