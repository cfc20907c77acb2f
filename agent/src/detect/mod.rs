//! Levels, episodes and incidents out of the readings of each queue. Pure: no clock, no I/O.
//!
//! `track` follows one queue and decides its level; `running` is an episode while it lasts; `detector` holds all of them
//! and `incidents` those episodes that belong together. `cold_start` judges a queue before anything is usual for it. `gauge` is
//! how a queue stands, in a few numbers, for those who signal it. The rest are the measures that they take: a sliding minimum,
//! rates and what they usually are, a trend, a course in bounded memory.
#![forbid(unsafe_code)]

mod advice;
mod baseline;
mod cold_start;
mod detector;
mod episode;
mod forecast;
mod gauge;
mod id;
mod incidents;
mod rates;
mod series;
mod settings;
mod track;
mod window;

pub use cold_start::Waiting;
pub use detector::{Around, Detector, SettingsFor};
pub use gauge::Gauge;
pub use incidents::Neighbours;
pub use settings::Settings;
