//! The table of kernel fields that the eBPF programs read, and what is lost if a kernel lacks one.
#![forbid(unsafe_code)]

use std::fmt;

use tailback_ebpf::{ABSENT, Controllers, Helpers, Layout, Types};

use super::btf::{Btf, StructId};

macro_rules! features {
    ($($(#[$meta:meta])* $feature:ident = $title:literal, without: $cost:literal;)*) => {
        /// What a group of fields makes possible. If one field of the group is missing, the feature is off and the verifier
        /// prunes the code for it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Feature {
            $($(#[$meta])* $feature,)*
        }

        impl Feature {
            /// Every feature, in the order that `doctor` shows them.
            pub const ALL: &'static [Self] = &[$(Self::$feature,)*];

            /// Its name in `doctor`.
            pub fn title(self) -> &'static str {
                match self {
                    $(Self::$feature => $title,)*
                }
            }

            /// What the user loses without it.
            pub fn cost(self) -> &'static str {
                match self {
                    $(Self::$feature => $cost,)*
                }
            }
        }
    };
}

features! {
    /// Processes, threads and connections: the minimum.
    Base = "processes, threads, TCP connections, listeners", without: "nothing can be watched";
    /// Age of each connection in an accept queue.
    AcceptAges = "exact age of each connection waiting to be accepted",
        without: "waits of accept queues are estimated from depth and rate";
    /// Half-open connections.
    HalfOpen = "half-open connections", without: "syn queues are not shown";
    /// MPTCP listeners.
    Mptcp = "MPTCP listeners", without: "MPTCP listeners (the default of Go servers since Go 1.24) are not seen";
    /// Drops of a listener or connection.
    Drops = "losses of a listener, connection or UDP socket", without: "losses are not counted";
    /// Separate drop counters of UDP sockets, since 6.18.
    DropCounters = "separate drop counters of UDP sockets",
        without: "nothing: before 6.18 the drops of a UDP socket are in its only drop counter";
    /// Whether a connection has an unanswered request.
    Requests = "requests in flight and outstanding calls", without: "inflight and downstream are not shown";
    /// Requests that start and end between two samples.
    ResponseRate = "responses per second of fast connections",
        without: "request rates are lower bounds if a connection carries several requests between two samples";
    /// Addresses of IPv6 sockets.
    Ipv6 = "addresses of IPv6 sockets", without: "IPv6 connections are shown without their addresses";
    /// Receive queues of UDP sockets.
    Udp = "UDP sockets", without: "UDP sockets are not watched";
    /// Unix sockets.
    Unix = "unix sockets", without: "unix sockets are not watched";
    /// Pipes and FIFOs.
    Pipes = "pipes and FIFOs", without: "pipes are not watched";
    /// The rings of io_uring.
    Rings = "io_uring", without: "the rings of io_uring are not watched";
    /// Ready files of an epoll instance.
    EpollReady = "ready files of epoll instances",
        without: "the depth of eventloop only says whether a turn is under way";
    /// RLIMIT_NOFILE of a process.
    FileLimit = "limit of open files", without: "the limit of open files is unknown";
    /// Time that threads wait for a CPU.
    RunDelay = "time that threads wait for a CPU", without: "run queue delays are unknown";
    /// Whether a runnable thread is on a CPU.
    OnCpu = "distinguishing running threads from runnable ones", without: "a running thread counts as waiting for a CPU";
    /// Scans that visit a process once instead of each of its files and threads.
    BatchedScans = "batched scans", without: "each file and thread is visited separately, which costs more CPU if there are many";
    /// The control groups of a process, whatever the agent sees of their files.
    Cgroups = "control groups of each process",
        without: "limits are read from mounted control groups alone: without such a mount they are unknown";
    /// CPU quotas from the scheduler's structures.
    CpuQuotas = "CPU quotas", without: "quotas are read from mounted control groups alone: without such a mount they are unknown";
    /// Memory limits from the structures of the memory controller.
    MemoryLimits = "memory limits",
        without: "memory limits are read from mounted control groups alone: without such a mount they are unknown";
    /// Pressure stall information of a control group.
    Stalls = "stall times of control groups",
        without: "stall times are read from mounted control groups alone: without such a mount they are unknown";
    /// The system call that a thread is blocked in.
    Syscalls = "system calls that threads are blocked in", without: "workers, eventloop, lock and disk are not shown";
    /// The futex word, lock owner or poll array behind such a call, if its page is resident.
    UserMemory = "lock owners, and the connections that a poll waits for",
        without: "locks cannot be distinguished from other futexes, and their owners are unknown";
}

struct Row {
    field: &'static str,
    feature: Feature,
    container: &'static str,
    /// Alternative names, newest first; for registers, the name on x86-64 and the one on aarch64.
    paths: &'static [&'static str],
    /// A bit field: the offset is in bits.
    bits: bool,
    set: fn(&mut Layout) -> &mut u32,
}

