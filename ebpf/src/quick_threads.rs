//! `iter/task`, once for a process: all of its threads in one visit.
//!
//! The kernel's own walk takes and drops a reference to each thread, and asks the pid map for the next. Here one visit
//! follows the list of the process's threads, which RCU keeps in place while the visit lasts.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_loop;
use tailback_ebpf::{SHEET_BYTES, ThreadRecord};

use crate::{
    cast::cast,
    kernel::{Sink as _, at_target, end_of_walk, load, offset},
    on_sheet::{OnSheet, SHEET},
    task::{TaskContext, record, task_of},
};

/// More do not fit on the sheet.
const MAX_THREADS: u32 = SHEET_BYTES / size_of::<ThreadRecord>() as u32 + 1;

/// Where the walk is.
#[repr(C)]
struct Threads {
    /// The list's head, in the process's `signal_struct`.
    head: u64,
    /// The next thread's place in the list.
    next: u64,
    tgid: u32,
    ended: u32,
}

/// Writes a record for every thread of the process of this task on the sheet.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub extern "C" fn quick_threads(ctx: *const TaskContext) -> i32 {
    let Some((_, task)) = task_of(ctx) else {
        end_of_walk();
        return 0;
    };
    let Some(sheet) = SHEET.get_ptr_mut(0) else {
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
    // SAFETY: the function takes what is passed here, and is called before the helper returns.
    unsafe {
        bpf_loop(
            MAX_THREADS,
            emit_next as *mut c_void,
            (&raw mut threads).cast(),
            0,
        );
        (*sheet).is_whole = threads.ended;
    }
    0
}

/// One thread; 0 goes on.
#[inline(never)]
extern "C" fn emit_next(_index: u64, threads: *mut Threads) -> i64 {
    // SAFETY: the caller's, which waits for us.
    let (head, next, tgid) = unsafe { ((*threads).head, (*threads).next, (*threads).tgid) };
    if next == head {
        // SAFETY: as above.
        unsafe { (*threads).ended = 1 };
        return 1;
    }
    let Some(sheet) = SHEET.get_ptr_mut(0) else {
        return 1;
    };
    let at = (next as *const u8).wrapping_sub(offset!(task_thread_node) as usize);
    let task = cast!(at, task_struct);
    let after = load!(task, task_thread_node, u64);
    // SAFETY: as above.
    unsafe { (*threads).next = after };
    OnSheet(sheet).write(&record(task, tgid));
    // SAFETY: an array entry lives as long as its map.
    if unsafe { (*sheet).is_full } == 1 {
        1
    } else {
        0
    }
}
