//! `tailback adapters`: the adapter process, which serves the adapters beside the agent.

use std::{path::PathBuf, time::Duration};

use anyhow::anyhow;
use clap::Args;

use super::{Failure, duration, exit_code::Outcome};
use crate::{adapters, config::Config};

#[derive(Debug, Args)]
pub(super) struct Options {
    /// The agent's configuration file; its [signal] section configures the adapters (`-`: standard input)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Directory of the pages of the agent that has started this process
    #[arg(long, value_name = "DIR", hide = true)]
    directory: Option<PathBuf>,
    /// Exit after no agent has been seen for TIME [default: never]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    exit_idle_time: Option<Duration>,
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let config = Config::read(&options.config).map_err(Failure::usage)?;
    if !config.signal.has_adapters() {
        return Err(Failure::usage(anyhow!(
            "{} configures no adapter: add [signal.http], [[signal.haproxy]], [[signal.envoy]], [[signal.orca]], [signal.keda] or [[signal.pressure_socket]]",
            options.config.display()
        )));
    }
    let in_use = options.directory.as_deref();
    adapters::run(&config.signal, in_use, options.exit_idle_time).map_err(Failure::usage)
}
