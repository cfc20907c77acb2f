//! The processes of the machine, those that are watched, and the targets that they make up.

use std::collections::BTreeSet;

use anyhow::Result;

use super::{DISCOVERY_INTERVAL_NS, boot_ns, convert};
use crate::{
    kernel::scanner::{Record, Scanner, Watched},
    sample::{Sample, Target},
    target::{Discovered, Discovery, ListenerInfo, ProcessInfo, Spec},
    text::harmless,
};

pub(super) struct Processes {
    discovery: Discovery,
    /// Every process of the machine, in the order of their tgids.
    all: Vec<ProcessInfo>,
    /// The processes of all targets, in the order of their tgids.
    watched: Vec<ProcessInfo>,
    targets: Vec<Target>,
    /// A sample has reported the current `targets`.
    is_reported: bool,
    /// CLOCK_MONOTONIC at which discovery is due, ns.
    due_ns: u64,
}

impl Processes {
    pub(super) fn new(discovery: Discovery) -> Self {
        Self {
            discovery,
            all: Vec::new(),
            watched: Vec::new(),
            targets: Vec::new(),
            is_reported: false,
            due_ns: 0,
        }
    }

    /// Whether discovery is due; if so, the next one is due an interval later.
    pub(super) fn take_due(&mut self, now_ns: u64) -> bool {
        let is_due = now_ns >= self.due_ns;
        if is_due {
            self.due_ns = now_ns + DISCOVERY_INTERVAL_NS;
        }
        is_due
    }

    /// Watches what these select, from the next sample on.
    pub(super) fn set_specs(&mut self, specs: Vec<Spec>) {
        self.discovery.set_specs(specs);
        self.discover_next();
    }

    /// Makes discovery due with the next sample.
    pub(super) fn discover_next(&mut self) {
        self.due_ns = 0;
    }

    /// Reads the process table.
    pub(super) fn scan(&mut self, scanner: &mut Scanner) -> Result<()> {
        let mut all = Vec::new();
        scanner.scan_processes(&mut |record| {
            if let Record::Process(process) = record {
                all.push(convert::process(process));
            }
        })?;
        all.sort_unstable_by_key(|process| process.tgid);
        self.all = all;
        Ok(())
    }

    /// Groups the scanned processes into targets. `neighbours`: tgids to watch although no selector names them.
    pub(super) fn find_targets(
        &mut self,
        listeners: &[ListenerInfo],
        neighbours: &BTreeSet<u32>,
    ) -> Discovered {
        self.discovery
            .scan(boot_ns(), &self.all, listeners, neighbours)
    }

    /// Updates the watched processes; returns whether they have changed.
    pub(super) fn set_watched(&mut self, found: &Discovered) -> bool {
        let mut watched = found.processes.clone();
        watched.sort_unstable_by_key(|process| process.tgid);
        let changed = watched != self.watched;
        self.watched = watched;
        changed
    }

    /// Updates the targets; returns whether they have changed, or were never reported.
    pub(super) fn set_targets(&mut self, found: &Discovered) -> bool {
        let is_new = found.changed || !self.is_reported;
        if is_new {
            self.targets.clone_from(&found.targets);
            self.is_reported = false;
        }
        is_new
    }

    /// Puts the targets into the sample if they have changed since the last one.
    pub(super) fn report(&mut self, sample: &mut Sample) {
        if !self.is_reported {
            self.is_reported = true;
            sample.targets = Some(self.targets.clone());
        }
    }

    pub(super) fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// The processes of all targets, in the order of their tgids.
    pub(super) fn watched(&self) -> &[ProcessInfo] {
        &self.watched
    }

    /// Every process of the machine, in the order of their tgids.
    pub(super) fn all(&self) -> &[ProcessInfo] {
        &self.all
    }

    /// All processes, and the discovery that remembers what they execute.
    pub(super) fn all_and_discovery(&mut self) -> (&[ProcessInfo], &mut Discovery) {
        (&self.all, &mut self.discovery)
    }

    /// The numbers of watched targets and processes.
    pub(super) fn counts(&self) -> (u32, u32) {
        (self.targets.len() as u32, self.watched.len() as u32)
    }

    /// What the iterators need to know of the processes that they visit.
    pub(super) fn bindings(&self) -> Vec<Watched> {
        let watched = self.watched.iter().map(|process| Watched {
            tgid: process.tgid,
            pid: process.pid,
            start_ns: process.start_ns,
        });
        watched.collect()
    }

    /// Any process of the machine.
    pub(super) fn get(&self, tgid: u32) -> Option<&ProcessInfo> {
        find(&self.all, tgid)
    }

    /// A process's `comm` with control characters escaped; empty if there is no such process.
    pub(super) fn name(&self, tgid: u32) -> String {
        self.get(tgid)
            .map_or_else(String::new, |process| harmless(&process.comm))
    }

    /// Pid of a watched process as the agent's /proc shows it.
    pub(super) fn watched_pid(&self, tgid: u32) -> Option<u32> {
        find(&self.watched, tgid).map(|process| process.pid)
    }
}

/// Finds a process among `processes`, which are in the order of their tgids.
pub(super) fn find(processes: &[ProcessInfo], tgid: u32) -> Option<&ProcessInfo> {
    let found = processes.binary_search_by_key(&tgid, |process| process.tgid);
    processes.get(found.ok()?)
}
