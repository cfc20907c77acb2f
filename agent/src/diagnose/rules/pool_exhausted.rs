//! All connections to another service are in use or taken, and work waits for one.

use std::net::SocketAddr;

use super::{
    checks::Checks,
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{
        capacity::needed,
        cpu::CpuTime,
        culprit,
        pool::{exhausted_here, lacks_nothing, own_culprit},
    },
};
use crate::{
    cause::Cause,
    diagnose::{
        case::Case,
        classify::Resource,
        held_pool::{self, HeldPool},
        inputs::{MAX_SLOWDOWN, MIN_IN_USE, Pool, min_inflight},
        served::Served,
    },
    event::{Activity, Confidence, explain::Unit},
    queue::Kind,
    text::{count, duration, rate},
};

const SECOND_NS: f64 = 1e9;

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::PoolExhausted,
    suggested_by: &[],
    supported_by: &[Activity::Downstream, Activity::Idle, Activity::Inside],
};

pub(super) const ALL_IN_USE: Rule = Rule {
    cause: &CAUSE,
    name: "all connections are in use",
    scope: Scope::MainActivity(&[
        Activity::Downstream,
        Activity::Asleep,
        Activity::Inside,
        Activity::Idle,
    ]),
    basis: Basis::Time,
    test: |case, checks| {
        let exhausted = exhausted_here(case);
        describe(case, exhausted.as_ref(), checks);
        checks.is(
            "a pool is exhausted, and nothing beyond it is slow",
            exhausted.is_some(),
            true,
        );
        exhausted.map(|pool| finding(case, &pool))
    },
};

/// All connections are taken, and none of them is used: they were never given back, or each is held by a request that waits for
/// another one. No other reason for the wait is visible.
pub(super) const HELD: Rule = Rule {
    cause: &CAUSE,
    name: "all connections are held and silent",
    scope: Scope::MainActivity(&[Activity::Inside, Activity::Idle, Activity::Unknown]),
    basis: Basis::Fact,
    test: |case, checks| {
        let first = case.first()?;
        let idle = checks.at_most(
            "time using or wanting a CPU",
            CpuTime::of(case).needed,
            MAX_COMPUTING,
            Unit::Ratio,
        );
        let pipe = checks.is(
            "threads wait for a pipe",
            matches!(first.resource, Resource::Pipe(_)),
            false,
        );
        let for_clients = held_for_clients(case);
        checks.is(
            "clients hold the connections over which the service passes their requests on",
            for_clients.is_some(),
            true,
        );
        if let Some(served) = for_clients.filter(|_| idle) {
            return Some(held_by_clients(case, &served));
        }
        let held = held_here(case);
        describe_held(held.as_ref(), checks);
        let held = held.filter(|_| idle && pipe)?;
        Some(held_finding(case, &held))
    },
};

/// The connections of a queue that this service passes on, if they are held in transactions: those of its clients, not its own.
fn held_for_clients(case: Case<'_>) -> Option<Served> {
    let (_, now_ns) = case.time();
    let view = case.view;
    let ends: Vec<SocketAddr> = view.consumers.all_served_on(case.target()).collect();
    // Without a name, they could be its own.
    let is_named = !ends.is_empty();
    let facts = (view.topology, view.targets);
    is_named
        .then(|| Served::of(case.target(), &ends, now_ns, facts))
        .filter(Served::is_held)
}

/// Clients have taken at least half of the connections over which a proxy or a pool passes the items of its queue on, and do not use
/// them: the servers are idle in their transactions, or the service says that all are taken and they are silent.
pub(super) const HELD_BY_CLIENTS: Rule = Rule {
    cause: &CAUSE,
    name: "clients hold the connections of the queue",
    scope: Scope::Kinds(&[Kind::App]),
    basis: Basis::Fact,
    test: |case, checks| {
        let served = case.served?;
        let half = (served.connections as f64 / 2.0).max(1.0);
        checks.context(
            "connections of the queue",
            Some(served.connections as f64),
            Unit::Count,
        );
        let in_transaction = checks.at_least(
            "those idle in a transaction",
            served.held as f64,
            half,
            Unit::Count,
        );
        let all_taken = at_limit(case, checks);
        let silent = checks.at_least("or silent", served.silent as f64, half, Unit::Count);
        // A proxy keeps further connections for later, which are silent, too.
        let unused = checks.at_most(
            "connections of the queue in use",
            served.busy as f64,
            case.reported("serving").unwrap_or(0.0) / 2.0,
            Unit::Count,
        );
        let known = checks.at_most(
            "calls that may be outstanding",
            maybe_outstanding(case, served),
            0.0,
            Unit::Count,
        );
        let idle = checks.at_most(
            "time using or wanting a CPU",
            CpuTime::of(case).needed,
            MAX_COMPUTING,
            Unit::Ratio,
        );
        (idle && (in_transaction || all_taken && silent && unused && known))
            .then(|| held_by_clients(case, served))
    },
};

