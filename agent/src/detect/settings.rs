//! When a queue counts as saturated. Every number here can be set, for all queues, for a kind, or for one queue.

use serde::{Deserialize, Serialize};

const MS: u64 = 1_000_000;

/// Thresholds of one queue.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The standing delay that is fine, ns. `None`: half the service time, between the two bounds below.
    pub target_delay_ns: Option<u64>,
    pub target_delay_min_ns: u64,
    pub target_delay_max_ns: u64,
    /// Score at which the level is entered.
    pub warn: f64,
    pub critical: f64,
    /// Part of the entry score below which the level is left.
    pub leave: f64,
    /// A queue is standing when it did not empty for so long (or for ten service times, up to `window_max_ns`).
    pub window_ns: u64,
    pub window_max_ns: u64,
    /// How long the fill must hold before it counts.
    pub dwell_ns: u64,
    /// How long the score must stay low before the level is left.
    pub clear_ns: u64,
    /// Parts of a long stretch, and the standing of a long episode, are told so often.
    pub repeat_interval_ns: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            target_delay_ns: None,
            target_delay_min_ns: 5 * MS,
            target_delay_max_ns: 500 * MS,
            warn: 0.7,
            critical: 0.9,
            leave: 0.5,
            window_ns: 1_000 * MS,
            window_max_ns: 5_000 * MS,
            dwell_ns: 300 * MS,
            clear_ns: 1_500 * MS,
            repeat_interval_ns: 30_000 * MS,
        }
    }
}
