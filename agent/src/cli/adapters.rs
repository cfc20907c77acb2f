//! `tailback adapters`: serves the adapters, beside the agent.

use std::{path::PathBuf, time::Duration};

use anyhow::anyhow;
use clap::Args;

use super::{Failure, duration, exit_code::Outcome};
use crate::{adapters, config::Config};

#[derive(Debug, Args)]
pub(super) struct Options {
    /// The agent's configuration: its [signal] names the adapters
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// End when no agent was there for so long [default: never]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    linger: Option<Duration>,
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let config = Config::read(&options.config).map_err(Failure::usage)?;
    if !config.signal.has_adapters() {
        return Err(Failure::usage(anyhow!(
            "{} names no adapter to serve: [signal.http], [[signal.haproxy]], [[signal.envoy]], [[signal.orca]], [signal.keda] or [[signal.pressure_socket]]",
            options.config.display()
        )));
    }
    adapters::run(&config.signal, options.linger).map_err(Failure::usage)
}
