//! The threads of the targets, and what each is doing or waiting for.

use serde::{Deserialize, Serialize};

use super::Architecture;

/// A thread of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    pub tgid: u32,
    pub tid: u32,
    /// Runnable, whether or not it has a CPU.
    pub runnable: bool,
    /// Running on a CPU.
    pub on_cpu: bool,
    /// Time spent runnable without a CPU, ns, since its start.
    pub run_delay_ns: u64,
    /// Times it was scheduled on a CPU since its start.
    pub dispatches: u64,
    /// CPU time since its start, ns.
    pub cpu_ns: u64,
}

/// The scheduler state of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum State {
    /// Running on a CPU.
    Running,
    /// Waits for a CPU.
    Runnable,
    /// Interruptible sleep: waits for an event.
    Sleeping,
    /// In uninterruptible sleep, mostly waiting for a disk.
    Uninterruptible,
    /// Stopped by a signal or a debugger, or frozen.
    Stopped,
    /// Exiting.
    Dead,
}

/// What one thread of a target is doing or waiting for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wait {
    pub tgid: u32,
    pub tid: u32,
    /// Its thread id in its innermost pid namespace, which is the value in a lock's owner field.
    pub own_tid: u32,
    /// Its name (`comm`), with control characters escaped.
    pub comm: String,
    pub state: State,
    /// Waiting for a disk according to the kernel (`in_iowait`).
    pub io: bool,
    /// The system call that it is in, with its first arguments. `None` while it runs, or if this kernel does not report it.
    pub syscall: Option<Syscall>,
    /// Voluntary and involuntary context switches since its start.
    pub voluntary: u64,
    pub involuntary: u64,
    /// CPU time and time spent runnable without a CPU, ns, since its start.
    pub cpu_ns: u64,
    pub run_delay_ns: u64,
}

/// A system call that a thread is in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Syscall {
    /// The architecture that numbers it. Recordings store it once for each sample.
    #[serde(skip)]
    pub architecture: Architecture,
    pub number: i32,
    pub args: [u64; 4],
    /// What its arguments point to, if that shows what the thread waits for.
    pub detail: Detail,
}

/// User memory that a system call's arguments point to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Detail {
    /// Nothing was read.
    #[default]
    None,
    /// futex: the futex word and glibc's owner field of the mutex.
    Futex { word: u32, owner: u32 },
    /// poll: descriptor and events of the first entries.
    Poll(Vec<(i32, i16)>),
    /// A call on a file: its path, if it has one.
    File {
        path: String,
        device: Option<String>,
    },
}
