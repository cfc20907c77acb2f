//! `cargo xtask soak`: a node agent under churn for hours, with bounds on memory, descriptors, late samples and lost spans.

use std::{process::ExitCode, time::Duration};

use anyhow::Result;
use tailback_tests::soak::{self, Plan};

use crate::{
    cargo,
    setup::{self, Purpose},
};

#[derive(clap::Args)]
pub struct Args {
    /// Duration: `90s`, `30m`, `8h`; at least 40s
    #[arg(long = "for", value_name = "TIME", default_value = "30m", value_parser = duration)]
    time: Duration,
    /// Processes that start and exit, per second
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500))]
    processes: u32,
    /// Connections that are made and closed, per second
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=5000))]
    connections: u32,
    /// Share of samples that may be late, percent
    #[arg(long, default_value_t = 1.0)]
    late: f64,
}

pub fn main(args: &Args) -> Result<ExitCode> {
    setup::ensure(Purpose::Build)?;
    let [agent, subject] = cargo::build_all([cargo::AGENT, cargo::SUBJECT])?;
    let plan = Plan {
        agent: &agent,
        subject: &subject,
        length: args.time,
        processes_per_s: args.processes,
        connections_per_s: args.connections,
        max_late: args.late / 100.0,
    };
    let outcome = soak::run(&plan, |line| eprintln!("{line}"))?;
    print!("{}", outcome.text);
    for fault in &outcome.faults {
        eprintln!("error: {fault}");
    }
    Ok(if outcome.faults.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// `90s`, `30m`, `8h`.
fn duration(text: &str) -> Result<Duration> {
    let time = Duration::from_secs(crate::fuzz::seconds(text)?);
    anyhow::ensure!(
        time >= Duration::from_secs(40),
        "{text} is shorter than 40s"
    );
    Ok(time)
}
