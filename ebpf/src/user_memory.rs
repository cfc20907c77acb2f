//! Memory of other processes, without ever faulting in a page.
//!
//! A page that is not resident may belong to a file system or a `userfaultfd` that never answers, so a fault could block the
//! agent forever. Therefore the page tables are walked by probe reads, and the bytes are read through the
//! kernel's direct map of physical memory. What is not resident is reported as unknown. x86-64 only.
//!
//! No lock is taken, so the walk is repeated after the bytes were read, from the page directory that the task then has: they
//! count only if it leads to the same place.

use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use tailback_ebpf::{ABSENT, PAGE_OFFSET_CANDIDATES, Scan};

use crate::{
    kernel::{SCAN, load, offset, probe},
    task::{TaskContext, task_of},
};

/// Result of a walk that finds no page that may be read.
const NOT_RESIDENT: u64 = u64::MAX;

const PAGE_SIZE: u64 = 4096;

/// Log2 of the alignment of the base: arch/x86/mm/kaslr.c randomizes it by whole PUD entries (1 GiB).
const ALIGNMENT_BITS: u64 = 30;

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
    let left = PAGE_SIZE - from % PAGE_SIZE;
    if bytes <= left {
        // SAFETY: `words` has room for `len` words; the helper handles a bad address.
        let error = unsafe {
            bpf_probe_read_kernel(
                words.as_mut_ptr().cast(),
                len * 4,
                (page_offset + first) as *const _,
            )
        };
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
    let mm = load!(task, task_mm, u64);
    if mm == 0 {
        0
    } else {
        probe!(mm as *const u8, mm_pgd, u64)
    }
}

/// The physical address of a user address, or [`NOT_RESIDENT`].
#[cfg(bpf_target_arch = "x86_64")]
#[inline(never)]
extern "C" fn resident(pgd: u64, address: u64, page_offset: u64, end: u64, mask: u64) -> u64 {
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
        let entry =
            crate::kernel::probe_at::<u64>(table as *const u8, (address >> shift & 511) * 8);
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

/// Other architectures have other page tables.
#[cfg(not(bpf_target_arch = "x86_64"))]
#[inline(always)]
fn resident(_pgd: u64, _address: u64, _page_offset: u64, _end: u64, _mask: u64) -> u64 {
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
    let lowest = (page_directory(task) >> ALIGNMENT_BITS) - (end >> ALIGNMENT_BITS);
    for number in 0..PAGE_OFFSET_CANDIDATES {
        let base = (lowest + candidate + number) << ALIGNMENT_BITS;
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
