//! The machine around the targets: control groups, CPU users, network namespaces, and other processes at the far ends of
//! their sockets and pipes.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Time that tasks stalled on a resource, ns since boot (pressure stall information, PSI).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stall {
    /// At least one task stalled; all tasks stalled.
    pub some_ns: u64,
    pub full_ns: u64,
}

/// A control group in which targets run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// As in `Target::cgroup`.
    pub path: String,
    /// CPU quota in thousandths of a CPU; `None` without a quota.
    pub quota_millicpus: Option<u64>,
    /// Throttled periods and throttled time (ns) since its creation.
    pub throttled_periods: Option<u64>,
    pub throttled_ns: Option<u64>,
    /// CPU time of all its processes, ns.
    pub cpu_ns: Option<u64>,
    /// Memory use and limit, bytes; `None` without a limit.
    pub memory: Option<u64>,
    /// The part of the memory that can be reclaimed at once (inactive page cache), bytes.
    pub reclaimable: Option<u64>,
    pub memory_limit: Option<u64>,
    /// Times that the limit was hit, and processes killed for that.
    pub limit_hits: Option<u64>,
    pub oom_kills: Option<u64>,
    pub cpu_stall: Option<Stall>,
    pub memory_stall: Option<Stall>,
    pub io_stall: Option<Stall>,
}

/// What a control group, or a parent of it, allows on one block device. `None`: no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoLimit {
    /// As in `Target::cgroup`.
    pub cgroup: String,
    /// Name of the device; its numbers, `8:0`, if that is unknown.
    pub device: String,
    pub reads_per_s: Option<u64>,
    pub writes_per_s: Option<u64>,
    pub read_bytes_per_s: Option<u64>,
    pub written_bytes_per_s: Option<u64>,
}

/// Pages of a control group with a memory limit, since its creation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refaults {
    /// As in `Target::cgroup`.
    pub cgroup: String,
    /// Pages that were evicted and read again soon after.
    pub refaults: u64,
    /// Pages charged to it; where the kernel does not count these, pages taken from it.
    pub pages: u64,
}

/// What the agent cannot see from where it runs. Not seen is not the same as absent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hidden {
    /// The control group whose fact it is, as in `Target::cgroup`; empty if it concerns all.
    pub cgroup: String,
    pub fact: HiddenFact,
}

/// A fact that can be hidden.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HiddenFact {
    /// The CPU quota of a control group.
    CpuQuota,
    /// Its memory limit.
    MemoryLimit,
    /// Its I/O limits.
    IoLimits,
    /// The I/O limits of the groups around it; it has none itself.
    OuterIoLimits,
    /// Processes outside the agent's pid namespace.
    Processes,
}

/// The whole host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub cpus: u32,
    /// CPU time since boot, ns: used, idle, and stolen by the hypervisor.
    pub busy_ns: u64,
    pub idle_ns: u64,
    pub steal_ns: u64,
    pub memory: u64,
    pub memory_available: u64,
    pub oom_kills: u64,
    pub cpu_stall: Option<Stall>,
    pub memory_stall: Option<Stall>,
    pub io_stall: Option<Stall>,
}

/// A process on the host, watched or not, that used CPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuUser {
    pub tgid: u32,
    pub name: String,
    pub cgroup: Option<String>,
    /// CPU time of its threads since the previous sample with the scan `cpu_users`, ns.
    pub cpu_ns: u64,
}

/// A process that listens on an address of this host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Listening {
    pub netns: u32,
    pub address: SocketAddr,
    pub tgid: u32,
    pub name: String,
}

/// A process that holds an end of a pipe or a unix socket.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Holder {
    /// Inode of the pipe, or of the unix socket.
    pub inode: u64,
    pub tgid: u32,
    pub name: String,
    pub fd: u32,
    pub reads: bool,
    pub writes: bool,
}

/// A process at the other end of a target's connection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Peer {
    pub netns: u32,
    /// Addresses from this process's side: its `remote` is the target's `local`.
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub tgid: u32,
    pub fd: u32,
    pub name: String,
}

/// Counters of one network namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    pub netns: u32,
    /// `TcpPassiveOpens`: connections that entered an accept queue.
    pub passive_opens: u64,
    /// Listening sockets that no target holds; the counters include their connections.
    pub others: u32,
    /// `ListenOverflows`: handshakes rejected because an accept queue was full.
    pub listen_overflows: u64,
    /// `TCPReqQFullDrop`: SYNs dropped because too many handshakes were half open.
    pub syn_drops: u64,
    /// `SyncookiesSent`: handshakes answered with a SYN cookie, without kernel state.
    pub syn_cookies: u64,
}
