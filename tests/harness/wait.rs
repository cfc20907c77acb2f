//! Waits for a condition, with a deadline.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// Polling interval.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Polls until there is a value. Fails at the deadline, or at once if `poll` fails.
pub fn until<T>(
    what: &str,
    deadline: Duration,
    mut poll: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(got) = poll()? {
            return Ok(got);
        }
        if Instant::now() >= end {
            bail!("timed out after {deadline:?} waiting for {what}");
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Polls until `poll` succeeds. At the deadline it fails with the last error.
pub fn until_ok<T>(
    what: &str,
    deadline: Duration,
    mut poll: impl FnMut() -> Result<T>,
) -> Result<T> {
    let end = Instant::now() + deadline;
    loop {
        match poll() {
            Err(_) if Instant::now() < end => thread::sleep(POLL_INTERVAL),
            result => {
                return result
                    .with_context(|| format!("timed out after {deadline:?} waiting for {what}"));
            }
        }
    }
}
