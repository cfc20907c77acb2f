//! `tailback bench-page`: a page written as fast as it goes, for those that look for a torn one. Not for users.

use std::{fs, os::fd::AsFd as _, path::PathBuf, thread, time::Duration};

use anyhow::Context as _;
use clap::Args;

use super::{Failure, duration, exit_code::Outcome};
use crate::{
    collect::boot_ns,
    signal::{PageFile, Published, pattern},
};

const TTL_NS: u64 = 10_000_000_000;

#[derive(Debug, Args)]
pub(super) struct Options {
    /// The page is `page` in this directory
    directory: PathBuf,
    /// Write so often [default: without a break]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    every: Option<Duration>,
}

/// Until it is killed.
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
        // The clock would be most of the work.
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
