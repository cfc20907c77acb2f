//! One queue over time: from readings to a score, and from the score to a level.

use super::{
    baseline::BaselineWait,
    cold_start::{ColdStart, Waiting},
    forecast::Trend,
    rates::{Baseline, Rates, Recent},
    settings::Settings,
    window::Minimum,
};
use crate::{
    event::Level,
    queue::{Judged, Kind, Reading},
};

/// Share of the warning score above which a queue is not at rest: where an episode shows its first sign.
const SIGN: f64 = 0.5;

/// Time above the sign after which a queue is suspicious.
const SUSPICIOUS_NS: u64 = 150_000_000;

/// What is remembered of one queue.
#[derive(Default)]
pub(super) struct Track {
    delays: Minimum,
    fills: Minimum,
    trend: Trend,
    recent: Recent,
    pub(super) baseline: Baseline,
    /// Rate at which work is taken while there is some: the other side of the service time.
    busy: Busy,
    /// The time that one piece of work took while the queue was last at rest, or less since, ns.
    service_ns: Option<u64>,
    usual_wait: BaselineWait,
    at_first: ColdStart,
    /// That is what the queue is judged by, until it is at rest again.
    by_at_first: bool,
    pub(super) level: Level,
    /// Since when the score has asked for a lower level.
    lower_since_ns: Option<u64>,
    /// Since when the queue has not been at rest.
    pub(super) sign_ns: Option<u64>,
}

/// The queue after one reading.
#[derive(Clone, Copy, Debug)]
pub(super) struct Verdict {
    pub(super) score: f64,
    pub(super) level: Level,
    pub(super) rates: Option<Rates>,
    pub(super) time_to_full_ns: Option<u64>,
    /// Not at rest: worth a closer look.
    pub(super) suspicious: bool,
    /// The delay that counts against the queue now, the delay that stands, and the one that is fine, ns.
    pub(super) delay_ns: u64,
    pub(super) standing_delay_ns: u64,
    pub(super) target_delay_ns: u64,
    pub(super) is_target_configured: bool,
}

/// Of a queue that is judged against what is usual.
#[derive(Clone, Copy)]
pub(super) struct NoThroughput {
    /// See [`ColdStart::measure`].
    pub(super) pool: Option<u64>,
}

