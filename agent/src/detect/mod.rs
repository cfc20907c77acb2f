//! Turns the readings of each queue into levels, episodes and incidents. Pure: no clock, no I/O.
//!
//! `track` follows one queue: it computes the score and decides the level. `delay` defines which delay counts, one type per way
//! of judging. `baseline` and `cold_start` serve the queues that are compared with their own past. `episode` holds an episode
//! while it is open, `detector` all queues, and `incidents` the episodes that belong together. `gauge` is a queue's state in a few
//! numbers, for the signals. The other modules are the statistics they use (a sliding minimum, rates and their baseline, the
//! service time, a linear trend, series and quantiles in bounded memory), the settings, the ids, and the advice.
#![forbid(unsafe_code)]

mod advice;
mod baseline;
mod cold_start;
mod delay;
mod detector;
mod episode;
mod forecast;
mod gauge;
mod id;
mod incidents;
mod rates;
mod series;
mod service_time;
mod settings;
mod stalls;
mod track;
mod window;

pub use baseline::is_deep;
pub use cold_start::Waiting;
pub use detector::{Detector, SettingsFor, TargetContext};
pub use gauge::Gauge;
pub use incidents::Neighbours;
pub use settings::Settings;
