//! Drops the privileges of the running agent, once its programs are loaded and its files are open.
//!
//! From then on, sampling needs only the capabilities to read other processes, and the iterators that are already loaded.
//! The rest is given up permanently: all other capabilities in every thread, and forbidden system calls by a seccomp filter. An
//! attacker who controls the agent cannot load another eBPF program, start a program, open a file for writing, or attach to
//! another process.
//!
//! The adapter process, which talks to the network and needs little, has a list of what it may do instead (`allowlist`).
//!
//! Landlock cannot do it: a process in a Landlock domain may not inspect any process outside of it (`hook_ptrace_access_check` in
//! security/landlock/task.c does not distinguish reading), so /proc/PID/fd and the like would be closed to the agent.

mod allowlist;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    mem::MaybeUninit,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicI32, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

pub use allowlist::{Refusal, allow_only_serving};
use anyhow::{Context as _, Result, bail};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};

/// What samples need: to read the files of other users' processes.
const KEPT: CapabilitySet = CapabilitySet::SYS_PTRACE.union(CapabilitySet::DAC_READ_SEARCH);
/// Deadline for all threads to drop their capabilities. It takes microseconds, unless a thread waits for a file system.
const THREADS_DEADLINE: Duration = Duration::from_secs(2);
/// Time for each thread, also if others have used up the deadline.
const MIN_THREAD_TIME: Duration = Duration::from_millis(50);

/// What [`drop_capabilities`] has done.
#[derive(Clone, Copy, Debug)]
pub struct Dropped {
    pub kept: CapabilitySet,
    /// Number of threads that have not answered, because they wait for a file system. Each drops its capabilities when it continues.
    pub pending: usize,
}

/// Drops all capabilities that sampling does not need, in every thread. `still_works` tries the eBPF operations of a sample:
/// before Linux 5.19 they fail without CAP_BPF, which is then kept.
pub fn drop_capabilities(mut still_works: impl FnMut() -> bool) -> Result<Dropped> {
    let held = capabilities(None).context("cannot read the capabilities")?;
    let reading = if held.permitted.contains(CapabilitySet::DAC_READ_SEARCH) {
        KEPT
    } else {
        // The only other one that lets it read environments and logs of other users. No file can be opened for writing.
        KEPT | CapabilitySet::DAC_OVERRIDE
    };
    let tried = [
        reading,
        reading | CapabilitySet::BPF,
        // On a kernel of a distribution that has not split CAP_BPF off.
        reading | CapabilitySet::BPF | CapabilitySet::SYS_ADMIN,
    ];
    for kept in tried {
        let kept = kept & held.permitted;
        // First without giving it up.
        let effective = CapabilitySets {
            effective: kept,
            ..held
        };
        set_capabilities(None, effective).context("cannot lower the capabilities")?;
        if still_works() {
            let pending = set_in_all_threads(kept)?;
            return Ok(Dropped { kept, pending });
        }
    }
    set_capabilities(None, held).context("cannot restore the capabilities")?;
    bail!("eBPF iterators do not run without all of them")
}

/// The numbers of the set for the handler: `_LINUX_CAPABILITY_VERSION_3` has two words.
static WORDS: [AtomicU32; 2] = [AtomicU32::new(0), AtomicU32::new(0)];
/// How many threads have dropped theirs, and the last error.
static DONE: AtomicU32 = AtomicU32::new(0);
static ERROR: AtomicI32 = AtomicI32::new(0);
/// One at a time: the handler's data is static.
static ALONE: Mutex<()> = Mutex::new(());

/// The header and the data of capset(2), include/uapi/linux/capability.h.
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const VERSION_3: u32 = 0x2008_0522;

/// Sets the capabilities of the thread that it interrupts. Only calls a system call, as a signal handler may.
extern "C" fn set_own_capabilities(_signal: libc::c_int) {
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let word = |index: usize| {
        let bits = WORDS[index].load(Ordering::Relaxed);
        Data {
            effective: bits,
            permitted: bits,
            inheritable: 0,
        }
    };
    let data = [word(0), word(1)];
    // SAFETY: both structs are those of the kernel's interface, and live.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        if libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) != 0 {
            ERROR.store(*errno, Ordering::Relaxed);
        }
        *errno = before;
    }
    DONE.fetch_add(1, Ordering::Release);
}

