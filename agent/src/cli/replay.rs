//! `tailback replay`: runs the pipeline over a recording.

use std::{fs::File, io::BufReader, path::PathBuf};

use anyhow::Context as _;
use clap::Args;

use super::{
    Failure,
    exit_code::Outcome,
    logging,
    output::{Output, emit_all},
};
use crate::{config::Config, pipeline::Pipeline, sample::file::Reader};

#[derive(Debug, Args)]
pub(super) struct Options {
    /// The recording to replay
    file: PathBuf,
    #[command(flatten)]
    output: Output,
    /// Configuration file (TOML) with thresholds
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
            Ok(Some(sample)) => {
                let outcome = pipeline.step(&sample);
                logging::pipeline_events(&outcome.events);
                emit_all(sink.as_mut(), &outcome.events)?;
            }
            Ok(None) => break Ok(()),
            // Report what was read so far; the read error follows at the end.
            Err(error) => break Err(error),
        }
    };
    emit_all(sink.as_mut(), &pipeline.finish())?;
    ended.with_context(context).map_err(Failure::usage)
}
