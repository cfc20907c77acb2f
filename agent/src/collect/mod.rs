//! The live end: walks the kernel on a clock and makes samples.
//!
//! `schedule` decides what is walked when, within the CPU budget; `background_scans` looks at what need not be looked at on every tick,
//! and `poll_interval` says when; `convert` turns records into plain data; `networks` and `system` read the counters that no iterator has,
//! `paths` what only /proc names, `logs` what suspicious services write of full queues; `focus` is the closer look while
//! a queue is suspicious, for which `peers` finds the other ends of connections and `titles` what processes say of
//! themselves; `report` and `notices` say how the watching itself goes. Nothing in here decides anything about queues.

mod background_scans;
mod clock;
mod convert;
mod cpu_accounting;
mod cpu_budget;
mod focus;
mod identity;
mod logs;
mod networks;
mod notices;
mod paths;
mod peers;
mod poll_interval;
mod report;
mod schedule;
mod system;
mod titles;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::Result;
use background_scans::PollIntervals;
pub use clock::{
    boot_ns, cpu_time_ns, has_answered, mono_ns, process_cpu_ns, resident_bytes, unasked_cpu_ns,
    unix_ns,
};
#[doc(hidden)]
pub use convert::sample_of_records;
use cpu_accounting::CpuAccounting;
use focus::Focus;
use identity::Identities;
use logs::Logs;
use networks::Networks;
use notices::Voice;
use paths::Paths;
pub use report::Others;
use report::Report;
use rustc_hash::FxHashSet;
pub use schedule::{Budget, Schedule, Spent, Tick};
use system::System;

use crate::{
    in_order::InOrder,
    kernel::glance::{Bare, Glance, Record, Watched},
    messages::Table,
    sample::{Files, Holder, Listening, Sample, Target, TargetId, Walks},
    target::{Discovery, Found, ListenerSeen, ProcessSeen, Spec},
};

/// How often processes are looked for: a new one is found within a second.
const DISCOVERY_NS: u64 = 500_000_000;
const MS: u64 = 1_000_000;

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
    census: CpuAccounting,
    paths: Paths,
    logs: Logs,
    paces: PollIntervals,
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
    focus: Focus,
    report: Report,
    voice: Voice,
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
            census: CpuAccounting::default(),
            paths: Paths::default(),
            logs: Logs::new(None),
            paces: PollIntervals::default(),
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
            focus: Focus::default(),
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
        let followed = self.focus.followed(now_ns, &self.everyone);
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

    /// When the next tick is due, and what it walks.
    pub fn next_tick(&mut self) -> Tick {
        self.schedule.next(mono_ns())
    }

    /// Makes the sample of one tick.
    pub fn tick(&mut self, tick: Tick, mut others: Others) -> Result<Sample> {
        let begun_ns = mono_ns();
        if begun_ns >= self.discovery_due_ns {
            self.discovery_due_ns = begun_ns + DISCOVERY_NS;
            let before_ns = cpu_time_ns();
            self.discover()?;
            self.spent_aside(before_ns);
            self.schedule
                .discovered(std::mem::take(&mut self.aside_total_ns), DISCOVERY_NS);
        }
        // Only now, for what follows is read at this moment.
        let mut sample = Sample {
            mono_ns: mono_ns(),
            unix_ns: unix_ns(),
            ..Sample::default()
        };
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

    /// What the tick cost, the pipeline and all outputs included, and whose queues are suspicious.
    pub fn spent(&mut self, tick: Tick, cpu_ns: u64, focused: &BTreeSet<TargetId>) -> Result<()> {
        let aside_ns = std::mem::take(&mut self.aside_ns);
        let spent = Spent {
            cpu_ns: cpu_ns.saturating_sub(aside_ns),
            threads_ns: std::mem::take(&mut self.threads_ns),
            profile_ns: std::mem::take(&mut self.profile_ns),
        };
        self.schedule.spent(tick, spent);
        let now_ns = mono_ns();
        self.schedule.measured(now_ns, unasked_cpu_ns());
        self.set_focused(now_ns, focused)?;
        self.logs.set_focused(focused, now_ns);
        if self.focus.is_on() {
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
