//! Which kernel field the eBPF programs read under which name, and what is lost where a kernel lacks it.
#![forbid(unsafe_code)]

use std::fmt;

use tailback_ebpf::{ABSENT, Layout};

use super::btf::Btf;

/// What a group of fields makes possible. Where one field of the group is missing, the feature is off and the
/// programs' code for it is pruned by the verifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Feature {
    /// Processes, threads and connections: without these there is nothing to show.
    Base,
    /// Age of each connection that waits to be accepted.
    AcceptAges,
    /// Drops of a listener or connection.
    Drops,
    /// Addresses of IPv6 sockets.
    Ipv6,
    /// Pipes and FIFOs.
    Pipes,
    /// Time that threads wait for a CPU.
    RunDelay,
    /// Telling a thread that runs from one that waits for a CPU.
    OnCpu,
}

impl Feature {
    /// All of them, in the order in which `doctor` shows them.
    pub const ALL: [Self; 7] = [
        Self::Base,
        Self::AcceptAges,
        Self::Drops,
        Self::Ipv6,
        Self::Pipes,
        Self::RunDelay,
        Self::OnCpu,
    ];

    /// What it is called in the plan.
    pub fn title(self) -> &'static str {
        match self {
            Self::Base => "processes, threads, TCP connections, listeners",
            Self::AcceptAges => "exact age of each connection waiting to be accepted",
            Self::Drops => "losses of a listener or connection",
            Self::Ipv6 => "addresses of IPv6 sockets",
            Self::Pipes => "pipes and FIFOs",
            Self::RunDelay => "time that threads wait for a CPU",
            Self::OnCpu => "telling a running thread from a waiting one",
        }
    }
}

struct Row {
    field: &'static str,
    feature: Feature,
    container: &'static str,
    /// Alternatives, newest name first.
    paths: &'static [&'static str],
    set: fn(&mut Layout) -> &mut u32,
}

macro_rules! rows {
    ($($feature:ident $field:ident = $container:literal : $($path:literal)|+;)*) => {
        &[$(Row {
            field: stringify!($field),
            feature: Feature::$feature,
            container: $container,
            paths: &[$($path),+],
            set: |layout| &mut layout.$field,
        }),*]
    };
}

const ROWS: &[Row] = rows! {
    // `__state` since 5.14.
    Base task_state = "task_struct": "__state" | "state";
    Base task_flags = "task_struct": "flags";
    Base task_tgid = "task_struct": "tgid";
    Base task_pid = "task_struct": "pid";
    Base task_group_leader = "task_struct": "group_leader";
    Base task_real_parent = "task_struct": "real_parent";
    // `real_start_time` before 5.5.
    Base task_start_boottime = "task_struct": "start_boottime" | "real_start_time";
    Base task_self_exec_id = "task_struct": "self_exec_id";
    Base task_comm = "task_struct": "comm";
    Base task_sum_exec_runtime = "task_struct": "se.sum_exec_runtime";
    Base task_thread_pid = "task_struct": "thread_pid";
    Base pid_level = "pid": "level";
    Base pid_numbers = "pid": "numbers";
    Base upid_nr = "upid": "nr";
    // Absent on kernels built for one CPU.
    OnCpu task_on_cpu = "task_struct": "on_cpu";
    RunDelay task_run_delay = "task_struct": "sched_info.run_delay";
    RunDelay task_pcount = "task_struct": "sched_info.pcount";
    Pipes file_inode = "file": "f_inode";
    Pipes file_mode = "file": "f_mode";
    Pipes inode_mode = "inode": "i_mode";
    Pipes inode_ino = "inode": "i_ino";
    Pipes inode_pipe = "inode": "i_pipe";
    Pipes pipe_head = "pipe_inode_info": "head";
    Pipes pipe_tail = "pipe_inode_info": "tail";
    Pipes pipe_max_usage = "pipe_inode_info": "max_usage";
    Pipes pipe_ring_size = "pipe_inode_info": "ring_size";
    Pipes pipe_readers = "pipe_inode_info": "readers";
    Pipes pipe_writers = "pipe_inode_info": "writers";
    Pipes pipe_bufs = "pipe_inode_info": "bufs";
    Pipes pipe_buffer_len = "pipe_buffer": "len";
    Base socket_sk = "socket": "sk";
    Base sk_family = "sock": "__sk_common.skc_family";
    Base sk_state = "sock": "__sk_common.skc_state";
    Base sk_num = "sock": "__sk_common.skc_num";
    Base sk_dport = "sock": "__sk_common.skc_dport";
    Base sk_daddr = "sock": "__sk_common.skc_daddr";
    Base sk_rcv_saddr = "sock": "__sk_common.skc_rcv_saddr";
    Base sk_cookie = "sock": "__sk_common.skc_cookie.counter";
    Base sk_net = "sock": "__sk_common.skc_net.net";
    Base net_inum = "net": "ns.inum";
    Base sk_rmem_alloc = "sock": "sk_backlog.rmem_alloc.counter";
    Base sk_rcvbuf = "sock": "sk_rcvbuf";
    Base sk_wmem_queued = "sock": "sk_wmem_queued";
    Base sk_sndbuf = "sock": "sk_sndbuf";
    Base sk_ack_backlog = "sock": "sk_ack_backlog";
    Base sk_max_ack_backlog = "sock": "sk_max_ack_backlog";
    Drops sk_drops = "sock": "sk_drops.counter";
    Ipv6 sk_v6_daddr = "sock": "__sk_common.skc_v6_daddr";
    Ipv6 sk_v6_rcv_saddr = "sock": "__sk_common.skc_v6_rcv_saddr";
    Base tcp_rcv_nxt = "tcp_sock": "rcv_nxt";
    Base tcp_copied_seq = "tcp_sock": "copied_seq";
    Base tcp_write_seq = "tcp_sock": "write_seq";
    Base tcp_snd_una = "tcp_sock": "snd_una";
    Base tcp_snd_nxt = "tcp_sock": "snd_nxt";
    Base tcp_snd_wnd = "tcp_sock": "snd_wnd";
    AcceptAges tcp_accept_head = "tcp_sock": "inet_conn.icsk_accept_queue.rskq_accept_head";
    AcceptAges tcp_srtt_us = "tcp_sock": "srtt_us";
    AcceptAges req_dl_next = "request_sock": "dl_next";
    AcceptAges req_sk = "request_sock": "sk";
    AcceptAges req_snt_synack = "tcp_request_sock": "snt_synack";
};