impl Track {
    /// Takes in a reading. `blindly`: how it is judged before anything is usual; `None`: not at all.
    pub(super) fn read(
        &mut self,
        kind: Kind,
        reading: &Reading,
        now_ns: u64,
        settings: &Settings,
        blindly: Option<NoThroughput>,
    ) -> Verdict {
        let waits = reading.depth > 0;
        let by_usual = kind.judged() == Judged::AgainstUsual;
        let is_judged = !by_usual && kind.judged() != Judged::Context;
        let at_rest = self.sign_ns.is_none() && self.level == Level::Ok;
        let at_first = if let Some(NoThroughput { pool }) = blindly {
            // What seemed usual was a part of the growth.
            let may_grow = at_rest || self.by_at_first;
            if self.at_first.read(now_ns, reading, may_grow) {
                self.forget_usual();
            }
            let measure = self.at_first.measure(pool);
            let measure = measure.filter(|_| !self.usual_wait.is_known());
            if at_rest {
                self.by_at_first = measure.is_some();
            }
            measure.filter(|_| self.by_at_first)
        } else {
            None
        };
        let delay_ns = if let Some(measure) = at_first {
            measure.delay_ns
        } else if by_usual {
            self.usual_wait.delay_ns(reading)
        } else if waits && is_judged {
            reading.wait_ns.max(reading.oldest_age_ns).unwrap_or(0)
        } else {
            0
        };
        self.busy.add(reading, waits);
        let service_ns = self.busy.service_time_ns(reading.servers);
        let service_ns = match (service_ns, self.service_ns) {
            // Work that is slower now is what is to be noticed: it must not be the measure.
            (Some(now), Some(before)) if !at_rest => Some(now.min(before)),
            (now, before) => now.or(before),
        };
        self.service_ns = service_ns;
        let target_delay_ns = settings.target_delay_ns.unwrap_or_else(|| {
            if let Some(measure) = at_first {
                return measure.target_delay_ns;
            }
            if by_usual {
                return self.usual_wait.target_delay_ns();
            }
            (service_ns.unwrap_or(0) / 2)
                .clamp(settings.target_delay_min_ns, settings.target_delay_max_ns)
        });
        let window_ns = service_ns
            .map_or(0, |service_ns| service_ns.saturating_mul(10))
            .clamp(settings.window_ns, settings.window_max_ns);

        // What has waited for longer than the window has stood there all along, however short we have been looking.
        let seen_standing = self.delays.add(now_ns, delay_ns as f64, window_ns);
        let oldest_age_ns = reading.oldest_age_ns.filter(|_| is_judged).unwrap_or(0);
        let known_standing = oldest_age_ns.saturating_sub(window_ns) as f64;
        let scale = 2.0 * target_delay_ns as f64;
        let by_delay = seen_standing.max(known_standing) / scale;
        let fill = reading.fill.unwrap_or(0.0);
        let (by_fill, raw_fill) = if kind.is_cliff() {
            (self.fills.add(now_ns, fill, settings.dwell_ns), fill)
        } else {
            (0.0, 0.0)
        };
        let lost = reading.losses > 0;
        let score = by_delay.max(by_fill).max(if lost { 1.0 } else { 0.0 });
        let full = lost || (kind.is_cliff() && reading.full && by_fill >= 1.0);

        // A busy queue is above the sign now and then; when it stays there, it is worth a closer look.
        let sign = SIGN * settings.warn;
        let raw = (delay_ns as f64 / scale).max(raw_fill).max(score);
        let stays_ns = if raw >= sign {
            now_ns.saturating_sub(*self.sign_ns.get_or_insert(now_ns))
        } else {
            self.sign_ns = None;
            0
        };
        let suspicious = stays_ns >= SUSPICIOUS_NS || self.level > Level::Ok;

        if let (Some(elapsed), Some(arrivals), Some(departures)) =
            (reading.elapsed_ns, reading.arrivals, reading.departures)
        {
            self.recent.add(now_ns, elapsed, arrivals, departures);
        }
        let rates = self.recent.rates();
        if score >= sign || self.level > Level::Ok {
            self.baseline.disturbed();
            self.usual_wait.disturbed();
            if at_first.is_some() {
                self.forget_usual();
            }
        } else {
            if let Some(rates) = rates {
                self.baseline.quiet(now_ns, rates);
            }
            if by_usual {
                self.usual_wait.quiet(now_ns, reading);
            }
        }
        self.trend.add(now_ns, fill);
        let time_to_full_ns = if reading.full {
            Some(0)
        } else {
            reading.limit.and_then(|_| self.trend.time_to_full(now_ns))
        };
        self.level = self.next_level(score, full, now_ns, settings);
        Verdict {
            score,
            level: self.level,
            rates,
            time_to_full_ns,
            suspicious,
            delay_ns,
            standing_delay_ns: seen_standing.max(known_standing) as u64,
            target_delay_ns,
            is_target_configured: settings.target_delay_ns.is_some(),
        }
    }

    fn forget_usual(&mut self) {
        self.baseline = Baseline::default();
        self.usual_wait = BaselineWait::default();
    }

    /// What waits in a queue that cannot be judged by itself.
    pub(super) fn waiting(&self) -> Option<Waiting> {
        self.at_first.waiting()
    }

