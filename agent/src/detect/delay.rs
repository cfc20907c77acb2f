//! Which delay counts against a queue, and which delay is acceptable. There is one type per way of judging.
//!
//! Most queues are judged by their own delay. Requests in flight are normal, so they are compared with their baseline. Until there
//! is one, they are judged by how they began (cold start). Some kinds only explain others and are not judged.

use super::{
    baseline::BaselineWait,
    cold_start::{ColdStart, Waiting},
    settings::Settings,
};
use crate::queue::{Criterion, Kind, Reading};

/// The delay of one reading.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Delay {
    /// What counts against the queue now, ns.
    pub(super) now_ns: u64,
    /// Age of the oldest item, where it proves how long the delay has been standing already, ns; else 0.
    pub(super) proven_age_ns: u64,
    /// The acceptable delay, unless one is configured, ns.
    pub(super) target_ns: u64,
    /// Measured without a baseline.
    pub(super) is_cold_start: bool,
    /// This reading showed that the queue has grown since it was first observed: its past cannot serve as a baseline.
    pub(super) has_grown: bool,
}

/// What the detector knows about a queue without a baseline.
#[derive(Clone, Copy)]
pub(super) enum WithoutBaseline {
    /// Nothing: the queue is not judged before it has one.
    NotJudged,
    /// It may be judged by how it began, or by an exhausted pool with this many connections.
    ColdStart { exhausted_pool: Option<u64> },
}

/// How the delay of a queue is judged.
pub(super) enum Mode {
    /// By itself, against half the service time.
    Delay,
    /// Against its own past.
    Baseline(Box<AgainstBaseline>),
    /// Not at all: it explains other queues.
    Context,
}

impl Mode {
    pub(super) fn of(kind: Kind) -> Self {
        match kind.criterion() {
            Criterion::DelayAndFill | Criterion::Delay => Self::Delay,
            Criterion::AgainstBaseline => Self::Baseline(Box::default()),
            Criterion::Context => Self::Context,
        }
    }
}

/// The delay of a queue that is judged by itself.
pub(super) fn own_delay(reading: &Reading, service_ns: Option<u64>, settings: &Settings) -> Delay {
    let waited_ns = reading.wait_ns.max(reading.oldest_age_ns).unwrap_or(0);
    Delay {
        now_ns: if reading.depth > 0 { waited_ns } else { 0 },
        proven_age_ns: reading.oldest_age_ns.unwrap_or(0),
        target_ns: own_target_ns(service_ns, settings),
        ..Delay::default()
    }
}

/// A queue that only explains others has no delay.
pub(super) fn no_delay(service_ns: Option<u64>, settings: &Settings) -> Delay {
    Delay {
        target_ns: own_target_ns(service_ns, settings),
        ..Delay::default()
    }
}

fn own_target_ns(service_ns: Option<u64>, settings: &Settings) -> u64 {
    (service_ns.unwrap_or(0) / 2).clamp(settings.target_delay_min_ns, settings.target_delay_max_ns)
}

/// A queue that is compared with its own past.
#[derive(Default)]
pub(super) struct AgainstBaseline {
    baseline: BaselineWait,
    cold_start: ColdStart,
    /// Judged by its cold start until the queue is at rest again.
    by_cold_start: bool,
}

impl AgainstBaseline {
    /// The delay of a reading.
    pub(super) fn delay(
        &mut self,
        now_ns: u64,
        reading: &Reading,
        is_at_rest: bool,
        without: WithoutBaseline,
    ) -> Delay {
        let mut has_grown = false;
        let mut measure = None;
        if let WithoutBaseline::ColdStart { exhausted_pool } = without {
            let may_grow = is_at_rest || self.by_cold_start;
            has_grown = self.cold_start.read(now_ns, reading, may_grow);
            if has_grown {
                self.forget();
            }
            measure = self
                .cold_start
                .measure(exhausted_pool)
                .filter(|_| !self.baseline.is_known());
            if is_at_rest {
                self.by_cold_start = measure.is_some();
            }
        }
        let cold_start = measure.filter(|_| self.by_cold_start);
        let (delay_ns, target_ns) = match cold_start {
            Some(measure) => (measure.delay_ns, measure.target_delay_ns),
            None => (
                self.baseline.delay_ns(reading),
                self.baseline.target_delay_ns(),
            ),
        };
        Delay {
            now_ns: delay_ns,
            proven_age_ns: 0,
            target_ns,
            is_cold_start: cold_start.is_some(),
            has_grown,
        }
    }

    /// The queue is healthy: this reading becomes part of the baseline.
    pub(super) fn learn(&mut self, now_ns: u64, reading: &Reading) {
        self.baseline.learn(now_ns, reading);
    }

    /// The queue is not healthy: the last seconds may belong to the episode already.
    pub(super) fn discard_recent(&mut self) {
        self.baseline.discard_recent();
    }

    pub(super) fn forget(&mut self) {
        self.baseline = BaselineWait::default();
    }

    /// What waits, as of the last reading; `None` where ages are not known.
    pub(super) fn waiting(&self) -> Option<Waiting> {
        self.cold_start.waiting()
    }
}
