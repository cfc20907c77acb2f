//! An admission controller for one queue: computes the share of new work to admit from the queue's delay, arrivals and departures.
//! Pure: each observation carries its time.
//!
//! While work waits all the time, `equilibrium = admit ratio × departures ÷ arrivals` is the admit ratio at which arrivals equal
//! departures. This holds whether rejected requests never arrive (a proxy sheds) or arrive and leave at once (the service sheds).
//!
//! - While the standing delay exceeds its target, the admit ratio is the equilibrium less a trim that drains the excess.
//! - While nothing waits, the equilibrium cannot be measured. If the service is less busy than it was under overload, the admit
//!   ratio rises quickly, by a factor at each decision. If it is as busy, or its utilization is unknown, the ratio returns to just
//!   below the last equilibrium and rises from there step by step.
//!
//! [`Mode`] names these states. All constants are in [`constants`](super::constants).

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::{constants::*, learned::is_sane};

/// A queue at one sample, as the controller sees it.
#[derive(Clone, Copy, Debug)]
pub struct Observation {
    /// CLOCK_MONOTONIC, ns.
    pub now_ns: u64,
    /// The delay that counts against the queue, and its target, ns.
    pub delay_ns: u64,
    pub target_delay_ns: u64,
    /// Under overload, requests that waited longer are rejected at dequeue, ns.
    pub max_queue_wait_ns: u64,
    /// Arrivals and departures since the previous observation are known, and included below.
    pub is_counted: bool,
    /// Monotonic counters.
    pub arrivals: u64,
    pub departures: u64,
    /// Recent utilization of the service, 0 to 1.
    pub utilization: Option<f64>,
}

/// What a controller does, and why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    #[default]
    Open,
    Draining,
    Stalled,
    Equilibrium,
    Holding,
    Recovering,
    Probing,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Open,
        Self::Draining,
        Self::Stalled,
        Self::Equilibrium,
        Self::Holding,
        Self::Recovering,
        Self::Probing,
    ];

    /// The word used in every output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Draining => "draining",
            Self::Stalled => "stalled",
            Self::Equilibrium => "equilibrium",
            Self::Holding => "holding",
            Self::Recovering => "recovering",
            Self::Probing => "probing",
        }
    }

    /// Why the admit ratio is what it is, in one sentence.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Open => "no overload: all work is admitted",
            Self::Draining => {
                "standing delay above target: admitting less than the equilibrium until the excess has drained"
            }
            Self::Stalled => "nothing is dequeued: admitting the minimum",
            Self::Equilibrium => {
                "standing delay between target and max queue wait: admitting the equilibrium"
            }
            Self::Holding => "the delay is not conclusive: keeping the admit ratio",
            Self::Recovering => {
                "utilization below its overload level: raising the admit ratio quickly"
            }
            Self::Probing => "no standing delay: raising the admit ratio step by step",
        }
    }
}

/// The inner state of a controller, for status and metrics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ControllerState {
    pub mode: Mode,
    pub admit_ratio: f64,
    /// `None` until departures were observed while work waited.
    pub equilibrium_admit_ratio: Option<f64>,
    /// Recent utilization of the service, and its mean while work waited, 0 to 1.
    pub utilization: Option<f64>,
    pub overload_utilization: Option<f64>,
    pub target_delay_ns: u64,
    /// The minimum delay over the last decisions, ns; 0 if there are not enough of them yet.
    pub standing_delay_ns: u64,
    pub max_queue_wait_ns: u64,
}