/// The number of connections of the queue's servers of which it is not known whether a call is outstanding: sampling began during it.
fn maybe_outstanding(case: Case<'_>, served: &Served) -> f64 {
    let calls = case.inputs.of(case.target(), Kind::Downstream);
    let ours = calls.filter(|(key, _)| {
        let remote = key.id.remote();
        remote.is_some_and(|remote| served.leads_to(remote))
    });
    ours.filter_map(|(_, reading)| reading.extra("unknown"))
        .sum()
}

/// Whether the service says that as many items are being served as can be.
fn at_limit(case: Case<'_>, checks: &mut Checks) -> bool {
    const NAME: &str = "items being served, as the service says";
    match case.reported("serving").zip(case.reported("slots")) {
        Some((serving, slots)) => checks.at_least(NAME, serving, slots.max(1.0), Unit::Count),
        None => checks.unknown(NAME, Unit::Count),
    }
}

/// All connections over which a proxy or a pool passes the items of its queue on are in use, and the calls on them take no longer than
/// before.
pub(super) const CONNECTIONS_OF_QUEUE: Rule = Rule {
    cause: &CAUSE,
    name: "all connections of the queue are in use",
    scope: Scope::MainActivity(&[Activity::Downstream]),
    basis: Basis::Time,
    test: |case, checks| {
        let served = case.served?;
        let connections = served.connections as f64;
        let most = case.reported("slots").unwrap_or(connections);
        // One that carries short calls is free for a moment between two of them.
        let in_use = checks.at_least(
            "connections of the queue in use",
            served.busy as f64,
            (most.min(connections) / 2.0).max(1.0),
            Unit::Count,
        );
        let at_limit = at_limit(case, checks);
        let place = served.place()?;
        let link = case.view.topology.link(*place.cookies.first()?)?;
        let endpoint = link.remote.to_string();
        let (now, baseline) = case.inputs.response_times(case.target(), &endpoint);
        let Some((now, baseline)) = now.zip(baseline) else {
            checks.context("time per call", now, Unit::Nanoseconds);
            checks.context("its baseline", None, Unit::Nanoseconds);
            return None;
        };
        let as_before = checks.at_most(
            "time per call",
            now,
            baseline * MAX_SLOWDOWN,
            Unit::Nanoseconds,
        );
        let free = checks.is(
            "who is at their other ends lacks nothing",
            case.last().is_some_and(lacks_nothing),
            true,
        );
        (in_use && at_limit && as_before && free).then(|| {
            let slots = case.reported("slots");
            let connections = slots.map_or(served.connections, |slots| slots as u64);
            let culprit = own_culprit(case, connections, endpoint.clone());
            let fact = format!(
                "all {connections} connections of the queue to {endpoint} are in use, and a call takes {} (baseline {})",
                duration(now as u64),
                duration(baseline as u64)
            );
            let finding = Finding::blaming(culprit, |_| {
                format!(
                    "The limit of {connections} connections is too small for the calls that arrive, and its servers are as fast as before: raise it, if they can serve more at once, or send less."
                )
            });
            Finding {
                includes: &[Cause::DownstreamSlow],
                ..finding.fact(fact)
            }
        })
    },
};

fn held_by_clients(case: Case<'_>, served: &Served) -> Finding {
    let holder = served.holder.map(|tgid| culprit::process(case, tgid));
    let of = holder.as_ref().map(|holder| format!(" of {}", holder.name));
    let of = of.unwrap_or_default();
    let (held, all) = (served.held, count(served.connections));
    let (fact, what) = if served.is_held() {
        let idle = duration(served.held_ns);
        (
            format!(
                "{held} of {all} connections to servers are idle in a transaction{of}, for up to {idle}"
            ),
            "transactions open without using them: end them before doing anything else, or set idle_in_transaction_session_timeout",
        )
    } else {
        let (silent, silent_ns) = (served.silent, duration(served.silent_ns));
        (
            format!(
                "all connections to servers are taken, and {silent} of {all} are silent, for up to {silent_ns}: clients{of} keep them without using them"
            ),
            "connections without using them: give them back after each use, or share them by transaction instead of by session",
        )
    };
    let advice = match &holder {
        Some(holder) => format!(
            "{} keeps {what}. A larger pool only delays the exhaustion.",
            holder.name
        ),
        None => format!(
            "Clients keep {what}; the pool's list of its clients names them. A larger pool only delays the exhaustion."
        ),
    };
    let limit = || {
        let name = format!("a pool of {} connections", served.connections);
        culprit::limit(case, name)
    };
    let finding = Finding::blaming(holder.unwrap_or_else(limit), |_| advice).fact(fact);
    match served.is_held() {
        true => finding,
        false => finding.at_most(Confidence::Medium),
    }
}

