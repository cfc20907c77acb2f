//! One page in a file that readers map: written so that a reader tells when it read a page half written.

use std::{
    ffi::CStr,
    os::fd::BorrowedFd,
    ptr,
    sync::atomic::{AtomicU32, AtomicU64, Ordering, fence},
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    fs::{self, AtFlags, FallocateFlags, FileType, Mode, OFlags},
    mm::{MapFlags, ProtFlags, mmap, munmap},
    process::geteuid,
    thread::futex,
};
use tailback_page::layout::{LEVEL_AT, SEQ_AT, SIZE, WAKE_AT, WORDS};

use super::encode::Words;

/// The file's name within its service's directory.
pub const NAME: &CStr = c"page";
const READABLE_BY_ALL: Mode = Mode::from_raw_mode(0o644);

/// A page that this process writes. The mapping alone is kept, no descriptor: there may be many.
pub struct PageFile {
    words: *const [AtomicU64; WORDS],
    seq: u64,
    wake: u32,
    level: u32,
    used: usize,
}

// SAFETY: the mapping belongs to the value alone, which is written through `&mut self`.
unsafe impl Send for PageFile {}

impl PageFile {
    /// The page in this directory. One that is there is gone on with: whoever has mapped it goes on reading it.
    pub fn open(directory: BorrowedFd<'_>) -> Result<Self> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file =
            fs::openat(directory, NAME, flags, READABLE_BY_ALL).context("cannot open `page`")?;
        let stat = fs::fstat(&file).context("cannot look at `page`")?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_nlink != 1 {
            bail!("`page` is no plain file of one name: remove it");
        }
        if stat.st_uid != geteuid().as_raw() {
            bail!(
                "`page` belongs to user {}: remove it, or give it to the agent's user",
                stat.st_uid
            );
        }
        // Whatever the umask was.
        fs::fchmod(&file, READABLE_BY_ALL).context("cannot make `page` readable")?;
        // Taken now: to write to a page for which there is no room raises SIGBUS.
        fs::fallocate(&file, FallocateFlags::empty(), 0, SIZE as u64)
            .context("no room for a page of 4096 bytes")?;
        // SAFETY: a new mapping of a file that was just made at least as long; nobody may cut it but its owner.
        let address = unsafe {
            mmap(
                ptr::null_mut(),
                SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        };
        let words = address.context("cannot map `page`")?.cast_const().cast();
        let mut page = Self {
            words,
            seq: 0,
            wake: 0,
            level: 0,
            used: WORDS,
        };
        // An agent that was killed while it wrote left an odd number.
        page.seq = (u64::from_le(page.word(SEQ_AT / 8)) + 1) & !1;
        page.wake = (u64::from_le(page.word(WAKE_AT / 8)) >> 32) as u32;
        page.level = (u64::from_le(page.word(LEVEL_AT / 8)) >> 32) as u32;
        Ok(page)
    }

    /// The count to write into a page of this level: it goes up with each change.
    pub fn wake_for(&self, level: u32) -> u32 {
        self.wake.wrapping_add(u32::from(level != self.level))
    }

    /// Publishes. Readers that wait for another level are woken.
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
            // SAFETY: the word lies within the mapping, aligned, and is written through atomics alone.
            let word = unsafe { &*self.words.cast::<u8>().add(WAKE_AT).cast::<AtomicU32>() };
            // Nobody waits: fine.
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
        // SAFETY: our own mapping, of this length, that nobody holds any more.
        let _ = unsafe { munmap(self.words.cast_mut().cast(), SIZE) };
    }
}

/// Removes the page of a directory; that there is none is fine.
pub fn remove(directory: BorrowedFd<'_>) {
    let _ = fs::unlinkat(directory, NAME, AtFlags::empty());
}
