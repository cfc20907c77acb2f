//! The BPF iterators: loaded once (`scanner/load.rs`) and run whenever the agent samples. Hooks (`kernel/hooks.rs`) are
//! attached only in the tiers `auto` and `watch`.

mod load;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Read as _},
    os::fd::AsFd as _,
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData},
    programs::Iter,
};
use bytemuck::Zeroable as _;
pub use load::{BTF_PATH, Capabilities, Capability, LoadOptions};
use tailback_ebpf::{MAX_REQUESTED_PEERS, Scan, TARGET_FOCUSED, TargetEntry};

pub use super::records::Record;
use super::{
    batched_scan::BatchedScan,
    hooks::Hooks,
    iter::{IterScope, Link},
    log::BpfLog,
    output_buffer::SharedBuffer,
    records::decode,
};

/// Up to this many processes have iterators of their own; beyond that, one scan of the whole host is cheaper.
const MAX_BOUND_PROCESSES: usize = 32;

/// Skipping this many threads in a scan of the whole host costs as much as one iterator bound to a process. Measured by
/// `bench-scan`.
const THREADS_PER_BOUND_ITERATOR: usize = 16;

/// Maximum number of busy sockets of focused targets that one file scan adds to `FOCUSED_SOCKETS`.
const MAX_FOCUSED_SOCKETS: u32 = 256;

/// A watched process, as the programs know it and as the agent's /proc shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Watched {
    /// Process id in the initial pid namespace.
    pub tgid: u32,
    /// Process id in the agent's pid namespace.
    pub pid: u32,
    /// CLOCK_BOOTTIME at its start.
    pub start_ns: u64,
}

/// The loaded object and its iterators.
pub struct Scanner {
    // Fields are dropped in this order: links before the programs that they run.
    /// `None`: not requested, or they did not load.
    hooks: Option<Hooks>,
    /// One entry per watched process, or a single one over the whole host.
    links: Vec<Links>,
    /// The wait profile: an iterator for each focused process, or one over all tasks.
    profile: Vec<Link>,
    profile_is_bound: bool,
    /// Threads on the host, as of the latest [`Self::set_focused`].
    host_threads: usize,
    focused_sockets: Option<Link>,
    holders: Option<Link>,
    processes: Link,
    cpu_times: Option<Link>,
    /// Which of the two programs that scan files is loaded.
    files_program: &'static str,
    scan_settings: Scan,
    targets: HashMap<MapData, u32, TargetPod>,
    requested_peers: HashMap<MapData, u32, u32>,
    peer_keys: BTreeSet<u32>,
    /// The watched processes by tgid, with the flag that says which are focused.
    watched: BTreeMap<u32, TargetEntry>,
    /// Their pids in the agent's namespace, by tgid.
    pids: BTreeMap<u32, u32>,
    scan: Array<MapData, ScanPod>,
    capabilities: Capabilities,
    /// The output of batched scans.
    output: Option<SharedBuffer>,
    /// The watched processes have changed: `FOCUSED_SOCKETS` lacks their sockets, and its entries may name former holders.
    focus_is_stale: bool,
    buffer: Box<[u8]>,
    log: Option<BpfLog>,
    ebpf: Ebpf,
}

/// The iterators over one process, or over the whole host. `None`: the program did not load.
struct Links {
    files: Option<Link>,
    threads: Option<Link>,
    waits: Option<Link>,
    batched: Option<BatchedScan>,
}

/// See [`Scanner::bare`].
pub struct Bare {
    files: Vec<Link>,
    threads: Vec<Link>,
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct ScanPod(Scan);
// SAFETY: `Scan` is plain old data (bytemuck checks it).
unsafe impl aya::Pod for ScanPod {}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct TargetPod(TargetEntry);
// SAFETY: `TargetEntry` is plain old data (bytemuck checks it).
unsafe impl aya::Pod for TargetPod {}

impl Scanner {
    fn write_scan_settings(&mut self) -> Result<()> {
        self.scan
            .set(0, ScanPod(self.scan_settings), 0)
            .context("cannot write the scan settings")
    }