/// Threads that need a CPU for a larger share of their time may compute the responses that others wait for.
const MAX_COMPUTING: f64 = 0.2;

fn held_here(case: Case<'_>) -> Option<HeldPool> {
    let (_, now_ns) = case.time();
    held_pool::of(
        case.target(),
        (now_ns, case.episode.onset.mono_ns),
        case.inputs,
        (case.view.topology, case.view.targets),
    )
}

fn describe_held(held: Option<&HeldPool>, checks: &mut Checks) {
    checks.is(
        "connections are silent and no call is outstanding, while requests are in flight",
        held.is_some(),
        true,
    );
    let Some(held) = held else { return };
    for (name, number, unit) in [
        ("connections of the pool", held.connections, Unit::Count),
        ("silent for", held.silent_ns, Unit::Nanoseconds),
        ("requests in flight", held.requests, Unit::Count),
        ("the oldest of them", held.oldest_ns, Unit::Nanoseconds),
        (
            "connections that no request in flight can hold",
            held.orphans,
            Unit::Count,
        ),
        (
            "sessions idle in a transaction",
            held.in_transaction,
            Unit::Count,
        ),
        (
            "closed by the peer and not by the service",
            held.closed_by_peer,
            Unit::Count,
        ),
        ("with an unread response", held.unread, Unit::Count),
        ("in an unknown state", held.unknown, Unit::Count),
    ] {
        checks.context(name, Some(number as f64), unit);
    }
}

fn held_finding(case: Case<'_>, held: &HeldPool) -> Finding {
    /// Requests that used the pool last are answered within this time, ns.
    const ANSWERED_NS: u64 = 500_000_000;
    let (_, now_ns) = case.time();
    let silent_since_ns = now_ns.saturating_sub(held.silent_ns);
    let answered = case
        .inputs
        .responses(case.target(), silent_since_ns.saturating_add(ANSWERED_NS));
    // If other requests are answered, something other than the pool may hold up these. A few responses (5%) are tolerated,
    // because connections that no scan has seen count as answered requests.
    let none_answered =
        answered.is_some_and(|answered| answered.saturating_mul(20) <= held.requests);
    let max_confidence = if held.is_evident() {
        Confidence::High
    } else if none_answered && held.unknown == 0 {
        // A lock that the kernel does not see could hold up the requests as well.
        Confidence::Medium
    } else {
        Confidence::Low
    };
    let culprit = own_culprit(case, held.connections, held.remote.to_string());
    Finding::blaming(culprit, |_| held_advice(held))
        .fact(held_fact(held))
        .at_most(max_confidence)
}

fn held_fact(held: &HeldPool) -> String {
    let mut text = format!(
        "all {} connections to {} have been silent for {} and no call is outstanding, while {} requests are in flight, the oldest for {}",
        held.connections,
        held.remote,
        duration(held.silent_ns),
        count(held.requests),
        duration(held.oldest_ns),
    );
    if held.orphans > 0 {
        text.push_str(&format!(
            "; {} of the connections were taken by requests that have ended: too few of the requests in flight are old enough to hold them all",
            held.orphans
        ));
    }
    let signs = [
        (held.in_transaction, "sessions are idle in a transaction"),
        (
            held.closed_by_peer,
            "are closed by the peer and still open here",
        ),
        (held.unread, "hold a response that nobody reads"),
    ];
    for (number, words) in signs.into_iter().filter(|(number, _)| *number > 0) {
        text.push_str(&format!("; {number} {words}"));
    }
    text
}

fn held_advice(held: &HeldPool) -> String {
    if held.is_leaked() {
        return format!(
            "The connections to {} were taken and not given back (leaked), or their clients have gone: with the pool's leak detection, find the code path that returns without closing one. A restart frees them; a larger pool only delays the exhaustion.",
            held.remote
        );
    }
    format!(
        "Requests hold connections to {} while they wait, most likely for another one of the same pool: {} connections allow {} such requests at once. Use one connection per request, or limit the requests to fewer than the pool; set a timeout for taking a connection. Confirm with the stacks of the process.",
        held.remote,
        held.connections,
        held.connections.saturating_sub(1)
    )
}

