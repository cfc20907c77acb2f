//! The live end of the pipeline: scans the kernel on a clock and turns what it reads into samples.
//!
//! [`Collector`] only composes its parts; each part has one file. Nothing in here judges a queue.
//!
//! - *When*: `schedule` plans the next sample within the CPU budget, `cpu_budget` corrects the plan by the CPU time
//!   actually used, `background_scans` and `poll_interval` decide when the scans run that not every sample needs, and
//!   `scan_costs` measures what scans cost.
//! - *Processes*: `processes` (the machine's, the watched ones, the targets), `focus` (targets with an unhealthy queue),
//!   `neighbours` (processes that may keep them waiting).
//! - *Queues and threads*: `socket_scan`, `thread_scan`, `networks`, `system` (cgroups and the machine),
//!   `cpu_accounting`, `holders` and `peers` (other ends of pipes and connections), `lock_waits` (holders of locks that
//!   processes share, from `lock_calls`, `file_locks`, `shared_memory`), `accelerators`, `local_ports`, `conntrack`,
//!   `jvm_counters`, `paths`, `titles`, `logs`.
//! - *Hooks*: `tier` decides when those that measure waits are attached, `exact_waits` reads what they measure.
//! - *Services' own queues*: `app`.
//! - *About the agent itself*: `report` (counters), `notices` (messages for people).
//!
//! `convert` turns the eBPF records into sample types; `object_ids` hides kernel addresses.

mod accelerators;
mod app;
mod background_scans;
mod clock;
mod conntrack;
mod convert;
mod cpu_accounting;
mod cpu_budget;
mod exact_waits;
mod file_locks;
mod focus;
mod holders;
mod jvm_counters;
mod local_ports;
mod lock_calls;
mod lock_waits;
mod logs;
mod neighbours;
mod networks;
mod notices;
mod object_ids;
mod paths;
mod peers;
mod poll_interval;
mod processes;
mod report;
mod scan_costs;
mod schedule;
mod shared_memory;
mod socket_scan;
mod system;
mod thread_scan;
mod tier;
mod titles;

use std::{collections::BTreeSet, path::Path, thread, time::Duration};

use accelerators::Accelerators;
use anyhow::Result;
pub use app::AppSettings;
use app::Apps;
use background_scans::BackgroundScans;
use clock::CpuTimer;
pub use clock::{
    boot_ns, budgeted_cpu_ns, cpu_time_ns, mono_ns, process_cpu_ns, record_serving_cpu_time,
    resident_bytes, unix_ns,
};
use conntrack::ConntrackScan;
#[doc(hidden)]
pub use convert::sample_of_records;
use cpu_accounting::CpuAccounting;
use exact_waits::ExactWaits;
use focus::Focus;
use holders::Holders;
use jvm_counters::JvmCountersScan;
#[doc(hidden)]
pub use jvm_counters::{parse as parse_jvm_counters, read_of_process as read_jvm_counters};
use local_ports::{LocalPortScan, networks_of};
use lock_waits::LockWaits;
use logs::Logs;
use neighbours::Neighbours;
use networks::Networks;
use notices::Notices;
use object_ids::ObjectIds;
use paths::Paths;
use peers::Peers;
use processes::Processes;
pub use report::OutputStats;
use report::Report;
use scan_costs::ScanCosts;
pub use schedule::{Budget, SampleCost, SamplePlan, Schedule};
use socket_scan::SocketScan;
use system::System;
pub use tier::{DEFAULT_HOOK_BUDGET, Tier};
use titles::Titles;

pub use crate::app::asker::Report as AppReport;
use crate::{
    kernel::scanner::{Bare, Scanner},
    messages::Table,
    sample::{Architecture, Hidden, Sample, Scans, TargetId, VM_THREAD, Wait},
    target::{Discovered, Discovery, ProcessInfo, Spec},
};

/// Time between two scans of the process table, ns: a new process is found within a second.
const DISCOVERY_INTERVAL_NS: u64 = 500 * MS;
const MS: u64 = 1_000_000;
/// Number of polls in a row that must not see a fact before it counts as hidden, and the time between two of them.
const VISIBILITY_POLLS: usize = 3;
const VISIBILITY_INTERVAL: Duration = Duration::from_millis(100);

/// What the agent sees from where it runs.
#[derive(Debug)]
pub struct Visibility {
    pub services: usize,
    /// Facts that are out of sight.
    pub hidden: Vec<Hidden>,
    /// Processes of the agent's pid namespace, and how many of them its /proc does not show.
    pub processes: usize,
    pub not_in_proc: usize,
}

