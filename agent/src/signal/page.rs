//! One page: a file that readers map. A sequence lock lets a reader detect a torn read.

use std::{
    ffi::CStr,
    os::fd::{BorrowedFd, OwnedFd},
    ptr,
    sync::atomic::{AtomicU32, AtomicU64, Ordering, fence},
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    fs::{self, AtFlags, FallocateFlags, FileType, Mode, OFlags, Stat},
    mm::{MapFlags, ProtFlags, mmap, munmap},
    process::geteuid,
    thread::futex,
};
use tailback_page::layout::{LEVEL_AT, SEQ_AT, SIZE, WAKE_AT, WORDS};

use super::encode::Words;

/// The file's name within its service's directory.
pub const NAME: &CStr = c"page";
/// Mode of the file: readers of any user.
const PAGE_MODE: Mode = Mode::from_raw_mode(0o644);

/// A page that this process writes. It keeps only the mapping, not the descriptor: there may be many pages.
pub struct PageFile {
    words: *const [AtomicU64; WORDS],
    seq: u64,
    wake: u32,
    level: u32,
    used: usize,
}

// SAFETY: only this value writes to the mapping, through `&mut self`.
unsafe impl Send for PageFile {}

impl PageFile {
    /// Opens the page in this directory. An existing one is continued, so that processes that map it keep reading it.
    pub fn open(directory: BorrowedFd<'_>) -> Result<Self> {
        Self::open_as(directory, NAME)
    }

    /// Opens the page in this file of the directory.
    pub fn open_as(directory: BorrowedFd<'_>, name: &CStr) -> Result<Self> {
        Self::map(&create(directory, name)?, name)
    }

    /// Maps a page that `create` has opened.
    pub fn map(file: &OwnedFd, name: &CStr) -> Result<Self> {
        let shown = name.to_string_lossy();
        // SAFETY: a new mapping of a file that was just allocated to this size; only its owner may truncate it.
        let address = unsafe {
            mmap(
                ptr::null_mut(),
                SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                0,
            )
        };
        let words = address
            .with_context(|| format!("cannot map `{shown}`"))?
            .cast_const()
            .cast();
        let mut page = Self {
            words,
            seq: 0,
            wake: 0,
            level: 0,
            used: WORDS,
        };
        // An agent killed during a write has left an odd number.
        page.seq = (u64::from_le(page.word(SEQ_AT / 8)) + 1) & !1;
        page.wake = (u64::from_le(page.word(WAKE_AT / 8)) >> 32) as u32;
        page.level = (u64::from_le(page.word(LEVEL_AT / 8)) >> 32) as u32;
        Ok(page)
    }

    /// The wake counter to write with this level: it increases with each change of level.
    pub fn wake_for(&self, level: u32) -> u32 {
        self.wake.wrapping_add(u32::from(level != self.level))
    }

    /// Publishes the page. Wakes readers that wait for a change of level.
    pub fn write(&mut self, page: &Words) {
        let seq = &self.words()[SEQ_AT / 8];
        seq.store((self.seq + 1).to_le(), Ordering::Relaxed);
        fence(Ordering::Release);
        for at in 0..page.used.max(self.used) {
            if at != SEQ_AT / 8 {
                self.words()[at].store(page.words[at], Ordering::Relaxed);
            }
        }
        seq.store((self.seq + 2).to_le(), Ordering::Release);
        self.seq += 2;
        self.used = page.used;
        self.level = (u64::from_le(page.words[LEVEL_AT / 8]) >> 32) as u32;
        let wake = (u64::from_le(page.words[WAKE_AT / 8]) >> 32) as u32;
        if wake != self.wake {
            self.wake = wake;
            // SAFETY: the word is inside the mapping, aligned, and only written through atomics.
            let word = unsafe { &*self.words.cast::<u8>().add(WAKE_AT).cast::<AtomicU32>() };
            // An error only means that no reader waits.
            let _ = futex::wake(word, futex::Flags::empty(), u32::MAX);
        }
    }

    fn words(&self) -> &[AtomicU64; WORDS] {
        // SAFETY: the mapping is as long as the array, aligned, lives as long as the value, and is shared with readers only.
        unsafe { &*self.words }
    }

    fn word(&self, at: usize) -> u64 {
        self.words()[at].load(Ordering::Relaxed)
    }
}

impl Drop for PageFile {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of this length, without any remaining reference.
        let _ = unsafe { munmap(self.words.cast_mut().cast(), SIZE) };
    }
}

/// Opens a page for writing, creating it if needed.
pub fn create(directory: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let shown = name.to_string_lossy();
    let file = fs::openat(directory, name, flags, PAGE_MODE)
        .with_context(|| format!("cannot open `{shown}`"))?;
    check_own_file(&file, &shown)?;
    // Independent of the umask.
    fs::fchmod(&file, PAGE_MODE).with_context(|| format!("cannot make `{shown}` readable"))?;
    // Allocate now: a write to an unallocated page raises SIGBUS if the file system is full.
    fs::fallocate(&file, FallocateFlags::empty(), 0, SIZE as u64)
        .context("no space for a page of 4096 bytes")?;
    Ok(file)
}

/// The status of a file that belongs to the agent's user and has no other name.
pub fn check_own_file(file: &OwnedFd, name: &str) -> Result<Stat> {
    let stat = fs::fstat(file).with_context(|| format!("cannot read the owner of `{name}`"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_nlink != 1 {
        bail!("`{name}` is not a regular file with a single link: remove it");
    }
    if stat.st_uid != geteuid().as_raw() {
        bail!(
            "`{name}` belongs to user {}: remove it, or give it to the agent's user",
            stat.st_uid
        );
    }
    Ok(stat)
}

/// Removes the page of a directory, if there is one.
pub fn remove(directory: BorrowedFd<'_>) {
    let _ = fs::unlinkat(directory, NAME, AtFlags::empty());
}
