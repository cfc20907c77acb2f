//! Waits for a condition, with a deadline.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::skip::another_attempt;

/// Polling interval.
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// A thread whose sleep takes this much longer was held up: the machine paused, or had no CPU for it.
const PAUSE: Duration = Duration::from_millis(200);
/// Attempts of [`unless_paused`].
const ATTEMPTS: u32 = 3;

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

/// Repeats a measurement that failed while the machine paused, as a virtual machine does if its host is busy. After a
/// pause, all that was due meanwhile happens at once, and measured times include the pause. A failure without a pause is
/// final, and so is that of the last attempt. `cargo xtask test` prints each further attempt with its reason. Only for
/// tests whose bounds cannot allow for a pause.
pub fn unless_paused<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 1..ATTEMPTS {
        let (result, pause) = with_longest_pause(&mut attempt);
        match result {
            Err(error) if pause >= PAUSE => {
                another_attempt(&format!("the machine paused for {pause:?}: {error:#}"));
            }
            result => return result,
        }
    }
    attempt()
}

/// The result of this work, and the longest time by which a thread beside it was held up.
fn with_longest_pause<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        // Dropped even if the work panics.
        let over = Over(&is_over);
        let watch = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            while !is_over.load(Ordering::Relaxed) {
                let begun = Instant::now();
                thread::sleep(POLL_INTERVAL);
                longest = longest.max(begun.elapsed().saturating_sub(POLL_INTERVAL));
            }
            longest
        });
        let result = work();
        drop(over);
        (result, watch.join().unwrap_or_default())
    })
}