/// Takes samples of the targets that the user selected.
pub struct Collector {
    scanner: Scanner,
    schedule: Schedule,
    background: BackgroundScans,
    costs: ScanCosts,
    ids: ObjectIds,
    processes: Processes,
    focus: Focus,
    neighbours: Neighbours,
    sockets: SocketScan,
    networks: Networks,
    holders: Holders,
    peers: Peers,
    paths: Paths,
    titles: Titles,
    lock_waits: LockWaits,
    accelerators: Accelerators,
    local_ports: LocalPortScan,
    conntrack: ConntrackScan,
    jvm_counters: JvmCountersScan,
    logs: Logs,
    exact_waits: ExactWaits,
    system: System,
    cpu_accounting: CpuAccounting,
    report: Report,
    notices: Notices,
    apps: Apps,
}

impl Collector {
    /// Watches what `specs` name, within `budget`.
    pub fn new(scanner: Scanner, specs: Vec<Spec>, budget: Budget) -> Self {
        let now_ns = mono_ns();
        let ids = ObjectIds::new();
        Self {
            scanner,
            schedule: Schedule::new(budget, now_ns),
            background: BackgroundScans::default(),
            costs: ScanCosts::default(),
            ids,
            processes: Processes::new(Discovery::new(specs, std::process::id())),
            focus: Focus::default(),
            neighbours: Neighbours::default(),
            sockets: SocketScan::new(ids, clock::jiffy_ns()),
            networks: Networks::default(),
            holders: Holders::default(),
            peers: Peers::default(),
            paths: Paths::default(),
            titles: Titles::default(),
            lock_waits: LockWaits::default(),
            accelerators: Accelerators::default(),
            local_ports: LocalPortScan::default(),
            conntrack: ConntrackScan::default(),
            jvm_counters: JvmCountersScan::default(),
            logs: Logs::new(None),
            exact_waits: ExactWaits::new(Tier::Glance, DEFAULT_HOOK_BUDGET),
            system: System::default(),
            cpu_accounting: CpuAccounting::default(),
            report: Report::new(now_ns),
            notices: Notices::default(),
            apps: Apps::default(),
        }
    }

    /// Reads the logs of focused targets for the messages in `table`; `None` turns that off.
    pub fn read_logs(&mut self, table: Option<Table>) {
        self.logs = Logs::new(table);
    }

    /// Attaches hooks as this tier says, if the scanner has loaded them; they may take this share of the machine's CPU time.
    pub fn set_tier(&mut self, tier: Tier, hook_budget: f64) {
        self.exact_waits = ExactWaits::new(tier, hook_budget);
    }

    /// Asks services for their own queues, as these say; `None` turns that off.
    pub fn ask_apps(&mut self, settings: Option<AppSettings>) {
        self.apps.set(settings);
        self.update_apps();
    }

    /// Waits until all recognized services were asked once, but not longer than `limit`.
    pub fn wait_for_apps(&self, limit: Duration) {
        self.apps.wait(limit);
    }

    /// What is known about each process that is asked, for `doctor`.
    pub fn app_reports(&self) -> Vec<AppReport> {
        self.apps.reports()
    }

    /// Watches what these select, from the next sample on. Targets that are still selected continue.
    pub fn set_specs(&mut self, specs: Vec<Spec>) {
        self.processes.set_specs(specs);
    }

    /// Samples within another budget; the next sample includes all scans.
    pub fn set_budget(&mut self, budget: Budget) {
        self.schedule.set_budget(budget, mono_ns());
    }

    /// Focuses all targets (`true`), or only those with an unhealthy queue.
    pub fn focus_all(&mut self, all: bool) {
        self.focus.set_all(all);
    }

