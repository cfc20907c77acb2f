//! `iter/task`: every thread visible in the reader's pid namespace.
//!
//! Context, kernel/bpf/task_iter.c (since 5.8):
//! `struct bpf_iter__task { struct bpf_iter_meta *meta; struct task_struct *task; }`

use aya_ebpf::bindings::seq_file;
use tailback_ebpf::{
    CpuRecord, Header, KIND_CPU, KIND_PROCESS, KIND_THREAD, ProcessRecord, ThreadRecord,
};

use crate::kernel::{IterMeta, at_target, emit, end_scan, load, load_or, pid_at, reader_level};

#[repr(C)]
pub struct TaskContext {
    meta: *const IterMeta,
    task: *const u8,
}

/// include/linux/sched.h
const PF_KTHREAD: u32 = 0x0020_0000;

/// Writes a record for every thread of every target.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub extern "C" fn threads(ctx: *const TaskContext) -> i32 {
    let Some((seq, task)) = task_of(ctx) else {
        end_scan();
        return 0;
    };
    let tgid = load!(task, task_tgid, u32);
    if at_target(task, tgid).is_none() {
        return 0;
    }
    emit(seq, &thread_record(task, tgid));
    0
}

/// The record of a thread of a target.
#[inline(always)]
pub fn thread_record(task: *const u8, tgid: u32) -> ThreadRecord {
    ThreadRecord {
        header: Header {
            kind: KIND_THREAD,
            len: size_of::<ThreadRecord>() as u16,
            tgid,
        },
        tid: load!(task, task_pid, u32),
        state: load!(task, task_state, u32),
        on_cpu: on_cpu(task),
        reserved: 0,
        run_delay_ns: load_or!(task, task_run_delay, u64, 0),
        dispatches: load_or!(task, task_pcount, u64, 0),
        cpu_ns: load!(task, task_sum_exec_runtime, u64),
    }
}

/// Writes the CPU time of every thread, watched or not.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub extern "C" fn cpu_times(ctx: *const TaskContext) -> i32 {
    let Some((seq, task)) = task_of(ctx) else {
        return 0;
    };
    emit(
        seq,
        &CpuRecord {
            header: Header {
                kind: KIND_CPU,
                len: size_of::<CpuRecord>() as u16,
                tgid: load!(task, task_tgid, u32),
            },
            tid: load!(task, task_pid, u32),
            reserved: 0,
            cpu_ns: load!(task, task_sum_exec_runtime, u64),
        },
    );
    0
}

/// Writes a record for every process (the leader of every thread group).
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub extern "C" fn processes(ctx: *const TaskContext) -> i32 {
    let Some((seq, task)) = task_of(ctx) else {
        return 0;
    };
    let tgid = load!(task, task_tgid, u32);
    if load!(task, task_pid, u32) != tgid {
        return 0;
    }
    let parent = load!(task, task_real_parent, *const u8);
    emit(
        seq,
        &ProcessRecord {
            header: Header {
                kind: KIND_PROCESS,
                len: size_of::<ProcessRecord>() as u16,
                tgid,
            },
            pid: pid_in_reader_namespace(task, tgid),
            parent: load!(parent, task_tgid, u32),
            start_ns: load!(task, task_start_boottime, u64),
            exec_id: load!(task, task_self_exec_id, u64),
            kernel: u32::from(load!(task, task_flags, u32) & PF_KTHREAD != 0),
            reserved: 0,
            comm: load!(task, task_comm, [u8; 16]),
        },
    );
    0
}

/// The output and the task of this visit; `None` at the end of the scan, when the kernel calls once more without a task.
#[inline(always)]
pub fn task_of(ctx: *const TaskContext) -> Option<(*mut seq_file, *const u8)> {
    // SAFETY: the kernel passes a context of this shape to programs of this section.
    let (meta, task) = unsafe { ((*ctx).meta, (*ctx).task) };
    if task.is_null() {
        return None;
    }
    // SAFETY: `meta` is valid during the visit.
    Some((unsafe { (*meta).seq }, task))
}

/// 1 if a thread is running on a CPU. The field is an int, since 7.x a byte; its low byte holds 0 or 1 on both.
#[inline(always)]
pub fn on_cpu(task: *const u8) -> u32 {
    u32::from(load_or!(task, task_on_cpu, u8, 0))
}

/// The pid in the reader's pid namespace. A task has one id per namespace, from its own up to the initial one; the agent's
/// /proc shows the one at the agent's own level.
#[inline(always)]
fn pid_in_reader_namespace(task: *const u8, tgid: u32) -> u32 {
    let level = reader_level();
    if level == 0 {
        return tgid;
    }
    let pid = load!(task, task_thread_pid, *const u8);
    if pid.is_null() { 0 } else { pid_at(pid, level) }
}
