//! Classifies one sample of one thread: what it does, and what it waits for.
//!
//! A system call on one file names what the thread waits for. A thread in epoll_wait serves everything that its process has
//! in progress, so there the requests in flight and the outstanding calls decide.

use std::net::SocketAddr;

use super::topology::{OpenFile, Topology};
use crate::hash::HashMap;
use crate::{
    event::Activity,
    queue::syscalls::{CallClass, Futex, Lock, call_of, descriptor, shared_owner},
    sample::{Accelerator, Detail, LockHolder, LockWait, SharedLock, State, Wait},
};

/// A thread: its tgid and its tid, in the initial PID namespace.
pub(super) type Thread = (u32, u32);

/// What a thread was doing when it was sampled.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Observation {
    pub(super) activity: Activity,
    pub(super) resource: Resource,
}

/// What a thread waits for, or works with.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Resource {
    None,
    /// A TCP connection, by its socket cookie.
    Connection(u64),
    /// An accepted connection on which the thread waits for the next request and for nothing else, by its socket cookie.
    Client(u64),
    /// A futex that is a lock.
    Lock {
        tgid: u32,
        address: u64,
        /// The thread that holds it, if the lock records it.
        owner: Option<u32>,
        /// It is the lock that an interpreter's threads take turns on (CPython's GIL).
        interpreter: bool,
    },
    /// A lock that processes share, on a file or in memory.
    SharedLock {
        /// The same for all that wait for it.
        id: u64,
        lock: SharedLock,
        holder: LockHolder,
    },
    /// A lock within the service that only the process title shows: a database's row lock.
    RowLock,
    File {
        path: String,
        device: Option<String>,
    },
    /// By inode.
    Pipe(u64),
    /// A unix socket, by inode.
    Unix(u64),
    /// UDP, connected to this address; port 0: not connected.
    Datagrams(SocketAddr),
    Accelerator(Accelerator),
    /// A futex of unknown meaning: a condition variable, a semaphore, a place to park idle threads.
    Parked,
}

impl Observation {
    fn of(activity: Activity) -> Self {
        Self {
            activity,
            resource: Resource::None,
        }
    }

    fn with(activity: Activity, resource: Resource) -> Self {
        Self { activity, resource }
    }
}

/// The threads of one sample, by their process and their number in their own PID namespace.
pub(super) struct Threads {
    by_own_tid: HashMap<(u32, u32), u32>,
}

impl Threads {
    pub(super) fn of(waits: &[Wait]) -> Self {
        let entry = |wait: &Wait| ((wait.tgid, wait.own_tid), wait.tid);
        Self {
            by_own_tid: waits.iter().map(entry).collect(),
        }
    }

    /// The thread with this number in its own PID namespace, if exactly one of these processes has one.
    fn only(&self, tgids: impl Iterator<Item = u32>, own_tid: u32) -> Option<(u32, u32)> {
        let mut found = tgids.filter_map(|tgid| Some((tgid, self.tid(tgid, own_tid)?)));
        found.next().filter(|_| found.next().is_none())
    }

    fn tid(&self, tgid: u32, own_tid: u32) -> Option<u32> {
        self.by_own_tid.get(&(tgid, own_tid)).copied()
    }
}

/// What a thread does. `None`: it is exiting.
pub(super) fn classify(wait: &Wait, threads: &Threads, topology: &Topology) -> Option<Observation> {
    // A thread that waits for a CPU does not wait for an accelerator, whatever it will do there.
    if let (State::Running | State::Sleeping | State::Uninterruptible, Some(through)) =
        (wait.state, topology.accelerator(wait))
    {
        return Some(Observation::with(
            Activity::Accelerator,
            Resource::Accelerator(through),
        ));
    }
    match wait.state {
        State::Running => return Some(Observation::of(Activity::OnCpu)),
        State::Runnable => return Some(Observation::of(Activity::RunnableOwn)),
        State::Stopped => return Some(Observation::of(Activity::Stopped)),
        State::Dead => return None,
        State::Sleeping | State::Uninterruptible => {}
    }
    Some(asleep(wait, threads, topology))
}

