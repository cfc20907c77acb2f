//! The result of a diagnosis: cause, culprit, evidence and advice.

use std::sync::Arc;

use serde::Serialize;

use super::{Activity, DrivenBy, Instant, explain::Explanation};
use crate::{cause::Cause, queue::QueueKey, sample::TargetId};

/// Why one queue fills.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    pub cause: Cause,
    /// Share of the workers' wall time that supports the cause, 0 to 1. `None`: a fact decided, not time.
    pub share: Option<f64>,
    pub confidence: Confidence,
    /// The next best cause, with its share.
    pub runner_up: Option<(Cause, f64)>,
    pub driven_by: DrivenBy,
    /// Who or what is at the end of the wait chain.
    pub culprit: Option<Culprit>,
    /// The root cause: the cause at the last hop of the path, if the path has several hops.
    pub root: Option<Cause>,
    /// The wait chain, from the queue's own process to the culprit. At least one hop if anything was sampled.
    pub path: Vec<Hop>,
    /// What the workers' wall time went into, largest first; adds up to 1. Empty if nothing was sampled.
    pub shares: Vec<(Activity, f64)>,
    /// Thread samples that the shares are made of.
    pub samples: u64,
    /// The facts that decided, with numbers, in one sentence.
    pub evidence: String,
    /// What to do: the parameter, its present value, what would be enough.
    pub advice: String,
    /// Messages in the service's own log since the first sign of the episode.
    pub messages: Vec<LoggedMessage>,
    /// Every rule with the numbers that decided; `None` unless asked for.
    pub explanation: Option<Arc<Explanation>>,
}

impl Verdict {
    /// Whether both name the same cause, root cause and culprit.
    pub(crate) fn names_as(&self, other: &Self) -> bool {
        let who = |verdict: &Self| {
            let culprit = verdict.culprit.as_ref()?;
            Some((culprit.kind, culprit.pid, culprit.endpoint.clone()))
        };
        self.cause == other.cause && self.root == other.root && who(self) == who(other)
    }
}

/// How certain a verdict is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Confidence {
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
    /// An address on another machine, or one whose process is not visible.
    Endpoint,
    Lock,
    File,
    /// A configuration parameter: a backlog, a number of workers.
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

/// Who or what is at the end of the wait chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Culprit {
    pub kind: CulpritKind,
    pub target: Option<TargetId>,
    pub pid: Option<u32>,
    /// For people: `postgres (812)`, `thread worker-3 (815)`, `/var/lib/db/wal on 254:0`.
    pub name: String,
    pub endpoint: Option<String>,
    pub container: Option<String>,
}

impl Culprit {
    /// A culprit with nothing but a name.
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

/// One hop of the wait chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    pub target: Option<TargetId>,
    pub pid: Option<u32>,
    /// `uwsgi (4711)`
    pub name: String,
    /// Its main activity, for people: `97% waiting for 127.0.0.1:5432`.
    pub state: String,
    /// The cause that this activity suggests; on the first hop, the verdict.
    pub cause: Cause,
}

/// A message in the service's own log, counted over the episode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedMessage {
    /// Its name in the table of messages.
    pub name: String,
    pub path: String,
    pub count: u64,
    /// The first such line.
    pub line: String,
    /// Wall-clock time of the first such line, ns since 1970.
    pub first_unix_ns: u64,
    /// Time from the warning to that line, ns; negative if the line came first. `None`: the order is not known.
    pub lead_ns: Option<i64>,
}

/// A stretch of an episode during which one cause held. While it lasts it is reported in parts.
#[derive(Clone, Debug)]
pub struct CauseStretch {
    pub episode: String,
    pub incident: String,
    pub key: Arc<QueueKey>,
    pub verdict: Arc<Verdict>,
    pub from: Instant,
    pub to: Instant,
    /// Number of the stretch within the episode, from 0.
    pub index: u32,
}
