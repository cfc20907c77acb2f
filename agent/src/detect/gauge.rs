//! How a queue stands, in a few numbers: what is signalled is made from these.

use super::track::Verdict;
use crate::{
    event::Level,
    ewma::ewma,
    queue::{RESPONSES_PER_S, Reading, UTILIZATION},
};

/// What is told of a walk alone is evened out over about so long.
const OVER_NS: f64 = 1e9;

/// One queue as of its last reading.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Gauge {
    /// CLOCK_MONOTONIC of that reading, ns.
    pub at_ns: u64,
    pub level: Level,
    pub score: f64,
    pub depth: u64,
    pub limit: Option<u64>,
    /// The delay that counts against the queue now, ns; the delay that stands (never less for a while); the one that is fine.
    pub delay_ns: u64,
    pub standing_delay_ns: u64,
    pub target_delay_ns: u64,
    /// The delay that is fine was set by who knows better.
    pub is_target_configured: bool,
    /// Of the work that waits: the age that 99% of it has not reached, and that of the oldest, ns.
    pub p99_ns: Option<u64>,
    pub oldest_age_ns: Option<u64>,
    /// The age that half of it has not reached, ns; `None` where ages are not known, or nothing waits.
    pub median_age_ns: Option<u64>,
    /// How long what leaves now has waited, ns.
    pub wait_ns: Option<u64>,
    /// Of what does the work, the share that is at work.
    pub utilization: Option<f64>,
    /// Per second, over the last second or so.
    pub arrivals_per_s: Option<f64>,
    pub departures_per_s: Option<f64>,
    /// Answered per second, hidden ones too, where it can be told; over the last second or so.
    pub responses_per_s: Option<f64>,
    /// The counts below hold what the last reading added: arrivals and departures were known.
    pub is_counted: bool,
    /// Counts since the queue is watched.
    pub arrivals: u64,
    pub departures: u64,
    pub losses: u64,
    /// `None`: not filling, or no limit.
    pub time_to_full_ns: Option<u64>,
}

impl Gauge {
    pub(super) fn read(&mut self, at_ns: u64, reading: &Reading, verdict: &Verdict) {
        // Oldest first.
        let p99_ns = reading.ages_ns.get(reading.ages_ns.len() / 100).copied();
        let responses_per_s = match (self.responses_per_s, reading.extra(RESPONSES_PER_S)) {
            (Some(mean), Some(now)) => {
                let passed_ns = at_ns.saturating_sub(self.at_ns);
                Some(ewma(mean, passed_ns, OVER_NS, now))
            }
            (mean, now) => now.or(mean),
        };
        *self = Self {
            at_ns,
            responses_per_s,
            level: verdict.level,
            score: verdict.score,
            depth: reading.depth,
            limit: reading.limit,
            delay_ns: verdict.delay_ns,
            standing_delay_ns: verdict.standing_delay_ns,
            target_delay_ns: verdict.target_delay_ns,
            is_target_configured: verdict.is_target_configured,
            p99_ns,
            oldest_age_ns: reading.oldest_age_ns,
            median_age_ns: reading.ages_ns.get(reading.ages_ns.len() / 2).copied(),
            wait_ns: reading.wait_ns,
            utilization: reading.extra(UTILIZATION),
            arrivals_per_s: verdict.rates.map(|rates| rates.arrivals),
            departures_per_s: verdict.rates.map(|rates| rates.departures),
            is_counted: reading.arrivals.is_some() && reading.departures.is_some(),
            arrivals: self.arrivals.saturating_add(reading.arrivals.unwrap_or(0)),
            departures: self
                .departures
                .saturating_add(reading.departures.unwrap_or(0)),
            losses: self.losses.saturating_add(reading.losses),
            time_to_full_ns: verdict.time_to_full_ns,
        };
    }
}
