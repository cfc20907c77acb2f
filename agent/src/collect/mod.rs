//! The live end: walks the kernel on a clock and makes samples.
//!
//! `schedule` decides what is walked when, within the CPU budget; `convert` turns records into plain data; `networks`
//! reads the counters that no iterator has. Nothing in here decides anything about queues.

mod clock;
mod convert;
mod networks;
mod schedule;
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "not called before the samples carry it")
)]
mod system;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    time::Duration,
};

use anyhow::Result;
pub use clock::{cpu_time_ns, mono_ns, resident_bytes, unix_ns};
use networks::Networks;
use rustc_hash::FxHashSet;
pub use schedule::{Budget, Schedule, Tick};

use crate::{
    kernel::glance::{Glance, Record, Watched},
    sample::{AgentReport, Notice, Sample, Target, TargetId, Walks},
    target::{Discovery, Found, ListenerSeen, ProcessSeen, Selector, Spec},
};

/// How often processes are looked for: a new one is found within a second.
const DISCOVERY_NS: u64 = 500_000_000;
/// Who listens where is looked for as often, unless that visits so many files that it takes more than this part of the
/// budget; then less often, but at least every so many ns.
const LISTENERS_PART: f64 = 0.2;
const LISTENERS_MAX_NS: u64 = 5_000_000_000;
/// Changes of pace are told at most so often.
const PACE_NOTICE_NS: u64 = 30_000_000_000;
/// How often the agent reports about itself.
const REPORT_NS: u64 = 10_000_000_000;

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
    told_targets: bool,
    discovery_due_ns: u64,
    listeners: Vec<ListenerSeen>,
    /// Listeners per network namespace that no target holds.
    others: HashMap<u32, u32>,
    /// Network namespaces in which targets listen, each with the processes that do.
    places: BTreeSet<(u32, u32)>,
    listeners_due_ns: u64,
    /// CPU time of the discovery within the current tick, ns.
    discovery_cost_ns: u64,
    report: Report,
    notices: Vec<Notice>,
    unmatched: Option<Vec<Selector>>,
    stretched: bool,
    pace_told_ns: u64,
}

/// What the agent counts about itself.
struct Report {
    due_ns: u64,
    cpu_before_ns: u64,
    before_ns: u64,
    totals: AgentReport,
}

