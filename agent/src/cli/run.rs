//! `tailback run`: the agent.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::Args;

use super::{
    Failure, Targets, duration,
    exit_code::{Outcome, say},
    interval,
    looks::Looks,
    output::{Output, tell},
    record::Recording,
    session::{self, Stop},
    signals::LiveSignals,
    traces::Traces,
};
use crate::{
    collect::{Collector, Others, cpu_time_ns, mono_ns},
    config::Config,
    event::Event,
    pipeline::Pipeline,
    sample::{Notice, Sample},
};

#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    targets: Targets,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    pace: Pace,
    /// Keep the stream of samples in this file too
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Send spans to this OTLP endpoint (default: OTEL_EXPORTER_OTLP_ENDPOINT)
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,
    /// Look closely all the time, whatever the queues are, and tell how often, for `cargo xtask bench`
    #[arg(long, hide = true, requires = "json")]
    focus_all: bool,
}

/// How often, and for how long.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(super) struct Pace {
    /// Between looks [default: 100ms]
    #[arg(long, value_name = "TIME", value_parser = interval)]
    pub(super) interval: Option<Duration>,
    /// Stop after this time
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(super) duration: Option<Duration>,
}

impl Pace {
    /// Between looks, as the command line says, else the configuration.
    fn interval_or(self, config: &Config) -> Duration {
        let configured = Duration::from_nanos(config.budget().interval_ns);
        self.interval.unwrap_or(configured)
    }
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let config = options.targets.config()?;
    let (mut sink, written) = options.output.patient_stdout()?;
    let mut traces = Traces::start(options.otlp.as_deref(), config.otlp.as_deref())?;
    let stop = Stop::on_signals()?;
    let mut ticks = Ticks::start(&options.targets, &config, options.pace)?;
    ticks.collector.profile_all(options.focus_all);
    let mut looks = options.focus_all.then(Looks::default);
    // Only now: a mistake in what is asked for must not cost an earlier recording.
    let record = options.record.as_deref();
    let mut recording = record.map(Recording::create).transpose()?;
    let mut pipeline = Pipeline::new(config.settings_for(), false);
    let mut signals = LiveSignals::start(
        &config.signal,
        options.targets.config.as_deref(),
        options.pace.interval_or(&config),
    )?;
    let watched = loop {
        let mut others = Others {
            samples_not_recorded: recording.as_ref().map_or(0, Recording::lost),
            ..Others::default()
        };
        if let Some(traces) = &traces {
            traces.report(&mut others);
        }
        signals.report(&mut others);
        others.notices.extend(not_read(written.lost_lines()));
        let sample = match ticks.next(&stop, others) {
            Ok(Some(sample)) => sample,
            Ok(None) => break Ok(()),
            Err(failure) => break Err(failure),
        };
        if let Some(recording) = &mut recording
            && let Err(failure) = recording.add(&sample)
        {
            // Watching goes on; the samples that are not kept are counted.
            say(failure);
        }
        let outcome = pipeline.step(&sample);
        // First of all: it is what others act upon.
        signals.tell(&sample, &pipeline, &outcome.events);
        if let Some(traces) = &mut traces {
            traces.tell(&outcome.events);
        }
        let told = tell(sink.as_mut(), &outcome.events);
        let told = told.and_then(|()| looks.as_mut().map_or(Ok(()), |looks| looks.tell(&sample)));
        if let Err(failure) = told.and_then(|()| ticks.spent(&outcome.focused)) {
            break Err(failure);
        }
    };
    // However it ended: what is open is told, recorded and delivered. The person first, for a collector may keep us waiting.
    let events: Vec<Event> = pipeline.finish();
    signals.finish(&events, &pipeline);
    let watched = watched.and_then(|()| tell(sink.as_mut(), &events));
    let recorded = recording.map_or(Ok(()), Recording::finish);
    if let Some(mut traces) = traces {
        traces.tell(&events);
        traces.finish();
    }
    drop(sink);
    let written = written
        .error()
        .map_or(Ok(()), |error| Err(Failure::stdout(error)));
    recorded.and(watched).and(written)
}

/// Said to who reads on, and to the recording.
fn not_read(lines: u64) -> Option<Notice> {
    (lines > 0).then(|| Notice {
        code: "output_not_read".to_owned(),
        text: format!("{lines} lines of output are lost: standard output is not read"),
    })
}

/// The clock of a live session: waits for each tick, makes its sample, and accounts for its cost.
pub(super) struct Ticks {
    collector: Collector,
    end: Option<Instant>,
    tick: crate::collect::Tick,
    cpu_before_ns: u64,
}

impl Ticks {
    pub(super) fn start(targets: &Targets, config: &Config, pace: Pace) -> Outcome<Self> {
        let mut budget = config.budget();
        if let Some(interval) = pace.interval {
            budget.interval_ns = interval.as_nanos() as u64;
        }
        let mut collector = session::collector(targets.specs(config)?, budget, false)?;
        collector.read_logs(config.messages().map_err(Failure::usage)?);
        Ok(Self::of(collector, pace.duration))
    }

    /// Over a collector, for so long.
    pub(super) fn of(mut collector: Collector, duration: Option<Duration>) -> Self {
        // The kernel's BTF and the verifier's work are behind us: give their memory back.
        // SAFETY: glibc's own function, no arguments that could be wrong.
        #[cfg(target_env = "gnu")]
        unsafe {
            libc::malloc_trim(0);
        }
        Self {
            end: duration.map(|duration| Instant::now() + duration),
            tick: collector.next_tick(),
            collector,
            cpu_before_ns: cpu_time_ns(),
        }
    }

    /// The next sample when it is due; `None` when asked to stop or when the time is over.
    pub(super) fn next(&mut self, stop: &Stop, others: Others) -> Outcome<Option<Sample>> {
        let wait = Duration::from_nanos(self.tick.at_ns.saturating_sub(mono_ns()));
        let is_last = self.end.is_some_and(|end| Instant::now() + wait >= end);
        let wait = self.end.map_or(wait, |end| {
            wait.min(end.saturating_duration_since(Instant::now()))
        });
        if stop.wait(wait) || is_last {
            return Ok(None);
        }
        self.cpu_before_ns = cpu_time_ns();
        self.collector
            .tick(self.tick, others)
            .map(Some)
            .map_err(Failure::kernel)
    }

    /// All that follows from the last sample is done.
    pub(super) fn spent(&mut self, focused: &BTreeSet<u32>) -> Outcome<()> {
        let cpu_ns = cpu_time_ns().saturating_sub(self.cpu_before_ns);
        self.collector
            .spent(self.tick, cpu_ns, focused)
            .map_err(Failure::kernel)?;
        self.tick = self.collector.next_tick();
        Ok(())
    }
}
