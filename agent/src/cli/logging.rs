//! The agent's debug log: off by default, on standard error, enabled with `--log FILTER` or `TAILBACK_LOG`.
//!
//! It explains what the agent does. What a user must know is a notice instead, whatever the filter. While the log is off,
//! each event costs one load and compare of `tracing`'s maximum level. A thread writes the lines, so a blocked standard
//! error never delays a sample; lines that do not fit into its buffer are dropped and counted.
#![forbid(unsafe_code)]

use std::{
    io::{self, IsTerminal as _},
    sync::OnceLock,
};

use anyhow::anyhow;
use tracing::{Level, debug, trace};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    filter::Targets, fmt, layer::SubscriberExt as _, registry, util::SubscriberInitExt as _,
};

use super::{
    Failure,
    exit_code::{Outcome, print_stderr},
};
use crate::event::Event;

/// The environment variable with the filter; `--log` overrides it.
pub(super) const VARIABLE: &str = "TAILBACK_LOG";
/// Maximum number of lines that wait to be written.
const MAX_WAITING_LINES: usize = 8_192;

/// The filter in force, for the adapter process.
static FILTER: OnceLock<String> = OnceLock::new();

/// A running log. Dropping it writes what is left.
pub(super) struct Log {
    dropped: ErrorCounter,
    /// `None` only while dropping.
    writer: Option<WorkerGuard>,
}

/// Starts the log if `--log` or `TAILBACK_LOG` asks for it.
pub(super) fn start(flag: Option<&str>) -> Outcome<Option<Log>> {
    let from_env = std::env::var(VARIABLE).ok().filter(|text| !text.is_empty());
    let (setting, text) = match (flag, from_env) {
        (Some(text), _) => ("--log", text.to_owned()),
        (None, Some(text)) => (VARIABLE, text),
        (None, None) => return Ok(None),
    };
    let filter = text.parse::<Targets>().map_err(|error| {
        Failure::usage(anyhow!(
            "{setting}: invalid filter {text:?}: {error}; use a level (debug), or levels by module (tailback::emit=trace,info)"
        ))
    })?;
    let (writer, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(MAX_WAITING_LINES)
        .thread_name("log")
        .finish(io::stderr());
    let log = Log {
        dropped: writer.error_counter(),
        writer: Some(guard),
    };
    let lines = fmt::layer()
        .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .with_writer(writer);
    registry()
        .with(filter)
        .with(lines)
        .try_init()
        .map_err(|error| Failure::bug(anyhow!("cannot start the log: {error}")))?;
    let _ = FILTER.set(text);
    Ok(Some(log))
}

/// The filter in force; `None` if the log is off.
pub(super) fn filter() -> Option<&'static str> {
    FILTER.get().map(String::as_str)
}

impl Drop for Log {
    fn drop(&mut self) {
        drop(self.writer.take());
        let dropped = self.dropped.dropped_lines();
        if dropped > 0 {
            print_stderr(format_args!("{dropped} log lines were dropped"));
        }
    }
}

/// Logs what the pipeline reports: targets, incidents, levels, episodes, causes.
pub(super) fn pipeline_events(events: &[Event]) {
    if !tracing::enabled!(Level::DEBUG) {
        return;
    }
    for event in events {
        match event {
            Event::Targets { targets, .. } => {
                debug!(count = targets.len(), "targets changed");
                for target in targets {
                    trace!(
                        id = target.id,
                        name = target.name,
                        pid = target.pid,
                        processes = target.tgids.len(),
                        neighbour = target.is_neighbour,
                        "target"
                    );
                }
            }
            Event::IncidentOpened { id, target, .. } => debug!(id, target, "incident opened"),
            Event::IncidentClosed { id, .. } => debug!(id, "incident closed"),
            Event::EpisodeOpened(episode) => debug!(
                id = episode.id,
                target = episode.key.target,
                kind = episode.key.kind.name(),
                queue = %episode.key.name(),
                score = episode.score_max,
                "episode opened"
            ),
            Event::Episode(episode) if !episode.ongoing => debug!(
                id = episode.id,
                level_max = episode.level_max.name(),
                duration_ns = episode.end.mono_ns.saturating_sub(episode.start.mono_ns),
                losses = episode.losses,
                "episode closed"
            ),
            Event::Level {
                state, from, to, ..
            } => debug!(
                target = state.key.target,
                kind = state.key.kind.name(),
                queue = %state.key.name(),
                from = from.name(),
                to = to.name(),
                score = state.score,
                "level changed"
            ),
            Event::Cause(stretch) => trace!(
                episode = stretch.episode,
                cause = stretch.verdict.cause.name(),
                share = stretch.verdict.share,
                confidence = stretch.verdict.confidence.name(),
                "cause"
            ),
            Event::Notice { notice, .. } => {
                debug!(code = notice.code, text = notice.text, "notice");
            }
            Event::Episode(_) | Event::Queue(_) | Event::Stretch(_) | Event::Agent { .. } => {}
        }
    }
}
