//! An episode while it lasts.

use std::sync::Arc;

use super::{
    advice,
    rates::Usual,
    series::{Quantiles, Series},
    track::Verdict,
};
use crate::{
    event::{DrivenBy, Episode, Instant, Level, Moment, MomentKind, Stretch},
    queue::{QueueKey, Reading},
};

/// Moments kept per episode; the rest are counted.
const MAX_MOMENTS: usize = 100;
/// Time without which rates say nothing.
const JUDGE_AFTER_S: f64 = 0.9;
/// The course is drawn with a value every so often, whatever the interval of the looks.
const COURSE_NS: u64 = 95_000_000;

pub(super) struct OpenEpisode {
    episode: Episode,
    waits: Quantiles,
    depths: Series,
    course_ns: u64,
    baseline: (Option<Usual>, Option<Usual>),
    counted: Counted,
    driven_by: DrivenBy,
    shrinks: bool,
    warned_at: Instant,
    stretch: Option<Stretch>,
    next_index: u32,
    told_ns: u64,
}

/// Work that came and went while both were known, and how long that was.
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

/// What is known when an episode opens.
pub(super) struct Opening {
    pub(super) id: String,
    pub(super) incident: String,
    pub(super) key: Arc<QueueKey>,
    pub(super) onset: Instant,
    pub(super) at: Instant,
    /// Arrivals and departures while all is well, where known.
    pub(super) usual: (Option<Usual>, Option<Usual>),
}

impl OpenEpisode {
    pub(super) fn open(opening: Opening, reading: &Reading, verdict: &Verdict) -> Self {
        let Opening { at, .. } = opening;
        let unit = reading.unit.unwrap_or(opening.key.kind.unit());
        let mut running = Self {
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
                baseline_arrival_rate: opening.usual.0.map(|usual| usual.median),
                baseline_service_rate: opening.usual.1.map(|usual| usual.median),
                driven_by: DrivenBy::Unknown,
                time_to_full_ns: verdict.time_to_full_ns,
                lead_ns: None,
                worst: None,
                depths: Vec::new(),
                evidence: String::new(),
                advice: String::new(),
                verdict: None,
                moments: Vec::new(),
                moments_dropped: 0,
            },
            waits: Quantiles::default(),
            depths: Series::default(),
            course_ns: 0,
            baseline: opening.usual,
            counted: Counted::default(),
            driven_by: DrivenBy::Unknown,
            shrinks: false,
            warned_at: at,
            stretch: None,
            next_index: 0,
            told_ns: at.mono_ns,
        };
        if let Some(left) = verdict.time_to_full_ns.filter(|left| *left > 0) {
            running.note(at, MomentKind::Forecast(left));
        }
        running
    }

    pub(super) fn id(&self) -> &str {
        &self.episode.id
    }

    /// Takes in one reading; answers the stretch that ends with it, when the level changed.
    pub(super) fn read(
        &mut self,
        at: Instant,
        reading: &Reading,
        verdict: &Verdict,
    ) -> Option<Stretch> {
        let ended = self.change_level(at, verdict);
        let episode = &mut self.episode;
        episode.end = at;
        episode.score_max = episode.score_max.max(verdict.score);
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
        if at.mono_ns.saturating_sub(self.course_ns) >= COURSE_NS {
            self.depths.add(reading.depth);
            self.course_ns = at.mono_ns;
        }
        if let Some(stretch) = &mut self.stretch {
            stretch.to = at;
            stretch.depth_max = stretch.depth_max.max(reading.depth);
            stretch.limit = reading.limit.or(stretch.limit);
            stretch.score_max = stretch.score_max.max(verdict.score);
            stretch.wait_max_ns = stretch.wait_max_ns.max(wait_ns);
            stretch.losses = stretch.losses.saturating_add(reading.losses);
            stretch.time_to_full_ns = verdict.time_to_full_ns;
        }
        if reading.losses > 0 {
            self.note(at, MomentKind::Loss(reading.losses));
        }
        self.judge(reading.depth, verdict);
        ended
    }

    fn change_level(&mut self, at: Instant, verdict: &Verdict) -> Option<Stretch> {
        let before = self
            .stretch
            .as_ref()
            .map_or(Level::Ok, |stretch| stretch.level);
        if verdict.level == before {
            return None;
        }
        let ended = self
            .stretch
            .take()
            .map(|stretch| Stretch { to: at, ..stretch });
        if verdict.level > before {
            self.note(at, MomentKind::Level(verdict.level));
        }
        if verdict.level > Level::Ok {
            self.begin_stretch(at, verdict.level);
        }
        let episode = &mut self.episode;
        if verdict.level == Level::Full && episode.level_max < Level::Full {
            episode.lead_ns = Some(at.mono_ns.saturating_sub(self.warned_at.mono_ns));
        }
        episode.level_max = episode.level_max.max(verdict.level);
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

    /// More in, or less out? Means over the time in which the queue grew, against what is usual: the longer it grew, the
    /// smaller a difference is clear. Once the queue shrinks, both sides are bent by the queue itself: what was
    /// clear before then stands. While it is full, only what it let in is counted, so that side says nothing.
    fn judge(&mut self, depth: u64, verdict: &Verdict) {
        self.shrinks |= depth < self.episode.depth_max / 4 * 3;
        let full = verdict.level == Level::Full;
        let (Some(usual_in), Some(usual_out)) = self.baseline else {
            return;
        };
        if self.shrinks || (full && self.driven_by != DrivenBy::Unknown) {
            return;
        }
        let seconds = self.counted.ns as f64 / 1e9;
        if seconds < JUDGE_AFTER_S {
            return;
        }
        let more_in = !full && usual_in.is_exceeded_by(self.counted.arrivals as f64, seconds);
        let less_out = usual_out.is_missed_by(self.counted.departures as f64, seconds);
        self.driven_by = match (more_in, less_out) {
            (true, true) => DrivenBy::Both,
            (true, false) => DrivenBy::Producer,
            (false, true) => DrivenBy::Consumer,
            (false, false) => DrivenBy::Unknown,
        };
    }

    /// Whether it has lasted for long enough since it was last told.
    pub(super) fn is_due(&self, at: Instant, every_ns: u64) -> bool {
        at.mono_ns.saturating_sub(self.told_ns) >= every_ns
    }

    /// How it stands now: the stretch so far, which ends here and goes on as another, and the episode.
    pub(super) fn tell(&mut self, at: Instant) -> (Option<Stretch>, Episode) {
        self.told_ns = at.mono_ns;
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

    /// The end: the last stretch, where one is open, and the episode as it was.
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
            ..self.episode.clone()
        };
        episode.evidence = advice::evidence(&episode);
        episode.advice = advice::advice(&episode);
        episode
    }

    /// How it stands, without ending a stretch.
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
