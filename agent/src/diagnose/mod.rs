//! Why a queue fills: the cause, the culprit, the evidence, and what to do.
//!
//! Once a second, each open episode is judged from the last 20 s of samples:
//!
//! 1. `classify` says what one thread does in one sample; `profile` adds that up to shares of wall time. `loop_turns` follows the turns of event
//!    loops.
//! 2. `topology` knows which process holds which connection, pipe and lock, `inputs` what the queues and the other
//!    processes of the machine do, and `jvm_counters` for which share of the time JVMs count that they collect garbage.
//!    `consumers` are the processes that take items from queues inside services. `held_pool` finds connections that are taken and not used, `listening_sockets` those sockets of an address that nobody
//!    accepts from while others are empty.
//! 3. `wait_graph` follows the wait chain from the threads that serve the queue to the root cause.
//! 4. `rules` makes a verdict from all that; `words` has the phrases.
//! 5. `open_episode` tracks how long each verdict has held. The one that has held longest is reported.
//!
//! A pure function of samples and readings: no clock, no kernel, no I/O. No rule depends on the name of a program. What servers
//! publish about themselves in text is read in three places: `titles` (process titles), `thread_names` (threads of runtimes)
//! and `crate::messages` (log lines).
#![forbid(unsafe_code)]

mod case;
mod classify;
mod consumers;
mod exact_waits;
mod held_pool;
mod inputs;
mod jvm_counters;
mod listening_sockets;
pub mod log_evidence;
mod loop_turns;
mod no_baseline;
mod open_episode;
mod profile;
mod rules;
mod seconds;
mod served;
mod thread_names;
mod thread_set;
mod titles;
mod topology;
mod wait_graph;
mod words;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use case::Case;
use consumers::Consumers;
use inputs::Inputs;
use log_evidence::LogEvidence;
pub use no_baseline::{Calls, NoBaseline};
use open_episode::OpenEpisode;
use profile::Profile;
use served::Served;
use topology::Topology;
use wait_graph::View;

use crate::{
    detect::Waiting,
    event::{Episode, Event, Instant, Verdict},
    queue::{Kind, QueueId, QueueKey, Readings, Targets},
    sample::{Sample, TargetId},
};

/// An open episode is judged again after this time, ns.
const JUDGE_INTERVAL_NS: u64 = 1_000_000_000;
/// Longest window that a verdict is made from, ns: the latest part of the episode.
const WINDOW_NS: u64 = 20_000_000_000;
/// Window that shows which services wait for each other now, ns.
const NEIGHBOURS_WINDOW_NS: u64 = 3_000_000_000;

/// All state of the diagnosis, kept from one sample to the next.
#[derive(Default)]
pub struct Diagnosis {
    topology: Topology,
    profile: Profile,
    inputs: Inputs,
    log_evidence: LogEvidence,
    consumers: Consumers,
    /// By the episode's id.
    open: BTreeMap<String, OpenEpisode>,
    /// For services with open episodes: when the first episode opened, ns, and the verdict on it, if it has ended.
    first: BTreeMap<TargetId, (u64, Arc<Verdict>)>,
    /// Verdicts carry all rules and their numbers.
    explain: bool,
}

impl Diagnosis {
    /// From now on each verdict carries an [`Explanation`](crate::event::explain::Explanation). It costs one more evaluation
    /// of the rules a second for each open episode.
    pub fn explain(&mut self) {
        self.explain = true;
    }

    /// The focused services, and those around them.
    pub fn focus_scope(
        &self,
        sample: &Sample,
        targets: &Targets,
        focused: &BTreeSet<TargetId>,
    ) -> BTreeSet<TargetId> {
        let neighbours = targets.all().filter(|target| target.is_neighbour);
        let mut focus_scope = focused.clone();
        focus_scope.extend(neighbours.map(|target| target.id));
        focus_scope.extend(
            sample
                .profile
                .iter()
                .filter_map(|wait| targets.of(wait.tgid)),
        );
        focus_scope
    }

