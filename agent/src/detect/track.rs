//! One queue over time: from readings to a score, and from the score to a level.

use super::{
    cold_start::Waiting,
    delay::{Delay, Mode, WithoutBaseline, no_delay, own_delay},
    forecast::Trend,
    rates::{Counts, RateBaseline, Rates, Recent},
    service_time::ServiceTime,
    settings::Settings,
    stalls::Stalls,
    window::Minimum,
};
use crate::{
    event::Level,
    queue::{Kind, Reading},
};

/// A queue is at rest below this fraction of the warning score; an episode's onset is when it last rose above.
const ONSET_SCORE_RATIO: f64 = 0.5;

/// Time above the onset score after which a queue is focused, ns: two samples at the default interval of 100 ms.
const FOCUS_AFTER_NS: u64 = 150_000_000;

/// A queue is standing if it was never empty over this many service times, within the bounds of [`Settings`].
const WINDOW_SERVICE_TIMES: u64 = 10;

/// The score is the standing delay in units of this many target delays.
const SCORE_TARGETS: f64 = 2.0;

/// The state of one queue, kept from one reading to the next.
pub(super) struct Track {
    kind: Kind,
    mode: Mode,
    delays: Minimum,
    fills: Minimum,
    stalls: Stalls,
    trend: Trend,
    recent: Recent,
    pub(super) baseline: RateBaseline,
    service_time: ServiceTime,
    pub(super) level: Level,
    /// Since when the score has called for a lower level, ns.
    lower_since_ns: Option<u64>,
    /// Since when the queue has not been at rest, ns.
    pub(super) onset_ns: Option<u64>,
}

/// The state of a queue after one reading.
#[derive(Clone, Copy, Debug)]
pub(super) struct Assessment {
    pub(super) score: f64,
    pub(super) level: Level,
    pub(super) rates: Option<Rates>,
    pub(super) time_to_full_ns: Option<u64>,
    /// Not at rest: its target is focused.
    pub(super) needs_focus: bool,
    /// The delay that counts against the queue now, ns.
    pub(super) delay_ns: u64,
    pub(super) standing_delay_ns: u64,
    pub(super) target_delay_ns: u64,
    pub(super) is_target_configured: bool,
}

/// The score of a queue after one reading.
struct Score {
    value: f64,
    /// The score of this reading alone, without a window; at least `value`.
    instant: f64,
    standing_delay_ns: u64,
    is_full: bool,
}

impl Track {
    pub(super) fn new(kind: Kind) -> Self {
        Self {
            kind,
            mode: Mode::of(kind),
            delays: Minimum::default(),
            fills: Minimum::default(),
            stalls: Stalls::default(),
            trend: Trend::default(),
            recent: Recent::default(),
            baseline: RateBaseline::default(),
            service_time: ServiceTime::default(),
            level: Level::default(),
            lower_since_ns: None,
            onset_ns: None,
        }
    }

