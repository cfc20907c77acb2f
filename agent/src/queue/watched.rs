//! Test helper: one watched service that is sampled at a fixed interval.

use super::{Kind, Model, Reading};
use crate::sample::{Sample, Scans, Target};

/// Interval between samples, ns.
pub(super) const TICK: u64 = 100_000_000;
/// The first process of the service.
pub(super) const PID: u32 = 12;

/// A model of one service.
pub(super) struct Watched {
    model: Model,
    now_ns: u64,
    targets: Option<Vec<Target>>,
    gone: Vec<String>,
}

impl Default for Watched {
    fn default() -> Self {
        Self::of(&[PID])
    }
}

impl Watched {
    /// A service with these processes.
    pub(super) fn of(tgids: &[u32]) -> Self {
        let target = Target {
            id: 1,
            tgids: tgids.to_vec(),
            ..Target::default()
        };
        Self {
            model: Model::default(),
            now_ns: TICK,
            targets: Some(vec![target]),
            gone: Vec::new(),
        }
    }

    /// The queues of this kind after a file scan, one tick after the previous sample.
    pub(super) fn scan(&mut self, kind: Kind, sample: Sample) -> Vec<(String, Reading)> {
        let scans = Scans {
            files: true,
            ..sample.scans
        };
        self.read(kind, Sample { scans, ..sample })
    }

    /// The same, for a service with exactly one queue of this kind.
    pub(super) fn scan_one(&mut self, kind: Kind, sample: Sample) -> Reading {
        let mut queues = self.scan(kind, sample);
        assert_eq!(queues.len(), 1, "{queues:?}");
        queues.remove(0).1
    }

    /// The queues of this kind after this sample, one tick after the previous one.
    pub(super) fn read(&mut self, kind: Kind, sample: Sample) -> Vec<(String, Reading)> {
        self.now_ns += TICK;
        let sample = Sample {
            mono_ns: self.now_ns,
            targets: self.targets.take(),
            ..sample
        };
        let readings = self.model.read(&sample);
        let names = readings.gone.iter().map(|key| key.name().to_owned());
        self.gone = names.collect();
        let of_kind = |(key, reading): (std::sync::Arc<super::QueueKey>, Reading)| {
            (key.kind == kind).then(|| (key.name().to_owned(), reading))
        };
        readings.queues.into_iter().filter_map(of_kind).collect()
    }

    /// Queues of any kind that the last sample ended.
    pub(super) fn gone(&self) -> Vec<String> {
        self.gone.clone()
    }
}

/// A measure of a reading, by its JSON key.
pub(super) fn extra(reading: &Reading, key: &str) -> Option<f64> {
    reading.extra(key)
}
