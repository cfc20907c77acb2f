//! An open episode: what is accumulated while a queue is above ok.

use std::sync::Arc;

use super::{
    advice,
    rates::{BaselineRate, Baselines},
    series::{Quantiles, Series},
    track::Assessment,
};
use crate::{
    event::{DrivenBy, Episode, Instant, Level, Moment, MomentKind, Stretch},
    queue::{QueueKey, Reading},
};

/// Moments kept per episode; further ones are only counted.
const MAX_MOMENTS: usize = 100;

/// How long rates have to be observed before they are compared with the baseline, s: a little less than a second, so that ten
/// samples at the default interval suffice.
const MIN_OBSERVED_S: f64 = 0.9;

/// Spacing of the depths that are kept for the sparkline, ns: a little less than the default sampling interval of 100 ms.
const DEPTH_SPACING_NS: u64 = 95_000_000;

/// Once the depth has fallen below this fraction of its maximum, the queue is shrinking.
const SHRINKING: (u64, u64) = (3, 4);

pub(super) struct OpenEpisode {
    episode: Episode,
    waits: Quantiles,
    depths: Series,
    depth_added_ns: u64,
    /// Readings so far, and those with an empty queue.
    readings: u64,
    empty_readings: u64,
    /// Baselines of the arrival and the departure rate.
    baseline: Baselines,
    counted: Counted,
    driven_by: DrivenBy,
    is_shrinking: bool,
    warned_at: Instant,
    stretch: Option<Stretch>,
    next_index: u32,
    reported_ns: u64,
}

/// Arrivals and departures while both were known, and for how long.
#[derive(Clone, Copy, Default)]
struct Counted {
    ns: u64,
    arrivals: u64,
    departures: u64,
}

impl Counted {
    fn add(&mut self, elapsed_ns: u64, arrivals: u64, departures: u64) {
        self.ns = self.ns.saturating_add(elapsed_ns);
        self.arrivals = self.arrivals.saturating_add(arrivals);
        self.departures = self.departures.saturating_add(departures);
    }
}

/// The state when an episode opens.
pub(super) struct Opening {
    pub(super) id: String,
    pub(super) incident: String,
    pub(super) key: Arc<QueueKey>,
    pub(super) onset: Instant,
    pub(super) at: Instant,
    pub(super) baseline: Baselines,
}

impl OpenEpisode {
    pub(super) fn open(opening: Opening, reading: &Reading, assessment: &Assessment) -> Self {
        let Opening { at, .. } = opening;
        let median = |rate: Option<BaselineRate>| rate.map(|rate| rate.median);
        let unit = reading.unit.unwrap_or(opening.key.kind.unit());
        let mut open = Self {
            episode: Episode {
                id: opening.id,
                incident: opening.incident,
                key: opening.key,
                onset: opening.onset,
                start: at,
                end: at,
                ongoing: true,
                level_max: Level::Ok,
                score_max: 0.0,
                depth: reading.depth,
                depth_max: 0,
                empty_share: 0.0,
                limit: reading.limit,
                unit,
                wait_p50_ns: None,
                wait_p99_ns: None,
                wait_max_ns: None,
                arrivals: Some(0),
                departures: Some(0),
                losses: 0,
                arrival_rate: None,
                service_rate: None,
                baseline_arrival_rate: median(opening.baseline.max_arrivals),
                baseline_service_rate: median(opening.baseline.max_departures),
                driven_by: DrivenBy::Unknown,
                time_to_full_ns: assessment.time_to_full_ns,
                lead_ns: None,
                worst: None,
                depths: Vec::new(),
                evidence: String::new(),
                advice: String::new(),
                verdict: None,
                moments: Vec::new(),
                moments_dropped: 0,
                measured_waits: Vec::new(),
            },
            waits: Quantiles::default(),
            depths: Series::default(),
            depth_added_ns: 0,
            readings: 0,
            empty_readings: 0,
            baseline: opening.baseline,
            counted: Counted::default(),
            driven_by: DrivenBy::Unknown,
            is_shrinking: false,
            warned_at: at,
            stretch: None,
            next_index: 0,
            reported_ns: at.mono_ns,
        };
        if let Some(left) = assessment.time_to_full_ns.filter(|left| *left > 0) {
            open.note(at, MomentKind::Forecast(left));
        }
        open
    }

