//! The pipeline's output as plain types: levels, episodes, verdicts, and the events that carry them.
//!
//! `detect` fills in levels and episodes, `diagnose` adds verdicts, and every output is rendered from these events alone. The
//! types come before both steps, so that neither has to import the other. No behaviour, no clock, no I/O.
#![forbid(unsafe_code)]

mod activity;
pub mod explain;
mod verdict;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use activity::{Activity, share_of};
pub use verdict::{CauseStretch, Confidence, Culprit, CulpritKind, Hop, LoggedMessage, Verdict};

use crate::{
    cause::Cause,
    queue::{Kind, QueueKey, Reading},
    sample::{AgentReport, Notice, Target, TargetId, WaitParty},
};

/// How saturated a queue is.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    #[default]
    Ok,
    Warn,
    Critical,
    /// At the limit, or losing work.
    Full,
}

impl Level {
    /// The word used in every output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Critical => "critical",
            Self::Full => "full",
        }
    }
}

/// What drives an episode: more arrivals or fewer departures than the baseline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DrivenBy {
    Producer,
    Consumer,
    Both,
    #[default]
    Unknown,
}

impl DrivenBy {
    /// The word used in every output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Producer => "producer",
            Self::Consumer => "consumer",
            Self::Both => "both",
            Self::Unknown => "unknown",
        }
    }
}

/// A moment on two clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant {
    /// CLOCK_MONOTONIC, ns; for durations.
    pub mono_ns: u64,
    /// Wall clock, ns since 1970; for people and traces.
    pub unix_ns: u64,
}

/// A queue after one reading.
#[derive(Clone, Debug)]
pub struct QueueState {
    pub at: Instant,
    pub key: Arc<QueueKey>,
    pub reading: Reading,
    /// 1 is saturated; may exceed 1.
    pub score: f64,
    pub level: Level,
    /// Per second, over the last second, in the unit of the depth.
    pub arrivals_per_s: Option<f64>,
    pub departures_per_s: Option<f64>,
    /// `None`: not filling, or no limit.
    pub time_to_full_ns: Option<u64>,
}

/// One queue from the moment it leaves ok until it has recovered.
#[derive(Clone, Debug)]
pub struct Episode {
    /// 16 hexadecimal digits, the same in every output.
    pub id: String,
    pub incident: String,
    pub key: Arc<QueueKey>,
    /// When the score last rose above its onset threshold (half the warning score) before the queue left ok.
    pub onset: Instant,
    /// When the queue left ok.
    pub start: Instant,
    /// Now, or when it returned to ok.
    pub end: Instant,
    pub ongoing: bool,
    pub level_max: Level,
    pub score_max: f64,
    /// At the last sample.
    pub depth: u64,
    pub depth_max: u64,
    /// Share of its samples in which the queue was empty, 0 to 1.
    pub empty_share: f64,
    pub limit: Option<u64>,
    /// See [`Reading::unit`](crate::queue::Reading::unit).
    pub unit: &'static str,
    pub wait_p50_ns: Option<u64>,
    pub wait_p99_ns: Option<u64>,
    pub wait_max_ns: Option<u64>,
    /// `None` if they were unknown at some point.
    pub arrivals: Option<u64>,
    pub departures: Option<u64>,
    pub losses: u64,
    /// Mean over the episode, per second.
    pub arrival_rate: Option<f64>,
    pub service_rate: Option<f64>,
    /// Before the onset.
    pub baseline_arrival_rate: Option<f64>,
    pub baseline_service_rate: Option<f64>,
    pub driven_by: DrivenBy,
    /// The forecast when the episode opened, ns.
    pub time_to_full_ns: Option<u64>,
    /// From opening to full, ns, if it became full.
    pub lead_ns: Option<u64>,
    pub worst: Option<String>,
    /// Depth over the episode: at most 60 values, evenly spaced in time.
    pub depths: Vec<u64>,
    /// The decisive numbers in one sentence.
    pub evidence: String,
    /// What to do about it.
    pub advice: String,
    /// Why the queue fills. Absent until its threads have been sampled.
    pub verdict: Option<Arc<Verdict>>,
    /// Level changes, losses, forecasts and causes, in order.
    pub moments: Vec<Moment>,
    /// Moments that were not kept because there were too many.
    pub moments_dropped: u32,
    /// Empty if no hooks are attached.
    pub measured_waits: Vec<MeasuredWaits>,
}

/// Waits of a service's threads during an episode, as hooks measured them one by one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeasuredWaits {
    pub kind: MeasuredKind,
    pub count: u64,
    pub mean_ns: u64,
    pub p50_ns: u64,
    pub p99_ns: u64,
    pub max_ns: u64,
    /// Of the longest wait for a CPU: the thread that had it, and for how long during the wait, ns.
    pub culprit: Option<(WaitParty, u64)>,
}

/// What threads waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MeasuredKind {
    Cpu,
    Io,
}

impl Episode {
    /// The depth is below half of its maximum: the cause is over or is easing.
    pub fn is_draining(&self) -> bool {
        self.depth < self.depth_max / 2
    }
}

/// Something that happened within an episode; a span event in traces.
#[derive(Clone, Debug)]
pub struct Moment {
    pub at: Instant,
    pub kind: MomentKind,
}

/// See [`Moment`].
#[derive(Clone, Debug)]
pub enum MomentKind {
    /// `level.warn`, `level.critical`, `level.full`.
    Level(Level),
    /// `loss`, with the count.
    Loss(u64),
    /// `forecast.full`, with the time left, ns.
    Forecast(u64),
    /// `cause.changed`.
    Cause(Cause),
    /// `recovered`.
    Recovered,
}

/// A stretch of an episode at one level; a long one is reported in parts.
#[derive(Clone, Debug)]
pub struct Stretch {
    pub episode: String,
    pub incident: String,
    pub key: Arc<QueueKey>,
    pub level: Level,
    pub from: Instant,
    pub to: Instant,
    /// Number of the stretch within its episode, from 0.
    pub index: u32,
    pub depth_max: u64,
    pub limit: Option<u64>,
    pub score_max: f64,
    pub wait_max_ns: Option<u64>,
    pub losses: u64,
    pub time_to_full_ns: Option<u64>,
}

/// An output of the pipeline.
#[derive(Clone, Debug)]
pub enum Event {
    /// The watched services changed; all of them are listed.
    Targets {
        at: Instant,
        targets: Vec<Arc<Target>>,
    },
    /// A notice about the agent itself.
    Notice { at: Instant, notice: Notice },
    /// The state of a queue after a sample, if that was asked for.
    Queue(QueueState),
    /// The first episode of a target that had none.
    IncidentOpened {
        /// The trace id, 32 hexadecimal digits.
        id: String,
        target: TargetId,
        /// The onset in the queue that opened it.
        onset: Instant,
        at: Instant,
        /// The kind of that queue.
        first: Kind,
    },
    /// A queue left ok. Its `Level` event follows.
    EpisodeOpened(Box<Episode>),
    /// The level of a queue changed.
    Level {
        state: QueueState,
        from: Level,
        to: Level,
        episode: String,
    },
    /// A level was left, or has lasted long enough to report a part of it.
    Stretch(Stretch),
    /// A cause held during this stretch, or has held until now.
    Cause(Box<CauseStretch>),
    /// An episode as of now (`ongoing`), or after its end.
    Episode(Box<Episode>),
    /// All episodes of the incident have ended.
    IncidentClosed {
        id: String,
        target: TargetId,
        at: Instant,
    },
    /// What the agent did, and its own cost.
    Agent { at: Instant, report: AgentReport },
}
