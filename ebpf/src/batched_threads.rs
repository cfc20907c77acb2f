//! `iter/task`, bound to one thread: all threads of its process in a single visit.
//!
//! The kernel's own iterator takes and drops a reference to each thread and looks up the next one in the pid map. This
//! program follows the process's list of threads, which RCU keeps in place during the visit.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_loop;
use tailback_ebpf::{OUTPUT_BYTES, ThreadRecord};

use crate::{
    buffer_sink::{BufferSink, OUTPUT},
    cast::cast,
    kernel::{Sink as _, at_target, end_scan, load, offset},
    log::debug,
    task::{TaskContext, task_of, thread_record},
};

/// Rounds of the loop: one more than the threads that fit into the output buffer.
const MAX_THREADS: u32 = OUTPUT_BYTES / size_of::<ThreadRecord>() as u32 + 1;

/// Progress along the list.
#[repr(C)]
struct Threads {
    /// Address of the list head, in the `signal_struct`.
    head: u64,
    /// Address of the next thread's list node.
    next: u64,
    tgid: u32,
    ended: u32,
}

/// Writes a record for every thread of this task's process to the output buffer.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub extern "C" fn batched_threads(ctx: *const TaskContext) -> i32 {
    let Some((_, task)) = task_of(ctx) else {
        end_scan();
        return 0;
    };
    let Some(output) = OUTPUT.get_ptr_mut(0) else {
        return 0;
    };
    let tgid = load!(task, task_tgid, u32);
    if at_target(task, tgid).is_none() {
        return 0;
    }
    let signal = load!(task, task_signal, *const u8);
    let mut threads = Threads {
        head: signal as u64 + u64::from(offset!(signal_thread_head)),
        next: load!(signal, signal_thread_head, u64),
        tgid,
        ended: 0,
    };
    // SAFETY: the callback takes the struct passed here and runs before the helper returns.
    unsafe {
        bpf_loop(
            MAX_THREADS,
            emit_next as *mut c_void,
            (&raw mut threads).cast(),
            0,
        );
        (*output).is_complete = threads.ended;
    }
    if threads.ended == 0 {
        debug!("pid {}: more threads than the output buffer holds", tgid);
    }
    0
}

/// Emits one thread; returns 0 to continue.
#[inline(never)]
extern "C" fn emit_next(_index: u64, threads: *mut Threads) -> i64 {
    // SAFETY: the caller's struct, which outlives the call.
    let (head, next, tgid) = unsafe { ((*threads).head, (*threads).next, (*threads).tgid) };
    if next == head {
        // SAFETY: as above.
        unsafe { (*threads).ended = 1 };
        return 1;
    }
    let Some(output) = OUTPUT.get_ptr_mut(0) else {
        return 1;
    };
    let at = (next as *const u8).wrapping_sub(offset!(task_thread_node) as usize);
    let task = cast!(at, task_struct);
    let after = load!(task, task_thread_node, u64);
    // SAFETY: as above.
    unsafe { (*threads).next = after };
    BufferSink(output).write(&thread_record(task, tgid));
    // SAFETY: an array entry lives as long as its map.
    if unsafe { (*output).is_full } == 1 {
        1
    } else {
        0
    }
}
