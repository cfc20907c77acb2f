//! What a diagnosis found: the episodes, and how much was observed.

use std::{cmp::Reverse, collections::BTreeMap, sync::Arc};

use super::exact_waits::ExactWaits;
use crate::{
    diagnose::NoBaseline,
    event::{Episode, Event, Instant, Level},
    queue::Kind,
    sample::{ExactWait, Sample, Target, TargetId},
};

/// Maximum number of episodes kept. Beyond that, the least severe of those that have ended are only counted.
const MAX_EPISODES: usize = 1_000;
/// Maximum number of notices kept, one per code.
const MAX_NOTICES: usize = 20;

/// The findings so far, gathered from the stream of events.
#[derive(Default)]
pub struct Findings {
    targets: BTreeMap<TargetId, Arc<Target>>,
    /// By id.
    episodes: BTreeMap<String, Seen>,
    pub(super) dropped: u64,
    pub(super) notices: BTreeMap<String, String>,
    no_baseline: Vec<NoBaseline>,
    pub(super) exact_waits: ExactWaits,
    began: Option<Instant>,
    ended: Instant,
    pub(super) services: usize,
    /// Targets watched because a requested one has connections to them.
    pub(super) neighbours: usize,
    pub(super) queues: usize,
    pub(super) threads: usize,
}

/// One episode and the present level of its queue.
#[derive(Clone)]
pub(super) struct Seen {
    pub(super) episode: Episode,
    pub(super) level: Level,
}

impl Seen {
    /// Severity: greater is worse. Among equally bad queues, unread bytes come last: they are a part of the requests that
    /// another queue counts.
    pub(super) fn rank(&self) -> (bool, Level, Level, bool, Reverse<Instant>) {
        let Self { episode, level } = self;
        (
            episode.ongoing,
            *level,
            episode.level_max,
            episode.key.kind != Kind::Recv,
            Reverse(episode.onset),
        )
    }
}

/// The episodes of one incident, by service.
pub(super) struct Incident<'a> {
    pub(super) id: &'a str,
    /// First the services that were asked about, then their neighbours. Within each: first the service that appears in the
    /// most other services' wait chains, then in the order in which their queues filled.
    pub(super) services: Vec<Service<'a>>,
}

/// The episodes of one service, worst first. Never empty.
pub(super) struct Service<'a> {
    pub(super) target: TargetId,
    pub(super) episodes: Vec<&'a Seen>,
}

impl Service<'_> {
    fn onset(&self) -> Option<Instant> {
        self.episodes.iter().map(|seen| seen.episode.onset).min()
    }
}

impl Findings {
    /// Adds an event of the pipeline.
    pub fn take(&mut self, event: &Event) {
        match event {
            Event::Targets { targets, .. } => {
                // Targets named in an episode stay known after they have exited.
                let is_named = |id: &TargetId| self.episodes.values().any(|seen| seen.names(*id));
                self.targets.retain(|id, _| is_named(id));
                let known = targets.iter().map(|target| (target.id, Arc::clone(target)));
                self.targets.extend(known);
                self.neighbours = targets.iter().filter(|target| target.is_neighbour).count();
                self.services = targets.len() - self.neighbours;
            }
            Event::Notice { notice, .. } if self.notices.len() < MAX_NOTICES => {
                self.notices
                    .insert(notice.code.clone(), notice.text.clone());
            }
            Event::EpisodeOpened(episode) | Event::Episode(episode) => self.episode(episode),
            Event::Level { to, episode, .. } => {
                if let Some(seen) = self.episodes.get_mut(episode) {
                    seen.level = *to;
                    seen.episode.level_max = seen.episode.level_max.max(*to);
                }
            }
            _ => {}
        }
    }

    /// Adds a sample to what was observed; `queues` is the present number of queues.
    pub fn observed(&mut self, sample: &Sample, queues: usize) {
        let at = Instant {
            mono_ns: sample.mono_ns,
            unix_ns: sample.unix_ns,
        };
        self.began.get_or_insert(at);
        self.ended = at;
        self.queues = queues;
        self.exact_waits.observe(sample);
        if sample.scans.threads {
            self.threads = sample.threads.len();
        }
    }

    fn episode(&mut self, episode: &Episode) {
        let level = match self.episodes.get(&episode.id) {
            _ if !episode.ongoing => Level::Ok,
            Some(seen) => seen.level,
            None => episode.level_max,
        };
        let seen = Seen {
            episode: episode.clone(),
            level,
        };
        self.episodes.insert(episode.id.clone(), seen);
        if self.episodes.len() > MAX_EPISODES {
            let over = self.episodes.values().filter(|seen| !seen.episode.ongoing);
            let least = over.min_by_key(|seen| seen.rank());
            // Open episodes are bounded by the number of queues.
            if let Some(id) = least.map(|seen| seen.episode.id.clone()) {
                self.episodes.remove(&id);
                self.dropped += 1;
            }
        }
    }