fn asleep(wait: &Wait, threads: &Threads, topology: &Topology) -> Observation {
    let uninterruptible = wait.state == State::Uninterruptible;
    let Some((syscall, (name, does))) = wait.syscall.as_ref().zip(call_of(wait)) else {
        return Observation::of(match (uninterruptible, wait.io) {
            (true, true) => Activity::Disk,
            _ => Activity::Unknown,
        });
    };
    let fd = descriptor(syscall);
    if uninterruptible
        && (wait.io
            || matches!(
                does,
                CallClass::Sync | CallClass::Read | CallClass::Write | CallClass::Path
            ))
        || does == CallClass::Sync
    {
        return Observation::with(Activity::Disk, file(&syscall.detail));
    }
    match does {
        CallClass::Accept | CallClass::Process => Observation::of(Activity::Idle),
        CallClass::Epoll => in_event_loop(wait.tgid, topology),
        CallClass::Poll => polling(wait, &syscall.detail, topology),
        CallClass::Sleep => match topology.file_lock(wait, true) {
            Some(lock) => shared_lock(lock),
            None => Observation::of(Activity::Asleep),
        },
        CallClass::Read => reading(wait.tgid, fd, topology),
        CallClass::Write => writing(wait.tgid, fd, &syscall.detail, topology),
        CallClass::Futex => futex(wait, threads, topology),
        CallClass::Sync | CallClass::Path => {
            Observation::with(Activity::Disk, file(&syscall.detail))
        }
        CallClass::Other => match (name, topology.open_file(wait.tgid, fd)) {
            ("connect", Some(OpenFile::Connection(cookie))) => {
                Observation::with(Activity::Downstream, Resource::Connection(cookie))
            }
            // The backlog of the listener is full.
            ("connect", Some(OpenFile::Unix(inode))) => {
                Observation::with(Activity::Downstream, Resource::Unix(inode))
            }
            ("flock" | "fcntl", _) => match topology.file_lock(wait, false) {
                Some(lock) => shared_lock(lock),
                None => Observation::with(Activity::Lock, file(&syscall.detail)),
            },
            ("io_uring_enter", _) => in_event_loop(wait.tgid, topology),
            ("io_getevents", _) => Observation::of(Activity::Disk),
            ("semop" | "msgrcv", _) => Observation::of(Activity::Inside),
            _ => Observation::of(Activity::Unknown),
        },
    }
}

fn shared_lock(wait: &LockWait) -> Observation {
    let resource = Resource::SharedLock {
        id: wait.id,
        lock: wait.lock.clone(),
        holder: wait.holder,
    };
    Observation::with(Activity::Lock, resource)
}

/// A mutex in shared memory. It may have changed hands since the search for its holder. The futex contains the number of its
/// present holder's thread, and that decides.
fn shared_mutex(
    wait: &Wait,
    known: &LockWait,
    threads: &Threads,
    topology: &Topology,
) -> Observation {
    let owner = match wait.syscall.as_ref().map(|call| &call.detail) {
        Some(Detail::Futex { word, owner }) => shared_owner(*word, *owner),
        _ => 0,
    };
    let sharing = topology.sharing(known.id);
    let holder = match (known.holder, threads.only(sharing, owner)) {
        (_, Some((tgid, tid))) => LockHolder::Thread { tgid, tid },
        // It is not sampled, or has exited.
        (LockHolder::Thread { tid, .. } | LockHolder::Exited(tid), None) if tid == owner => {
            known.holder
        }
        _ => LockHolder::Unknown,
    };
    shared_lock(&LockWait {
        holder,
        ..known.clone()
    })
}

fn file(detail: &Detail) -> Resource {
    match detail {
        Detail::File { path, device } => Resource::File {
            path: path.clone(),
            device: device.clone(),
        },
        _ => Resource::None,
    }
}

/// A thread that waits for any of its files: what its process has in progress shows which of them matters.
fn in_event_loop(tgid: u32, topology: &Topology) -> Observation {
    if topology.waits_by_its_title(tgid) {
        return Observation::with(Activity::Lock, Resource::RowLock);
    }
    let work = topology.work_of(tgid);
    let serves = work.in_service > 0;
    match work.oldest_call {
        Some((_, cookie)) if serves || work.clients == 0 => {
            return Observation::with(Activity::Downstream, Resource::Connection(cookie));
        }
        _ => {}
    }
    if let Some((_, cookie)) = work.stuck_client {
        return Observation::with(Activity::PeerRead, Resource::Connection(cookie));
    }
    match (work.oldest_request, topology.awaited_resolver(tgid)) {
        (Some(_), Some(resolver)) => {
            Observation::with(Activity::Downstream, Resource::Datagrams(resolver))
        }
        (Some((_, cookie)), None) => {
            Observation::with(Activity::Inside, Resource::Connection(cookie))
        }
        (None, _) => Observation::of(Activity::Idle),
    }
}

/// A thread in poll or select: the first of its files on which something is in progress. An outstanding call takes precedence
/// over a request.
fn polling(wait: &Wait, detail: &Detail, topology: &Topology) -> Observation {
    let Detail::Poll(entries) = detail else {
        return in_event_loop(wait.tgid, topology);
    };
    const POLLOUT: i16 = 4;
    let mut best = Observation::of(Activity::Idle);
    for (fd, events) in entries {
        let Ok(fd) = u32::try_from(*fd) else {
            continue;
        };
        let observation = if events & POLLOUT != 0 && events & 1 == 0 {
            writing(wait.tgid, fd, &Detail::None, topology)
        } else {
            reading(wait.tgid, fd, topology)
        };
        match observation.activity {
            Activity::Downstream => return observation,
            Activity::Idle if entries.len() == 1 => best = observation,
            Activity::Idle | Activity::Unknown => {}
            _ => best = observation,
        }
    }
    best
}

