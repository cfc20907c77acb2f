//! What a thread waits for, judged by the system call that it sleeps in.
//!
//! A call carries the architecture of the machine that the sample was taken on. So a recording gives the same result on any
//! machine.

mod table;

use crate::{
    sample::{Architecture, Detail, State, Syscall, Wait},
    text::harmless,
};

/// System calls by what they wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallClass {
    /// A new connection.
    Accept,
    /// Any of the files of an epoll instance.
    Epoll,
    /// Any of a set of files.
    Poll,
    /// A change of a word in memory.
    Futex,
    /// Data from the file in the first argument.
    Read,
    /// Space in the file in the first argument.
    Write,
    /// Data to reach the disk.
    Sync,
    /// File system metadata: names, directories, sizes.
    Path,
    /// A timeout.
    Sleep,
    /// Another process, or a signal.
    Process,
    /// Something else.
    Other,
}

/// Name and class of the call that a thread is in, if known.
pub(crate) fn call_of(wait: &Wait) -> Option<(&'static str, CallClass)> {
    call(wait.syscall.as_ref()?)
}

/// Name and class of a system call; `None` if no server is known to wait in it.
fn call(syscall: &Syscall) -> Option<(&'static str, CallClass)> {
    table::call(syscall.architecture, syscall.number)
}

/// Name of a system call; `None` if no server is known to wait in it.
pub(crate) fn name(architecture: Architecture, number: i32) -> Option<&'static str> {
    table::call(architecture, number).map(|(name, _)| name)
}

/// The descriptor in a call's first argument.
pub(crate) fn descriptor(syscall: &Syscall) -> u32 {
    // The kernel takes an int and ignores the upper half.
    syscall.args[0] as u32
}

/// A wait in futex.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Futex {
    pub(crate) address: u64,
    /// The wait has a timeout.
    pub(crate) timed: bool,
    pub(crate) lock: Lock,
}

/// Whether a futex is a contended lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    /// A condition variable, a semaphore, or a parking place, as an idle pool uses.
    No,
    /// Possibly (Rust's standard library): its value is that of a contended lock, but a counter may have it as well.
    Maybe,
    /// A mutex that is held. `owner` is the thread id in the process's own PID namespace, if the lock stores one.
    Yes { owner: Option<u32> },
}

/// Futex operations (linux/futex.h) and lock values.
mod futex {
    pub(crate) const WAIT: u64 = 0;
    pub(crate) const LOCK_PI: u64 = 6;
    pub(crate) const WAIT_BITSET: u64 = 9;
    pub(crate) const LOCK_PI2: u64 = 13;
    /// Mask of the operation without FUTEX_PRIVATE_FLAG and FUTEX_CLOCK_REALTIME.
    pub(crate) const COMMAND: u64 = 0x7f;
    /// The owner's thread id, and the flag that others wait, in the word of priority-inheriting, robust and musl locks.
    pub(crate) const TID: u32 = 0x3fff_ffff;
    pub(crate) const WAITERS: u32 = 0x8000_0000;
    /// Value of a held plain mutex in musl: EBUSY instead of an owner.
    pub(crate) const MUSL_HELD: u32 = 16;
}

impl Futex {
    /// The futex that a thread waits for, if any. `is_thread` returns whether the process has a thread with this id.
    pub(crate) fn of(wait: &Wait, is_thread: impl Fn(u32) -> bool) -> Option<Self> {
        let syscall = wait.syscall.as_ref()?;
        if !matches!(call(syscall), Some((_, CallClass::Futex))) {
            return None;
        }
        let [address, op, expected, timeout] = syscall.args;
        let op = op & futex::COMMAND;
        let expected = expected as u32;
        let read = match syscall.detail {
            Detail::Futex { word, owner } => Some((word, owner)),
            _ => None,
        };
        // A lock that stores no owner has other data beside its word, which is not a thread id of the process. And a thread
        // that waits for a lock does not hold it.
        let holder =
            |tid: u32| Some(tid).filter(|tid| *tid != wait.own_tid && *tid != 0 && is_thread(*tid));
        let lock = match (op, read) {
            (futex::LOCK_PI | futex::LOCK_PI2, read) => Lock::Yes {
                owner: read.and_then(|(word, _)| holder(word & futex::TID)),
            },
            // glibc (lll_lock_wait) and Go: 2 means held and contended.
            (futex::WAIT, Some((2, owner))) if expected == 2 => Lock::Yes {
                owner: holder(owner),
            },
            // glibc with a deadline stores the owner as well. Without an owner, it may be a counter whose value is 2.
            (futex::WAIT_BITSET, Some((2, owner))) if expected == 2 => match holder(owner) {
                Some(owner) => Lock::Yes { owner: Some(owner) },
                None => Lock::Maybe,
            },
            (futex::WAIT, Some((word, _))) if word == expected && word & futex::WAITERS != 0 => {
                match (holder(word & futex::TID), word & futex::TID) {
                    (None, futex::MUSL_HELD) => Lock::Yes { owner: None },
                    (None, _) => Lock::No,
                    (owner, _) => Lock::Yes { owner },
                }
            }
            _ => Lock::No,
        };
        Some(Self {
            address,
            timed: timeout != 0 && op != futex::LOCK_PI && op != futex::LOCK_PI2,
            lock,
        })
    }
}

