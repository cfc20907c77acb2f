//! The detector: the tracks, episodes and incidents of all queues of all targets.

use crate::hash::HashMap;
use std::{collections::BTreeSet, sync::Arc};

use super::{
    cold_start::Waiting,
    delay::WithoutBaseline,
    episode::{OpenEpisode, Opening},
    gauge::Gauge,
    id::id,
    incidents::{Incidents, Neighbours},
    settings::Settings,
    track::{Assessment, Track},
};
use crate::{
    event::{Episode, Event, Instant, Level, QueueState},
    queue::{Criterion, QueueKey, Reading, Readings, Targets},
    sample::TargetId,
};

/// Returns the thresholds that apply to a queue.
pub type SettingsFor = Arc<dyn Fn(&QueueKey) -> Settings + Send + Sync>;

/// What the detector asks the diagnosis about a target. The diagnosis comes later in the pipeline, so its answers are
/// passed in as closures.
#[derive(Clone, Copy)]
pub struct TargetContext<'a> {
    pub neighbours: Neighbours<'a>,
    /// Returns the number of connections of a pool that is exhausted while requests wait for one of them.
    pub exhausted_pool: &'a dyn Fn(TargetId) -> Option<u64>,
}

/// Turns readings into events.
pub struct Detector {
    settings_for: SettingsFor,
    queues: HashMap<Arc<QueueKey>, Watched>,
    incidents: Incidents,
    /// Queues that need focus, as of their last readings.
    unhealthy: BTreeSet<Arc<QueueKey>>,
    /// Emit an [`Event::Queue`] for every queue after every sample.
    reports_queues: bool,
}

struct Watched {
    track: Track,
    settings: Settings,
    episode: Option<OpenEpisode>,
    gauge: Gauge,
}

impl Detector {
    /// `settings_for` returns the thresholds of each queue. `reports_queues` asks for one event per queue and sample.
    pub fn new(settings_for: SettingsFor, reports_queues: bool) -> Self {
        Self {
            settings_for,
            queues: HashMap::default(),
            incidents: Incidents::default(),
            unhealthy: BTreeSet::new(),
            reports_queues,
        }
    }

    /// Judges all queues by other thresholds from the next reading on. Their levels and episodes continue.
    pub fn set_settings(&mut self, settings_for: SettingsFor) {
        for (key, watched) in &mut self.queues {
            watched.settings = settings_for(key);
        }
        self.settings_for = settings_for;
    }

    /// The number of queues.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// Adds the readings of one sample, and appends what changed to `events`. Returns the targets to focus.
    pub fn read(
        &mut self,
        at: Instant,
        readings: &Readings,
        targets: &Targets,
        context: TargetContext<'_>,
        events: &mut Vec<Event>,
    ) -> BTreeSet<TargetId> {
        for key in &readings.gone {
            self.forget(at, key, events);
        }
        for (key, reading) in &readings.queues {
            if self.read_one(at, key, reading, (targets, context), events) {
                self.unhealthy.insert(Arc::clone(key));
            } else {
                self.unhealthy.remove(key);
            }
        }
        self.unhealthy.iter().map(|key| key.target).collect()
    }

    /// The open episodes that `is_wanted` selects by id, as of now.
    pub fn open(&self, at: Instant, is_wanted: impl Fn(&str) -> bool) -> Vec<Episode> {
        let mut open: Vec<Episode> = self
            .queues
            .values()
            .filter_map(|watched| watched.episode.as_ref())
            .filter(|episode| is_wanted(episode.id()))
            .map(|episode| episode.snapshot(at))
            .collect();
        open.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        open
    }

    /// What waits in each queue that is judged against its own baseline and is ok, or has no baseline yet.
    pub fn ok_against_baseline(&self) -> Vec<(Arc<QueueKey>, Waiting)> {
        let ok = |(key, watched): &(&Arc<QueueKey>, &Watched)| {
            key.kind.criterion() == Criterion::AgainstBaseline && watched.track.level == Level::Ok
        };
        let waiting = |(key, watched): (&Arc<QueueKey>, &Watched)| {
            Some((Arc::clone(key), watched.track.waiting()?))
        };
        let mut all: Vec<_> = self.queues.iter().filter(ok).filter_map(waiting).collect();
        all.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        all
    }

    /// Every queue as of its last reading, in no particular order.
    pub fn gauges(&self) -> impl Iterator<Item = (&Arc<QueueKey>, &Gauge)> {
        self.queues
            .iter()
            .map(|(key, watched)| (key, &watched.gauge))
    }

    /// The stream of samples ends: open episodes are reported once more, and stay open.
    pub fn finish(&mut self, at: Instant, events: &mut Vec<Event>) {
        let mut open: Vec<_> = self
            .queues
            .iter_mut()
            .filter(|(_, watched)| watched.episode.is_some())
            .collect();
        open.sort_unstable_by_key(|(key, _)| Arc::clone(key));
        for (_, watched) in open {
            if let Some(open) = &mut watched.episode {
                let (stretch, episode) = open.report(at);
                events.extend(stretch.map(Event::Stretch));
                events.push(Event::Episode(Box::new(episode)));
            }
        }
    }

