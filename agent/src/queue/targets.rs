//! Who is watched, indexed for the kinds' modules.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use crate::sample::{Listener, Sample, Target, TargetId};

/// The watched services and their processes.
#[derive(Default)]
pub struct Targets {
    by_id: BTreeMap<TargetId, Arc<Target>>,
    by_tgid: HashMap<u32, TargetId>,
    threads: HashMap<TargetId, u32>,
    /// Ports that targets listen on: a connection with such a local port was accepted, not opened.
    ports: HashSet<(u32, u16)>,
}

impl Targets {
    pub(super) fn replace(&mut self, targets: &[Target]) {
        self.by_id = targets
            .iter()
            .map(|target| (target.id, Arc::new(target.clone())))
            .collect();
        self.by_tgid = targets
            .iter()
            .flat_map(|target| target.tgids.iter().map(|tgid| (*tgid, target.id)))
            .collect();
        self.threads.retain(|id, _| self.by_id.contains_key(id));
    }

    /// The target that this process belongs to.
    pub fn of(&self, tgid: u32) -> Option<TargetId> {
        self.by_tgid.get(&tgid).copied()
    }

    /// What is known of a target.
    pub fn get(&self, id: TargetId) -> Option<&Arc<Target>> {
        self.by_id.get(&id)
    }

    /// All targets, in the order of their ids.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Target>> {
        self.by_id.values()
    }

    /// Takes in what one sample says about the targets' threads and ports.
    pub(super) fn learn(&mut self, sample: &Sample) {
        if sample.walks.threads {
            self.threads.clear();
            for thread in &sample.threads {
                if let Some(target) = self.by_tgid.get(&thread.tgid) {
                    *self.threads.entry(*target).or_default() += 1;
                }
            }
        }
        if sample.walks.files || sample.walks.marked {
            self.ports.clear();
            let place = |listener: &Listener| (listener.netns, listener.address.port());
            self.ports.extend(sample.listeners.iter().map(place));
        }
    }

    /// Threads of the target at the last walk over threads; at least 1.
    pub(super) fn threads(&self, id: TargetId) -> u32 {
        self.threads.get(&id).copied().unwrap_or(1).max(1)
    }

    /// Whether a target listens on this port of this network namespace.
    pub(super) fn listens(&self, netns: u32, port: u16) -> bool {
        self.ports.contains(&(netns, port))
    }
}
