//! Offsets of the kernel fields that the programs read, and the kernel features they depend on.
//!
//! The agent resolves all of them before it loads the object. They become read-only data, so the verifier sees constants
//! and prunes the code for whatever this kernel lacks.

/// Offset of a field that this kernel does not have: the verifier prunes the code that reads it.
pub const ABSENT: u32 = u32::MAX;

macro_rules! layout {
    ($($(#[$meta:meta])* $field:ident,)*) => {
        /// Byte offsets into kernel structs, which the agent finds in the running kernel's BTF.
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
        pub struct Layout { $($(#[$meta])* pub $field: u32,)* }

        impl Layout {
            /// Every field absent.
            pub const EMPTY: Self = Self { $($field: ABSENT,)* };

            /// The field names, in the order of the struct.
            pub const FIELDS: &'static [&'static str] = &[$(stringify!($field),)*];
        }
    };
}

layout! {
    // struct task_struct
    task_state,
    task_on_cpu,
    task_flags,
    task_tgid,
    task_pid,
    task_group_leader,
    task_real_parent,
    task_start_boottime,
    task_self_exec_id,
    task_comm,
    task_run_delay,
    task_pcount,
    task_sum_exec_runtime,
    task_thread_pid,
    // a bit field: its offset is in bits
    task_in_iowait,
    task_nvcsw,
    task_nivcsw,
    task_signal,
    task_thread_node,
    task_files,
    task_stack,
    task_cgroups,
    task_mm,
    // struct mm_struct
    mm_pgd,
    // struct signal_struct
    signal_rlim,
    signal_thread_head,
    signal_nr_threads,
    // struct files_struct, struct fdtable
    files_count,
    files_fdt,
    fdt_max_fds,
    fdt_fd,
    // struct pt_regs
    regs_number,
    regs_arg0,
    regs_arg1,
    regs_arg2,
    regs_arg3,
    regs_size,
    // struct pid, struct upid
    pid_level,
    pid_numbers,
    upid_size,
    upid_nr,
    // struct css_set, struct cgroup_subsys_state, struct cgroup, struct cgroup_root, struct kernfs_node
    css_set_subsys,
    css_set_unified,
    css_cgroup,
    css_parent,
    cgroup_self,
    cgroup_kn,
    cgroup_root,
    root_hierarchy,
    kn_id,
    kn_name,
    // struct task_group, with its struct cfs_bandwidth
    group_css,
    group_period,
    group_quota,
    group_nr_throttled,
    group_throttled_time,
    // struct mem_cgroup
    memcg_css,
    memcg_usage,
    memcg_max,
    memcg_high,
    memcg_failcnt,
    memcg_events,
    // struct cgroup, struct psi_group
    cgroup_psi,
    psi_total,
    // struct file, struct inode, struct pipe_inode_info, struct pipe_buffer
    file_inode,
    file_mode,
    file_op,
    file_private_data,
    inode_mode,
    inode_ino,
    inode_pipe,
    pipe_head,
    pipe_tail,
    pipe_max_usage,
    pipe_ring_size,
    pipe_readers,
    pipe_writers,
    pipe_bufs,
    pipe_buffer_size,
    pipe_buffer_len,
    // struct socket, struct sock
    socket_sk,
    socket_alloc_inode,
    sk_family,
    sk_state,
    sk_num,
    sk_dport,
    sk_daddr,
    sk_rcv_saddr,
    sk_v6_daddr,
    sk_v6_rcv_saddr,
    sk_cookie,
    sk_net,
    net_inum,
    sk_drops,
    sk_rmem_alloc,
    sk_rcvbuf,
    sk_wmem_queued,
    sk_sndbuf,
    sk_ack_backlog,
    sk_max_ack_backlog,
    sk_type,
    sk_protocol,
    sk_socket,
    sk_wmem_alloc,
    sk_receive_next,
    sk_receive_qlen,
    sk_bpf_storage,
    // struct sock since 6.18: drops of UDP sockets, counted in two places
    sk_drop_counters,
    drop_counters_0,
    drop_counters_1,
    // struct udp_sock
    udp_forward_deficit,
    udp_reader_next,
    udp_reader_qlen,
    // struct sk_buff
    skb_len,
    skb_data,
    skb_tstamp,
    // struct unix_sock, struct unix_address
    unix_addr,
    unix_peer,
    unix_address_len,
    unix_address_name,
    // struct io_ring_ctx, struct io_rings
    ring_rings,
    rings_sq_head,
    rings_sq_tail,
    rings_sq_entries,
    rings_cq_head,
    rings_cq_tail,
    rings_cq_entries,
    rings_sq_dropped,
    rings_cq_overflow,
    // struct eventpoll, struct epitem, struct eventfd_ctx
    epoll_ready,
    epitem_ready_link,
    epitem_file,
    eventfd_count,
    // struct tcp_sock (and inet_connection_sock at its head)
    tcp_accept_head,
    tcp_rcv_nxt,
    tcp_copied_seq,
    tcp_write_seq,
    tcp_snd_una,
    tcp_snd_nxt,
    tcp_snd_wnd,
    tcp_srtt_us,
    tcp_half_open,
    tcp_snd_wl1,
    tcp_lrcvtime,
    tcp_lsndtime,
    tcp_rcv_tstamp,
    tcp_data_segs_in,
    tcp_data_segs_out,
    // struct mptcp_sock
    mptcp_first,
    // struct request_sock, struct tcp_request_sock
    req_dl_next,
    req_sk,
    req_snt_synack,
}

/// Which optional BPF helpers this kernel has (1) or lacks (0, the fallback is used). Frozen like [`Layout`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Helpers {
    /// `bpf_sock_from_file` (5.11): sockets as typed pointers, whose loads the verifier checks; else probe reads.
    pub typed_sockets: u32,
    /// `bpf_get_socket_cookie` in tracing programs (5.12): assigns a cookie to a socket that has none.
    pub cookies: u32,
    /// `bpf_sk_storage_get` in iterators (5.11): socket-local storage.
    pub sk_storage: u32,
    /// `bpf_get_current_task_btf` (5.11): the current task as a typed pointer; else probe reads.
    pub current_task: u32,
    /// `bpf_task_pt_regs` (5.15): a task's saved registers; else read from the top of its kernel stack.
    pub task_registers: u32,
    /// `bpf_loop` (5.17): loops whose rounds the kernel counts; else bounded loops.
    pub bpf_loop: u32,
}

/// What the kernel's types say of control groups besides offsets. Frozen like [`Layout`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Controllers {
    /// Index of each controller in `css_set.subsys`, or [`ABSENT`] if the kernel is built without it.
    pub cpu: u32,
    pub memory: u32,
    pub io: u32,
    /// 1: `cgroup.psi` is a pointer, since 6.1; 0: the struct itself.
    pub psi_is_pointer: u32,
    /// 1: `enum psi_states` has `PSI_CPU_FULL`, since 5.13.
    pub has_cpu_full: u32,
}

impl Controllers {
    /// No controller is known.
    pub const NONE: Self = Self {
        cpu: ABSENT,
        memory: ABSENT,
        io: ABSENT,
        psi_is_pointer: 0,
        has_cpu_full: 0,
    };
}

/// What depends on the processor's architecture, and on the page size that the kernel is built for. Frozen like [`Layout`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Processor {
    /// 1: aarch64; 0: x86-64.
    pub is_aarch64: u32,
    /// Numbers of the system calls whose memory is read, or [`NO_CALL`].
    pub futex: i32,
    pub poll: i32,
    pub ppoll: i32,
    /// Offset of the instruction pointer in `pt_regs`.
    pub regs_ip: u32,
    /// Size of a kernel stack, bytes (`THREAD_SIZE` without KASAN). A thread in a system call has its registers at the top.
    pub thread_size: u32,
    /// Log2 of the page size.
    pub page_bits: u32,
    /// Log2 of the alignment of the base of the direct map of physical memory.
    pub page_offset_bits: u32,
}

/// Number of a system call that an architecture does not have. It differs from `NO_SYSCALL`.
pub const NO_CALL: i32 = -2;

impl Processor {
    /// Not set.
    pub const NONE: Self = Self {
        is_aarch64: 0,
        futex: NO_CALL,
        poll: NO_CALL,
        ppoll: NO_CALL,
        regs_ip: ABSENT,
        thread_size: 0,
        page_bits: 12,
        page_offset_bits: 30,
    };
}

/// A made-up helper number that marks where a plain address is cast to a kernel type. The agent replaces each such call
/// with one of the kfunc `bpf_rdonly_cast`. The value spells "tail" in ASCII.
pub const CAST_CALL: u32 = 0x7461_696c;

/// BTF ids of the types that plain addresses are cast to; 0: the kernel has no such type. Frozen like [`Layout`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Types {
    pub task_struct: u32,
    pub file: u32,
    pub socket: u32,
    pub sock: u32,
    pub tcp_sock: u32,
    /// Stands for any struct that begins with a pointer.
    pub list_head: u32,
}

impl Types {
    /// No type is known.
    pub const NONE: Self = Self {
        task_struct: 0,
        file: 0,
        socket: 0,
        sock: 0,
        tcp_sock: 0,
        list_head: 0,
    };
}
