//! The pipeline with everything that a view needs: what the agent does with a sample, without publishing it.

use std::collections::BTreeSet;

use crate::{
    cli::logging,
    config::Config,
    pipeline::Pipeline,
    sample::Sample,
    signal::{
        Pressure, PressureTracker,
        live::{Live, view::View},
    },
};

/// See the module.
pub(super) struct Model {
    pipeline: Pipeline,
    tracker: PressureTracker,
    live: Live,
    pressures: Vec<Pressure>,
    unix_ns: u64,
}

impl Model {
    pub(super) fn new(config: &Config, live: Live) -> Self {
        Self {
            pipeline: Pipeline::new(config.settings_for(), false),
            tracker: PressureTracker::default(),
            live,
            pressures: Vec::new(),
            unix_ns: 0,
        }
    }

    /// Processes a sample; returns the targets to focus.
    pub(super) fn step(&mut self, sample: &Sample) -> BTreeSet<u32> {
        let outcome = self.pipeline.step(sample);
        logging::pipeline_events(&outcome.events);
        for event in &outcome.events {
            self.live.take(event);
        }
        if let Some(report) = &sample.hooks {
            self.live.set_exact_waits(report, sample.architecture);
        }
        let targets = self.pipeline.targets().all();
        let gauges = self.pipeline.gauges();
        self.pressures = self.tracker.read(sample.mono_ns, gauges, targets);
        self.live
            .read(sample.mono_ns, sample.unix_ns, &self.pressures);
        self.unix_ns = sample.unix_ns;
        outcome.focused
    }

    /// The view after the last sample.
    pub(super) fn view(&self) -> View {
        View::of(self.unix_ns, &self.pressures, &[], &self.live)
    }
}
