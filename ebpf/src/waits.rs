//! What the threads of the targets are doing or waiting for: state, system call, arguments, and what these point to.
//!
//! Two programs of one shape: where the kernel lets an iterator sleep (`iter.s/task`, 5.18), the user memory behind a
//! futex or a poll is read as well. Nothing is written there, and no lock of the target is taken.

use aya_ebpf::{
    bindings::task_struct,
    helpers::generated::{bpf_copy_from_user_task, bpf_task_pt_regs},
};
use tailback_ebpf::{
    ABSENT, Header, KIND_WAIT, MAX_POLLED, NO_SYSCALL, TARGET_HOT, WAIT_IO, WAIT_ON_CPU, WAIT_WORD,
    WaitRecord,
};

use crate::{
    kernel::{at_target, emit, end_of_walk, load, load_or, offset, pid_at, probe, probe_at, way},
    task::{TaskContext, on_cpu, task_of},
};

/// arch/x86/entry/syscalls/syscall_64.tbl
#[cfg(bpf_target_arch = "x86_64")]
mod syscall {
    pub const POLL: i32 = 7;
    pub const FUTEX: i32 = 202;
    pub const PPOLL: i32 = 271;
}

/// include/uapi/asm-generic/unistd.h; there is no poll(2).
#[cfg(not(bpf_target_arch = "x86_64"))]
mod syscall {
    pub const POLL: i32 = -2;
    pub const FUTEX: i32 = 98;
    pub const PPOLL: i32 = 73;
}

/// Bytes of a kernel stack (`THREAD_SIZE` without KASAN), at whose top a thread in a system call keeps its registers.
const THREAD_SIZE: u64 = 16 * 1024;

/// As `waits`, without what user memory tells.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub extern "C" fn waits(ctx: *const TaskContext) -> i32 {
    visit(ctx, false)
}

/// Writes what every thread of every target waits for, or of every hot target.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter.s/task")]
pub extern "C" fn waits_in_depth(ctx: *const TaskContext) -> i32 {
    visit(ctx, true)
}

#[inline(always)]
fn visit(ctx: *const TaskContext, in_depth: bool) -> i32 {
    let Some((seq, task)) = task_of(ctx) else {
        end_of_walk();
        return 0;
    };
    let tgid = load!(task, task_tgid, u32);
    let Some(walk) = at_target(task, tgid) else {
        return 0;
    };
    // SAFETY: an array entry lives as long as its map.
    if unsafe { (*walk).only_hot == 1 && (*walk).flags & TARGET_HOT == 0 } {
        return 0;
    }
    let mut record = WaitRecord {
        header: Header {
            kind: KIND_WAIT,
            len: size_of::<WaitRecord>() as u16,
            tgid,
        },
        tid: load!(task, task_pid, u32),
        own_tid: own_tid(task),
        state: load!(task, task_state, u32),
        flags: flags(task),
        voluntary: load_or!(task, task_nvcsw, u64, 0),
        involuntary: load_or!(task, task_nivcsw, u64, 0),
        cpu_ns: load!(task, task_sum_exec_runtime, u64),
        run_delay_ns: load_or!(task, task_run_delay, u64, 0),
        args: [0; 4],
        syscall: NO_SYSCALL,
        word: 0,
        owner: 0,
        polled_len: 0,
        polled: [[0; 2]; MAX_POLLED],
        comm: load!(task, task_comm, [u8; 16]),
    };
    // While a thread runs its registers are in the CPU: what stands on its stack is old.
    if record.state != 0 && offset!(regs_number) != ABSENT {
        read_syscall(task, &mut record);
        if in_depth {
            match record.syscall {
                syscall::FUTEX => read_futex(task, &mut record),
                syscall::POLL | syscall::PPOLL => read_poll(task, &mut record),
                _ => {}
            }
        }
    }
    emit(seq, &record);
    0
}

/// The number of a task in its innermost pid namespace.
#[inline(always)]
fn own_tid(task: *const u8) -> u32 {
    let pid = load!(task, task_thread_pid, *const u8);
    if pid.is_null() {
        return 0;
    }
    pid_at(pid, load!(pid, pid_level, u32))
}

#[inline(always)]
fn flags(task: *const u8) -> u32 {
    let mut flags = 0;
    if on_cpu(task) != 0 {
        flags |= WAIT_ON_CPU;
    }
    let bits = offset!(task_in_iowait);
    if bits != ABSENT && probe_at::<u8>(task, u64::from(bits / 8)) >> (bits % 8) & 1 == 1 {
        flags |= WAIT_IO;
    }
    flags
}

/// The system call that a sleeping thread is in.
#[inline(always)]
fn read_syscall(task: *const u8, record: &mut WaitRecord) {
    let regs = if way!(task_registers) {
        // SAFETY: `task` is a typed kernel pointer.
        unsafe { bpf_task_pt_regs(task.cast_mut().cast::<task_struct>()) as *const u8 }
    } else {
        let stack = load!(task, task_stack, u64);
        (stack + THREAD_SIZE - u64::from(offset!(regs_size))) as *const u8
    };
    record.syscall = probe!(regs, regs_number, u64) as i32;
    record.args = [
        probe!(regs, regs_arg0, u64),
        probe!(regs, regs_arg1, u64),
        probe!(regs, regs_arg2, u64),
        probe!(regs, regs_arg3, u64),
    ];
}

/// The word that a thread waits on, and what stands where glibc keeps the owner of a mutex.
#[inline(always)]
fn read_futex(task: *const u8, record: &mut WaitRecord) {
    let mut words = [0_u32; 3];
    if copy_from_user(task, record.args[0], words.as_mut_ptr().cast(), 12) {
        record.word = words[0];
        record.owner = words[2];
        record.flags |= WAIT_WORD;
    }
}

/// The first descriptors of a poll.
#[inline(always)]
fn read_poll(task: *const u8, record: &mut WaitRecord) {
    let wanted = record.args[1];
    let len = if wanted > MAX_POLLED as u64 {
        MAX_POLLED as u32
    } else {
        wanted as u32
    };
    if len > 0
        && copy_from_user(
            task,
            record.args[0],
            record.polled.as_mut_ptr().cast(),
            len * 8,
        )
    {
        record.polled_len = len;
    }
}

#[inline(always)]
fn copy_from_user(task: *const u8, from: u64, to: *mut u8, len: u32) -> bool {
    // SAFETY: the helper checks the address; `to` has room for `len` bytes.
    let error = unsafe {
        bpf_copy_from_user_task(
            to.cast(),
            len,
            from as *const _,
            task.cast_mut().cast::<task_struct>(),
            0,
        )
    };
    error == 0
}
