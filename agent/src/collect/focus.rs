//! What is looked at closely while a queue is suspicious: the threads of its service and of those around it, who holds the
//! other ends of their connections, and what they say of themselves.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use rustc_hash::FxHashSet;

use super::{
    Collector, MS, convert, cpu_time_ns,
    peers::{self, PeerSeen, Wanted},
    titles::{self, Titles},
};
use crate::{
    kernel::glance::Record,
    sample::{Peer, Sample, TargetId},
    target::{End, MAX_FOLLOWED, Nearby, ProcessSeen, around, ends},
};

/// A target counts as suspicious for so long after that was last said: a queue at the edge does not switch the closer look on
/// and off.
const FOCUS_HOLD_NS: u64 = 1_000 * MS;
/// A process is followed for so long after it was last wanted.
const LINGER_NS: u64 = 10_000 * MS;
/// When somebody new is looked at closely, the other ends of its connections are looked for within this time.
const PEERS_FIRST_NS: u64 = 250 * MS;
/// And after that about so often.
const PEERS_NS: u64 = 1_000 * MS;

#[derive(Default)]
pub(super) struct Focus {
    /// All targets, whatever their queues say.
    all: bool,
    /// Suspicious targets, and when each was last said to be.
    focused: BTreeMap<TargetId, u64>,
    /// Processes whose threads are looked at: those of suspicious targets, of followed ones, and whoever else that is
    /// watched stands around.
    processes: FxHashSet<u32>,
    /// Of these: watched anyway, and reached from a suspicious one.
    reached: BTreeSet<u32>,
    followed: BTreeMap<u32, Followed>,
    ends: Vec<(u32, End)>,
    wanted: Vec<Wanted>,
    peers: Vec<Peer>,
    /// To be told with the next sample.
    new_peers: bool,
    /// Processes of whose connections `wanted` was made, and those for whom it was looked for.
    wanted_of: FxHashSet<u32>,
    looked_for: FxHashSet<u32>,
    titles: Titles,
}

#[derive(Clone, Copy, Debug)]
struct Followed {
    start_ns: u64,
    last_ns: u64,
}

impl Focus {
    pub(super) fn is_on(&self) -> bool {
        !self.processes.is_empty()
    }

    /// Processes that are watched without being asked for, as far as they live and were wanted of late.
    pub(super) fn followed(&mut self, now_ns: u64, everyone: &[ProcessSeen]) -> BTreeSet<u32> {
        self.followed.retain(|tgid, followed| {
            let found = everyone.binary_search_by_key(tgid, |process| process.tgid);
            let lives = found.is_ok_and(|index| everyone[index].start_ns == followed.start_ns);
            lives && now_ns < followed.last_ns + LINGER_NS
        });
        self.followed.keys().copied().collect()
    }

    /// Follows `wanted`; answers whether any of them is new. Where room is short, whoever is wanted no more makes it.
    fn follow(&mut self, now_ns: u64, wanted: impl Iterator<Item = (u32, u64)>) -> bool {
        let mut is_new = false;
        for (tgid, start_ns) in wanted {
            let followed = Followed {
                start_ns,
                last_ns: now_ns,
            };
            is_new |= self.followed.insert(tgid, followed).is_none();
        }
        while self.followed.len() > MAX_FOLLOWED {
            let oldest = self.followed.iter().min_by_key(|(_, at)| at.last_ns);
            let Some((oldest, _)) = oldest.map(|(tgid, at)| (*tgid, *at)) else {
                break;
            };
            self.followed.remove(&oldest);
        }
        is_new
    }
}

impl Collector {
    /// Looks at all targets closely, or again at those alone that have a suspicious queue.
    pub fn profile_all(&mut self, all: bool) {
        self.focus.all = all;
    }

