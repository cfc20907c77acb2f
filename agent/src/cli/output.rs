//! Where a command's output goes, for a person or for a program.

use std::io::{self, IsTerminal as _, Write};

use clap::Args;

use super::{
    Failure,
    buffered_stdout::{BufferedStdout, Fate},
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

/// How to say it.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(super) struct Output {
    /// One JSON object a line
    #[arg(long)]
    pub(super) json: bool,
    /// Say less: summaries alone
    #[arg(short, long)]
    pub(super) quiet: bool,
    /// Say more
    #[arg(short, long)]
    pub(super) verbose: bool,
}

impl Output {
    /// The sink for standard output.
    pub(super) fn stdout(self) -> Box<dyn Sink> {
        self.sink(io::stdout())
    }

    /// The same for a command that waits for nobody who reads it, and what becomes of it.
    pub(super) fn patient_stdout(self) -> Outcome<(Box<dyn Sink>, Fate)> {
        let out = BufferedStdout::start(io::stdout()).map_err(Failure::stdout)?;
        let fate = out.fate();
        Ok((self.sink(out), fate))
    }

    fn sink(self, out: impl Write + 'static) -> Box<dyn Sink> {
        if self.json {
            return Box::new(Json::new(out));
        }
        Box::new(Terminal::new(out, colour(), self.verbosity()))
    }

    /// How much to say to a person.
    pub(super) fn verbosity(self) -> Verbosity {
        match self {
            Self { quiet: true, .. } => Verbosity::Quiet,
            Self { verbose: true, .. } => Verbosity::Verbose,
            _ => Verbosity::Normal,
        }
    }
}

/// Colour for a terminal, unless the user wants none (no-color.org).
pub(super) fn colour() -> Colour {
    if io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        Colour::Always
    } else {
        Colour::Never
    }
}

/// Tells all events.
pub(super) fn tell(sink: &mut dyn Sink, events: &[Event]) -> Outcome<()> {
    for event in events {
        sink.emit(event).map_err(Failure::stdout)?;
    }
    Ok(())
}
