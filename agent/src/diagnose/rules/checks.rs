//! Compares the numbers that a rule decides by, and records them for `--explain`.

use crate::event::explain::{Check, Comparison, Condition, Unit};

/// The checks of one rule.
pub(in crate::diagnose) struct Checks {
    /// `None`: no explanation was requested, so only the comparison is made.
    recorded: Option<Vec<Check>>,
}

impl Checks {
    /// Only compares.
    pub(in crate::diagnose) fn silent() -> Self {
        Self { recorded: None }
    }

    /// Compares and records.
    pub(in crate::diagnose) fn recording() -> Self {
        Self {
            recorded: Some(Vec::new()),
        }
    }

    pub(in crate::diagnose) fn into_recorded(self) -> Vec<Check> {
        self.recorded.unwrap_or_default()
    }

    pub(super) fn at_least(
        &mut self,
        name: &'static str,
        value: f64,
        threshold: f64,
        unit: Unit,
    ) -> bool {
        self.compare(name, value, Comparison::AtLeast, threshold, unit)
    }

    pub(super) fn more_than(
        &mut self,
        name: &'static str,
        value: f64,
        threshold: f64,
        unit: Unit,
    ) -> bool {
        self.compare(name, value, Comparison::MoreThan, threshold, unit)
    }

    pub(super) fn at_most(
        &mut self,
        name: &'static str,
        value: f64,
        threshold: f64,
        unit: Unit,
    ) -> bool {
        self.compare(name, value, Comparison::AtMost, threshold, unit)
    }

    /// Whether a question is answered as wanted.
    pub(super) fn is(&mut self, question: &'static str, answer: bool, wanted: bool) -> bool {
        let number = |yes: bool| f64::from(u8::from(yes));
        self.compare(
            question,
            number(answer),
            Comparison::Is,
            number(wanted),
            Unit::YesNo,
        )
    }

    /// A number that decides nothing but is useful context.
    pub(super) fn context(&mut self, name: &'static str, value: Option<f64>, unit: Unit) {
        if let Some(recorded) = &mut self.recorded {
            recorded.push(Check {
                name,
                value,
                unit,
                condition: None,
            });
        }
    }

    /// An answer that decides nothing but is useful context.
    pub(super) fn answer(&mut self, question: &'static str, answer: bool) {
        self.context(question, Some(f64::from(u8::from(answer))), Unit::YesNo);
    }

    /// A number that is needed but unknown: the check fails.
    pub(super) fn unknown(&mut self, name: &'static str, unit: Unit) -> bool {
        self.context(name, None, unit);
        false
    }

    fn compare(
        &mut self,
        name: &'static str,
        value: f64,
        comparison: Comparison,
        threshold: f64,
        unit: Unit,
    ) -> bool {
        let holds = comparison.holds(value, threshold);
        if let Some(recorded) = &mut self.recorded {
            recorded.push(Check {
                name,
                value: Some(value),
                unit,
                condition: Some(Condition {
                    comparison,
                    threshold,
                    holds,
                }),
            });
        }
        holds
    }
}
