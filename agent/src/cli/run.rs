//! `tailback run`: runs the agent until it is stopped.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::mpsc::sync_channel,
    time::{Duration, Instant},
};

use anyhow::{anyhow, bail};
use clap::Args;
use tracing::{Level, debug, trace};

use super::{
    Failure, Targets, TierOption, duration,
    exit_code::{Outcome, print_stderr},
    focus_samples::FocusSamples,
    helper::Helper,
    interval, logging,
    output::{Output, emit_all},
    record::Recording,
    reload::Reload,
    service_manager::ServiceManager,
    session::{self, Stop},
    signals::LiveSignals,
    traces::Traces,
};
use crate::{
    collect::{Budget, Collector, OutputStats, cpu_time_ns, mono_ns},
    config::Config,
    confinement::{drop_capabilities, filter_system_calls},
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
    timing: Timing,
    #[command(flatten)]
    tier: TierOption,
    /// Also record samples to FILE
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Export spans to this OTLP endpoint [default: $OTEL_EXPORTER_OTLP_ENDPOINT]
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,
    /// Focus all targets all the time and print the number of samples, for `cargo xtask bench`
    #[arg(long, hide = true, requires = "json")]
    focus_all: bool,
}

/// The sampling interval and the running time.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(super) struct Timing {
    /// Sampling interval [default: 100ms]
    #[arg(long, value_name = "TIME", value_parser = interval)]
    pub(super) interval: Option<Duration>,
    /// Stop after TIME
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(super) duration: Option<Duration>,
}

impl Timing {
    /// The CPU budget and the sampling intervals.
    fn budget(self, config: &Config) -> Budget {
        let mut budget = config.budget();
        if let Some(interval) = self.interval {
            budget.interval_ns = interval.as_nanos() as u64;
        }
        budget
    }

    /// The sampling interval: the command line's, else the configuration's.
    fn interval_or(self, config: &Config) -> Duration {
        Duration::from_nanos(self.budget(config).interval_ns)
    }
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let (config, text) = options.targets.config_and_text()?;
    let mut manager = ServiceManager::from_environment();
    // Before this process drops its privileges, and has threads.
    let helper = config.signal.publishes().then(Helper::start).transpose()?;
    let (mut sink, stdout) = options.output.buffered_stdout()?;
    let mut traces = Traces::start(options.otlp.as_deref(), config.otlp.as_deref())?;
    let (stop, mut reload) = match &options.targets.config {
        Some(file) => {
            let (request, requests) = sync_channel(1);
            let reload = Reload::start(file, text.clone(), config.clone(), requests)?;
            (Stop::or_reload(request)?, Some(reload))
        }
        // Nothing to reload.
        None => (Stop::on_signals()?, None),
    };
    let mut clock = SamplingClock::start(&options.targets, &config, options.timing, options.tier)?;
    clock.collector.focus_all(options.focus_all);
    let mut focus_samples = options.focus_all.then(FocusSamples::default);
    // Created last: a usage error must not truncate an existing recording.
    let record = options.record.as_deref();
    let mut recording = record.map(Recording::create).transpose()?;
    let mut pipeline = Pipeline::new(config.settings_for(), false);
    let mut signals = LiveSignals::start(
        &config.signal,
        &text,
        options.timing.interval_or(&config),
        helper,
    )?;
    if let Err(error) = clock.drop_privileges() {
        signals.notify(Notice {
            code: "privileges_kept".to_owned(),
            text: format!("the agent keeps privileges that it does not need: {error:#}"),
        });
    }
    if let Some(reload) = &reload {
        signals.set_config_file(reload.status());
    }
    let watched = loop {
        if signals.has_lost_helper() {
            break Err(Failure::bug(anyhow!(
                "the helper process has ended or does not respond: restart the agent"
            )));
        }
        if let Some(reload) = &mut reload
            && reload.poll(|text, from, to| {
                let next = Next {
                    text,
                    from,
                    to,
                    options,
                };
                next.apply(&mut clock, &mut pipeline, &mut signals)
            })
        {
            signals.set_config_file(reload.status());
            manager.reloaded(reload.status().error.as_deref());
        }
        let mut outputs = OutputStats {
            samples_not_recorded: recording.as_ref().map_or(0, Recording::lost),
            ..OutputStats::default()
        };
        if let Some(traces) = &traces {
            traces.report(&mut outputs);
        }
        signals.report(&mut outputs);
        if let Some(reload) = &mut reload {
            outputs.notices.append(&mut reload.take_notices());
        }
        outputs.notices.extend(stdout_notice(stdout.lost_lines()));
        let sample = match clock.next(&stop, outputs) {
            Ok(Some(sample)) => sample,
            Ok(None) => break Ok(()),
            Err(failure) => break Err(failure),
        };
        if let Some(recording) = &mut recording
            && let Err(failure) = recording.add(&sample)
        {
            // Keep sampling; the samples that were not recorded are counted.
            print_stderr(failure);
        }
        let outcome = pipeline.step(&sample);
        logging::pipeline_events(&outcome.events);
        // Signals first: consumers act on them.
        signals.publish(&sample, &pipeline, &outcome.events);
        manager.sampled(signals.services());
        if let Some(traces) = &mut traces {
            traces.export(&outcome.events);
        }
        let printed = emit_all(sink.as_mut(), &outcome.events);
        let printed = printed.and_then(|()| {
            focus_samples
                .as_mut()
                .map_or(Ok(()), |counter| counter.add(&sample))
        });
        if let Err(failure) = printed.and_then(|()| clock.finish_sample(&outcome.focused)) {
            break Err(failure);
        }
    };
    manager.stopping();
    // On every exit path, close what is open: signals, output, recording, spans. Spans come last: a collector may block.
    let events: Vec<Event> = pipeline.finish();
    signals.finish(&events, &pipeline);
    let watched = watched.and_then(|()| emit_all(sink.as_mut(), &events));
    let recorded = recording.map_or(Ok(()), Recording::finish);
    if let Some(mut traces) = traces {
        traces.export(&events);
        traces.finish();
    }
    drop(sink);
    let written = stdout
        .error()
        .map_or(Ok(()), |error| Err(Failure::stdout(error)));
    recorded.and(watched).and(written)
}