    /// Whose queues are suspicious now.
    pub(super) fn set_focused(&mut self, now_ns: u64, focused: &BTreeSet<TargetId>) -> Result<()> {
        let keep_ns = FOCUS_HOLD_NS;
        let focus = &mut self.focus;
        let all = self
            .targets
            .iter()
            .filter(|target| focus.all && !target.followed)
            .map(|target| target.id);
        let said = focused.iter().copied().chain(all);
        focus.focused.extend(said.map(|target| (target, now_ns)));
        focus
            .focused
            .retain(|_, said_ns| now_ns < *said_ns + keep_ns);
        if focus.focused.is_empty() && focus.is_on() {
            focus.reached.clear();
            focus.wanted.clear();
            focus.ends.clear();
            focus.peers.clear();
            focus.looked_for.clear();
            focus.titles.forget();
            self.glance.want(&BTreeSet::new())?;
        }
        self.schedule.set_focused(!self.focus.focused.is_empty());
        self.choose_processes()
    }

    /// Settles whose threads are looked at.
    pub(super) fn choose_processes(&mut self) -> Result<()> {
        let focus = &mut self.focus;
        focus.processes.clear();
        if !focus.focused.is_empty() {
            let close = self
                .targets
                .iter()
                .filter(|target| target.followed || focus.focused.contains_key(&target.id))
                .flat_map(|target| &target.tgids)
                .chain(&focus.reached);
            focus.processes.extend(close);
        }
        let tasks = self.census.threads().max(self.everyone.len());
        let processes = &self.focus.processes;
        self.glance
            .set_focused(tasks, |tgid| processes.contains(&tgid))
    }

    /// What the threads of these processes wait for.
    pub(super) fn walk_profile(&mut self, sample: &mut Sample) -> Result<()> {
        if !self.focus.is_on() {
            return Ok(());
        }
        let before_ns = cpu_time_ns();
        self.glance.walk_profile(&mut |record| {
            if let Record::Wait(wait) = record {
                sample.profile.push(convert::wait(wait));
            }
        })?;
        self.paths
            .resolve_profile(&mut sample.profile, &self.processes, sample.mono_ns);
        sample.walks.profile = true;
        self.report.walked(sample.profile.len() as u64);
        self.profile_ns = cpu_time_ns().saturating_sub(before_ns);
        Ok(())
    }

    /// A walk over files has shown what the targets hold: where that leads to, and whose other ends are to be looked for.
    pub(super) fn remember_ends(&mut self, sample: &Sample) -> Result<()> {
        if self.focus.focused.is_empty() {
            return Ok(());
        }
        let served: FxHashSet<(u32, u16)> = self
            .listeners
            .iter()
            .map(|listener| (listener.netns, listener.address.port()))
            .collect();
        let is_served = |netns, port| served.contains(&(netns, port));
        let focus = &mut self.focus;
        focus.ends = ends(&sample.connections, &sample.pipes, &sample.unix, is_served);
        let is_close = |tgid| focus.processes.contains(&tgid);
        let (wanted, left_out) = peers::wanted(&sample.connections, is_close, is_served);
        focus.wanted = wanted;
        focus.wanted_of.clone_from(&focus.processes);
        if left_out > 0 {
            self.voice.tell_once("too_many_peers", || {
                format!("the other ends of {left_out} connections are not looked for: there are more than {}", tailback_ebpf::MAX_WANTED)
            });
        }
        let is_new = !focus.processes.is_subset(&focus.looked_for);
        let holders = &mut self.paces.holders;
        if is_new {
            holders.demand(sample.mono_ns, PEERS_FIRST_NS);
        } else {
            holders.hurry(sample.mono_ns, PEERS_NS);
        }
        self.look_around(sample.mono_ns)
    }

    /// What the walk over holders is to be asked for.
    pub(super) fn ask_for_peers(&mut self) -> Result<()> {
        let keys = peers::keys(&self.focus.wanted);
        self.glance.want(&keys).map(drop)
    }

    /// What it answered.
    pub(super) fn take_peers(&mut self, seen: &[PeerSeen], name: impl Fn(u32) -> String) {
        let focus = &mut self.focus;
        if focus.focused.is_empty() {
            return;
        }
        let (peers, left_out) = peers::peers(&focus.wanted, seen, name);
        focus.peers = peers;
        focus.new_peers = true;
        focus.looked_for.clone_from(&focus.wanted_of);
        if left_out > 0 {
            self.voice.tell_once("too_many_peer_holders", || {
                format!("{left_out} holders of other ends of connections are not told")
            });
        }
    }

