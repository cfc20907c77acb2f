//! Worker pools: how many threads they have, how many are busy, and with what.
//!
//! Threads belong to one pool if their names differ only in digits. A worker is idle while it waits for work: in accept,
//! in epoll_wait, or on a condition variable. An event loop is not a worker, since it serves many connections at once.

use crate::hash::{HashMap, HashSet};
use std::{collections::BTreeMap, sync::Arc};

use super::{
    Kind, QueueId, Reading, Sink, Source, Targets, UTILIZATION,
    eventloop::EpollHistory,
    syscalls::{CallClass, Futex, Lock, call_of, descriptor},
};
use crate::{
    in_order::InOrder,
    sample::{Detail, Sample, State, Syscall, TargetId, Wait},
};

#[derive(Default)]
pub(super) struct Workers {
    /// By process and thread.
    threads: HashMap<(u32, u32), Known>,
    /// Roles of connections, by process and descriptor.
    roles: InOrder<Seen>,
    /// Number of file scans so far.
    scans: u64,
}

/// State kept per thread.
#[derive(Default)]
struct Known {
    epoll_history: EpollHistory,
    comm: Box<str>,
    /// The pool of `comm`.
    pool: Arc<str>,
}

impl Known {
    /// Updates the name of the thread, which it may change.
    fn rename(&mut self, comm: &str) {
        if *self.comm != *comm {
            self.comm = comm.into();
            self.pool = pool_name(comm).into();
        }
    }
}

/// Which end of a connection the target is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Accepted,
    Opened,
}

/// A connection, and the last scan that saw it.
struct Seen {
    scan: u64,
    role: Role,
}

/// What a worker is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WorkerState {
    Running,
    Runnable,
    /// Waiting for work.
    Idle,
    /// Waiting for work, or for a result of another thread: on a futex of its own, the two are indistinguishable.
    Parked,
    /// Reading from an accepted connection: a client occupies the worker without using it.
    Client,
    Downstream,
    Lock,
    Disk,
    Other,
    /// The system call is not known.
    Unknown,
}

/// One pool at one sample.
#[derive(Default)]
struct Group {
    size: u64,
    running: u64,
    runnable: u64,
    idle: u64,
    parked: u64,
    client: u64,
    downstream: u64,
    lock: u64,
    disk: u64,
    other: u64,
    unknown: u64,
    /// Members that are event loops.
    loops: u64,
    /// Members that are the only thread of their process.
    alone: u64,
}

impl Source for Workers {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if sample.scans.files {
            self.scan_roles(sample, targets);
        }
        if !sample.scans.waits {
            return;
        }
        let overview = Overview::of(sample);
        let mut groups: BTreeMap<(TargetId, Arc<str>), Group> = BTreeMap::new();
        let mut threads = HashMap::with_capacity_and_hasher(sample.waits.len(), Default::default());
        for wait in &sample.waits {
            let Some(target) = targets.of(wait.tgid).filter(|_| wait.state != State::Dead) else {
                continue;
            };
            let key = (wait.tgid, wait.tid);
            let mut known = self.threads.remove(&key).unwrap_or_default();
            known.rename(&wait.comm);
            let doing = self.doing(wait, &overview);
            let in_epoll = matches!(call_of(wait), Some((_, CallClass::Epoll)));
            let parked = matches!(doing, WorkerState::Idle | WorkerState::Parked) && !in_epoll;
            known.epoll_history.observe(in_epoll, parked);
            let pool = (target, Arc::clone(&known.pool));
            let group = groups.entry(pool).or_default();
            group.add(doing);
            group.loops += u64::from(known.epoll_history.is_loop());
            group.alone += u64::from(overview.threads_of(wait.tgid) == 1);
            threads.insert(key, known);
        }
        self.threads = threads;
        for ((target, name), group) in groups {
            if group.is_pool(targets.threads(target)) {
                let id = QueueId::Pool(name);
                sink.put(target, Kind::Workers, &id, group.reading());
            }
        }
        sink.forget_unseen(Kind::Workers);
    }
}

/// Facts about all threads that the classification of one needs.
struct Overview {
    threads: HashMap<u32, u32>,
    own_tids: HashSet<(u32, u32)>,
    /// Number of threads asleep on each futex, by process and address.
    sleepers: HashMap<(u32, u64), u32>,
}

impl Overview {
    fn of(sample: &Sample) -> Self {
        let mut overview = Self {
            threads: HashMap::default(),
            own_tids: HashSet::default(),
            sleepers: HashMap::default(),
        };
        for wait in &sample.waits {
            *overview.threads.entry(wait.tgid).or_default() += 1;
            overview.own_tids.insert((wait.tgid, wait.own_tid));
            if let Some((_, CallClass::Futex)) = call_of(wait)
                && let Some(Syscall { args, .. }) = &wait.syscall
            {
                *overview.sleepers.entry((wait.tgid, args[0])).or_default() += 1;
            }
        }
        overview
    }

    fn threads_of(&self, tgid: u32) -> u32 {
        self.threads.get(&tgid).copied().unwrap_or(0)
    }
}

impl Workers {
    fn scan_roles(&mut self, sample: &Sample, targets: &Targets) {
        self.scans += 1;
        let scan = self.scans;
        for connection in &sample.connections {
            let accepted = targets.listens(connection.netns, connection.local.port());
            let role = if accepted {
                Role::Accepted
            } else {
                Role::Opened
            };
            let (key, seen) = (
                descriptor_key(connection.tgid, connection.fd),
                Seen { scan, role },
            );
            match self.roles.next(key) {
                Some(known) => *known = seen,
                None => {
                    self.roles.insert(key, seen);
                }
            }
        }
        self.roles.retain(|seen| seen.scan == scan);
    }

