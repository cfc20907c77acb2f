//! Plays a recording at the speed at which it was made.

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context as _;

use super::{
    model::Model,
    source::{Shown, Step},
};
use crate::{
    cli::{Failure, exit_code::Outcome},
    config::Config,
    sample::{Sample, file::Reader},
    signal::live::Live,
};

/// How often a new view is made.
const VIEW_INTERVAL_NS: u64 = 500_000_000;

/// See the module.
pub(super) struct Player {
    path: PathBuf,
    name: String,
    config: Config,
    reader: Reader<BufReader<File>>,
    model: Model,
    /// The next sample; `None` at the end.
    next: Option<Sample>,
    began_ns: u64,
    ended_ns: u64,
    /// Position: a time in the recording, and when it was shown. It does not advance during a pause.
    at: (u64, Instant),
    is_paused: bool,
    viewed_ns: Option<u64>,
    /// Why the recording ends early.
    problem: Option<String>,
}

impl Player {
    /// Reads it once as a whole, to know its length, and to fail before the screen is taken over.
    pub(super) fn open(path: &Path, config: Config) -> Outcome<Self> {
        let mut times: Option<(u64, u64)> = None;
        let mut problem = None;
        let mut reader = reader(path)?;
        loop {
            match reader.next_sample() {
                Ok(Some(sample)) => {
                    let began_ns = times.map_or(sample.mono_ns, |(began_ns, _)| began_ns);
                    times = Some((began_ns, sample.mono_ns));
                }
                Ok(None) => break,
                Err(error) if times.is_none() => {
                    return Err(error)
                        .with_context(|| context(path))
                        .map_err(Failure::usage);
                }
                // What was read is shown.
                Err(error) => {
                    problem = Some(format!("the recording ends early: {error:#}"));
                    break;
                }
            }
        }
        let (began_ns, ended_ns) = times.unwrap_or_default();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mut player = Self {
            name: name.into_owned(),
            path: path.to_owned(),
            model: model(&config, began_ns, ended_ns),
            config,
            reader: self::reader(path)?,
            next: None,
            began_ns,
            ended_ns,
            at: (began_ns, Instant::now()),
            is_paused: false,
            viewed_ns: None,
            problem,
        };
        player.rewind()?;
        Ok(player)
    }

    fn rewind(&mut self) -> Outcome<()> {
        self.reader = reader(&self.path)?;
        self.model = model(&self.config, self.began_ns, self.ended_ns);
        self.viewed_ns = None;
        self.advance();
        Ok(())
    }

    /// An error is the end, which was reported when the recording was opened.
    fn advance(&mut self) {
        self.next = self.reader.next_sample().ok().flatten();
    }

    fn now_ns(&self) -> u64 {
        let (at_ns, since) = self.at;
        let passed_ns = if self.is_paused {
            0
        } else {
            u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
        };
        at_ns.saturating_add(passed_ns).min(self.ended_ns)
    }

    pub(super) fn is_over(&self) -> bool {
        self.next.is_none()
    }

    pub(super) fn pause(&mut self, is_paused: bool) {
        self.at = (self.now_ns(), Instant::now());
        self.is_paused = is_paused;
    }

    /// Moves by this many seconds. Seeking back replays from the beginning, because the pipeline cannot run backwards.
    pub(super) fn seek(&mut self, seconds: i64) -> Outcome<()> {
        let by_ns = seconds.unsigned_abs().saturating_mul(1_000_000_000);
        let to_ns = if seconds < 0 {
            self.rewound(by_ns)?
        } else {
            self.now_ns().saturating_add(by_ns).min(self.ended_ns)
        };
        self.at = (to_ns, Instant::now());
        self.viewed_ns = None;
        Ok(())
    }

    fn rewound(&mut self, by_ns: u64) -> Outcome<u64> {
        let to_ns = self.now_ns().saturating_sub(by_ns).max(self.began_ns);
        self.rewind()?;
        Ok(to_ns)
    }

    pub(super) fn due_in(&self) -> Duration {
        let Some(next) = &self.next else {
            // Only a view that was asked for is missing.
            return if self.viewed_ns.is_none() {
                Duration::ZERO
            } else {
                Duration::MAX
            };
        };
        match next.mono_ns.saturating_sub(self.now_ns()) {
            0 => Duration::ZERO,
            _ if self.is_paused => Duration::MAX,
            wait_ns => Duration::from_nanos(wait_ns),
        }
    }

    pub(super) fn step(&mut self) -> Outcome<Step> {
        let now_ns = self.now_ns();
        while let Some(sample) = self.next.take_if(|next| next.mono_ns <= now_ns) {
            self.model.step(&sample);
            self.advance();
        }
        let is_early = |at_ns: u64| now_ns.saturating_sub(at_ns) < VIEW_INTERVAL_NS;
        if self.viewed_ns.is_some_and(is_early) && !self.is_over() {
            return Ok(Step::Nothing);
        }
        self.viewed_ns = Some(now_ns);
        let time = |ns: u64| {
            let seconds = ns.saturating_sub(self.began_ns) / 1_000_000_000;
            format!("{}:{:02}", seconds / 60, seconds % 60)
        };
        Ok(Step::Shown(Box::new(Shown {
            view: self.model.view(),
            origin: format!("{} {} of {}", self.name, time(now_ns), time(self.ended_ns)),
            is_unpublished: true,
            problem: self.problem.clone().filter(|_| self.is_over()),
            ..Shown::default()
        })))
    }
}

fn model(config: &Config, began_ns: u64, ended_ns: u64) -> Model {
    let length_ns = ended_ns.saturating_sub(began_ns);
    Model::new(config, Live::of_recording(length_ns))
}

fn context(path: &Path) -> String {
    format!("cannot replay {}", path.display())
}

fn reader(path: &Path) -> Outcome<Reader<BufReader<File>>> {
    let file = File::open(path)
        .with_context(|| context(path))
        .map_err(Failure::usage)?;
    Reader::new(BufReader::new(file))
        .with_context(|| context(path))
        .map_err(Failure::usage)
}
