//! Which HAProxy instances check an adapter, how often, and the weight that each declares. Pure.
//!
//! HAProxy does not pass its configuration to an agent-check. So the interval is measured, and the weight is what the server line
//! declares in the text of `agent-send`.

use std::{
    collections::VecDeque,
    fmt,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{listen::Peer, warning::Warning};
use crate::{
    signal::constants::MIN_ADMIT_RATIO,
    text::{bounded, duration},
};

/// Clients remembered per adapter.
const MAX_CLIENTS: usize = 16;
/// Longest text of `agent-send` that is kept, bytes.
const MAX_TEXT_BYTES: usize = 64;
/// Intervals remembered per client.
const INTERVALS: usize = 5;
/// With at least this many intervals, the longest is ignored.
const MIN_INTERVALS_TO_IGNORE_ONE: usize = 4;
/// Intervals needed to trust a short one: two clients with the same address and text count as one, so the first interval may
/// lie between their checks.
const MIN_INTERVALS: usize = 2;
/// A client that has not checked for this time is forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(600);
/// Longest check interval at which a reply may hold back work. HAProxy keeps a reply until its next check, and the controller
/// assumes that a new admit ratio applies within 200 ms.
const MAX_INTERVAL: Duration = Duration::from_millis(500);
/// How long to wait for the first check before its absence is reported.
const FIRST_CHECK_TIMEOUT: Duration = Duration::from_secs(15);
/// Number of missing checks after which a report says that they stopped, …
const MISSING_CHECKS: u32 = 5;
/// … but not before this time without a check.
const MIN_SILENCE: Duration = Duration::from_secs(5);
/// How long to wait for the text of a client that may send one. HAProxy sends it when the connection is established.
const TEXT_TIMEOUT: Duration = Duration::from_millis(50);
/// The same for a client that has always sent one, or sent it later than that: it may be held up.
const LATE_TEXT_TIMEOUT: Duration = Duration::from_millis(500);
/// Lowest admit ratio, in percent: a weight below 100 ÷ this cannot express it.
const MIN_PERCENT: u32 = (100.0 * MIN_ADMIT_RATIO) as u32;
/// The largest weight in HAProxy.
const MAX_WEIGHT: u32 = 256;

/// The clients of one adapter.
#[derive(Debug)]
pub struct AgentChecks {
    /// The reply changes the weight, not `maxconn`.
    sets_weight: bool,
    began: Instant,
    clients: Vec<Client>,
}

/// What is known about the client of a check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// The server's weight in HAProxy.
    pub weight: Option<u32>,
    /// It checks often enough to follow an overload.
    pub is_fast: bool,
}

#[derive(Debug)]
struct Client {
    peer: Peer,
    /// What it sent: the text of `agent-send`.
    text: String,
    is_late: bool,
    checks: u64,
    last: Instant,
    intervals: VecDeque<Duration>,
}

impl Client {
    /// The second longest of the last intervals: one late check does not count, and two similar slow clients do not
    /// pass for a fast one. With few intervals, the longest.
    fn interval(&self) -> Option<Duration> {
        let mut sorted: Vec<Duration> = self.intervals.iter().copied().collect();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        let index = usize::from(sorted.len() >= MIN_INTERVALS_TO_IGNORE_ONE);
        sorted.get(index).copied()
    }

    /// The number in `weight=N`.
    fn weight(&self) -> Option<u32> {
        let mut words = self.text.split_ascii_whitespace();
        let weight = words.find_map(|word| word.strip_prefix("weight="))?;
        let weight = weight.parse().ok()?;
        (1..=MAX_WEIGHT).contains(&weight).then_some(weight)
    }

    fn is_fast(&self) -> bool {
        let is_short = |interval| interval <= MAX_INTERVAL;
        self.intervals.len() >= MIN_INTERVALS && self.interval().is_some_and(is_short)
    }

    fn is_silent(&self, now: Instant) -> bool {
        let expected = self.interval().unwrap_or_default() * MISSING_CHECKS;
        now.saturating_duration_since(self.last) > expected.max(MIN_SILENCE)
    }
}

impl AgentChecks {
    pub fn new(sets_weight: bool, now: Instant) -> Self {
        Self {
            sets_weight,
            began: now,
            clients: Vec::new(),
        }
    }