    /// What works on this kernel, and what does not.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// The hooks that measure waits, or why there are none.
    pub fn hooks(&mut self) -> Result<&mut Hooks, &str> {
        match (&mut self.hooks, &self.capabilities.hooks) {
            (Some(hooks), _) => Ok(hooks),
            (None, Err(reason)) => Err(reason.as_str()),
            (None, Ok(())) => Err("they are not loaded"),
        }
    }

    /// Switches the hooks off if this process is not permitted to attach them with its present privileges. Otherwise
    /// [`Self::check_access`] would fail whatever privileges are kept, so none could be dropped.
    pub fn check_hooks(&mut self) {
        if let Some(Err(error)) = self.hooks.as_mut().map(Hooks::check_access) {
            self.capabilities.hooks = Err(format!("the kernel refused to attach them: {error}"));
            self.hooks = None;
        }
    }

    /// Does with eBPF what a scan does. Fails if this process has lost a privilege that it needs.
    pub fn check_access(&mut self) -> Result<()> {
        self.write_scan_settings()?;
        let link = self.link("processes", IterScope::All)?;
        let link = link.context("cannot create the iterator processes")?;
        link.open().context("cannot run the iterator processes")?;
        let Some(hooks) = &mut self.hooks else {
            return Ok(());
        };
        hooks.check_access().context("cannot attach the hooks")
    }

    /// Watches exactly these processes from the next scan on.
    pub fn watch(&mut self, processes: &[Watched]) -> Result<()> {
        let mut watched = BTreeMap::new();
        for process in processes {
            let before = self.watched.get(&process.tgid);
            let entry = TargetEntry {
                start_ns: process.start_ns,
                flags: before.map_or(0, |before| before.flags),
                // The programs fill in the rest.
                ..TargetEntry::zeroed()
            };
            watched.insert(process.tgid, entry);
        }
        for tgid in self
            .watched
            .keys()
            .filter(|tgid| !watched.contains_key(tgid))
        {
            // An error means that the entry is gone already.
            let _ = self.targets.remove(tgid);
        }
        for (tgid, entry) in &watched {
            if self.watched.get(tgid) != Some(entry) {
                self.targets
                    .insert(*tgid, TargetPod(*entry), 0)
                    .with_context(|| format!("cannot watch process {tgid}: too many processes"))?;
            }
        }
        self.watched = watched;
        self.pids = processes
            .iter()
            .map(|process| (process.tgid, process.pid))
            .collect();
        // An interrupted scan may have left its progress in the map: reset it.
        self.write_scan_settings()?;
        let bind =
            self.capabilities.bound_to_process.is_ok() && processes.len() <= MAX_BOUND_PROCESSES;
        let over: Vec<IterScope> = if bind {
            let pids = processes.iter().map(|process| process.pid);
            pids.map(IterScope::Process).collect()
        } else {
            vec![IterScope::All]
        };
        self.links.clear();
        for over in over {
            if let Some(links) = self.links_over(over)? {
                self.links.push(links);
            }
        }
        self.focus_is_stale = true;
        self.bind_profile()
    }

    /// `None`: the process is gone.
    fn links_over(&self, over: IterScope) -> Result<Option<Links>> {
        let mut is_gone = false;
        let mut create = |program, capability: &Capability| -> Result<Option<Link>> {
            if capability.is_err() {
                return Ok(None);
            }
            let link = self.link(program, over)?;
            is_gone |= link.is_none();
            Ok(link)
        };
        let links = Links {
            files: create(self.files_program, &self.capabilities.files)?,
            threads: create("threads", &self.capabilities.threads)?,
            waits: create("waits", &self.capabilities.waits)?,
            batched: match over {
                IterScope::Process(pid) if self.capabilities.batched_scans.is_ok() => {
                    self.batched_scan(pid)?
                }
                _ => None,
            },
        };
        Ok((!is_gone).then_some(links))
    }

