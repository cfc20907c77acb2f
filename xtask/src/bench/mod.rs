//! `cargo xtask bench …`: what Tailback costs, measured.
//!
//! Each benchmark prints a small table and then the same figures as JSON, one object a line. Each figure is a
//! median with its spread, beside its goal where it has one. Speeds are measured here and never tested: a test
//! that fails on a busy machine is of no use.

mod adapters;
mod cpu;
mod figure;
mod footprint;
mod hold;
mod overhead;
mod overload;
mod page;
mod pairs;
mod pins;
mod profile;
mod statistics;
mod tick;

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
    /// One look at many sockets and threads: the kernel's walk, and the whole tick
    Tick(tick::Args),
    /// What a busy Redis and a busy nginx lose while the agent watches them
    Overhead(overhead::Args),
    /// Memory and CPU of the agent with many sockets to watch
    Footprint(footprint::Args),
    /// What a busy service of 64 threads loses while the agent looks closely at it all the time, and how often it can
    Profile(profile::Args),
    /// What a service does under more load than it can carry: alone, with a static limit, and with Tailback
    Overload(overload::Args),
    /// What it costs a service to ask its page, and whether a reader ever sees a torn one
    Page(page::Args),
    /// Whether those who listen can slow the agent's tick
    Adapters(adapters::Args),
    #[command(flatten)]
    Hold(hold::Hold),
    #[command(hide = true)]
    LoadMemcached(profile::Load),
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let mut report = Report::new(args.json);
    match &args.what {
        What::Hold(hold) => hold.forever()?,
        What::LoadMemcached(load) => match load.forever()? {},
        What::Tick(args) => tick::measure(args, &mut report)?,
        What::Overhead(args) => overhead::measure(args, &mut report)?,
        What::Footprint(args) => footprint::measure(args, &mut report)?,
        What::Profile(args) => profile::measure(args, &mut report)?,
        What::Adapters(args) => adapters::measure(args, &mut report)?,
        What::Page(args) => page::measure(args, &mut report)?,
        What::Overload(args) => overload::measure(args, &mut report)?,
    }
    report.print();
    Ok(ExitCode::SUCCESS)
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
