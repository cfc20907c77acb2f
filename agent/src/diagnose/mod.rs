//! Why a queue fills: from what threads wait for to a cause, a culprit, the evidence, and what to do.
//!
//! `topology` keeps who holds what; `classify` says what one thread does at one look; `profile` adds that up over time;
//! `inputs` keeps what the queues say; `wait_graph` walks from a blocked thread to what it waits for, until something works;
//! `rules` makes a verdict of all that, `words` says it. Pure: no clock, no kernel, no I/O. The rules speak of kernel
//! facts, never of a program.
#![forbid(unsafe_code)]

mod classify;
mod inputs;
pub mod log_evidence;
mod no_baseline;
mod profile;
mod rules;
mod topology;
mod wait_graph;
mod words;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use inputs::Facts;
use log_evidence::LogEvidence;
pub use no_baseline::{Calls, NoBaseline};
use profile::Profile;
use rules::Case;
use topology::Topology;
use wait_graph::View;

use crate::{
    cause::Cause,
    detect::Waiting,
    event::{
        Activity, CauseStretch, Confidence, Culprit, CulpritKind, Episode, Event, Hop, Instant,
        LoggedMessage, Moment, MomentKind, Verdict,
    },
    queue::{QueueKey, Readings, Targets},
    sample::{Sample, TargetId},
};

/// A verdict is made again so often while its episode lasts.
const JUDGE_EVERY_NS: u64 = 1_000_000_000;
/// An episode's verdict is made from so much of its time at most, the latest.
const WINDOW_NS: u64 = 20_000_000_000;
/// A cause that stands is told again so often.
const TELL_EVERY_NS: u64 = 30_000_000_000;

/// All that is remembered between samples in order to say why.
#[derive(Default)]
pub struct Diagnosis {
    world: Topology,
    profile: Profile,
    facts: Facts,
    heard: LogEvidence,
    open: BTreeMap<String, Standing>,
    /// Of targets with open episodes, the verdict on the one that opened first, where that has ended; and when it
    /// opened.
    first: BTreeMap<TargetId, (u64, Arc<Verdict>)>,
}

/// An open episode and what is known of its cause.
struct Standing {
    /// As it was last told by the detector.
    episode: Episode,
    judged_ns: u64,
    verdict: Option<Arc<Verdict>>,
    since: Instant,
    /// When a stretch was last told, and how many were.
    told_ns: u64,
    index: u32,
    held: Held,
    /// Causes that followed each other, for the episode's moments.
    changes: Vec<Moment>,
}

impl Diagnosis {
    /// The targets of which everything is to be known: those with a suspicious queue, and those around them.
    pub fn focus_scope(
        &self,
        sample: &Sample,
        targets: &Targets,
        focused: &BTreeSet<TargetId>,
    ) -> BTreeSet<TargetId> {
        let followed = targets.all().filter(|target| target.followed);
        let mut focus_scope = focused.clone();
        focus_scope.extend(followed.map(|target| target.id));
        focus_scope.extend(
            sample
                .profile
                .iter()
                .filter_map(|wait| targets.of(wait.tgid)),
        );
        focus_scope
    }

    /// Takes in one sample and what the queues were in it.
    pub fn read(
        &mut self,
        sample: &Sample,
        readings: &Readings,
        targets: &Targets,
        focus_scope: &BTreeSet<TargetId>,
    ) {
        let now_ns = sample.mono_ns;
        let near = |target: TargetId| focus_scope.contains(&target);
        self.facts.read(sample, readings, near);
        self.heard.read(sample, targets);
        self.world
            .read(now_ns, sample, readings, targets, focus_scope);
        if sample.walks.files {
            self.facts.look_at_pools(&self.world.pools(targets));
        }
        let near = |tgid: u32| targets.of(tgid).is_some_and(near);
        self.profile
            .read(now_ns, sample, readings, targets, (&self.world, near));
    }

    /// Targets for which this one waits, or that wait for it: their episodes are one incident.
    pub fn neighbours(&self, at: Instant, target: TargetId, targets: &Targets) -> Vec<TargetId> {
        const LATELY_NS: u64 = 3_000_000_000;
        let window = self
            .profile
            .over(at.mono_ns.saturating_sub(LATELY_NS), at.mono_ns);
        let view = self.view(&window, targets);
        let ahead = wait_graph::from_target(view, target);
        let ahead = ahead.iter().filter_map(|step| step.target);
        let on_path = |standing: &&Standing| {
            let path = standing.verdict.iter().flat_map(|verdict| &verdict.path);
            path.filter_map(|hop| hop.target).any(|hop| hop == target)
        };
        let behind = self.open.values().filter(on_path);
        let behind = behind.map(|standing| standing.episode.key.target);
        ahead
            .chain(behind)
            .filter(|other| *other != target)
            .collect()
    }

    /// The connections of a pool of this target's that is used up while requests wait for one.
    pub fn used_up(&self, target: TargetId) -> Option<u64> {
        self.facts.used_up(target).map(|pool| pool.connections)
    }