    /// Adds a reading. `without`: how to judge a queue that is compared with its baseline while it has none.
    pub(super) fn read(
        &mut self,
        reading: &Reading,
        now_ns: u64,
        settings: &Settings,
        without: WithoutBaseline,
    ) -> Assessment {
        let is_at_rest = self.onset_ns.is_none() && self.level == Level::Ok;
        let service_ns = self.service_time.read(reading, is_at_rest);
        let delay = match &mut self.mode {
            Mode::Delay => own_delay(reading, service_ns, settings),
            Mode::Baseline(past) => past.delay(now_ns, reading, is_at_rest, without),
            Mode::Context => no_delay(service_ns, settings),
        };
        if delay.has_grown {
            self.forget_past();
        }
        let target_delay_ns = settings.target_delay_ns.unwrap_or(delay.target_ns);
        let window_ns = service_ns
            .map_or(0, |service_ns| {
                service_ns.saturating_mul(WINDOW_SERVICE_TIMES)
            })
            .clamp(settings.window_ns, settings.window_max_ns);
        // A queue that is read rarely may drain in between: at least two readings decide.
        let window_ns = match self.kind {
            Kind::App => window_ns.max(reading.elapsed_ns.unwrap_or(0)),
            _ => window_ns,
        };
        let score = self.score(
            reading,
            now_ns,
            (delay, target_delay_ns, window_ns),
            settings,
        );
        let needs_focus = self.needs_focus(score.instant, now_ns, settings);
        if let (Some(elapsed_ns), Some(arrivals), Some(departures)) =
            (reading.elapsed_ns, reading.arrivals, reading.departures)
        {
            let counts = Counts {
                at_ns: now_ns,
                arrivals,
                departures,
                hidden: reading.hidden,
            };
            self.recent.add(counts, elapsed_ns);
        }
        let rates = self.recent.rates();
        let is_healthy = score.value < ONSET_SCORE_RATIO * settings.warn && self.level == Level::Ok;
        self.learn(reading, now_ns, rates, (is_healthy, delay));
        self.trend.add(now_ns, reading.fill.unwrap_or(0.0));
        let time_to_full_ns = if reading.full {
            Some(0)
        } else {
            reading.limit.and_then(|_| self.trend.time_to_full(now_ns))
        };
        self.level = self.next_level(&score, now_ns, settings);
        Assessment {
            score: score.value,
            level: self.level,
            rates,
            time_to_full_ns,
            needs_focus,
            delay_ns: delay.now_ns,
            standing_delay_ns: score.standing_delay_ns,
            target_delay_ns,
            is_target_configured: settings.target_delay_ns.is_some(),
        }
    }

    /// The waiting items of a queue that is compared with its baseline; `None` for other queues, and if ages are unknown.
    pub(super) fn waiting(&self) -> Option<Waiting> {
        match &self.mode {
            Mode::Baseline(past) => past.waiting(),
            Mode::Delay | Mode::Context => None,
        }
    }

    /// The largest of: the standing delay relative to its target; the fill ratio, for a kind whose limit is a cliff; the time of
    /// recurring stalls relative to the shortest window, for an accept queue, or to half of it, for an event loop; 1, if work was lost.
    fn score(
        &mut self,
        reading: &Reading,
        now_ns: u64,
        (delay, target_delay_ns, window_ns): (Delay, u64, u64),
        settings: &Settings,
    ) -> Score {
        let observed = self.delays.add(now_ns, delay.now_ns as f64, window_ns);
        // An item that is older than the window was in the queue throughout, even if sampling began later.
        // The age that a service reports may be by another machine's clock: it is no proof by itself.
        let proven_age_ns = match self.kind {
            Kind::App => 0,
            _ => delay.proven_age_ns,
        };
        let proven = proven_age_ns.saturating_sub(window_ns) as f64;
        let standing = observed.max(proven);
        let scale = SCORE_TARGETS * target_delay_ns as f64;
        let fill = reading.fill.unwrap_or(0.0);
        let (by_fill, fill) = if self.kind.is_cliff() {
            (self.fills.add(now_ns, fill, settings.dwell_ns), fill)
        } else {
            (0.0, 0.0)
        };
        let by_standing = standing / scale;
        let by_stalls = match self.kind {
            // Stalls only count while the queue drains between them.
            Kind::Accept | Kind::Eventloop if by_standing >= settings.warn => {
                self.stalls = Stalls::default();
                0.0
            }
            Kind::Accept => self.stalls.add(now_ns, reading) as f64 / settings.window_ns as f64,
            // A client may have to wait for a turn at each of its requests.
            Kind::Eventloop => {
                let acceptable_ns = settings.target_delay_ns.map_or(0.0, |_| scale);
                let stalled_ns = self.stalls.add_turn(now_ns, reading) as f64;
                stalled_ns / acceptable_ns.max(settings.window_ns as f64 / 2.0)
            }
            // They may be read in batches: nothing is taken from them for a while, by design.
            _ => 0.0,
        };
        let has_lost = reading.losses > 0;
        let by_loss = if has_lost { 1.0 } else { 0.0 };
        let value = by_standing.max(by_fill).max(by_stalls).max(by_loss);
        Score {
            value,
            instant: (delay.now_ns as f64 / scale).max(fill).max(value),
            standing_delay_ns: standing as u64,
            is_full: has_lost || (self.kind.is_cliff() && reading.full && by_fill >= 1.0),
        }
    }