macro_rules! rows {
    (@) => { false };
    (@ bits) => { true };
    ($($feature:ident $field:ident = $container:literal : $($path:literal)|+ $(in $bits:ident)?;)*) => {
        &[$(Row {
            bits: rows!(@ $($bits)?),
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
    Syscalls task_in_iowait = "task_struct": "in_iowait" in bits;
    Syscalls task_nvcsw = "task_struct": "nvcsw";
    Syscalls task_nivcsw = "task_struct": "nivcsw";
    Syscalls task_stack = "task_struct": "stack";
    UserMemory task_mm = "task_struct": "mm";
    UserMemory mm_pgd = "mm_struct": "pgd";
    Syscalls regs_number = "pt_regs": "orig_ax" | "syscallno";
    Syscalls regs_arg0 = "pt_regs": "di" | "orig_x0";
    Syscalls regs_arg1 = "pt_regs": "si" | "regs[1]";
    Syscalls regs_arg2 = "pt_regs": "dx" | "regs[2]";
    Syscalls regs_arg3 = "pt_regs": "r10" | "regs[3]";
    Cgroups task_cgroups = "task_struct": "cgroups";
    Cgroups css_set_subsys = "css_set": "subsys";
    Cgroups css_set_unified = "css_set": "dfl_cgrp";
    Cgroups css_cgroup = "cgroup_subsys_state": "cgroup";
    Cgroups css_parent = "cgroup_subsys_state": "parent";
    Cgroups cgroup_self = "cgroup": "self";
    Cgroups cgroup_kn = "cgroup": "kn";
    Cgroups cgroup_root = "cgroup": "root";
    Cgroups root_hierarchy = "cgroup_root": "hierarchy_id";
    Cgroups kn_id = "kernfs_node": "id";
    Cgroups kn_name = "kernfs_node": "name";
    // Absent without CONFIG_CFS_BANDWIDTH.
    CpuQuotas group_css = "task_group": "css";
    CpuQuotas group_period = "task_group": "cfs_bandwidth.period";
    CpuQuotas group_quota = "task_group": "cfs_bandwidth.quota";
    CpuQuotas group_nr_throttled = "task_group": "cfs_bandwidth.nr_throttled";
    CpuQuotas group_throttled_time = "task_group": "cfs_bandwidth.throttled_time";
    // Absent without CONFIG_MEMCG.
    MemoryLimits memcg_css = "mem_cgroup": "css";
    MemoryLimits memcg_usage = "mem_cgroup": "memory.usage.counter";
    MemoryLimits memcg_max = "mem_cgroup": "memory.max";
    MemoryLimits memcg_high = "mem_cgroup": "memory.high";
    MemoryLimits memcg_failcnt = "mem_cgroup": "memory.failcnt";
    MemoryLimits memcg_events = "mem_cgroup": "memory_events";
    // Absent without CONFIG_PSI.
    Stalls cgroup_psi = "cgroup": "psi";
    Stalls psi_total = "psi_group": "total";
    FileLimit task_signal = "task_struct": "signal";
    FileLimit signal_rlim = "signal_struct": "rlim";
    BatchedScans task_thread_node = "task_struct": "thread_node";
    BatchedScans task_files = "task_struct": "files";
    BatchedScans signal_thread_head = "signal_struct": "thread_head";
    BatchedScans signal_nr_threads = "signal_struct": "nr_threads";
    BatchedScans files_count = "files_struct": "count.counter";
    BatchedScans files_fdt = "files_struct": "fdt";
    BatchedScans fdt_max_fds = "fdtable": "max_fds";
    BatchedScans fdt_fd = "fdtable": "fd";
    // Absent without CONFIG_BPF_SYSCALL.
    BatchedScans sk_bpf_storage = "sock": "sk_bpf_storage";
    // Absent on kernels built for one CPU.
    OnCpu task_on_cpu = "task_struct": "on_cpu";
    RunDelay task_run_delay = "task_struct": "sched_info.run_delay";
    RunDelay task_pcount = "task_struct": "sched_info.pcount";
    Base file_inode = "file": "f_inode";
    Pipes file_mode = "file": "f_mode";
    Base inode_mode = "inode": "i_mode";
    Base file_private_data = "file": "private_data";
    Rings file_op = "file": "f_op";
    Base inode_ino = "inode": "i_ino";
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
    Base sk_type = "sock": "sk_type";
    Base sk_protocol = "sock": "sk_protocol";
    Unix sk_socket = "sock": "sk_socket";
    Unix sk_wmem_alloc = "sock": "sk_wmem_alloc.refs.counter";
    Base sk_receive_next = "sock": "sk_receive_queue.next";
    Base sk_receive_qlen = "sock": "sk_receive_queue.qlen";
    Unix socket_alloc_inode = "socket_alloc": "vfs_inode";
    Base skb_len = "sk_buff": "len";
    Base skb_data = "sk_buff": "data";
    Base skb_tstamp = "sk_buff": "tstamp";
    Unix unix_addr = "unix_sock": "addr";
    Unix unix_peer = "unix_sock": "peer";
    Unix unix_address_len = "unix_address": "len";
    Unix unix_address_name = "unix_address": "name";
    Udp udp_forward_deficit = "udp_sock": "forward_deficit";
    Udp udp_reader_next = "udp_sock": "reader_queue.next";
    Udp udp_reader_qlen = "udp_sock": "reader_queue.qlen";
    DropCounters sk_drop_counters = "sock": "sk_drop_counters";
    DropCounters drop_counters_0 = "numa_drop_counters": "drops0.counter";
    DropCounters drop_counters_1 = "numa_drop_counters": "drops1.counter";
    Rings ring_rings = "io_ring_ctx": "rings";
    Rings rings_sq_head = "io_rings": "sq.head";
    Rings rings_sq_tail = "io_rings": "sq.tail";
    Rings rings_sq_entries = "io_rings": "sq_ring_entries";
    Rings rings_cq_head = "io_rings": "cq.head";
    Rings rings_cq_tail = "io_rings": "cq.tail";
    Rings rings_cq_entries = "io_rings": "cq_ring_entries";
    Rings rings_sq_dropped = "io_rings": "sq_dropped";
    Rings rings_cq_overflow = "io_rings": "cq_overflow";
    EpollReady epoll_ready = "eventpoll": "rdllist";
    EpollReady epitem_ready_link = "epitem": "rdllink";
    EpollReady epitem_file = "epitem": "ffd.file";
    EpollReady eventfd_count = "eventfd_ctx": "count";
    Drops sk_drops = "sock": "sk_drops.counter";
    Ipv6 sk_v6_daddr = "sock": "__sk_common.skc_v6_daddr";
    Ipv6 sk_v6_rcv_saddr = "sock": "__sk_common.skc_v6_rcv_saddr";
    Base tcp_rcv_nxt = "tcp_sock": "rcv_nxt";
    Base tcp_copied_seq = "tcp_sock": "copied_seq";
    Base tcp_write_seq = "tcp_sock": "write_seq";
    Base tcp_snd_una = "tcp_sock": "snd_una";
    Base tcp_snd_nxt = "tcp_sock": "snd_nxt";
    Base tcp_snd_wnd = "tcp_sock": "snd_wnd";
    Mptcp mptcp_first = "mptcp_sock": "first";
    HalfOpen tcp_half_open = "tcp_sock": "inet_conn.icsk_accept_queue.qlen.counter";
    Requests tcp_snd_wl1 = "tcp_sock": "snd_wl1";
    Requests tcp_lrcvtime = "tcp_sock": "inet_conn.icsk_ack.lrcvtime";
    Requests tcp_lsndtime = "tcp_sock": "lsndtime";
    Requests tcp_rcv_tstamp = "tcp_sock": "rcv_tstamp";
    ResponseRate tcp_data_segs_in = "tcp_sock": "data_segs_in";
    ResponseRate tcp_data_segs_out = "tcp_sock": "data_segs_out";
    AcceptAges tcp_accept_head = "tcp_sock": "inet_conn.icsk_accept_queue.rskq_accept_head";
    AcceptAges tcp_srtt_us = "tcp_sock": "srtt_us";
    AcceptAges req_dl_next = "request_sock": "dl_next";
    AcceptAges req_sk = "request_sock": "sk";
    AcceptAges req_snt_synack = "tcp_request_sock": "snt_synack";
};

/// A field that this kernel's BTF lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// What is off without it.
    pub feature: Feature,
    /// The struct.
    pub container: &'static str,
    /// Its names, newest first.
    pub paths: &'static [&'static str],
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            container, paths, ..
        } = self;
        write!(
            f,
            "struct {container} has no field `{}`",
            paths.join("` or `")
        )
    }
}

