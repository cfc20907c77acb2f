//! One sample of all queues of all targets, as plain data.
//!
//! Everything downstream is a pure function of the stream of samples, which also carry the time. A recording of the
//! stream replays to the same output, byte for byte. Recordings are positional: never reorder or insert fields.
#![forbid(unsafe_code)]

mod accelerators;
pub mod anonymize;
mod app;
mod architecture;
mod conntrack;
pub mod cut;
pub mod file;
#[cfg(test)]
pub(crate) mod fixture;
mod hooks;
mod host;
mod jvm_counters;
mod local_ports;
mod lock_waits;
mod open_files;
pub mod texts;
mod threads;
mod workload;

pub use accelerators::{Accelerator, OnAccelerator};
pub use app::{AppAnswer, AppQueue, AppUnit};
pub use architecture::Architecture;
pub use conntrack::Conntrack;
pub use hooks::{
    Distribution, ExactWait, ExactWaitKind, HookCost, HookLoss, HookReport, WaitParty, WorstWait,
};
pub use host::{
    Cgroup, CpuUser, Hidden, HiddenFact, Holder, IoLimit, Listening, Machine, Network, Peer,
    Refaults, Stall,
};
pub use jvm_counters::{JvmCounters, VM_THREAD};
pub use local_ports::LocalPorts;
pub use lock_waits::{LockHolder, LockWait, SharedLock};
pub use open_files::{
    Connection, DatagramSocket, Epoll, Files, Listener, Pipe, Ring, UnixSocket, UnixStyle,
};
use serde::{Deserialize, Serialize};
pub use threads::{Detail, State, Syscall, Thread, Wait};
pub use workload::{NamedBy, Owner, Pod, Workload};

/// One sample.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// CLOCK_MONOTONIC when sampling began, ns.
    pub mono_ns: u64,
    /// Wall clock at the same moment, ns since 1970.
    pub unix_ns: u64,
    /// The watched services; in the first sample, and whenever they change.
    pub targets: Option<Vec<Target>>,
    /// The scans that this sample includes.
    pub scans: Scans,
    /// Listeners, each once.
    pub listeners: Vec<Listener>,
    /// Connections, each once.
    pub connections: Vec<Connection>,
    /// Pipe ends: one entry per process and descriptor.
    pub pipes: Vec<Pipe>,
    /// UDP sockets, each once.
    pub datagrams: Vec<DatagramSocket>,
    /// Unix sockets, each once.
    pub unix: Vec<UnixSocket>,
    /// io_uring instances, each once.
    pub rings: Vec<Ring>,
    /// Open files of each process.
    pub files: Vec<Files>,
    /// Threads of the targets; in samples with the scan `threads`.
    pub threads: Vec<Thread>,
    /// What threads of the targets are doing or waiting for; in samples with the scan `waits`.
    pub waits: Vec<Wait>,
    /// Counters of the network namespaces in which targets listen.
    pub networks: Vec<Network>,
    /// Control groups that hold targets; in samples with the scan `system`.
    pub cgroups: Vec<Cgroup>,
    /// The machine; in samples with the scan `system`.
    pub machine: Option<Machine>,
    /// CPU time of the machine's processes; in samples with the scan `cpu_users`.
    pub cpu_users: Vec<CpuUser>,
    /// All processes that listen on this host, and where; present when that changes.
    pub listening: Option<Vec<Listening>>,
    /// All processes that hold the other ends of the targets' pipes and unix sockets; present when that changes.
    pub holders: Option<Vec<Holder>>,
    /// What threads of focused targets and their neighbours are doing or waiting for; in samples with the scan `profile`.
    pub profile: Vec<Wait>,
    /// All processes on this host that hold the other ends of focused targets' connections; present when that was
    /// scanned.
    pub peers: Option<Vec<Peer>>,
    /// Process titles of focused targets and their neighbours; for each process at first and when the title changes.
    pub titles: Vec<Title>,
    /// Messages about full queues that targets wrote to their logs since the last sample.
    pub messages: Vec<Message>,
    /// The agent's own counters; in the first sample of each report interval.
    pub agent: Option<AgentReport>,
    /// Conditions of the agent itself that a user should know about.
    pub notices: Vec<Notice>,
    /// Threads in the focus scope that wait for locks which processes share; present when that was searched. Recordings
    /// store it after the sample (see [`mod@file`]), so that older ones can still be read.
    #[serde(skip)]
    pub lock_waits: Option<Vec<LockWait>>,
    /// Threads of `profile`, or else of `waits`, that are on an accelerator. Recorded behind `lock_waits`.
    #[serde(skip)]
    pub on_accelerator: Vec<OnAccelerator>,
    /// Remote addresses towards which a network namespace of focused targets has used up its local ports; present when that was
    /// searched. Recorded likewise.
    #[serde(skip)]
    pub local_ports: Option<Vec<LocalPorts>>,
    /// Connection tracking tables that are full; present when they were searched. Recorded likewise.
    #[serde(skip)]
    pub conntrack: Option<Vec<Conntrack>>,
    /// I/O limits of the control groups that hold targets; in samples with the scan `system`. Recorded likewise.
    #[serde(skip)]
    pub io_limits: Vec<IoLimit>,
    /// Pages that control groups of targets read again; in samples with the scan `system`. Recorded likewise.
    #[serde(skip)]
    pub refaults: Vec<Refaults>,
    /// Epoll instances of the targets whose ready files could be counted; in samples with the scan `files`. Recorded likewise.
    #[serde(skip)]
    pub epolls: Vec<Epoll>,
    /// What the agent cannot see from where it runs; in samples with the scan `system`. Recorded likewise.
    #[serde(skip)]
    pub hidden: Vec<Hidden>,
    /// Of the machine that the sample was taken on, as in each [`Syscall`]. Recorded likewise, unless it is x86-64.
    #[serde(skip)]
    pub architecture: Architecture,
    /// Counters of the JVMs in the focus scope that were read. Recorded likewise.
    #[serde(skip)]
    pub jvm_counters: Vec<JvmCounters>,
    /// Exact waits, in one sample a second of an agent with hooks. Recorded likewise.
    #[serde(skip)]
    pub hooks: Option<HookReport>,
    /// Answers of services that were asked for their own queues. Recorded likewise.
    #[serde(skip)]
    pub app: Vec<AppAnswer>,
}

