//! One adapter process per signal directory: a new one takes over from a running one.
//!
//! The new process writes which adapters it will serve. If that includes all adapters whose consumers keep the last value,
//! the running one exits at once. Otherwise it first reports no pressure to them.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{Read as _, Seek as _, Write as _},
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, flock, fstat, openat, statat, unlinkat},
    process::{Pid, Signal, kill_process},
};

use crate::signal::{check_own_file, directory::replace_file};

/// Name of the lock file; it contains the pid of the holder.
const LOCK: &str = "adapters.lock";
/// Name of the file in which the next process lists its adapters, one per line.
const SUCCESSOR: &str = "adapters.next";
/// Its name while it is being written.
const NEW_SUCCESSOR: &str = "adapters.next.new";
/// Largest such file that is read, bytes: 64 adapters of each kind, with long paths.
const MAX_SUCCESSOR_BYTES: u64 = 1 << 20;
/// Longest text of a pid, bytes.
const MAX_PID_BYTES: u64 = 32;
/// How long the running process may take to exit. It first drains its clients (`DRAIN_TIME`, 2.5 s) and finishes file writes
/// (1 s).
const TAKEOVER_TIMEOUT: Duration = Duration::from_secs(6);
/// How often a running process checks whether it is asked to exit.
const REQUEST_INTERVAL: Duration = Duration::from_millis(200);
/// How often the lock is tried.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Takes the lock, which is held until the file is dropped. Asks another adapter process that holds it to hand over to one that
/// serves these adapters, and waits until it has exited and its ports are free.
pub fn take(directory: &OwnedFd, path: &Path, adapters: &BTreeSet<String>) -> Result<File> {
    let path = path.join(LOCK);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(directory, LOCK, flags, Mode::from_raw_mode(0o644))
        .with_context(|| format!("cannot open {}", path.display()))?;
    check_own_file(&file, LOCK).with_context(|| format!("cannot use {}", path.display()))?;
    let mut file = File::from(file);
    let began = Instant::now();
    let mut asked = None;
    let mut announced = None;
    while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        // Unreadable counts as unknown.
        let _ = file.rewind();
        let _ = (&file).take(MAX_PID_BYTES).read_to_string(&mut holder);
        if announced.as_ref() != Some(&holder) {
            // An error means that the running process drains its clients first.
            let _ = announce(directory, adapters);
            announced = Some(holder.clone());
        }
        let pid = holder.trim().parse().ok().and_then(Pid::from_raw);
        if let Some(pid) = pid.filter(|pid| asked != Some(*pid) && is_adapter_process(*pid)) {
            // An error means that it just exited, or is another user's, which finds what was announced.
            let _ = kill_process(pid, Signal::USR1);
            asked = Some(pid);
        }
        if began.elapsed() > TAKEOVER_TIMEOUT {
            bail!(
                "another adapter process (pid {}) holds {} and does not exit: stop it",
                holder.trim(),
                path.display()
            );
        }
        std::thread::sleep(RETRY_INTERVAL);
    }
    let _ = unlinkat(directory, SUCCESSOR, AtFlags::empty());
    file.set_len(0)
        .and_then(|()| file.rewind())
        .context("cannot write to the lock file")?;
    write!(file, "{}", std::process::id()).context("cannot write to the lock file")?;
    Ok(file)
}

/// The running process reads the list as soon as it is there.
fn announce(directory: &OwnedFd, adapters: &BTreeSet<String>) -> Result<()> {
    let text = adapters
        .iter()
        .fold(String::new(), |text, adapter| text + adapter + "\n");
    let mode = Mode::from_raw_mode(0o644);
    replace_file(directory, (SUCCESSOR, NEW_SUCCESSOR), mode, text.as_bytes())
}

/// Asks the adapter process of this directory to exit, without another one: it reports no pressure first.
pub fn ask_to_exit(directory: &OwnedFd) -> Result<()> {
    announce(directory, &BTreeSet::new())
}

/// Whether a process is asked to exit, and no other one has taken over since.
pub fn is_asked(directory: &OwnedFd) -> bool {
    statat(directory, SUCCESSOR, AtFlags::SYMLINK_NOFOLLOW).is_ok()
}

/// Returns once another process has asked this one to exit. A signal would be faster, but without CAP_KILL a process
/// cannot send one to a process of another user.
pub async fn asked_to_exit(directory: &OwnedFd) {
    while !is_asked(directory) {
        tokio::time::sleep(REQUEST_INTERVAL).await;
    }
}

/// The adapters that the next process will serve; none if it does not say so.
pub fn successor(directory: &OwnedFd) -> BTreeSet<String> {
    let read = || {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(directory, SUCCESSOR, flags, Mode::empty())?;
        let mut text = String::new();
        if FileType::from_raw_mode(fstat(&file)?.st_mode) == FileType::RegularFile {
            let file = File::from(file);
            file.take(MAX_SUCCESSOR_BYTES).read_to_string(&mut text)?;
        }
        Ok::<_, std::io::Error>(text)
    };
    let text = read().unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// Whether the pid is that of an adapter process. The lock file may be stale, or its pid may belong to another pid
/// namespace.
fn is_adapter_process(pid: Pid) -> bool {
    let words = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero()));
    words.is_ok_and(|words| {
        words
            .split(|byte| *byte == 0)
            .any(|word| word == b"adapters")
    })
}

#[cfg(test)]
mod tests {
    use rustix::fs::{mknodat, symlinkat};
    use tailback_tests::temp::TempDir;

    use super::*;

    #[test]
    fn the_next_process_is_only_trusted_while_it_takes_over() {
        let temp = TempDir::new("takeover").unwrap();
        let directory = rustix::fs::open(temp.path(), OFlags::DIRECTORY, Mode::empty()).unwrap();
        let adapters = BTreeSet::from(["haproxy 127.0.0.1:1 a".to_owned()]);
        assert!(successor(&directory).is_empty());
        announce(&directory, &adapters).unwrap();
        assert_eq!(successor(&directory), adapters);
        let _lock = take(&directory, temp.path(), &adapters).unwrap();
        assert!(successor(&directory).is_empty() && !is_asked(&directory));
    }

    #[test]
    fn a_fifo_or_a_link_neither_blocks_nor_leads_elsewhere() {
        let temp = TempDir::new("takeover").unwrap();
        let directory = rustix::fs::open(temp.path(), OFlags::DIRECTORY, Mode::empty()).unwrap();
        let make_fifo = |name: &str| {
            mknodat(&directory, name, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        };
        make_fifo(SUCCESSOR);
        make_fifo(NEW_SUCCESSOR);
        make_fifo(LOCK);
        assert!(is_asked(&directory) && successor(&directory).is_empty());
        ask_to_exit(&directory).unwrap();
        let error = take(&directory, temp.path(), &BTreeSet::new()).unwrap_err();
        assert!(format!("{error:#}").contains("not a regular file"));
        let other = temp.write("other", "haproxy 127.0.0.1:1 a\n").unwrap();
        unlinkat(&directory, SUCCESSOR, AtFlags::empty()).unwrap();
        symlinkat(&other, &directory, SUCCESSOR).unwrap();
        assert!(successor(&directory).is_empty());
    }
}
