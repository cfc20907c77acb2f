//! Memory of other processes, without ever faulting in a page.
//!
//! A page that is not resident may belong to a file system or a `userfaultfd` that never answers, so a fault could block the
//! agent forever. Therefore the page tables are walked by probe reads, and the bytes are read through the
//! kernel's direct map of physical memory. What is not resident is reported as unknown.
//!
//! No lock is taken, so the page tables may change during a read. After the bytes were read, the walk is repeated from
//! the task's current page directory. The bytes count only if both walks lead to the same physical address.

use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use tailback_ebpf::{ABSENT, PAGE_OFFSET_CANDIDATES, Scan};

use crate::{
    kernel::{SCAN, load, offset, probe, probe_at, processor, read_barrier},
    task::{TaskContext, task_of},
};

/// Result of a walk that finds no page that may be read.
const NOT_RESIDENT: u64 = u64::MAX;

/// Reads `len` words at a user address of a task into `words`. `false` if they are not resident; some words may
/// then be wrong.
#[inline(always)]
pub fn read(scan: *const Scan, task: *const u8, from: u64, words: &mut [u32], len: u32) -> bool {
    // SAFETY: an array entry lives as long as its map; the agent changes these fields between scans only.
    let page_offset = unsafe { (*scan).page_offset };
    page_offset != 0 && read_by(page_offset, scan, task, from, words, len)
}

/// Like [`read`], with this base of the direct map of physical memory.
#[inline(always)]
fn read_by(
    page_offset: u64,
    scan: *const Scan,
    task: *const u8,
    from: u64,
    words: &mut [u32],
    len: u32,
) -> bool {
    // SAFETY: as above.
    let (end, mask) = unsafe { ((*scan).memory_end, (*scan).address_mask) };
    let pgd = page_directory(task);
    let bytes = u64::from(len) * 4;
    let first = resident(pgd, from, page_offset, end, mask);
    if first == NOT_RESIDENT {
        return false;
    }
    let page_size = 1_u64 << processor!(page_bits);
    let left = page_size - (from & (page_size - 1));
    if bytes <= left {
        // SAFETY: `words` has room for `len` words; the helper handles a bad address.
        let error = unsafe {
            bpf_probe_read_kernel(
                words.as_mut_ptr().cast(),
                len * 4,
                (page_offset + first) as *const _,
            )
        };
        read_barrier();
        return error == 0 && resident(page_directory(task), from, page_offset, end, mask) == first;
    }
    let second_page = from + left;
    let second = resident(pgd, second_page, page_offset, end, mask);
    if second == NOT_RESIDENT || from & 3 != 0 {
        return false;
    }
    let mut at = 0;
    for (number, word) in words.iter_mut().enumerate() {
        if number as u32 >= len {
            break;
        }
        let physical = if at < left {
            first + at
        } else {
            second + (at - left)
        };
        // SAFETY: room for one word; the helper handles a bad address.
        let error = unsafe {
            bpf_probe_read_kernel(
                core::ptr::from_mut(word).cast(),
                4,
                (page_offset + physical) as *const _,
            )
        };
        if error != 0 {
            return false;
        }
        at += 4;
    }
    read_barrier();
    let pgd = page_directory(task);
    resident(pgd, from, page_offset, end, mask) == first
        && resident(pgd, second_page, page_offset, end, mask) == second
}

/// The kernel's address of the top-level page table of a task; 0: it has none, or this kernel lacks the fields.
#[inline(always)]
fn page_directory(task: *const u8) -> u64 {
    if offset!(mm_pgd) == ABSENT {
        return 0;
    }
    // Not `load!`: at each typed load of a pointer the verifier of newer kernels searches all of the kernel's types by name. In
    // the rounds of `page_offset` that took a third of the agent's start (6.18).
    let mm = probe!(task, task_mm, u64);
    if mm == 0 {
        0
    } else {
        probe!(mm as *const u8, mm_pgd, u64)
    }
}

/// The physical address of a user address, or [`NOT_RESIDENT`].
#[inline(always)]
fn resident(pgd: u64, address: u64, page_offset: u64, end: u64, mask: u64) -> u64 {
    if processor!(is_aarch64) == 0 {
        resident_x86_64(pgd, address, page_offset, end, mask)
    } else {
        resident_aarch64(pgd, address, page_offset, end, mask)
    }
}