/// The admission controller of one queue.
#[derive(Debug)]
pub struct Controller {
    admit_ratio: f64,
    /// The admit ratio before the last decision.
    admit_ratio_before: f64,
    /// The observation at the last decision.
    last: Observation,
    /// The minimum delay since then, ns: a queue that was empty for a moment is not standing.
    min_delay_ns: u64,
    /// Arrivals and departures were known in every observation since then.
    is_counted: bool,
    /// The minimum delays before the last decisions, ns.
    min_delays_ns: VecDeque<u64>,
    equilibrium: Equilibrium,
    mode: Mode,
    /// There was overload recently, and nothing has shown since that it is over.
    is_shedding: bool,
    /// Consecutive decisions with an empty queue; a decision with a short queue halves it.
    empty_decisions: u32,
    /// Consecutive decisions with the delay above the acceptable one.
    overloaded_decisions: u32,
    /// The last two intervals; `None` if arrivals or departures were unknown.
    recent: [Option<Interval>; 2],
    /// Mean utilization while work waits.
    overload_utilization: Option<f64>,
    /// Utilization before the last decisions, each with the length of its interval, s.
    utilizations: VecDeque<(f64, f64)>,
}

/// What a later agent can use of a controller that sheds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct LearnedController {
    admit_ratio: f64,
    overload_utilization: Option<f64>,
    equilibrium: Equilibrium,
}

impl LearnedController {
    pub(super) fn is_valid(&self) -> bool {
        let Equilibrium {
            admitted,
            arrivals,
            departures,
            seconds,
        } = self.equilibrium;
        let utilization = self.overload_utilization.unwrap_or(0.0);
        [
            self.admit_ratio,
            utilization,
            admitted,
            arrivals,
            departures,
            seconds,
        ]
        .into_iter()
        .all(is_sane)
    }
}

/// What happened between two decisions.
#[derive(Clone, Copy, Debug)]
struct Interval {
    admit_ratio: f64,
    /// The admit ratio in the interval before.
    admit_ratio_before: f64,
    arrivals: f64,
    departures: f64,
    seconds: f64,
}

/// Decaying sums over the intervals in which work waited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Equilibrium {
    /// Departures, each weighted with the admit ratio at that time.
    admitted: f64,
    arrivals: f64,
    departures: f64,
    seconds: f64,
}

impl Equilibrium {
    fn add(&mut self, interval: Interval) {
        let decay = (-1.0 / EQUILIBRIUM_MEMORY_DECISIONS).exp();
        self.admitted = self.admitted * decay + interval.admit_ratio * interval.departures;
        self.arrivals = self.arrivals * decay + interval.arrivals;
        self.departures = self.departures * decay + interval.departures;
        self.seconds = self.seconds * decay + interval.seconds;
    }

    /// The admit ratio at which departures equal arrivals; `None` without departures.
    fn admit_ratio(&self) -> Option<f64> {
        if self.departures <= 0.0 {
            return None;
        }
        let ratio = self.admitted / self.arrivals.max(f64::MIN_POSITIVE);
        Some(ratio.clamp(MIN_ADMIT_RATIO, 1.0))
    }

    /// Clamps the equilibrium after a change of the admit ratio within these intervals. Clients learned of the change at some point
    /// in them, so the equilibrium lies between the results for the old and the new ratio, within Poisson noise.
    fn clamp(&mut self, intervals: &[Interval]) {
        let (mut low, mut high, mut arrivals, mut departures) = (0.0, 0.0, 0.0, 0.0);
        for interval in intervals {
            let (now, before) = (interval.admit_ratio, interval.admit_ratio_before);
            low += now.min(before) * interval.departures;
            high += now.max(before) * interval.departures;
            arrivals += interval.arrivals;
            departures += interval.departures;
        }
        if arrivals <= 0.0 || departures <= 0.0 || self.arrivals <= 0.0 {
            return;
        }
        let tolerance = 1.0 + CLAMP_SIGMAS / f64::sqrt(departures);
        let low = (low / arrivals / tolerance).min(1.0);
        let high = (high / arrivals * tolerance).clamp(low, 1.0);
        self.admitted = self.arrivals * (self.admitted / self.arrivals).clamp(low, high);
    }
}

