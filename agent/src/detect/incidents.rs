//! Incidents: episodes that belong together, of one target and of those that wait for each other.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::detector::queue_id;
use crate::{
    event::{Event, Instant},
    queue::{QueueKey, Targets},
    sample::TargetId,
};

/// Answers the targets for which one waits, or that wait for it.
pub type Neighbours<'a> = &'a dyn Fn(TargetId) -> Vec<TargetId>;

/// All open incidents.
#[derive(Default)]
pub(super) struct Incidents {
    /// Which incident a target with open episodes is part of.
    of: BTreeMap<TargetId, String>,
    open: BTreeMap<String, Incident>,
}

struct Incident {
    /// The target whose episode opened it.
    first: TargetId,
    open: BTreeSet<Arc<QueueKey>>,
}

impl Incidents {
    /// The incident of a queue that leaves ok: the one of its target, or of a target that waits for it or for which it
    /// waits, else a new one. Answers its id.
    pub(super) fn open(
        &mut self,
        at: Instant,
        key: &Arc<QueueKey>,
        onset: Instant,
        (targets, neighbours): (&Targets, Neighbours<'_>),
        events: &mut Vec<Event>,
    ) -> String {
        let own = self.of.get(&key.target).cloned();
        let known = own.or_else(|| {
            let mut around = neighbours(key.target).into_iter();
            around.find_map(|target| self.of.get(&target).cloned())
        });
        let id = known.unwrap_or_else(|| {
            let halves = ["incident", "trace"].map(|role| queue_id(role, at, key, targets));
            let id = format!("{:016x}{:016x}", halves[0], halves[1]);
            events.push(Event::IncidentOpened {
                id: id.clone(),
                target: key.target,
                onset,
                at,
                first: key.kind,
            });
            id
        });
        self.of.insert(key.target, id.clone());
        let incident = self.open.entry(id.clone()).or_insert_with(|| Incident {
            first: key.target,
            open: BTreeSet::new(),
        });
        incident.open.insert(Arc::clone(key));
        id
    }

    /// The queue has come back, or is gone.
    pub(super) fn close(&mut self, at: Instant, key: &Arc<QueueKey>, events: &mut Vec<Event>) {
        let Some(id) = self.of.get(&key.target).cloned() else {
            return;
        };
        let Some(incident) = self.open.get_mut(&id) else {
            return;
        };
        incident.open.remove(key);
        if !incident.open.iter().any(|open| open.target == key.target) {
            self.of.remove(&key.target);
        }
        if incident.open.is_empty()
            && let Some(incident) = self.open.remove(&id)
        {
            events.push(Event::IncidentClosed {
                id,
                target: incident.first,
                at,
            });
        }
    }
}
