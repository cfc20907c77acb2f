//! What a rule is, and what it finds.

use super::checks::Checks;
use crate::{
    cause::Cause,
    diagnose::case::Case,
    event::{Activity, Confidence, Culprit},
    queue::Kind,
};

/// One sign by which a cause is recognized.
pub(super) struct Rule {
    pub(super) cause: &'static CauseInfo,
    /// The sign, in a few words; unique within its cause.
    pub(super) name: &'static str,
    pub(super) scope: Scope,
    pub(super) basis: Basis,
    /// Tests for the sign. Returns what to report if it is present.
    pub(super) test: fn(Case<'_>, &mut Checks) -> Option<Finding>,
}

/// What the rules of one cause have in common.
pub(super) struct CauseInfo {
    pub(super) cause: Cause,
    /// A thread in one of these activities suggests this cause if nothing else is known. Each activity suggests at most
    /// one cause.
    pub(super) suggested_by: &'static [Activity],
    /// Time spent in these activities supports the cause: the verdict's share.
    pub(super) supported_by: &'static [Activity],
}

/// The queues and threads that a rule is about.
#[derive(Clone, Copy)]
pub(super) enum Scope {
    /// Queues of these kinds, whatever the threads do.
    Kinds(&'static [Kind]),
    /// Queues that are explained by the threads that serve them, whatever these do.
    Served,
    /// Like `Served`, if the main activity of their threads is one of these.
    MainActivity(&'static [Activity]),
    /// Like `Served`, if their threads mainly use or want a CPU. Also run queues, whatever the main activity.
    Cpu,
}

/// What a rule decides by.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Basis {
    /// A fact that holds however the threads spend their time.
    Fact,
    /// What the threads' wall time went into. It needs enough samples, and a large enough share of the time.
    Time,
}

impl Scope {
    pub(super) fn applies(self, case: Case<'_>) -> bool {
        let kind = case.episode.key.kind;
        let main = case.steps.first().map(|step| step.activity);
        match self {
            Self::Kinds(kinds) => kinds.contains(&kind),
            Self::Served => is_served(kind) && main.is_some(),
            Self::MainActivity(activities) => {
                is_served(kind) && main.is_some_and(|main| activities.contains(&main))
            }
            Self::Cpu => match kind {
                Kind::Runqueue => main.is_some(),
                _ => Self::MainActivity(Activity::NEEDS_CPU).applies(case),
            },
        }
    }

    /// For `--explain`.
    pub(super) fn words(self) -> String {
        let activities = |activities: &[Activity]| {
            let names: Vec<&str> = activities.iter().map(|one| one.name()).collect();
            format!("main activity {}", names.join(", "))
        };
        match self {
            Self::Kinds(kinds) => {
                let names: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
                format!("kind {}", names.join(", "))
            }
            Self::Served => "queues served by sampled threads".to_owned(),
            Self::MainActivity(of) => activities(of),
            Self::Cpu => format!("{}, or kind runqueue", activities(Activity::NEEDS_CPU)),
        }
    }
}

/// Whether a queue fills because of what the service's threads do. The others explain themselves (no file descriptor, no
/// memory, a slow disk) or are explained by the other end of a connection; a run queue is about the CPU alone.
fn is_served(kind: Kind) -> bool {
    !matches!(
        kind,
        Kind::Fd | Kind::Memory | Kind::Disk | Kind::Send | Kind::Runqueue
    )
}

/// What a rule that fired reports.
pub(super) struct Finding {
    /// Share of the threads' wall time that supports it, 0 to 1. `None`: for a rule that decides by time, the share of
    /// the activities in [`supported_by`](CauseInfo::supported_by); for one that decides by a fact, there is no share.
    pub(super) share: Option<f64>,
    pub(super) culprit: Option<Culprit>,
    /// The fact that decided, in words: the evidence begins with it.
    pub(super) fact: Option<String>,
    /// What to do: the parameter, its present value, what would be enough.
    pub(super) advice: String,
    pub(super) max_confidence: Confidence,
    /// Causes that are part of this finding, and so no alternative to it, however much time suggests them.
    pub(super) includes: &'static [Cause],
}

impl Finding {
    pub(super) fn new(advice: impl Into<String>) -> Self {
        Self {
            share: None,
            culprit: None,
            fact: None,
            advice: advice.into(),
            max_confidence: Confidence::High,
            includes: &[],
        }
    }

    /// A finding with a culprit, and advice that names it.
    pub(super) fn blaming(
        culprit: impl Into<Option<Culprit>>,
        advice: impl FnOnce(&str) -> String,
    ) -> Self {
        let culprit = culprit.into();
        let name = culprit
            .as_ref()
            .map_or("it", |culprit| culprit.name.as_str());
        Self {
            advice: advice(name),
            ..Self::new(String::new())
        }
        .with_culprit(culprit)
    }

    pub(super) fn at_most(self, confidence: Confidence) -> Self {
        Self {
            max_confidence: self.max_confidence.min(confidence),
            ..self
        }
    }

    /// Not sure without a culprit.
    pub(super) fn unsure_without_culprit(self) -> Self {
        match self.culprit {
            Some(_) => self,
            None => self.at_most(Confidence::Medium),
        }
    }

    fn with_culprit(self, culprit: Option<Culprit>) -> Self {
        Self { culprit, ..self }
    }

    pub(super) fn share(self, share: f64) -> Self {
        Self {
            share: Some(share),
            ..self
        }
    }

    pub(super) fn fact(self, fact: impl Into<Option<String>>) -> Self {
        Self {
            fact: fact.into(),
            ..self
        }
    }
}