    /// Up at once, for the score has waited already; down only when it has stayed low for a while.
    fn next_level(&mut self, score: f64, full: bool, now_ns: u64, settings: &Settings) -> Level {
        let holds = |level: Level| {
            let threshold = |enter: f64| {
                if self.level >= level {
                    enter * settings.leave
                } else {
                    enter
                }
            };
            match level {
                Level::Ok => true,
                Level::Warn => score >= threshold(settings.warn),
                Level::Critical => score >= threshold(settings.critical),
                Level::Full => full,
            }
        };
        let wanted = [Level::Full, Level::Critical, Level::Warn]
            .into_iter()
            .find(|level| holds(*level))
            .unwrap_or(Level::Ok);
        if wanted >= self.level {
            self.lower_since_ns = None;
            return wanted;
        }
        let since = *self.lower_since_ns.get_or_insert(now_ns);
        if now_ns.saturating_sub(since) < settings.clear_ns {
            return self.level;
        }
        self.lower_since_ns = None;
        wanted
    }
}

/// How fast work is taken from the queue while there is work.
#[derive(Default)]
struct Busy {
    per_ns: Option<f64>,
    taken: f64,
    time_ns: f64,
}

impl Busy {
    /// Enough work to judge by, and enough to forget by.
    const ENOUGH: f64 = 8.0;

    fn add(&mut self, reading: &Reading, waits: bool) {
        let (Some(served), Some(elapsed)) = (reading.served, reading.elapsed_ns) else {
            return;
        };
        if !waits {
            return;
        }
        self.taken += served as f64;
        self.time_ns += elapsed as f64;
        if self.taken >= Self::ENOUGH {
            let now = self.taken / self.time_ns.max(1.0);
            self.per_ns = Some(self.per_ns.map_or(now, |before| before * 0.7 + now * 0.3));
            self.taken = 0.0;
            self.time_ns = 0.0;
        }
    }