    /// Which facts about the targets the agent can see, for `doctor`.
    ///
    /// # Errors
    /// If the kernel refuses an iterator or a map update.
    pub fn visibility(&mut self) -> Result<Visibility> {
        let mut hidden = self.hidden()?;
        // One poll may also miss a fact because a busy machine held up the search, or because the group was removed
        // meanwhile. Such a fact is not hidden.
        for _ in 1..VISIBILITY_POLLS {
            if hidden.is_empty() {
                break;
            }
            thread::sleep(VISIBILITY_INTERVAL);
            let still = self.hidden()?;
            hidden.retain(|fact| still.contains(fact));
        }
        let processes = self.processes.all();
        let is_shown = |pid: u32| Path::new(&format!("/proc/{pid}/stat")).exists();
        let unseen = |processes: &Processes| -> Vec<u32> {
            let pids = processes.all().iter().map(|process| process.pid);
            pids.filter(|pid| !is_shown(*pid)).collect()
        };
        let (count, before) = (processes.len(), unseen(&self.processes));
        // Those that have ended meanwhile are not hidden.
        self.processes.scan(&mut self.scanner)?;
        let still = unseen(&self.processes);
        Ok(Visibility {
            services: self.processes.targets().len(),
            hidden,
            processes: count,
            not_in_proc: before.iter().filter(|pid| still.contains(pid)).count(),
        })
    }

    /// What one poll does not see.
    fn hidden(&mut self) -> Result<Vec<Hidden>> {
        self.discover()?;
        let mut sample = Sample::default();
        self.system.poll(
            &mut self.scanner,
            &self.processes,
            &mut sample,
            &mut self.notices,
        )?;
        Ok(sample.hidden)
    }

    /// The loaded iterators, for benchmarks that run one scan by itself.
    pub fn scanner(&mut self) -> &mut Scanner {
        &mut self.scanner
    }

    /// See [`Scanner::bare`].
    pub fn bare(&self) -> Result<Bare> {
        self.scanner.bare(&self.processes.bindings())
    }

    /// When the next sample is due, and which scans it includes.
    pub fn plan_next(&mut self) -> SamplePlan {
        self.schedule.next(mono_ns())
    }

    /// Takes one sample. `outputs`: counters of the agent's outputs, to include in the sample.
    ///
    /// # Errors
    /// If the kernel refuses an iterator or a map update.
    pub fn sample(&mut self, plan: SamplePlan, mut outputs: OutputStats) -> Result<Sample> {
        if self.processes.take_due(mono_ns()) {
            let timer = CpuTimer::start();
            self.discover()?;
            self.costs.add_background(timer);
            let cost_ns = self.costs.take_since_discovery();
            self.schedule.discovered(cost_ns, DISCOVERY_INTERVAL_NS);
        }
        // Taken after discovery, so that the time is close to the scans that follow.
        let mut sample = Sample {
            mono_ns: mono_ns(),
            unix_ns: unix_ns(),
            architecture: Architecture::OWN,
            ..Sample::default()
        };
        self.scan_queues(plan, &mut sample)?;
        if plan.profile {
            self.scan_profile(&mut sample)?;
        }
        if plan.base {
            self.scan_in_background(plan, &mut sample)?;
        }
        // With every sample, as it keeps their budget.
        if self.exact_waits.is_due(sample.mono_ns) {
            self.poll_hooks(&mut sample);
        }
        self.peers.report(&mut sample);
        self.apps
            .report(&mut sample, plan.complete, &mut self.notices);
        self.processes.report(&mut sample);
        sample.notices = self.notices.take();
        sample.notices.append(&mut outputs.notices);
        self.report.count_sample();
        if self.report.is_due(sample.mono_ns) {
            let watched = self.processes.counts();
            let report = self
                .report
                .make(sample.mono_ns, watched, &self.schedule, &outputs);
            sample.agent = Some(report);
        }
        Ok(sample)
    }

    /// Accounts for a sample once the pipeline and all outputs have handled it.
    ///
    /// `cpu_ns` is the CPU time of all of that; `focused` are the targets whose queues the pipeline found unhealthy.
    ///
    /// # Errors
    /// If the kernel refuses a map update.
    pub fn finish_sample(
        &mut self,
        plan: SamplePlan,
        cpu_ns: u64,
        focused: &BTreeSet<TargetId>,
    ) -> Result<()> {
        self.schedule.account(plan, self.costs.take_sample(cpu_ns));
        let now_ns = mono_ns();
        self.schedule.measured(now_ns, budgeted_cpu_ns());
        self.set_focused(now_ns, focused)?;
        self.logs.set_focused(focused, now_ns);
        if self.focus.is_active() {
            let interval_ns = self.schedule.budget().interval_ns;
            self.background.waits.poll_within(now_ns, interval_ns);
        }
        self.notices
            .report_stretched_scans(&self.schedule.stretchable_scans(), now_ns);
        Ok(())
    }

    /// Switches the hooks off if this process may not attach them. Returns whether it may.
    pub fn check_hooks(&mut self) -> bool {
        self.scanner.check_hooks();
        self.scanner.hooks().is_ok()
    }

