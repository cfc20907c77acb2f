//! `tailback bench-page`: writes a page as fast as possible, for the tests and benchmarks that check for torn reads.

use std::{fs, os::fd::AsFd as _, path::PathBuf, thread, time::Duration};

use anyhow::Context as _;
use clap::Args;

use super::{Failure, duration, exit_code::Outcome};
use crate::{
    collect::boot_ns,
    signal::{PageFile, Published, pattern},
};

/// Time to live of the page: longer than any pause of the writer on a busy host.
const TTL_NS: u64 = 10_000_000_000;

#[derive(Debug, Args)]
pub(super) struct Options {
    /// Directory of the page, whose file is named `page`
    directory: PathBuf,
    /// Write interval [default: no pause]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    every: Option<Duration>,
}

/// Runs until it is killed.
pub(super) fn run(options: &Options) -> Outcome<()> {
    let directory = fs::File::open(&options.directory)
        .with_context(|| format!("cannot open {}", options.directory.display()))
        .map_err(Failure::usage)?;
    let mut page = PageFile::open(directory.as_fd()).map_err(Failure::output)?;
    let mut published = Published {
        at_ns: boot_ns(),
        ttl_ns: TTL_NS,
    };
    for n in 0_u64.. {
        // Reading the clock every time would take most of the time.
        if n % 1_024 == 0 || options.every.is_some() {
            published.at_ns = boot_ns();
        }
        page.write(&pattern(n, published));
        if let Some(time) = options.every.filter(|time| !time.is_zero()) {
            thread::sleep(time);
        }
    }
    Ok(())
}