#[inline(never)]
extern "C" fn resident_x86_64(
    pgd: u64,
    address: u64,
    page_offset: u64,
    end: u64,
    mask: u64,
) -> u64 {
    // arch/x86/include/asm/pgtable_types.h
    const PRESENT: u64 = 1;
    const USER: u64 = 1 << 2;
    /// `_PAGE_PWT` and `_PAGE_PCD`: device memory is mapped with other caching than RAM.
    const CACHING: u64 = 0b11 << 3;
    const LARGE: u64 = 1 << 7;
    /// `_PAGE_SPECIAL`: not an ordinary page of memory, as in mappings of devices.
    const SPECIAL: u64 = 1 << 9;
    /// With five levels of page tables the direct map of physical memory begins below this address, with four above it
    /// (Documentation/arch/x86/x86_64/mm.rst).
    const FOUR_LEVELS: u64 = 0xffff_8000_0000_0000;
    if pgd == 0 {
        return NOT_RESIDENT;
    }
    let mut shift = if pgd < FOUR_LEVELS { 48 } else { 39 };
    // User addresses are the lower half.
    if address >> (shift + 8) != 0 {
        return NOT_RESIDENT;
    }
    let mut table = pgd;
    // One round per level.
    for _ in 0..5 {
        let entry = probe_at::<u64>(table as *const u8, (address >> shift & 511) * 8);
        if entry & (PRESENT | USER) != PRESENT | USER {
            return NOT_RESIDENT;
        }
        let physical = entry & mask;
        if shift == 12 || (shift <= 30 && entry & LARGE != 0) {
            if entry & (SPECIAL | CACHING) != 0 {
                return NOT_RESIDENT;
            }
            let within = (1 << shift) - 1;
            let physical = physical & !within | address & within;
            return if physical < end {
                physical
            } else {
                NOT_RESIDENT
            };
        }
        if physical >= end {
            return NOT_RESIDENT;
        }
        table = page_offset + physical;
        shift -= 9;
    }
    NOT_RESIDENT
}

#[inline(never)]
extern "C" fn resident_aarch64(
    pgd: u64,
    address: u64,
    page_offset: u64,
    end: u64,
    mask: u64,
) -> u64 {
    // arch/arm64/include/asm/pgtable-hwdef.h
    const VALID: u64 = 1;
    /// If set, the entry is a table above the last level, and a page on the last level. If clear, it is a block of
    /// memory above the last level, and invalid on the last level.
    const TABLE_OR_PAGE: u64 = 1 << 1;
    const USER: u64 = 1 << 6;
    /// Index of the memory type. `MT_NORMAL` is 0 and `MT_NORMAL_TAGGED` 1 since 5.10 (arch/arm64/include/asm/memory.h); device
    /// memory and memory without caches have others.
    const OTHER_TYPES: u64 = 0b110 << 2;
    /// `PTE_SPECIAL` (arch/arm64/include/asm/pgtable-prot.h): not an ordinary page of memory.
    const SPECIAL: u64 = 1 << 56;
    /// The processor ignores the highest byte of a user address: programs keep tags there.
    const UNTAGGED: u64 = (1 << 56) - 1;
    let Some(scan) = SCAN.get_ptr(0) else {
        return NOT_RESIDENT;
    };
    // SAFETY: an array entry lives as long as its map; the agent changes these fields between scans only.
    let (top_bits, user_bits) = unsafe { ((*scan).top_bits, (*scan).user_bits) };
    let page_bits = processor!(page_bits);
    // Each table fills a page with entries of 8 bytes.
    let index_bits = page_bits - 3;
    let address = address & UNTAGGED;
    if pgd == 0 || address >> (user_bits & 63) != 0 {
        return NOT_RESIDENT;
    }
    let mut shift = top_bits & 63;
    let mut table = pgd;
    // One round per level.
    for _ in 0..5 {
        let index = address >> shift & ((1 << index_bits) - 1);
        let entry = probe_at::<u64>(table as *const u8, index * 8);
        if entry & VALID == 0 {
            return NOT_RESIDENT;
        }
        let physical = entry & mask;
        let is_last = shift <= page_bits;
        if is_last == (entry & TABLE_OR_PAGE != 0) {
            if entry & USER == 0 || entry & (SPECIAL | OTHER_TYPES) != 0 {
                return NOT_RESIDENT;
            }
            let within = (1 << shift) - 1;
            let physical = physical & !within | address & within;
            return if physical < end {
                physical
            } else {
                NOT_RESIDENT
            };
        }
        if is_last || physical >= end {
            return NOT_RESIDENT;
        }
        table = page_offset + physical;
        shift = (shift - index_bits) & 63;
    }
    NOT_RESIDENT
}

/// Finds the base of the kernel's direct map: the one through which a known word of the agent's own memory is found. The page
/// directory of the agent lies in that map, at most `memory_end` above its base.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub extern "C" fn page_offset(ctx: *const TaskContext) -> i32 {
    let Some((_, task)) = task_of(ctx) else {
        return 0;
    };
    let Some(scan) = SCAN.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: an array entry lives as long as its map; only one scan runs at a time.
    let (own_tgid, found) = unsafe { ((*scan).own_tgid, (*scan).page_offset) };
    if found != 0
        || load!(task, task_tgid, u32) != own_tgid
        || load!(task, task_pid, u32) != own_tgid
    {
        return 0;
    }
    // SAFETY: as above.
    let (end, candidate, address, wanted) = unsafe {
        (
            (*scan).memory_end,
            (*scan).candidate,
            (*scan).own_address,
            (*scan).own_word,
        )
    };
    // Candidates ascend from the lowest, so no read is above the map.
    let bits = processor!(page_offset_bits);
    let lowest = (page_directory(task) >> bits) - (end >> bits);
    for number in 0..PAGE_OFFSET_CANDIDATES {
        let base = (lowest + candidate + number) << bits;
        let mut words = [0; 2];
        if read_by(base, scan, task, address, &mut words, 2)
            && u64::from(words[0]) | u64::from(words[1]) << 32 == wanted
        {
            // SAFETY: as above.
            unsafe { (*scan).page_offset = base };
            break;
        }
    }
    0
}
