//! Runs each sample through the model: queue → detect → diagnose. A pure function of the stream of samples, so that a
//! replay gives the same events as the live run.
#![forbid(unsafe_code)]

use std::{collections::BTreeSet, sync::Arc};

use crate::{
    detect::{Detector, Gauge, SettingsFor, TargetContext},
    diagnose::{Diagnosis, NoBaseline},
    event::{Event, Instant},
    queue::{Model, QueueKey, Targets},
    sample::{Notice, Sample, TargetId},
};

/// All state kept from one sample to the next.
pub struct Pipeline {
    model: Model,
    detector: Detector,
    diagnosis: Diagnosis,
    focused: BTreeSet<TargetId>,
    last: Instant,
    reported_queue_limit: bool,
}

/// The result of one sample.
#[derive(Debug, Default)]
pub struct Outcome {
    /// In reporting order.
    pub events: Vec<Event>,
    /// Targets with an unhealthy queue: their threads are to be profiled.
    pub focused: BTreeSet<TargetId>,
}

impl Pipeline {
    /// See [`Detector::new`].
    pub fn new(settings_for: SettingsFor, report_queues: bool) -> Self {
        Self {
            model: Model::default(),
            detector: Detector::new(settings_for, report_queues),
            diagnosis: Diagnosis::default(),
            focused: BTreeSet::new(),
            last: Instant::default(),
            reported_queue_limit: false,
        }
    }

    /// From now on, each verdict includes its explanation: every rule, with the numbers that it compared.
    pub fn explain(&mut self) {
        self.diagnosis.explain();
    }

    /// See [`Detector::set_settings`].
    pub fn set_settings(&mut self, settings_for: SettingsFor) {
        self.detector.set_settings(settings_for);
    }

    /// Processes one sample.
    pub fn step(&mut self, sample: &Sample) -> Outcome {
        let at = Instant {
            mono_ns: sample.mono_ns,
            unix_ns: sample.unix_ns,
        };
        self.last = at;
        let mut events = Vec::new();
        if let Some(targets) = &sample.targets {
            events.push(Event::Targets {
                at,
                targets: targets.iter().cloned().map(Arc::new).collect(),
            });
        }
        events.extend(
            sample
                .notices
                .iter()
                .cloned()
                .map(|notice| Event::Notice { at, notice }),
        );
        let focus_scope = self
            .diagnosis
            .focus_scope(sample, self.model.targets(), &self.focused);
        self.model.set_focus_scope(focus_scope.clone());
        let readings = self.model.read(sample);
        if readings.queues_over_limit > 0 && !self.reported_queue_limit {
            self.reported_queue_limit = true;
            events.push(Event::Notice {
                at,
                notice: Notice {
                    code: "too_many_queues".to_owned(),
                    text: format!(
                        "{} queues are not shown: a target has more than {} of one kind",
                        readings.queues_over_limit,
                        crate::queue::MAX_QUEUES_PER_KIND
                    ),
                },
            });
        }
        let targets = self.model.targets();
        self.diagnosis
            .read(sample, &readings, targets, &focus_scope);
        let neighbours = |target| self.diagnosis.neighbours(at, target, targets);
        let context = TargetContext {
            neighbours: &neighbours,
            exhausted_pool: &|target| self.diagnosis.exhausted_pool(target),
        };
        let focused = self
            .detector
            .read(at, &readings, targets, context, &mut events);
        let due = self
            .detector
            .open(at, |episode| self.diagnosis.is_due(at, episode));
        self.diagnosis.complete(at, targets, due, &mut events);
        self.focused.clone_from(&focused);
        events.extend(
            sample
                .agent
                .clone()
                .map(|report| Event::Agent { at, report }),
        );
        Outcome { events, focused }
    }

    /// The number of queues watched now.
    pub fn queues(&self) -> usize {
        self.detector.queues()
    }

    /// Every queue as of its last reading, in no particular order.
    pub fn gauges(&self) -> impl Iterator<Item = (&Arc<QueueKey>, &Gauge)> {
        self.detector.gauges()
    }

    /// The watched targets, as of the last sample.
    pub fn targets(&self) -> &Targets {
        self.model.targets()
    }

    /// The queues of requests in flight that cannot be judged because they have no baseline yet.
    pub fn no_baseline(&self) -> Vec<NoBaseline> {
        let ok = self.detector.ok_against_baseline();
        self.diagnosis.no_baseline(ok, self.model.targets())
    }

    /// Ends the stream. Returns the events that report the final state of open episodes.
    pub fn finish(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        self.detector.finish(self.last, &mut events);
        self.diagnosis
            .complete(self.last, self.model.targets(), Vec::new(), &mut events);
        events
    }
}
