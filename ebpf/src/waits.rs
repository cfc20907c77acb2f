//! What the targets' threads are doing or blocked on: state, system call, its arguments, and what they point to.
//!
//! The user memory behind a futex or poll call is read if it is resident (`user_memory.rs`). Nothing is written there, no page
//! is faulted in, and no lock of the target is taken.

use aya_ebpf::{bindings::task_struct, helpers::generated::bpf_task_pt_regs};
use tailback_ebpf::{
    ABSENT, Header, KIND_WAIT, MAX_POLLED, NO_SYSCALL, Scan, TARGET_FOCUSED, WAIT_IO, WAIT_ON_CPU,
    WAIT_WORD, WaitRecord,
};

use crate::{
    kernel::{
        at_target, emit, end_scan, has_helper, load, load_or, offset, pid_at, probe, probe_at,
        processor,
    },
    task::{TaskContext, on_cpu, task_of},
    user_memory,
};

/// Writes what every thread of every target (or every focused target) is doing or blocked on.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub extern "C" fn waits(ctx: *const TaskContext) -> i32 {
    let Some((seq, task)) = task_of(ctx) else {
        end_scan();
        return 0;
    };
    let tgid = load!(task, task_tgid, u32);
    let Some(scan) = at_target(task, tgid) else {
        return 0;
    };
    // SAFETY: an array entry lives as long as its map.
    if unsafe { (*scan).only_focused == 1 && (*scan).flags & TARGET_FOCUSED == 0 } {
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
    // The saved registers of a running thread are those of its last interrupt or system call.
    if record.state == 0 && offset!(regs_number) != ABSENT {
        record.args[0] = probe_at(registers(task), u64::from(processor!(regs_ip)));
    }
    if record.state != 0 && offset!(regs_number) != ABSENT {
        read_syscall(task, &mut record);
        let call = record.syscall;
        if call == processor!(futex) {
            read_futex(scan, task, &mut record);
        } else if call == processor!(poll) || call == processor!(ppoll) {
            read_poll(scan, task, &mut record);
        }
    }
    emit(seq, &record);
    0
}

/// The id of a task in its innermost pid namespace.
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
    if is_in_iowait(task) {
        flags |= WAIT_IO;
    }
    flags
}

/// Whether the kernel counts a sleep of this thread as I/O.
#[inline(always)]
pub fn is_in_iowait(task: *const u8) -> bool {
    let bits = offset!(task_in_iowait);
    bits != ABSENT && probe_at::<u8>(task, u64::from(bits / 8)) >> (bits % 8) & 1 == 1
}

/// The registers that a thread had in user mode.
#[inline(always)]
pub fn registers(task: *const u8) -> *const u8 {
    if has_helper!(task_registers) {
        // SAFETY: `task` is a typed kernel pointer.
        unsafe { bpf_task_pt_regs(task.cast_mut().cast::<task_struct>()) as *const u8 }
    } else {
        let stack = load!(task, task_stack, u64);
        let top = stack + u64::from(processor!(thread_size));
        (top - u64::from(offset!(regs_size))) as *const u8
    }
}

/// Reads the system call that a sleeping thread is in.
#[inline(always)]
fn read_syscall(task: *const u8, record: &mut WaitRecord) {
    let regs = registers(task);
    record.syscall = probe!(regs, regs_number, u64) as i32;
    record.args = [
        probe!(regs, regs_arg0, u64),
        probe!(regs, regs_arg1, u64),
        probe!(regs, regs_arg2, u64),
        probe!(regs, regs_arg3, u64),
    ];
}

/// Reads the futex word, and the word where glibc keeps the owner of a mutex.
#[inline(always)]
fn read_futex(scan: *const Scan, task: *const u8, record: &mut WaitRecord) {
    let mut words = [0_u32; 3];
    if user_memory::read(scan, task, record.args[0], &mut words, 3) {
        record.word = words[0];
        record.owner = words[2];
        record.flags |= WAIT_WORD;
    }
}

/// Reads the first entries of a poll array.
#[inline(always)]
fn read_poll(scan: *const Scan, task: *const u8, record: &mut WaitRecord) {
    let wanted = record.args[1];
    let len = if wanted > MAX_POLLED as u64 {
        MAX_POLLED as u32
    } else {
        wanted as u32
    };
    let words = record.polled.as_flattened_mut();
    if len > 0 && user_memory::read(scan, task, record.args[0], words, len * 2) {
        record.polled_len = len;
    }
}