    fn read_one(
        &mut self,
        at: Instant,
        key: &Arc<QueueKey>,
        reading: &Reading,
        (targets, context): (&Targets, TargetContext<'_>),
        events: &mut Vec<Event>,
    ) -> bool {
        if !self.queues.contains_key(key) {
            let watched = Watched {
                track: Track::new(key.kind),
                settings: (self.settings_for)(key),
                episode: None,
                gauge: Gauge::default(),
            };
            self.queues.insert(Arc::clone(key), watched);
        }
        let Some(watched) = self.queues.get_mut(key) else {
            return false;
        };
        let before = watched.track.level;
        let onset_ns = watched.track.onset_ns;
        // A target that is watched only because another one waits for it was never observed at rest. It appears in the
        // other's verdict.
        let is_selected = targets
            .get(key.target)
            .is_some_and(|target| !target.is_neighbour);
        let without_baseline = if is_selected && key.kind.criterion() == Criterion::AgainstBaseline
        {
            WithoutBaseline::ColdStart {
                exhausted_pool: (context.exhausted_pool)(key.target),
            }
        } else {
            WithoutBaseline::NotJudged
        };
        let assessment =
            watched
                .track
                .read(reading, at.mono_ns, &watched.settings, without_baseline);
        watched.gauge.read(at.mono_ns, reading, &assessment);
        let state = || state(at, key, reading, &assessment);
        if self.reports_queues {
            events.push(Event::Queue(state()));
        }
        let mut stretch = None;
        if assessment.level > Level::Ok && watched.episode.is_none() {
            let onset = in_the_past(at, onset_ns.or(watched.track.onset_ns));
            let incident =
                self.incidents
                    .open(at, key, onset, (targets, context.neighbours), events);
            let opening = Opening {
                id: format!("{:016x}", queue_id("episode", at, key, targets)),
                incident,
                key: Arc::clone(key),
                onset,
                at,
                baseline: watched.track.baseline.rates(),
            };
            let mut open = OpenEpisode::open(opening, reading, &assessment);
            stretch = open.read(at, reading, &assessment);
            events.push(Event::EpisodeOpened(Box::new(open.snapshot(at))));
            watched.episode = Some(open);
        } else if let Some(open) = &mut watched.episode {
            stretch = open.read(at, reading, &assessment);
        }
        let Some(open) = &mut watched.episode else {
            return assessment.needs_focus;
        };
        events.extend(stretch.map(Event::Stretch));
        if assessment.level != before {
            events.push(Event::Level {
                state: state(),
                from: before,
                to: assessment.level,
                episode: open.id().to_owned(),
            });
        }
        if assessment.level == Level::Ok {
            self.close(at, key, events);
        } else if open.is_due(at, watched.settings.repeat_interval_ns) {
            let (stretch, episode) = open.report(at);
            events.extend(stretch.map(Event::Stretch));
            events.push(Event::Episode(Box::new(episode)));
        }
        assessment.needs_focus
    }

    /// The queue no longer exists, so its episode has ended.
    fn forget(&mut self, at: Instant, key: &Arc<QueueKey>, events: &mut Vec<Event>) {
        self.close(at, key, events);
        self.queues.remove(key);
        self.unhealthy.remove(key);
    }

    fn close(&mut self, at: Instant, key: &Arc<QueueKey>, events: &mut Vec<Event>) {
        let Some(open) = self
            .queues
            .get_mut(key)
            .and_then(|watched| watched.episode.take())
        else {
            return;
        };
        let (stretch, episode) = open.close(at);
        events.extend(stretch.map(Event::Stretch));
        events.push(Event::Episode(Box::new(episode)));
        self.incidents.close(at, key, events);
    }
}

/// The id of an incident, trace or episode that begins in this queue at this moment; `role` keeps the three apart.
pub(super) fn queue_id(role: &str, at: Instant, key: &QueueKey, targets: &Targets) -> u64 {
    let (pid, start_ns) = targets
        .get(key.target)
        .map_or((0, 0), |target| (target.pid, target.start_ns));
    id(&[
        b"tailback1",
        role.as_bytes(),
        &pid.to_le_bytes(),
        &start_ns.to_le_bytes(),
        key.kind.name().as_bytes(),
        key.name().as_bytes(),
        &at.unix_ns.to_le_bytes(),
    ])
}

/// Converts a past CLOCK_MONOTONIC time, ns, to both clocks; `None` gives `now`.
fn in_the_past(now: Instant, mono_ns: Option<u64>) -> Instant {
    let mono_ns = mono_ns.unwrap_or(now.mono_ns);
    Instant {
        mono_ns,
        unix_ns: now
            .unix_ns
            .saturating_sub(now.mono_ns.saturating_sub(mono_ns)),
    }
}

fn state(
    at: Instant,
    key: &Arc<QueueKey>,
    reading: &Reading,
    assessment: &Assessment,
) -> QueueState {
    QueueState {
        at,
        key: Arc::clone(key),
        reading: reading.clone(),
        score: assessment.score,
        level: assessment.level,
        arrivals_per_s: assessment.rates.map(|rates| rates.arrivals),
        departures_per_s: assessment.rates.map(|rates| rates.departures),
        time_to_full_ns: assessment.time_to_full_ns,
    }
}
