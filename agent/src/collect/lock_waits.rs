//! Finds the holders of the locks that threads in the focus scope wait for, if processes can share these locks. Locks on files are
//! found by /proc/locks, mutexes in shared memory by the thread number in the futex and the memory mapped there.
//!
//! Some programs retry a file lock after a sleep. A thread is assumed to do so if it sleeps again and again while another process
//! holds an exclusive lock on a file that it has open, unless it also sleeps while nobody holds that lock.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    hash::Hasher as _,
};

use rustc_hash::FxHasher;
use rustix::fs::FileType;

use super::{
    file_locks::{FileId, FileLocks, HeldLock, holds_a_lock},
    lock_calls::{file_lock_descriptor, is_sleep, shared_mutex},
    notices::Notices,
    paths::{identity, link, read_text},
    processes::Processes,
    shared_memory::Maps,
};
use crate::{
    sample::{LockHolder, LockWait, SharedLock, State, Wait},
    target::ProcessInfo,
    text::harmless,
};

/// Maximum number of waiting threads reported.
const MAX_WAITS: usize = 1_024;
/// Maximum number of sleeping threads whose files are examined in one search.
const MAX_SLEEPERS: usize = 64;
/// Maximum number of open files examined per sleeping process.
const MAX_FILES: usize = 256;
/// Maximum number of open files examined in one search for the holder of a lock that records no process.
const MAX_SEARCHED_FILES: usize = 16_384;
/// Maximum size of the text read from /proc/locks, bytes: 100,000 lines of typical length.
const MAX_LOCKS_BYTES: u64 = 8 << 20;
/// A thread that sleeps less often than this per second does not retry a lock. SQLite's busy handler sleeps at most 100 ms.
const MIN_RETRIES_PER_S: u64 = 4;
/// Number of sleeps seen after which the counts of a thread are halved, so that they can follow a change.
const MAX_SLEEPS: u32 = 64;
/// A thread does not retry a lock if more than this share of its sleeps are seen while nobody else holds a lock on its files. Not
/// 0, because a sleep lasts a little longer than the lock.
const MAX_FREE_SHARE: f64 = 0.34;
/// Threads that start after boot have higher numbers than this (RESERVED_PIDS in kernel/pid.c).
const MAX_RESERVED_PID: u32 = 300;
/// Number of generations of parents that are compared with the holder of a lock.
const MAX_PARENTS: usize = 8;

#[derive(Default)]
pub(super) struct LockWaits {
    /// Threads asleep in the last search, by tgid and tid.
    sleepers: HashMap<(u32, u32), Sleeper>,
    /// The last search found something.
    has_found: bool,
}

/// A thread that sleeps for a time, search after search.
#[derive(Clone, Copy, Default)]
struct Sleeper {
    /// Voluntary context switches at the last search, and when that was, CLOCK_MONOTONIC, ns.
    voluntary: u64,
    at_ns: u64,
    /// Number of sleeps seen while another process held an exclusive lock on one of its files, and of other sleeps.
    held: u32,
    free: u32,
}