    /// A busy queue exceeds the onset score now and then. It needs focus only if it stays above.
    fn needs_focus(&mut self, instant_score: f64, now_ns: u64, settings: &Settings) -> bool {
        if instant_score < ONSET_SCORE_RATIO * settings.warn {
            self.onset_ns = None;
            return self.level > Level::Ok;
        }
        let onset_ns = *self.onset_ns.get_or_insert(now_ns);
        // The next reading of a queue that is read rarely is seconds away, but sooner in focus.
        self.kind == Kind::App
            || now_ns.saturating_sub(onset_ns) >= FOCUS_AFTER_NS
            || self.level > Level::Ok
    }

    /// A reading of a healthy queue extends its baselines. Otherwise the last seconds are removed from them, because the episode
    /// may have begun before it was noticed.
    fn learn(
        &mut self,
        reading: &Reading,
        now_ns: u64,
        rates: Option<Rates>,
        (is_healthy, delay): (bool, Delay),
    ) {
        if is_healthy {
            if let Some(rates) = rates {
                self.baseline.learn(now_ns, rates);
            }
            if let Mode::Baseline(past) = &mut self.mode {
                past.learn(now_ns, reading);
            }
            return;
        }
        self.baseline.discard_recent();
        if let Mode::Baseline(past) = &mut self.mode {
            past.discard_recent();
        }
        if delay.is_cold_start {
            self.forget_past();
        }
    }

    fn forget_past(&mut self) {
        self.baseline = RateBaseline::default();
        if let Mode::Baseline(past) = &mut self.mode {
            past.forget();
        }
    }

