//! The eBPF object of the glance tier: BPF iterators, run by the agent on its own clock.
//!
//! Nothing here is attached to an event. An iterator runs when the agent reads from its descriptor, in the
//! agent's own time, and visits kernel objects under the locks that the kernel takes for `/proc`.
//! One file per iterator; `kernel.rs` holds what they share.
#![no_std]
#![no_main]

mod cast;
mod kernel;
mod on_sheet;
mod pipe;
mod quick_files;
mod quick_threads;
mod sk_storage;
mod sock;
mod task;
mod task_file;
mod tcp;
mod udp;
mod unix;
mod uring;
mod waits;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses a program in which this can be reached.
    loop {}
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
