//! `tp_btf/sched_switch`: a CPU changes from one thread to another.
//!
//! Prototype, include/trace/events/sched.h: `(bool preempt, struct task_struct *prev, struct task_struct *next)`; since 5.18
//! `prev_state` follows (5.18 itself had it second, until 5.18.6; the verifier rejects the program there).
//!
//! Every context switch on the machine pays for the test whether its threads belong to measured processes.

use tailback_ebpf::{
    ABSENT, HOOK_SWITCH, MAX_CALLS, NOT_IN_CALL, THREAD_BLOCKED, THREAD_PREEMPTED, THREAD_RUNNING,
    THREAD_WOKEN, ThreadWait, WAIT_BLOCKED, WAIT_BLOCKED_IO, WAIT_PREEMPTED, WAIT_WOKEN, WaitKey,
};

use crate::{
    kernel::{has_helper, load, offset, probe},
    run_state::{HOOK_THREADS, Run, has_object, known_thread, set_thread, target_of},
    waits::{is_in_iowait, registers},
};

/// `TASK_DEAD`, include/linux/sched.h
const TASK_DEAD: u32 = 0x80;

/// The arguments of the tracepoint.
#[repr(C)]
pub struct SwitchContext {
    preempt: u64,
    prev: *const u8,
    next: *const u8,
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "tp_btf/sched_switch")]
pub extern "C" fn sched_switch(ctx: *const SwitchContext) -> i32 {
    // SAFETY: the kernel passes these arguments to programs at this tracepoint.
    let (preempt, prev, next) = unsafe { ((*ctx).preempt, (*ctx).prev, (*ctx).next) };
    let Some(run) = Run::begin() else { return 0 };
    leave(run, prev, preempt as u8 != 0);
    arrive(run, next, prev);
    // SAFETY: the entry of this CPU.
    unsafe { (*run.stats).last_switch_ns = run.now_ns };
    run.end(HOOK_SWITCH);
    0
}

/// A thread leaves the CPU: it is blocked, or still runnable and waits for a CPU again.
#[inline(always)]
fn leave(run: Run, prev: *const u8, is_preempted: bool) {
    let tid = load!(prev, task_pid, u32);
    let tgid = load!(prev, task_tgid, u32);
    // The idle task has no process.
    if tid == 0 || target_of(prev, tgid).is_none() {
        return;
    }
    let state = if is_preempted {
        0
    } else {
        load!(prev, task_state, u32)
    };
    if state & TASK_DEAD != 0 {
        // An error means that it was never seen.
        let _ = HOOK_THREADS.remove(tid);
        return;
    }
    let mut call = u32::from(NOT_IN_CALL);
    let mut object = 0;
    let mut kind = 0;
    let mut now = THREAD_PREEMPTED;
    if state != 0 {
        now = THREAD_BLOCKED;
        kind = if is_in_iowait(prev) {
            WAIT_BLOCKED_IO
        } else {
            WAIT_BLOCKED
        };
        if offset!(regs_number) != ABSENT {
            let (number, argument) = system_call(prev);
            if number < MAX_CALLS {
                call = number;
                if has_object(call) {
                    object = argument;
                }
            }
        }
    }
    let thread = ThreadWait {
        since_ns: run.now_ns,
        object,
        tgid,
        state: now,
        call,
        kind: u32::from(kind),
        waker_tgid: 0,
        waker_tid: 0,
    };
    set_thread(run, tid, HOOK_THREADS.get_ptr_mut(tid), thread);
}

/// A thread gets the CPU: its wait for it ends. `prev` had the CPU until now.
#[inline(always)]
fn arrive(run: Run, next: *const u8, prev: *const u8) {
    let tid = load!(next, task_pid, u32);
    let tgid = load!(next, task_tgid, u32);
    if tid == 0 {
        return;
    }
    let Some(target) = target_of(next, tgid) else {
        return;
    };
    let Some(thread) = known_thread(target, tid, tgid) else {
        // It was preempted before the measurement began, or its entry was evicted.
        run.count_unmatched();
        return;
    };
    // SAFETY: as in `leave`.
    let (state, since_ns) = unsafe { ((*thread).state, (*thread).since_ns) };
    // SAFETY: as in `leave`.
    unsafe { (*thread).state = THREAD_RUNNING };
    let kind = match state {
        THREAD_WOKEN => WAIT_WOKEN,
        THREAD_PREEMPTED => WAIT_PREEMPTED,
        _ => {
            run.count_unmatched();
            return;
        }
    };
    let key = WaitKey {
        object: 0,
        tgid,
        kind,
        call: NOT_IN_CALL,
    };
    let wait_ns = run.since(since_ns);
    let Some(worst) = run.record(target, key, tid, wait_ns) else {
        return;
    };
    let (culprit_tgid, culprit_tid) = (load!(prev, task_tgid, u32), load!(prev, task_pid, u32));
    let culprit_comm = load!(prev, task_comm, [u8; 16]);
    // SAFETY: the entries of this CPU and of this thread.
    unsafe {
        let begun_ns = (*run.stats).last_switch_ns;
        let from_ns = if begun_ns > since_ns {
            begun_ns
        } else {
            since_ns
        };
        (*worst).culprit_ns = run.since(from_ns);
        (*worst).culprit_tgid = culprit_tgid;
        (*worst).culprit_tid = culprit_tid;
        (*worst).culprit_comm = culprit_comm;
        (*worst).waker_tgid = (*thread).waker_tgid;
        (*worst).waker_tid = (*thread).waker_tid;
        (*worst).waker_comm = [0; 16];
    }
}

/// Number and first argument of the system call that a thread blocks in.
#[inline(always)]
fn system_call(task: *const u8) -> (u32, u64) {
    let regs = registers(task);
    // The number is a long on x86-64, whose lower half comes first, and an int on aarch64.
    if has_helper!(task_registers) {
        (load!(regs, regs_number, u32), load!(regs, regs_arg0, u64))
    } else {
        (probe!(regs, regs_number, u32), probe!(regs, regs_arg0, u64))
    }
}