    fn batched_scan(&self, pid: u32) -> Result<Option<BatchedScan>> {
        let create = |program| self.link(program, IterScope::Thread(pid));
        let links = create("batched_files")?.zip(create("batched_threads")?);
        Ok(links.map(|(files, threads)| BatchedScan { files, threads }))
    }

    /// `None`: the process just exited; the next process scan will show that.
    fn link(&self, program: &str, over: IterScope) -> Result<Option<Link>> {
        match link(&self.ebpf, program, over) {
            Ok(link) => Ok(Some(link)),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            Err(error) => {
                Err(error).with_context(|| format!("cannot create the iterator {program}"))
            }
        }
    }

    /// Iterators of one program over each of these processes, or a single one over the whole host.
    fn links_of(
        &self,
        program: &str,
        bind: bool,
        pids: impl Iterator<Item = u32>,
    ) -> Result<Vec<Link>> {
        if !bind {
            return Ok(self.link(program, IterScope::All)?.into_iter().collect());
        }
        let links = pids.map(|pid| self.link(program, IterScope::Process(pid)));
        links.filter_map(Result::transpose).collect()
    }

    /// Sets which processes are focused: their busy sockets join `FOCUSED_SOCKETS` at the next file scan, and their
    /// threads are profiled. `host_threads`, the number of threads on the host, decides which kind of profile scan is
    /// cheaper.
    pub fn set_focused(
        &mut self,
        host_threads: usize,
        is_focused: impl Fn(u32) -> bool,
    ) -> Result<()> {
        let mut changed = false;
        self.host_threads = host_threads;
        for (tgid, entry) in &mut self.watched {
            let flags = if is_focused(*tgid) { TARGET_FOCUSED } else { 0 };
            if entry.flags != flags {
                entry.flags = flags;
                self.targets
                    .insert(*tgid, TargetPod(*entry), 0)
                    .context("cannot update the watched processes")?;
                changed = true;
            }
        }
        if changed { self.bind_profile() } else { Ok(()) }
    }

    /// Binds the profile to the focused processes if they are few; else one iterator visits all tasks and skips the rest.
    fn bind_profile(&mut self) -> Result<()> {
        if self.capabilities.waits.is_err() {
            return Ok(());
        }
        let is_focused = |entry: &TargetEntry| entry.flags & TARGET_FOCUSED != 0;
        let focused = self.watched.iter().filter(|(_, entry)| is_focused(entry));
        let pids: Vec<u32> = focused
            .filter_map(|(tgid, _)| self.pids.get(tgid).copied())
            .collect();
        let bind = self.capabilities.bound_to_process.is_ok()
            && (pids.is_empty() || pids.len() * THREADS_PER_BOUND_ITERATOR <= self.host_threads);
        self.profile = self.links_of("waits", bind, pids.into_iter())?;
        self.profile_is_bound = bind;
        Ok(())
    }

    /// Makes the next scan of holders report exactly the connections with these ports, as their holder sees them
    /// ([`tailback_ebpf::peer_key`]). Returns how many did not fit into the map.
    pub fn request_peers(&mut self, keys: &BTreeSet<u32>) -> Result<usize> {
        let context = "cannot request the holders of connections";
        let requested: BTreeSet<u32> = keys.iter().copied().take(MAX_REQUESTED_PEERS).collect();
        for key in self.peer_keys.difference(&requested) {
            self.requested_peers.remove(key).context(context)?;
        }
        for key in requested.difference(&self.peer_keys) {
            self.requested_peers.insert(*key, 1, 0).context(context)?;
        }
        self.scan_settings.requested_peers = requested.len() as u32;
        self.peer_keys = requested;
        self.write_scan_settings()?;
        Ok(keys.len() - self.peer_keys.len())
    }

    /// For the benchmarks: scans the files and threads of these processes with programs that do next to nothing, so
    /// what is measured is the kernel's own cost.
    pub fn bare(&self, processes: &[Watched]) -> Result<Bare> {
        let bind =
            self.capabilities.bound_to_process.is_ok() && processes.len() <= MAX_BOUND_PROCESSES;
        let links = |program| {
            let pids = processes.iter().map(|process| process.pid);
            self.links_of(program, bind, pids)
        };
        Ok(Bare {
            // The first writes records only of the agent's own files, the second only of thread group leaders.
            files: links("file_operations")?,
            threads: links("processes")?,
        })
    }

