//! Why a command failed, and the exit code that says so.

use std::{
    fmt,
    io::{self, Write as _},
};

/// What every command answers.
pub(super) type Outcome<T> = Result<T, Failure>;

/// An error and its exit code.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    error: anyhow::Error,
}

impl Failure {
    /// 1: `--check` found a critical queue.
    pub(super) fn check(error: impl Into<anyhow::Error>) -> Self {
        Self::with(1, error)
    }

    /// 2: the command line or the configuration.
    pub(super) fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self::with(2, error)
    }

    /// 3: the kernel or the privileges do not allow it.
    pub(super) fn kernel(error: impl Into<anyhow::Error>) -> Self {
        Self::with(3, error)
    }

    /// 4: the target does not exist.
    pub(super) fn no_target(error: impl Into<anyhow::Error>) -> Self {
        Self::with(4, error)
    }

    /// 70: what should not happen.
    pub(super) fn bug(error: impl Into<anyhow::Error>) -> Self {
        Self::with(70, error)
    }

    /// 74: a file could not be written (EX_IOERR of sysexits.h, as 70 is EX_SOFTWARE).
    pub(super) fn output(error: impl Into<anyhow::Error>) -> Self {
        Self::with(74, error)
    }

    /// 74, or nothing at all where whoever read our output has gone away.
    pub(super) fn stdout(error: io::Error) -> Self {
        Self::output(anyhow::Error::from(error).context("cannot write to standard output"))
    }

    fn with(code: u8, error: impl Into<anyhow::Error>) -> Self {
        Self {
            code,
            error: error.into(),
        }
    }

    /// The exit code.
    pub fn code(&self) -> u8 {
        self.code
    }

    pub(super) fn is_broken_pipe(&self) -> bool {
        self.error
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The whole chain on one line: what was attempted, then why it failed.
        write!(f, "{:#}", self.error)
    }
}

/// A line on standard error. That nobody reads it is no reason to die, as `eprintln!` would.
pub(super) fn say(text: impl fmt::Display) {
    let _ = writeln!(io::stderr(), "tailback: {text}");
}
