//! Waiting for a condition, with a deadline.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// How often a condition is looked at.
const STEP: Duration = Duration::from_millis(5);

/// Asks until there is something, or the deadline has passed. An error of `ask` ends the waiting.
pub fn until<T>(
    what: &str,
    deadline: Duration,
    mut ask: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(got) = ask()? {
            return Ok(got);
        }
        if Instant::now() >= end {
            bail!("{what}: not within {deadline:?}");
        }
        thread::sleep(STEP);
    }
}

/// Asks until it is answered without an error, or the deadline has passed: then with the last error.
pub fn until_right<T>(
    what: &str,
    deadline: Duration,
    mut ask: impl FnMut() -> Result<T>,
) -> Result<T> {
    let end = Instant::now() + deadline;
    loop {
        match ask() {
            Err(_) if Instant::now() < end => thread::sleep(STEP),
            answer => return answer.with_context(|| format!("{what}: not within {deadline:?}")),
        }
    }
}