    /// Continues with the clients of the replaced process, from its [`Self::to_json`]: they are already known.
    pub fn restore(&mut self, previous: &Value, now: Instant) {
        let clients = previous.as_array().into_iter().flatten().take(MAX_CLIENTS);
        for client in clients {
            let text = |key: &str| client[key].as_str().unwrap_or_default();
            let time = |key: &str| client[key].as_u64().map(Duration::from_nanos);
            let last = time("last_age_ns").and_then(|age| now.checked_sub(age));
            if let (Ok(address), Some(last), Some(interval)) =
                (text("from").parse(), last, time("interval_ns"))
            {
                self.clients.push(Client {
                    peer: Peer::Address(address),
                    text: bounded(text("sent"), MAX_TEXT_BYTES),
                    is_late: false,
                    checks: 0,
                    last,
                    // As many as let one late check pass, which may be the first.
                    intervals: VecDeque::from([interval; MIN_INTERVALS_TO_IGNORE_ONE]),
                });
            }
        }
    }

    /// How long to wait for the text of a client before the reply.
    pub fn text_timeout(&self, peer: Peer) -> Duration {
        let of_peer = || self.clients.iter().filter(|client| client.peer == peer);
        let is_known = of_peer().next().is_some();
        let sends_one = is_known && of_peer().all(|client| !client.text.is_empty());
        if sends_one || of_peer().any(|client| client.is_late) {
            LATE_TEXT_TIMEOUT
        } else if is_known && of_peer().all(|client| client.text.is_empty()) {
            Duration::ZERO
        } else {
            TEXT_TIMEOUT
        }
    }

    /// Counts a check with the text that was received for it, and returns what is known about the client.
    pub fn check(&mut self, peer: Peer, text: &[u8], now: Instant) -> Known {
        let text = bounded(String::from_utf8_lossy(text).trim(), MAX_TEXT_BYTES);
        self.clients
            .retain(|client| now.saturating_duration_since(client.last) < FORGET_AFTER);
        let same = |client: &Client| client.peer == peer && client.text == text;
        let Some(client) = self.clients.iter_mut().find(|client| same(client)) else {
            if self.clients.len() == MAX_CLIENTS {
                let oldest = (0..MAX_CLIENTS).min_by_key(|index| self.clients[*index].last);
                self.clients.swap_remove(oldest.unwrap_or(0));
            }
            let client = Client {
                peer,
                text,
                is_late: false,
                checks: 1,
                last: now,
                intervals: VecDeque::with_capacity(INTERVALS),
            };
            let weight = client.weight();
            self.clients.push(client);
            return Known {
                weight,
                is_fast: false,
            };
        };
        if client.intervals.len() == INTERVALS {
            client.intervals.pop_front();
        }
        client
            .intervals
            .push_back(now.saturating_duration_since(client.last));
        client.last = now;
        client.checks += 1;
        Known {
            weight: client.weight(),
            is_fast: client.is_fast(),
        }
    }

    /// The client sent its text after the reply.
    pub fn text_was_late(&mut self, peer: Peer) {
        for client in &mut self.clients {
            client.is_late |= client.peer == peer;
        }
    }

    pub fn to_json(&self, now: Instant) -> Value {
        let clients = self.clients.iter().map(|client| {
            let age = now.saturating_duration_since(client.last);
            let mut object = json!({
                "from": client.peer.to_string(),
                "sent": client.text,
                "checks": client.checks,
                "last_age_ns": age.as_nanos() as u64,
            });
            if let Some(interval) = client.interval() {
                object["interval_ns"] = (interval.as_nanos() as u64).into();
            }
            if let Some(weight) = client.weight() {
                object["weight"] = weight.into();
            }
            object
        });
        clients.collect()
    }

    pub fn warnings(&self, now: Instant) -> Vec<Warning> {
        let Some(last) = self.clients.iter().max_by_key(|client| client.last) else {
            let is_overdue = now.saturating_duration_since(self.began) > FIRST_CHECK_TIMEOUT;
            let warning = Warning::new(
                "no_checks",
                "HAProxy has not checked yet",
                "HAProxy must be running, and the server line must have `agent-check agent-addr ADDRESS agent-port PORT` with this adapter's address; if any server line has `agent-send`, every server line with an agent-check needs it",
            );
            return is_overdue.then_some(warning).into_iter().collect();
        };
        if last.is_silent(now) {
            let silent = now.saturating_duration_since(last.last);
            return vec![Warning::new(
                "checks_stopped",
                format!(
                    "HAProxy at {} has not checked for {}: it keeps the last reply",
                    last.peer,
                    words(silent)
                ),
                "HAProxy must be running with this agent-check enabled (`enable agent BACKEND/SERVER` on its stats socket)",
            )];
        }
        let active = self.clients.iter().filter(|client| !client.is_silent(now));
        active
            .flat_map(|client| client.warnings(self.sets_weight))
            .collect()
    }
}