    fn doing(&self, wait: &Wait, overview: &Overview) -> WorkerState {
        match wait.state {
            State::Running => return WorkerState::Running,
            State::Runnable => return WorkerState::Runnable,
            State::Stopped | State::Dead => return WorkerState::Other,
            State::Uninterruptible if wait.io => return WorkerState::Disk,
            State::Uninterruptible | State::Sleeping => {}
        }
        let Some(syscall) = &wait.syscall else {
            return match wait.state {
                State::Uninterruptible => WorkerState::Other,
                _ => WorkerState::Unknown,
            };
        };
        let file_wait = wait.state == State::Uninterruptible;
        match call_of(wait) {
            Some((_, CallClass::Sync)) => WorkerState::Disk,
            Some((_, CallClass::Read | CallClass::Write | CallClass::Path)) if file_wait => {
                WorkerState::Disk
            }
            Some((_, CallClass::Accept | CallClass::Epoll | CallClass::Sleep)) => WorkerState::Idle,
            Some((_, CallClass::Poll)) => self.polling(wait.tgid, &syscall.detail),
            Some((_, CallClass::Read)) => match self.role(wait.tgid, descriptor(syscall)) {
                Some(Role::Accepted) => WorkerState::Client,
                Some(Role::Opened) => WorkerState::Downstream,
                None => WorkerState::Other,
            },
            Some((_, CallClass::Futex)) => {
                let is_thread = |tid| overview.own_tids.contains(&(wait.tgid, tid));
                let futex = Futex::of(wait, is_thread);
                let sleepers = overview.sleepers.get(&(wait.tgid, syscall.args[0]));
                match futex.map(|futex| futex.lock) {
                    Some(Lock::Yes { .. }) => WorkerState::Lock,
                    _ if sleepers.is_some_and(|sleepers| *sleepers > 1) => WorkerState::Idle,
                    _ => WorkerState::Parked,
                }
            }
            _ => WorkerState::Other,
        }
    }

    /// Polling an opened connection takes precedence over polling an accepted one. A listener alone means waiting for work.
    fn polling(&self, tgid: u32, detail: &Detail) -> WorkerState {
        let Detail::Poll(entries) = detail else {
            return WorkerState::Idle;
        };
        let roles = entries
            .iter()
            .filter_map(|(fd, _)| self.role(tgid, u32::try_from(*fd).ok()?));
        roles.fold(WorkerState::Idle, |doing, role| match (doing, role) {
            (_, Role::Opened) | (WorkerState::Downstream, _) => WorkerState::Downstream,
            (_, Role::Accepted) => WorkerState::Client,
        })
    }

    fn role(&self, tgid: u32, fd: u32) -> Option<Role> {
        self.roles
            .get(descriptor_key(tgid, fd))
            .map(|seen| seen.role)
    }
}

/// Combines a process and a descriptor into one key.
fn descriptor_key(tgid: u32, fd: u32) -> u64 {
    u64::from(tgid) << 32 | u64::from(fd)
}

/// The pool of a thread: its name, with each run of digits replaced by `#`, as in `worker-#`.
fn pool_name(comm: &str) -> String {
    let mut out = String::with_capacity(comm.len());
    for letter in comm.chars() {
        if !letter.is_ascii_digit() {
            out.push(letter);
        } else if !out.ends_with('#') {
            out.push('#');
        }
    }
    out
}

impl Group {
    fn add(&mut self, doing: WorkerState) {
        self.size += 1;
        let counter = match doing {
            WorkerState::Running => &mut self.running,
            WorkerState::Runnable => &mut self.runnable,
            WorkerState::Idle => &mut self.idle,
            WorkerState::Parked => {
                self.parked += 1;
                &mut self.idle
            }
            WorkerState::Client => &mut self.client,
            WorkerState::Downstream => &mut self.downstream,
            WorkerState::Lock => &mut self.lock,
            WorkerState::Disk => &mut self.disk,
            WorkerState::Other => &mut self.other,
            WorkerState::Unknown => &mut self.unknown,
        };
        *counter += 1;
    }

    /// Whether this is a pool of workers: several threads, or the only one of its service. Event loops do not count, unless each
    /// is a process of its own: those may serve one request at a time (prefork).
    fn is_pool(&self, threads_of_target: u32) -> bool {
        if self.size == 1 {
            return threads_of_target == 1 && self.loops == 0;
        }
        self.loops < self.size || self.alone == self.size
    }

    fn reading(&self) -> Reading {
        let not_busy = self.idle + self.client + self.unknown;
        let mut extra = vec![
            ("running", self.running as f64),
            ("runnable", self.runnable as f64),
            ("waiting_lock", self.lock as f64),
            ("waiting_disk", self.disk as f64),
            ("waiting_downstream", self.downstream as f64),
            ("waiting_client", self.client as f64),
            ("waiting_other", self.other as f64),
            ("idle", self.idle as f64),
            ("parked", self.parked as f64),
        ];
        // A thread in some other call is not known to be working.
        let working = self.running + self.runnable + self.lock + self.disk + self.downstream;
        extra.push((UTILIZATION, working as f64 / self.size.max(1) as f64));
        if self.unknown > 0 {
            extra.push(("unknown", self.unknown as f64));
            extra.push(("at_least", 1.0));
        }
        let busy = self.size.saturating_sub(not_busy);
        Reading {
            depth: busy,
            limit: Some(self.size),
            fill: Some(busy as f64 / self.size.max(1) as f64),
            servers: u32::try_from(self.size).unwrap_or(u32::MAX),
            extra,
            ..Reading::default()
        }
    }
}

#[cfg(test)]
mod tests;
