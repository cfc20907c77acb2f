//! The system calls of the adapter process: everything else is refused.
//!
//! It is the process that talks to the network, and it does little: it accepts connections, reads pages and the agent's replies, and
//! with Envoy configured writes a few files. So a list of what it needs is short, and stays right on kernels with new system calls.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use anyhow::Result;
use seccompiler::{SeccompAction, SeccompCmpOp, SeccompRule};

use super::{ABSENT, RENAMEAT, WRITING, apply, condition, is};

/// Allowed whatever the arguments.
const ALLOWED: &[libc::c_long] = &[
    // Data.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_fcntl,
    // Files: what is there. A unix socket whose address was in use is bound later, in place of a stale one, with its mode.
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_flock,
    libc::SYS_unlinkat,
    libc::SYS_fchmodat,
    // Sockets.
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socketpair,
    // Waiting.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Threads, and the end.
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Facts about itself and the machine.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_getcpu,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_sched_getaffinity,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// What a layer of Envoy's runtime is written with.
const WRITING_FILES: &[libc::c_long] = &[
    libc::SYS_fchmod,
    libc::SYS_mkdirat,
    RENAMEAT,
    libc::SYS_renameat2,
    libc::SYS_symlinkat,
];

/// The older forms of these, which a C library uses on the architecture that has them.
#[cfg(target_arch = "x86_64")]
const OLDER_FORMS: &[libc::c_long] = &[
    libc::SYS_access,
    libc::SYS_chmod,
    libc::SYS_epoll_wait,
    libc::SYS_lstat,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_stat,
    libc::SYS_time,
    libc::SYS_unlink,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER_FORMS: &[libc::c_long] = &[];
#[cfg(target_arch = "x86_64")]
const OLDER_WRITING_FILES: &[libc::c_long] = &[
    libc::SYS_mkdir,
    libc::SYS_rename,
    libc::SYS_rmdir,
    libc::SYS_symlink,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER_WRITING_FILES: &[libc::c_long] = &[];

/// Allowed address families: netlink, packet sockets and the like are not.
const FAMILIES: [libc::c_int; 3] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6];
/// Allowed requests of ioctl(2): non-blocking sockets, and whether a descriptor is a terminal.
const IOCTLS: [u64; 4] = [libc::FIONBIO, libc::FIOCLEX, libc::FIONREAD, libc::TCGETS];
/// Allowed operations of prctl(2): names of threads and of memory. `PR_SET_VMA` is in include/uapi/linux/prctl.h.
const PRCTLS: [u64; 2] = [libc::PR_SET_NAME as u64, 0x5356_4d41];

/// What happens at a system call that is not on the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It fails with ENOSYS, as on a kernel that does not have it: callers use an older one.
    Fails,
    /// The process is killed, and the kernel logs the number: for tests, in which nothing may be refused unnoticed.
    Kills,
}

/// Allows, in every thread and for good, only what the adapter process needs; `writes_files`: also what Envoy's layers need. Sets
/// no_new_privs.
pub fn allow_only_serving(writes_files: bool, refusal: Refusal) -> Result<()> {
    // Its arguments are in memory, where a filter does not see them. Callers fall back to clone(2) and openat(2).
    let absent = ABSENT.map(|call| (call, Vec::new()));
    let missing = SeccompAction::Errno(libc::ENOSYS as u32);
    apply(absent.into(), SeccompAction::Allow, missing.clone())?;
    let refused = match refusal {
        Refusal::Fails => missing,
        Refusal::Kills => SeccompAction::KillProcess,
    };
    apply(allowed(writes_files)?, refused, SeccompAction::Allow)
}

/// The system calls that are allowed, with the conditions: one of the rules must hold. No rule: always.
fn allowed(writes_files: bool) -> Result<BTreeMap<i64, Vec<SeccompRule>>> {
    let always = [ALLOWED, OLDER_FORMS, &ABSENT].concat();
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        always.into_iter().map(|call| (call, Vec::new())).collect();
    if writes_files {
        let more = [WRITING_FILES, OLDER_WRITING_FILES].concat();
        rules.extend(more.into_iter().map(|call| (call, Vec::new())));
    }
    let opens = |argument| -> Result<Vec<SeccompRule>> {
        if writes_files {
            return Ok(Vec::new());
        }
        let reads = WRITING.iter().map(|flag| {
            let flag = *flag as u64;
            condition(argument, SeccompCmpOp::MaskedEq(flag), 0)
        });
        Ok(vec![SeccompRule::new(reads.collect::<Result<_>>()?)?])
    };
    rules.insert(libc::SYS_openat, opens(2)?);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_open, opens(1)?);
    let one_of = |argument, values: &[u64]| -> Result<Vec<SeccompRule>> {
        let rules = values.iter();
        rules
            .map(|value| is(argument, SeccompCmpOp::Eq, *value))
            .collect()
    };
    rules.insert(libc::SYS_socket, one_of(0, &FAMILIES.map(|of| of as u64))?);
    rules.insert(libc::SYS_ioctl, one_of(1, &IOCTLS)?);
    rules.insert(libc::SYS_prctl, one_of(0, &PRCTLS)?);
    // Its own threads and limits only.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, one_of(0, &[own])?);
    rules.insert(libc::SYS_prlimit64, one_of(0, &[0])?);
    // A thread, but no process and no namespace.
    let thread = libc::CLONE_THREAD as u64;
    let is_thread = is(0, SeccompCmpOp::MaskedEq(thread), thread)?;
    rules.insert(libc::SYS_clone, vec![is_thread]);
    // No code but its own: the program is linked statically, so nothing is loaded later.
    let executable = libc::PROT_EXEC as u64;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![is(2, SeccompCmpOp::MaskedEq(executable), 0)?]);
    }
    Ok(rules)
}
