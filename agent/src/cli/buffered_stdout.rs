//! Standard output that never blocks the sampling loop, however slowly it is read.
//!
//! A thread writes what the loop has flushed. If the buffer is full, whole lines are dropped and counted.

use std::{
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// Maximum number of bytes that wait; as many again may be in the current write. 4 MiB are usually minutes of output.
const MAX_WAITING_BYTES: usize = 4 << 20;
/// How long the reader may take for the rest of the output when the agent ends.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// A writer that hands each flush to a thread. A flush is kept or dropped as a whole.
pub(super) struct BufferedStdout {
    shared: Arc<Shared>,
    /// Bytes since the last flush.
    unflushed: Vec<u8>,
}

/// Reports lost lines and write errors of a [`BufferedStdout`].
pub(super) struct OutputState(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    is_writing: bool,
    /// The writer was dropped.
    has_ended: bool,
    error: Option<io::Error>,
    lost_lines: u64,
}

impl BufferedStdout {
    pub(super) fn start(out: impl Write + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let writer = Arc::clone(&shared);
        thread::Builder::new()
            .name("output".to_owned())
            .spawn(move || writer.write_all_to(out))?;
        Ok(Self {
            shared,
            unflushed: Vec::new(),
        })
    }

    pub(super) fn state(&self) -> OutputState {
        OutputState(Arc::clone(&self.shared))
    }
}

impl OutputState {
    /// The number of lines dropped since the last call because the reader was too slow.
    pub(super) fn lost_lines(&self) -> u64 {
        std::mem::take(&mut self.0.state().lost_lines)
    }

    /// The write error, if one ended the output.
    pub(super) fn error(&self) -> Option<io::Error> {
        self.0.state().error.take()
    }
}

impl Write for BufferedStdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.unflushed.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut state = self.shared.state();
        if let Some(error) = state.error.take() {
            return Err(error);
        }
        if state.waiting.len() + self.unflushed.len() > MAX_WAITING_BYTES {
            let lines = self.unflushed.iter().filter(|byte| **byte == b'\n').count();
            state.lost_lines += lines as u64;
            self.unflushed.clear();
        } else {
            state.waiting.append(&mut self.unflushed);
        }
        self.shared.changed.notify_all();
        Ok(())
    }
}

impl Drop for BufferedStdout {
    fn drop(&mut self) {
        let end = Instant::now() + DRAIN_TIMEOUT;
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

    fn wait<'a>(&self, state: MutexGuard<'a, State>, timeout: Duration) -> MutexGuard<'a, State> {
        let woken = self.changed.wait_timeout(state, timeout);
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
    fn output_arrives_complete_and_in_order() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut out = BufferedStdout::start(ours).unwrap();
        let state = out.state();
        for line in 0..1_000 {
            writeln!(out, "{line}").unwrap();
            out.flush().unwrap();
        }
        drop(out);
        let mut read = String::new();
        theirs.read_to_string(&mut read).unwrap();
        let expected: String = (0..1_000).map(|line| format!("{line}\n")).collect();
        assert_eq!((read, state.lost_lines()), (expected, 0));
    }

    #[test]
    fn a_blocked_reader_never_blocks_the_writer_and_lost_lines_are_counted() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut out = BufferedStdout::start(ours).unwrap();
        let state = out.state();
        let line = "a".repeat(99_999);
        let began = Instant::now();
        for _ in 0..100 {
            writeln!(out, "{line}").unwrap();
            out.flush().unwrap();
        }
        let lost = state.lost_lines();
        // At most 42 lines wait, and as many again are being written.
        assert!((15..60).contains(&lost), "{lost} of 100");
        drop(out);
        assert!(began.elapsed() < 10 * DRAIN_TIMEOUT);
        drop(theirs);
    }

    #[test]
    fn a_closed_pipe_is_reported_as_an_error() {
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