impl LockWaits {
    /// Finds the holders of the locks that these threads wait for. `None`: nothing to report. `processes` are all processes
    /// of the machine.
    pub(super) fn search(
        &mut self,
        now_ns: u64,
        threads: &[&Wait],
        processes: &Processes,
        notices: &mut Notices,
    ) -> Option<Vec<LockWait>> {
        let mut found = Vec::new();
        let asleep = threads.iter().filter(|wait| wait.state == State::Sleeping);
        let asleep: Vec<&Wait> = asleep.copied().collect();
        let blocked: Vec<(&Wait, u32)> = asleep
            .iter()
            .filter_map(|wait| Some((*wait, file_lock_descriptor(wait)?)))
            .collect();
        let sleepers = asleep.iter().filter(|wait| is_sleep(wait));
        let sleepers: Vec<&Wait> = sleepers.copied().collect();
        let some_wake_often = sleepers.iter().take(MAX_SLEEPERS).any(|wait| {
            let sleeper = self.sleepers.get(&(wait.tgid, wait.tid));
            sleeper.is_some_and(|sleeper| sleeper.wakes_often(wait, now_ns))
        });
        let mut locks = FileLocks::default();
        if some_wake_often || !blocked.is_empty() {
            locks = FileLocks::parse(&read_text("/proc/locks", MAX_LOCKS_BYTES));
        }
        if locks.left_out > 0 {
            notices.report_once("too_many_file_locks", || {
                format!(
                    "/proc/locks has too many lines: {} were ignored",
                    locks.left_out
                )
            });
        }
        let mut search = FileSearch {
            locks: &locks,
            processes,
            by_description: HashMap::new(),
            searched: 0,
        };
        found.extend(
            blocked
                .iter()
                .take(MAX_WAITS)
                .map(|(wait, fd)| search.blocked(wait, *fd)),
        );
        self.find_sleepers(now_ns, &sleepers, &mut search, &mut found);
        let mut maps = Maps::default();
        // Many threads may wait for one mutex.
        let mut known: HashMap<(u32, u64, u32, bool), Option<LockWait>> = HashMap::new();
        let mutexes = asleep.iter().filter_map(|wait| {
            let (address, owner) = shared_mutex(wait)?;
            let key = (wait.tgid, address, owner, wait.own_tid == wait.tid);
            let lock = known
                .entry(key)
                .or_insert_with(|| memory(wait, (address, owner), threads, processes, &mut maps));
            lock.clone().map(|lock| lock.of(wait))
        });
        found.extend(mutexes.take(MAX_WAITS));
        found.truncate(MAX_WAITS);
        let had_found = std::mem::replace(&mut self.has_found, !found.is_empty());
        (self.has_found || had_found).then_some(found)
    }

    fn find_sleepers(
        &mut self,
        now_ns: u64,
        threads: &[&Wait],
        search: &mut FileSearch<'_>,
        found: &mut Vec<LockWait>,
    ) {
        let exclusive = search.locks.exclusive();
        let mut sleepers = HashMap::new();
        let mut by_process: BTreeMap<u32, Option<LockWait>> = BTreeMap::new();
        for wait in threads.iter().take(MAX_SLEEPERS) {
            let key = (wait.tgid, wait.tid);
            let mut sleeper = self.sleepers.get(&key).copied().unwrap_or_default();
            if sleeper.wakes_often(wait, now_ns) {
                let held = by_process
                    .entry(wait.tgid)
                    .or_insert_with(|| search.held_by_others(wait, &exclusive));
                sleeper.count(held.is_some());
                if let Some(held) = held.as_ref().filter(|_| sleeper.is_retrying()) {
                    found.push(held.clone().of(wait));
                }
            }
            sleeper.voluntary = wait.voluntary;
            sleeper.at_ns = now_ns;
            sleepers.insert(key, sleeper);
        }
        self.sleepers = sleepers;
    }

    /// Forgets all sleepers: nothing is focused any more.
    pub(super) fn clear(&mut self) {
        self.sleepers.clear();
    }
}

impl Sleeper {
    /// Whether it woke often enough since the last search to retry a lock.
    fn wakes_often(&self, wait: &Wait, now_ns: u64) -> bool {
        let elapsed_ns = now_ns.saturating_sub(self.at_ns);
        let woken = wait.voluntary.saturating_sub(self.voluntary);
        let least = (elapsed_ns / (1_000_000_000 / MIN_RETRIES_PER_S)).max(1);
        self.at_ns > 0 && woken >= least
    }

    fn count(&mut self, is_held: bool) {
        if is_held {
            self.held += 1;
        } else {
            self.free += 1;
        }
        if self.held + self.free > MAX_SLEEPS {
            self.held /= 2;
            self.free /= 2;
        }
    }

    /// Whether it sleeps because of the lock.
    fn is_retrying(&self) -> bool {
        f64::from(self.free) <= f64::from(self.held + self.free) * MAX_FREE_SHARE
    }
}

/// The search for the holders of locks on files.
struct FileSearch<'a> {
    locks: &'a FileLocks,
    processes: &'a Processes,
    /// Holders of locks that do not record a living process, by file.
    by_description: HashMap<FileId, Option<u32>>,
    /// Number of open files examined to find these holders.
    searched: usize,
}

