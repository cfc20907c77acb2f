//! `--log-bpf`: prints the debug lines of the eBPF programs, in the agent's log if that is on, else on standard error.
//!
//! The programs write through aya-log to a ring buffer, at most [`tailback_ebpf::LOG_LINES_PER_SECOND`] lines per second.
//! The agent drains it after each scan. Without the flag the verifier prunes that code (see `ebpf/src/log.rs`).

use std::{
    fmt,
    io::{self, Write as _},
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{Array, MapData},
};
use aya_log::{EbpfLogger, Level};
use log::{Log, Metadata, Record};
use tailback_ebpf::LogLimit;

/// The read-only global that holds the log level of the programs.
pub(super) const LEVEL_GLOBAL: &str = aya_log::LEVEL;
/// Target of these lines in the filter of `--log`.
const LOG_TARGET: &str = "tailback::bpf";
/// The map that aya-log writes to.
pub(super) const LOG_MAP: &str = "AYA_LOGS";

/// The level to load the programs with; 0 prunes every log statement.
pub(super) fn level(enabled: bool) -> u8 {
    if enabled { Level::Debug as u8 } else { 0 }
}

/// The reader of the ring buffer.
pub(super) struct BpfLog {
    logger: EbpfLogger<AgentLog>,
    limit: Array<MapData, LogLimitPod>,
    /// Suppressed lines reported so far.
    suppressed: u64,
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct LogLimitPod(LogLimit);
// SAFETY: `LogLimit` is plain old data (bytemuck checks it).
unsafe impl aya::Pod for LogLimitPod {}

impl BpfLog {
    /// Takes the maps out of an object that was loaded with logging.
    pub(super) fn new(ebpf: &mut Ebpf) -> Result<Self> {
        let limit = ebpf
            .take_map("LOG_LIMIT")
            .context("the eBPF object has no map LOG_LIMIT")?;
        Ok(Self {
            limit: Array::try_from(limit)?,
            logger: EbpfLogger::init_with_logger(ebpf, AgentLog)?,
            suppressed: 0,
        })
    }

    /// Prints the lines written since the last call, and how many the rate limit suppressed.
    pub(super) fn flush(&mut self) {
        self.logger.flush();
        let suppressed = self.limit.get(&0, 0).map_or(0, |limit| limit.0.suppressed);
        if suppressed > self.suppressed {
            print(format_args!(
                "{} lines suppressed by the rate limit",
                suppressed - self.suppressed
            ));
            self.suppressed = suppressed;
        }
    }
}

/// Forwards log records to [`print`].
struct AgentLog;

impl Log for AgentLog {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        print(*record.args());
    }

    fn flush(&self) {}
}

/// Prints one line. An error is ignored: debug output must not stop the agent.
fn print(line: fmt::Arguments<'_>) {
    if tracing::enabled!(target: LOG_TARGET, tracing::Level::DEBUG) {
        tracing::debug!(target: LOG_TARGET, "{line}");
    } else {
        let _ = writeln!(io::stderr(), "tailback: bpf: {line}");
    }
}