/// The offsets found, and the missing fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// All fields of a feature that is off are [`ABSENT`].
    pub layout: Layout,
    /// The optional helpers that this kernel has.
    pub helpers: Helpers,
    /// BTF ids of the types that batched scans cast to.
    pub types: Types,
    /// Indices of the controllers of control groups, and how PSI is laid out.
    pub controllers: Controllers,
    /// BTF id of the kfunc `bpf_rdonly_cast` (6.2).
    pub cast: Option<u32>,
    /// Missing fields, in the order of the table.
    pub missing: Vec<Missing>,
}

impl Resolved {
    /// Whether every field behind `feature` was found.
    pub fn has(&self, feature: Feature) -> bool {
        self.missing_for(feature).is_none()
    }

    /// The first missing field of `feature`.
    pub fn missing_for(&self, feature: Feature) -> Option<&Missing> {
        let mut missing = self.missing.iter();
        missing.find(|missing| missing.feature == feature)
    }
}

/// The optional helpers that the kernel's enumeration of helpers names. For a helper that is older than its use in iterators,
/// a newer helper, added after that use was allowed, is looked up instead.
fn helpers(btf: &Btf<'_>) -> Helpers {
    let has = |helper| u32::from(btf.has_enumerator("bpf_func_id", helper));
    Helpers {
        typed_sockets: has("BPF_FUNC_sock_from_file"),
        // Added in 5.13, after both uses were allowed.
        cookies: has("BPF_FUNC_for_each_map_elem"),
        sk_storage: has("BPF_FUNC_for_each_map_elem"),
        current_task: has("BPF_FUNC_get_current_task_btf"),
        task_registers: has("BPF_FUNC_task_pt_regs"),
        bpf_loop: has("BPF_FUNC_loop"),
    }
}

