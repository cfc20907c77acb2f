//! Decides the cause of an episode from the evidence.
//!
//! Each cause is a file with its rules: where each applies, what it tests, its thresholds, the first words of the evidence,
//! and the advice. [`table`] lists the rules in the order of evaluation. This module evaluates them ([`judge`]): the
//! first rule that applies and fires decides. If it decides by time, it also needs enough samples
//! ([`MIN_SAMPLES_PER_THREAD`]) and a large enough share of the threads' time ([`MIN_SHARE`]). Otherwise the verdict is
//! `unknown`, and no later rule is evaluated. Rules test what the kernel reports, not which program runs.
//!
//! Imports go one way: this module → `assemble` → `table` → the causes → `shared` → `rule`, `checks`.

mod assemble;
mod checks;
mod rule;
mod shared;
mod table;

mod accelerator_bound;
mod consumer_stalled;
mod cpu_bound;
mod cpu_starved;
mod cpu_throttled;
mod disk_slow;
mod downstream_slow;
mod event_loop_blocked;
mod fd_exhausted;
mod lock_contention;
mod memory_stalled;
mod network_limited;
mod output_blocked;
mod peer_not_reading;
mod peer_not_sending;
mod pool_exhausted;
mod ports_exhausted;
mod producer_surge;
mod undersized_limit;

use std::sync::Arc;

pub(super) use producer_surge::is_surge;

use super::case::Case;
use crate::event::{
    Verdict,
    explain::{Explanation, RuleOutcome, RuleReport, Unit},
};
use checks::Checks;
use rule::{Basis, CauseInfo, Finding, Rule};
use table::RULES;

/// A cause that is decided by time needs at least this share of the threads' wall time. The recorded incidents test the value.
const MIN_SHARE: f64 = 0.2;
/// A cause that is decided by time needs at least this many samples per thread, on average.
const MIN_SAMPLES_PER_THREAD: u64 = 4;

/// The verdict on the case's episode. With `explain`, it includes every rule and the numbers that it compared.
pub(super) fn judge(case: Case<'_>, explain: bool) -> Verdict {
    let decision = RULES
        .iter()
        .find_map(|rule| Decision::of(rule, case, &mut Checks::silent()));
    let chosen = decision.as_ref().filter(|decision| decision.is_sufficient);
    let verdict = assemble::verdict(case, chosen.map(|it| (it.cause, &it.finding)));
    Verdict {
        explanation: explain.then(|| Arc::new(explanation(case))),
        ..verdict
    }
}

/// A rule that fired.
struct Decision {
    cause: &'static CauseInfo,
    finding: Finding,
    /// There is enough evidence to name the cause.
    is_sufficient: bool,
}

impl Decision {
    /// `None` if the rule does not apply or does not fire.
    fn of(rule: &Rule, case: Case<'_>, checks: &mut Checks) -> Option<Self> {
        if !rule.scope.applies(case) {
            return None;
        }
        let mut finding = (rule.test)(case, checks)?;
        let is_sufficient = match rule.basis {
            Basis::Fact => true,
            Basis::Time => {
                let supporting = supporting(case, rule.cause);
                finding.share = finding.share.or(supporting);
                has_enough_evidence(case, finding.share.unwrap_or(0.0), checks)
            }
        };
        Some(Self {
            cause: rule.cause,
            finding,
            is_sufficient,
        })
    }
}

/// The share of the threads' time that supports a cause.
fn supporting(case: Case<'_>, cause: &CauseInfo) -> Option<f64> {
    let shares = &case.first()?.shares;
    let supports = shares
        .iter()
        .filter(|(activity, _)| cause.supported_by.contains(activity));
    let sum: f64 = supports.map(|(_, share)| share).sum();
    (sum > 0.0).then_some(sum)
}

fn has_enough_evidence(case: Case<'_>, share: f64, checks: &mut Checks) -> bool {
    let samples = checks.at_least(
        "evidence: thread samples",
        case.samples() as f64,
        (MIN_SAMPLES_PER_THREAD * case.threads() as u64) as f64,
        Unit::Count,
    );
    let share = checks.at_least(
        "evidence: supporting share of thread time",
        share,
        MIN_SHARE,
        Unit::Ratio,
    );
    samples && share
}

/// Evaluates every rule once more, including those after the one that decided, and records what they compared.
fn explanation(case: Case<'_>) -> Explanation {
    let mut decided = false;
    let rules = RULES.iter().map(|rule| {
        let mut checks = Checks::recording();
        let applies = rule.scope.applies(case);
        let decision = Decision::of(rule, case, &mut checks);
        let outcome = match decision {
            None if !applies => RuleOutcome::NotApplicable,
            None => RuleOutcome::DidNotFire,
            Some(_) if decided => RuleOutcome::Fired,
            Some(decision) => {
                decided = true;
                if decision.is_sufficient {
                    RuleOutcome::Chosen
                } else {
                    RuleOutcome::Withheld
                }
            }
        };
        RuleReport {
            cause: rule.cause.cause,
            rule: rule.name,
            applies_to: rule.scope.words(),
            outcome,
            checks: checks.into_recorded(),
        }
    });
    let rules = rules.collect();
    let (from_ns, to_ns) = case.time();
    Explanation {
        queue: Arc::clone(&case.episode.key),
        window_ns: to_ns.saturating_sub(from_ns),
        threads: case.threads(),
        samples: case.samples(),
        main_activity: case.first().map(|first| first.activity),
        rules,
    }
}
