//! The detection thresholds of one queue. Each can be configured for all queues, for a kind, or for one queue.

use serde::{Deserialize, Serialize};

const MS: u64 = 1_000_000;

/// Thresholds of one queue.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The standing delay that is acceptable, ns (CoDel's target). `None`: half the service time, between the two bounds below.
    pub target_delay_ns: Option<u64>,
    pub target_delay_min_ns: u64,
    pub target_delay_max_ns: u64,
    /// Scores at which the levels warn and critical are entered.
    pub warn: f64,
    pub critical: f64,
    /// Hysteresis: a level is left when the score falls below this fraction of its entry score.
    pub exit_ratio: f64,
    /// A queue is standing if it has not been empty for this long, or for ten service times (up to `window_max_ns`).
    pub window_ns: u64,
    pub window_max_ns: u64,
    /// How long the fill ratio has to hold before it counts, ns.
    pub dwell_ns: u64,
    /// How long the score has to stay low before the level is left, ns.
    pub clear_after_ns: u64,
    /// How often an open episode and its level are reported again, ns.
    pub repeat_interval_ns: u64,
}

impl Default for Settings {
    /// The 5 ms minimum is CoDel's target (RFC 8289, section 4.3); the other values are those at which the recorded incidents and
    /// the scenarios are detected early and healthy services are not.
    fn default() -> Self {
        Self {
            target_delay_ns: None,
            target_delay_min_ns: 5 * MS,
            target_delay_max_ns: 500 * MS,
            warn: 0.7,
            critical: 0.9,
            exit_ratio: 0.5,
            window_ns: 1_000 * MS,
            window_max_ns: 5_000 * MS,
            dwell_ns: 300 * MS,
            clear_after_ns: 1_500 * MS,
            repeat_interval_ns: 30_000 * MS,
        }
    }
}