fn types(btf: &Btf<'_>) -> Types {
    let names = [
        "task_struct",
        "file",
        "socket",
        "sock",
        "tcp_sock",
        "list_head",
    ];
    let found = btf.structs(&names);
    let number = |name| {
        let at = names.iter().position(|known| *known == name)?;
        found[at].map(StructId::number)
    };
    let number = |name| number(name).unwrap_or(0);
    Types {
        task_struct: number("task_struct"),
        file: number("file"),
        socket: number("socket"),
        sock: number("sock"),
        tcp_sock: number("tcp_sock"),
        list_head: number("list_head"),
    }
}

fn controllers(btf: &Btf<'_>) -> Controllers {
    let index = |name| {
        btf.enumerator("cgroup_subsys_id", name)
            // The kernel has at most 16 controllers (`CGROUP_SUBSYS_COUNT`, include/linux/cgroup-defs.h).
            .filter(|index| *index <= 16)
            .unwrap_or(ABSENT)
    };
    let cgroup = btf.structs(&["cgroup"])[0];
    let is_pointer = cgroup.is_some_and(|cgroup| btf.is_pointer(cgroup, "psi"));
    Controllers {
        cpu: index("cpu_cgrp_id"),
        memory: index("memory_cgrp_id"),
        io: index("io_cgrp_id"),
        psi_is_pointer: u32::from(is_pointer),
        has_cpu_full: u32::from(btf.has_enumerator("psi_states", "PSI_CPU_FULL")),
    }
}

/// Resolves every field in `btf`.
pub fn resolve(btf: &Btf<'_>) -> Resolved {
    resolve_without(btf, &[])
}

/// Like [`resolve`], as if the kernel also lacked the fields named in `hidden`. For tests.
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
            Some(field) if row.bits => *(row.set)(&mut layout) = field.offset * 8 + field.bit,
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
    layout.regs_size = size("pt_regs");
    let mut resolved = Resolved {
        layout,
        helpers: helpers(btf),
        types: types(btf),
        controllers: controllers(btf),
        cast: btf.function("bpf_rdonly_cast"),
        missing,
    };
    for row in ROWS {
        if !resolved.has(row.feature) {
            *(row.set)(&mut resolved.layout) = ABSENT;
        }
    }
    resolved
}