fn reading(tgid: u32, fd: u32, topology: &Topology) -> Observation {
    let busy = topology.work_of(tgid).in_service > 0;
    match topology.open_file(tgid, fd) {
        Some(OpenFile::Connection(cookie)) => {
            let accepted = topology.link(cookie).is_some_and(|link| link.accepted);
            let resource = Resource::Connection(cookie);
            let awaited = topology.awaited(cookie).is_some() || topology.is_connecting(cookie);
            match (accepted, awaited) {
                // Part of a request was read, and the thread waits for the rest.
                (true, true) => Observation::with(Activity::PeerSend, resource),
                (true, false) => Observation::with(Activity::Idle, Resource::Client(cookie)),
                (false, true) => Observation::with(Activity::Downstream, resource),
                (false, false) if busy => Observation::with(Activity::Downstream, resource),
                (false, false) => Observation::of(Activity::Idle),
            }
        }
        Some(OpenFile::Unix(inode)) if busy => {
            Observation::with(Activity::Downstream, Resource::Unix(inode))
        }
        Some(OpenFile::Pipe(inode)) if busy => {
            Observation::with(Activity::Inside, Resource::Pipe(inode))
        }
        // It sent a request, such as a DNS query, and waits for the response.
        Some(OpenFile::Datagrams(remote)) if busy => {
            Observation::with(Activity::Downstream, Resource::Datagrams(remote))
        }
        _ => Observation::of(Activity::Idle),
    }
}

fn writing(tgid: u32, fd: u32, detail: &Detail, topology: &Topology) -> Observation {
    let file_at = topology.open_file(tgid, fd);
    match file_at.or_else(|| shared_socket(detail, topology)) {
        Some(OpenFile::Connection(cookie)) if topology.is_connecting(cookie) => {
            Observation::with(Activity::Downstream, Resource::Connection(cookie))
        }
        Some(OpenFile::Connection(cookie)) => {
            Observation::with(Activity::PeerRead, Resource::Connection(cookie))
        }
        Some(OpenFile::Pipe(inode)) => Observation::with(Activity::Output, Resource::Pipe(inode)),
        Some(OpenFile::Unix(inode)) => Observation::with(Activity::Output, Resource::Unix(inode)),
        // The socket's own send buffer is full: the network is slow, not the called service.
        Some(OpenFile::Datagrams(_)) => Observation::of(Activity::Unknown),
        None => match detail {
            Detail::File { path, .. } if is_terminal(path) => {
                Observation::with(Activity::Output, file(detail))
            }
            Detail::File { path, .. } if socket_inode(path).is_some() => {
                Observation::of(Activity::Unknown)
            }
            Detail::File { .. } => Observation::with(Activity::Disk, file(detail)),
            _ => Observation::of(Activity::Unknown),
        },
    }
}

/// A unix socket that several processes hold, known by the descriptor of another one.
fn shared_socket(detail: &Detail, topology: &Topology) -> Option<OpenFile> {
    let Detail::File { path, .. } = detail else {
        return None;
    };
    let inode = socket_inode(path)?;
    topology.unix(inode).map(|_| OpenFile::Unix(inode))
}

/// The inode in `socket:[4711]`.
fn socket_inode(path: &str) -> Option<u64> {
    let inode = path.strip_prefix("socket:[")?.strip_suffix(']')?;
    inode.parse().ok()
}

fn is_terminal(path: &str) -> bool {
    path.starts_with("/dev/pts/") || path.starts_with("/dev/tty") || path == "/dev/console"
}

fn futex(wait: &Wait, threads: &Threads, topology: &Topology) -> Observation {
    let is_thread = |tid| threads.tid(wait.tgid, tid).is_some();
    let Some(futex) = Futex::of(wait, is_thread) else {
        return Observation::of(Activity::Unknown);
    };
    if let Some(lock) = topology.shared_mutex(wait.tgid, futex.address) {
        return shared_mutex(wait, lock, threads, topology);
    }
    // Both words of a condition variable lie in one aligned block of 8 bytes; the lock queue names it by that address.
    let block = futex.address - futex.address % 8;
    let (known, address) = match futex.lock {
        Lock::Yes { .. } => (Some(false), futex.address),
        Lock::Maybe => (topology.lock(wait.tgid, futex.address), futex.address),
        Lock::No => (
            topology
                .lock(wait.tgid, block)
                .filter(|interpreter| *interpreter && futex.timed),
            block,
        ),
    };
    let Some(interpreter) = known else {
        return Observation::with(Activity::Idle, Resource::Parked);
    };
    let owner = match futex.lock {
        Lock::Yes { owner } => owner.and_then(|own_tid| threads.tid(wait.tgid, own_tid)),
        Lock::Maybe | Lock::No => None,
    };
    Observation::with(
        Activity::Lock,
        Resource::Lock {
            tgid: wait.tgid,
            address,
            owner,
            interpreter,
        },
    )
}