    /// Finds who stands around the suspicious targets, and has those watched who are not yet.
    pub(super) fn look_around(&mut self, now_ns: u64) -> Result<()> {
        let (mut seeds, mut asked) = (BTreeSet::new(), BTreeSet::new());
        for target in self.targets.iter().filter(|target| !target.followed) {
            asked.extend(target.tgids.iter().copied());
            if self.focus.focused.contains_key(&target.id) {
                seeds.extend(target.tgids.iter().copied());
            }
        }
        let holders = self.told_holders.as_deref().unwrap_or_default();
        let nearby = Nearby {
            processes: &self.everyone,
            ends: &self.focus.ends,
            peers: &self.focus.peers,
            holders,
            listeners: &self.listeners,
            own_pid: std::process::id(),
        };
        let discovery = &mut self.discovery;
        let found = around(&seeds, &asked, &nearby, &mut |a, b| {
            discovery.same_program(a, b)
        });
        if found.left_out > 0 {
            self.voice.tell_once("too_many_followed", || {
                let count = found.left_out;
                format!("{count} processes around the targets are not followed: there are more than {MAX_FOLLOWED}")
            });
        }
        let everyone = &self.everyone;
        let beyond = found.reached.difference(&asked).filter_map(|tgid| {
            let found = everyone.binary_search_by_key(tgid, |process| process.tgid);
            Some((*tgid, everyone[found.ok()?].start_ns))
        });
        if self.focus.follow(now_ns, beyond) {
            self.discovery_due_ns = 0;
        }
        self.focus.reached = found.reached.intersection(&asked).copied().collect();
        self.choose_processes()
    }

    /// Holders of other ends, if they were looked for since the last sample.
    pub(super) fn tell_peers(&mut self, sample: &mut Sample) {
        if std::mem::take(&mut self.focus.new_peers) {
            sample.peers = Some(self.focus.peers.clone());
        }
    }

    /// What the processes say of themselves.
    pub(super) fn look_at_titles(&mut self, sample: &mut Sample) {
        let focus = &mut self.focus;
        let close = self
            .processes
            .iter()
            .filter(|process| focus.processes.contains(&process.tgid));
        let close: Vec<&ProcessSeen> = close.collect();
        sample.titles = focus.titles.look(&close, sample.mono_ns, titles::read);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000 * MS;

    fn process(tgid: u32, start_ns: u64) -> ProcessSeen {
        ProcessSeen {
            tgid,
            pid: tgid,
            parent: 1,
            start_ns,
            exec_id: 1,
            kernel: false,
            comm: String::new(),
        }
    }

    #[test]
    fn whoever_is_wanted_no_more_is_followed_for_ten_seconds() {
        let everyone = [process(7, 1), process(8, 1)];
        let mut focus = Focus::default();
        assert!(focus.follow(SECOND, [(7, 1), (8, 1)].into_iter()));
        assert!(!focus.follow(5 * SECOND, [(8, 1)].into_iter()));
        assert_eq!(focus.followed(10 * SECOND, &everyone), [7, 8].into());
        assert_eq!(focus.followed(11 * SECOND, &everyone), [8].into());
        assert!(focus.followed(15 * SECOND, &everyone).is_empty());
    }

    #[test]
    fn a_pid_that_was_given_again_is_not_followed() {
        let mut focus = Focus::default();
        focus.follow(SECOND, [(7, 1)].into_iter());
        assert!(focus.followed(SECOND, &[process(7, 2)]).is_empty());
    }

    #[test]
    fn where_room_is_short_whoever_is_wanted_no_more_makes_it() {
        let mut focus = Focus::default();
        let some = |from: u32| (from..from + MAX_FOLLOWED as u32).map(|tgid| (tgid, 1));
        focus.follow(SECOND, some(1));
        focus.follow(2 * SECOND, some(40));
        let kept: Vec<u32> = focus.followed.keys().copied().collect();
        assert_eq!(kept, some(40).map(|(tgid, _)| tgid).collect::<Vec<_>>());
    }
}
