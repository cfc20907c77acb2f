//! What need not be looked at on every tick, each at a pace of its own that keeps within a part of the budget: who listens
//! where and who holds the other ends of what targets hold, what threads wait for, control groups and the machine, the
//! machine's CPU time, what processes say of themselves, logs.

use std::collections::HashSet;

use anyhow::Result;
use rustc_hash::FxHashSet;

use super::{
    Collector, DISCOVERY_NS, MS, convert, cpu_time_ns, paths, poll_interval::PollInterval,
    schedule::Tick,
};
use crate::{
    kernel::glance::Record,
    sample::{Listening, Sample},
    text::harmless,
};

/// Parts of the budget that looks beside the tick may take, each.
const ASIDE_PART: f64 = 0.08;
/// While a queue is suspicious: more of it is for the profile then.
const ASIDE_PART_HOT: f64 = 0.05;
/// Who holds and listens where: of every file of the machine.
const HOLDERS: PollInterval = PollInterval::new(DISCOVERY_NS / 2, 5_000 * MS);
/// What threads wait for. While a queue is suspicious, on every base tick that can afford it.
const WAITS: PollInterval = PollInterval::new(250 * MS, 5_000 * MS);
/// Control groups, and the machine.
const SYSTEM: PollInterval = PollInterval::new(500 * MS, 5_000 * MS);
/// What processes say of themselves, while a queue is suspicious.
const TITLES: PollInterval = PollInterval::new(250 * MS, 5_000 * MS);
/// CPU time of all threads of the machine.
const CENSUS: PollInterval = PollInterval::new(1_000 * MS, 10_000 * MS);
/// Holders of the other ends of the targets' pipes and unix sockets that are told.
const MAX_HOLDERS: usize = 4096;

/// When each of the looks beside the tick is due.
pub(super) struct PollIntervals {
    pub(super) holders: PollInterval,
    pub(super) waits: PollInterval,
    pub(super) system: PollInterval,
    pub(super) census: PollInterval,
    pub(super) titles: PollInterval,
}

impl Default for PollIntervals {
    fn default() -> Self {
        Self {
            holders: HOLDERS,
            waits: WAITS,
            system: SYSTEM,
            census: CENSUS,
            titles: TITLES,
        }
    }
}

impl Collector {
    /// Who listens where on this machine, and who holds the other ends of what targets hold.
    pub(super) fn look_for_holders(&mut self, now_ns: u64) -> Result<()> {
        let before_ns = cpu_time_ns();
        self.ask_for_peers()?;
        let everyone = std::mem::take(&mut self.everyone);
        let name = |tgid: u32| {
            let found = everyone.binary_search_by_key(&tgid, |process| process.tgid);
            found.map_or_else(|_| String::new(), |index| harmless(&everyone[index].comm))
        };
        let (ids, shared) = (self.ids, &self.shared);
        let mut listeners = Vec::new();
        let mut holders = Vec::new();
        let mut connections = Vec::new();
        let mut left_out = 0;
        self.glance.walk_holders(&mut |record| match record {
            Record::Listener(listener, _) => listeners.push(convert::listener_seen(listener, ids)),
            Record::Peer(peer) => connections.push(convert::peer_seen(peer, ids)),
            Record::Holder(holder) if shared.contains(&holder.inode) => {
                if holders.len() < MAX_HOLDERS {
                    holders.push(convert::holder(holder, name(holder.header.tgid)));
                } else {
                    left_out += 1;
                }
            }
            _ => {}
        })?;
        if left_out > 0 {
            self.voice.tell_once("too_many_holders", || {
                format!("{left_out} holders of pipes and unix sockets are not named: there are more than {MAX_HOLDERS}")
            });
        }
        let mut listening: Vec<Listening> = listeners
            .iter()
            .map(|listener| Listening {
                netns: listener.netns,
                address: listener.address,
                tgid: listener.tgid,
                name: name(listener.tgid),
            })
            .collect();
        listening.sort_unstable();
        holders.sort_unstable();
        self.take_peers(&connections, name);
        self.everyone = everyone;
        self.new_listening |= self.told_listening.as_ref() != Some(&listening);
        self.new_holders |= self.told_holders.as_ref() != Some(&holders);
        self.told_listening = Some(listening);
        self.told_holders = Some(holders);
        self.listeners = listeners;
        self.new_shared = false;
        let cost = cpu_time_ns().saturating_sub(before_ns);
        self.paces.holders.looked(now_ns, cost, self.aside_share());
        if self.focus.is_on() {
            self.look_around(now_ns)?;
        }
        Ok(())
    }

    /// Share of a core for each kind of look beside the tick.
    fn aside_share(&self) -> f64 {
        let part = if self.focus.is_on() {
            ASIDE_PART_HOT
        } else {
            ASIDE_PART
        };
        self.schedule.share() * part
    }