impl Controller {
    /// Starts with everything admitted.
    pub fn new(observation: Observation) -> Self {
        Self {
            admit_ratio: 1.0,
            admit_ratio_before: 1.0,
            last: observation,
            min_delay_ns: u64::MAX,
            is_counted: true,
            min_delays_ns: VecDeque::new(),
            equilibrium: Equilibrium::default(),
            mode: Mode::Open,
            is_shedding: false,
            empty_decisions: 0,
            overloaded_decisions: 0,
            recent: [None; 2],
            overload_utilization: None,
            utilizations: VecDeque::new(),
        }
    }

    /// Continues as a controller that a former agent had for this queue.
    pub(super) fn resume(observation: Observation, learned: LearnedController) -> Self {
        let admit_ratio = learned.admit_ratio.clamp(MIN_ADMIT_RATIO, 1.0);
        Self {
            admit_ratio,
            admit_ratio_before: admit_ratio,
            equilibrium: learned.equilibrium,
            is_shedding: true,
            overload_utilization: learned.overload_utilization,
            ..Self::new(observation)
        }
    }

    /// For a later agent; `None` if nothing is shed.
    pub(super) fn learned(&self) -> Option<LearnedController> {
        self.is_shedding.then_some(LearnedController {
            admit_ratio: self.admit_ratio,
            overload_utilization: self.overload_utilization,
            equilibrium: self.equilibrium,
        })
    }

    /// The share of new work to admit, [`MIN_ADMIT_RATIO`] to 1.
    pub fn admit_ratio(&self) -> f64 {
        self.admit_ratio
    }

    /// There was overload recently, and nothing has shown since that it is over.
    pub fn is_shedding(&self) -> bool {
        self.is_shedding
    }

    /// Recent utilization as a fraction of the one under overload, 0 to 1; `None` if either is unknown.
    pub fn used(&self) -> Option<f64> {
        let overload = self.overload_utilization.filter(|it| *it > 0.0)?;
        Some((self.last.utilization? / overload).min(1.0))
    }

    /// Nothing has been shed for a while: the controller can be dropped.
    pub fn is_expired(&self) -> bool {
        !self.is_shedding && self.empty_decisions > FORGET_AFTER_DECISIONS
    }

    /// The inner state as of the last decision.
    pub fn state(&self) -> ControllerState {
        ControllerState {
            mode: self.mode,
            admit_ratio: self.admit_ratio,
            equilibrium_admit_ratio: self.equilibrium.admit_ratio(),
            utilization: self.last.utilization,
            overload_utilization: self.overload_utilization,
            target_delay_ns: self.last.target_delay_ns,
            standing_delay_ns: self.standing_delay_ns(self.last.target_delay_ns) as u64,
            max_queue_wait_ns: self.last.max_queue_wait_ns,
        }
    }

    /// Adds an observation, and decides if the decision interval has passed.
    pub fn read(&mut self, observation: Observation) {
        self.min_delay_ns = self.min_delay_ns.min(observation.delay_ns);
        self.is_counted &= observation.is_counted;
        let elapsed_ns = observation.now_ns.saturating_sub(self.last.now_ns);
        let decision_interval_ns = observation
            .target_delay_ns
            .saturating_mul(DECISION_INTERVAL_TARGETS)
            .clamp(DECISION_INTERVAL_MIN_NS, DECISION_INTERVAL_MAX_NS);
        if elapsed_ns < decision_interval_ns / 10 * DECISION_INTERVAL_TENTHS {
            return;
        }
        let seconds = elapsed_ns as f64 / 1e9;
        self.min_delays_ns.push_back(self.min_delay_ns);
        if self.min_delays_ns.len() > STANDING_DECISIONS {
            self.min_delays_ns.pop_front();
        }
        let added = |now: u64, before: u64| now.saturating_sub(before) as f64;
        let interval = Interval {
            admit_ratio: self.admit_ratio,
            admit_ratio_before: self.admit_ratio_before,
            arrivals: added(observation.arrivals, self.last.arrivals),
            departures: added(observation.departures, self.last.departures),
            seconds,
        };
        // Clients learn of a new admit ratio with a delay. An interval measures its ratio only if the one before had the same.
        let change = (self.admit_ratio - self.admit_ratio_before).abs();
        let is_steady = change <= STEADY_ADMIT_CHANGE * self.admit_ratio_before;
        self.admit_ratio_before = self.admit_ratio;
        self.recent = [self.recent[1], self.is_counted.then_some(interval)];
        match observation.utilization {
            Some(utilization) => self.utilizations.push_back((utilization, seconds)),
            None => self.utilizations.clear(),
        }
        if self.utilizations.len() > IDLE_DECISIONS {
            self.utilizations.pop_front();
        }
        if observation.delay_ns == 0 {
            self.empty_decisions = self.empty_decisions.saturating_add(1);
        } else {
            self.measure(observation, interval, is_steady);
        }
        self.decide(observation);
        self.last = observation;
        self.min_delay_ns = u64::MAX;
        self.is_counted = true;
    }

