//! Standard output for a loop that must not wait: whoever reads it may be slow, or have stopped reading.

use std::{
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// What waits is no more than this, and as much is being written: minutes of it, as a rule.
const MOST: usize = 4 << 20;
/// At the end, who reads gets so long for what is left.
const AT_THE_END: Duration = Duration::from_secs(2);

/// Written by a thread of its own. What is flushed at once is kept or lost as a whole.
pub(super) struct BufferedStdout {
    shared: Arc<Shared>,
    /// Since the last flush.
    now: Vec<u8>,
}

/// Tells what became of what was written.
pub(super) struct Fate(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    is_writing: bool,
    /// Nothing more comes.
    has_ended: bool,
    error: Option<io::Error>,
    lost_lines: u64,
}

impl BufferedStdout {
    pub(super) fn start(out: impl Write + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        thread::Builder::new()
            .name("output".to_owned())
            .spawn(move || theirs.write_all_to(out))?;
        Ok(Self {
            shared,
            now: Vec::new(),
        })
    }

    pub(super) fn fate(&self) -> Fate {
        Fate(Arc::clone(&self.shared))
    }
}

impl Fate {
    /// Lines that nobody read in time, since the last call.
    pub(super) fn lost_lines(&self) -> u64 {
        std::mem::take(&mut self.0.state().lost_lines)
    }

    /// Why the last of it could not be written, once that is over.
    pub(super) fn error(&self) -> Option<io::Error> {
        self.0.state().error.take()
    }
}

impl Write for BufferedStdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.now.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut state = self.shared.state();
        if let Some(error) = state.error.take() {
            return Err(error);
        }
        if state.waiting.len() + self.now.len() > MOST {
            let lines = self.now.iter().filter(|byte| **byte == b'\n').count();
            state.lost_lines += lines as u64;
            self.now.clear();
        } else {
            state.waiting.append(&mut self.now);
        }
        self.shared.changed.notify_all();
        Ok(())
    }
}

impl Drop for BufferedStdout {
    fn drop(&mut self) {
        let end = Instant::now() + AT_THE_END;
        let mut state = self.shared.state();
        state.has_ended = true;
        self.shared.changed.notify_all();
        while state.error.is_none() && (state.is_writing || !state.waiting.is_empty()) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.shared.wait(state, left);
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, most: Duration) -> MutexGuard<'a, State> {
        let woken = self.changed.wait_timeout(state, most);
        woken.unwrap_or_else(PoisonError::into_inner).0
    }

    fn write_all_to(&self, mut out: impl Write) {
        loop {
            let mut state = self.state();
            while state.waiting.is_empty() {
                if state.has_ended {
                    return;
                }
                state = self.wait(state, Duration::from_secs(3600));
            }
            let bytes = std::mem::take(&mut state.waiting);
            state.is_writing = true;
            drop(state);
            let written = out.write_all(&bytes).and_then(|()| out.flush());
            let mut state = self.state();
            state.is_writing = false;
            self.changed.notify_all();
            if let Err(error) = written {
                state.error = Some(error);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, os::unix::net::UnixStream};

    use super::*;

    #[test]
    fn all_of_it_is_read_in_order() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut out = BufferedStdout::start(ours).unwrap();
        let fate = out.fate();
        for line in 0..1_000 {
            writeln!(out, "{line}").unwrap();
            out.flush().unwrap();
        }
        drop(out);
        let mut read = String::new();
        theirs.read_to_string(&mut read).unwrap();
        let expected: String = (0..1_000).map(|line| format!("{line}\n")).collect();
        assert_eq!((read, fate.lost_lines()), (expected, 0));
    }

    #[test]
    fn whoever_stops_reading_holds_nobody_up_and_loses_whole_lines_which_are_counted() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut out = BufferedStdout::start(ours).unwrap();
        let fate = out.fate();
        let line = "a".repeat(99_999);
        let began = Instant::now();
        for _ in 0..100 {
            writeln!(out, "{line}").unwrap();
            out.flush().unwrap();
        }
        let lost = fate.lost_lines();
        // 42 lines wait at most, and as many are being written.
        assert!((15..60).contains(&lost), "{lost} of 100");
        drop(out);
        assert!(began.elapsed() < 10 * AT_THE_END);
        drop(theirs);
    }

    #[test]
    fn whoever_goes_away_is_noticed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut out = BufferedStdout::start(ours).unwrap();
        drop(theirs);
        let end = Instant::now() + Duration::from_secs(20);
        let error = loop {
            let _ = out.write(b"line\n").unwrap();
            match out.flush() {
                Err(error) => break error,
                Ok(()) => assert!(Instant::now() < end),
            }
            thread::sleep(Duration::from_millis(1));
        };
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