    /// Sorts all listeners: where targets listen, and how many there are besides: their arrivals are in the same
    /// counters.
    pub(super) fn sort_listeners(&mut self) {
        let ours: HashSet<u32> = self.processes.iter().map(|process| process.tgid).collect();
        let held: HashSet<u64> = self
            .listeners
            .iter()
            .filter(|listener| ours.contains(&listener.tgid))
            .map(|listener| listener.cookie)
            .collect();
        let ours = self
            .listeners
            .iter()
            .filter(|listener| ours.contains(&listener.tgid));
        self.places = ours
            .map(|listener| (listener.netns, listener.tgid))
            .collect();
        let mut seen = HashSet::new();
        self.others.clear();
        for listener in &self.listeners {
            if !held.contains(&listener.cookie) && seen.insert(listener.cookie) {
                *self.others.entry(listener.netns).or_default() += 1;
            }
        }
    }

    pub(super) fn spent_aside(&mut self, before_ns: u64) -> u64 {
        let cost = cpu_time_ns().saturating_sub(before_ns);
        self.aside_ns += cost;
        self.aside_total_ns += cost;
        cost
    }

    /// What need not be looked at on every tick, as far as it is due.
    pub(super) fn look_aside(&mut self, tick: Tick, sample: &mut Sample) -> Result<()> {
        let now_ns = sample.mono_ns;
        let share = self.aside_share();
        let is_hurried = self.focus.is_on() && self.paces.holders.is_due(now_ns);
        if tick.complete && self.new_shared || is_hurried {
            let before_ns = cpu_time_ns();
            self.look_for_holders(now_ns)?;
            self.spent_aside(before_ns);
        }
        if self.focus.is_on() && self.paces.titles.is_due(now_ns) {
            let before_ns = cpu_time_ns();
            self.look_at_titles(sample);
            let cost = self.spent_aside(before_ns);
            self.paces.titles.looked(now_ns, cost, share);
        }
        if tick.complete || self.paces.waits.is_due(now_ns) {
            let before_ns = cpu_time_ns();
            self.glance.walk_waits(&mut |record| {
                if let Record::Wait(wait) = record {
                    sample.waits.push(convert::wait(wait));
                }
            })?;
            self.paths.resolve_waits(&mut sample.waits, &self.processes);
            sample.walks.waits = true;
            let cost = self.spent_aside(before_ns);
            self.paces.waits.looked(now_ns, cost, share);
        }
        if tick.complete || self.paces.system.is_due(now_ns) {
            let before_ns = cpu_time_ns();
            let (cgroups, machine) = self.system.read(&self.targets);
            (sample.cgroups, sample.machine) = (cgroups, Some(machine));
            let left_out = self.system.left_out();
            if left_out > 0 {
                self.voice.tell_once("too_many_cgroups", || {
                    format!("{left_out} control groups are not read: their quotas, memory and pressure are unknown")
                });
            }
            sample.walks.system = true;
            let cost = self.spent_aside(before_ns);
            self.paces.system.looked(now_ns, cost, share);
        }
        if tick.complete || self.paces.census.is_due(now_ns) {
            let before_ns = cpu_time_ns();
            let census = &mut self.census;
            self.glance.walk_census(&mut |record| {
                if let Record::Cpu(cpu) = record {
                    census.add(cpu);
                }
            })?;
            let everyone = &self.everyone;
            sample.neighbours = census.finish(|tgid| {
                let found = everyone
                    .binary_search_by_key(&tgid, |process| process.tgid)
                    .ok()?;
                let process = &everyone[found];
                Some((harmless(&process.comm), paths::cgroup(process.pid)))
            });
            sample.walks.neighbours = true;
            let cost = self.spent_aside(before_ns);
            self.paces.census.looked(now_ns, cost, share);
        }
        if self.logs.is_due(now_ns) {
            let before_ns = cpu_time_ns();
            let (targets, processes) = (&self.targets, &self.processes);
            sample.messages = self
                .logs
                .look(now_ns, share, targets, processes, &mut self.voice);
            self.spent_aside(before_ns);
        }
        if std::mem::take(&mut self.new_listening) {
            sample.listening.clone_from(&self.told_listening);
        }
        if std::mem::take(&mut self.new_holders) {
            sample.holders.clone_from(&self.told_holders);
        }
        Ok(())
    }

    /// Which pipes and sockets have other ends whose holders are of interest; new ones are looked for soon.
    pub(super) fn remember_shared(&mut self, sample: &Sample) {
        let pipes = sample.pipes.iter().map(|pipe| pipe.inode);
        let peers = sample.unix.iter().filter_map(|socket| socket.peer);
        let shared: FxHashSet<u64> = pipes.chain(peers).collect();
        if shared != self.shared {
            self.shared = shared;
            self.new_shared = true;
            self.paces.holders.hurry(sample.mono_ns, DISCOVERY_NS);
        }
    }
}