/// A configuration that replaces the one in force.
struct Next<'a> {
    text: &'a str,
    from: &'a Config,
    to: &'a Config,
    options: &'a Options,
}

impl Next<'_> {
    /// Applies all of it, or fails without an effect.
    fn apply(
        &self,
        clock: &mut SamplingClock,
        pipeline: &mut Pipeline,
        signals: &mut LiveSignals,
    ) -> anyhow::Result<()> {
        let Options {
            targets, timing, ..
        } = self.options;
        let specs = targets.specs(self.to).map_err(anyhow::Error::msg)?;
        let messages = self.to.messages()?;
        let apps = self.to.apps()?;
        let interval = timing.interval_or(self.to);
        signals.check(&self.to.signal, interval)?;
        if clock.has_hooks {
            check_hook_interval(interval)?;
        }
        // From here on nothing fails.
        clock.collector.set_specs(specs);
        if !self.to.has_same_logs(self.from) {
            clock.collector.read_logs(messages);
        }
        if !self.to.has_same_apps(self.from) {
            clock.collector.ask_apps(apps);
        }
        if timing.budget(self.to) != timing.budget(self.from) {
            clock.collector.set_budget(timing.budget(self.to));
            clock.plan = clock.collector.plan_next();
        }
        pipeline.set_settings(self.to.settings_for());
        signals.reload(&self.from.signal, &self.to.signal, self.text, interval);
        Ok(())
    }
}

/// The notice about lost output lines. It reaches the signals and the recording even while standard output is blocked.
fn stdout_notice(lines: u64) -> Option<Notice> {
    (lines > 0).then(|| Notice {
        code: "stdout_not_drained".to_owned(),
        text: format!("{lines} lines of output were dropped: standard output is not being read"),
    })
}

/// Longest sampling interval with hooks, which must not exceed their budget for longer than a second.
const MAX_HOOK_INTERVAL: Duration = Duration::from_secs(1);

fn check_hook_interval(interval: Duration) -> anyhow::Result<()> {
    if interval > MAX_HOOK_INTERVAL {
        bail!(
            "an interval of {interval:?} is too long for hooks, whose CPU time is checked with each sample: use at most 1s, or \
             `--tier glance`"
        );
    }
    Ok(())
}

/// The clock of a live session: waits until a sample is due, takes it, and accounts for its CPU cost.
pub(super) struct SamplingClock {
    collector: Collector,
    /// How long to sample, and when that is over: set with the first sample.
    duration: Option<Duration>,
    end: Option<Instant>,
    plan: crate::collect::SamplePlan,
    cpu_before_ns: u64,
    /// The focused targets after the last sample, for the debug log.
    focused: BTreeSet<u32>,
    /// Hooks may be attached while it runs.
    has_hooks: bool,
}

