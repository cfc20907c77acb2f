//! The state of a queue in a few numbers, from which the signals are made.

use super::track::Assessment;
use crate::{
    event::Level,
    ewma::Ewma,
    queue::{RESPONSE_BYTES_PER_S, RESPONSES_PER_S, Reading, UTILIZATION},
};

/// Time constant of the response rate, ns. Only full scans report it, so a single value is noisy.
const RESPONSE_RATE_TIME_CONSTANT_NS: f64 = 1e9;

/// A queue as of its last reading.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Gauge {
    /// CLOCK_MONOTONIC of that reading, ns.
    pub at_ns: u64,
    pub level: Level,
    /// 0 to 1; above 1 if the delay is beyond what counts as full.
    pub score: f64,
    /// In the unit of the kind, or in `unit`; like `limit`.
    pub depth: u64,
    pub limit: Option<u64>,
    /// Where it differs from that of the kind.
    pub unit: Option<&'static str>,
    /// See [`Reading::fill`].
    pub fill: Option<f64>,
    /// The delay that counts against the queue now, ns.
    pub delay_ns: u64,
    /// The minimum of that delay over the detection window, ns.
    pub standing_delay_ns: u64,
    /// The acceptable standing delay, ns.
    pub target_delay_ns: u64,
    /// The target delay is from the configuration.
    pub is_target_configured: bool,
    /// 99th percentile, maximum and median of the ages of the waiting items, ns; `None` if the ages are unknown or nothing waits.
    pub p99_ns: Option<u64>,
    pub oldest_age_ns: Option<u64>,
    pub median_age_ns: Option<u64>,
    /// Estimated queueing delay now, ns: measured, or by Little's law.
    pub wait_ns: Option<u64>,
    /// Utilization of the workers, event loop or CPUs that this queue describes, 0 to 1.
    pub utilization: Option<f64>,
    /// Over the last second, in the unit of the depth.
    pub arrivals_per_s: Option<f64>,
    pub departures_per_s: Option<f64>,
    /// Averaged over about a second. Includes requests that arrived and were answered between two samples.
    pub responses_per_s: Option<f64>,
    /// Bytes of these responses, averaged likewise.
    pub response_bytes_per_s: Option<f64>,
    /// The last reading knew arrivals and departures, so the counts below include it.
    pub is_counted: bool,
    /// Counts since the queue was first observed.
    pub arrivals: u64,
    pub departures: u64,
    pub losses: u64,
    /// `None`: not filling, or without a limit.
    pub time_to_full_ns: Option<u64>,
}

/// The median of sorted values: of an even number, the mean of the middle two.
fn median(sorted: &[u64]) -> Option<u64> {
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get(sorted.len().saturating_sub(1) / 2)?;
    Some(lower.midpoint(upper))
}

impl Gauge {
    pub(super) fn read(&mut self, at_ns: u64, reading: &Reading, assessment: &Assessment) {
        let elapsed_ns = at_ns.saturating_sub(self.at_ns);
        let averaged = |mean: Option<f64>, key: &str| match (mean, reading.extra(key)) {
            (Some(mean), Some(now)) => {
                let mut rate = Ewma::new(mean, RESPONSE_RATE_TIME_CONSTANT_NS);
                rate.update(now, elapsed_ns);
                Some(rate.value())
            }
            (mean, now) => now.or(mean),
        };
        // Ages are sorted, the oldest first.
        let ages = &reading.ages_ns;
        let total = |before: u64, added: Option<u64>| before.saturating_add(added.unwrap_or(0));
        *self = Self {
            at_ns,
            level: assessment.level,
            score: assessment.score,
            depth: reading.depth,
            limit: reading.limit,
            unit: reading.unit,
            fill: reading.fill,
            delay_ns: assessment.delay_ns,
            standing_delay_ns: assessment.standing_delay_ns,
            target_delay_ns: assessment.target_delay_ns,
            is_target_configured: assessment.is_target_configured,
            p99_ns: ages.get(ages.len() / 100).copied(),
            oldest_age_ns: reading.oldest_age_ns,
            median_age_ns: median(ages),
            wait_ns: reading.wait_ns,
            utilization: reading.extra(UTILIZATION),
            arrivals_per_s: assessment.rates.map(|rates| rates.arrivals),
            departures_per_s: assessment.rates.map(|rates| rates.departures),
            responses_per_s: averaged(self.responses_per_s, RESPONSES_PER_S),
            response_bytes_per_s: averaged(self.response_bytes_per_s, RESPONSE_BYTES_PER_S),
            is_counted: reading.arrivals.is_some() && reading.departures.is_some(),
            arrivals: total(self.arrivals, reading.arrivals),
            departures: total(self.departures, reading.departures),
            losses: total(self.losses, Some(reading.losses)),
            time_to_full_ns: assessment.time_to_full_ns,
        };
    }
}