    /// Fails if this process has lost a privilege that samples need.
    pub fn check_access(&mut self) -> Result<()> {
        self.scanner.check_access()
    }

    /// Finds the targets now. [`Collector::sample`] does so by itself whenever it is due.
    ///
    /// # Errors
    /// If the kernel refuses an iterator or a map update.
    pub fn discover(&mut self) -> Result<Discovered> {
        self.processes.scan(&mut self.scanner)?;
        let now_ns = mono_ns();
        if self.background.holders.is_due(now_ns) {
            self.scan_holders(now_ns)?;
        }
        let neighbours = self.neighbours.added(now_ns, &self.processes);
        let found = self
            .processes
            .find_targets(self.holders.listeners(), &neighbours);
        if self.processes.set_watched(&found) {
            self.scanner.watch(&self.processes.bindings())?;
            // Only a scan over files finds the sockets of a new process.
            self.schedule.scan_all_next();
        }
        self.networks
            .set_listeners(self.holders.listeners(), self.processes.watched());
        if self.processes.set_targets(&found) {
            self.update_focus_scope()?;
        }
        self.update_apps();
        self.notices.report_unmatched(&found.unmatched);
        self.notices.report_left_out(found.left_out);
        Ok(found)
    }

    /// Updates which services are asked, and where.
    fn update_apps(&mut self) {
        let focus = &self.focus;
        self.apps.update(
            self.processes.watched(),
            self.holders.listeners(),
            |tgid| focus.contains(tgid),
            &mut self.notices,
        );
    }

    /// The scans that make up a sample: sockets and other files, then threads.
    fn scan_queues(&mut self, plan: SamplePlan, sample: &mut Sample) -> Result<()> {
        if plan.files || plan.focused_sockets {
            // Before the listeners: a connection that arrives in between is seen waiting now and counted in the next sample.
            let processes = &self.processes;
            sample.networks = self.networks.read(|tgid| processes.watched_pid(tgid));
            let records = if plan.files {
                self.sockets.scan_files(&mut self.scanner, sample)?
            } else {
                self.sockets
                    .scan_focused_sockets(&mut self.scanner, sample)?
            };
            self.report.count_records(records);
            self.apps.leave_out_own(sample);
        }
        if plan.files {
            if self.apps.set_unix(&sample.unix) {
                self.update_apps();
            }
            self.paths
                .resolve_pipes(&mut sample.pipes, self.processes.watched());
            if self.holders.set_shared(sample) {
                let within_ns = DISCOVERY_INTERVAL_NS;
                self.background
                    .holders
                    .poll_within(sample.mono_ns, within_ns);
            }
            self.follow_connections(sample)?;
        }
        if plan.threads {
            let timer = CpuTimer::start();
            let records = thread_scan::scan_threads(&mut self.scanner, sample)?;
            self.costs.set_threads(timer);
            self.report.count_records(records);
        }
        Ok(())
    }

    /// Samples what the threads in the focus scope wait for.
    fn scan_profile(&mut self, sample: &mut Sample) -> Result<()> {
        if !self.focus.is_active() {
            return Ok(());
        }
        let timer = CpuTimer::start();
        let running = thread_scan::scan_profile(&mut self.scanner, sample)?;
        let records = sample.profile.len() as u64;
        let threads = sample.profile.iter();
        sample.on_accelerator =
            self.accelerators
                .find(sample.mono_ns, threads, &running, &self.processes);
        self.paths.resolve_profile(
            &mut sample.profile,
            self.processes.watched(),
            sample.mono_ns,
        );
        self.report.count_records(records);
        self.costs.set_profile(timer);
        Ok(())
    }

