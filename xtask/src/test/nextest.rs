//! Rust's tests, run by cargo-nextest: one process per test, a time limit for each, and a JUnit report that is read here.
//!
//! A test that fails runs once more, alone, to classify the failure: `flaky` if it passes then. Both kinds are failures.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use roxmltree::{Document, Node};

use super::tally::{Outcome, Tally};
use crate::{cargo, command::Cmd, tools};

/// More failures than this probably have one common cause, and are not rerun to classify them.
const CLASSIFY_AT_MOST: usize = 8;

/// One test of the JUnit report.
#[derive(Debug, PartialEq)]
struct Case {
    /// The binary that holds the test, as nextest names it: `tailback-tests::signal`.
    binary: String,
    name: String,
    took: Duration,
    /// Why it failed.
    failure: Option<String>,
}

impl Case {
    /// The test's function: it reports a skip under this name.
    fn function(&self) -> &str {
        self.name.rsplit("::").next().unwrap_or(&self.name)
    }

    fn full_name(&self) -> String {
        format!("{} {}", self.binary, self.name)
    }
}

/// Runs the tests whose names contain `filter`, or all, with `env` in their environment.
pub fn run(filter: Option<&str>, env: &[(&str, PathBuf)], tally: &mut Tally) -> Result<()> {
    let (skip_log, attempt_log) = (empty_log("skipped")?, empty_log("attempts")?);
    let mut nextest = cargo::nextest()
        .arg("--no-fail-fast")
        .env("TAILBACK_SKIP_LOG", &skip_log)
        .env("TAILBACK_ATTEMPT_LOG", &attempt_log);
    for (name, value) in env {
        nextest = nextest.env(name, value);
    }
    let all = match filter {
        Some(filter) => nextest.clone().args(["--no-tests", "pass", filter]),
        None => nextest.clone(),
    };
    let cases = report_of(&all)?;
    let log = read_log(&skip_log)?;
    let mut skipped = skipped_tests(&log);
    let failed = cases.iter().filter(|case| case.failure.is_some()).count();
    for case in &cases {
        let skip = skipped.remove(case.function());
        let outcome = match (&case.failure, skip) {
            (Some(why), _) if failed > CLASSIFY_AT_MOST => Outcome::Failed(why.clone()),
            (Some(why), _) => Outcome::Failed(classify(&nextest, case, why)),
            (None, Some(why)) => Outcome::Skipped(why.to_owned()),
            (None, None) => Outcome::Passed,
        };
        tally.record_timed(&case.full_name(), outcome, Some(case.took));
    }
    for (name, why) in skipped {
        let why = format!("a skip was reported under this name, but no test has it: {why}");
        tally.record(name, Outcome::Failed(why));
    }
    for attempt in read_log(&attempt_log)?.lines() {
        tally.note(format!("another attempt: {attempt}"));
    }
    // Only now: tests that run again to be classified append to them, too.
    for log in [skip_log, attempt_log] {
        fs::remove_file(&log).with_context(|| format!("remove {}", log.display()))?;
    }
    Ok(())
}

/// Creates a file that the tests append lines to.
fn empty_log(name: &str) -> Result<PathBuf> {
    let path = tools::cache().join(format!("{name}.{}", std::process::id()));
    fs::write(&path, "").with_context(|| format!("create {}", path.display()))?;
    Ok(path)
}

fn read_log(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

/// Runs a failed test again, alone. Returns the reason, prefixed with the class of the failure. A pass here never makes
/// the test a pass.
fn classify(nextest: &Cmd, case: &Case, why: &str) -> String {
    println!(
        "\n     Classifying {}: it runs once more, alone",
        case.full_name()
    );
    let only = format!("binary_id(={}) & test(={})", case.binary, case.name);
    let again = nextest.clone().args(["--filterset", &only]);
    match report_of(&again).as_deref() {
        Ok([again]) => match &again.failure {
            None => format!("flaky (it passed when it ran again, alone): {why}"),
            Some(second) if second == why => format!("failed twice: {why}"),
            Some(second) => format!("failed twice: {why}; then: {second}"),
        },
        _ => format!("not classified: {why}"),
    }
}

/// Runs nextest and reads its report, which it writes however the tests end.
fn report_of(nextest: &Cmd) -> Result<Vec<Case>> {
    let file = cargo::junit_report();
    match fs::remove_file(&file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("remove {}", file.display()));
        }
        _ => {}
    }
    let status = nextest
        .command()
        .status()
        .with_context(|| format!("start `{nextest}`"))?;
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        // Nothing matched the filter.
        Err(_) if status.success() => return Ok(Vec::new()),
        Err(_) => anyhow::bail!("`{nextest}` ended with {status} and wrote no report"),
    };
    parse(&text).with_context(|| format!("read {}", file.display()))
}