/// What others counted and have to say: it travels in the sample, so that a replay tells it too.
#[derive(Clone, Debug, Default)]
pub struct Others {
    pub samples_not_recorded: u64,
    pub spans: u64,
    pub spans_delivered: u64,
    pub spans_dropped: u64,
    pub notices: Vec<Notice>,
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
            told_targets: false,
            discovery_due_ns: 0,
            listeners: Vec::new(),
            others: HashMap::new(),
            places: BTreeSet::new(),
            listeners_due_ns: 0,
            discovery_cost_ns: 0,
            report: Report {
                due_ns: now_ns + REPORT_NS,
                cpu_before_ns: cpu_time_ns(),
                before_ns: now_ns,
                totals: AgentReport::default(),
            },
            notices: Vec::new(),
            unmatched: None,
            stretched: false,
            pace_told_ns: 0,
        }
    }

    /// Looks for the targets now. Done by itself before a tick when it is due.
    pub fn discover(&mut self) -> Result<Found> {
        let mut processes = Vec::new();
        self.glance.walk_processes(&mut |record| {
            if let Record::Process(process) = record {
                processes.push(convert::process(process));
            }
        })?;
        let now_ns = mono_ns();
        if now_ns >= self.listeners_due_ns {
            self.look_for_listeners(now_ns)?;
        }
        let found = self.discovery.look(&processes, &self.listeners);
        let mut watched: Vec<ProcessSeen> = found.processes.clone();
        watched.sort_unstable_by_key(|process| process.tgid);
        if watched != self.processes {
            let bound: Vec<Watched> = watched
                .iter()
                .map(|process| Watched {
                    tgid: process.tgid,
                    pid: process.pid,
                    start_ns: process.start_ns,
                })
                .collect();
            self.glance.watch(&bound)?;
            self.processes = watched;
            // Sockets of a new process are not marked yet.
            self.schedule.files_now();
        }
        self.sort_listeners();
        if found.changed || !self.told_targets {
            self.targets.clone_from(&found.targets);
            self.told_targets = false;
        }
        self.tell_unmatched(&found.unmatched);
        Ok(found)
    }

    fn look_for_listeners(&mut self, now_ns: u64) -> Result<()> {
        let before_ns = cpu_time_ns();
        let mut listeners = Vec::new();
        self.glance.walk_listeners(&mut |record| {
            if let Record::Listener(listener, _) = record {
                listeners.push(convert::listener_seen(listener));
            }
        })?;
        self.listeners = listeners;
        let cost = cpu_time_ns().saturating_sub(before_ns) as f64;
        let affordable = cost / (self.schedule.budget().share * LISTENERS_PART);
        self.listeners_due_ns =
            now_ns + (affordable as u64).clamp(DISCOVERY_NS / 2, LISTENERS_MAX_NS);
        Ok(())
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

    fn tell_unmatched(&mut self, unmatched: &[Selector]) {
        if self.unmatched.as_deref() != Some(unmatched) {
            let before = self.unmatched.take().unwrap_or_default();
            for selector in unmatched
                .iter()
                .filter(|selector| !before.contains(selector))
            {
                let (code, text) = match selector {
                    // It was there at the start, or we would not have begun.
                    Selector::Pid(pid) => ("target_ended", format!("process {pid} has ended")),
                    _ => (
                        "waiting_for_target",
                        format!("nothing matches {selector}; waiting for it to appear"),
                    ),
                };
                self.notices.push(Notice {
                    code: code.to_owned(),
                    text,
                });
            }
            self.unmatched = Some(unmatched.to_vec());
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
            self.discovery_cost_ns = cpu_time_ns().saturating_sub(before_ns);
            self.schedule
                .discovered(self.discovery_cost_ns, DISCOVERY_NS);
        }
        self.walk(tick, &mut sample)?;
        if !self.told_targets {
            self.told_targets = true;
            sample.targets = Some(self.targets.clone());
        }
        sample.notices = std::mem::take(&mut self.notices);
        sample.notices.append(&mut others.notices);
        self.report.totals.ticks += 1;
        if sample.mono_ns >= self.report.due_ns {
            sample.agent = Some(self.agent_report(sample.mono_ns, &others));
        }
        Ok(sample)
    }

    fn walk(&mut self, tick: Tick, sample: &mut Sample) -> Result<()> {
        let mut records: u64 = 0;
        let mut listeners = BTreeMap::new();
        let mut connections = FxHashSet::default();
        if tick.files {
            // As many as last time, give or take: growing by doubling would copy them all.
            sample.connections.reserve(self.connections + 64);
            connections.reserve(self.connections + 64);
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
                    Record::Socket(socket) => {
                        // A socket that several processes hold is met once for each.
                        if connections.insert(socket.cookie) {
                            sample.connections.push(convert::connection(socket));
                        }
                    }
                    Record::Listener(listener, stamps) => {
                        listeners.insert(listener.cookie, convert::listener(listener, stamps));
                    }
                    Record::Pipe(pipe) => sample.pipes.push(convert::pipe(pipe)),
                    Record::Thread(_) | Record::Process(_) => {}
                }
            };
            if tick.files {
                self.glance.walk_files(&mut visit)?;
                sample.walks.files = true;
            } else {
                sample.walks.marked = self.glance.walk_marked(&mut visit)?;
            }
        }
        if tick.threads {
            self.glance.walk_threads(&mut |record| {
                records += 1;
                if let Record::Thread(thread) = record {
                    sample.threads.push(convert::thread(thread));
                }
            })?;
            sample.walks.threads = true;
        }
        sample.listeners = listeners.into_values().collect();
        if tick.files {
            self.connections = sample.connections.len();
        }
        self.report.totals.records += records;
        Ok(())
    }

    /// What the tick cost, the pipeline and all outputs included, and whose queues are suspicious.
    pub fn spent(&mut self, tick: Tick, cpu_ns: u64, hot: &BTreeSet<TargetId>) -> Result<()> {
        let discovery_ns = std::mem::take(&mut self.discovery_cost_ns);
        self.schedule
            .spent(tick, cpu_ns.saturating_sub(discovery_ns));
        self.schedule.set_hot(!hot.is_empty());
        let hot_processes: HashSet<u32> = self
            .targets
            .iter()
            .filter(|target| hot.contains(&target.id))
            .flat_map(|target| target.tgids.iter().copied())
            .collect();
        self.glance.set_hot(|tgid| hot_processes.contains(&tgid))?;
        self.tell_pace();
        Ok(())
    }

    fn tell_pace(&mut self) {
        let stretched = self.schedule.is_stretched();
        let now_ns = mono_ns();
        if stretched != self.stretched && now_ns >= self.pace_told_ns + PACE_NOTICE_NS {
            self.stretched = stretched;
            self.pace_told_ns = now_ns;
            let interval = Duration::from_nanos(self.schedule.files_interval_ns());
            self.notices.push(Notice {
                code: if stretched { "files_stretched" } else { "files_not_stretched" }.to_owned(),
                text: if stretched {
                    format!(
                        "a walk over all sockets costs {}: connections and pipes are looked at every {interval:.1?} \
                         to stay within {:.1}% of a core; listeners and threads keep their interval",
                        crate::text::duration(self.schedule.files_cost_ns()),
                        self.schedule.budget().share * 100.0,
                    )
                } else {
                    "connections and pipes are looked at on every tick again".to_owned()
                },
            });
        }
    }

    fn agent_report(&mut self, now_ns: u64, others: &Others) -> AgentReport {
        let cpu_ns = cpu_time_ns();
        let elapsed = now_ns.saturating_sub(self.report.before_ns).max(1);
        let report = AgentReport {
            cpu_ns,
            cpu_share: cpu_ns.saturating_sub(self.report.cpu_before_ns) as f64 / elapsed as f64,
            rss_bytes: resident_bytes(),
            files_walk_ns: self.schedule.files_cost_ns(),
            files_interval_ns: self.schedule.files_interval_ns(),
            targets: self.targets.len() as u32,
            processes: self.processes.len() as u32,
            late_ticks: self.schedule.late_ticks(),
            samples_not_recorded: others.samples_not_recorded,
            spans: others.spans,
            spans_delivered: others.spans_delivered,
            spans_dropped: others.spans_dropped,
            ..self.report.totals.clone()
        };
        self.report.cpu_before_ns = cpu_ns;
        self.report.before_ns = now_ns;
        self.report.due_ns = now_ns + REPORT_NS;
        report
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
        base: true,
    }
}

impl From<Tick> for Walks {
    fn from(tick: Tick) -> Self {
        Self {
            files: tick.files,
            marked: tick.marked,
            threads: tick.threads,
            ..Self::default()
        }
    }
}