    /// The background scans that are due; all of them for a complete sample.
    fn scan_in_background(&mut self, plan: SamplePlan, sample: &mut Sample) -> Result<()> {
        let now_ns = sample.mono_ns;
        let share = self.background_share();
        let is_focused = self.focus.is_active();
        if plan.complete && self.holders.has_new_shared()
            || is_focused && self.background.holders.is_due(now_ns)
        {
            let timer = CpuTimer::start();
            self.scan_holders(now_ns)?;
            self.costs.add_background(timer);
        }
        if self.focus.is_active() && self.background.titles.is_due(now_ns) {
            let timer = CpuTimer::start();
            let scope = self.focus.in_scope(self.processes.watched());
            sample.titles = self.titles.poll(&scope, now_ns, titles::read);
            let cost_ns = self.costs.add_background(timer);
            self.background.titles.polled(now_ns, cost_ns, share);
        }
        if plan.complete || self.background.waits.is_due(now_ns) {
            let timer = CpuTimer::start();
            let running = thread_scan::scan_waits(&mut self.scanner, sample)?;
            if is_focused && !sample.scans.profile {
                let threads = sample.waits.iter();
                let threads = threads.filter(|wait| self.focus.contains(wait.tgid));
                sample.on_accelerator =
                    self.accelerators
                        .find(now_ns, threads, &running, &self.processes);
            }
            self.paths
                .resolve_waits(&mut sample.waits, self.processes.watched());
            let cost_ns = self.costs.add_background(timer);
            self.background.waits.polled(now_ns, cost_ns, share);
        }
        if self.focus.is_active() && self.background.lock_waits.is_due(now_ns) {
            self.search_lock_waits(sample);
        }
        if is_focused && self.background.local_ports.is_due(now_ns) {
            let timer = CpuTimer::start();
            let scope = self.focus.in_scope(self.processes.watched());
            let networks = networks_of(&scope);
            sample.local_ports = self.local_ports.search(&networks);
            sample.conntrack = self.conntrack.search(&networks, now_ns);
            let cost_ns = self.costs.add_background(timer);
            self.background.local_ports.polled(now_ns, cost_ns, share);
        }
        if is_focused && self.background.jvm_counters.is_due(now_ns) {
            self.read_jvm_counters(sample);
        }
        if plan.complete || self.background.system.is_due(now_ns) {
            let timer = CpuTimer::start();
            self.system.poll(
                &mut self.scanner,
                &self.processes,
                sample,
                &mut self.notices,
            )?;
            let cost_ns = self.costs.add_background(timer);
            self.background.system.polled(now_ns, cost_ns, share);
        }
        if plan.complete || self.background.cpu_accounting.is_due(now_ns) {
            let timer = CpuTimer::start();
            self.cpu_accounting
                .scan(&mut self.scanner, &self.processes, sample)?;
            let cost_ns = self.costs.add_background(timer);
            self.background
                .cpu_accounting
                .polled(now_ns, cost_ns, share);
        }
        if self.logs.is_due(now_ns) {
            let timer = CpuTimer::start();
            sample.messages = self.logs.poll(
                now_ns,
                share,
                self.processes.targets(),
                self.processes.watched(),
                &mut self.notices,
            );
            self.costs.add_background(timer);
        }
        self.holders.report(sample);
        Ok(())
    }

    /// Decides about the hooks, and reads what they have measured.
    fn poll_hooks(&mut self, sample: &mut Sample) {
        let timer = CpuTimer::start();
        let focus = &self.focus;
        let report = self.exact_waits.poll(
            sample.mono_ns,
            self.scanner.hooks(),
            &self.processes,
            focus.has_targets(),
            |tgid| focus.contains(tgid),
        );
        sample.hooks = Some(report);
        self.costs.add_background(timer);
    }

    /// Finds who holds the locks that threads in the focus scope wait for in this sample, if it has sampled any.
    fn search_lock_waits(&mut self, sample: &mut Sample) {
        let Some(threads) = sampled_threads(sample) else {
            return;
        };
        let timer = CpuTimer::start();
        let in_focus = threads.iter().filter(|wait| self.focus.contains(wait.tgid));
        let in_focus: Vec<&Wait> = in_focus.collect();
        let now_ns = sample.mono_ns;
        let found = self
            .lock_waits
            .search(now_ns, &in_focus, &self.processes, &mut self.notices);
        self.neighbours.set_lock_holders(found.as_deref());
        sample.lock_waits = found;
        let cost_ns = self.costs.add_background(timer);
        let share = self.background_share();
        self.background.lock_waits.polled(now_ns, cost_ns, share);
    }

    /// Reads the counters of the JVMs in the focus scope, if their threads are in this sample.
    fn read_jvm_counters(&mut self, sample: &mut Sample) {
        let Some(threads) = sampled_threads(sample) else {
            return;
        };
        let timer = CpuTimer::start();
        let is_jvms = |wait: &&Wait| wait.comm == VM_THREAD && self.focus.contains(wait.tgid);
        let jvms = threads.iter().filter(is_jvms);
        let tgids: BTreeSet<u32> = jvms.map(|wait| wait.tgid).collect();
        let jvms = tgids.iter().filter_map(|tgid| self.processes.get(*tgid));
        let jvms: Vec<&ProcessInfo> = jvms.collect();
        let now_ns = sample.mono_ns;
        sample.jvm_counters = self.jvm_counters.poll(
            &jvms,
            now_ns,
            jvm_counters::find,
            jvm_counters::read,
            &mut self.notices,
        );
        let cost_ns = self.costs.add_background(timer);
        let share = self.background_share();
        self.background.jvm_counters.polled(now_ns, cost_ns, share);
    }

