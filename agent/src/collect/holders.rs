//! The processes on this machine, watched or not, that hold listeners or the other ends of the targets' pipes and unix sockets.

use std::collections::BTreeSet;

use anyhow::Result;
use rustc_hash::FxHashSet;

use super::{ObjectIds, convert, notices::Notices, peers::PeerInfo, processes::Processes};
use crate::{
    kernel::scanner::{Record, Scanner},
    sample::{Holder, Listening, Sample},
    target::ListenerInfo,
};

/// Maximum number of holders of pipes and unix sockets in a sample.
const MAX_HOLDERS: usize = 4096;

#[derive(Default)]
pub(super) struct Holders {
    listeners: Vec<ListenerInfo>,
    listening: LatestValue<Vec<Listening>>,
    holders: LatestValue<Vec<Holder>>,
    /// Inodes of the targets' pipes, and of the peers of their unix sockets.
    shared: FxHashSet<u64>,
    /// `shared` has changed since the last scan.
    has_new_shared: bool,
}

impl Holders {
    /// Scans the open files of all processes. Returns the connections that [`Scanner::request_peers`] asked for.
    pub(super) fn scan(
        &mut self,
        scanner: &mut Scanner,
        ids: ObjectIds,
        processes: &Processes,
        notices: &mut Notices,
    ) -> Result<Vec<PeerInfo>> {
        let mut listeners = Vec::new();
        let mut holders = Vec::new();
        let mut connections = Vec::new();
        let mut left_out = 0;
        scanner.scan_holders(&mut |record| match record {
            Record::Listener(listener, _) => listeners.push(convert::listener_info(listener, ids)),
            Record::Peer(peer) => connections.push(convert::peer_info(peer, ids)),
            Record::Holder(holder) if self.shared.contains(&holder.inode) => {
                if holders.len() < MAX_HOLDERS {
                    let name = processes.name(holder.header.tgid);
                    holders.push(convert::holder(holder, name));
                } else {
                    left_out += 1;
                }
            }
            _ => {}
        })?;
        if left_out > 0 {
            notices.report_once("too_many_holders", || {
                format!(
                    "limit of {MAX_HOLDERS} holders of pipes and unix sockets reached: {left_out} are not named"
                )
            });
        }
        let listening = listeners.iter().map(|listener| Listening {
            netns: listener.netns,
            address: listener.address,
            tgid: listener.tgid,
            name: processes.name(listener.tgid),
        });
        let mut listening: Vec<Listening> = listening.collect();
        listening.sort_unstable();
        holders.sort_unstable();
        self.listening.set(listening);
        self.holders.set(holders);
        self.listeners = listeners;
        self.has_new_shared = false;
        Ok(connections)
    }

    /// Updates the pipes and unix sockets that targets hold; returns whether they have changed.
    pub(super) fn set_shared(&mut self, sample: &Sample) -> bool {
        let pipes = sample.pipes.iter().map(|pipe| pipe.inode);
        let peers = sample.unix.iter().filter_map(|socket| socket.peer);
        let shared: FxHashSet<u64> = pipes.chain(peers).collect();
        let changed = shared != self.shared;
        if changed {
            self.shared = shared;
            self.has_new_shared = true;
        }
        changed
    }

    /// Whether targets hold pipes or unix sockets whose other holders are not known yet.
    pub(super) fn has_new_shared(&self) -> bool {
        self.has_new_shared
    }

    /// All TCP listeners, once per process that holds each.
    pub(super) fn listeners(&self) -> &[ListenerInfo] {
        &self.listeners
    }

    /// Network namespace and port of all TCP listeners.
    pub(super) fn listening_ports(&self) -> BTreeSet<(u32, u16)> {
        let ports = self
            .listeners
            .iter()
            .map(|listener| (listener.netns, listener.address.port()));
        ports.collect()
    }

    /// Holders of the pipes and unix sockets that targets share.
    pub(super) fn holders(&self) -> &[Holder] {
        self.holders.value.as_deref().unwrap_or_default()
    }

    /// Puts into the sample what has changed since the last one.
    pub(super) fn report(&mut self, sample: &mut Sample) {
        sample.listening = self.listening.take_change();
        sample.holders = self.holders.take_change();
    }
}

/// A value that is reported whenever it changes.
#[derive(Default)]
struct LatestValue<T> {
    value: Option<T>,
    changed: bool,
}

impl<T: Clone + PartialEq> LatestValue<T> {
    fn set(&mut self, value: T) {
        self.changed |= self.value.as_ref() != Some(&value);
        self.value = Some(value);
    }

    fn take_change(&mut self) -> Option<T> {
        std::mem::take(&mut self.changed)
            .then(|| self.value.clone())
            .flatten()
    }
}
