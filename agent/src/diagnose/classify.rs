//! What one thread does at one look, and what it waits for.
//!
//! A thread that sleeps in a call on one file says itself what it waits for. One that sleeps in epoll_wait serves all that
//! its process has under way: there the requests in flight and the calls outstanding tell.

use std::collections::HashMap;

use super::{
    Activity,
    topology::{Held, Topology},
};
use crate::{
    queue::syscalls::{Does, Futex, Lock, call_of, descriptor},
    sample::{Detail, State, Wait},
};

/// What a thread does, and with what.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Doing {
    pub(super) activity: Activity,
    pub(super) object: Object,
}

/// What a thread waits for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Object {
    None,
    /// By its cookie.
    Connection(u64),
    /// Thread that holds it, where the lock says so.
    Lock {
        tgid: u32,
        address: u64,
        owner: Option<u32>,
        interpreter: bool,
    },
    /// A lock inside the service, which its title tells of.
    Titled,
    File {
        path: String,
        device: Option<String>,
    },
    Pipe(u64),
    Unix(u64),
    /// A word in memory, for which nobody can tell from outside what it stands for.
    Parked,
}

impl Doing {
    fn of(activity: Activity) -> Self {
        Self {
            activity,
            object: Object::None,
        }
    }

    fn with(activity: Activity, object: Object) -> Self {
        Self { activity, object }
    }
}

/// The threads of one sample, by process and own number.
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

    fn tid(&self, tgid: u32, own_tid: u32) -> Option<u32> {
        self.by_own_tid.get(&(tgid, own_tid)).copied()
    }
}

/// `None` for a thread that is ending.
pub(super) fn classify(wait: &Wait, threads: &Threads, world: &Topology) -> Option<Doing> {
    match wait.state {
        State::Running => return Some(Doing::of(Activity::OnCpu)),
        State::Runnable => return Some(Doing::of(Activity::RunnableOwn)),
        State::Stopped => return Some(Doing::of(Activity::Stopped)),
        State::Dead => return None,
        State::Sleeping | State::Uninterruptible => {}
    }
    Some(asleep(wait, threads, world))
}

fn asleep(wait: &Wait, threads: &Threads, world: &Topology) -> Doing {
    let deep = wait.state == State::Uninterruptible;
    let Some((syscall, (name, does))) = wait.syscall.as_ref().zip(call_of(wait)) else {
        return Doing::of(match (deep, wait.io) {
            (true, true) => Activity::Disk,
            _ => Activity::Unknown,
        });
    };
    let fd = descriptor(syscall);
    if deep && (wait.io || matches!(does, Does::Sync | Does::Read | Does::Write | Does::Path))
        || does == Does::Sync
    {
        return Doing::with(Activity::Disk, file(&syscall.detail));
    }
    match does {
        Does::Accept | Does::Process => Doing::of(Activity::Idle),
        Does::Epoll => living_in_a_loop(wait.tgid, world),
        Does::Poll => polling(wait, &syscall.detail, world),
        Does::Sleep => Doing::of(Activity::Asleep),
        Does::Read => reading(wait.tgid, fd, world),
        Does::Write => writing(wait.tgid, fd, &syscall.detail, world),
        Does::Futex => futex(wait, threads, world),
        Does::Sync | Does::Path => Doing::with(Activity::Disk, file(&syscall.detail)),
        Does::Other => match (name, world.held(wait.tgid, fd)) {
            ("connect", Some(Held::Connection(cookie))) => {
                Doing::with(Activity::Downstream, Object::Connection(cookie))
            }
            ("flock" | "fcntl", _) => Doing::with(Activity::Lock, file(&syscall.detail)),
            ("io_uring_enter", _) => living_in_a_loop(wait.tgid, world),
            ("io_getevents", _) => Doing::of(Activity::Disk),
            ("semop" | "msgrcv", _) => Doing::of(Activity::Inside),
            _ => Doing::of(Activity::Unknown),
        },
    }
}

fn file(detail: &Detail) -> Object {
    match detail {
        Detail::File { path, device } => Object::File {
            path: path.clone(),
            device: device.clone(),
        },
        _ => Object::None,
    }
}

/// Waits for any of its files: what its process has under way says which of them matter.
fn living_in_a_loop(tgid: u32, world: &Topology) -> Doing {
    if says_it_waits(tgid, world) {
        return Doing::with(Activity::Lock, Object::Titled);
    }
    let business = world.business(tgid);
    let serves = business.working > 0;
    match business.oldest_call {
        Some((_, cookie)) if serves || business.clients == 0 => {
            return Doing::with(Activity::Downstream, Object::Connection(cookie));
        }
        _ => {}
    }
    if let Some((_, cookie)) = business.stuck_client {
        return Doing::with(Activity::PeerRead, Object::Connection(cookie));
    }
    match business.oldest_request {
        Some((_, cookie)) => Doing::with(Activity::Inside, Object::Connection(cookie)),
        None => Doing::of(Activity::Idle),
    }
}