    /// Share of a core that each background scan may use.
    fn background_share(&self) -> f64 {
        background_scans::share_of_each(self.focus.is_active()) * self.schedule.cpu_share()
    }

    /// Finds the listening processes of this machine, and the processes at the other ends of what targets hold.
    fn scan_holders(&mut self, now_ns: u64) -> Result<()> {
        let timer = CpuTimer::start();
        self.scanner.request_peers(&self.peers.keys())?;
        let connections = self.holders.scan(
            &mut self.scanner,
            self.ids,
            &self.processes,
            &mut self.notices,
        )?;
        if self.focus.has_targets() {
            self.peers
                .found(&connections, &self.processes, &mut self.notices);
        }
        let share = self.background_share();
        let cost_ns = timer.elapsed_ns();
        self.background.holders.polled(now_ns, cost_ns, share);
        if self.focus.is_active() {
            self.find_neighbours(now_ns)?;
        }
        Ok(())
    }

    /// Updates which targets are focused.
    fn set_focused(&mut self, now_ns: u64, focused: &BTreeSet<TargetId>) -> Result<()> {
        self.focus
            .set_focused(now_ns, focused, self.processes.targets());
        if !self.focus.has_targets() && self.focus.is_active() {
            self.neighbours.clear();
            self.peers.clear();
            self.titles.clear();
            self.lock_waits.clear();
            self.accelerators.clear();
            self.jvm_counters.clear();
            self.scanner.request_peers(&BTreeSet::new())?;
        }
        self.schedule.set_focused(self.focus.has_targets());
        let is_new = self.focus.is_incident_new(now_ns);
        self.schedule.set_spending(is_new, now_ns);
        self.update_focus_scope()
    }

    /// Updates whose threads are profiled: those of focused targets and their neighbours.
    fn update_focus_scope(&mut self) -> Result<()> {
        let neighbours = self.neighbours.selected();
        self.focus
            .update_scope(self.processes.targets(), neighbours);
        let threads = self.cpu_accounting.threads();
        let tasks = threads.max(self.processes.all().len());
        let focus = &self.focus;
        self.scanner.set_focused(tasks, |tgid| focus.contains(tgid))
    }

    /// After a scan over files: finds where the connections, pipes and sockets of focused targets lead.
    fn follow_connections(&mut self, sample: &Sample) -> Result<()> {
        if !self.focus.has_targets() {
            return Ok(());
        }
        let listeners = self.holders.listening_ports();
        let is_served = |netns, port| listeners.contains(&(netns, port));
        self.apps
            .find_consumers(&sample.connections, self.peers.found_peers());
        self.neighbours.set_consumers(self.apps.consumer_ends());
        self.neighbours.set_ends(sample, is_served);
        let has_new = self.peers.search_for(
            &sample.connections,
            self.focus.scope(),
            is_served,
            &mut self.notices,
        );
        let holders = &mut self.background.holders;
        if has_new {
            holders.force(sample.mono_ns, peers::FIRST_SEARCH_WITHIN_NS);
        } else {
            holders.poll_within(sample.mono_ns, peers::SEARCH_INTERVAL_NS);
        }
        self.find_neighbours(sample.mono_ns)
    }

    /// Finds the neighbours of the focused targets. If any is not watched yet, discovery at the next sample adds it.
    fn find_neighbours(&mut self, now_ns: u64) -> Result<()> {
        let has_new = self.neighbours.find(
            now_ns,
            &self.focus,
            &mut self.processes,
            &self.holders,
            &self.peers,
            &mut self.notices,
        );
        if has_new {
            self.processes.discover_next();
        }
        self.update_focus_scope()
    }
}

/// The threads that this sample describes: those in the focus scope, or all. `None`: it has sampled none.
fn sampled_threads(sample: &Sample) -> Option<&[Wait]> {
    match sample.scans {
        Scans { profile: true, .. } => Some(&sample.profile),
        Scans { waits: true, .. } => Some(&sample.waits),
        _ => None,
    }
}
