//! `tailback status`: published signals of the running agent, its adapter process, and connected consumers.

mod report;

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow};
use clap::Args;

use super::{
    Failure,
    exit_code::{Outcome, print_stderr},
};
use crate::{
    adapters::agent as socket,
    config::{Config, file, signal::Signal},
    signal::{
        directory::in_use,
        readers::{Reader, readers},
        stream::SOCKET,
    },
};

#[derive(Debug, Args)]
pub(super) struct Options {
    /// The agent's configuration file, if it sets [signal] directory
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON, one object per line: the agent, the adapter process, each process that maps a page
    #[arg(long)]
    json: bool,
}

/// Where to find the agent of a file that is invalid, or absent.
pub(super) fn directory_only(file: Option<&Path>) -> Signal {
    let mut signal = Signal::default();
    if let Some(directory) = file.and_then(file::directory) {
        signal.set_directory(directory);
    }
    signal
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let signal = match options.config.as_deref().map(Config::read) {
        Some(Ok(config)) => config.signal,
        None => Signal::default(),
        Some(Err(error)) => {
            // The running agent has rejected this file, and reports so.
            print_stderr(format!("{error:#}"));
            directory_only(options.config.as_deref())
        }
    };
    let directory = in_use(&signal.directory());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime
        .context("cannot connect to the agent")
        .map_err(Failure::bug)?;
    let (agent, process) = runtime.block_on(async {
        tokio::join!(
            socket::status(&directory),
            socket::adapter_process_status(&directory)
        )
    });
    if let (Err(error), Err(_)) = (&agent, &process) {
        return Err(Failure::no_target(anyhow!(
            "no running agent found at {} ({}): start one with `tailback run`, or pass its --config",
            directory.join(SOCKET).display(),
            error.root_cause()
        )));
    }
    // The adapter process maps every page; it is not a consumer itself.
    let own_pid = process
        .as_ref()
        .ok()
        .and_then(|process| process["pid"].as_u64());
    let mut readers = readers(&directory);
    readers.retain(|reader| Some(u64::from(reader.pid)) != own_pid);
    let text = if options.json {
        let objects = [&agent, &process].into_iter().flatten().cloned();
        objects
            .chain(readers.iter().map(Reader::object))
            .fold(String::new(), |text, object| format!("{text}{object}\n"))
    } else {
        report::report(&agent, &process, &readers)
    };
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(Failure::stdout)
}
