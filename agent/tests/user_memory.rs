//! What a scan shows of the memory behind a futex or poll call: exactly what is resident, and never a page fault.
//!
//! Needs root, and a kernel with BTF.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![cfg(target_arch = "x86_64")]

mod own_process;

use std::{
    fs::File,
    io::{self, Write as _},
    mem::offset_of,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    ptr, slice,
    sync::{
        Mutex, PoisonError,
        mpsc::{Receiver, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use own_process::{kernel_btf, watch_own_process};
use tailback::kernel::{
    btf::Btf,
    layout::resolve,
    scanner::{Record, Scanner},
};
use tailback_ebpf::{MAX_POLLED, WAIT_WORD, WaitRecord};

const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;
const DEADLINE: Duration = Duration::from_secs(10);

/// The tests scan their own process, so they run one at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// A scanner of the test's own process. `None`, with an entry in the log of skipped tests, if programs cannot be loaded.
fn scanner(test: &str) -> Option<Scanner> {
    let fields = resolve(&Btf::parse(&kernel_btf(test)?).unwrap());
    let scanner = watch_own_process(&fields);
    assert_eq!(scanner.capabilities().user_memory, Ok(()));
    Some(scanner)
}

/// Private or shared memory of the test's own, unmapped when dropped.
struct Mapping {
    start: *mut u8,
    len: usize,
}

// SAFETY: plain memory; the tests order their accesses.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(len: usize, flags: libc::c_int, file: Option<&File>) -> Self {
        let fd = file.map_or(-1, File::as_raw_fd);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, access, flags, fd, 0) };
        assert_ne!(start, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self {
            start: start.cast(),
            len,
        }
    }

    fn anonymous(len: usize) -> Self {
        Self::new(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)
    }

    fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.len);
        self.start.wrapping_add(offset)
    }

    fn advise(&self, offset: usize, len: usize, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: within the mapping.
        let result = unsafe { libc::madvise(self.at(offset).cast(), len, advice) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Whether the page at `offset` is resident.
    fn is_resident(&self, offset: usize) -> bool {
        let mut residency = [0_u8];
        let page = self.at(offset / PAGE * PAGE);
        // SAFETY: one page of the mapping; one byte is written.
        let result = unsafe { libc::mincore(page.cast(), PAGE, residency.as_mut_ptr()) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        residency[0] & 1 == 1
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing uses the mapping any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// Minor and major page faults of this process.
fn faults() -> i64 {
    // SAFETY: all-zero bytes are a valid rusage; the kernel fills it in.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_SELF, &raw mut usage), 0);
        usage
    };
    usage.ru_minflt + usage.ru_majflt
}

/// A thread that sleeps in one system call until it is released.
struct Sleeper {
    tid: u32,
    release: Box<dyn FnOnce()>,
    thread: JoinHandle<()>,
}

impl Sleeper {
    fn start(call: impl FnOnce() + Send + 'static, release: impl FnOnce() + 'static) -> Self {
        let (send, tid): (_, Receiver<u32>) = channel();
        let thread = thread::spawn(move || {
            // SAFETY: no arguments.
            send.send(unsafe { libc::gettid() } as u32).unwrap();
            call();
        });
        Self {
            tid: tid.recv().unwrap(),
            release: Box::new(release),
            thread,
        }
    }

    /// Sleeps in poll(2) with an array of `len` entries at `array`, whose last is the read end of a pipe. The others ask for
    /// nothing, of files that do not exist.
    fn polling(array: *mut u8, len: usize) -> (Self, Vec<[u32; 2]>) {
        let (reader, mut writer) = io::pipe().unwrap();
        let entry = array.cast::<libc::pollfd>();
        for number in 0..len {
            let is_last = number + 1 == len;
            let polled = libc::pollfd {
                // Negative descriptors are ignored.
                fd: if is_last {
                    reader.as_raw_fd()
                } else {
                    -100 - number as i32
                },
                events: if is_last {
                    libc::POLLIN
                } else {
                    0x40 + number as i16
                },
                revents: 0,
            };
            // SAFETY: the caller has room for `len` entries.
            unsafe { entry.wrapping_add(number).write_unaligned(polled) };
        }
        // SAFETY: as above; each entry is 8 bytes.
        let truth = unsafe { slice::from_raw_parts(array, len * size_of::<libc::pollfd>()) };
        let truth = truth.chunks_exact(8).take(MAX_POLLED).map(|entry| {
            let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
            [word(0), word(offset_of!(libc::pollfd, events))]
        });
        let truth = truth.collect();
        let address = array as usize;
        let call = move || {
            // SAFETY: the array outlives the call, which returns `EFAULT` if it is gone.
            unsafe { libc::poll(address as *mut libc::pollfd, len as libc::nfds_t, -1) };
            drop(reader);
        };
        (
            Self::start(call, move || writer.write_all(b"x").unwrap()),
            truth,
        )
    }

    /// Sleeps in a futex call on `word`, which holds `value`.
    fn on_futex(word: *mut u8, value: u32) -> Self {
        // SAFETY: the caller has room for three words.
        unsafe { word.cast::<u32>().write(value) };
        let address = word as usize;
        let futex = move |op: libc::c_int, value: u32| {
            // SAFETY: the kernel checks the address.
            unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    address,
                    op | libc::FUTEX_PRIVATE_FLAG,
                    value,
                    0,
                )
            }
        };
        let call = move || {
            futex(libc::FUTEX_WAIT, value);
        };
        Self::start(call, move || {
            futex(libc::FUTEX_WAKE, 1);
        })
    }

    /// Its record, once it sleeps in this system call.
    fn record(&self, scanner: &mut Scanner, syscall: libc::c_long) -> WaitRecord {
        let end = Instant::now() + DEADLINE;
        loop {
            let mut found = None;
            let mut visit = |record: Record<'_>| {
                if let Record::Wait(wait) = record
                    && wait.tid == self.tid
                {
                    found = Some(*wait);
                }
            };
            scanner.scan_waits(&mut visit).unwrap();
            match found {
                Some(record) if record.state != 0 && i64::from(record.syscall) == syscall => {
                    return record;
                }
                _ => assert!(Instant::now() < end, "it does not sleep: {found:?}"),
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// A thread that polls this array is shown with all its entries.
    fn check_polling(scanner: &mut Scanner, array: *mut u8, len: usize, what: &str) {
        let (sleeper, truth) = Self::polling(array, len);
        assert_eq!(sleeper.polled(scanner), truth, "{what}");
        sleeper.end();
    }

    fn polled(&self, scanner: &mut Scanner) -> Vec<[u32; 2]> {
        let record = self.record(scanner, libc::SYS_poll);
        record.polled[..record.polled_len as usize].to_vec()
    }

    /// The futex word and the owner beside it.
    fn word(&self, scanner: &mut Scanner) -> Option<(u32, u32)> {
        let record = self.record(scanner, libc::SYS_futex);
        (record.flags & WAIT_WORD != 0).then_some((record.word, record.owner))
    }

    fn end(self) {
        (self.release)();
        self.thread.join().unwrap();
    }
}

#[test]
fn a_poll_array_is_read_wherever_it_lies_in_its_pages() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut scanner) = scanner("a_poll_array_is_read_wherever_it_lies_in_its_pages") else {
        return;
    };
    let memory = Mapping::anonymous(2 * PAGE);
    for len in [1, 2, MAX_POLLED, 40] {
        // The array begins so far before the boundary; 4 and 12 divide an entry.
        for before in [4, 8, 12, 20, 60, 64, 68, 640] {
            let what = format!("{len} entries, {before} bytes before the boundary");
            Sleeper::check_polling(&mut scanner, memory.at(PAGE - before), len, &what);
        }
    }
    // Not aligned to words, within one page.
    Sleeper::check_polling(&mut scanner, memory.at(PAGE + 101), 5, "not aligned");
}

#[test]
fn a_futex_word_and_its_owner_are_read() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut scanner) = scanner("a_futex_word_and_its_owner_are_read") else {
        return;
    };
    let memory = Mapping::anonymous(2 * PAGE);
    for before in [4, 8, 12, 16, 2000] {
        let word = memory.at(PAGE - before);
        let sleeper = Sleeper::on_futex(word, 2);
        // SAFETY: within the mapping.
        unsafe {
            word.wrapping_add(8)
                .cast::<u32>()
                .write(0xbeef + before as u32);
        };
        let truth = Some((2, 0xbeef + before as u32));
        assert_eq!(
            sleeper.word(&mut scanner),
            truth,
            "{before} bytes before the boundary"
        );
        sleeper.end();
    }
}