    /// What is to be said of queues that are ok only as far as is known: nothing of a service that has a verdict.
    pub fn no_baseline(
        &self,
        ok: Vec<(Arc<QueueKey>, Waiting)>,
        targets: &Targets,
    ) -> Vec<NoBaseline> {
        let open = self
            .open
            .values()
            .map(|standing| standing.episode.key.target);
        let judged: BTreeSet<TargetId> = open.collect();
        let ok = ok
            .into_iter()
            .filter(|(key, _)| !judged.contains(&key.target));
        no_baseline::of(ok.collect(), &self.facts, (&self.world, targets))
    }

    fn view<'a>(&'a self, window: &'a profile::Window, targets: &'a Targets) -> View<'a> {
        View {
            world: &self.world,
            profile: &self.profile,
            targets,
            window,
        }
    }

    /// Whether more work comes to the episode's target than usual, as one of its queues tells.
    fn surges(&self, episode: &Episode) -> bool {
        let target = episode.key.target;
        let others = self.open.values().map(|standing| &standing.episode);
        let of_target = others.filter(|other| other.key.target == target);
        rules::is_surge(&of_target.chain([episode]).collect::<Vec<_>>())
    }

    fn judge(&self, at: Instant, episode: &Episode, targets: &Targets) -> Verdict {
        // What began in another queue of the same service began there.
        let target = episode.key.target;
        let others = self.open.values().map(|standing| &standing.episode);
        let sign_ns = others
            .filter(|other| other.key.target == target)
            .map(|other| other.onset.mono_ns)
            .fold(episode.onset.mono_ns, u64::min);
        let from_ns = sign_ns.max(at.mono_ns.saturating_sub(WINDOW_NS));
        let window = self.profile.over(from_ns, at.mono_ns);
        let verdict = rules::judge(Case {
            view: self.view(&window, targets),
            facts: &self.facts,
            episode,
            surges: self.surges(episode),
        });
        Verdict {
            messages: self
                .heard
                .over(episode.key.target, episode.onset, episode.start),
            ..verdict
        }
    }

    /// Completes what the detector says of one tick: each episode gets its verdict, and stretches of one cause are told.
    /// `standings` are the open episodes as they are now, of those whose verdict is due.
    pub fn complete(
        &mut self,
        at: Instant,
        targets: &Targets,
        standings: Vec<Episode>,
        events: &mut Vec<Event>,
    ) {
        let mut told = Vec::with_capacity(events.len());
        for episode in standings {
            self.look(at, episode, targets, &mut told);
        }
        for mut event in std::mem::take(events) {
            match &mut event {
                Event::EpisodeOpened(episode) => {
                    let mut causes = Vec::new();
                    self.look(at, Episode::clone(episode), targets, &mut causes);
                    self.attach(episode);
                    told.push(event);
                    told.append(&mut causes);
                    continue;
                }
                Event::Episode(episode) if episode.ongoing => self.attach(episode),
                Event::Episode(episode) => {
                    self.attach(episode);
                    if let Some(standing) = self.open.remove(&episode.id) {
                        told.extend(standing.stretch(at));
                        self.remember(&standing);
                    }
                }
                _ => {}
            }
            told.push(event);
        }
        *events = told;
    }

    /// When an episode's verdict is due, by its id.
    pub fn is_due(&self, at: Instant, episode: &str) -> bool {
        self.open
            .get(episode)
            .is_some_and(|standing| at.mono_ns.saturating_sub(standing.judged_ns) >= JUDGE_EVERY_NS)
    }

    fn look(&mut self, at: Instant, episode: Episode, targets: &Targets, told: &mut Vec<Event>) {
        let verdict = Arc::new(self.judge(at, &episode, targets));
        let id = episode.id.clone();
        match self.open.get_mut(&id) {
            Some(standing) => {
                standing.episode = episode;
                told.extend(standing.next(at, &verdict));
            }
            None => {
                let standing = Standing::new(at, episode, verdict);
                told.extend(standing.stretch(at));
                self.open.insert(id, standing);
            }
        }
    }

    /// An episode has ended: what it was is remembered as long as others of its target are open.
    fn remember(&mut self, ended: &Standing) {
        let target = ended.episode.key.target;
        let start_ns = ended.episode.start.mono_ns;
        let others = |standing: &Standing| standing.episode.key.target == target;
        if !self.open.values().any(others) {
            self.first.remove(&target);
        } else if let Some(verdict) = ended.held.longest() {
            let first = self.first.entry(target);
            let first = first.or_insert_with(|| (start_ns, Arc::clone(&verdict)));
            if start_ns < first.0 {
                *first = (start_ns, verdict);
            }
        }
    }

    /// What was said of another episode of this target that has the same cause: of the one that opened first, if that was before
    /// this one, or if nobody is named here.
    fn elder(&self, episode: &Episode, own: &Verdict) -> Option<Arc<Verdict>> {
        let target = episode.key.target;
        let open = self.open.values();
        let open = open.filter(|standing| standing.episode.key.target == target);
        let open = open.filter_map(|standing| {
            Some((standing.episode.start.mono_ns, standing.held.longest()?))
        });
        let ended = self.first.get(&target).cloned();
        open.chain(ended)
            .filter(|(_, verdict)| verdict.cause == own.cause && verdict.culprit.is_some())
            .filter(|(start_ns, _)| *start_ns < episode.start.mono_ns || own.culprit.is_none())
            .min_by_key(|(start_ns, _)| *start_ns)
            .map(|(_, verdict)| verdict)
    }

    /// The cause that held for longest, as it was last judged; where that is what another queue of the target has suffered from
    /// before, with the same at the head of the jam.
    fn attach(&self, episode: &mut Episode) {
        let Some(standing) = self.open.get(&episode.id) else {
            return;
        };
        let own = standing.held.longest();
        let elder = own.as_ref().and_then(|own| self.elder(episode, own));
        episode.verdict = elder.or(own);
        episode.moments.extend(standing.changes.iter().cloned());
        episode.moments.sort_by_key(|moment| moment.at);
    }
}

