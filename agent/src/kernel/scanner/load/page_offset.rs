//! Finds the base of the kernel's direct map of physical memory, through which the programs read resident memory of targets.
//!
//! The base is randomized at boot, and its symbol is not in every kernel's /proc/kallsyms. So a program tries one base after
//! another, until the walk over the page tables leads to a known word of the agent's own memory. This also checks the walk
//! itself.

use std::{
    fs,
    hash::{BuildHasher as _, RandomState},
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context as _, Result, ensure};
use tailback_ebpf::PAGE_OFFSET_CANDIDATES;

use crate::kernel::{
    iter::IterScope,
    processor,
    scanner::{Scanner, link, run},
};

const ZONEINFO: &str = "/proc/zoneinfo";

/// Bits of a page-table entry that may hold a physical address. x86-64: Intel SDM volume 3, 5.5. aarch64: Arm ARM D8.3; the bits
/// above 49 have other meanings, and none of those that are elsewhere in the entry is needed below [`MAX_MEMORY`].
const ADDRESS_BITS: u64 = if cfg!(target_arch = "aarch64") {
    0x0003_ffff_ffff_f000
} else {
    0x000f_ffff_ffff_f000
};

/// Largest direct map of physical memory with four levels of page tables on x86-64, 64 TiB
/// (Documentation/arch/x86/x86_64/mm.rst). Bounds the search.
const MAX_MEMORY: u64 = 1 << 46;

impl Scanner {
    /// Finds the base of the direct map. If that fails, memory of targets is not read.
    pub(super) fn learn_page_offset(&mut self) {
        if self.capabilities.user_memory.is_ok() {
            let learned = self.search_page_offset();
            self.capabilities.user_memory = learned.map_err(|error| format!("{error:#}"));
        }
    }

    fn search_page_offset(&mut self) -> Result<()> {
        let zones =
            fs::read_to_string(ZONEINFO).with_context(|| format!("cannot read {ZONEINFO}"))?;
        let processor = processor::of_this_machine(&self.capabilities.fields.layout);
        let end = memory_end(&zones, processor.page_bits)
            .with_context(|| format!("{ZONEINFO} lists no zone with memory"))?;
        ensure!(
            end <= MAX_MEMORY,
            "physical memory ends at {end:#x}, above 64 TiB"
        );
        let word = RandomState::new().hash_one(ZONEINFO);
        let own = Box::new(AtomicU64::new(word));
        let settings = &mut self.scan_settings;
        settings.memory_end = end;
        let within_page = (1 << processor.page_bits) - 1;
        settings.address_mask = ADDRESS_BITS & !encryption_bit() & !within_page;
        settings.user_bits = user_bits();
        settings.own_address = own.as_ptr() as u64;
        settings.own_word = word;
        self.learn_own_tgid()?;
        let over = match self.capabilities.bound_to_process {
            Ok(()) => IterScope::Process(std::process::id()),
            Err(_) => IterScope::All,
        };
        let search = link(&self.ebpf, "page_offset", over).context("cannot create the iterator")?;
        let mut found = 0;
        let last = end >> processor.page_offset_bits;
        let bases = (0..=last).step_by(PAGE_OFFSET_CANDIDATES as usize);
        let tables = top_bits(processor.page_bits, self.scan_settings.user_bits);
        // The programs find the top level by themselves on x86-64.
        let tables = &tables[..if processor.is_aarch64 == 0 { 1 } else { 2 }];
        for (first, top_bits) in bases.flat_map(|first| tables.iter().map(move |top| (first, *top)))
        {
            self.scan_settings.candidate = first;
            self.scan_settings.top_bits = top_bits;
            self.write_scan_settings()?;
            // Makes the word's page present: NUMA balancing may have made it inaccessible.
            own.load(Ordering::SeqCst);
            run(&search, &mut self.buffer, &mut |_| {})
                .context("cannot search for the direct map of physical memory")?;
            found = self.scan.get(&0, 0)?.0.page_offset;
            if found != 0 {
                break;
            }
        }
        self.scan_settings.own_address = 0;
        self.scan_settings.own_word = 0;
        self.scan_settings.page_offset = found;
        self.write_scan_settings()?;
        ensure!(
            found != 0,
            "the page tables do not lead to a known word of the agent's own memory"
        );
        Ok(())
    }
}

