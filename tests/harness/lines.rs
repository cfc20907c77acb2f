//! Output lines of a program, each with its arrival time.

use std::{
    io::{BufRead as _, BufReader, Read},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Result, bail};

/// The stream that a line was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// One line, without the newline.
#[derive(Clone, Debug)]
pub struct Line {
    pub at: Instant,
    /// The same moment on the wall clock, ns since 1970.
    pub unix_ns: u64,
    pub stream: Stream,
    pub text: String,
}

#[derive(Default)]
struct State {
    lines: Vec<Line>,
    /// Streams that are not at their end.
    open: u32,
}

/// All lines so far. Clones share the same list.
#[derive(Clone, Default)]
pub struct Lines(Arc<(Mutex<State>, Condvar)>);

impl Lines {
    /// Reads `from` to its end on a new thread.
    pub(crate) fn listen(&self, stream: Stream, from: impl Read + Send + 'static) -> Result<()> {
        self.state().open += 1;
        let lines = self.clone();
        thread::Builder::new()
            .name("lines".to_owned())
            .spawn(move || {
                let mut from = BufReader::new(from);
                let mut raw = Vec::new();
                while from
                    .read_until(b'\n', &mut raw)
                    .is_ok_and(|length| length > 0)
                {
                    let text = String::from_utf8_lossy(&raw)
                        .trim_end_matches(['\n', '\r'])
                        .to_owned();
                    raw.clear();
                    let line = Line {
                        at: Instant::now(),
                        unix_ns: unix_ns(),
                        stream,
                        text,
                    };
                    lines.state().lines.push(line);
                    lines.0.1.notify_all();
                }
                lines.state().open -= 1;
                lines.0.1.notify_all();
            })?;
        Ok(())
    }

    /// Number of lines so far, for [`Lines::since`].
    pub fn count(&self) -> usize {
        self.state().lines.len()
    }

    pub fn all(&self) -> Vec<Line> {
        self.since(0)
    }

    /// Lines after the first `count`.
    pub fn since(&self, count: usize) -> Vec<Line> {
        self.state().lines.get(count..).unwrap_or_default().to_vec()
    }

    /// Waits for the first line after the first `count` for which `wanted` returns a value. Fails at the deadline or at the
    /// end of the output; the error ends with the last lines.
    pub fn wait<T>(
        &self,
        what: &str,
        count: usize,
        deadline: Duration,
        mut wanted: impl FnMut(&Line) -> Option<T>,
    ) -> Result<T> {
        let end = Instant::now() + deadline;
        let mut seen = count;
        let mut state = self.state();
        loop {
            for line in state.lines.get(seen..).unwrap_or_default() {
                if let Some(got) = wanted(line) {
                    return Ok(got);
                }
            }
            seen = state.lines.len().max(count);
            let left = end.saturating_duration_since(Instant::now());
            if state.open == 0 {
                bail!("the output ended before {what}{}", last_lines(&state.lines));
            }
            if left.is_zero() {
                bail!(
                    "timed out after {deadline:?} waiting for {what}{}",
                    last_lines(&state.lines)
                );
            }
            state = self.more(state, left);
        }
    }

    /// Waits until another line arrives or the time is over.
    fn more<'a>(&'a self, state: MutexGuard<'a, State>, left: Duration) -> MutexGuard<'a, State> {
        let waited = self.0.1.wait_timeout(state, left);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Waits for the end of all streams: a process may end before its last line is read.
    pub fn wait_end(&self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        let mut state = self.state();
        while state.open > 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "timed out after {deadline:?} waiting for the end of the output{}",
                    last_lines(&state.lines)
                );
            }
            state = self.more(state, left);
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last ten lines, for error messages.
fn last_lines(lines: &[Line]) -> String {
    let last = &lines[lines.len().saturating_sub(10)..];
    if last.is_empty() {
        return "; no output".to_owned();
    }
    let texts: Vec<String> = last
        .iter()
        .map(|line| format!("\n    {}", line.text))
        .collect();
    format!("; last lines:{}", texts.concat())
}

/// The wall clock, ns since 1970.
pub fn unix_ns() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matching<'a>(text: &'a str) -> impl FnMut(&Line) -> Option<Line> + 'a {
        move |line| (line.text == text).then(|| line.clone())
    }

    #[test]
    fn waiting_finds_past_and_future_lines() {
        let (read, mut write) = std::io::pipe().unwrap();
        let lines = Lines::default();
        lines.listen(Stream::Stdout, read).unwrap();
        std::io::Write::write_all(&mut write, b"one\ntwo\n").unwrap();
        lines
            .wait("two", 0, Duration::from_secs(5), matching("two"))
            .unwrap();
        lines
            .wait("one", 0, Duration::from_secs(5), matching("one"))
            .unwrap();
        let waiting = {
            let lines = lines.clone();
            thread::spawn(move || lines.wait("three", 2, Duration::from_secs(5), matching("three")))
        };
        std::io::Write::write_all(&mut write, b"three\n").unwrap();
        assert_eq!(waiting.join().unwrap().unwrap().text, "three");
    }

    #[test]
    fn waiting_fails_at_the_end_of_the_output_with_the_last_lines() {
        let (read, mut write) = std::io::pipe().unwrap();
        let lines = Lines::default();
        lines.listen(Stream::Stderr, read).unwrap();
        std::io::Write::write_all(&mut write, b"a last line").unwrap();
        drop(write);
        let error = lines
            .wait("a word", 0, Duration::from_secs(60), matching("a word"))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "the output ended before a word; last lines:\n    a last line"
        );
    }
}