/// The kernel keeps capabilities per thread, and a thread can only set its own: each is interrupted by a signal to do so. The
/// handler stays, for threads that cannot be interrupted yet. Returns their number.
fn set_in_all_threads(kept: CapabilitySet) -> Result<usize> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let bits = kept.bits();
    WORDS[0].store(bits as u32, Ordering::Relaxed);
    WORDS[1].store((bits >> 32) as u32, Ordering::Relaxed);
    let signal = libc::SIGRTMAX();
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: zeroed is a valid sigaction, and the handler only calls what it may.
    unsafe {
        let action = action.assume_init_mut();
        action.sa_sigaction = set_own_capabilities as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_RESTART;
        if libc::sigaction(signal, action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error()).context("cannot handle a signal");
        }
    }
    interrupt_all(signal)
}

fn interrupt_all(signal: libc::c_int) -> Result<usize> {
    let mut done = BTreeSet::new();
    let mut pending = 0;
    let deadline = Instant::now() + THREADS_DEADLINE;
    // A thread may start another one meanwhile, which inherits its capabilities: until there is none that is new.
    loop {
        let threads = threads()?;
        let new: Vec<i32> = threads.difference(&done).copied().collect();
        if new.is_empty() {
            break;
        }
        for thread in new {
            pending += usize::from(!interrupt(thread, signal, deadline)?);
            done.insert(thread);
        }
    }
    match ERROR.load(Ordering::Relaxed) {
        0 => Ok(pending),
        errno => Err(io::Error::from_raw_os_error(errno)).context("cannot drop capabilities"),
    }
}

fn threads() -> Result<BTreeSet<i32>> {
    let entries = fs::read_dir("/proc/self/task").context("cannot list the agent's threads")?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    Ok(names.collect())
}

/// Has a thread handle the signal, and waits until it has. Returns whether it has, or has ended.
fn interrupt(thread: i32, signal: libc::c_int, deadline: Instant) -> Result<bool> {
    let before = DONE.load(Ordering::Acquire);
    let deadline = deadline.max(Instant::now() + MIN_THREAD_TIME);
    // SAFETY: no pointers; the thread is one of this process.
    if unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) } != 0 {
        // It has ended.
        return Ok(true);
    }
    while DONE.load(Ordering::Acquire) == before {
        if Instant::now() > deadline {
            return Ok(!threads()?.contains(&thread));
        }
        thread::sleep(Duration::from_micros(100));
    }
    Ok(true)
}

/// Commands of bpf(2) that samples use, include/uapi/linux/bpf.h: read and write elements of maps, and run iterators. None of
/// them creates anything but a link or a file of an iterator that is loaded.
const BPF_COMMANDS: [u64; 6] = [
    1,  // BPF_MAP_LOOKUP_ELEM
    2,  // BPF_MAP_UPDATE_ELEM
    3,  // BPF_MAP_DELETE_ELEM
    4,  // BPF_MAP_GET_NEXT_KEY
    28, // BPF_LINK_CREATE
    33, // BPF_ITER_CREATE
];

/// renameat(2), whose number the crate `libc` lacks on aarch64.
const RENAMEAT: libc::c_long = if cfg!(target_arch = "x86_64") {
    264
} else {
    38
};

/// Attaches a program to its tracepoint, BPF_RAW_TRACEPOINT_OPEN. Only an agent with hooks (`--tier`) may do so, and it can only
/// attach those: it cannot load other programs.
const BPF_ATTACH: u64 = 17;

/// Forbidden whatever the arguments: starting programs, changing files, other processes, the machine, and one's own identity.
const FORBIDDEN: &[libc::c_long] = &[
    // Programs.
    libc::SYS_execve,
    libc::SYS_execveat,
    // Other processes.
    libc::SYS_kill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_tkill,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_ptrace,
    libc::SYS_kcmp,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    // Files, which the helper process creates.
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_unlinkat,
    RENAMEAT,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_truncate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    // A unix socket is a file, too.
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_open_by_handle_at,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_quotactl,
    // Mounts and namespaces.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    libc::SYS_unshare,
    // Identity. Not capset(2): it can only lower capabilities, and threads that could not be interrupted do so later.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    // The machine.
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_personality,
    // Numbers that are the same on all architectures, and that libc lacks: quotactl_fd, fchmodat2, setxattrat, removexattrat,
    // open_tree_attr, file_setattr.
    443,
    452,
    463,
    466,
    467,
    469,
];

