//! The glance tier: the iterators, loaded once (`load`) and run on the agent's clock. No hook of any kind.

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
pub use load::{BTF_PATH, Plan};
use tailback_ebpf::{MAX_WANTED, TARGET_HOT, TargetEntry, Walk};

pub use super::records::Record;
use super::{
    batched_scan::Quick,
    iter::{Link, Over},
    output_buffer::Shared,
    records::decode,
};

/// Up to so many processes each have iterators of their own; beyond, one walk over the whole machine is cheaper.
const MAX_BOUND_PROCESSES: usize = 32;

/// Tasks that one walk over all can pass by at the price of one iterator bound to a process (`bench-walk` measures both).
const TASKS_PER_BOUND: usize = 16;

/// Busy sockets of hot targets that one walk over files marks for a closer look.
const MAX_MARKS: u32 = 256;

/// What the programs fill in of an entry is theirs.
const NO_ENTRY: TargetEntry = TargetEntry {
    start_ns: 0,
    flags: 0,
    walk: 0,
    limit: 0,
    open: 0,
    reserved: 0,
};

/// A watched process, as the programs know it and as the agent's /proc shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Watched {
    /// In the initial pid namespace.
    pub tgid: u32,
    /// In the agent's own.
    pub pid: u32,
    /// CLOCK_BOOTTIME at its start.
    pub start_ns: u64,
}

/// The loaded object and its iterators.
pub struct Glance {
    // Field order is drop order: links before the programs they run.
    /// Of each watched process, or one of all of the machine.
    links: Vec<Links>,
    /// What threads of hot processes wait for: an iterator for each of them, or one for all tasks.
    profile: Vec<Link>,
    profile_is_bound: bool,
    /// Threads of the machine, as last told.
    tasks: usize,
    marked: Option<Link>,
    holders: Link,
    processes: Link,
    census: Link,
    /// The program that walks over files.
    files_program: &'static str,
    /// The program that says what threads wait for.
    waits_program: &'static str,
    walk_settings: Walk,
    targets: HashMap<MapData, u32, TargetPod>,
    wanted: HashMap<MapData, u32, u32>,
    wanted_keys: BTreeSet<u32>,
    /// The watched processes, hot ones flagged as such.
    known: BTreeMap<u32, TargetEntry>,
    /// Their pids.
    pids: BTreeMap<u32, u32>,
    walk: Array<MapData, WalkPod>,
    plan: Plan,
    /// What quick walks write.
    sheet: Option<Shared>,
    /// Sockets of a new process are not marked yet, and marks of one that ended name it still.
    marks_are_old: bool,
    buffer: Box<[u8]>,
    ebpf: Ebpf,
}

/// What a process, or all of the machine, is looked at with.
struct Links {
    files: Link,
    threads: Link,
    waits: Link,
    quick: Option<Quick>,
}

/// See [`Glance::bare`].
pub struct Bare {
    files: Vec<Link>,
    threads: Vec<Link>,
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct WalkPod(Walk);
// SAFETY: `Walk` is plain old data (bytemuck checks it).
unsafe impl aya::Pod for WalkPod {}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct TargetPod(TargetEntry);
// SAFETY: `TargetEntry` is plain old data (bytemuck checks it).
unsafe impl aya::Pod for TargetPod {}

impl Glance {
    fn set_walk(&mut self) -> Result<()> {
        self.walk
            .set(0, WalkPod(self.walk_settings), 0)
            .context("cannot set up the walk over files")
    }

    /// What is used on this kernel, and what is missing.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Watches these processes and no others, from the next walk on.
    pub fn watch(&mut self, processes: &[Watched]) -> Result<()> {
        let mut wanted = BTreeMap::new();
        for process in processes {
            let before = self.known.get(&process.tgid);
            let entry = TargetEntry {
                start_ns: process.start_ns,
                flags: before.map_or(0, |before| before.flags),
                ..NO_ENTRY
            };
            wanted.insert(process.tgid, entry);
        }
        for tgid in self.known.keys().filter(|tgid| !wanted.contains_key(tgid)) {
            // It may be gone already; that is what we want.
            let _ = self.targets.remove(tgid);
        }
        for (tgid, entry) in &wanted {
            if self.known.get(tgid) != Some(entry) {
                self.targets
                    .insert(*tgid, TargetPod(*entry), 0)
                    .with_context(|| format!("cannot watch process {tgid}: too many processes"))?;
            }
        }
        self.known = wanted;
        self.pids = processes
            .iter()
            .map(|process| (process.tgid, process.pid))
            .collect();
        // A walk that was broken off may have left the process that it was at.
        self.set_walk()?;
        let bind = self.plan.bound_to_process.is_ok() && processes.len() <= MAX_BOUND_PROCESSES;
        let over: Vec<Over> = if bind {
            let pids = processes.iter().map(|process| process.pid);
            pids.map(Over::Process).collect()
        } else {
            vec![Over::All]
        };
        let links = over.into_iter().map(|over| self.links_over(over));
        self.links = links.filter_map(Result::transpose).collect::<Result<_>>()?;
        self.marks_are_old = true;
        self.bind_profile()
    }

