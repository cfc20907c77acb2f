//! `tp_btf/sched_wakeup` and `tp_btf/sched_wakeup_new`: a thread becomes runnable.
//!
//! Prototype, include/trace/events/sched.h: `(struct task_struct *p)`.
//!
//! Every wake-up on the machine pays for the test whether the woken thread belongs to a measured process.

use tailback_ebpf::{HOOK_WAKEUP, NOT_IN_CALL, THREAD_BLOCKED, THREAD_WOKEN, ThreadWait, WaitKey};

use crate::{
    kernel::load,
    run_state::{Run, current, current_comm, known_thread, set_thread, target_of},
    task::on_cpu,
};

/// The arguments of both tracepoints.
#[repr(C)]
pub struct WakeupContext {
    task: *const u8,
}

/// A sleeping thread is woken.
#[unsafe(no_mangle)]
#[unsafe(link_section = "tp_btf/sched_wakeup")]
pub extern "C" fn sched_wakeup(ctx: *const WakeupContext) -> i32 {
    // SAFETY: the kernel passes this argument to programs at this tracepoint.
    woken(unsafe { (*ctx).task }, false);
    0
}

/// A new thread becomes runnable for the first time.
#[unsafe(no_mangle)]
#[unsafe(link_section = "tp_btf/sched_wakeup_new")]
pub extern "C" fn sched_wakeup_new(ctx: *const WakeupContext) -> i32 {
    // SAFETY: as above.
    woken(unsafe { (*ctx).task }, true);
    0
}

#[inline(always)]
fn woken(task: *const u8, is_new: bool) {
    let Some(run) = Run::begin() else { return };
    let tgid = load!(task, task_tgid, u32);
    if let Some(target) = target_of(task, tgid) {
        let tid = load!(task, task_pid, u32);
        let (waker_tgid, waker_tid) = current();
        let known = known_thread(target, tid, tgid);
        if let Some(thread) = known
            && !is_new
        {
            // SAFETY: an entry of a preallocated map; only the CPU that runs or wakes the thread writes to it.
            let was = unsafe { *thread };
            // A wake-up can race with going to sleep: a thread that has not blocked yet stays runnable; no wait ends.
            if was.state == THREAD_BLOCKED {
                let key = WaitKey {
                    object: was.object,
                    tgid,
                    kind: was.kind as u16,
                    call: was.call as u16,
                };
                let wait_ns = run.since(was.since_ns);
                if let Some(worst) = run.record(target, key, tid, wait_ns) {
                    // SAFETY: the entry of this CPU.
                    unsafe {
                        (*worst).culprit_tgid = 0;
                        (*worst).culprit_tid = 0;
                        (*worst).culprit_ns = 0;
                        (*worst).culprit_comm = [0; 16];
                        (*worst).waker_tgid = waker_tgid;
                        (*worst).waker_tid = waker_tid;
                        current_comm(&raw mut (*worst).waker_comm);
                    }
                }
                // SAFETY: as above.
                unsafe {
                    (*thread).state = THREAD_WOKEN;
                    (*thread).since_ns = run.now_ns;
                    (*thread).waker_tgid = waker_tgid;
                    (*thread).waker_tid = waker_tid;
                }
            }
        } else if is_new || on_cpu(task) == 0 {
            if !is_new {
                // It went to sleep before the measurement began, or its entry was evicted.
                run.count_unmatched();
            }
            let thread = ThreadWait {
                since_ns: run.now_ns,
                object: 0,
                tgid,
                state: THREAD_WOKEN,
                call: u32::from(NOT_IN_CALL),
                kind: 0,
                waker_tgid,
                waker_tid,
            };
            set_thread(run, tid, known, thread);
        }
    }
    run.end(HOOK_WAKEUP);
}