    /// The level rises at once, because the score already covers a window. It falls only after the score has stayed low.
    fn next_level(&mut self, score: &Score, now_ns: u64, settings: &Settings) -> Level {
        let holds = |level: Level| {
            let threshold = |enter: f64| {
                if self.level >= level {
                    enter * settings.exit_ratio
                } else {
                    enter
                }
            };
            match level {
                Level::Ok => true,
                Level::Warn => score.value >= threshold(settings.warn),
                Level::Critical => score.value >= threshold(settings.critical),
                Level::Full => score.is_full,
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
        let since_ns = *self.lower_since_ns.get_or_insert(now_ns);
        if now_ns.saturating_sub(since_ns) < settings.clear_after_ns {
            return self.level;
        }
        self.lower_since_ns = None;
        wanted
    }
}

#[cfg(test)]
mod tests {
    use super::{Settings, Track, WithoutBaseline};
    use crate::{
        detect::rates::Baselines,
        event::Level,
        queue::{Kind, Reading},
    };

    const TICK: u64 = 100_000_000;

    /// The level after each reading, one per tick.
    fn levels(kind: Kind, readings: impl IntoIterator<Item = Reading>) -> Vec<Level> {
        let without = WithoutBaseline::ColdStart {
            exhausted_pool: None,
        };
        let mut track = Track::new(kind);
        let settings = Settings::default();
        readings
            .into_iter()
            .enumerate()
            .map(|(tick, reading)| {
                track
                    .read(&reading, tick as u64 * TICK, &settings, without)
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
    fn a_busy_queue_that_empties_repeatedly_is_ok() {
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
    fn a_standing_queue_reaches_warn_within_two_seconds() {
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
    fn a_stopped_consumer_is_detected_although_nothing_is_dequeued() {
        let stopped = (0..30).map(|tick| Reading {
            departures: Some(0),
            served: Some(0),
            arrivals: Some(0),
            ..accept(3, 100 * tick)
        });
        assert!(levels(Kind::Accept, stopped).last() >= Some(&Level::Warn));
    }

    #[test]
    fn an_old_item_is_detected_in_the_first_sample() {
        assert!(levels(Kind::Accept, [accept(3, 9_000)])[0] >= Level::Critical);
    }

    #[test]
    fn an_age_that_a_service_reports_is_not_proof_by_one_reading() {
        let levels = levels(Kind::App, vec![accept(3, 9_000); 30]);
        assert_eq!(levels[0], Level::Ok);
        assert!(levels.last() >= Some(&Level::Critical));
    }

    #[test]
    fn a_burst_of_jobs_that_drains_within_a_configured_target_is_ok() {
        let without = WithoutBaseline::ColdStart {
            exhausted_pool: None,
        };
        let burst = || {
            (0..300).map(|tick| Reading {
                limit: None,
                fill: None,
                full: false,
                ..accept(300 - tick, 100 * tick)
            })
        };
        let worst = |settings: &Settings| {
            let mut track = Track::new(Kind::App);
            let levels = burst().enumerate().map(|(tick, reading)| {
                let now_ns = tick as u64 * TICK;
                track.read(&reading, now_ns, settings, without).level
            });
            levels.max()
        };
        let minute = Settings {
            target_delay_ns: Some(60_000_000_000),
            ..Settings::default()
        };
        assert_eq!(worst(&minute), Some(Level::Ok));
        assert!(worst(&Settings::default()) > Some(Level::Ok));
    }

    #[test]
    fn a_queue_at_its_limit_is_full_after_the_dwell_and_one_that_loses_work_at_once() {
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
    fn requests_in_flight_are_compared_with_their_baseline() {
        let slow_by_design = (0..200).map(|tick| in_flight(8 + tick % 3, 1_000));
        let healthy = levels(Kind::Inflight, slow_by_design.clone());
        assert!(healthy.iter().all(|level| *level == Level::Ok));
        let backlog = (0..100).map(|tick| in_flight(20 + tick, 3_000 + 50 * tick));
        let levels = levels(Kind::Inflight, slow_by_design.chain(backlog));
        assert!(levels[..200].iter().all(|level| *level == Level::Ok));
        assert!(levels[299] >= Level::Critical);
    }

    #[test]
    fn a_backlog_older_than_the_first_sample_is_judged_by_its_growth_before_its_pool_explains_it() {
        // 5 departures per second over 16 connections: 3.2 s each. So 9 s is long, and 5 s is above the onset score.
        let backlog = |tick: u64| Reading {
            arrivals: Some(1 + tick % 2),
            departures: Some(tick % 2),
            extra: vec![("response_time_ns", (10_000 + 80 * tick) as f64 * 1e6)],
            ages_ns: vec![(5_000 + 40 * tick) * 1_000_000; 1_000],
            ..in_flight(130 + tick, 20_000)
        };
        let mut track = Track::new(Kind::Inflight);
        let settings = Settings::default();
        let without = WithoutBaseline::ColdStart {
            exhausted_pool: Some(16),
        };
        let levels: Vec<Level> = (0..100)
            .map(|tick| {
                let now_ns = tick * TICK;
                track.read(&backlog(tick), now_ns, &settings, without).level
            })
            .collect();
        assert_eq!(levels[30], Level::Ok);
        assert!(levels[99] >= Level::Warn, "{:?}", levels[99]);
        assert_eq!(track.baseline.rates(), Baselines::default());
    }

    #[test]
    fn a_level_is_left_only_after_the_clear_time() {
        let mut readings: Vec<_> = (0..30).map(|tick| accept(50, 500 + tick * 10)).collect();
        readings.extend(vec![accept(0, 0); 20]);
        let levels = levels(Kind::Accept, readings);
        assert_eq!(levels[29], Level::Critical);
        assert_eq!(levels[40], Level::Critical);
        assert_eq!(levels[49], Level::Ok);
    }
}
