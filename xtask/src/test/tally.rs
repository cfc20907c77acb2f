//! The sum of all tests, whoever ran them.

use std::fmt::Write as _;

#[derive(Default)]
pub struct Tally {
    pub passed: usize,
    pub failed: usize,
    /// The failed tests by name.
    pub failures: Vec<String>,
    /// Tests that could not run here, and why.
    pub skipped: Vec<(String, String)>,
}

/// How one test ended.
#[derive(Clone, Copy)]
pub enum Told<'a> {
    Passed,
    Failed(&'a str),
    Skipped(&'a str),
}

impl Tally {
    /// Counts a test that was not run by Rust's harness, and prints it as that does.
    pub fn tell(&mut self, name: &str, told: Told<'_>) {
        match told {
            Told::Passed => {
                println!("test {name} ... ok");
                self.passed += 1;
            }
            Told::Failed(why) => {
                println!("test {name} ... FAILED: {why}");
                self.failed += 1;
                self.failures.push(format!("{name}: {why}"));
            }
            Told::Skipped(why) => {
                println!("test {name} ... skipped: {why}");
                self.skipped.push((name.to_owned(), why.to_owned()));
            }
        }
    }

    /// Takes the tests that wrote `name: reason` into the list of skips out of those that passed.
    pub fn skip_listed(&mut self, list: &str) {
        for line in list.lines().filter(|line| !line.trim().is_empty()) {
            let (name, why) = line.split_once(": ").unwrap_or((line, "no reason given"));
            if self.skipped.iter().all(|(known, _)| known != name) {
                self.skipped.push((name.to_owned(), why.to_owned()));
                self.passed = self.passed.saturating_sub(1);
            }
        }
    }

    /// The skipped and the failed by name, and the closing line.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        for (name, why) in &self.skipped {
            let _ = writeln!(text, "skipped  {name}: {why}");
        }
        for name in &self.failures {
            let _ = writeln!(text, "failed   {name}");
        }
        let _ = writeln!(
            text,
            "{} passed, {} failed, {} skipped",
            self.passed,
            self.failed,
            self.skipped.len()
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_that_skipped_itself_did_not_pass() {
        let mut tally = Tally {
            passed: 3,
            ..Tally::default()
        };
        tally.skip_listed(
            "jaeger_shows_it: no jaeger: it was not built\njaeger_shows_it: no jaeger\n\n",
        );
        assert_eq!(
            tally.summary(),
            "skipped  jaeger_shows_it: no jaeger: it was not built\n2 passed, 0 failed, 1 skipped\n"
        );
    }
}
