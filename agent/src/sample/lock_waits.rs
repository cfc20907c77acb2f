//! Threads that wait for locks which processes share: on a file, or in shared memory.

use serde::{Deserialize, Serialize};

use super::Wait;

/// A thread of a target that waits for a lock which another process may hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockWait {
    pub tgid: u32,
    pub tid: u32,
    /// Its voluntary context switches then: as long as they do not change, it waits for the same holder.
    pub voluntary: u64,
    /// Identifies the lock: the same for all threads that wait for it.
    pub id: u64,
    pub lock: SharedLock,
    pub holder: LockHolder,
    /// The name (`comm`) of the process that holds it, with control characters escaped; empty if unknown.
    pub holder_name: String,
}

impl LockWait {
    /// The same wait of another thread of the process.
    pub fn of(self, thread: &Wait) -> Self {
        Self {
            tid: thread.tid,
            voluntary: thread.voluntary,
            ..self
        }
    }
}

/// Where a lock is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum SharedLock {
    /// On a file: flock(2), or fcntl(2) with a lock of the process or of the open file description.
    File {
        path: Option<String>,
        /// The thread does not block: it sleeps and tries again.
        polled: bool,
    },
    /// A mutex in shared memory, by its address in the process that waits.
    Memory { address: u64 },
}

/// Who holds a lock.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum LockHolder {
    #[default]
    Unknown,
    /// One of the threads of this process.
    Process(u32),
    Thread {
        tgid: u32,
        tid: u32,
    },
    /// A thread with this number, which has exited without releasing the lock.
    Exited(u32),
}

impl LockHolder {
    /// The process that holds the lock.
    pub fn tgid(self) -> Option<u32> {
        match self {
            Self::Process(tgid) | Self::Thread { tgid, .. } => Some(tgid),
            Self::Unknown | Self::Exited(_) => None,
        }
    }
}
