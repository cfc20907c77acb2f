//! The live end: walks the kernel on a clock and makes samples.
//!
//! `schedule` decides what is walked when, within the CPU budget, and `pace` when to look at what need not be looked at
//! on every tick; `convert` turns records into plain data; `networks` and `system` read the counters that no iterator has,
//! `paths` what only /proc names, `logs` what suspicious services write of full queues; `closely` is the closer look while
//! a queue is suspicious, for which `peers` finds the other ends of connections and `titles` what processes say of
//! themselves; `report` and `voice` say how the watching itself goes. Nothing in here decides anything about queues.

mod census;
mod clock;
mod closely;
mod convert;
mod identity;
mod logs;
mod networks;
mod pace;
mod paths;
mod peers;
mod report;
mod schedule;
mod system;
mod titles;
mod voice;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use anyhow::Result;
use census::Census;
pub use clock::{cpu_time_ns, mono_ns, resident_bytes, unix_ns};
use closely::Closely;
#[doc(hidden)]
pub use convert::sample_of_records;
use identity::Identities;
use logs::Logs;
use networks::Networks;
use pace::Pace;
use paths::Paths;
pub use report::Others;
use report::Report;
use rustc_hash::FxHashSet;
pub use schedule::{Budget, Schedule, Spent, Tick};
use system::System;
use voice::Voice;

use crate::{
    diagnose::messages::Table,
    in_order::InOrder,
    kernel::glance::{Bare, Glance, Record, Watched},
    sample::{Files, Holder, Listening, Sample, Target, TargetId, Walks},
    target::{Discovery, Found, ListenerSeen, ProcessSeen, Spec},
    text::harmless,
};

/// How often processes are looked for: a new one is found within a second.
const DISCOVERY_NS: u64 = 500_000_000;
const MS: u64 = 1_000_000;
/// Parts of the budget that looks beside the tick may take, each.
const ASIDE_PART: f64 = 0.08;
/// While a queue is suspicious: more of it is for the profile then.
const ASIDE_PART_HOT: f64 = 0.05;
/// Who holds and listens where: of every file of the machine.
const HOLDERS: Pace = Pace::new(DISCOVERY_NS / 2, 5_000 * MS);
/// What threads wait for. While a queue is suspicious, on every base tick that can afford it.
const WAITS: Pace = Pace::new(250 * MS, 5_000 * MS);
/// Control groups, and the machine.
const SYSTEM: Pace = Pace::new(500 * MS, 5_000 * MS);
/// What processes say of themselves, while a queue is suspicious.
const TITLES: Pace = Pace::new(250 * MS, 5_000 * MS);
/// CPU time of all threads of the machine.
const CENSUS: Pace = Pace::new(1_000 * MS, 10_000 * MS);
/// Holders of the other ends of the targets' pipes and unix sockets that are told.
const MAX_HOLDERS: usize = 4096;

/// Makes samples of what the user named.
pub struct Collector {
    glance: Glance,
    discovery: Discovery,
    networks: Networks,
    schedule: Schedule,
    targets: Vec<Target>,
    processes: Vec<ProcessSeen>,
    /// Connections that the last walk over files saw.
    connections: usize,
    /// The look that last saw each socket, by its cookie as the kernel gave it.
    seen: InOrder<u64>,
    looks: u64,
    told_targets: bool,
    discovery_due_ns: u64,
    listeners: Vec<ListenerSeen>,
    /// Every process of the machine, in the order of their tgids.
    everyone: Vec<ProcessSeen>,
    ids: Identities,
    jiffy_ns: u64,
    system: System,
    census: Census,
    paths: Paths,
    logs: Logs,
    paces: Paces,
    /// Pipes and peers of unix sockets that targets hold, by inode: whose other holders are of interest.
    shared: FxHashSet<u64>,
    /// They are others than when the holders were last looked for.
    new_shared: bool,
    told_listening: Option<Vec<Listening>>,
    told_holders: Option<Vec<Holder>>,
    /// To be told with the next sample.
    new_listening: bool,
    new_holders: bool,
    /// Listeners per network namespace that no target holds.
    others: HashMap<u32, u32>,
    /// Network namespaces in which targets listen, each with the processes that do.
    places: BTreeSet<(u32, u32)>,
    /// CPU time of looks beside the tick: within the current one, and since the previous discovery, ns.
    aside_ns: u64,
    aside_total_ns: u64,
    /// CPU time of the walk over threads within the current tick, and of the profile, ns.
    threads_ns: u64,
    profile_ns: u64,
    closely: Closely,
    report: Report,
    voice: Voice,
}

