//! `tailback record`: writes samples to a file for later replay.

use std::{
    fs::File,
    io::BufWriter,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow};
use clap::Args;

use super::{
    Failure, Targets, TierOption,
    exit_code::{Outcome, print_stderr},
    logging,
    run::{SamplingClock, Timing},
    session::Stop,
};
use crate::{
    collect::OutputStats,
    pipeline::Pipeline,
    sample::{Sample, file::Writer},
    text::count,
};

#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    targets: Targets,
    #[command(flatten)]
    timing: Timing,
    #[command(flatten)]
    tier: TierOption,
    /// Write the recording to FILE
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let config = options.targets.config()?;
    let stop = Stop::on_signals()?;
    let mut clock = SamplingClock::start(&options.targets, &config, options.timing, options.tier)?;
    // Created last: a usage error must not truncate an existing recording.
    let mut recording = Recording::create(&options.out)?;
    // The pipeline only decides which targets are focused, so that the recording has the same samples as `run`.
    let mut pipeline = Pipeline::new(config.settings_for(), false);
    while let Some(sample) = clock.next(&stop, OutputStats::default())? {
        recording.add(&sample)?;
        let outcome = pipeline.step(&sample);
        logging::pipeline_events(&outcome.events);
        clock.finish_sample(&outcome.focused)?;
    }
    recording.finish()
}

/// A recording in progress.
pub(super) struct Recording {
    path: PathBuf,
    /// `None` once a write has failed; what is on disk stays readable.
    writer: Option<Writer<BufWriter<File>>>,
    kept: u64,
    lost: u64,
}

impl Recording {
    pub(super) fn create(path: &Path) -> Outcome<Self> {
        Self::with(path, Writer::new)
    }

    /// A recording with the best compression, for copies of other recordings.
    pub(super) fn packed(path: &Path) -> Outcome<Self> {
        Self::with(path, Writer::packed)
    }

    fn with(
        path: &Path,
        begin: impl FnOnce(BufWriter<File>) -> std::io::Result<Writer<BufWriter<File>>>,
    ) -> Outcome<Self> {
        let writer = File::create(path)
            .and_then(|file| begin(BufWriter::new(file)))
            .with_context(|| format!("cannot write the recording {}", path.display()))
            .map_err(Failure::output)?;
        Ok(Self {
            path: path.to_owned(),
            writer: Some(writer),
            kept: 0,
            lost: 0,
        })
    }

    /// Adds a sample. Fails once; later samples are counted as lost.
    pub(super) fn add(&mut self, sample: &Sample) -> Outcome<()> {
        let Some(writer) = &mut self.writer else {
            self.lost += 1;
            return Ok(());
        };
        let done = writer.add(sample);
        self.settle(done)
    }

    fn settle(&mut self, done: std::io::Result<()>) -> Outcome<()> {
        let Some(writer) = &self.writer else {
            return Ok(());
        };
        self.kept = writer.kept();
        let Err(error) = done else { return Ok(()) };
        self.lost += writer.pending();
        self.writer = None;
        let kept = count(self.kept);
        Err(Failure::output(anyhow!(error).context(format!(
            "the recording {} stops after {kept} samples, which can be replayed: free some space and record again",
            self.path.display()
        ))))
    }

    /// The number of samples that could not be written.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    pub(super) fn finish(mut self) -> Outcome<()> {
        let done = self.writer.as_mut().map_or(Ok(()), Writer::flush);
        self.settle(done)?;
        if self.lost > 0 {
            let text = format!("{} samples were not recorded", count(self.lost));
            return Err(Failure::output(anyhow!(text)));
        }
        let path = self.path.display();
        print_stderr(format_args!(
            "recorded {} samples to {path}; replay them with `tailback replay {path}`",
            count(self.kept)
        ));
        Ok(())
    }
}
