//! The open episodes, and those that ended lately.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use crate::event::{Episode, Event, Level, Verdict};

/// Ended episodes that are kept.
const MAX_ENDED: usize = 20;

/// An episode, its present level, and its latest verdict.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) episode: Arc<Episode>,
    pub(super) level: Level,
    pub(super) verdict: Option<Arc<Verdict>>,
}

/// See the module.
#[derive(Clone, Default)]
pub(super) struct Episodes {
    /// By id. Bounded by the number of queues.
    open: Arc<BTreeMap<String, Known>>,
    /// The latest first.
    ended: Arc<VecDeque<Known>>,
}

impl Episodes {
    /// Adds an event. Returns whether it concerns an episode.
    pub(super) fn take(&mut self, event: &Event) -> bool {
        match event {
            Event::EpisodeOpened(episode) | Event::Episode(episode) => self.episode(episode),
            Event::Level { to, episode, .. } => {
                if let Some(known) = Arc::make_mut(&mut self.open).get_mut(episode) {
                    known.level = *to;
                }
            }
            Event::Cause(stretch) => {
                if let Some(known) = Arc::make_mut(&mut self.open).get_mut(&stretch.episode) {
                    known.verdict = Some(Arc::clone(&stretch.verdict));
                }
            }
            _ => return false,
        }
        true
    }

    fn episode(&mut self, episode: &Episode) {
        let open = Arc::make_mut(&mut self.open);
        let before = open.remove(&episode.id);
        let (level, verdict) = match before {
            Some(known) => (known.level, known.verdict),
            None => (episode.level_max, None),
        };
        let mut known = Known {
            level,
            verdict: episode.verdict.clone().or(verdict),
            episode: Arc::new(episode.clone()),
        };
        if episode.ongoing {
            open.insert(episode.id.clone(), known);
            return;
        }
        known.level = Level::Ok;
        let ended = Arc::make_mut(&mut self.ended);
        ended.push_front(known);
        ended.truncate(MAX_ENDED);
    }

    /// Forgets the episodes that ended before this time (ns since 1970).
    pub(super) fn forget_before(&mut self, unix_ns: u64) {
        let is_old = |known: &Known| known.episode.end.unix_ns < unix_ns;
        if self.ended.back().is_some_and(is_old) {
            Arc::make_mut(&mut self.ended).retain(|known| !is_old(known));
        }
    }

    pub(super) fn open(&self) -> impl Iterator<Item = &Known> {
        self.open.values()
    }

    pub(super) fn ended(&self) -> impl Iterator<Item = &Known> {
        self.ended.iter()
    }
}
