//! Reads what Rust's test harness prints.

use super::{Tally, tally::Failure};

/// Reads it line by line into a tally.
#[derive(Default)]
pub struct Reader {
    /// A program with tests has begun, and has not told its result: how many tests had failed before it.
    running: Option<usize>,
    /// The failed test whose output is being told, and what it said so far.
    telling: Option<(String, Vec<String>)>,
}

impl Reader {
    pub fn read(&mut self, line: &str, tally: &mut Tally) {
        if is_begin(line) {
            self.end(tally);
            self.running = Some(tally.failures.len());
            return;
        }
        if let Some(told) = line.strip_prefix("---- ") {
            self.close_telling(tally);
            self.telling = told
                .strip_suffix(" stdout ----")
                .map(|name| (name.to_owned(), Vec::new()));
            return;
        }
        if line == "failures:" {
            self.close_telling(tally);
            return;
        }
        if let Some((_, said)) = &mut self.telling {
            said.push(line.to_owned());
            return;
        }
        if let Some((passed, failed)) = result(line) {
            tally.passed += passed;
            let before = self.running.take().unwrap_or(tally.failures.len());
            // Whoever writes past the harness may break the line of a test.
            let named = tally.failures.len() - before;
            for _ in named..failed {
                let why = "its name was not told";
                tally.failures.push(Failure::of_program(why));
            }
        } else if let Some(test) = line.strip_prefix("test ") {
            read_test(test, tally);
        }
    }

    /// Says that nothing more comes from the program that ran. One that did not get to its result was taken down by a test.
    pub fn end(&mut self, tally: &mut Tally) {
        self.close_telling(tally);
        if self.running.take().is_some() {
            let why = "it ended before it had told its result";
            tally.failures.push(Failure::of_program(why));
        }
    }

    fn close_telling(&mut self, tally: &mut Tally) {
        let Some((name, said)) = self.telling.take() else {
            return;
        };
        let mut latest = tally.failures.iter_mut().rev();
        if let Some(failure) = latest.find(|failure| failure.name == name) {
            failure.why = why(&said);
        }
    }
}

/// `running 3 tests`
fn is_begin(line: &str) -> bool {
    line.strip_prefix("running ")
        .and_then(|line| line.split_once(' '))
        .is_some_and(|(count, tests)| {
            matches!(tests, "test" | "tests") && count.parse::<usize>().is_ok()
        })
}

/// `a::b ... FAILED`, `a::b ... ignored, needs a moon`
fn read_test(test: &str, tally: &mut Tally) {
    if let Some(name) = test.strip_suffix(" ... FAILED") {
        tally.failures.push(Failure {
            name: name.to_owned(),
            why: "it says nothing".to_owned(),
        });
    } else if let Some((name, why)) = test.split_once(" ... ignored") {
        let why = match why.trim_start_matches([',', ' ']) {
            "" => "marked as ignored",
            why => why,
        };
        tally.skipped.push((name.to_owned(), why.to_owned()));
    }
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s`
fn result(line: &str) -> Option<(usize, usize)> {
    let counts = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let count = |what: &str| {
        counts
            .split("; ")
            .find_map(|part| part.strip_suffix(what)?.trim().parse().ok())
    };
    Some((count("passed")?, count("failed")?))
}

/// In one line, from where a failed test says so.
fn why(said: &[String]) -> String {
    let begins = |line: &String| line.starts_with("Error: ") || line.contains("panicked at ");
    let from = said.iter().position(begins).unwrap_or(0);
    let lines = said[from..].iter().map(|line| line.trim());
    let words = lines.take_while(|line| !line.eq_ignore_ascii_case("stack backtrace:"));
    let telling = words.filter(|line| !line.is_empty() && !line.starts_with("note: run with"));
    match telling.collect::<Vec<_>>().join("; ") {
        nothing if nothing.is_empty() => "it says nothing".to_owned(),
        why => why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(lines: &[&str]) -> Tally {
        let mut tally = Tally::default();
        let mut reader = Reader::default();
        for line in lines {
            reader.read(line, &mut tally);
        }
        reader.end(&mut tally);
        tally
    }

    #[test]
    fn counts_results_and_names_failures_with_what_they_said() {
        let tally = read_all(&[
            "running 4 tests",
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test a::e ... FAILED",
            "test d ... ignored, needs a moon",
            "",
            "failures:",
            "",
            "---- a::c stdout ----",
            "started on port 1",
            "Error: the agent says nothing",
            "",
            "Caused by:",
            "    not within 2s",
            "",
            "---- a::e stdout ----",
            "thread 'a::e' panicked at tests/a.rs:3:5:",
            "left is not right",
            "stack backtrace:",
            "   0: core::panicking::panic_fmt",
            "note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace",
            "",
            "",
            "failures:",
            "    a::c",
            "    a::e",
            "",
            "test result: FAILED. 1 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "",
            "running 4 tests",
            "test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s",
        ]);
        assert_eq!(tally.passed, 5);
        let failures: Vec<_> = tally
            .failures
            .iter()
            .map(|failure| (failure.name.as_str(), failure.why.as_str()))
            .collect();
        assert_eq!(
            failures,
            [
                (
                    "a::c",
                    "Error: the agent says nothing; Caused by:; not within 2s"
                ),
                (
                    "a::e",
                    "thread 'a::e' panicked at tests/a.rs:3:5:; left is not right"
                ),
            ]
        );
        assert_eq!(tally.skipped, [("d".to_owned(), "needs a moon".to_owned())]);
    }

    #[test]
    fn a_program_that_is_taken_down_by_a_test_failed() {
        let tally = read_all(&[
            "running 2 tests",
            "test a::b ... ok",
            "running 1 test",
            "test c ... ok",
            "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s",
        ]);
        assert_eq!((tally.passed, tally.failures.len()), (1, 1));
    }

    #[test]
    fn a_failure_whose_line_is_broken_is_counted() {
        let tally = read_all(&[
            "running 2 tests",
            "test a ... FAILED",
            "test b ... somebody's words",
            "FAILED",
            "test result: FAILED. 0 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s",
        ]);
        assert_eq!(tally.failures.len(), 2);
    }
}