/// A field that this kernel's BTF does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// What is off without it.
    pub feature: Feature,
    /// Where it was looked for.
    pub container: &'static str,
    /// Under which names.
    pub paths: &'static [&'static str],
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            container, paths, ..
        } = self;
        write!(f, "struct {container} has no {}", paths.join(" or "))
    }
}

/// The offsets found, and what was not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// Fields of a feature that is off are all [`ABSENT`].
    pub layout: Layout,
    /// In the order of the table.
    pub missing: Vec<Missing>,
}

impl Resolved {
    /// Whether every field behind `feature` was found.
    pub fn has(&self, feature: Feature) -> bool {
        self.missing
            .iter()
            .all(|missing| missing.feature != feature)
    }
}

/// Finds every field in `btf`.
pub fn resolve(btf: &Btf<'_>) -> Resolved {
    resolve_without(btf, &[])
}

/// As [`resolve`], on a kernel that lacks the fields named in `hidden` too: for trying what a missing field does.
pub fn resolve_without(btf: &Btf<'_>, hidden: &[&str]) -> Resolved {
    let mut layout = Layout::EMPTY;
    let mut missing = Vec::new();
    let mut containers: Vec<_> = ROWS.iter().map(|row| row.container).collect();
    containers.dedup();
    let structs = btf.structs(&containers);
    let container = |name| {
        let index = containers.iter().position(|container| *container == name)?;
        structs[index]
    };
    for row in ROWS {
        let found = container(row.container).filter(|_| !hidden.contains(&row.field));
        match found.and_then(|id| row.paths.iter().find_map(|path| btf.field(id, path))) {
            Some(field) => *(row.set)(&mut layout) = field.offset,
            None => missing.push(Missing {
                feature: row.feature,
                container: row.container,
                paths: row.paths,
            }),
        }
    }
    let size = |name| {
        container(name)
            .and_then(|id| btf.size(id))
            .unwrap_or(ABSENT)
    };
    layout.upid_size = size("upid");
    layout.pipe_buffer_size = size("pipe_buffer");
    let mut resolved = Resolved { layout, missing };
    for row in ROWS {
        if !resolved.has(row.feature) {
            *(row.set)(&mut resolved.layout) = ABSENT;
        }
    }
    resolved
}
