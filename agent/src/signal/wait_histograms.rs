//! Histograms of queue waits, one per queue.
//!
//! A sample gives the number of departures and their mean wait, so all of them count at that mean. While hooks measure the waits of
//! a service for a CPU, those count instead, one by one.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{constants::EXPIRE_AFTER_NS, histogram::Histogram, pressure::Pressure};
use crate::{
    detect::Gauge,
    queue::{Kind, QueueKey},
    sample::{Distribution, ExactWaitKind, HookReport, TargetId},
};

/// Upper bounds of the classic buckets, seconds.
const BOUNDS: [f64; 13] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// Bound on the number of histograms.
const MAX_QUEUES: usize = 2_000;
/// Without a report for this time, ns, waits are estimated again. Hooks are read once a second.
const EXACT_FOR_NS: u64 = 3_000_000_000;

#[derive(Debug, Default)]
pub struct WaitHistograms {
    of: HashMap<Arc<QueueKey>, Waits>,
    /// When hooks last measured waits for a CPU of these services, ns.
    exact: BTreeMap<TargetId, u64>,
}

#[derive(Debug)]
struct Waits {
    histogram: Histogram,
    /// Time and departures of the last gauge.
    at_ns: u64,
    departures: u64,
}

impl WaitHistograms {
    /// Adds the departures since the last call.
    pub fn read(&mut self, pressures: &[Pressure]) {
        let queues = || pressures.iter().flat_map(|pressure| &pressure.queues);
        let newest_ns = queues().map(|(_, gauge)| gauge.at_ns).max().unwrap_or(0);
        self.exact
            .retain(|_, at_ns| newest_ns.saturating_sub(*at_ns) <= EXACT_FOR_NS);
        for (key, gauge) in queues() {
            // A byte is not a piece of work.
            if !gauge.is_counted || key.kind.unit() == "bytes" {
                continue;
            }
            let is_exact = key.kind == Kind::Runqueue && self.exact.contains_key(&key.target);
            if let Some(known) = self.of.get_mut(key) {
                known.read(gauge, is_exact);
            } else if self.of.len() < MAX_QUEUES {
                self.of.insert(Arc::clone(key), Waits::new(gauge));
            }
        }
        self.of
            .retain(|_, known| newest_ns.saturating_sub(known.at_ns) <= EXPIRE_AFTER_NS);
    }

    /// Adds the waits for a CPU that hooks have measured. Those of a service's first report are left out: they were estimated
    /// already, up to the last sample.
    pub fn read_exact(&mut self, now_ns: u64, report: &HookReport) {
        if !report.is_attached {
            // Until now, waits were measured; from the next sample on, they are estimated.
            let expired_ns = now_ns.saturating_sub(EXACT_FOR_NS);
            self.exact
                .values_mut()
                .for_each(|at_ns| *at_ns = expired_ns);
        }
        let mut measured: BTreeMap<TargetId, Vec<&Distribution>> = BTreeMap::new();
        for wait in &report.waits {
            if matches!(wait.kind, ExactWaitKind::Woken | ExactWaitKind::Preempted) {
                let of_target = measured.entry(wait.target).or_default();
                of_target.push(&wait.distribution);
            }
        }
        for (key, waits) in &mut self.of {
            if key.kind == Kind::Runqueue && self.exact.contains_key(&key.target) {
                let of_target = measured.get(&key.target).into_iter().flatten();
                of_target.for_each(|distribution| waits.histogram.add(distribution));
            }
        }
        if report.is_attached {
            let targets = measured.into_keys();
            self.exact.extend(targets.map(|target| (target, now_ns)));
        }
    }

    pub fn of(&self, key: &QueueKey) -> Option<&Histogram> {
        self.of.get(key).map(|waits| &waits.histogram)
    }
}

impl Waits {
    fn new(gauge: &Gauge) -> Self {
        Self {
            histogram: Histogram::new(&BOUNDS),
            at_ns: gauge.at_ns,
            departures: gauge.departures,
        }
    }