#[test]
fn memory_of_a_huge_page_and_of_locked_and_shared_files_is_read() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let test = "memory_of_a_huge_page_and_of_locked_and_shared_files_is_read";
    let Some(mut scanner) = scanner(test) else {
        return;
    };
    let huge = Mapping::anonymous(2 * HUGE_PAGE);
    let begin = huge.start.align_offset(HUGE_PAGE);
    match huge.advise(begin, HUGE_PAGE, libc::MADV_HUGEPAGE) {
        Ok(()) => {}
        // Kernels without transparent huge pages.
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EINVAL)),
    }
    for offset in [0, PAGE - 12, HUGE_PAGE - 64, 5 * PAGE + 8] {
        let what = format!("{offset:#x} in a huge page");
        Sleeper::check_polling(&mut scanner, huge.at(begin + offset), MAX_POLLED, &what);
    }

    // SAFETY: a name, and no flags.
    let fd = unsafe { libc::memfd_create(c"tailback-test".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: just created, and owned by nothing else.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(2 * PAGE as u64).unwrap();
    let shared = Mapping::new(2 * PAGE, libc::MAP_SHARED, Some(&file));
    // SAFETY: pages of the mapping.
    assert_eq!(unsafe { libc::mlock(shared.start.cast(), 2 * PAGE) }, 0);
    for offset in [0, PAGE - 12, PAGE] {
        let what = format!("{offset:#x} in a locked file");
        Sleeper::check_polling(&mut scanner, shared.at(offset), 3, &what);
    }
}

#[test]
fn a_page_that_is_not_resident_is_not_faulted_in() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut scanner) = scanner("a_page_that_is_not_resident_is_not_faulted_in") else {
        return;
    };
    let memory = Mapping::anonymous(3 * PAGE);
    // The whole array, its beginning, its end.
    for (array, dropped, len) in [(8, 0, 4), (PAGE - 16, 0, 4), (2 * PAGE - 16, 2 * PAGE, 4)] {
        let (sleeper, truth) = Sleeper::polling(memory.at(array), len);
        assert_eq!(sleeper.polled(&mut scanner), truth);
        memory.advise(dropped, PAGE, libc::MADV_DONTNEED).unwrap();
        assert!(!memory.is_resident(dropped));
        assert_eq!(sleeper.polled(&mut scanner), Vec::<[u32; 2]>::new());
        // Nothing in this process runs but the scan.
        let before = faults();
        for _ in 0..100 {
            scanner.scan_waits(&mut |_| {}).unwrap();
        }
        let added = faults() - before;
        assert!(added < 100, "{added} page faults in 100 scans");
        assert!(
            !memory.is_resident(dropped),
            "page {dropped:#x} was faulted in"
        );
        sleeper.end();
    }
    let memory = Mapping::anonymous(PAGE);
    let sleeper = Sleeper::on_futex(memory.start, 2);
    assert_eq!(sleeper.word(&mut scanner), Some((2, 0)));
    memory.advise(0, PAGE, libc::MADV_DONTNEED).unwrap();
    assert_eq!(sleeper.word(&mut scanner), None);
    assert!(!memory.is_resident(0));
    sleeper.end();
}