/// Records the numbers of the exhausted pool, else of the fullest one.
fn describe(case: Case<'_>, exhausted: Option<&Pool>, checks: &mut Checks) {
    let fullest = case.inputs.fullest_pool(case.target());
    let Some(pool) = exhausted.or(fullest.as_ref()) else {
        checks.unknown("connections of a pool", Unit::Count);
        return;
    };
    let connections = pool.connections as f64;
    checks.context("connections of the pool", Some(connections), Unit::Count);
    checks.at_least(
        "samples in which all but those that carry nothing are in use",
        pool.in_use,
        MIN_IN_USE,
        Unit::Ratio,
    );
    checks.at_least(
        "requests in flight",
        pool.inflight as f64,
        min_inflight(pool.connections),
        Unit::Count,
    );
    match (pool.response_time_ns, pool.baseline_ns) {
        (Some(now), Some(baseline)) => {
            checks.at_most(
                "time per call",
                now,
                baseline * MAX_SLOWDOWN,
                Unit::Nanoseconds,
            );
        }
        (now, _) => {
            checks.context("time per call", now, Unit::Nanoseconds);
            checks.context("its baseline", None, Unit::Nanoseconds);
        }
    }
}

fn finding(case: Case<'_>, pool: &Pool) -> Finding {
    let culprit = own_culprit(case, pool.connections, pool.endpoint.clone());
    let finding = Finding::blaming(culprit, |_| advice(case, pool)).fact(fact(pool));
    if pool.baseline_ns.is_some() && pool.unused == 0 {
        // Slow calls exhaust a pool, too. The baseline distinguishes the two.
        return Finding {
            includes: &[Cause::DownstreamSlow],
            ..finding
        };
    }
    finding.at_most(Confidence::Medium)
}

fn fact(pool: &Pool) -> String {
    let response = pool.typical_ns().map_or_else(String::new, |ns| {
        format!(", a response takes {}", duration(ns))
    });
    let baseline = match pool.baseline_ns {
        Some(_) => "",
        None => " (no baseline)",
    };
    let which = match pool.unused {
        0 => format!("all {} connections to {}", pool.connections, pool.endpoint),
        unused => format!(
            "{unused} of {} connections to {} carry nothing and the other {}",
            pool.connections,
            pool.endpoint,
            pool.connections.saturating_sub(unused)
        ),
    };
    format!(
        "{which} are in use in nearly every sample while {} requests are in flight{response}{baseline}",
        count(pool.inflight),
    )
}

fn advice(case: Case<'_>, pool: &Pool) -> String {
    if pool.unused > 0 {
        return format!(
            "{} of the connections to {} are not used although requests wait: they were taken and not given back (leaked), or the service limits its calls below the number of connections. Compare this with the pool's own count of connections in use.",
            pool.unused, pool.endpoint
        );
    }
    let raise = match too_small(case, pool) {
        Some(sum) => format!("{sum}."),
        None => format!(
            "Raise the pool of {} connections to {}, if that service has capacity, or release each sooner.",
            pool.connections, pool.endpoint
        ),
    };
    // One call at a time: goroutines that wait for a lock are no threads, so it would not show.
    let raise = if pool.connections == 1 {
        format!(
            "{raise} A lock held during each call looks the same: the stacks of the process show which of the two it is."
        )
    } else {
        raise
    };
    if pool.baseline_ns.is_some() {
        return raise;
    }
    format!(
        "{raise} If {} used to respond faster, start there.",
        pool.endpoint
    )
}

/// The rate that the pool can carry, the arrival rate, and the connections needed. Little's law: connections = rate × time per call.
fn too_small(case: Case<'_>, pool: &Pool) -> Option<String> {
    let response_time_ns = pool.typical_ns()?;
    let response_s = response_time_ns as f64 / SECOND_NS;
    // Rates of bytes say nothing about requests.
    let arrivals = case
        .episode
        .arrival_rate
        .filter(|_| case.episode.key.kind != Kind::Recv)?;
    let carries = pool.connections as f64 / response_s.max(1e-6);
    let needed = needed(arrivals, response_s);
    (needed > pool.connections).then(|| {
        format!(
            "{} connections × {} per response carry {}/s, {}/s arrive: {needed} connections would keep up, if {} has capacity",
            pool.connections,
            duration(response_time_ns),
            rate(carries),
            rate(arrivals),
            pool.endpoint
        )
    })
}
