//! `cargo xtask bench …`: measures the cost of Tailback.
//!
//! Each benchmark prints a small table and the same figures as JSON, one object per line. A figure is a median with its
//! spread, next to its goal if it has one. Performance is measured here and never asserted in tests, which would fail on a
//! busy machine.

mod adapters;
mod app;
mod cpu;
mod figure;
mod footprint;
mod hold;
mod node;
mod overhead;
mod overload;
mod page;
mod pairs;
mod pins;
mod profile;
mod sample;
mod statistics;
mod watch;

use std::{env, path::PathBuf, process::ExitCode};

use anyhow::Result;

use crate::{
    cargo,
    setup::{self, Purpose},
};
use figure::Report;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
    /// Print JSON only
    #[arg(long, global = true)]
    json: bool,
}

#[derive(clap::Subcommand)]
enum What {
    /// One sample of many sockets and threads: the kernel's scan, and the whole sample
    Sample(sample::Args),
    /// Throughput that a busy Redis and a busy nginx lose while the agent monitors them
    Overhead(overhead::Args),
    /// Throughput that services lose while hooks measure their waits (`--tier watch`), or those of another process
    Watch(watch::Args),
    /// Memory and CPU use of the agent with many sockets
    Footprint(footprint::Args),
    /// Throughput that a busy service of 64 threads loses while it is focused, and the sampling rate
    Profile(profile::Args),
    /// Goodput and latency of a service under overload, with every consumer of Tailback's signal and without
    Overload(overload::Args),
    /// Cost of reading the page, and whether a reader ever sees a torn page
    Page(page::Args),
    /// Whether adapter clients can delay the agent's samples
    Adapters(adapters::Args),
    /// What it costs Redis, HAProxy and PgBouncer that the agent asks them for their queues, and what it costs the agent
    App(app::Args),
    /// Cost of a node agent with 200 pods and 10,000 connections
    Node(node::Args),
    #[command(flatten)]
    Hold(hold::Hold),
    #[command(hide = true)]
    Pod(node::Pod),
    #[command(hide = true)]
    LoadMemcached(profile::Load),
    #[command(hide = true)]
    PingPong(watch::PingPong),
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let mut report = Report::new(args.json);
    let mut code = ExitCode::SUCCESS;
    match &args.what {
        What::Hold(hold) => hold.forever()?,
        What::Pod(pod) => pod.serve()?,
        What::LoadMemcached(load) => match load.forever()? {},
        What::PingPong(game) => game.forever()?,
        What::Watch(args) => watch::measure(args, &mut report)?,
        What::Sample(args) => sample::measure(args, &mut report)?,
        What::Overhead(args) => overhead::measure(args, &mut report)?,
        What::Footprint(args) => footprint::measure(args, &mut report)?,
        What::Profile(args) => profile::measure(args, &mut report)?,
        What::Adapters(args) => adapters::measure(args, &mut report)?,
        What::App(args) => app::measure(args, &mut report)?,
        What::Node(args) => node::measure(args, &mut report)?,
        What::Page(args) => page::measure(args, &mut report)?,
        What::Overload(args) => code = overload::measure(args, &mut report)?,
    }
    report.print();
    Ok(code)
}

/// The agent's release build.
fn agent() -> Result<PathBuf> {
    match env::var_os("TAILBACK_BIN") {
        Some(path) => Ok(PathBuf::from(path)),
        None => {
            setup::ensure(Purpose::Build)?;
            cargo::build(cargo::AGENT)
        }
    }
}
