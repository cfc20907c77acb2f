//! What a diagnosis says.

use std::sync::Arc;

use serde::Serialize;

use super::{Activity, DrivenBy, Instant, explain::Explanation};
use crate::{cause::Cause, queue::QueueKey, sample::TargetId};

/// Why one queue fills.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    pub cause: Cause,
    /// Share of the workers' wall time that speaks for the cause, 0 to 1; `None` where it is not told by time.
    pub share: Option<f64>,
    pub confidence: Confidence,
    /// What else it may be, with its share.
    pub runner_up: Option<(Cause, f64)>,
    pub driven_by: DrivenBy,
    /// What stands at the head of the jam.
    pub culprit: Option<Culprit>,
    /// What the culprit is busy with: the cause at the end of the path, where that is another process's.
    pub root: Option<Cause>,
    /// From the queue's own process to the head of the jam. At least one hop.
    pub path: Vec<Hop>,
    /// What the workers' wall time went into, largest first; adds up to 1. Empty where nothing was sampled.
    pub shares: Vec<(Activity, f64)>,
    /// Thread samples that the shares are made of.
    pub samples: u64,
    /// One sentence with numbers.
    pub evidence: String,
    /// What to do: the parameter, its present value, what would be enough.
    pub advice: String,
    /// What the target's own log said meanwhile.
    pub messages: Vec<LoggedMessage>,
    /// Every rule with the numbers that decided; `None` unless asked for.
    pub explanation: Option<Arc<Explanation>>,
}

impl Verdict {
    /// Whether both name the same cause, and the same at the head of the jam.
    pub(crate) fn names_as(&self, other: &Self) -> bool {
        let who = |verdict: &Self| {
            let culprit = verdict.culprit.as_ref()?;
            Some((culprit.kind, culprit.pid, culprit.endpoint.clone()))
        };
        self.cause == other.cause && self.root == other.root && who(self) == who(other)
    }
}

/// How far a verdict can be trusted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Confidence {
    /// A suspicion.
    #[default]
    Low,
    Medium,
    High,
}

impl Confidence {
    /// The word used in every output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

/// What a culprit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CulpritKind {
    Process,
    Thread,
    /// A control group: a container, a unit.
    Cgroup,
    /// Another machine's, or one that is not seen.
    Endpoint,
    Lock,
    File,
    /// A parameter.
    Limit,
}

impl CulpritKind {
    /// The word used in every output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Thread => "thread",
            Self::Cgroup => "cgroup",
            Self::Endpoint => "endpoint",
            Self::Lock => "lock",
            Self::File => "file",
            Self::Limit => "limit",
        }
    }
}

/// What stands at the head of the jam. What is not known is absent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Culprit {
    pub kind: CulpritKind,
    pub target: Option<TargetId>,
    pub pid: Option<u32>,
    /// In words: `postgres (812)`, `thread worker-3 (815)`, `/var/lib/db/wal on 254:0`.
    pub name: String,
    pub endpoint: Option<String>,
    pub container: Option<String>,
}

impl Culprit {
    /// Of which nothing more is known.
    pub(crate) fn named(kind: CulpritKind, name: String) -> Self {
        Self {
            kind,
            target: None,
            pid: None,
            name,
            endpoint: None,
            container: None,
        }
    }
}

/// One step from the queue to the head of the jam.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    pub target: Option<TargetId>,
    pub pid: Option<u32>,
    /// `uwsgi (4711)`
    pub name: String,
    /// What it is busy with, in words: `waits for 127.0.0.1:5432`.
    pub what: String,
    /// The cause, seen from this hop.
    pub cause: Cause,
}

/// A message of the target's own, counted over the episode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedMessage {
    /// Its name in the table of messages.
    pub name: String,
    pub path: String,
    pub count: u64,
    /// The first such line.
    pub line: String,
    /// Wall clock when it was first seen, ns since 1970.
    pub first_unix_ns: u64,
    /// From the warning to that, ns; negative where the target was first.
    pub lead_ns: Option<i64>,
}

/// A stretch of an episode in which one cause held, or a part of it while it lasts.
#[derive(Clone, Debug)]
pub struct CauseStretch {
    pub episode: String,
    pub incident: String,
    pub key: Arc<QueueKey>,
    pub verdict: Arc<Verdict>,
    pub from: Instant,
    pub to: Instant,
    /// Counts the stretches of this episode from 0: no two have the same.
    pub index: u32,
}
