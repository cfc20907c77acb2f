//! All queues of all targets: tracks, episodes, incidents.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    cold_start::Waiting,
    episode::{OpenEpisode, Opening},
    gauge::Gauge,
    id::id,
    incidents::{Incidents, Neighbours},
    settings::Settings,
    track::{NoThroughput, Track, Verdict},
};
use crate::{
    event::{Episode, Event, Instant, Level, QueueState},
    queue::{Judged, QueueKey, Reading, Readings, Targets},
    sample::TargetId,
};

/// Answers the thresholds that apply to a queue.
pub type SettingsFor = Arc<dyn Fn(&QueueKey) -> Settings + Send + Sync>;

/// What the diagnosis knows of a target, of what is around its queues.
#[derive(Clone, Copy)]
pub struct Around<'a> {
    pub neighbours: Neighbours<'a>,
    /// The connections of a pool that is used up while requests wait for one.
    pub used_up: &'a dyn Fn(TargetId) -> Option<u64>,
}

/// From readings to events.
pub struct Detector {
    settings_for: SettingsFor,
    queues: HashMap<Arc<QueueKey>, Watched>,
    incidents: Incidents,
    /// Queues that are worth a closer look, as of their last readings.
    suspicious: BTreeSet<Arc<QueueKey>>,
    /// Tell the state of every queue after every tick.
    tell_queues: bool,
}

struct Watched {
    track: Track,
    settings: Settings,
    running: Option<OpenEpisode>,
    gauge: Gauge,
}

impl Detector {
    /// With the thresholds that `settings_for` gives each queue; `tell_queues` asks for an event per queue and tick.
    pub fn new(settings_for: SettingsFor, tell_queues: bool) -> Self {
        Self {
            settings_for,
            queues: HashMap::new(),
            incidents: Incidents::default(),
            suspicious: BTreeSet::new(),
            tell_queues,
        }
    }

    /// Queues that are watched now.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// Takes in the readings of one tick. `events` gets what there is to say; answers the targets worth a closer look.
    pub fn read(
        &mut self,
        at: Instant,
        readings: &Readings,
        targets: &Targets,
        around: Around<'_>,
        events: &mut Vec<Event>,
    ) -> BTreeSet<TargetId> {
        for key in &readings.gone {
            self.forget(at, key, events);
        }
        for (key, reading) in &readings.queues {
            if self.read_one(at, key, reading, (targets, around), events) {
                self.suspicious.insert(Arc::clone(key));
            } else {
                self.suspicious.remove(key);
            }
        }
        self.suspicious.iter().map(|key| key.target).collect()
    }

    /// How open episodes stand, of those that are asked for by their ids.
    pub fn open(&self, at: Instant, is_wanted: impl Fn(&str) -> bool) -> Vec<Episode> {
        let mut open: Vec<Episode> = self
            .queues
            .values()
            .filter_map(|watched| watched.running.as_ref())
            .filter(|running| is_wanted(running.id()))
            .map(|running| running.snapshot(at))
            .collect();
        open.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        open
    }

    /// What waits in queues that are ok as far as is known, and that nothing but what is usual for them can judge.
    pub fn ok_against_usual(&self) -> Vec<(Arc<QueueKey>, Waiting)> {
        let ok = |(key, watched): &(&Arc<QueueKey>, &Watched)| {
            key.kind.judged() == Judged::AgainstUsual && watched.track.level == Level::Ok
        };
        let waiting = |(key, watched): (&Arc<QueueKey>, &Watched)| {
            Some((Arc::clone(key), watched.track.waiting()?))
        };
        let mut all: Vec<_> = self.queues.iter().filter(ok).filter_map(waiting).collect();
        all.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        all
    }

    /// Every queue as of its last reading, in no order.
    pub fn gauges(&self) -> impl Iterator<Item = (&Arc<QueueKey>, &Gauge)> {
        self.queues
            .iter()
            .map(|(key, watched)| (key, &watched.gauge))
    }