    /// Adds one sample, with the readings of its queues.
    pub fn read(
        &mut self,
        sample: &Sample,
        readings: &Readings,
        targets: &Targets,
        focus_scope: &BTreeSet<TargetId>,
    ) {
        let now_ns = sample.mono_ns;
        let in_focus = |target: TargetId| focus_scope.contains(&target);
        self.inputs.read(sample, readings, in_focus);
        if let Some(report) = &sample.hooks {
            for open in self.open.values_mut() {
                open.measured.read(report, open.episode.key.target);
            }
        }
        self.log_evidence.read(sample, targets);
        self.consumers.read(sample, targets);
        self.topology
            .read(now_ns, sample, readings, targets, focus_scope);
        if sample.scans.files {
            self.inputs.read_pools(&self.topology.pools(targets));
        }
        let in_focus = |tgid: u32| targets.of(tgid).is_some_and(in_focus);
        self.profile.read(
            now_ns,
            sample,
            readings,
            targets,
            (&self.topology, in_focus),
        );
    }

    /// Services that this one waits for, and those that wait for it: their episodes belong to one incident.
    pub fn neighbours(&self, at: Instant, target: TargetId, targets: &Targets) -> Vec<TargetId> {
        let from_ns = at.mono_ns.saturating_sub(NEIGHBOURS_WINDOW_NS);
        let window = self.profile.over(from_ns, at.mono_ns);
        let view = self.view(&window, targets);
        let ahead = wait_graph::chain_from(view, target);
        let ahead = ahead.iter().filter_map(|step| step.target);
        let on_path = |open: &&OpenEpisode| {
            let mut hops = open.verdict.path.iter().filter_map(|hop| hop.target);
            hops.any(|hop| hop == target)
        };
        let behind = self.open.values().filter(on_path);
        let behind = behind.map(|open| open.episode.key.target);
        ahead
            .chain(behind)
            .filter(|other| *other != target)
            .collect()
    }

    /// The size of this service's connection pool if it is exhausted while requests wait for a connection.
    pub fn exhausted_pool(&self, target: TargetId) -> Option<u64> {
        let pool = self.inputs.exhausted_pool(target);
        pool.map(|pool| pool.connections)
    }

    /// Which of the queues at level ok cannot be judged because they have no baseline. A service that has a verdict is left out.
    pub fn no_baseline(
        &self,
        ok: Vec<(Arc<QueueKey>, Waiting)>,
        targets: &Targets,
    ) -> Vec<NoBaseline> {
        let open = self.open.values().map(|open| open.episode.key.target);
        let judged: BTreeSet<TargetId> = open.collect();
        let ok = ok
            .into_iter()
            .filter(|(key, _)| !judged.contains(&key.target));
        no_baseline::of(ok.collect(), &self.inputs, (&self.topology, targets))
    }