/// When each of the looks beside the tick is due.
struct Paces {
    holders: Pace,
    waits: Pace,
    system: Pace,
    census: Pace,
    titles: Pace,
}

impl Collector {
    /// Watches what `specs` name.
    pub fn new(glance: Glance, specs: Vec<Spec>, budget: Budget) -> Self {
        let now_ns = mono_ns();
        Self {
            glance,
            discovery: Discovery::new(specs, std::process::id()),
            networks: Networks::default(),
            schedule: Schedule::new(budget, now_ns),
            targets: Vec::new(),
            processes: Vec::new(),
            connections: 0,
            seen: InOrder::default(),
            looks: 0,
            told_targets: false,
            discovery_due_ns: 0,
            listeners: Vec::new(),
            others: HashMap::new(),
            places: BTreeSet::new(),
            everyone: Vec::new(),
            ids: Identities::new(),
            jiffy_ns: clock::jiffy_ns(),
            system: System::default(),
            census: Census::default(),
            paths: Paths::default(),
            logs: Logs::new(None),
            paces: Paces {
                holders: HOLDERS,
                waits: WAITS,
                system: SYSTEM,
                census: CENSUS,
                titles: TITLES,
            },
            shared: FxHashSet::default(),
            new_shared: false,
            told_listening: None,
            told_holders: None,
            new_listening: false,
            new_holders: false,
            aside_ns: 0,
            aside_total_ns: 0,
            threads_ns: 0,
            profile_ns: 0,
            closely: Closely::default(),
            report: Report::new(now_ns),
            voice: Voice::default(),
        }
    }

    /// Reads the logs of suspicious targets for what this table knows.
    pub fn read_logs(&mut self, table: Option<Table>) {
        self.logs = Logs::new(table);
    }

    /// Looks for the targets now. Done by itself before a tick when it is due.
    pub fn discover(&mut self) -> Result<Found> {
        let mut processes = Vec::new();
        self.glance.walk_processes(&mut |record| {
            if let Record::Process(process) = record {
                processes.push(convert::process(process));
            }
        })?;
        processes.sort_unstable_by_key(|process| process.tgid);
        let now_ns = mono_ns();
        self.everyone = processes;
        if self.paces.holders.is_due(now_ns) {
            self.look_for_holders(now_ns)?;
        }
        let followed = self.closely.followed(now_ns, &self.everyone);
        let found = self
            .discovery
            .look(&self.everyone, &self.listeners, &followed);
        let mut watched: Vec<ProcessSeen> = found.processes.clone();
        watched.sort_unstable_by_key(|process| process.tgid);
        if watched != self.processes {
            self.glance.watch(&bound(&watched))?;
            self.processes = watched;
            // Sockets of a new process are not marked yet.
            self.schedule.all_now();
        }
        self.sort_listeners();
        if found.changed || !self.told_targets {
            self.targets.clone_from(&found.targets);
            self.told_targets = false;
            self.choose_processes()?;
        }
        self.voice.tell_unmatched(&found.unmatched);
        Ok(found)
    }

    /// Who listens where on this machine, and who holds the other ends of what targets hold.
    fn look_for_holders(&mut self, now_ns: u64) -> Result<()> {
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
        if self.closely.is_on() {
            self.look_around(now_ns)?;
        }
        Ok(())
    }

    /// Share of a core for each kind of look beside the tick.
    fn aside_share(&self) -> f64 {
        let part = if self.closely.is_on() {
            ASIDE_PART_HOT
        } else {
            ASIDE_PART
        };
        self.schedule.share() * part
    }