fn parse(junit: &str) -> Result<Vec<Case>> {
    let document = Document::parse(junit).context("the report is not XML")?;
    let cases = document
        .descendants()
        .filter(|node| node.has_tag_name("testcase"));
    cases.map(case).collect()
}

fn case(node: Node<'_, '_>) -> Result<Case> {
    let attribute = |name: &str| {
        let value = node.attribute(name);
        value.with_context(|| format!("a testcase without {name}"))
    };
    let seconds: f64 = attribute("time")?
        .parse()
        .context("a time that is not a number")?;
    let failure = node
        .children()
        .find(|child| child.has_tag_name("failure") || child.has_tag_name("error"));
    Ok(Case {
        binary: attribute("classname")?.to_owned(),
        name: attribute("name")?.to_owned(),
        took: Duration::from_secs_f64(seconds.max(0.0)),
        failure: failure.map(reason),
    })
}

/// The failure's message and text in one line, without the backtrace.
fn reason(failure: Node<'_, '_>) -> String {
    let text = failure.text().unwrap_or_default();
    let message = failure
        .attribute("message")
        .or_else(|| failure.attribute("type"))
        .unwrap_or_default();
    let text = if text.contains(message) {
        text.to_owned()
    } else {
        format!("{message}\n{text}")
    };
    let lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.eq_ignore_ascii_case("stack backtrace:"))
        .filter(|line| !line.is_empty() && !line.starts_with("note: run with"));
    match lines.collect::<Vec<_>>().join("; ") {
        empty if empty.is_empty() => "no output".to_owned(),
        reason => reason,
    }
}

/// Name and reason of each test that wrote `name: reason` to the skip log.
fn skipped_tests(log: &str) -> BTreeMap<&str, &str> {
    log.lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| line.split_once(": ").unwrap_or((line, "no reason given")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="nextest-run" tests="3" failures="2" errors="0" time="0.5">
  <testsuite name="tailback" tests="1" disabled="0" errors="0" failures="0">
    <testcase name="ewma::tests::decays" classname="tailback" time="0.012"></testcase>
  </testsuite>
  <testsuite name="tailback-tests::signal" tests="2" disabled="0" errors="0" failures="2">
    <testcase name="pages::fails_open" classname="tailback-tests::signal" time="2.5">
      <failure message="thread 'pages::fails_open' panicked at a.rs:3:5" type="test failure with exit code 101">thread 'pages::fails_open' panicked at a.rs:3:5:
left is not right
stack backtrace:
   0: core::panicking</failure>
    </testcase>
    <testcase name="pages::hangs" classname="tailback-tests::signal" time="240">
      <failure type="test timeout"></failure>
    </testcase>
  </testsuite>
</testsuites>"#;

    #[test]
    fn reads_results_reasons_and_time_limits_from_the_report() -> Result<()> {
        let cases = parse(REPORT)?;
        let failures: Vec<_> = cases.iter().map(|case| case.failure.as_deref()).collect();
        assert_eq!(
            failures,
            [
                None,
                Some("thread 'pages::fails_open' panicked at a.rs:3:5:; left is not right"),
                Some("test timeout"),
            ]
        );
        assert_eq!(cases[0].took, Duration::from_millis(12));
        assert_eq!(
            cases[1].full_name(),
            "tailback-tests::signal pages::fails_open"
        );
        assert!(parse("<testcase name=\"a\"/>").is_err());
        Ok(())
    }

    #[test]
    fn reads_the_skip_log() {
        let log = "jaeger_shows_it: no jaeger: it was not built\n\nother\n";
        let skipped = skipped_tests(log);
        assert_eq!(skipped["jaeger_shows_it"], "no jaeger: it was not built");
        assert_eq!(skipped["other"], "no reason given");
    }
}
