//! Incidents: the episodes of one target, and of targets that wait for each other, belong together.

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

/// Returns the targets that a target waits for, and those that wait for it.
pub type Neighbours<'a> = &'a dyn Fn(TargetId) -> Vec<TargetId>;

/// All open incidents.
#[derive(Default)]
pub(super) struct Incidents {
    /// The incident of each target with open episodes.
    of: BTreeMap<TargetId, String>,
    open: BTreeMap<String, Incident>,
}

struct Incident {
    /// The target whose episode opened it.
    first: TargetId,
    open: BTreeSet<Arc<QueueKey>>,
}

impl Incidents {
    /// Returns the id of the incident that a queue joins when it leaves ok: that of its target, else that of a neighbour, else a new
    /// one.
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
            let mut neighbours = neighbours(key.target).into_iter();
            neighbours.find_map(|target| self.of.get(&target).cloned())
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

    /// The queue has recovered, or is gone.
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
