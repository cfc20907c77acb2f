//! What the eBPF programs need to know of the processor: the object is the same for x86-64 and aarch64.

use rustix::param::page_size;
use tailback_ebpf::{Layout, NO_CALL, Processor};

/// Size of a kernel stack, bytes (`THREAD_SIZE` without KASAN): arch/x86/include/asm/page_64_types.h,
/// arch/arm64/include/asm/memory.h, where it is at least a page.
const MIN_THREAD_SIZE: u32 = 16 * 1024;

/// The values for the machine that this runs on.
pub(super) fn of_this_machine(layout: &Layout) -> Processor {
    let page_size = page_size() as u32;
    if cfg!(target_arch = "aarch64") {
        aarch64(layout, page_size)
    } else {
        x86_64(layout)
    }
}

/// arch/x86/entry/syscalls/syscall_64.tbl
fn x86_64(layout: &Layout) -> Processor {
    Processor {
        is_aarch64: 0,
        futex: 202,
        poll: 7,
        ppoll: 271,
        // `ip` follows `orig_ax` in the user-visible layout (arch/x86/include/uapi/asm/ptrace.h), which does not change.
        regs_ip: layout.regs_number.wrapping_add(8),
        thread_size: MIN_THREAD_SIZE,
        page_bits: 12,
        // arch/x86/mm/kaslr.c randomizes it by whole PUD entries.
        page_offset_bits: 30,
    }
}

/// include/uapi/asm-generic/unistd.h, which has no poll(2).
fn aarch64(layout: &Layout, page_size: u32) -> Processor {
    let page_bits = page_size.trailing_zeros();
    Processor {
        is_aarch64: 1,
        futex: 98,
        poll: NO_CALL,
        ppoll: 73,
        // The user-visible layout (arch/arm64/include/uapi/asm/ptrace.h): 31 registers, the stack pointer, the program counter.
        regs_ip: layout.regs_arg1.wrapping_add(31 * 8),
        thread_size: MIN_THREAD_SIZE.max(page_size),
        page_bits,
        // `ARM64_MEMSTART_ALIGN` (arch/arm64/include/asm/kernel-pgtable.h): 512 MiB with pages of 64 KiB.
        page_offset_bits: if page_bits == 16 { 29 } else { 30 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_instruction_pointer_is_found_from_the_registers_of_a_system_call() {
        // struct pt_regs, arch/x86/include/asm/ptrace.h.
        let layout = Layout {
            regs_number: 120,
            ..Layout::EMPTY
        };
        assert_eq!(x86_64(&layout).regs_ip, 128);
        // `regs[1]` of struct pt_regs, arch/arm64/include/asm/ptrace.h.
        let layout = Layout {
            regs_arg1: 8,
            ..Layout::EMPTY
        };
        assert_eq!(aarch64(&layout, 4096).regs_ip, 256);
    }

    #[test]
    fn a_kernel_stack_of_aarch64_is_at_least_a_page() {
        let of = |page_size| aarch64(&Layout::EMPTY, page_size);
        assert_eq!((of(4096).thread_size, of(4096).page_bits), (16 * 1024, 12));
        assert_eq!((of(65536).thread_size, of(65536).page_bits), (65536, 16));
    }
}
