//! Where the kernel keeps each field that the programs read.

/// The offset of a field that this kernel does not have: the code behind it is pruned by the verifier.
pub const ABSENT: u32 = u32::MAX;

macro_rules! layout {
    ($($(#[$meta:meta])* $field:ident,)*) => {
        /// Byte offsets into kernel structs, found in the running kernel's BTF by the agent before it loads
        /// the object, and frozen as read-only data: the verifier sees constants.
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
        pub struct Layout { $($(#[$meta])* pub $field: u32,)* }

        impl Layout {
            /// Nothing is known yet.
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
    // struct pid, struct upid
    pid_level,
    pid_numbers,
    upid_size,
    upid_nr,
    // struct file, struct inode, struct pipe_inode_info, struct pipe_buffer
    file_inode,
    file_mode,
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
    // struct tcp_sock (and inet_connection_sock at its head)
    tcp_accept_head,
    tcp_rcv_nxt,
    tcp_copied_seq,
    tcp_write_seq,
    tcp_snd_una,
    tcp_snd_nxt,
    tcp_snd_wnd,
    tcp_srtt_us,
    // struct request_sock, struct tcp_request_sock
    req_dl_next,
    req_sk,
    req_snt_synack,
}
