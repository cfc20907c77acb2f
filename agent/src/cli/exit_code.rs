//! A command's failure and its exit code.

use std::{
    env, fmt,
    io::{self, Write as _},
    sync::LazyLock,
};

use rustix::fs::fstat;

/// The result of a command.
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

    /// 2: invalid usage, configuration or recording.
    pub(super) fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self::with(2, error)
    }

    /// 3: not permitted, or not supported by the kernel.
    pub(super) fn kernel(error: impl Into<anyhow::Error>) -> Self {
        Self::with(3, error)
    }

    /// 4: the target does not exist.
    pub(super) fn no_target(error: impl Into<anyhow::Error>) -> Self {
        Self::with(4, error)
    }

    /// 70: an internal error.
    pub(super) fn bug(error: impl Into<anyhow::Error>) -> Self {
        Self::with(70, error)
    }

    /// 74: a file could not be written (EX_IOERR of sysexits.h, as 70 is EX_SOFTWARE).
    pub(super) fn output(error: impl Into<anyhow::Error>) -> Self {
        Self::with(74, error)
    }

    /// 74, or success if the reader of our output has closed the pipe.
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
        // The whole error chain on one line: what failed, then why.
        write!(f, "{:#}", self.error)
    }
}

/// Prints a line on standard error. Unlike `eprintln!` it does not panic if standard error is closed.
pub(super) fn print_stderr(text: impl fmt::Display) {
    print(Priority::Warning, text);
}

/// Prints why the program ends.
pub(super) fn print_failure(failure: &Failure) {
    print(Priority::Error, failure);
}

/// The priority of a line in systemd's journal, sd-daemon(3).
#[derive(Clone, Copy)]
enum Priority {
    Error = 3,
    Warning = 4,
}

fn print(priority: Priority, text: impl fmt::Display) {
    static IS_JOURNAL: LazyLock<bool> = LazyLock::new(|| is_journal().unwrap_or(false));
    let mut stderr = io::stderr();
    let _ = if *IS_JOURNAL {
        writeln!(stderr, "<{}>tailback: {text}", priority as u8)
    } else {
        writeln!(stderr, "tailback: {text}")
    };
}

/// Whether standard error is the journal: systemd then sets the variable to its device and inode number.
fn is_journal() -> Option<bool> {
    let stream = env::var("JOURNAL_STREAM").ok()?;
    let (device, inode) = stream.split_once(':')?;
    let own = fstat(io::stderr()).ok()?;
    Some(device.parse() == Ok(own.st_dev) && inode.parse() == Ok(own.st_ino))
}