    /// Work waits: the interval measures the equilibrium and the overload utilization.
    fn measure(&mut self, observation: Observation, interval: Interval, is_steady: bool) {
        // A queue that is short for a moment neither ends an idle period nor extends it.
        self.empty_decisions = if observation.delay_ns < observation.target_delay_ns / 2 {
            self.empty_decisions / 2
        } else {
            0
        };
        // While the ratio is far below the equilibrium, requests that were admitted earlier and could not connect keep arriving:
        // they are not in proportion to the ratio.
        let is_conclusive = self
            .equilibrium
            .admit_ratio()
            .is_none_or(|equilibrium| interval.admit_ratio >= MIN_CONCLUSIVE_ADMIT * equilibrium);
        if self.is_counted && is_steady && is_conclusive {
            self.equilibrium.add(interval);
        }
        if let ([Some(before), Some(now)], false) = (self.recent, is_steady) {
            self.equilibrium.clamp(&[before, now]);
        }
        if let Some(utilization) = observation.utilization {
            let mean = self.overload_utilization.unwrap_or(utilization);
            self.overload_utilization =
                Some(mean + (utilization - mean) / EQUILIBRIUM_MEMORY_DECISIONS);
        }
    }

    fn decide(&mut self, observation: Observation) {
        let target_delay_ns = observation.target_delay_ns;
        let standing_delay_ns = self.standing_delay_ns(target_delay_ns);
        // A delay up to the max queue wait is acceptable: it need not drain, and does not show that the equilibrium is too high.
        let acceptable_ns = if self.is_shedding {
            observation.max_queue_wait_ns.max(target_delay_ns)
        } else {
            target_delay_ns
        };
        let excess_ns = standing_delay_ns - acceptable_ns as f64;
        self.overloaded_decisions = if excess_ns > 0.0 {
            self.overloaded_decisions.saturating_add(1)
        } else {
            0
        };
        if excess_ns > 0.0 {
            self.drain(observation, excess_ns);
        } else if standing_delay_ns > target_delay_ns as f64 {
            self.mode = Mode::Equilibrium;
            self.admit_ratio = self.equilibrium.admit_ratio().unwrap_or(self.admit_ratio);
        } else {
            self.mode = Mode::Holding;
            if self.is_shedding && observation.delay_ns < target_delay_ns {
                self.rise();
            }
        }
        self.admit_ratio = self.admit_ratio.clamp(MIN_ADMIT_RATIO, 1.0);
        if self.admit_ratio >= 1.0 && self.empty_decisions > EQUILIBRIUM_MEMORY_DECISIONS as u32 {
            self.is_shedding = false;
            self.equilibrium = Equilibrium::default();
        }
        if !self.is_shedding {
            self.mode = Mode::Open;
        }
    }

