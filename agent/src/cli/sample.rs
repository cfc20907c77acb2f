//! `tailback sample`: every queue once, now; or at each look of a while.

use std::{
    collections::BTreeSet,
    io, thread,
    time::{Duration, Instant},
};

use clap::Args;

use super::{
    Failure, Targets,
    exit_code::Outcome,
    output::{Output, colour, tell},
    run::Pace,
    session,
};
use crate::{
    collect::{Others, complete_tick},
    emit::{json::Json, table},
    event::{Event, QueueState},
    pipeline::Pipeline,
};

/// Between two looks.
const APART: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    targets: Targets,
    #[command(flatten)]
    output: Output,
    /// With a duration: look until it is over. What waited when it began has an age then; --json tells every look
    #[command(flatten)]
    pace: Pace,
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let config = options.targets.config()?;
    let specs = options.targets.specs(&config)?;
    let mut collector = session::collector(specs, config.budget(), true)?;
    let mut pipeline = Pipeline::new(config.settings_for(), true);
    let mut json = options.output.json.then(|| Json::new(io::stdout()));
    let tick = complete_tick();
    let apart = options.pace.interval.unwrap_or(APART);
    let end = Instant::now() + options.pace.duration.unwrap_or_default();
    let first = collector
        .tick(tick, Others::default())
        .map_err(Failure::kernel)?;
    let targets = first.targets.clone().unwrap_or_default();
    let mut events: Vec<Event> = pipeline.step(&first).events;
    if let Some(json) = &mut json {
        events.retain(|event| matches!(event, Event::Targets { .. }));
        tell(json, &events)?;
    }
    let mut due = Instant::now();
    loop {
        collector
            .spent(tick, 0, &BTreeSet::new())
            .map_err(Failure::kernel)?;
        // Kept in step, but never so near to the last that nothing can be told from the two.
        due += apart;
        let rest = due.saturating_duration_since(Instant::now());
        thread::sleep(rest.max(apart / 2));
        let sample = collector
            .tick(tick, Others::default())
            .map_err(Failure::kernel)?;
        events = pipeline.step(&sample).events;
        if let Some(json) = &mut json {
            events.retain(|event| matches!(event, Event::Queue(_)));
            tell(json, &events)?;
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
        options.output.verbose,
        colour(),
    )
    .map_err(Failure::stdout)
}
