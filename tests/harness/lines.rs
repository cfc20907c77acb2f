//! Lines that a program wrote, each with the time at which it arrived.

use std::{
    io::{BufRead as _, BufReader, Read},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Result, bail};

/// Where a line was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// One line, without its newline.
#[derive(Clone, Debug)]
pub struct Line {
    pub at: Instant,
    /// The same moment on the wall clock, ns since 1970.
    pub unix_ns: u64,
    pub stream: Stream,
    pub text: String,
}

#[derive(Default)]
struct Heard {
    lines: Vec<Line>,
    /// Streams that may still speak.
    open: u32,
}

/// All lines so far. Clones share them.
#[derive(Clone, Default)]
pub struct Lines(Arc<(Mutex<Heard>, Condvar)>);

impl Lines {
    /// Reads `from` to its end on a thread of its own.
    pub(crate) fn listen(&self, stream: Stream, from: impl Read + Send + 'static) -> Result<()> {
        self.heard().open += 1;
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
                    lines.heard().lines.push(line);
                    lines.0.1.notify_all();
                }
                lines.heard().open -= 1;
                lines.0.1.notify_all();
            })?;
        Ok(())
    }

    /// How many there are: where to go on with [`Lines::since`].
    pub fn count(&self) -> usize {
        self.heard().lines.len()
    }

    pub fn all(&self) -> Vec<Line> {
        self.since(0)
    }

    /// Those after the first `count`.
    pub fn since(&self, count: usize) -> Vec<Line> {
        self.heard().lines.get(count..).unwrap_or_default().to_vec()
    }

    /// The first line after the first `count` from which `wanted` makes something.
    pub fn wait<T>(
        &self,
        what: &str,
        count: usize,
        deadline: Duration,
        mut wanted: impl FnMut(&Line) -> Option<T>,
    ) -> Result<T> {
        let end = Instant::now() + deadline;
        let mut seen = count;
        let mut heard = self.heard();
        loop {
            for line in heard.lines.get(seen..).unwrap_or_default() {
                if let Some(got) = wanted(line) {
                    return Ok(got);
                }
            }
            seen = heard.lines.len().max(count);
            let left = end.saturating_duration_since(Instant::now());
            if heard.open == 0 {
                bail!(
                    "{what}: the output ended without it{}",
                    last_words(&heard.lines)
                );
            }
            if left.is_zero() {
                bail!(
                    "{what}: not within {deadline:?}{}",
                    last_words(&heard.lines)
                );
            }
            heard = self.more(heard, left);
        }
    }

    /// Until something more is heard, or the time is over.
    fn more<'a>(&'a self, heard: MutexGuard<'a, Heard>, left: Duration) -> MutexGuard<'a, Heard> {
        let waited = self.0.1.wait_timeout(heard, left);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Waits until nobody can write any more: the end of a process may be seen before its last line.
    pub fn wait_end(&self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        let mut heard = self.heard();
        while heard.open > 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "the end of the output: not within {deadline:?}{}",
                    last_words(&heard.lines)
                );
            }
            heard = self.more(heard, left);
        }
        Ok(())
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// For an error: what a person would look at first.
fn last_words(lines: &[Line]) -> String {
    let last = &lines[lines.len().saturating_sub(10)..];
    if last.is_empty() {
        return "; it wrote nothing".to_owned();
    }
    let texts: Vec<String> = last
        .iter()
        .map(|line| format!("\n    {}", line.text))
        .collect();
    format!("; it wrote last:{}", texts.concat())
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
    fn a_line_is_found_whether_it_came_before_or_comes_after() {
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
    fn waiting_ends_with_the_output_and_says_its_last_words() {
        let (read, mut write) = std::io::pipe().unwrap();
        let lines = Lines::default();
        lines.listen(Stream::Stderr, read).unwrap();
        std::io::Write::write_all(&mut write, b"no such luck").unwrap();
        drop(write);
        let error = lines
            .wait("a word", 0, Duration::from_secs(60), matching("word"))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "a word: the output ended without it; it wrote last:\n    no such luck"
        );
    }
}