    /// `None`: the process is gone.
    fn links_over(&self, over: Over) -> Result<Option<Links>> {
        let new = |program| self.link(program, over);
        let (Some(files), Some(threads), Some(waits)) = (
            new(self.files_program)?,
            new("threads")?,
            new(self.waits_program)?,
        ) else {
            return Ok(None);
        };
        let quick = match over {
            Over::Process(pid) if self.plan.quick.is_ok() => self.quick(pid)?,
            _ => None,
        };
        Ok(Some(Links {
            files,
            threads,
            waits,
            quick,
        }))
    }

    fn quick(&self, pid: u32) -> Result<Option<Quick>> {
        let new = |program| self.link(program, Over::Thread(pid));
        let links = new("quick_files")?.zip(new("quick_threads")?);
        Ok(links.map(|(files, threads)| Quick { files, threads }))
    }

    /// `None`: it ended a moment ago; the next look at the processes will say so.
    fn link(&self, program: &str, over: Over) -> Result<Option<Link>> {
        match link(&self.ebpf, program, over) {
            Ok(link) => Ok(Some(link)),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            Err(error) => {
                Err(error).with_context(|| format!("cannot create the iterator {program}"))
            }
        }
    }

    /// One program's, of these processes, or one of all of the machine.
    fn links_of(
        &self,
        program: &str,
        bind: bool,
        pids: impl Iterator<Item = u32>,
    ) -> Result<Vec<Link>> {
        if !bind {
            return Ok(self.link(program, Over::All)?.into_iter().collect());
        }
        let links = pids.map(|pid| self.link(program, Over::Process(pid)));
        links.filter_map(Result::transpose).collect()
    }

