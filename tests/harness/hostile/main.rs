//! A process whose memory holds up its readers.
//!
//! `tailback-hostile waits FILE`: one thread sleeps in poll(2), one in a futex call. Once both sleep, the pages of the poll array
//! and of the futex word are replaced by pages of FILE, whose file system does not answer.
//!
//! `tailback-hostile lock FILE`: one thread waits for a page of FILE and holds the process's memory lock (`mmap_lock`) meanwhile,
//! so that the command line and the mappings cannot be read.
//!
//! `tailback-hostile jvm FILE`: maps FILE like a JVM its performance data, and has a thread of the name by which JVMs are
//! recognized.
//!
//! All print a line that begins with `hidden`, and sleep. They never touch the pages again.

use std::{
    env,
    fs::{self, File, OpenOptions},
    io,
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
    ptr,
    sync::mpsc::channel,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

const PAGE: usize = 4096;
/// Time limit for the threads to fall asleep.
const DEADLINE: Duration = Duration::from_secs(10);
/// Value of the futex word.
const HELD: u32 = 2;

fn main() -> Result<()> {
    let mut args = env::args().skip(1);
    let what = args.next().context("missing word")?;
    let path = args.next().context("the file is missing")?;
    match what.as_str() {
        "waits" => hide_waits(&path),
        "lock" => hold_lock(&path),
        "jvm" => be_like_a_jvm(&path),
        _ => bail!("unknown word {what}"),
    }
}

fn hide_waits(path: &str) -> Result<()> {
    let file = open(path)?;
    let pages = map(ptr::null_mut(), libc::MAP_ANONYMOUS | libc::MAP_PRIVATE, -1)?;
    let (array, word) = (pages, pages + PAGE);
    // SAFETY: both pages were just mapped, and nothing else uses them yet.
    unsafe {
        let nothing = libc::pollfd {
            fd: -1,
            events: 0,
            revents: 0,
        };
        (array as *mut libc::pollfd).write(nothing);
        (word as *mut u32).write(HELD);
    }
    let poll = start(libc::SYS_poll, move || {
        // SAFETY: the kernel reads one entry at the start of the call; it checks the address when it writes it.
        unsafe { libc::poll(array as *mut libc::pollfd, 1, -1) };
    })?;
    let futex = start(libc::SYS_futex, move || {
        let wait = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
        // SAFETY: the kernel checks the address.
        unsafe { libc::syscall(libc::SYS_futex, word, wait, HELD, 0) };
    })?;
    let replace = libc::MAP_PRIVATE | libc::MAP_FIXED;
    map(pages as *mut libc::c_void, replace, file.as_raw_fd())?;
    println!("hidden {poll} {futex}");
    sleep()
}

fn sleep() -> ! {
    loop {
        thread::park();
    }
}

/// Lets one thread hold the lock of this process's memory for reading while it waits for a page of the file, and another
/// one wait to write. Then every further reader waits, too.
fn hold_lock(path: &str) -> Result<()> {
    let file = open(path)?;
    let pages = map(ptr::null_mut(), libc::MAP_PRIVATE, file.as_raw_fd())?;
    let memory = File::open("/proc/self/mem")?;
    // The kernel keeps the lock while it faults in a page for this file.
    let reader = start(libc::SYS_pread64, move || {
        let _ = memory.read_at(&mut [0], pages as u64);
    })?;
    println!("hidden {reader}");
    map(ptr::null_mut(), libc::MAP_ANONYMOUS | libc::MAP_PRIVATE, -1)?;
    sleep()
}

fn be_like_a_jvm(path: &str) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.with_context(|| format!("open {path}"))?;
    map(ptr::null_mut(), libc::MAP_SHARED, file.as_raw_fd())?;
    let (send, started) = channel();
    let (_never, never) = channel::<()>();
    let named = thread::Builder::new().name("VM Thread".to_owned());
    named.spawn(move || {
        let _ = send.send(());
        let _ = never.recv();
    })?;
    started.recv()?;
    println!("hidden {path}");
    sleep()
}

fn open(path: &str) -> Result<File> {
    let file = File::open(path).with_context(|| format!("open {path}"))?;
    // The kernel learns the size: beyond it, there are no pages to wait for.
    ensure!(
        file.metadata()?.len() >= 2 * PAGE as u64,
        "{path}: too short"
    );
    Ok(file)
}

/// Maps two pages and returns their address.
fn map(at: *mut libc::c_void, flags: libc::c_int, fd: libc::c_int) -> Result<usize> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, or one in place of pages that only sleeping system calls refer to.
    let start = unsafe { libc::mmap(at, 2 * PAGE, access, flags, fd, 0) };
    ensure!(
        start != libc::MAP_FAILED,
        "mmap: {}",
        io::Error::last_os_error()
    );
    Ok(start as usize)
}

/// Starts a thread and waits until it sleeps in this system call. Returns its id.
fn start(syscall: libc::c_long, call: impl FnOnce() + Send + 'static) -> Result<i32> {
    let (send, tid) = channel();
    thread::spawn(move || {
        // SAFETY: no arguments.
        let _ = send.send(unsafe { libc::gettid() });
        call();
    });
    let tid = tid.recv()?;
    let end = Instant::now() + DEADLINE;
    let wanted = syscall.to_string();
    while Instant::now() < end {
        let current = fs::read_to_string(format!("/proc/self/task/{tid}/syscall"))?;
        if current.split(' ').next() == Some(&wanted) {
            return Ok(tid);
        }
        thread::sleep(Duration::from_millis(1));
    }
    bail!("thread {tid} does not sleep")
}