    /// Sorts all listeners: where targets listen, and how many there are besides: their arrivals are in the same
    /// counters.
    fn sort_listeners(&mut self) {
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

    /// When the next tick is due, and what it walks.
    pub fn next_tick(&mut self) -> Tick {
        self.schedule.next(mono_ns())
    }

    /// Makes the sample of one tick.
    pub fn tick(&mut self, tick: Tick, mut others: Others) -> Result<Sample> {
        let mut sample = Sample {
            mono_ns: mono_ns(),
            unix_ns: unix_ns(),
            ..Sample::default()
        };
        if sample.mono_ns >= self.discovery_due_ns {
            self.discovery_due_ns = sample.mono_ns + DISCOVERY_NS;
            let before_ns = cpu_time_ns();
            self.discover()?;
            self.spent_aside(before_ns);
            self.schedule
                .discovered(std::mem::take(&mut self.aside_total_ns), DISCOVERY_NS);
        }
        self.walk(tick, &mut sample)?;
        if tick.profile {
            self.walk_profile(&mut sample)?;
        }
        if tick.base {
            self.look_aside(tick, &mut sample)?;
        }
        self.tell_peers(&mut sample);
        if !self.told_targets {
            self.told_targets = true;
            sample.targets = Some(self.targets.clone());
        }
        sample.notices = self.voice.take();
        sample.notices.append(&mut others.notices);
        self.report.ticked();
        if self.report.is_due(sample.mono_ns) {
            let watched = (self.targets.len() as u32, self.processes.len() as u32);
            let report = self
                .report
                .make(sample.mono_ns, watched, &self.schedule, &others);
            sample.agent = Some(report);
        }
        Ok(sample)
    }

    fn spent_aside(&mut self, before_ns: u64) -> u64 {
        let cost = cpu_time_ns().saturating_sub(before_ns);
        self.aside_ns += cost;
        self.aside_total_ns += cost;
        cost
    }

    /// What need not be looked at on every tick, as far as it is due.
    fn look_aside(&mut self, tick: Tick, sample: &mut Sample) -> Result<()> {
        let now_ns = sample.mono_ns;
        let share = self.aside_share();
        let is_hurried = self.closely.is_on() && self.paces.holders.is_due(now_ns);
        if tick.complete && self.new_shared || is_hurried {
            let before_ns = cpu_time_ns();
            self.look_for_holders(now_ns)?;
            self.spent_aside(before_ns);
        }
        if self.closely.is_on() && self.paces.titles.is_due(now_ns) {
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

    fn walk(&mut self, tick: Tick, sample: &mut Sample) -> Result<()> {
        let mut records: u64 = 0;
        let (ids, jiffy_ns) = (self.ids, self.jiffy_ns);
        let mut datagrams = BTreeMap::new();
        let mut unix = BTreeMap::new();
        let mut rings = BTreeMap::new();
        let mut listeners = BTreeMap::new();
        self.looks += 1;
        let look = self.looks;
        if tick.files {
            // As many as last time, give or take: growing by doubling would copy them all.
            sample.connections.reserve(self.connections + 64);
        }
        if tick.files || tick.marked {
            // Before the listeners, so that what comes in between is seen waiting now and counted at the next tick.
            sample.networks = self.networks.read(&self.places, |tgid| {
                let held = self.processes.iter().find(|process| process.tgid == tgid);
                held.map(|process| process.pid)
            });
            for network in &mut sample.networks {
                network.others = self.others.get(&network.netns).copied().unwrap_or(0);
            }
            let mut visit = |record: Record<'_>| {
                records += 1;
                match record {
                    // A socket that several processes hold is met once for each.
                    Record::Socket(socket) if is_first(&mut self.seen, socket.cookie, look) => {
                        let connection = convert::connection(socket, ids, jiffy_ns);
                        sample.connections.push(connection);
                    }
                    Record::Listener(listener, stamps) => {
                        listeners.insert(listener.cookie, convert::listener(listener, stamps, ids));
                    }
                    Record::Udp(socket) => {
                        datagrams.insert(socket.cookie, convert::datagrams(socket, ids));
                    }
                    Record::Unix(socket) => {
                        if let Some(socket) = convert::unix(socket, ids) {
                            unix.insert(socket.inode, socket);
                        }
                    }
                    Record::Pipe(pipe) => sample.pipes.push(convert::pipe(pipe)),
                    Record::Ring(ring) => {
                        rings.insert(ring.id, convert::ring(ring, ids));
                    }
                    _ => {}
                }
            };
            if tick.files {
                self.glance.walk_files(&mut visit)?;
                self.seen.retain(|seen| *seen == look);
                sample.walks.files = true;
                sample.datagrams = datagrams.into_values().collect();
                sample.unix = unix.into_values().collect();
                sample.rings = rings.into_values().collect();
                self.glance.open_files(|tgid, open, limit| {
                    sample.files.push(Files { tgid, open, limit });
                });
                self.paths.resolve_pipes(&mut sample.pipes, &self.processes);
                self.remember_shared(sample);
                self.remember_ends(sample)?;
            } else {
                sample.walks.marked = self.glance.walk_marked(&mut visit)?;
            }
        }
        if tick.threads {
            let before_ns = cpu_time_ns();
            self.glance.walk_threads(&mut |record| {
                records += 1;
                if let Record::Thread(thread) = record {
                    sample.threads.push(convert::thread(thread));
                }
            })?;
            sample.walks.threads = true;
            self.threads_ns = cpu_time_ns().saturating_sub(before_ns);
        }
        sample.listeners = listeners.into_values().collect();
        if tick.files {
            self.connections = sample.connections.len();
        }
        self.report.walked(records);
        Ok(())
    }

    /// Which pipes and sockets have other ends whose holders are of interest; new ones are looked for soon.
    fn remember_shared(&mut self, sample: &Sample) {
        let pipes = sample.pipes.iter().map(|pipe| pipe.inode);
        let peers = sample.unix.iter().filter_map(|socket| socket.peer);
        let shared: FxHashSet<u64> = pipes.chain(peers).collect();
        if shared != self.shared {
            self.shared = shared;
            self.new_shared = true;
            self.paces.holders.hurry(sample.mono_ns, DISCOVERY_NS);
        }
    }

    /// What the tick cost, the pipeline and all outputs included, and whose queues are suspicious.
    pub fn spent(&mut self, tick: Tick, cpu_ns: u64, hot: &BTreeSet<TargetId>) -> Result<()> {
        let aside_ns = std::mem::take(&mut self.aside_ns);
        let spent = Spent {
            cpu_ns: cpu_ns.saturating_sub(aside_ns),
            threads_ns: std::mem::take(&mut self.threads_ns),
            profile_ns: std::mem::take(&mut self.profile_ns),
        };
        self.schedule.spent(tick, spent);
        let now_ns = mono_ns();
        self.schedule.measured(now_ns, cpu_time_ns());
        self.set_hot(now_ns, hot)?;
        self.logs.set_hot(hot, now_ns);
        if self.closely.is_on() {
            self.paces
                .waits
                .hurry(now_ns, self.schedule.budget().interval_ns);
        }
        self.voice.tell_pace(&self.schedule, now_ns);
        Ok(())
    }

    /// See [`Glance::bare`].
    pub fn bare(&self) -> Result<Bare> {
        self.glance.bare(&bound(&self.processes))
    }

    /// The loaded iterators, for what is not a tick.
    pub fn glance(&mut self) -> &mut Glance {
        &mut self.glance
    }
}

/// A tick that walks everything.
pub fn complete_tick() -> Tick {
    Tick {
        at_ns: 0,
        files: true,
        marked: true,
        threads: true,
        profile: true,
        base: true,
        complete: true,
    }
}

/// What the iterators need to know of the processes that they walk.
fn bound(processes: &[ProcessSeen]) -> Vec<Watched> {
    processes
        .iter()
        .map(|process| Watched {
            tgid: process.tgid,
            pid: process.pid,
            start_ns: process.start_ns,
        })
        .collect()
}

/// Whether this look has not met this socket before.
fn is_first(seen: &mut InOrder<u64>, cookie: u64, look: u64) -> bool {
    match seen.next(cookie) {
        Some(last) => std::mem::replace(last, look) != look,
        None => {
            seen.insert(cookie, look);
            true
        }
    }
}

impl From<Tick> for Walks {
    fn from(tick: Tick) -> Self {
        Self {
            files: tick.files,
            marked: tick.marked,
            threads: tick.threads,
            profile: tick.profile,
            ..Self::default()
        }
    }
}
