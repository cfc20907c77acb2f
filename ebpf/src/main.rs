//! The eBPF object: BPF iterators that the agent runs on its own clock, and the hooks of the tiers `auto` and `watch`.
//!
//! An iterator is attached to no event. It runs when the agent reads from its descriptor, on the agent's own
//! CPU time, and visits kernel objects under the same locks that the kernel takes for `/proc`.
//! Each iterator has a file of its own; `kernel.rs` holds what they share. The hooks (`sched_switch.rs`,
//! `sched_wakeup.rs`; shared: `run_state.rs`) are loaded only in the tiers `auto` and `watch`. The agent attaches and
//! detaches them as needed.
#![no_std]
#![no_main]

mod batched_files;
mod batched_threads;
mod buffer_sink;
mod cast;
mod cgroups;
mod epoll;
mod kernel;
mod log;
mod pipe;
mod run_state;
mod sched_switch;
mod sched_wakeup;
mod sk_storage;
mod sock;
mod task;
mod task_file;
mod tcp;
mod udp;
mod unix;
mod uring;
mod user_memory;
mod waits;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier rejects a program that can reach this endless loop.
    loop {}
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
