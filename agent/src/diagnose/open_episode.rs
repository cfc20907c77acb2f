//! The cause of one episode while it lasts: each new verdict, and for how long each has held.

use std::{collections::BTreeMap, sync::Arc};

use super::exact_waits::OfEpisode;
use crate::{
    cause::Cause,
    event::{CauseStretch, Episode, Event, Instant, Moment, MomentKind, Verdict},
};

/// An unchanged cause is reported again after this time, ns.
const REPORT_INTERVAL_NS: u64 = 30_000_000_000;
/// The same cause with another culprit is reported at most this often, ns: the first verdict can rest on half a second, in which
/// the culprit was not known yet.
const CULPRIT_INTERVAL_NS: u64 = 1_000_000_000;
/// A queue that is empty in at least this share of its samples fills in bursts, …
const MIN_EMPTY_IN_BURSTS: f64 = 0.8;
/// … unless something waited in it for this time, ns: then it was a standing queue, which has drained.
const MAX_WAIT_IN_BURSTS_NS: u64 = 1_000_000_000;
/// Maximum number of changes of cause kept for an episode.
const MAX_CHANGES: usize = 32;

/// An open episode and what is known of its cause.
pub(super) struct OpenEpisode {
    /// As the detector last reported it.
    pub(super) episode: Episode,
    pub(super) judged_ns: u64,
    pub(super) verdict: Arc<Verdict>,
    pub(super) durations: VerdictDurations,
    /// Causes that followed each other, for the episode's moments.
    pub(super) changes: Vec<Moment>,
    pub(super) measured: OfEpisode,
    /// When the present stretch of one cause began.
    since: Instant,
    /// When a stretch was last reported, ns.
    reported_ns: u64,
    /// Number of the present stretch, from 0.
    index: u32,
}

impl OpenEpisode {
    pub(super) fn new(at: Instant, episode: Episode, verdict: Arc<Verdict>) -> Self {
        Self {
            episode,
            judged_ns: at.mono_ns,
            durations: VerdictDurations::of(Arc::clone(&verdict)),
            verdict,
            changes: Vec::new(),
            measured: OfEpisode::default(),
            since: at,
            reported_ns: at.mono_ns,
            index: 0,
        }
    }

    /// Adds a new verdict. Returns the stretch that ends with it if cause or culprit have changed or the cause is due to be
    /// reported again, and the first report of a new cause or culprit.
    pub(super) fn update(&mut self, at: Instant, verdict: &Arc<Verdict>) -> Vec<Event> {
        let elapsed_ns = at.mono_ns.saturating_sub(self.judged_ns);
        self.judged_ns = at.mono_ns;
        // While a queue drains, its workers are busy with the backlog. That says nothing about why it filled. But one that is empty
        // in most samples drains after each burst: it may never be judged otherwise.
        let in_bursts = self.episode.empty_share >= MIN_EMPTY_IN_BURSTS
            && self.episode.wait_max_ns.unwrap_or(0) < MAX_WAIT_IN_BURSTS_NS;
        let is_judged = self.verdict.cause != Cause::Unknown;
        if self.episode.is_draining() && (is_judged || !in_bursts) {
            return Vec::new();
        }
        self.durations.add(verdict, elapsed_ns);
        let is_same_cause = self.verdict.cause == verdict.cause;
        let is_new = !self.verdict.names_as(verdict);
        let unreported_ns = at.mono_ns.saturating_sub(self.reported_ns);
        if is_new && is_same_cause && unreported_ns < CULPRIT_INTERVAL_NS {
            // Reported later, if it still is the culprit then.
            return Vec::new();
        }
        let is_due = unreported_ns >= REPORT_INTERVAL_NS;
        let mut events = Vec::new();
        if is_new || is_due {
            events.push(self.stretch(at));
            self.since = at;
            self.reported_ns = at.mono_ns;
            self.index += 1;
        }
        self.verdict = Arc::clone(verdict);
        if !is_same_cause && self.changes.len() < MAX_CHANGES {
            self.changes.push(Moment {
                at,
                kind: MomentKind::Cause(verdict.cause),
            });
        }
        if is_new {
            // Report a new cause at once, not only when its stretch ends.
            events.push(self.stretch(at));
        }
        events
    }

    /// The present stretch until now. Reported for the first time, it is empty: it begins and ends now.
    pub(super) fn stretch(&self, at: Instant) -> Event {
        Event::Cause(Box::new(CauseStretch {
            episode: self.episode.id.clone(),
            incident: self.episode.incident.clone(),
            key: Arc::clone(&self.episode.key),
            verdict: Arc::clone(&self.verdict),
            from: self.since,
            to: at,
            index: self.index,
        }))
    }
}

/// The different verdicts on one episode: how long each has held, ns, and as it was last made.
pub(super) struct VerdictDurations(Vec<(u64, Arc<Verdict>)>);

impl VerdictDurations {
    /// Maximum number of verdicts kept; further ones are dropped. If every sample has another culprit, keeping more of
    /// them is not worthwhile.
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

    /// The verdict that has held longest, among those with the cause that has held longest. Any cause takes precedence
    /// over `unknown`.
    pub(super) fn longest(&self) -> Option<Arc<Verdict>> {
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
