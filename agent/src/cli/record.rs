//! `tailback record`: keeps the stream of samples.

use std::{
    collections::BTreeSet,
    fs::File,
    io::BufWriter,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow};
use clap::Args;

use super::{
    Failure, Targets,
    exit_code::{Outcome, say},
    run::{Pace, Ticks},
    session::Stop,
};
use crate::{
    collect::Others,
    pipeline::Pipeline,
    sample::{Sample, file::Writer},
    text::count,
};

#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    targets: Targets,
    #[command(flatten)]
    pace: Pace,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let config = options.targets.config()?;
    let stop = Stop::on_signals()?;
    let mut ticks = Ticks::start(&options.targets, &config, options.pace)?;
    // Only now: a mistake in what is asked for must not cost an earlier recording.
    let mut recording = Recording::create(&options.out)?;
    // The pipeline runs along for one thing: it says when a closer look is worth it, as in `run`.
    let mut pipeline = Pipeline::new(config.settings_for(), false);
    while let Some(sample) = ticks.next(&stop, Others::default())? {
        recording.add(&sample)?;
        let focused: BTreeSet<_> = pipeline.step(&sample).focused;
        ticks.spent(&focused)?;
    }
    recording.finish()
}

/// A recording under way.
pub(super) struct Recording {
    path: PathBuf,
    /// `None` once writing has failed: what is on disk stays readable.
    writer: Option<Writer<BufWriter<File>>>,
    kept: u64,
    lost: u64,
}

impl Recording {
    pub(super) fn create(path: &Path) -> Outcome<Self> {
        Self::with(path, Writer::new)
    }

    /// A copy of another recording, as small as can be.
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

    /// Keeps a sample. Fails once; what comes later is counted as lost.
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
            "the recording {} ends here, with {kept} samples kept (they replay): make room and record again",
            self.path.display()
        ))))
    }

    /// Samples that were not kept.
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
        say(format_args!(
            "{} samples in {path}; `tailback replay {path}` runs the pipeline over them",
            count(self.kept)
        ));
        Ok(())
    }
}