impl Client {
    fn warnings(&self, sets_weight: bool) -> Vec<Warning> {
        let mut warnings = Vec::new();
        let name = match self.text.as_str() {
            "" => self.peer.to_string(),
            text => format!("{} ({text})", self.peer),
        };
        if let Some(interval) = self.interval().filter(|interval| *interval > MAX_INTERVAL) {
            let reply = if sets_weight {
                "the reply is always 100%"
            } else {
                "maxconn follows only the concurrency limit, not the admit ratio"
            };
            warnings.push(Warning::new(
                "slow_checks",
                format!(
                    "HAProxy at {name} checks every {}: too slow to follow an overload, so {reply}",
                    words(interval)
                ),
                "set `agent-inter 200ms` in the server line",
            ));
        }
        if !sets_weight {
            return warnings;
        }
        match self.weight() {
            None => warnings.push(Warning::new(
                "weight_unknown",
                format!(
                    "HAProxy at {name} does not declare the server's weight: at the default, 1, any percentage below 100 would stop all traffic, so the reply is always 100%"
                ),
                "set `weight 100 agent-send \"weight=100\\n\"` in the server line",
            )),
            Some(weight) if weight * MIN_PERCENT < 100 => warnings.push(Warning::new(
                "coarse_weight",
                format!(
                    "HAProxy at {name} gives the server the weight {weight}: the reply is never below {}%",
                    min_percent(weight)
                ),
                "set `weight 100 agent-send \"weight=100\\n\"` in the server line, and raise the weights of the other servers in proportion",
            )),
            Some(_) => {}
        }
        warnings
    }
}

/// The lowest percentage that leaves at least 1 of this weight. HAProxy rounds down, and sends nothing to a weight of 0.
pub fn min_percent(weight: u32) -> u32 {
    100_u32.div_ceil(weight)
}

