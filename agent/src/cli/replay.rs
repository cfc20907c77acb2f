//! `tailback replay`: runs the pipeline over a recording.

use std::{
    fs::File,
    io::{self, BufReader},
    path::PathBuf,
};

use anyhow::Context as _;
use clap::Args;

use super::{
    Failure,
    exit_code::Outcome,
    logging,
    output::{Output, emit_all},
};
use crate::{
    config::Config,
    emit::{explain, report::Findings},
    event::Event,
    pipeline::Pipeline,
    sample::file::Reader,
};

#[derive(Debug, Args)]
pub(super) struct Options {
    /// The recording to replay
    file: PathBuf,
    #[command(flatten)]
    output: Output,
    /// Configuration file (TOML) with thresholds
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print every rule behind each verdict, and the numbers that decided, at the end
    #[arg(long)]
    explain: bool,
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
    if options.explain {
        pipeline.explain();
    }
    let mut sink = options.output.stdout();
    let mut findings = Findings::default();
    let mut report = |events: &[Event]| {
        logging::pipeline_events(events);
        events.iter().for_each(|event| findings.take(event));
        emit_all(sink.as_mut(), events)
    };
    let ended = loop {
        match reader.next_sample() {
            Ok(Some(sample)) => report(&pipeline.step(&sample).events)?,
            Ok(None) => break Ok(()),
            // Report what was read so far; the read error follows at the end.
            Err(error) => break Err(error),
        }
    };
    report(&pipeline.finish())?;
    // JSON lines carry the rules in the episodes themselves.
    if options.explain && !options.output.json {
        let (episodes, targets) = (findings.episodes(), findings.targets());
        explain::write(&mut io::stdout().lock(), episodes, targets).map_err(Failure::stdout)?;
    }
    ended.with_context(context).map_err(Failure::usage)
}