    fn read(&mut self, gauge: &Gauge, is_exact: bool) {
        let left = gauge.departures.saturating_sub(self.departures);
        self.departures = gauge.departures;
        self.at_ns = gauge.at_ns;
        // Departures with an unknown wait are left out.
        let Some(wait_ns) = gauge.wait_ns.filter(|_| left > 0 && !is_exact) else {
            return;
        };
        let seconds = wait_ns as f64 / 1e9;
        self.histogram.count(seconds, left);
        self.histogram.add_to_sum(seconds * left as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        event::Level,
        sample::{ExactWait, Target},
        signal::load::Load,
    };

    fn pressure(kind: Kind, gauge: Gauge) -> Pressure {
        let key = QueueKey::new(1, kind, ":80".into());
        Pressure {
            target: Arc::new(Target::default()),
            level: Level::Ok,
            score: 0.0,
            admit_ratio: 1.0,
            load: Load::default(),
            utilization: None,
            concurrency_limit: None,
            max_queue_wait_ns: None,
            oldest_age_ns: 0,
            time_to_full_ns: None,
            retry_after_ms: 0,
            queues: vec![(Arc::new(key), gauge)],
            controllers: Vec::new(),
        }
    }

    fn gauge(at_ns: u64, departures: u64, wait_ns: u64) -> Gauge {
        Gauge {
            at_ns,
            departures,
            wait_ns: Some(wait_ns),
            is_counted: true,
            ..Gauge::default()
        }
    }

    #[test]
    fn departures_count_at_their_mean_wait() {
        let mut waits = WaitHistograms::default();
        let key = pressure(Kind::Accept, Gauge::default()).queues[0].0.clone();
        for (departures, wait_ns) in [
            (100, 9),
            (104, 2_000_000),
            (104, 2_000_000),
            (107, 20_000_000_000),
        ] {
            waits.read(&[pressure(Kind::Accept, gauge(1, departures, wait_ns))]);
        }
        let histogram = waits.of(&key).unwrap().exposed();
        let up_to = |bucket: usize| {
            let bucket = &histogram.bucket[bucket];
            (bucket.upper_bound, bucket.cumulative_count)
        };
        assert_eq!(up_to(0), (0.001, 0), "earlier departures do not count");
        assert_eq!(up_to(1), (0.0025, 4));
        assert_eq!(up_to(BOUNDS.len()), (f64::INFINITY, 7));
        assert!((histogram.sample_sum - 60.008).abs() < 1e-9);

        waits.read(&[pressure(Kind::Send, gauge(EXPIRE_AFTER_NS + 2, 9, 9))]);
        assert!(
            waits.of(&key).is_none(),
            "the queue has expired, and bytes are not counted"
        );
        assert!(waits.of.is_empty());
    }
    #[test]
    fn while_hooks_measure_a_service_each_wait_for_a_cpu_counts_once() {
        let second = 1_000_000_000;
        let report = |is_attached, wait_ns: u64| HookReport {
            is_attached,
            waits: vec![ExactWait {
                target: 1,
                distribution: Distribution {
                    count: 10,
                    total_ns: 10 * wait_ns,
                    max_ns: wait_ns,
                    waits: vec![(wait_ns, 10)],
                },
                ..ExactWait::default()
            }],
            ..HookReport::default()
        };
        let mut waits = WaitHistograms::default();
        let key = pressure(Kind::Runqueue, Gauge::default()).queues[0]
            .0
            .clone();
        let mut sample = |at_s: u64, exact: Option<&HookReport>| {
            // 10 departures a second, at 4 ms by the estimate.
            let gauge = gauge(at_s * second, 10 * at_s, 4_000_000);
            waits.read(&[pressure(Kind::Runqueue, gauge)]);
            if let Some(report) = exact {
                waits.read_exact(at_s * second, report);
            }
            let exposed = waits.of(&key).unwrap().exposed();
            let up_to = |bucket: usize| exposed.bucket[bucket].cumulative_count;
            // Those of up to 1 ms are exact.
            (up_to(0), up_to(BOUNDS.len()))
        };
        sample(0, None);
        assert_eq!(sample(1, None), (0, 10));
        let exact = report(true, 7_000);
        assert_eq!(sample(2, Some(&exact)), (0, 20), "it was estimated");
        assert_eq!(sample(3, Some(&exact)), (10, 30));
        assert_eq!(sample(4, Some(&exact)), (20, 40));
        assert_eq!(sample(5, Some(&report(false, 7_000))), (30, 50), "detached");
        assert_eq!(sample(6, None), (30, 60), "estimated again");
    }
}