    /// The standing delay exceeds the acceptable one: admit less than the equilibrium.
    fn drain(&mut self, observation: Observation, excess_ns: f64) {
        let trim = excess_ns / DRAIN_TIME_NS;
        let is_falling = observation.delay_ns < self.last.delay_ns;
        // At the largest trim a lower equilibrium would not help: the service works off a backlog that nobody can withdraw.
        let is_effective = trim < MAX_DRAIN_TRIM;
        if self.overloaded_decisions > EQUILIBRIUM_DECREASE_AFTER && !is_falling && is_effective {
            self.equilibrium.admitted *= 1.0 - EQUILIBRIUM_DECREASE;
        }
        match self.equilibrium.admit_ratio() {
            Some(equilibrium) => {
                self.is_shedding = true;
                self.mode = Mode::Draining;
                self.admit_ratio = equilibrium * (1.0 - trim.min(MAX_DRAIN_TRIM));
            }
            None if observation.delay_ns >= STALLED_AFTER_NS => {
                self.is_shedding = true;
                self.mode = Mode::Stalled;
                self.admit_ratio = MIN_ADMIT_RATIO;
            }
            None => self.mode = Mode::Holding,
        }
    }

    /// The minimum delay over the last [`STANDING_DECISIONS`] decisions, ns; over one decision fewer if that minimum is far above
    /// the target. 0 if there are not enough decisions yet.
    fn standing_delay_ns(&self, target_delay_ns: u64) -> f64 {
        let minimum = |decisions: usize| {
            let are_enough = self.min_delays_ns.len() >= decisions;
            are_enough
                .then(|| self.min_delays_ns.iter().rev().take(decisions).min())
                .flatten()
        };
        let is_far =
            |delay_ns: &&u64| **delay_ns as f64 > FAR_ABOVE_TARGETS * target_delay_ns as f64;
        minimum(STANDING_DECISIONS - 1)
            .filter(is_far)
            .or(minimum(STANDING_DECISIONS))
            .map_or(0.0, |delay_ns| *delay_ns as f64)
    }

    /// There is no standing delay: admit more.
    fn rise(&mut self) {
        self.admit_ratio = match self.reduced_utilization() {
            // Proportional: by the factor that brings the utilization back to its target.
            Some(reduced_utilization) => {
                self.mode = Mode::Recovering;
                let factor =
                    (RECOVERY_TARGET / reduced_utilization).clamp(1.0, MAX_RECOVERY_FACTOR);
                self.admit_ratio * factor + PROBE_STEP
            }
            None => {
                self.mode = Mode::Probing;
                let target = RECOVERY_TARGET * self.equilibrium.admit_ratio().unwrap_or(0.0);
                target.max(self.admit_ratio + PROBE_STEP)
            }
        };
    }

    /// The utilization as a fraction of the one under overload, over the fewest recent intervals over which it is significantly
    /// lower; `None` if it never is, or if either is unknown.
    fn reduced_utilization(&self) -> Option<f64> {
        let overload = self.overload_utilization.filter(|it| *it > 0.0)?;
        // Departures per second under overload, without those that were rejected here. Behind a proxy that sheds, this is an
        // underestimate. But a decision interval is about one service time long (two target delays of half the service time each,
        // within bounds), so at least one request could be served in each.
        let rate = self.equilibrium.admitted / self.equilibrium.seconds;
        let (mut seconds, mut busy) = (0.0, 0.0);
        for (at, (utilization, lasted)) in self.utilizations.iter().rev().enumerate() {
            if at as u32 >= self.empty_decisions {
                return None;
            }
            seconds += lasted;
            busy += utilization * lasted;
            let reduced_utilization = (busy / seconds / overload).max(MIN_ADMIT_RATIO);
            let capacity = (rate * seconds).max(at as f64 + 1.0);
            if capacity * (1.0 - reduced_utilization) > IDLE_SIGMAS * capacity.max(1.0).sqrt() {
                return Some(reduced_utilization);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests;