/// The number of the thread that holds a mutex in shared memory which others wait for, from its word and the one beside it; 0 if
/// it is not stored.
pub(crate) fn shared_owner(word: u32, beside: u32) -> u32 {
    if word & futex::WAITERS == 0 {
        beside
    } else {
        word & futex::TID
    }
}

/// What a thread is doing, for display: `running`, `in fsync of /var/lib/db/wal`.
pub(crate) fn doing(wait: &Wait) -> String {
    let state = match wait.state {
        State::Running => return "running".to_owned(),
        State::Runnable => return "waiting for a CPU".to_owned(),
        State::Stopped => return "stopped".to_owned(),
        State::Dead => return "exiting".to_owned(),
        State::Sleeping => "asleep",
        State::Uninterruptible if wait.io => "waiting for a disk",
        State::Uninterruptible => "in an uninterruptible wait",
    };
    let Some(syscall) = &wait.syscall else {
        return state.to_owned();
    };
    let name = call(syscall).map_or_else(
        || format!("system call {}", syscall.number),
        |(name, _)| name.to_owned(),
    );
    match &syscall.detail {
        Detail::File { path, .. } => format!("in {name} of {}", harmless(path)),
        _ => format!("in {name}"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{
        super::{Kind, Model, Reading, watched::TICK},
        *,
    };
    use crate::sample::{Architecture, Sample, Scans, Target};

    /// A thread asleep in a system call.
    pub(crate) fn asleep(tid: u32, number: libc::c_long, args: [u64; 4]) -> Wait {
        Wait {
            tgid: 10,
            tid,
            own_tid: tid,
            comm: "worker".to_owned(),
            state: State::Sleeping,
            io: false,
            syscall: Some(Syscall {
                architecture: Architecture::OWN,
                number: number as i32,
                args,
                detail: Detail::None,
            }),
            voluntary: 1,
            involuntary: 0,
            cpu_ns: 0,
            run_delay_ns: 0,
        }
    }

    /// The queues of this kind at sample number `tick`, if the threads of a service wait like this.
    pub(crate) fn sample_waits(
        kind: Kind,
        model: &mut Model,
        tick: u64,
        waits: Vec<Wait>,
    ) -> Vec<(String, Reading)> {
        let target = Target {
            id: 1,
            tgids: vec![10],
            ..Target::default()
        };
        let readings = model.read(&Sample {
            mono_ns: (tick + 1) * TICK,
            targets: (tick == 0).then(|| vec![target]),
            scans: Scans {
                waits: true,
                ..Scans::default()
            },
            waits,
            ..Sample::default()
        });
        let queues = readings.queues.into_iter();
        queues
            .filter(|(key, _)| key.kind == kind)
            .map(|(key, reading)| (key.name().to_owned(), reading))
            .collect()
    }

    /// A thread that waits for the lock at `address`.
    pub(crate) fn locked(tid: u32, address: u64, owner: u32) -> Wait {
        let mut wait = asleep(tid, libc::SYS_futex, [address, 128, 2, 0]);
        if let Some(syscall) = &mut wait.syscall {
            syscall.detail = Detail::Futex { word: 2, owner };
        }
        wait
    }

    fn futex(op: u64, expected: u64, word: u32, owner: u32) -> Lock {
        let mut wait = locked(11, 0x1000, owner);
        if let Some(syscall) = &mut wait.syscall {
            syscall.args = [0x1000, op, expected, 0];
            syscall.detail = Detail::Futex { word, owner };
        }
        Futex::of(&wait, |tid| matches!(tid, 11 | 12)).unwrap().lock
    }

    #[test]
    fn a_contended_mutex_is_a_lock_and_names_its_owner() {
        assert_eq!(futex(128, 2, 2, 12), Lock::Yes { owner: Some(12) });
        assert_eq!(futex(128, 2, 2, 99), Lock::Yes { owner: None });
        assert_eq!(futex(128, 2, 2, 11), Lock::Yes { owner: None });
        assert_eq!(
            futex(6 | 128, 0, 0x8000_000c, 0),
            Lock::Yes { owner: Some(12) }
        );
        assert_eq!(
            futex(128, 0x8000_000c, 0x8000_000c, 0),
            Lock::Yes { owner: Some(12) }
        );
    }

    #[test]
    fn a_condition_variable_or_a_semaphore_is_not_a_lock() {
        assert_eq!(futex(9 | 128 | 256, 0, 0, 12), Lock::No);
        assert_eq!(futex(128, 7, 7, 12), Lock::No);
        assert_eq!(futex(128, 2, 0, 12), Lock::No, "it was released");
        assert_eq!(futex(128, 0xffff_ffff, 0xffff_ffff, 0), Lock::No);
        assert_eq!(futex(9 | 128, 2, 2, 0), Lock::Maybe);
    }

    #[test]
    fn the_activity_of_a_thread_is_described() {
        let mut wait = asleep(11, libc::SYS_fsync, [3, 0, 0, 0]);
        assert_eq!(doing(&wait), "in fsync");
        if let Some(syscall) = &mut wait.syscall {
            syscall.detail = Detail::File {
                path: "/db/wal".to_owned(),
                device: None,
            };
        }
        assert_eq!(doing(&wait), "in fsync of /db/wal");
        wait.syscall = None;
        assert_eq!(doing(&wait), "asleep");
        wait.state = State::Running;
        assert_eq!(doing(&wait), "running");
    }
}
