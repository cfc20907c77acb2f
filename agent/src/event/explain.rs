//! Why a verdict is what it is: every rule that was evaluated, and the numbers that decided.
//!
//! `--explain` prints this. It is recorded only when asked for.

use std::sync::Arc;

use super::Activity;
use crate::{cause::Cause, queue::QueueKey};

/// The rules behind one verdict.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// The queue that was judged. Queues of one service that fill for the same reason share a verdict, so this may be
    /// another queue than the one whose verdict is shown.
    pub queue: Arc<QueueKey>,
    /// Length of the window of time that was judged, ns.
    pub window_ns: u64,
    /// Threads whose samples were judged: those of the first step of the wait chain.
    pub threads: usize,
    /// Samples of these threads.
    pub samples: u64,
    /// The activity with most of their time, apart from waiting for work; `None` if nothing was sampled.
    pub main_activity: Option<Activity>,
    /// Every rule, in the order of evaluation.
    pub rules: Vec<RuleReport>,
}

/// What became of one rule.
#[derive(Clone, Debug, PartialEq)]
pub struct RuleReport {
    pub cause: Cause,
    /// Which sign of the cause the rule looks for. A cause may have several.
    pub rule: &'static str,
    /// What the rule applies to, in words.
    pub applies_to: String,
    pub outcome: RuleOutcome,
    /// The numbers that decided; empty if the rule does not apply.
    pub checks: Vec<Check>,
}

/// See [`RuleReport`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RuleOutcome {
    /// The rule is about other kinds of queues, or about threads that do something else.
    NotApplicable,
    DidNotFire,
    /// It fired, but a rule before it decided.
    Fired,
    /// It decided, but there is too little evidence to name its cause: the verdict is `unknown`.
    Withheld,
    /// It is the verdict.
    Chosen,
}

impl RuleOutcome {
    /// The word used in every output.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotApplicable => "not_applicable",
            Self::DidNotFire => "did_not_fire",
            Self::Fired => "fired",
            Self::Withheld => "withheld",
            Self::Chosen => "chosen",
        }
    }
}

/// One number, and what it was compared with.
#[derive(Clone, Debug, PartialEq)]
pub struct Check {
    /// What was measured, in words.
    pub name: &'static str,
    /// `None`: not known.
    pub value: Option<f64>,
    pub unit: Unit,
    /// `None`: shown for context, and decides nothing.
    pub condition: Option<Condition>,
}

/// What a number was compared with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Condition {
    pub comparison: Comparison,
    pub threshold: f64,
    pub holds: bool,
}

/// How a value is compared with its threshold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    AtLeast,
    MoreThan,
    AtMost,
    Is,
}

impl Comparison {
    /// The operator used in every output.
    pub fn symbol(self) -> &'static str {
        match self {
            Self::AtLeast => ">=",
            Self::MoreThan => ">",
            Self::AtMost => "<=",
            Self::Is => "=",
        }
    }

    /// Whether the comparison of `value` with `threshold` holds.
    pub fn holds(self, value: f64, threshold: f64) -> bool {
        match self {
            Self::AtLeast => value >= threshold,
            Self::MoreThan => value > threshold,
            Self::AtMost => value <= threshold,
            Self::Is => value == threshold,
        }
    }
}

/// The unit of a value and of its threshold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// 0 to 1, of wall time or of samples.
    Ratio,
    Count,
    Bytes,
    Nanoseconds,
    PerSecond,
    /// 1 for yes, 0 for no.
    YesNo,
}

impl Unit {
    /// The word used in outputs for programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ratio => "ratio",
            Self::Count => "count",
            Self::Bytes => "bytes",
            Self::Nanoseconds => "ns",
            Self::PerSecond => "per_second",
            Self::YesNo => "bool",
        }
    }
}