impl<'a> FileSearch<'a> {
    /// A thread that is blocked in a system call on a lock of this descriptor's file.
    fn blocked(&mut self, wait: &Wait, fd: u32) -> LockWait {
        let pid = self.processes.get(wait.tgid).map(|process| process.pid);
        let own = pid.and_then(|pid| file_id(pid, fd));
        let blocking = pid.map_or(&[][..], |pid| self.locks.blocking(pid));
        let by_file = |(file, _): &&(FileId, HeldLock)| own == Some(*file);
        let of_waiter = blocking.iter().find(by_file).copied();
        // The device number in stat can differ from that in /proc/locks.
        let of_waiter = of_waiter.or(match blocking {
            [only] => Some(*only),
            _ => None,
        });
        let lock = of_waiter.or_else(|| {
            let held = self.locks.on(own?).iter();
            let strongest = held.max_by_key(|lock| lock.exclusive)?;
            Some((own?, *strongest))
        });
        let holder = lock.and_then(|(file, lock)| self.holder(file, lock, Some(wait.tgid)));
        LockWait {
            tgid: wait.tgid,
            tid: wait.tid,
            voluntary: wait.voluntary,
            id: lock.map_or(0, |(file, _)| id_of(file)),
            lock: SharedLock::File {
                path: pid.and_then(|pid| link(pid, fd)),
                polled: false,
            },
            holder: holder.map_or(LockHolder::Unknown, |holder| {
                LockHolder::Process(holder.tgid)
            }),
            holder_name: holder.map_or_else(String::new, |holder| harmless(&holder.comm)),
        }
    }

    /// A file that this process has open and that another process holds an exclusive lock on.
    fn held_by_others(&mut self, wait: &Wait, exclusive: &BTreeSet<FileId>) -> Option<LockWait> {
        if exclusive.is_empty() {
            return None;
        }
        let pid = self.processes.get(wait.tgid)?.pid;
        for fd in descriptors(pid).take(MAX_FILES) {
            let Some(file) = file_id(pid, fd).filter(|file| exclusive.contains(file)) else {
                continue;
            };
            let locks = self.locks;
            for lock in locks.on(file).iter().filter(|lock| lock.exclusive) {
                let Some(holder) = self.holder(file, *lock, None) else {
                    continue;
                };
                // Children inherit the files of their parents, and do not retry the locks on them.
                if holder.tgid == wait.tgid || self.is_ancestor(holder.tgid, wait.tgid) {
                    continue;
                }
                return Some(LockWait {
                    tgid: wait.tgid,
                    tid: wait.tid,
                    voluntary: wait.voluntary,
                    id: id_of(file),
                    lock: SharedLock::File {
                        path: link(pid, fd),
                        polled: true,
                    },
                    holder: LockHolder::Process(holder.tgid),
                    holder_name: harmless(&holder.comm),
                });
            }
        }
        None
    }

    /// The process that holds a lock. If several share the open file description, it is one of those other than `waiter`.
    fn holder(
        &mut self,
        file: FileId,
        lock: HeldLock,
        waiter: Option<u32>,
    ) -> Option<&'a ProcessInfo> {
        let all = self.processes.all();
        if let Some(pid) = lock.pid
            && let Some(process) = all.iter().find(|process| process.pid == pid)
        {
            return Some(process);
        }
        let tgid = match self.by_description.get(&file) {
            Some(known) => *known,
            None => {
                let found = self.search_descriptions(file, waiter);
                self.by_description.insert(file, found);
                found
            }
        };
        self.processes.get(tgid?)
    }

    /// A process with an open file description that holds a lock on this file: watched processes first, then all others.
    fn search_descriptions(&mut self, file: FileId, waiter: Option<u32>) -> Option<u32> {
        let watched: BTreeSet<u32> = self.processes.watched().iter().map(|it| it.tgid).collect();
        let others = self.processes.all().iter();
        let others = others.filter(|it| !watched.contains(&it.tgid) && !it.kernel);
        for process in self.processes.watched().iter().chain(others) {
            if waiter == Some(process.tgid) {
                continue;
            }
            let pid = process.pid;
            for fd in descriptors(pid).take(MAX_FILES) {
                self.searched += 1;
                if self.searched > MAX_SEARCHED_FILES {
                    return None;
                }
                if file_id(pid, fd) == Some(file)
                    && holds_a_lock(
                        &read_text(&format!("/proc/{pid}/fdinfo/{fd}"), 1 << 16),
                        file,
                    )
                {
                    return Some(process.tgid);
                }
            }
        }
        None
    }

    fn is_ancestor(&self, tgid: u32, of: u32) -> bool {
        let mut at = of;
        for _ in 0..MAX_PARENTS {
            match self.processes.get(at) {
                Some(process) if process.parent == tgid => return true,
                Some(process) if process.parent != at => at = process.parent,
                _ => return false,
            }
        }
        false
    }
}