/// Log2 of the memory that a process can address. The stack is at its end.
fn user_bits() -> u32 {
    // SAFETY: no pointers. The value is the address of bytes that the kernel has put on the stack of the first thread.
    let on_stack = unsafe { libc::getauxval(libc::AT_RANDOM) };
    u64::BITS - on_stack.leading_zeros()
}

/// Log2 of the memory that an entry of the top-level page table covers, of a process with this much memory. Each table has
/// `page size ÷ 8` entries. A kernel for 52 bits gives a process 48 unless it requests more, but may use a level more. Only the
/// programs for aarch64 use it.
fn top_bits(page_bits: u32, user_bits: u32) -> [u32; 2] {
    let index_bits = page_bits - 3;
    let levels = user_bits
        .saturating_sub(page_bits)
        .div_ceil(index_bits)
        .max(1);
    let top = page_bits + (levels - 1) * index_bits;
    [top, top + index_bits]
}

/// The end of the physical memory, by the zones of /proc/zoneinfo. Memory of devices is not counted.
fn memory_end(zones: &str, page_bits: u32) -> Option<u64> {
    let mut end = None;
    let (mut is_memory, mut spanned) = (false, 0);
    for line in zones.lines() {
        let mut words = line.split_whitespace();
        let number = |word: Option<&str>| word.and_then(|word| word.parse::<u64>().ok());
        match words.next() {
            // `Node 0, zone   Normal`
            Some("Node") => {
                is_memory = words.next_back() != Some("Device");
                spanned = 0;
            }
            Some("spanned") => spanned = number(words.next())?,
            Some("start_pfn:") if is_memory && spanned > 0 => {
                let pages = number(words.next())?.checked_add(spanned)?;
                let bytes = pages.checked_mul(1 << page_bits)?;
                end = end.max(Some(bytes));
            }
            _ => {}
        }
    }
    end
}

/// The bit of a page-table entry that marks encrypted memory (AMD SME, SEV); 0: none. It is not part of the address.
#[cfg(target_arch = "x86_64")]
fn encryption_bit() -> u64 {
    use std::arch::x86_64::__cpuid;

    /// CPUID function that returns the highest extended function.
    const EXTENDED: u32 = 0x8000_0000;
    /// CPUID function of memory encryption (AMD64 architecture programmer's manual, volume 3, appendix E).
    const ENCRYPTION: u32 = 0x8000_001f;
    /// SME and SEV, of its EAX.
    const SUPPORTED: u32 = 0b11;
    let function = __cpuid(EXTENDED);
    if function.eax < ENCRYPTION {
        return 0;
    }
    let encryption = __cpuid(ENCRYPTION);
    if encryption.eax & SUPPORTED == 0 {
        0
    } else {
        1 << (encryption.ebx & 0x3f)
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn encryption_bit() -> u64 {
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_ends_with_the_last_zone_that_has_pages() {
        let zones = "\
Node 0, zone      DMA
  pages free     2816
        spanned  4095
  start_pfn:           1
Node 0, zone   Normal
        spanned  1044480
  start_pfn:           4096
Node 0, zone  Movable
        spanned  0
        present  0
Node 1, zone   Device
        spanned  512
  start_pfn:           9000000
";
        assert_eq!(memory_end(zones, 12), Some((4096 + 1_044_480) * 4096));
    }

    #[test]
    fn zones_without_memory_or_with_impossible_numbers_have_no_end() {
        assert_eq!(memory_end("", 12), None);
        assert_eq!(
            memory_end("Node 0, zone Movable\n spanned 0\n start_pfn: 7\n", 12),
            None
        );
        let huge = format!("Node 0, zone DMA\n spanned 9\n start_pfn: {}\n", u64::MAX);
        assert_eq!(memory_end(&huge, 12), None);
    }

    #[test]
    fn the_levels_of_page_tables_follow_from_the_memory_of_a_process() {
        // `ARM64_HW_PGTABLE_LEVELS` and `ARM64_HW_PGTABLE_LEVEL_SHIFT`, arch/arm64/include/asm/pgtable-hwdef.h.
        assert_eq!(top_bits(12, 48), [39, 48]);
        assert_eq!(top_bits(12, 39)[0], 30);
        assert_eq!(top_bits(14, 47)[0], 36);
        assert_eq!(top_bits(14, 48)[0], 47);
        assert_eq!(top_bits(16, 48)[0], 42);
        assert_eq!(top_bits(16, 42)[0], 29);
        let bits = user_bits();
        assert!((36..=57).contains(&bits), "{bits}");
    }
}
