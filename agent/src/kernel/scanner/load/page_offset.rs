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
    scanner::{Scanner, link, run},
};

const ZONEINFO: &str = "/proc/zoneinfo";

/// Log2 of the page size of x86-64.
const PAGE_BITS: u32 = 12;

/// Log2 of the distance between two candidates: the base is a multiple of 1 GiB (arch/x86/mm/kaslr.c).
const CANDIDATE_BITS: u32 = 30;

/// Bits of a page-table entry that may hold a physical address (Intel SDM volume 3, 5.5).
const ADDRESS_BITS: u64 = 0x000f_ffff_ffff_f000;

/// Largest direct map of physical memory with four levels of page tables, 64 TiB (Documentation/arch/x86/x86_64/mm.rst). Bounds
/// the search.
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
        let end =
            memory_end(&zones).with_context(|| format!("{ZONEINFO} lists no zone with memory"))?;
        ensure!(
            end <= MAX_MEMORY,
            "physical memory ends at {end:#x}, above 64 TiB"
        );
        let word = RandomState::new().hash_one(ZONEINFO);
        let own = Box::new(AtomicU64::new(word));
        let settings = &mut self.scan_settings;
        settings.memory_end = end;
        settings.address_mask = ADDRESS_BITS & !encryption_bit();
        settings.own_address = own.as_ptr() as u64;
        settings.own_word = word;
        self.learn_own_tgid()?;
        let over = match self.capabilities.bound_to_process {
            Ok(()) => IterScope::Process(std::process::id()),
            Err(_) => IterScope::All,
        };
        let search = link(&self.ebpf, "page_offset", over).context("cannot create the iterator")?;
        let mut found = 0;
        for first in (0..=end >> CANDIDATE_BITS).step_by(PAGE_OFFSET_CANDIDATES as usize) {
            self.scan_settings.candidate = first;
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

/// The end of the physical memory, by the zones of /proc/zoneinfo. Memory of devices is not counted.
fn memory_end(zones: &str) -> Option<u64> {
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
                let bytes = pages.checked_mul(1 << PAGE_BITS)?;
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
        assert_eq!(memory_end(zones), Some((4096 + 1_044_480) * 4096));
    }

    #[test]
    fn zones_without_memory_or_with_impossible_numbers_have_no_end() {
        assert_eq!(memory_end(""), None);
        assert_eq!(
            memory_end("Node 0, zone Movable\n spanned 0\n start_pfn: 7\n"),
            None
        );
        let huge = format!("Node 0, zone DMA\n spanned 9\n start_pfn: {}\n", u64::MAX);
        assert_eq!(memory_end(&huge), None);
    }
}