    fn view<'a>(&'a self, window: &'a profile::Window, targets: &'a Targets) -> View<'a> {
        View {
            topology: &self.topology,
            profile: &self.profile,
            consumers: &self.consumers,
            targets,
            window,
        }
    }

    /// Whether more work arrives at the episode's service than in its baseline, as one of its queues shows.
    fn surges(&self, episode: &Episode) -> bool {
        let target = episode.key.target;
        let others = self.open.values().map(|open| &open.episode);
        let of_target = others.filter(|other| other.key.target == target);
        rules::is_surge(&of_target.chain([episode]).collect::<Vec<_>>())
    }

    fn judge(&self, at: Instant, episode: &Episode, targets: &Targets) -> Verdict {
        // If another queue of the same service began to fill earlier, that is the onset of this episode too.
        let target = episode.key.target;
        let others = self.open.values().map(|open| &open.episode);
        let onset_ns = others
            .filter(|other| other.key.target == target)
            .map(|other| other.onset.mono_ns)
            .fold(episode.onset.mono_ns, u64::min);
        let from_ns = onset_ns.max(at.mono_ns.saturating_sub(WINDOW_NS));
        let window = self.profile.over(from_ns, at.mono_ns);
        let view = self.view(&window, targets);
        let uneven = match (episode.key.kind, &episode.key.id) {
            (Kind::Accept, QueueId::Local(address)) => {
                let time = (window.from_ns, window.to_ns);
                self.topology.uneven(target, *address, time)
            }
            _ => None,
        };
        let key = &episode.key;
        let served = self.consumers.served_on(key);
        let served =
            served.map(|ends| Served::of(key.target, ends, at.mono_ns, (&self.topology, targets)));
        let case = Case {
            view,
            inputs: &self.inputs,
            episode,
            surges: self.surges(episode),
            uneven: uneven.as_ref(),
            served: served.as_ref(),
            steps: &wait_graph::chain_behind(view, episode, uneven.as_ref(), served.as_ref()),
        };
        Verdict {
            messages: self.log_evidence.over(target, episode.onset, episode.start),
            ..rules::judge(case, self.explain)
        }
    }

    /// Completes the detector's events of one sample: each episode gets its verdict, and stretches of one cause are added.
    /// `due` are the open episodes that are to be judged again, as they are now.
    pub fn complete(
        &mut self,
        at: Instant,
        targets: &Targets,
        due: Vec<Episode>,
        events: &mut Vec<Event>,
    ) {
        let mut completed = Vec::with_capacity(events.len());
        for episode in due {
            completed.extend(self.update(at, episode, targets));
        }
        for mut event in std::mem::take(events) {
            match &mut event {
                Event::EpisodeOpened(episode) => {
                    let causes = self.update(at, Episode::clone(episode), targets);
                    self.attach(episode);
                    completed.push(event);
                    completed.extend(causes);
                    continue;
                }
                Event::Episode(episode) if episode.ongoing => self.attach(episode),
                Event::Episode(episode) => {
                    self.attach(episode);
                    if let Some(open) = self.open.remove(&episode.id) {
                        completed.push(open.stretch(at));
                        self.remember_first(&open);
                    }
                }
                _ => {}
            }
            completed.push(event);
        }
        *events = completed;
    }

    /// Whether an open episode, by its id, is to be judged again.
    pub fn is_due(&self, at: Instant, episode: &str) -> bool {
        self.open
            .get(episode)
            .is_some_and(|open| at.mono_ns.saturating_sub(open.judged_ns) >= JUDGE_INTERVAL_NS)
    }

    /// Judges an episode that opens or is open. Returns the stretches of its cause that are to be reported.
    fn update(&mut self, at: Instant, episode: Episode, targets: &Targets) -> Vec<Event> {
        let verdict = Arc::new(self.judge(at, &episode, targets));
        let id = episode.id.clone();
        match self.open.get_mut(&id) {
            Some(open) => {
                open.episode = episode;
                open.update(at, &verdict)
            }
            None => {
                let open = OpenEpisode::new(at, episode, verdict);
                let stretch = open.stretch(at);
                self.open.insert(id, open);
                vec![stretch]
            }
        }
    }

    /// Keeps the verdict on an episode that has ended, if it opened first, while other episodes of its service are open.
    fn remember_first(&mut self, ended: &OpenEpisode) {
        let target = ended.episode.key.target;
        let start_ns = ended.episode.start.mono_ns;
        let is_of_target = |open: &OpenEpisode| open.episode.key.target == target;
        if !self.open.values().any(is_of_target) {
            self.first.remove(&target);
        } else if let Some(verdict) = ended.durations.longest() {
            let first = self.first.entry(target);
            let first = first.or_insert_with(|| (start_ns, Arc::clone(&verdict)));
            if start_ns < first.0 {
                *first = (start_ns, verdict);
            }
        }
    }

    /// The verdict on the earliest episode of the same service that has the same cause and names a culprit. If this
    /// episode names a culprit itself, only episodes that opened before it count.
    fn earlier(&self, episode: &Episode, own: &Verdict) -> Option<Arc<Verdict>> {
        let target = episode.key.target;
        let open = self.open.values();
        let open = open.filter(|open| open.episode.key.target == target);
        let open =
            open.filter_map(|open| Some((open.episode.start.mono_ns, open.durations.longest()?)));
        let ended = self.first.get(&target).cloned();
        open.chain(ended)
            .filter(|(_, verdict)| verdict.cause == own.cause && verdict.culprit.is_some())
            .filter(|(start_ns, _)| *start_ns < episode.start.mono_ns || own.culprit.is_none())
            .min_by_key(|(start_ns, _)| *start_ns)
            .map(|(_, verdict)| verdict)
    }

    /// Gives an episode the verdict that has held longest, as it was last made. If another queue of the service
    /// suffered from the same cause before, it gets that one's verdict.
    fn attach(&self, episode: &mut Episode) {
        let Some(open) = self.open.get(&episode.id) else {
            return;
        };
        let own = open.durations.longest();
        let earlier = own.as_ref().and_then(|own| self.earlier(episode, own));
        episode.verdict = earlier.or(own);
        episode.measured_waits = open.measured.summaries();
        episode.moments.extend(open.changes.iter().cloned());
        episode.moments.sort_by_key(|moment| moment.at);
    }
}

#[cfg(test)]
mod tests;