/// The same, on the architecture that also has their older forms.
#[cfg(target_arch = "x86_64")]
const OLDER_FORMS: &[libc::c_long] = &[
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_creat,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_mknod,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_link,
    libc::SYS_symlink,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_futimesat,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_kexec_file_load,
    libc::SYS_uselib,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER_FORMS: &[libc::c_long] = &[libc::SYS_kexec_file_load];

/// Callers of these fall back to an older call that the filter can check, if the kernel seems not to have them.
const ABSENT: [libc::c_long; 2] = [libc::SYS_clone3, libc::SYS_openat2];

/// Set in the numbers of system calls of the x32 ABI, and the numbers that only that one has.
#[cfg(target_arch = "x86_64")]
const X32: (i64, std::ops::RangeInclusive<i64>) = (1 << 30, 512..=547);

/// Flags of open(2) that write, create or empty a file.
const WRITING: [libc::c_int; 4] = [libc::O_WRONLY, libc::O_RDWR, libc::O_CREAT, libc::O_TRUNC];

/// Forbids, in every thread and for good, what samples do not need. Sets no_new_privs. `hooks`: the agent attaches hooks.
pub fn filter_system_calls(hooks: bool) -> Result<()> {
    let absent = ABSENT.map(|call| (call, Vec::new()));
    let fails = |errno: libc::c_int| SeccompAction::Errno(errno as u32);
    apply(absent.into(), SeccompAction::Allow, fails(libc::ENOSYS))?;
    apply(forbidden(hooks)?, SeccompAction::Allow, fails(libc::EPERM))
}

/// Applies `matching` to the system calls of the rules, and `other` to all others.
fn apply(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    other: SeccompAction,
    matching: SeccompAction,
) -> Result<()> {
    let context = "cannot filter system calls";
    let filter = SeccompFilter::new(
        rules,
        other,
        matching,
        TargetArch::try_from(std::env::consts::ARCH).context(context)?,
    );
    let program = BpfProgram::try_from(filter.context(context)?).context(context)?;
    apply_filter_all_threads(&program).context(context)
}

/// The system calls that are forbidden, with the conditions. No condition: always.
fn forbidden(hooks: bool) -> Result<BTreeMap<i64, Vec<SeccompRule>>> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = FORBIDDEN
        .iter()
        .chain(OLDER_FORMS)
        .map(|call| (*call, Vec::new()))
        .collect();
    let other_command = BPF_COMMANDS
        .iter()
        .chain(hooks.then_some(&BPF_ATTACH))
        .map(|command| condition(0, SeccompCmpOp::Ne, *command));
    let other_command = other_command.collect::<Result<Vec<_>>>()?;
    rules.insert(libc::SYS_bpf, vec![SeccompRule::new(other_command)?]);
    let writes = |argument| {
        let flags = WRITING.iter().map(|flag| {
            let flag = *flag as u64;
            is(argument, SeccompCmpOp::MaskedEq(flag), flag)
        });
        flags.collect::<Result<Vec<_>>>()
    };
    rules.insert(libc::SYS_openat, writes(2)?);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_open, writes(1)?);
    // A thread, but no process.
    let thread = libc::CLONE_THREAD as u64;
    let is_process = is(0, SeccompCmpOp::MaskedEq(thread), 0)?;
    rules.insert(libc::SYS_clone, vec![is_process]);
    // A signal to another process, and its limits.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![is(0, SeccompCmpOp::Ne, own)?]);
    rules.insert(libc::SYS_prlimit64, vec![is(0, SeccompCmpOp::Ne, 0)?]);
    // Input for a terminal.
    let insert = libc::TIOCSTI;
    rules.insert(libc::SYS_ioctl, vec![is(1, SeccompCmpOp::Eq, insert)?]);
    #[cfg(target_arch = "x86_64")]
    {
        let (bit, own_numbers) = X32;
        let others: Vec<i64> = rules.keys().copied().chain(own_numbers).collect();
        rules.extend(others.into_iter().map(|call| (call | bit, Vec::new())));
    }
    Ok(rules)
}

fn is(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule> {
    Ok(SeccompRule::new(vec![condition(
        argument, operator, value,
    )?])?)
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition> {
    // All these arguments are int.
    let length = SeccompCmpArgLen::Dword;
    Ok(SeccompCondition::new(argument, length, operator, value)?)
}