impl SamplingClock {
    pub(super) fn start(
        targets: &Targets,
        config: &Config,
        timing: Timing,
        tier: TierOption,
    ) -> Outcome<Self> {
        let tier = tier.or(config);
        if tier.has_hooks() {
            check_hook_interval(timing.interval_or(config)).map_err(Failure::usage)?;
        }
        let budget = timing.budget(config);
        let mut collector = session::collector(
            targets.specs(config)?,
            budget,
            false,
            targets.load_options(tier),
        )?;
        collector.set_tier(tier, config.hook_budget());
        collector.read_logs(config.messages().map_err(Failure::usage)?);
        collector.ask_apps(config.apps().map_err(Failure::usage)?);
        Ok(Self {
            has_hooks: tier.has_hooks(),
            ..Self::with(collector, timing.duration)
        })
    }

    /// Samples with `collector`, for `duration` if it is set.
    pub(super) fn with(mut collector: Collector, duration: Option<Duration>) -> Self {
        // BTF parsing and program loading are done: return their memory to the system.
        // SAFETY: malloc_trim takes no pointer, and every argument is valid.
        #[cfg(target_env = "gnu")]
        unsafe {
            libc::malloc_trim(0);
        }
        Self {
            duration,
            end: None,
            plan: collector.plan_next(),
            collector,
            cpu_before_ns: cpu_time_ns(),
            focused: BTreeSet::new(),
            has_hooks: false,
        }
    }

    /// Gives up, for good, what the next samples do not need.
    fn drop_privileges(&mut self) -> anyhow::Result<()> {
        let collector = &mut self.collector;
        // Hooks are optional: they must not be the reason that privileges are kept.
        let attaches_hooks = self.has_hooks && collector.check_hooks();
        let dropped = drop_capabilities(|| collector.check_access().is_ok());
        debug!(?dropped, "capabilities");
        // Whatever became of the capabilities: the filter forbids what they are for.
        filter_system_calls(attaches_hooks)?;
        match dropped?.pending {
            0 => Ok(()),
            pending => bail!(
                "{pending} of its threads wait for a file system; each drops its capabilities when it continues"
            ),
        }
    }

    /// Time until the next sample is due.
    pub(super) fn due_in(&self) -> Duration {
        Duration::from_nanos(self.plan.due_ns.saturating_sub(mono_ns()))
    }

    /// Waits until the next sample is due and takes it; `None` on a stop request or at the end of the running time.
    pub(super) fn next(&mut self, stop: &Stop, outputs: OutputStats) -> Outcome<Option<Sample>> {
        // Not before: on a busy machine the start may take as long as a short run, which would then observe nothing.
        if self.end.is_none() {
            self.end = self.duration.map(|duration| Instant::now() + duration);
        }
        let wait = self.due_in();
        let is_last = self.end.is_some_and(|end| Instant::now() + wait >= end);
        let wait = self.end.map_or(wait, |end| {
            wait.min(end.saturating_duration_since(Instant::now()))
        });
        if stop.wait(wait) || is_last {
            return Ok(None);
        }
        self.cpu_before_ns = cpu_time_ns();
        self.collector
            .sample(self.plan, outputs)
            .map(Some)
            .map_err(Failure::kernel)
    }

    /// Call after all processing of a sample: charges its CPU time and schedules the next one.
    pub(super) fn finish_sample(&mut self, focused: &BTreeSet<u32>) -> Outcome<()> {
        let cpu_ns = cpu_time_ns().saturating_sub(self.cpu_before_ns);
        trace!(cpu_ns, due_ns = self.plan.due_ns, "sample finished");
        if tracing::enabled!(Level::DEBUG) && self.focused != *focused {
            debug!(targets = ?focused, "focus changed");
            self.focused.clone_from(focused);
        }
        self.collector
            .finish_sample(self.plan, cpu_ns, focused)
            .map_err(Failure::kernel)?;
        self.plan = self.collector.plan_next();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hooks_are_not_left_alone_for_longer_than_a_second() {
        assert!(check_hook_interval(Duration::from_millis(100)).is_ok());
        assert!(check_hook_interval(MAX_HOOK_INTERVAL).is_ok());
        let error = check_hook_interval(Duration::from_secs(60)).unwrap_err();
        assert!(error.to_string().contains("60s is too long"), "{error}");
    }
}