#[test]
fn memory_that_the_process_may_not_read_is_not_read() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut scanner) = scanner("memory_that_the_process_may_not_read_is_not_read") else {
        return;
    };
    let memory = Mapping::anonymous(PAGE);
    let sleeper = Sleeper::on_futex(memory.start, 2);
    assert_eq!(sleeper.word(&mut scanner), Some((2, 0)));
    // SAFETY: nothing accesses the mapping any more.
    let protected = unsafe { libc::mprotect(memory.start.cast(), PAGE, libc::PROT_NONE) };
    assert_eq!(protected, 0, "{}", io::Error::last_os_error());
    assert_eq!(sleeper.word(&mut scanner), None);
    sleeper.end();
}

#[test]
fn without_its_fields_the_scan_shows_the_call_alone() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(bytes) = kernel_btf("without_its_fields_the_scan_shows_the_call_alone") else {
        return;
    };
    let btf = Btf::parse(&bytes).unwrap();
    let memory = Mapping::anonymous(PAGE);
    for field in ["task_mm", "mm_pgd"] {
        let fields = tailback::kernel::layout::resolve_without(&btf, &[field]);
        let mut scanner = watch_own_process(&fields);
        let reason = scanner.capabilities().user_memory.clone().unwrap_err();
        assert!(reason.contains("has no field"), "{reason}");
        let sleeper = Sleeper::on_futex(memory.start, 2);
        assert_eq!(sleeper.word(&mut scanner), None);
        sleeper.end();
    }
}
