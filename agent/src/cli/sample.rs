//! `tailback sample`: every queue once, now.

use std::{collections::BTreeSet, io, thread, time::Duration};

use clap::Args;

use super::{
    Failure, Targets,
    failure::Outcome,
    output::{Output, colour, tell},
    session,
};
use crate::{
    collect::{Others, complete_tick},
    detect::{Event, QueueState},
    emit::{json::Json, table},
    pipeline::Pipeline,
};

/// Between the two looks.
const APART: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    targets: Targets,
    #[command(flatten)]
    output: Output,
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let config = options.targets.config()?;
    let specs = options.targets.specs(&config)?;
    let mut collector = session::collector(specs, config.budget(), true)?;
    let mut pipeline = Pipeline::new(config.settings_for(), true);
    let tick = complete_tick();
    let first = collector
        .tick(tick, Others::default())
        .map_err(Failure::kernel)?;
    let targets = first.targets.clone().unwrap_or_default();
    let told: Vec<Event> = pipeline.step(&first).events;
    collector
        .spent(tick, 0, &BTreeSet::new())
        .map_err(Failure::kernel)?;
    thread::sleep(APART);
    let second = collector
        .tick(tick, Others::default())
        .map_err(Failure::kernel)?;
    let events = pipeline.step(&second).events;

    if options.output.json {
        let mut json = Json::new(io::stdout());
        let known: Vec<Event> = told
            .into_iter()
            .filter(|event| matches!(event, Event::Targets { .. }))
            .collect();
        tell(&mut json, &known)?;
        let queues: Vec<Event> = events
            .into_iter()
            .filter(|event| matches!(event, Event::Queue(_)))
            .collect();
        return tell(&mut json, &queues);
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