impl Standing {
    fn new(at: Instant, episode: Episode, verdict: Arc<Verdict>) -> Self {
        Self {
            episode,
            judged_ns: at.mono_ns,
            held: Held::of(Arc::clone(&verdict)),
            verdict: Some(verdict),
            since: at,
            told_ns: at.mono_ns,
            index: 0,
            changes: Vec::new(),
        }
    }

    /// Another verdict; answers the stretch that ends with it, where the cause changed or has stood for long.
    fn next(&mut self, at: Instant, verdict: &Arc<Verdict>) -> Vec<Event> {
        /// Changes that are kept.
        const MAX_CHANGES: usize = 32;
        let elapsed_ns = at.mono_ns.saturating_sub(self.judged_ns);
        self.judged_ns = at.mono_ns;
        // While a queue drains, its workers are busy with what waited: that says nothing about why it filled.
        if self.episode.is_draining() {
            return Vec::new();
        }
        self.held.add(verdict, elapsed_ns);
        let same = self
            .verdict
            .as_ref()
            .is_some_and(|before| before.cause == verdict.cause);
        let long = at.mono_ns.saturating_sub(self.told_ns) >= TELL_EVERY_NS;
        let mut told = Vec::new();
        if !same || long {
            told.extend(self.stretch(at));
            self.since = at;
            self.told_ns = at.mono_ns;
            self.index += 1;
        }
        self.verdict = Some(Arc::clone(verdict));
        if !same {
            if self.changes.len() < MAX_CHANGES {
                self.changes.push(Moment {
                    at,
                    kind: MomentKind::Cause(verdict.cause),
                });
            }
            // At once, without waiting for how long it holds.
            told.extend(self.stretch(at));
        }
        told
    }

    /// What has held until now; from where it begins to where it begins when it is told for the first time.
    fn stretch(&self, at: Instant) -> Option<Event> {
        let verdict = Arc::clone(self.verdict.as_ref()?);
        Some(Event::Cause(Box::new(CauseStretch {
            episode: self.episode.id.clone(),
            incident: self.episode.incident.clone(),
            key: Arc::clone(&self.episode.key),
            verdict,
            from: self.since,
            to: at,
            index: self.index,
        })))
    }
}

/// Verdicts on one episode that name the same, each with how long it held, ns, and as it was last made.
struct Held(Vec<(u64, Arc<Verdict>)>);

impl Held {
    /// What is told apart; a culprit that is another one at each look is not worth more.
    const MAX: usize = 64;

    fn of(verdict: Arc<Verdict>) -> Self {
        Self(vec![(0, verdict)])
    }

    fn add(&mut self, verdict: &Arc<Verdict>, elapsed_ns: u64) {
        let known = self.0.iter().position(|(_, known)| known.names_as(verdict));
        if let Some((held_ns, known)) = known.and_then(|known| self.0.get_mut(known)) {
            *held_ns += elapsed_ns;
            *known = Arc::clone(verdict);
        } else if self.0.len() < Self::MAX {
            self.0.push((elapsed_ns, Arc::clone(verdict)));
        }
    }

    /// Of the cause that held for longest, the verdict that did; a cause that is known before one that is not.
    fn longest(&self) -> Option<Arc<Verdict>> {
        let mut causes: BTreeMap<Cause, u64> = BTreeMap::new();
        for (held_ns, verdict) in &self.0 {
            *causes.entry(verdict.cause).or_default() += held_ns;
        }
        let longest = causes
            .into_iter()
            .max_by_key(|(cause, held_ns)| (*cause != Cause::Unknown, *held_ns));
        let (cause, _) = longest?;
        let of_it = self.0.iter().filter(|(_, verdict)| verdict.cause == cause);
        of_it
            .max_by_key(|(held_ns, _)| *held_ns)
            .map(|(_, verdict)| Arc::clone(verdict))
    }
}

#[cfg(test)]
mod tests;