    /// All targets named in the findings.
    pub fn targets(&self) -> &BTreeMap<TargetId, Arc<Target>> {
        &self.targets
    }

    /// All episodes, in the order of the report.
    pub fn episodes(&self) -> impl Iterator<Item = &Episode> {
        self.incidents()
            .into_iter()
            .flat_map(|incident| incident.services)
            .flat_map(|service| service.episodes)
            .map(|seen| &seen.episode)
    }

    /// Episodes that reached critical or full.
    pub fn critical(&self) -> impl Iterator<Item = &Episode> {
        self.episodes()
            .filter(|episode| episode.level_max >= Level::Critical)
    }

    /// Sets the queues that cannot be judged for lack of a baseline, at the end of the diagnosis.
    pub fn set_no_baseline(&mut self, no_baseline: Vec<NoBaseline>) {
        self.no_baseline = no_baseline;
    }

    /// The queues that cannot be judged for lack of a baseline.
    pub fn no_baseline(&self) -> &[NoBaseline] {
        &self.no_baseline
    }

    /// What hooks have measured: each wait with the name of its system call.
    pub fn exact_waits(&self) -> impl Iterator<Item = (&ExactWait, String)> {
        self.exact_waits.all()
    }

    /// The number of queues that are not ok now.
    pub fn open(&self) -> usize {
        let open = |seen: &&Seen| seen.episode.ongoing;
        self.episodes.values().filter(open).count()
    }

    /// Time from the first sample to the last, in nanoseconds.
    pub(super) fn observed_ns(&self) -> u64 {
        let began = self.began.unwrap_or(self.ended);
        self.ended.mono_ns.saturating_sub(began.mono_ns)
    }

    fn is_neighbour(&self, target: TargetId) -> bool {
        let target = self.targets.get(&target);
        target.is_some_and(|target| target.is_neighbour)
    }

    /// All incidents, worst first.
    pub(super) fn incidents(&self) -> Vec<Incident<'_>> {
        let mut by_id: BTreeMap<&str, Vec<&Seen>> = BTreeMap::new();
        for seen in self.episodes.values() {
            by_id.entry(&seen.episode.incident).or_default().push(seen);
        }
        let worst = |seen: &[&Seen]| seen.iter().map(|seen| seen.rank()).max();
        let mut order: Vec<_> = by_id.into_iter().collect();
        order.sort_by_key(|(_, seen)| Reverse(worst(seen)));
        order
            .into_iter()
            .map(|(id, seen)| Incident {
                id,
                services: services(seen, |target| self.is_neighbour(target)),
            })
            .collect()
    }
}

impl Seen {
    /// Whether the episode belongs to this target or names it as a culprit or in its wait chain.
    fn names(&self, target: TargetId) -> bool {
        self.episode.key.target == target
            || self.episode.verdict.as_ref().is_some_and(|verdict| {
                let culprit = verdict.culprit.as_ref().and_then(|it| it.target);
                let mut hops = verdict.path.iter().filter_map(|hop| hop.target);
                culprit == Some(target) || hops.any(|hop| hop == target)
            })
    }
}

/// Groups the episodes of one incident by service, in the order of [`Incident::services`].
fn services<'a>(
    mut episodes: Vec<&'a Seen>,
    is_neighbour: impl Fn(TargetId) -> bool,
) -> Vec<Service<'a>> {
    episodes.sort_by_key(|seen| Reverse(seen.rank()));
    let mut by_target: BTreeMap<TargetId, Service<'a>> = BTreeMap::new();
    for seen in episodes {
        let target = seen.episode.key.target;
        let service = by_target.entry(target).or_insert_with(|| Service {
            target,
            episodes: Vec::new(),
        });
        service.episodes.push(seen);
    }
    let named_by_others = |head: TargetId| {
        let others = by_target.values().filter(|other| other.target != head);
        others
            .filter(|other| other.episodes.iter().any(|seen| seen.names(head)))
            .count()
    };
    let worst = |service: &Service<'_>| service.episodes.first().map(|seen| seen.rank());
    let head = by_target
        .values()
        .max_by_key(|service| (named_by_others(service.target), worst(service)))
        .map(|service| service.target);
    let mut services: Vec<Service<'a>> = by_target.into_values().collect();
    services.sort_by_key(|service| {
        (
            is_neighbour(service.target),
            Some(service.target) != head,
            service.onset(),
        )
    });
    services
}