    /// The stream ends here: what is open is told as it stands, and stays open.
    pub fn finish(&mut self, at: Instant, events: &mut Vec<Event>) {
        let mut open: Vec<_> = self
            .queues
            .iter_mut()
            .filter(|(_, watched)| watched.running.is_some())
            .collect();
        open.sort_unstable_by_key(|(key, _)| Arc::clone(key));
        for (_, watched) in open {
            if let Some(running) = &mut watched.running {
                let (stretch, episode) = running.tell(at);
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
        (targets, around): (&Targets, Around<'_>),
        events: &mut Vec<Event>,
    ) -> bool {
        if !self.queues.contains_key(key) {
            let watched = Watched {
                track: Track::default(),
                settings: (self.settings_for)(key),
                running: None,
                gauge: Gauge::default(),
            };
            self.queues.insert(Arc::clone(key), watched);
        }
        let Some(watched) = self.queues.get_mut(key) else {
            return false;
        };
        let before = watched.track.level;
        let sign = watched.track.sign_ns;
        let by_usual = key.kind.judged() == Judged::AgainstUsual;
        // What is looked at for what another waits for was never seen at rest: it has its place in that one's words.
        let is_asked_for = targets
            .get(key.target)
            .is_some_and(|target| !target.followed);
        let blindly = (by_usual && is_asked_for).then(|| NoThroughput {
            pool: (around.used_up)(key.target),
        });
        let verdict = watched
            .track
            .read(key.kind, reading, at.mono_ns, &watched.settings, blindly);
        watched.gauge.read(at.mono_ns, reading, &verdict);
        let state = || state(at, key, reading, &verdict);
        if self.tell_queues {
            events.push(Event::Queue(state()));
        }
        let mut stretch = None;
        if verdict.level > Level::Ok && watched.running.is_none() {
            let onset = since(at, sign.or(watched.track.sign_ns));
            let incident =
                self.incidents
                    .open(at, key, onset, (targets, around.neighbours), events);
            let opening = Opening {
                id: format!("{:016x}", queue_id("episode", at, key, targets)),
                incident,
                key: Arc::clone(key),
                onset,
                at,
                usual: watched.track.baseline.usual(),
            };
            let mut running = OpenEpisode::open(opening, reading, &verdict);
            stretch = running.read(at, reading, &verdict);
            events.push(Event::EpisodeOpened(Box::new(running.snapshot(at))));
            watched.running = Some(running);
        } else if let Some(running) = &mut watched.running {
            stretch = running.read(at, reading, &verdict);
        }
        let Some(running) = &mut watched.running else {
            return verdict.suspicious;
        };
        events.extend(stretch.map(Event::Stretch));
        if verdict.level != before {
            events.push(Event::Level {
                state: state(),
                from: before,
                to: verdict.level,
                episode: running.id().to_owned(),
            });
        }
        if verdict.level == Level::Ok {
            self.close(at, key, events);
        } else if running.is_due(at, watched.settings.repeat_interval_ns) {
            let (stretch, episode) = running.tell(at);
            events.extend(stretch.map(Event::Stretch));
            events.push(Event::Episode(Box::new(episode)));
        }
        verdict.suspicious
    }

    /// The queue is no longer there, so what it suffered from is over.
    fn forget(&mut self, at: Instant, key: &Arc<QueueKey>, events: &mut Vec<Event>) {
        self.close(at, key, events);
        self.queues.remove(key);
        self.suspicious.remove(key);
    }

    fn close(&mut self, at: Instant, key: &Arc<QueueKey>, events: &mut Vec<Event>) {
        let Some(running) = self
            .queues
            .get_mut(key)
            .and_then(|watched| watched.running.take())
        else {
            return;
        };
        let (stretch, episode) = running.close(at);
        events.extend(stretch.map(Event::Stretch));
        events.push(Event::Episode(Box::new(episode)));
        self.incidents.close(at, key, events);
    }
}

/// Names what begins at this moment in this queue of this service.
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

/// The moment of a monotonic time in the past, on both clocks.
fn since(now: Instant, mono_ns: Option<u64>) -> Instant {
    let mono_ns = mono_ns.unwrap_or(now.mono_ns);
    Instant {
        mono_ns,
        unix_ns: now
            .unix_ns
            .saturating_sub(now.mono_ns.saturating_sub(mono_ns)),
    }
}

fn state(at: Instant, key: &Arc<QueueKey>, reading: &Reading, verdict: &Verdict) -> QueueState {
    QueueState {
        at,
        key: Arc::clone(key),
        reading: reading.clone(),
        score: verdict.score,
        level: verdict.level,
        arrivals_per_s: verdict.rates.map(|rates| rates.arrivals),
        departures_per_s: verdict.rates.map(|rates| rates.departures),
        time_to_full_ns: verdict.time_to_full_ns,
    }
}
