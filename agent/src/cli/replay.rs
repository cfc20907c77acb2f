//! `tailback replay`: the same pipeline over a recorded stream.

use std::{fs::File, io::BufReader, path::PathBuf};

use anyhow::Context as _;
use clap::Args;

use super::{
    Failure,
    exit_code::Outcome,
    output::{Output, tell},
};
use crate::{config::Config, pipeline::Pipeline, sample::file::Reader};

#[derive(Debug, Args)]
pub(super) struct Options {
    /// The recording
    file: PathBuf,
    #[command(flatten)]
    output: Output,
    /// A TOML file with thresholds
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let config = options
        .config
        .as_deref()
        .map_or_else(|| Ok(Config::default()), Config::read)
        .map_err(Failure::usage)?;
    let context = || format!("cannot replay {}", options.file.display());
    let file = File::open(&options.file)
        .with_context(context)
        .map_err(Failure::usage)?;
    let mut reader = Reader::new(BufReader::new(file))
        .with_context(context)
        .map_err(Failure::usage)?;
    let mut pipeline = Pipeline::new(config.settings_for(), false);
    let mut sink = options.output.stdout();
    let ended = loop {
        match reader.next_sample() {
            Ok(Some(sample)) => tell(sink.as_mut(), &pipeline.step(&sample).events)?,
            Ok(None) => break Ok(()),
            // What was read up to here stands; that there should be more is said after it.
            Err(error) => break Err(error),
        }
    };
    tell(sink.as_mut(), &pipeline.finish())?;
    ended.with_context(context).map_err(Failure::usage)
}