fn words(time: Duration) -> String {
    duration(time.as_nanos() as u64)
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Process(Some(pid)) => write!(f, "PID {pid}"),
            Self::Process(None) => f.write_str("a unix socket"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LB1: Peer = Peer::Process(Some(1));
    const LB2: Peer = Peer::Process(Some(2));

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn codes(checks: &AgentChecks, now: Instant) -> Vec<&'static str> {
        let warnings = checks.warnings(now);
        warnings.iter().map(|warning| warning.code).collect()
    }

    #[test]
    fn a_client_that_checks_often_and_declares_its_weight_is_fully_known() {
        let began = Instant::now();
        let mut checks = AgentChecks::new(true, began);
        let first = checks.check(LB1, b"weight=100\n", began);
        assert_eq!((first.weight, first.is_fast), (Some(100), false));
        for turn in 1..6 {
            let known = checks.check(LB1, b"weight=100\n", began + ms(200) * turn);
            assert_eq!((known.weight, known.is_fast), (Some(100), turn > 1));
        }
        let now = began + ms(1_100);
        assert_eq!(codes(&checks, now), [""; 0]);
        // One late check changes nothing.
        assert!(
            checks
                .check(LB1, b"weight=100\n", began + ms(3_000))
                .is_fast
        );
        let list = checks.to_json(began + ms(3_100));
        assert_eq!(list[0]["interval_ns"], 200_000_000);
        assert_eq!(list[0]["last_age_ns"], 100_000_000);
        assert_eq!(codes(&checks, began + ms(9_000)), ["checks_stopped"]);
    }

    #[test]
    fn a_slow_or_undeclared_client_is_reported_with_the_line_that_fixes_it() {
        let began = Instant::now();
        let mut checks = AgentChecks::new(true, began);
        assert_eq!(codes(&checks, began + ms(1_000)), [""; 0]);
        assert_eq!(codes(&checks, began + ms(16_000)), ["no_checks"]);
        for turn in 0..6 {
            let known = checks.check(LB1, b"", began + ms(10_000) * turn);
            assert_eq!(known, Known::default());
        }
        let now = began + ms(50_100);
        assert_eq!(codes(&checks, now), ["slow_checks", "weight_unknown"]);
        let warnings = checks.warnings(now);
        assert!(
            warnings[0].text.contains("checks every 10 s"),
            "{warnings:?}"
        );
        assert!(warnings[0].remedy.contains("agent-inter 200ms"));
        assert!(warnings[1].remedy.contains("weight 100 agent-send"));
        // With maxconn, the weight does not matter.
        checks.sets_weight = false;
        assert_eq!(codes(&checks, now), ["slow_checks"]);
        checks.sets_weight = true;
        // Another HAProxy is judged by itself.
        for turn in 0..3 {
            checks.check(LB2, b"weight=10 lb2", now + ms(200) * turn);
        }
        let now = now + ms(400);
        assert!(checks.check(LB2, b"weight=10 lb2", now).is_fast);
        let codes = codes(&checks, now);
        assert_eq!(codes, ["slow_checks", "weight_unknown", "coarse_weight"]);
    }

    #[test]
    fn two_slow_clients_at_one_address_do_not_look_like_a_fast_one() {
        let began = Instant::now();
        let mut checks = AgentChecks::new(true, began);
        for turn in 0..10 {
            checks.check(LB1, b"weight=100", began + ms(2_000) * turn);
            let known = checks.check(LB1, b"weight=100", began + ms(2_000) * turn + ms(100));
            assert!(!known.is_fast, "in turn {turn}");
        }
    }

    #[test]
    fn only_a_weight_that_haproxy_accepts_is_taken() {
        for (text, weight) in [
            ("weight=100\n", Some(100)),
            ("lb1 weight=256", Some(256)),
            ("weight=0", None),
            ("weight=257", None),
            ("weight=-1", None),
            ("weight=", None),
            ("100", None),
            ("\u{1b}[2J\u{0}", None),
        ] {
            let now = Instant::now();
            let mut checks = AgentChecks::new(true, now);
            let known = checks.check(LB1, text.as_bytes(), now);
            assert_eq!(known.weight, weight, "{text:?}");
        }
        assert_eq!([1, 3, 10, 100, 256].map(min_percent), [100, 34, 10, 1, 1]);
    }

    #[test]
    fn the_text_is_waited_for_only_where_one_may_come() {
        let now = Instant::now();
        let mut checks = AgentChecks::new(true, now);
        assert_eq!(checks.text_timeout(LB1), TEXT_TIMEOUT);
        checks.check(LB1, b"", now);
        assert_eq!(checks.text_timeout(LB1), Duration::ZERO);
        checks.text_was_late(LB1);
        assert_eq!(checks.text_timeout(LB1), LATE_TEXT_TIMEOUT);
        assert_eq!(checks.text_timeout(LB2), TEXT_TIMEOUT);
        checks.check(LB2, b"weight=100", now);
        assert_eq!(checks.text_timeout(LB2), LATE_TEXT_TIMEOUT);
        // Another one at its address sends none.
        checks.check(LB2, b"", now);
        assert_eq!(checks.text_timeout(LB2), TEXT_TIMEOUT);
    }

    #[test]
    fn the_next_process_knows_the_clients_of_the_previous_one() {
        let began = Instant::now();
        let peer = Peer::Address([127, 0, 0, 1].into());
        let mut previous = AgentChecks::new(true, began);
        for turn in 0..4 {
            previous.check(peer, b"weight=100", began + ms(200) * turn);
        }
        let mut next = AgentChecks::new(true, began);
        next.restore(&previous.to_json(began + ms(700)), began + ms(700));
        // Although its first check is late.
        let known = next.check(peer, b"weight=100", began + ms(2_000));
        assert_eq!((known.weight, known.is_fast), (Some(100), true));
        for garbage in [
            json!(null),
            json!([1, {"from": 7}]),
            json!([{"from": "x", "last_age_ns": -1}]),
        ] {
            let mut next = AgentChecks::new(true, began);
            next.restore(&garbage, began);
            assert!(next.clients.is_empty(), "{garbage}");
        }
    }

    #[test]
    fn the_number_of_clients_and_their_texts_are_bounded() {
        let began = Instant::now();
        let mut checks = AgentChecks::new(true, began);
        for turn in 0..100_u32 {
            let text = format!("{turn}{}", "x".repeat(1_000));
            checks.check(LB1, text.as_bytes(), began + ms(1) * turn);
        }
        assert_eq!(checks.clients.len(), MAX_CLIENTS);
        let longest = checks.clients.iter().map(|client| client.text.len()).max();
        assert!(longest <= Some(MAX_TEXT_BYTES));
        checks.check(LB1, b"", began + FORGET_AFTER + ms(100));
        assert_eq!(checks.clients.len(), 1);
    }
}