    /// Says whose busy sockets the next walk over files marks for a closer look, and what whose threads wait for the
    /// profile tells. `tasks`: how many threads the machine has, for what is the cheaper way to visit those few.
    pub fn set_focused(&mut self, tasks: usize, is_focused: impl Fn(u32) -> bool) -> Result<()> {
        let mut changed = false;
        self.tasks = tasks;
        for (tgid, entry) in &mut self.known {
            let flags = if is_focused(*tgid) { TARGET_HOT } else { 0 };
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

    /// Iterators for the hot processes alone where these are few, else one for all tasks, which passes by the rest.
    fn bind_profile(&mut self) -> Result<()> {
        let is_focused = |entry: &TargetEntry| entry.flags & TARGET_HOT != 0;
        let focused = self.known.iter().filter(|(_, entry)| is_focused(entry));
        let pids: Vec<u32> = focused
            .filter_map(|(tgid, _)| self.pids.get(tgid).copied())
            .collect();
        let bind = self.plan.bound_to_process.is_ok()
            && (pids.is_empty() || pids.len() * TASKS_PER_BOUND <= self.tasks);
        self.profile = self.links_of(self.waits_program, bind, pids.into_iter())?;
        self.profile_is_bound = bind;
        Ok(())
    }

    /// Asks the next walk over holders for connections of these ports, as their holder sees them ([`tailback_ebpf::wanted_key`]), and no
    /// others; answers how many there is no room for.
    pub fn want(&mut self, keys: &BTreeSet<u32>) -> Result<usize> {
        let context = "cannot say whose connections are wanted";
        let wanted: BTreeSet<u32> = keys.iter().copied().take(MAX_WANTED).collect();
        for key in self.wanted_keys.difference(&wanted) {
            self.wanted.remove(key).context(context)?;
        }
        for key in wanted.difference(&self.wanted_keys) {
            self.wanted.insert(*key, 1, 0).context(context)?;
        }
        self.walk_settings.wanted = wanted.len() as u32;
        self.wanted_keys = wanted;
        self.set_walk()?;
        Ok(keys.len() - self.wanted_keys.len())
    }

    /// The walks over files and threads of the watched processes with programs that do next to nothing: what the
    /// kernel takes for itself, for the benchmarks.
    pub fn bare(&self, processes: &[Watched]) -> Result<Bare> {
        let bind = self.plan.bound_to_process.is_ok() && processes.len() <= MAX_BOUND_PROCESSES;
        let links = |program| {
            let pids = processes.iter().map(|process| process.pid);
            self.links_of(program, bind, pids)
        };
        Ok(Bare {
            // They write about the agent itself, and about processes.
            files: links("operations")?,
            threads: links("processes")?,
        })
    }

    /// One walk over files that tells nothing.
    pub fn walk_bare_files(&mut self, bare: &Bare) -> Result<()> {
        run_all(&bare.files, &mut self.buffer, &mut |_| {}).context("cannot walk over open files")
    }

    /// One walk over threads that tells nothing but the processes.
    pub fn walk_bare_threads(&mut self, bare: &Bare) -> Result<()> {
        run_all(&bare.threads, &mut self.buffer, &mut |_| {}).context("cannot walk over threads")
    }

    /// Every TCP socket and pipe of the watched processes.
    pub fn walk_files(&mut self, visit: &mut dyn FnMut(Record<'_>)) -> Result<()> {
        self.walk_settings.marks_left = MAX_MARKS;
        self.walk_settings.walk = self.walk_settings.walk.wrapping_add(1);
        self.set_walk()?;
        // Only the kernel's own walk marks them.
        let all_are_to_be_marked = std::mem::take(&mut self.marks_are_old);
        for links in &self.links {
            let walked = match (&links.quick, &mut self.sheet) {
                (Some(quick), Some(sheet)) if !all_are_to_be_marked => {
                    quick.walk_files(&links.files, sheet, &mut self.buffer, visit)
                }
                _ => run(&links.files, &mut self.buffer, visit),
            };
            unless_gone(walked).context("cannot walk over open files")?;
        }
        Ok(())
    }

    /// Every marked socket: the listeners that a walk over files has met, and the busy sockets of hot targets.
    /// `false` where this kernel cannot do it.
    pub fn walk_marked(&mut self, visit: &mut dyn FnMut(Record<'_>)) -> Result<bool> {
        match &self.marked {
            Some(link) => run(link, &mut self.buffer, visit)
                .context("cannot walk over marked sockets")
                .map(|()| true),
            None => Ok(false),
        }
    }

    /// Every thread of the watched processes.
    pub fn walk_threads(&mut self, visit: &mut dyn FnMut(Record<'_>)) -> Result<()> {
        for links in &self.links {
            let walked = match (&links.quick, &mut self.sheet) {
                (Some(quick), Some(sheet)) => {
                    quick.walk_threads(&links.threads, sheet, &mut self.buffer, visit)
                }
                _ => run(&links.threads, &mut self.buffer, visit),
            };
            unless_gone(walked).context("cannot walk over threads")?;
        }
        Ok(())
    }

    /// Bytes of records that quick walks have told of, rather than the kernel's own.
    pub fn told_quickly(&self) -> u64 {
        self.sheet.as_ref().map_or(0, Shared::told)
    }

    /// How many files each watched process had open at the last walk over files, and how many it may open (0: unknown).
    pub fn open_files(&self, mut visit: impl FnMut(u32, u32, u64)) {
        for tgid in self.known.keys() {
            if let Ok(TargetPod(entry)) = self.targets.get(tgid, 0)
                && entry.walk == self.walk_settings.walk
            {
                visit(*tgid, entry.open, entry.limit);
            }
        }
    }

    /// What every thread of the watched processes waits for.
    pub fn walk_waits(&mut self, visit: &mut dyn FnMut(Record<'_>)) -> Result<()> {
        let waits = self.links.iter().map(|links| &links.waits);
        run_all(waits, &mut self.buffer, visit).context("cannot walk over what threads wait for")
    }

    /// What every thread of the hot processes waits for.
    pub fn walk_profile(&mut self, visit: &mut dyn FnMut(Record<'_>)) -> Result<()> {
        let select = !self.profile_is_bound;
        if select {
            self.walk_settings.only_hot = 1;
            self.set_walk()?;
        }
        let done = run_all(&self.profile, &mut self.buffer, visit)
            .context("cannot walk over what the threads of suspicious processes wait for");
        if select {
            self.walk_settings.only_hot = 0;
            self.set_walk()?;
        }
        done
    }

    /// CPU time of every thread of the machine.
    pub fn walk_census(&mut self, visit: &mut dyn FnMut(Record<'_>)) -> Result<()> {
        run(&self.census, &mut self.buffer, visit).context("cannot walk over the machine's threads")
    }

    /// Every process of the machine.
    pub fn walk_processes(&mut self, visit: &mut dyn FnMut(Record<'_>)) -> Result<()> {
        run(&self.processes, &mut self.buffer, visit).context("cannot walk over processes")
    }

    /// Every listening socket, pipe end and unix socket of every process, and the connections that are asked for.
    pub fn walk_holders(&mut self, visit: &mut dyn FnMut(Record<'_>)) -> Result<()> {
        run(&self.holders, &mut self.buffer, visit).context("cannot walk over who holds what")
    }
}

fn link(ebpf: &Ebpf, program: &str, over: Over) -> io::Result<Link> {
    let program: &Iter = ebpf
        .program(program)
        .and_then(|program| program.try_into().ok())
        .ok_or_else(|| io::Error::other("no such iterator in the eBPF object"))?;
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

/// That the process is gone whose walk this was is no failure.
fn unless_gone(walked: io::Result<()>) -> io::Result<()> {
    match walked {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    }
}

pub(super) fn run(
    link: &Link,
    buffer: &mut [u8],
    visit: &mut dyn FnMut(Record<'_>),
) -> io::Result<()> {
    let mut walk = link.open()?;
    loop {
        match walk.read(buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => decode(&buffer[..len], visit)?,
            // A million objects without a record: the kernel asks us to go on.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
