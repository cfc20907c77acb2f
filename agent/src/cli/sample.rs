//! `tailback sample`: prints every queue once. With `--duration`: after each interval as JSON, or the last state as a table.

use std::{
    collections::BTreeSet,
    io, thread,
    time::{Duration, Instant},
};

use clap::Args;

use super::{
    Failure, Targets,
    exit_code::Outcome,
    output::{colour, emit_all},
    run::Timing,
    session,
};
use crate::{
    collect::{OutputStats, SamplePlan, Tier},
    emit::{json::Json, table},
    event::{Event, QueueState},
    pipeline::Pipeline,
};

/// Default sampling interval.
const INTERVAL: Duration = Duration::from_millis(100);
/// How long services are waited for that are asked for their own queues: their time limit, and some to spare.
const APP_LIMIT: Duration = Duration::from_millis(400);

#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    targets: Targets,
    /// Print JSON, one object per line
    #[arg(long)]
    json: bool,
    /// Also print idle queues
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    timing: Timing,
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let config = options.targets.config()?;
    let specs = options.targets.with_every_process().specs(&config)?;
    let mut collector = session::collector(
        specs,
        config.budget(),
        true,
        options.targets.load_options(Tier::Glance),
    )?;
    collector.ask_apps(config.apps().map_err(Failure::usage)?);
    let mut pipeline = Pipeline::new(config.settings_for(), true);
    let mut json = options.json.then(|| Json::new(io::stdout()));
    let plan = SamplePlan::complete();
    let interval = options.timing.interval.unwrap_or(INTERVAL);
    let end = Instant::now() + options.timing.duration.unwrap_or_default();
    let first = collector
        .sample(plan, OutputStats::default())
        .map_err(Failure::kernel)?;
    let targets = first.targets.clone().unwrap_or_default();
    // The first scan found where services are asked.
    collector.wait_for_apps(APP_LIMIT);
    let mut events: Vec<Event> = pipeline.step(&first).events;
    if let Some(json) = &mut json {
        events.retain(|event| matches!(event, Event::Targets { .. }));
        emit_all(json, &events)?;
    }
    let mut due = Instant::now();
    loop {
        collector
            .finish_sample(plan, 0, &BTreeSet::new())
            .map_err(Failure::kernel)?;
        // Keep in step with the clock, but never sample so early that the rates become meaningless.
        due += interval;
        let rest = due.saturating_duration_since(Instant::now());
        thread::sleep(rest.max(interval / 2));
        let sample = collector
            .sample(plan, OutputStats::default())
            .map_err(Failure::kernel)?;
        events = pipeline.step(&sample).events;
        if let Some(json) = &mut json {
            events.retain(|event| matches!(event, Event::Queue(_)));
            emit_all(json, &events)?;
        }
        if Instant::now() >= end {
            break;
        }
    }
    if json.is_some() {
        return Ok(());
    }
    let states: Vec<QueueState> = events
        .into_iter()
        .filter_map(|event| match event {
            Event::Queue(state) => Some(state),
            _ => None,
        })
        .collect();
    let target = |id| {
        targets
            .iter()
            .find(|target| target.id == id)
            .cloned()
            .map(Into::into)
    };
    table::write(
        &mut io::stdout(),
        &states,
        target,
        options.verbose,
        colour(),
    )
    .map_err(Failure::stdout)
}