/// Which scans a sample includes. An object that is absent from a sample is gone only if the scan that reports it is included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scans {
    /// All sockets and pipes of all targets.
    pub files: bool,
    /// All listeners, and the busy connections of focused targets.
    pub focused_sockets: bool,
    /// All threads of all targets.
    pub threads: bool,
    /// What each thread of each target waits for.
    pub waits: bool,
    /// Control groups and the host.
    pub system: bool,
    /// CPU time of all processes.
    pub cpu_users: bool,
    /// What each thread of each focused target and its neighbours waits for.
    pub profile: bool,
}

/// Identifies a target while it is watched; never reused.
pub type TargetId = u32;

/// One watched service: all processes that serve together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    pub id: TargetId,
    /// From the first of these that gives one: the configuration; with `--all` Kubernetes, a container runtime,
    /// systemd; the process's OTEL_SERVICE_NAME; the name of its program.
    pub name: String,
    /// The process that started the others (lowest start time), as the agent's /proc numbers it.
    pub pid: u32,
    /// CLOCK_BOOTTIME at which that process started, ns.
    pub start_ns: u64,
    /// Base name of its executable.
    pub exe: String,
    /// `comm` of that process, with control characters escaped.
    pub comm: String,
    /// Container id from the cgroup path, if it runs in a container.
    pub container: Option<String>,
    /// Its cgroup path.
    pub cgroup: Option<String>,
    /// Resource attributes from the service's OTEL_RESOURCE_ATTRIBUTES.
    pub attributes: Vec<(String, String)>,
    /// Number of CPUs that it may run on.
    pub cpus: u32,
    /// All its processes, numbered as in the initial pid namespace.
    pub tgids: Vec<u32>,
    /// A neighbour: not requested by the user, but watched while a requested target has connections to it.
    pub is_neighbour: bool,
    /// Where it runs, and who named it. Recorded behind the sample (see [`mod@file`]).
    #[serde(skip)]
    pub workload: Workload,
}

/// A process title, which the process wrote over its command line (`postgres: bob shop [local] UPDATE waiting`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Title {
    pub tgid: u32,
    /// With control characters escaped, bounded in length.
    pub title: String,
}

/// Lines in a target's log that report a full queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub tgid: u32,
    /// Path of the log file.
    pub path: String,
    /// Name of the message in the table of known messages.
    pub name: String,
    pub count: u32,
    /// The first such line since the last sample, with control characters escaped, bounded in length.
    pub line: String,
    /// The line was written between these times (CLOCK_MONOTONIC, ns): absent at the first, present at the second.
    pub not_before_ns: u64,
    pub not_after_ns: u64,
}

/// Counters of the agent and its cost, since its start unless stated otherwise. Field names are JSON keys.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentReport {
    pub samples: u64,
    pub records: u64,
    /// CPU time of the whole agent, ns.
    pub cpu_ns: u64,
    /// CPU usage over the last report interval, as a fraction of one core.
    pub cpu_share: f64,
    pub rss_bytes: u64,
    /// CPU time of the last file scan, ns.
    pub files_scan_ns: u64,
    /// Current interval of file scans, ns.
    pub files_interval_ns: u64,
    pub targets: u32,
    pub processes: u32,
    /// Base samples that began more than a whole interval late.
    pub late_samples: u64,
    /// Samples that could not be recorded.
    pub samples_not_recorded: u64,
    /// Spans passed to the exporter, delivered, and dropped (for lack of room, or refused by the collector).
    pub spans: u64,
    pub spans_delivered: u64,
    pub spans_dropped: u64,
}

/// A condition of the agent itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// A short name from a closed list, for programs.
    pub code: String,
    pub text: String,
}
