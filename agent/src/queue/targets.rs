//! The watched services and their processes, indexed by what the queue sources look up.

use crate::hash::HashMap;
use std::{collections::BTreeMap, sync::Arc};

use rustc_hash::{FxHashMap, FxHashSet};

use crate::{
    sample::{Holder, Listener, Sample, Target, TargetId},
    text,
};

/// Processes listed by name when several hold the other end of a pipe or socket. More would not fit a line.
const NAMED_HOLDERS: usize = 2;

/// The watched services, their processes, and who holds the other ends of their pipes and unix sockets.
#[derive(Default)]
pub struct Targets {
    by_id: BTreeMap<TargetId, Arc<Target>>,
    by_tgid: FxHashMap<u32, TargetId>,
    threads: FxHashMap<TargetId, u32>,
    /// Network namespace and port that targets listen on. A connection with such a local port was accepted, not opened.
    ports: FxHashSet<(u32, u16)>,
    /// Holders of the pipes and unix sockets that targets have an end of, by inode.
    holders: HashMap<u64, Vec<Holder>>,
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

    /// The target with this id.
    pub fn get(&self, id: TargetId) -> Option<&Arc<Target>> {
        self.by_id.get(&id)
    }

    /// All targets, in the order of their ids.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Target>> {
        self.by_id.values()
    }

    /// Updates thread counts, ports and holders from one sample.
    pub(super) fn update(&mut self, sample: &Sample) {
        if sample.scans.threads {
            self.threads.clear();
            for thread in &sample.threads {
                if let Some(target) = self.by_tgid.get(&thread.tgid) {
                    *self.threads.entry(*target).or_default() += 1;
                }
            }
        }
        if sample.scans.files || sample.scans.focused_sockets {
            self.ports.clear();
            let place = |listener: &Listener| (listener.netns, listener.address.port());
            self.ports.extend(sample.listeners.iter().map(place));
        }
        if let Some(holders) = &sample.holders {
            self.holders.clear();
            for holder in holders {
                let of_inode = self.holders.entry(holder.inode).or_default();
                of_inode.push(holder.clone());
            }
        }
    }

    /// Whether a process outside this target holds this pipe or unix socket.
    pub(super) fn is_held_outside(&self, target: TargetId, inode: u64) -> bool {
        self.outside(target, inode, |_| true).next().is_some()
    }

    /// The processes outside this target that hold this end of a pipe or unix socket, for display: `rsyslogd (77)`.
    pub(super) fn held_by(
        &self,
        target: TargetId,
        inode: u64,
        end: impl Fn(&Holder) -> bool,
    ) -> Option<String> {
        let processes: BTreeMap<u32, &str> = self
            .outside(target, inode, end)
            .map(|holder| (holder.tgid, holder.name.as_str()))
            .collect();
        let named: Vec<String> = processes
            .iter()
            .take(NAMED_HOLDERS)
            .map(|(tgid, name)| format!("{} ({tgid})", text::bounded(name, 64)))
            .collect();
        match processes.len().saturating_sub(NAMED_HOLDERS) {
            _ if named.is_empty() => None,
            0 => Some(named.join(" and ")),
            more => Some(format!("{} and {more} more", named.join(", "))),
        }
    }

    fn outside(
        &self,
        target: TargetId,
        inode: u64,
        end: impl Fn(&Holder) -> bool,
    ) -> impl Iterator<Item = &Holder> {
        self.holders
            .get(&inode)
            .into_iter()
            .flatten()
            .filter(move |holder| end(holder) && self.of(holder.tgid) != Some(target))
    }

    /// Number of threads of the target at the last thread scan; at least 1.
    pub(crate) fn threads(&self, id: TargetId) -> u32 {
        self.threads.get(&id).copied().unwrap_or(1).max(1)
    }

    /// Whether a target listens on this port of this network namespace.
    pub(crate) fn listens(&self, netns: u32, port: u16) -> bool {
        self.ports.contains(&(netns, port))
    }
}