/// PostgreSQL's backends wait for row locks as idle ones do, and say so in their title. A title that ends so is a fact,
/// whatever the program is.
fn says_it_waits(tgid: u32, world: &Topology) -> bool {
    world
        .title(tgid)
        .is_some_and(|titled| titled.title.trim_end().ends_with(" waiting"))
}

/// The first of its files that something is under way on; a call that is awaited counts before a client that is.
fn polling(wait: &Wait, detail: &Detail, world: &Topology) -> Doing {
    let Detail::Poll(entries) = detail else {
        return living_in_a_loop(wait.tgid, world);
    };
    const POLLOUT: i16 = 4;
    let mut best = Doing::of(Activity::Idle);
    for (fd, events) in entries {
        let Ok(fd) = u32::try_from(*fd) else {
            continue;
        };
        let doing = if events & POLLOUT != 0 && events & 1 == 0 {
            writing(wait.tgid, fd, &Detail::None, world)
        } else {
            reading(wait.tgid, fd, world)
        };
        match doing.activity {
            Activity::Downstream => return doing,
            Activity::Idle | Activity::Unknown => {}
            _ => best = doing,
        }
    }
    best
}

fn reading(tgid: u32, fd: u32, world: &Topology) -> Doing {
    let busy = world.business(tgid).working > 0;
    match world.held(tgid, fd) {
        Some(Held::Connection(cookie)) => {
            let accepted = world.link(cookie).is_some_and(|link| link.accepted);
            let object = Object::Connection(cookie);
            match (accepted, world.awaited(cookie).is_some()) {
                // A part of a request was read, and the thread waits for the rest of it.
                (true, true) => Doing::with(Activity::PeerSend, object),
                (true, false) => Doing::of(Activity::Idle),
                (false, true) => Doing::with(Activity::Downstream, object),
                (false, false) if busy => Doing::with(Activity::Downstream, object),
                (false, false) => Doing::of(Activity::Idle),
            }
        }
        Some(Held::Unix(inode)) if busy => Doing::with(Activity::Downstream, Object::Unix(inode)),
        Some(Held::Pipe(inode)) if busy => Doing::with(Activity::Inside, Object::Pipe(inode)),
        _ => Doing::of(Activity::Idle),
    }
}

fn writing(tgid: u32, fd: u32, detail: &Detail, world: &Topology) -> Doing {
    match world.held(tgid, fd) {
        Some(Held::Connection(cookie)) => {
            Doing::with(Activity::PeerRead, Object::Connection(cookie))
        }
        Some(Held::Pipe(inode)) => Doing::with(Activity::Output, Object::Pipe(inode)),
        Some(Held::Unix(inode)) => Doing::with(Activity::Output, Object::Unix(inode)),
        None => match detail {
            Detail::File { path, .. } if is_terminal(path) => {
                Doing::with(Activity::Output, file(detail))
            }
            Detail::File { .. } => Doing::with(Activity::Disk, file(detail)),
            _ => Doing::of(Activity::Unknown),
        },
    }
}

fn is_terminal(path: &str) -> bool {
    path.starts_with("/dev/pts/") || path.starts_with("/dev/tty") || path == "/dev/console"
}

fn futex(wait: &Wait, threads: &Threads, world: &Topology) -> Doing {
    let is_thread = |tid| threads.tid(wait.tgid, tid).is_some();
    let Some(futex) = Futex::of(wait, is_thread) else {
        return Doing::of(Activity::Unknown);
    };
    // Both halves of a condition variable lie in one block of 8 bytes; the queue of locks names them by it.
    let block = futex.address - futex.address % 8;
    let (known, address) = match futex.lock {
        Lock::Yes { .. } => (Some(false), futex.address),
        Lock::Maybe => (world.lock(wait.tgid, futex.address), futex.address),
        Lock::No => (
            world
                .lock(wait.tgid, block)
                .filter(|interpreter| *interpreter && futex.timed),
            block,
        ),
    };
    let Some(interpreter) = known else {
        // A condition variable, a semaphore, a place to park.
        return Doing::with(Activity::Idle, Object::Parked);
    };
    let owner = match futex.lock {
        Lock::Yes { owner } => owner.and_then(|own_tid| threads.tid(wait.tgid, own_tid)),
        Lock::Maybe | Lock::No => None,
    };
    Doing::with(
        Activity::Lock,
        Object::Lock {
            tgid: wait.tgid,
            address,
            owner,
            interpreter,
        },
    )
}