    pub(super) fn id(&self) -> &str {
        &self.episode.id
    }

    /// Adds a reading. Returns the stretch that ended if the level changed.
    pub(super) fn read(
        &mut self,
        at: Instant,
        reading: &Reading,
        assessment: &Assessment,
    ) -> Option<Stretch> {
        let ended = self.change_level(at, assessment);
        self.readings += 1;
        self.empty_readings += u64::from(reading.depth == 0);
        let episode = &mut self.episode;
        episode.end = at;
        episode.score_max = episode.score_max.max(assessment.score);
        episode.depth = reading.depth;
        episode.depth_max = episode.depth_max.max(reading.depth);
        episode.limit = reading.limit.or(episode.limit);
        episode.losses = episode.losses.saturating_add(reading.losses);
        let wait_ns = (reading.depth > 0)
            .then(|| reading.wait_ns.max(reading.oldest_age_ns))
            .flatten();
        if let Some(wait_ns) = wait_ns {
            self.waits.add(wait_ns);
        }
        if let Some(elapsed) = reading.elapsed_ns {
            let sum = |total: Option<u64>, now: Option<u64>| Some(total?.saturating_add(now?));
            episode.arrivals = sum(episode.arrivals, reading.arrivals);
            episode.departures = sum(episode.departures, reading.departures);
            if let (Some(arrivals), Some(departures)) = (reading.arrivals, reading.departures) {
                self.counted.add(elapsed, arrivals, departures);
            }
        }
        if reading.depth >= episode.depth_max && reading.worst.is_some() {
            episode.worst.clone_from(&reading.worst);
        }
        if at.mono_ns.saturating_sub(self.depth_added_ns) >= DEPTH_SPACING_NS {
            self.depths.add(reading.depth);
            self.depth_added_ns = at.mono_ns;
        }
        if let Some(stretch) = &mut self.stretch {
            stretch.to = at;
            stretch.depth_max = stretch.depth_max.max(reading.depth);
            stretch.limit = reading.limit.or(stretch.limit);
            stretch.score_max = stretch.score_max.max(assessment.score);
            stretch.wait_max_ns = stretch.wait_max_ns.max(wait_ns);
            stretch.losses = stretch.losses.saturating_add(reading.losses);
            stretch.time_to_full_ns = assessment.time_to_full_ns;
        }
        if reading.losses > 0 {
            self.note(at, MomentKind::Loss(reading.losses));
        }
        self.compare_rates(reading.depth, assessment);
        ended
    }

    fn change_level(&mut self, at: Instant, assessment: &Assessment) -> Option<Stretch> {
        let before = self
            .stretch
            .as_ref()
            .map_or(Level::Ok, |stretch| stretch.level);
        if assessment.level == before {
            return None;
        }
        let ended = self
            .stretch
            .take()
            .map(|stretch| Stretch { to: at, ..stretch });
        if assessment.level > before {
            self.note(at, MomentKind::Level(assessment.level));
        }
        if assessment.level > Level::Ok {
            self.begin_stretch(at, assessment.level);
        }
        let episode = &mut self.episode;
        if assessment.level == Level::Full && episode.level_max < Level::Full {
            episode.lead_ns = Some(at.mono_ns.saturating_sub(self.warned_at.mono_ns));
        }
        episode.level_max = episode.level_max.max(assessment.level);
        ended
    }

    fn begin_stretch(&mut self, at: Instant, level: Level) {
        self.stretch = Some(Stretch {
            episode: self.episode.id.clone(),
            incident: self.episode.incident.clone(),
            key: Arc::clone(&self.episode.key),
            level,
            from: at,
            to: at,
            index: self.next_index,
            depth_max: 0,
            limit: self.episode.limit,
            score_max: 0.0,
            wait_max_ns: None,
            losses: 0,
            time_to_full_ns: None,
        });
        self.next_index += 1;
    }