/// The wait of a thread for a mutex in memory that its process shares with that of the mutex's owner.
fn memory(
    wait: &Wait,
    (address, owner): (u64, u32),
    threads: &[&Wait],
    processes: &Processes,
    maps: &mut Maps,
) -> Option<LockWait> {
    let process = processes.get(wait.tgid)?;
    let place = maps.place(process.pid, address)?;
    // Numbers in another PID namespace than the agent's are known for watched threads only.
    let is_plain = wait.own_tid == wait.tid && process.pid == process.tgid;
    let shares = |tgid: u32, maps: &mut Maps| {
        let other = processes.get(tgid);
        other.is_some_and(|other| maps.has(other.pid, place))
    };
    let seen = threads
        .iter()
        .find(|one| one.own_tid == owner && one.tgid != wait.tgid && shares(one.tgid, maps));
    let holder = match seen {
        Some(one) => LockHolder::Thread {
            tgid: one.tgid,
            tid: one.tid,
        },
        None if !is_plain => return None,
        None => match process_of(owner).filter(|tgid| shares(*tgid, maps)) {
            Some(tgid) => LockHolder::Thread { tgid, tid: owner },
            // If the word beside the futex is not an owner, it is smaller: a counter or a flag.
            None if owner > MAX_RESERVED_PID => LockHolder::Exited(owner),
            None => return None,
        },
    };
    let holder_name = holder.tgid().map(|tgid| processes.name(tgid));
    let mut hasher = FxHasher::default();
    hasher.write_u64(id_of(place.file));
    hasher.write_u64(place.offset);
    Some(LockWait {
        tgid: wait.tgid,
        tid: wait.tid,
        voluntary: wait.voluntary,
        id: hasher.finish(),
        lock: SharedLock::Memory { address },
        holder,
        holder_name: holder_name.unwrap_or_default(),
    })
}

/// The process that a thread belongs to.
fn process_of(tid: u32) -> Option<u32> {
    let status = read_text(&format!("/proc/{tid}/status"), 1 << 16);
    let tgid = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
    tgid?.trim().parse().ok()
}

/// Identifies a file in a sample.
fn id_of((major, minor, inode): FileId) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write_u32(major);
    hasher.write_u32(minor);
    hasher.write_u64(inode);
    hasher.finish()
}

/// The descriptors of a process.
fn descriptors(pid: u32) -> impl Iterator<Item = u32> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"));
    let entries = entries.into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The id by which /proc/locks usually lists the regular file behind a descriptor.
fn file_id(pid: u32, fd: u32) -> Option<FileId> {
    let found = identity(pid, fd)?;
    let is_file = FileType::from_raw_mode(found.stx_mode.into()) == FileType::RegularFile;
    is_file.then_some((found.stx_dev_major, found.stx_dev_minor, found.stx_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(voluntary: u64) -> Wait {
        Wait {
            tgid: 7,
            tid: 8,
            own_tid: 8,
            comm: String::new(),
            state: State::Sleeping,
            io: false,
            syscall: None,
            voluntary,
            involuntary: 0,
            cpu_ns: 0,
            run_delay_ns: 0,
        }
    }

    #[test]
    fn a_thread_that_sleeps_for_long_does_not_retry_a_lock() {
        let sleeper = Sleeper {
            voluntary: 10,
            at_ns: 1_000_000_000,
            ..Sleeper::default()
        };
        assert!(!sleeper.wakes_often(&wait(10), 1_100_000_000));
        assert!(sleeper.wakes_often(&wait(11), 1_250_000_000));
        assert!(!sleeper.wakes_often(&wait(11), 2_000_000_000));
        assert!(sleeper.wakes_often(&wait(14), 2_000_000_000));
        assert!(!Sleeper::default().wakes_often(&wait(14), 2_000_000_000));
    }

    #[test]
    fn a_thread_that_also_sleeps_while_nobody_holds_the_lock_does_not_retry_it() {
        let mut sleeper = Sleeper::default();
        for round in 0..1_000 {
            sleeper.count(round % 2 == 0);
        }
        assert!(!sleeper.is_retrying());
        for _ in 0..100 {
            sleeper.count(true);
        }
        assert!(sleeper.is_retrying());
    }
}
