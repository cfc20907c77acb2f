//! The sum of all tests, whoever ran them.

use std::fmt::Write as _;

/// More failures than these are no chance, and none of them is given a second try.
const MOST_AGAIN: usize = 8;
/// Of what a failed test said, in the sum.
const WHY_CHARS: usize = 400;

/// In place of a test's name.
const PROGRAM: &str = "a program with tests";

#[derive(Default)]
pub struct Tally {
    pub passed: usize,
    /// The failed tests.
    pub failures: Vec<Failure>,
    /// Tests that failed at first and passed when they were tried once more, alone: they are among the passed.
    flaky: Vec<Failure>,
    /// Tests that could not run here, and why.
    pub skipped: Vec<(String, String)>,
}

/// A test, and why it failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub name: String,
    pub why: String,
}

impl Failure {
    /// Of a program with tests, where no test is known by name.
    pub fn of_program(why: &str) -> Self {
        Self {
            name: PROGRAM.to_owned(),
            why: why.to_owned(),
        }
    }
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
                self.failures.push(Failure {
                    name: name.to_owned(),
                    why: why.to_owned(),
                });
            }
            Told::Skipped(why) => {
                println!("test {name} ... skipped: {why}");
                self.skipped.push((name.to_owned(), why.to_owned()));
            }
        }
    }

    /// Tries what failed since there were `before` failures once more: a test that measures time may fail by chance on a
    /// machine that others use as well. `again` says why a test failed at its second try.
    pub fn try_again(&mut self, before: usize, mut again: impl FnMut(&str) -> Result<(), String>) {
        if self.failures.len() - before > MOST_AGAIN {
            return;
        }
        for first in self.failures.split_off(before) {
            let Failure { name, why } = &first;
            println!("\n     Once more, alone: {name}");
            match again(name) {
                Ok(()) => {
                    println!("test {name} ... ok at its second try");
                    self.passed += 1;
                    self.flaky.push(first);
                }
                Err(second) => {
                    println!("test {name} ... FAILED again: {second}");
                    let why = format!("{why}; at its second try: {second}");
                    self.failures.push(Failure { why, ..first });
                }
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

    /// The skipped, the flaky and the failed by name, and the closing line.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        for (name, why) in &self.skipped {
            let _ = writeln!(text, "skipped  {name}: {why}");
        }
        for Failure { name, why } in &self.flaky {
            let _ = writeln!(text, "flaky    {name}: at first {}", short(why));
        }
        for Failure { name, why } in &self.failures {
            let _ = writeln!(text, "failed   {name}: {}", short(why));
        }
        let _ = writeln!(
            text,
            "{} passed{}, {} failed{}, {} skipped",
            self.passed,
            match self.flaky.len() {
                0 => String::new(),
                n => format!(" ({n} at a second try: {})", names(&self.flaky)),
            },
            self.failures.len(),
            match self.failures.len() {
                0 => String::new(),
                _ => format!(" ({})", names(&self.failures)),
            },
            self.skipped.len()
        );
        text
    }
}

fn names(failures: &[Failure]) -> String {
    let names = failures.iter().map(|failure| failure.name.as_str());
    names.collect::<Vec<_>>().join(", ")
}

fn short(why: &str) -> String {
    match why.char_indices().nth(WHY_CHARS) {
        Some((end, _)) => format!("{}…", &why[..end]),
        None => why.to_owned(),
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

    #[test]
    fn what_fails_twice_failed_and_what_passes_then_is_named() {
        let mut tally = Tally::default();
        tally.tell("old", Told::Failed("no hope"));
        tally.tell("chance", Told::Failed("12 ms, not 10"));
        tally.tell("fault", Told::Failed("wrong"));
        tally.try_again(1, |name| match name {
            "chance" => Ok(()),
            "fault" => Err("still wrong".to_owned()),
            _ => panic!("{name} is none of those that are tried again"),
        });
        assert_eq!(
            tally.summary(),
            "flaky    chance: at first 12 ms, not 10\n\
             failed   old: no hope\n\
             failed   fault: wrong; at its second try: still wrong\n\
             1 passed (1 at a second try: chance), 2 failed (old, fault), 0 skipped\n"
        );
    }

    #[test]
    fn what_fails_by_the_dozen_gets_no_second_try() {
        let mut tally = Tally::default();
        for _ in 0..=MOST_AGAIN {
            tally.tell("broken", Told::Failed("gone"));
        }
        tally.try_again(0, |_| Ok(()));
        assert_eq!(tally.failures.len(), MOST_AGAIN + 1);
    }
}
