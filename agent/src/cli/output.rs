//! A command's output: text for people or JSON lines for programs.

use std::io::{self, IsTerminal as _, Write};

use clap::Args;

use super::{
    Failure,
    buffered_stdout::{BufferedStdout, OutputState},
    exit_code::Outcome,
};
use crate::{
    emit::{
        Sink,
        json::Json,
        terminal::{Colour, Terminal, Verbosity},
    },
    event::Event,
};

/// Output format and verbosity.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(super) struct Output {
    /// Print JSON, one object per line
    #[arg(long)]
    pub(super) json: bool,
    /// Print less: `diagnose` only the headlines; `run` and `replay` only which targets start and exit, notices that
    /// someone has to act on, and the summary of each episode
    #[arg(short, long)]
    pub(super) quiet: bool,
    /// Print more detail
    #[arg(short, long)]
    pub(super) verbose: bool,
}

impl Output {
    /// The sink for standard output.
    pub(super) fn stdout(self) -> Box<dyn Sink> {
        self.sink(io::stdout())
    }

    /// A sink that never blocks on standard output, and a handle that reports lost lines and write errors.
    pub(super) fn buffered_stdout(self) -> Outcome<(Box<dyn Sink>, OutputState)> {
        let out = BufferedStdout::start(io::stdout()).map_err(Failure::stdout)?;
        let state = out.state();
        Ok((self.sink(out), state))
    }

    fn sink(self, out: impl Write + 'static) -> Box<dyn Sink> {
        if self.json {
            return Box::new(Json::new(out));
        }
        Box::new(Terminal::new(out, colour(), self.verbosity()))
    }

    /// The verbosity of the text output.
    pub(super) fn verbosity(self) -> Verbosity {
        match self {
            Self { quiet: true, .. } => Verbosity::Quiet,
            Self { verbose: true, .. } => Verbosity::Verbose,
            _ => Verbosity::Normal,
        }
    }
}

/// Colour if standard output is a terminal and `NO_COLOR` is not set (no-color.org).
pub(super) fn colour() -> Colour {
    if io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        Colour::Always
    } else {
        Colour::Never
    }
}

/// Writes all events to the sink.
pub(super) fn emit_all(sink: &mut dyn Sink, events: &[Event]) -> Outcome<()> {
    for event in events {
        sink.emit(event).map_err(Failure::stdout)?;
    }
    Ok(())
}
