//! The result of every test, whichever program ran it, and the summary at the end.

use std::{fmt::Write as _, time::Duration};

use super::skips;

/// Longest part of a failure's reason that the summary shows, in characters.
const REASON_CHARS: usize = 400;
/// Number of slowest tests that the summary lists.
const SLOWEST: usize = 10;

/// How one test ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    /// With the reason.
    Failed(String),
    /// It could not run here, for this reason, which is on the list of allowed skips.
    Skipped(String),
}

#[derive(Debug)]
struct Test {
    name: String,
    outcome: Outcome,
    took: Option<Duration>,
}

/// All results of one run.
#[derive(Default)]
pub struct Tally {
    tests: Vec<Test>,
    /// Facts that belong in the summary and are neither a pass nor a failure.
    notes: Vec<String>,
}

impl Tally {
    /// Records a test that no test harness reported, and prints its line.
    pub fn record(&mut self, name: &str, outcome: Outcome) {
        self.record_timed(name, outcome, None);
        if let Some(test) = self.tests.last() {
            match &test.outcome {
                Outcome::Passed => println!("test {name} ... ok"),
                Outcome::Failed(why) => println!("test {name} ... FAILED: {why}"),
                Outcome::Skipped(why) => println!("test {name} ... skipped: {why}"),
            }
        }
    }

    /// Records a test with its duration. A skip that is not on the list of allowed skips is a failure.
    pub fn record_timed(&mut self, name: &str, outcome: Outcome, took: Option<Duration>) {
        let outcome = match outcome {
            Outcome::Skipped(why) if skips::allowed(name, &why).is_none() => Outcome::Failed(
                format!("skipped, and xtask/src/test/skips.rs does not allow it: {why}"),
            ),
            outcome => outcome,
        };
        self.tests.push(Test {
            name: name.to_owned(),
            outcome,
            took,
        });
    }

    /// Takes over all results of another tally.
    pub fn append(&mut self, other: Self) {
        self.tests.extend(other.tests);
        self.notes.extend(other.notes);
    }

    /// Adds a line to the summary.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    pub fn is_green(&self) -> bool {
        self.failures().next().is_none()
    }

    /// Names and reasons of the failed tests.
    pub fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        self.tests.iter().filter_map(|test| match &test.outcome {
            Outcome::Failed(why) => Some((test.name.as_str(), why.as_str())),
            _ => None,
        })
    }

    /// Skipped, slowest and failed tests, and the closing line with the counts.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        for test in &self.tests {
            if let Outcome::Skipped(why) = &test.outcome {
                let _ = writeln!(text, "skipped  {}: {why}", test.name);
            }
        }
        let mut timed: Vec<_> = self
            .tests
            .iter()
            .filter_map(|test| Some((test.took?, &test.name)))
            .collect();
        timed.sort_unstable_by(|a, b| b.cmp(a));
        for (took, name) in timed.into_iter().take(SLOWEST) {
            let _ = writeln!(text, "slow     {:>6.1} s  {name}", took.as_secs_f64());
        }
        for note in &self.notes {
            let _ = writeln!(text, "note     {note}");
        }
        for (name, why) in self.failures() {
            let _ = writeln!(text, "failed   {name}: {}", short(why));
        }
        let count = |is: fn(&Outcome) -> bool| {
            let tests = self.tests.iter();
            tests.filter(|test| is(&test.outcome)).count()
        };
        let _ = writeln!(
            text,
            "{} passed, {} failed, {} skipped",
            count(|outcome| *outcome == Outcome::Passed),
            count(|outcome| matches!(outcome, Outcome::Failed(_))),
            count(|outcome| matches!(outcome, Outcome::Skipped(_))),
        );
        text
    }
}

fn short(why: &str) -> String {
    match why.char_indices().nth(REASON_CHARS) {
        Some((end, _)) => format!("{}…", &why[..end]),
        None => why.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skip_that_is_not_listed_is_a_failure() {
        let mut tally = Tally::default();
        tally.record(
            "planted",
            Outcome::Skipped("Jaeger is not installed".to_owned()),
        );
        assert!(!tally.is_green());
        assert_eq!(
            tally.summary(),
            "failed   planted: skipped, and xtask/src/test/skips.rs does not allow it: Jaeger is not installed\n\
             0 passed, 1 failed, 0 skipped\n"
        );
    }

    #[test]
    fn the_summary_ends_with_the_counts_and_lists_the_slowest() {
        let mut tally = Tally::default();
        for seconds in 1..=12 {
            let took = Some(Duration::from_secs(seconds));
            tally.record_timed(&format!("t{seconds}"), Outcome::Passed, took);
        }
        tally.record_timed(
            "broken",
            Outcome::Failed("left is not right".to_owned()),
            None,
        );
        let summary = tally.summary();
        assert_eq!(summary.matches("slow ").count(), SLOWEST);
        assert!(summary.starts_with("slow       12.0 s  t12\n"), "{summary}");
        assert!(
            summary
                .ends_with("failed   broken: left is not right\n12 passed, 1 failed, 0 skipped\n"),
            "{summary}"
        );
    }
}
