//! `tailback anonymize`: strips identifying names from a recording so that it can be shared.

use std::{
    fs::File,
    io::BufReader,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use clap::Args;

use super::{
    Failure, duration,
    exit_code::{Outcome, print_stderr},
    record::Recording,
};
use crate::sample::{
    anonymize::Anonymizer,
    cut::Cut,
    file::{ReadError, Reader},
};

#[derive(Debug, Args)]
pub(super) struct Options {
    /// The recording to read
    file: PathBuf,
    /// The anonymized recording to write
    out: PathBuf,
    /// Drop samples before this offset from the start
    #[arg(long, value_name = "TIME", value_parser = duration)]
    from: Option<Duration>,
    /// Drop samples after this offset from the start
    #[arg(long, value_name = "TIME", value_parser = duration)]
    until: Option<Duration>,
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let context = || format!("cannot anonymize {}", options.file.display());
    if is_same_file(&options.file, &options.out) {
        let error = anyhow!("input and output are the same file: choose another output");
        return Err(Failure::usage(error.context(context())));
    }
    let ns = |time: Option<Duration>, without| {
        time.map_or(without, |time| {
            u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
        })
    };
    let part = ns(options.from, 0)..ns(options.until, u64::MAX);
    let open = || -> Result<Reader<BufReader<File>>, anyhow::Error> {
        let file = File::open(&options.file)?;
        Ok(Reader::new(BufReader::new(file))?)
    };
    let read = || open().with_context(context).map_err(Failure::usage);
    let mut anonymizer = Anonymizer::default();
    let mut reader = read()?;
    // If the file is truncated, the second pass reports it.
    while let Ok(Some(sample)) = reader.next_sample() {
        anonymizer.learn(&sample);
    }
    let mut reader = read()?;
    let mut recording = Recording::packed(&options.out)?;
    let mut cut = Cut::new(part);
    let ended: Result<(), ReadError> = loop {
        match reader.next_sample() {
            Ok(Some(sample)) => {
                if let Some(sample) = cut.take(sample) {
                    recording.add(&anonymizer.anonymize(&sample))?;
                }
            }
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    recording.finish()?;
    ended.with_context(context).map_err(Failure::usage)?;
    print_stderr(
        "review it before you share it: `tailback replay --json -v` prints every word left in it",
    );
    Ok(())
}

/// Whether two paths name the same file, also through links.
fn is_same_file(one: &Path, other: &Path) -> bool {
    let file = |path: &Path| path.metadata().ok().map(|it| (it.dev(), it.ino()));
    file(one).is_some_and(|one| file(other) == Some(one))
}