    /// One bare scan of files.
    pub fn scan_bare_files(&mut self, bare: &Bare) -> Result<()> {
        run_all(&bare.files, &mut self.buffer, &mut |_| {}).context("cannot scan open files")
    }

    /// One bare scan of threads.
    pub fn scan_bare_threads(&mut self, bare: &Bare) -> Result<()> {
        run_all(&bare.threads, &mut self.buffer, &mut |_| {}).context("cannot scan threads")
    }

    /// Reports every socket, pipe end, io_uring instance and epoll instance of the watched processes.
    pub fn scan_files(&mut self, visit: &mut dyn FnMut(Record<'_>)) -> Result<()> {
        self.scan_settings.focus_slots_left = MAX_FOCUSED_SOCKETS;
        self.scan_settings.number = self.scan_settings.number.wrapping_add(1);
        self.write_scan_settings()?;
        // A batched scan reports listeners that are in `FOCUSED_SOCKETS` already without renewing their entries, which may name
        // a former holder. Only the kernel's own iterator renews them.
        let refocus_all = std::mem::take(&mut self.focus_is_stale);
        for links in &self.links {
            let Some(files) = &links.files else { continue };
            let scanned = match (&links.batched, &mut self.output) {
                (Some(batched), Some(output)) if !refocus_all => {
                    batched.scan_files(files, output, &mut self.buffer, visit)
                }
                _ => run(files, &mut self.buffer, visit),
            };
            unless_gone(scanned).context("cannot scan open files")?;
        }
        self.flush_log();
        Ok(())
    }

    /// Reports every listener that a file scan has found, and the busy sockets of focused targets. `false` if this kernel
    /// does not support it.
    pub fn scan_focused_sockets(&mut self, visit: &mut dyn FnMut(Record<'_>)) -> Result<bool> {
        let Some(link) = &self.focused_sockets else {
            return Ok(false);
        };
        run(link, &mut self.buffer, visit).context("cannot scan focused sockets")?;
        self.flush_log();
        Ok(true)
    }

    /// Reports every thread of the watched processes.
    pub fn scan_threads(&mut self, visit: &mut dyn FnMut(Record<'_>)) -> Result<()> {
        for links in &self.links {
            let Some(threads) = &links.threads else {
                continue;
            };
            let scanned = match (&links.batched, &mut self.output) {
                (Some(batched), Some(output)) => {
                    batched.scan_threads(threads, output, &mut self.buffer, visit)
                }
                _ => run(threads, &mut self.buffer, visit),
            };
            unless_gone(scanned).context("cannot scan threads")?;
        }
        self.flush_log();
        Ok(())
    }

    /// Bytes of records read from batched scans so far, as opposed to the kernel's own iterators.
    pub fn batched_bytes(&self) -> u64 {
        self.output.as_ref().map_or(0, SharedBuffer::bytes_read)
    }

    /// Calls `visit(tgid, open, limit)` with the number of files that each watched process had open at the latest file
    /// scan, and its RLIMIT_NOFILE (0: unknown).
    pub fn open_files(&self, mut visit: impl FnMut(u32, u32, u64)) {
        for tgid in self.watched.keys() {
            if let Ok(TargetPod(entry)) = self.targets.get(tgid, 0)
                && entry.scan == self.scan_settings.number
            {
                visit(*tgid, entry.open, entry.limit);
            }
        }
    }

    /// Reports what every thread of the watched processes waits for.
    pub fn scan_waits(&mut self, visit: &mut dyn FnMut(Record<'_>)) -> Result<()> {
        let waits = self.links.iter().filter_map(|links| links.waits.as_ref());
        run_all(waits, &mut self.buffer, visit).context("cannot scan what threads wait for")
    }

    /// Reports what every thread of the focused processes waits for.
    pub fn scan_profile(&mut self, visit: &mut dyn FnMut(Record<'_>)) -> Result<()> {
        let is_over_all = !self.profile_is_bound;
        if is_over_all {
            self.scan_settings.only_focused = 1;
            self.write_scan_settings()?;
        }
        let result = run_all(&self.profile, &mut self.buffer, visit)
            .context("cannot scan what the threads of focused processes wait for");
        if is_over_all {
            self.scan_settings.only_focused = 0;
            self.write_scan_settings()?;
        }
        result
    }

    /// Reports the CPU time of every thread on the host.
    pub fn scan_cpu_times(&mut self, visit: &mut dyn FnMut(Record<'_>)) -> Result<()> {
        run_all(&self.cpu_times, &mut self.buffer, visit)
            .context("cannot scan the threads of the host")
    }

    /// Reports the control groups of these watched processes, by their pids in the agent's namespace, and the parents of those
    /// groups. Where iterators cannot be bound, those of all watched processes.
    pub fn scan_cgroups(&mut self, pids: &[u32], visit: &mut dyn FnMut(Record<'_>)) -> Result<()> {
        if self.capabilities.cgroups.is_err() || pids.is_empty() {
            return Ok(());
        }
        let overs: Vec<IterScope> = if self.capabilities.bound_to_process.is_ok() {
            pids.iter().copied().map(IterScope::Thread).collect()
        } else {
            vec![IterScope::All]
        };
        for over in overs {
            let Some(link) = self.link("cgroups", over)? else {
                continue;
            };
            unless_gone(run(&link, &mut self.buffer, visit))
                .context("cannot scan control groups")?;
        }
        Ok(())
    }

    /// Reports every process on the host.
    pub fn scan_processes(&mut self, visit: &mut dyn FnMut(Record<'_>)) -> Result<()> {
        run(&self.processes, &mut self.buffer, visit).context("cannot scan processes")
    }

    /// Reports every listening socket, pipe end and unix socket of every process, and the requested connections.
    pub fn scan_holders(&mut self, visit: &mut dyn FnMut(Record<'_>)) -> Result<()> {
        run_all(&self.holders, &mut self.buffer, visit)
            .context("cannot scan the holders of sockets and pipes")
    }

    /// Prints the debug lines of the programs, with `--log-bpf`.
    fn flush_log(&mut self) {
        if let Some(log) = &mut self.log {
            log.flush();
        }
    }

    /// The loaded programs by name, for tests.
    pub fn programs(&self) -> impl Iterator<Item = (&str, std::os::fd::BorrowedFd<'_>)> {
        let programs = self.ebpf.programs();
        programs.filter_map(|(name, program)| Some((name, program.fd().ok()?.as_fd())))
    }
}

fn link(ebpf: &Ebpf, program: &str, over: IterScope) -> io::Result<Link> {
    let program: &Iter = ebpf
        .program(program)
        .and_then(|program| program.try_into().ok())
        .ok_or_else(|| io::Error::other("the eBPF object does not contain it"))?;
    let fd = program.fd().map_err(io::Error::other)?;
    Link::create(fd.as_fd(), over)
}

fn run_all<'a>(
    links: impl IntoIterator<Item = &'a Link>,
    buffer: &mut [u8],
    visit: &mut dyn FnMut(Record<'_>),
) -> io::Result<()> {
    for link in links {
        unless_gone(run(link, buffer, visit))?;
    }
    Ok(())
}

/// Ignores the error of a bound iterator whose process is gone.
fn unless_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    }
}

/// Runs one scan from start to end.
pub(super) fn run(
    link: &Link,
    buffer: &mut [u8],
    visit: &mut dyn FnMut(Record<'_>),
) -> io::Result<()> {
    let mut scan = link.open()?;
    loop {
        match scan.read(buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => decode(&buffer[..len], visit)?,
            // EAGAIN: the kernel visited a million objects without a record and pauses (`MAX_ITER_OBJECTS`,
            // kernel/bpf/bpf_iter.c); the next read continues.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