    /// Decides whether producer or consumer drives the episode: mean rates over the time in which the queue grew,
    /// against the baseline. The longer it grew, the smaller a significant difference is. Once the queue shrinks, the
    /// backlog itself distorts both rates, so the earlier result is kept. While the queue is full, arrivals count only
    /// what was admitted, so they are ignored.
    fn compare_rates(&mut self, depth: u64, assessment: &Assessment) {
        let (part, of) = SHRINKING;
        self.is_shrinking |= depth < self.episode.depth_max / of * part;
        let is_full = assessment.level == Level::Full;
        if self.is_shrinking || (is_full && self.driven_by != DrivenBy::Unknown) {
            return;
        }
        let seconds = self.counted.ns as f64 / 1e9;
        if seconds < MIN_OBSERVED_S {
            return;
        }
        let (arrived, departed) = (self.counted.arrivals as f64, self.counted.departures as f64);
        let more_in = (self.baseline.max_arrivals)
            .is_some_and(|usual| !is_full && usual.is_exceeded_by(arrived, seconds));
        let less_out =
            (self.baseline.departures).is_some_and(|usual| usual.is_undercut_by(departed, seconds));
        self.driven_by = match (more_in, less_out) {
            (true, true) => DrivenBy::Both,
            (true, false) => DrivenBy::Producer,
            (false, true) => DrivenBy::Consumer,
            (false, false) => DrivenBy::Unknown,
        };
    }

    /// Whether the repeat interval has passed since the last report.
    pub(super) fn is_due(&self, at: Instant, repeat_interval_ns: u64) -> bool {
        at.mono_ns.saturating_sub(self.reported_ns) >= repeat_interval_ns
    }

    /// Returns the current stretch, ended now, and the episode so far. A new stretch at the same level begins.
    pub(super) fn report(&mut self, at: Instant) -> (Option<Stretch>, Episode) {
        self.reported_ns = at.mono_ns;
        let part = self
            .stretch
            .take()
            .map(|stretch| Stretch { to: at, ..stretch });
        if let Some(part) = &part {
            self.begin_stretch(at, part.level);
        }
        (
            part.filter(|part| part.to > part.from),
            self.summary(at, true),
        )
    }

    /// Ends the episode. Returns its last stretch, if one is open, and the whole episode.
    pub(super) fn close(mut self, at: Instant) -> (Option<Stretch>, Episode) {
        let part = self
            .stretch
            .take()
            .map(|stretch| Stretch { to: at, ..stretch });
        self.note(at, MomentKind::Recovered);
        let episode = self.summary(at, false);
        (part, episode)
    }

    fn summary(&self, at: Instant, ongoing: bool) -> Episode {
        let seconds = self.counted.ns as f64 / 1e9;
        let rate = |count: u64| (seconds > 0.0).then(|| count as f64 / seconds);
        let mut episode = Episode {
            end: at,
            ongoing,
            wait_p50_ns: self.waits.at(0.5),
            wait_p99_ns: self.waits.at(0.99),
            wait_max_ns: self.waits.max(),
            arrival_rate: rate(self.counted.arrivals),
            service_rate: rate(self.counted.departures),
            driven_by: self.driven_by,
            depths: self.depths.values(),
            empty_share: self.empty_readings as f64 / self.readings.max(1) as f64,
            ..self.episode.clone()
        };
        episode.evidence = advice::evidence(&episode);
        episode.advice = advice::advice(&episode);
        episode
    }

    /// The episode as of now; its current stretch goes on.
    pub(super) fn snapshot(&self, at: Instant) -> Episode {
        self.summary(at, true)
    }

    fn note(&mut self, at: Instant, kind: MomentKind) {
        if self.episode.moments.len() < MAX_MOMENTS {
            self.episode.moments.push(Moment { at, kind });
        } else {
            self.episode.moments_dropped += 1;
        }
    }
}
