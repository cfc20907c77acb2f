//! Reads the lines of Rust's test harness.

use super::Tally;

/// Counts one line, and says how many failed tests it closes.
pub fn read(line: &str, tally: &mut Tally) -> usize {
    if let Some(name) = line
        .strip_prefix("test ")
        .and_then(|line| line.strip_suffix(" ... FAILED"))
    {
        tally.failures.push(name.to_owned());
    }
    if let Some((name, why)) = line
        .strip_prefix("test ")
        .and_then(|line| line.split_once(" ... ignored"))
    {
        let why = why.trim_start_matches([',', ' ']);
        let why = if why.is_empty() {
            "marked as ignored"
        } else {
            why
        };
        tally.skipped.push((name.to_owned(), why.to_owned()));
    }
    let Some((passed, failed)) = result(line) else {
        return 0;
    };
    tally.passed += passed;
    tally.failed += failed;
    failed
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_results_and_names_failures() {
        let mut tally = Tally::default();
        let lines = [
            "running 3 tests",
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test d ... ignored, needs a moon",
            "test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s",
        ];
        let failed: usize = lines.iter().map(|line| read(line, &mut tally)).sum();
        assert_eq!((tally.passed, tally.failed, failed), (5, 1, 1));
        assert_eq!(tally.failures, ["a::c"]);
        assert_eq!(tally.skipped, [("d".to_owned(), "needs a moon".to_owned())]);
    }
}