    /// Time that one piece of work keeps one server, at most: the servers together take `per_ns`.
    fn service_time_ns(&self, servers: u32) -> Option<u64> {
        self.per_ns
            .map(|per_ns| (f64::from(servers) / per_ns) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::{NoThroughput, Settings, Track};
    use crate::{
        event::Level,
        queue::{Judged, Kind, Reading},
    };

    const TICK: u64 = 100_000_000;

    /// Feeds one reading per tick and answers the level after each.
    fn levels(kind: Kind, readings: impl IntoIterator<Item = Reading>) -> Vec<Level> {
        let by_usual = kind.judged() == Judged::AgainstUsual;
        let blindly = by_usual.then_some(NoThroughput { pool: None });
        let mut track = Track::default();
        let settings = Settings::default();
        readings
            .into_iter()
            .enumerate()
            .map(|(tick, reading)| {
                track
                    .read(kind, &reading, tick as u64 * TICK, &settings, blindly)
                    .level
            })
            .collect()
    }

    fn accept(depth: u64, oldest_ms: u64) -> Reading {
        Reading {
            depth,
            limit: Some(100),
            fill: Some(depth as f64 / 100.0),
            full: depth >= 100,
            arrivals: Some(4),
            departures: Some(4),
            served: Some(4),
            servers: 4,
            elapsed_ns: Some(TICK),
            wait_ns: Some(oldest_ms * 1_000_000),
            oldest_age_ns: (depth > 0).then_some(oldest_ms * 1_000_000),
            ..Reading::default()
        }
    }

    #[test]
    fn a_busy_queue_that_empties_again_and_again_is_ok() {
        let busy = (0..600).map(|tick| {
            if tick % 4 == 0 {
                accept(0, 0)
            } else {
                accept(9, 80)
            }
        });
        assert!(
            levels(Kind::Accept, busy)
                .iter()
                .all(|level| *level == Level::Ok)
        );
    }

    #[test]
    fn a_queue_that_never_empties_and_waits_long_is_warned_of_within_two_seconds() {
        let levels = levels(
            Kind::Accept,
            (0..20).map(|tick| accept(2 + tick, 30 + 60 * tick)),
        );
        let warned = levels
            .iter()
            .position(|level| *level >= Level::Warn)
            .unwrap();
        assert!((10..20).contains(&warned), "{warned}");
    }

    #[test]
    fn a_burst_that_drains_is_ok() {
        let mut burst = vec![accept(0, 0); 10];
        burst.extend([
            accept(90, 50),
            accept(80, 90),
            accept(30, 120),
            accept(0, 0),
        ]);
        assert!(
            levels(Kind::Accept, burst)
                .iter()
                .all(|level| *level == Level::Ok)
        );
    }

    #[test]
    fn a_stopped_consumer_is_seen_though_nothing_is_dequeued() {
        let stopped = (0..30).map(|tick| Reading {
            departures: Some(0),
            served: Some(0),
            arrivals: Some(0),
            ..accept(3, 100 * tick)
        });
        assert!(levels(Kind::Accept, stopped).last() >= Some(&Level::Warn));
    }

    #[test]
    fn what_has_waited_for_long_is_seen_at_the_first_look() {
        assert!(levels(Kind::Accept, [accept(3, 9_000)])[0] >= Level::Critical);
    }

    #[test]
    fn at_the_limit_is_full_after_the_dwell_and_a_loss_is_full_at_once() {
        let at_limit = levels(Kind::Accept, (0..6).map(|_| accept(100, 1)));
        assert_eq!(at_limit[1], Level::Ok);
        assert_eq!(at_limit[4], Level::Full);
        let loss = Reading {
            losses: 1,
            ..accept(100, 1)
        };
        assert_eq!(levels(Kind::Accept, [loss]), [Level::Full]);
    }

    fn in_flight(depth: u64, wait_ms: u64) -> Reading {
        Reading {
            limit: None,
            fill: None,
            full: false,
            ..accept(depth, wait_ms)
        }
    }

    #[test]
    fn requests_in_flight_are_judged_by_what_is_usual() {
        let slow_by_design = (0..200).map(|tick| in_flight(8 + tick % 3, 1_000));
        let healthy = levels(Kind::Inflight, slow_by_design.clone());
        assert!(healthy.iter().all(|level| *level == Level::Ok));
        let jam = (0..100).map(|tick| in_flight(20 + tick, 3_000 + 50 * tick));
        let levels = levels(Kind::Inflight, slow_by_design.chain(jam));
        assert!(levels[..200].iter().all(|level| *level == Level::Ok));
        assert!(levels[299] >= Level::Critical);
    }

    #[test]
    fn a_jam_that_was_there_before_the_first_look_is_judged_by_its_growth_though_its_pool_is_no_reason_yet()
     {
        // 5 a second over 16 connections: 3.2 s each, which makes 9 s long, and 5 s a sign.
        let jam = |tick: u64| Reading {
            arrivals: Some(1 + tick % 2),
            departures: Some(tick % 2),
            ages_ns: vec![(5_000 + 40 * tick) * 1_000_000; 1_000],
            ..in_flight(130 + tick, 20_000)
        };
        let mut track = Track::default();
        let settings = Settings::default();
        let pool = Some(NoThroughput { pool: Some(16) });
        let levels: Vec<Level> = (0..100)
            .map(|tick| {
                let now_ns = tick * TICK;
                let verdict = track.read(Kind::Inflight, &jam(tick), now_ns, &settings, pool);
                verdict.level
            })
            .collect();
        assert_eq!(levels[30], Level::Ok);
        assert!(levels[99] >= Level::Warn, "{:?}", levels[99]);
        assert_eq!(track.baseline.usual(), (None, None));
    }

    #[test]
    fn a_level_is_left_only_after_a_while() {
        let mut course: Vec<_> = (0..30).map(|tick| accept(50, 500 + tick * 10)).collect();
        course.extend(vec![accept(0, 0); 20]);
        let levels = levels(Kind::Accept, course);
        assert_eq!(levels[29], Level::Critical);
        assert_eq!(levels[40], Level::Critical);
        assert_eq!(levels[49], Level::Ok);
    }
}
