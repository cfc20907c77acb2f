//! The files behind descriptors, read from /proc where the eBPF records have no path, and cached.
#![forbid(unsafe_code)]

use std::{collections::HashMap, fmt::Display, fs, io::Read as _, path::Path};

use rustix::fs::{AtFlags, CWD, Statx, StatxFlags, statx};

use super::processes::find;
use crate::{
    sample::{Detail, Pipe, State, Wait},
    target::ProcessInfo,
    text::bounded,
};

/// Maximum number of descriptors looked up per sample; the rest is left to the next one.
const MAX_LOOKUPS: usize = 64;
/// Maximum number of descriptors looked up per profile: there may be a hundred profiles a second.
const MAX_PROFILE_LOOKUPS: usize = 8;
/// How long the profile keeps what it has looked up, ns.
const CACHE_TTL_NS: u64 = 1_000_000_000;
/// Maximum number of descriptors that the profile keeps.
const MAX_CACHED: usize = 1024;
/// Maximum bytes read of /proc/partitions: about a thousand devices.
const MAX_PARTITIONS: u64 = 64 * 1024;
/// Maximum bytes read of a process's mountinfo, which grows with the mounts that the process makes.
const MAX_MOUNTINFO: u64 = 256 * 1024;
/// Longest path that is kept, bytes.
const MAX_PATH: usize = 256;
/// Longest text read from fdinfo, bytes: mode and mount are in its first lines; a process chooses how many locks follow.
pub(super) const MAX_FDINFO: u64 = 4 * 1024;

#[derive(Default)]
pub(super) struct Paths {
    /// Path of each pipe by inode, if it is a FIFO.
    pipes: HashMap<u64, Option<String>>,
    /// The profile's cache, by tgid and descriptor.
    open: HashMap<(u32, u32), OpenFile>,
}

/// What a descriptor was, until the entry expires.
#[derive(Clone, Debug)]
struct OpenFile {
    expires_ns: u64,
    path: Option<String>,
    device: Option<String>,
}

impl Paths {
    /// Adds the paths of FIFOs. `processes` are in the order of their tgids.
    pub(super) fn resolve_pipes(&mut self, pipes: &mut [Pipe], processes: &[ProcessInfo]) {
        let mut lookups = 0;
        let mut known = HashMap::with_capacity(pipes.len());
        for pipe in pipes {
            let path = match known
                .get(&pipe.inode)
                .or_else(|| self.pipes.get(&pipe.inode))
            {
                Some(path) => Option::clone(path),
                None if lookups < MAX_LOOKUPS => {
                    lookups += 1;
                    let path = pid_of(pipe.tgid, processes).and_then(|pid| link(pid, pipe.fd));
                    path.filter(|path| path.starts_with('/'))
                }
                None => continue,
            };
            pipe.path.clone_from(&path);
            known.insert(pipe.inode, path);
        }
        self.pipes = known;
    }

    /// Adds the file and the block device that threads in uninterruptible sleep wait for.
    pub(super) fn resolve_waits(&mut self, waits: &mut [Wait], processes: &[ProcessInfo]) {
        let waits = waits
            .iter_mut()
            .filter(|wait| wait.state == State::Uninterruptible);
        for wait in waits.take(MAX_LOOKUPS) {
            let Some(call) = &mut wait.syscall else {
                continue;
            };
            if waits_for_file(i64::from(call.number))
                && call.detail == Detail::None
                && let Some(pid) = pid_of(wait.tgid, processes)
                && let Some(path) = link(pid, call.args[0] as u32)
            {
                let device = device(pid, call.args[0] as u32);
                call.detail = Detail::File { path, device };
            }
        }
    }

    /// Like [`Paths::resolve_waits`], and also adds the file that a sleeping thread writes to, such as a terminal. For
    /// a socket it adds the inode, because the scan over files reports a socket that processes share only once, with one of its
    /// descriptors. The results are cached.
    pub(super) fn resolve_profile(
        &mut self,
        profile: &mut [Wait],
        processes: &[ProcessInfo],
        now_ns: u64,
    ) {
        self.resolve(profile, now_ns, |tgid, fd| {
            let pid = pid_of(tgid, processes)?;
            let path = link(pid, fd)?;
            // Sockets and pipes have no device.
            let device = path.starts_with('/').then(|| device(pid, fd)).flatten();
            Some((path, device))
        });
    }

    fn resolve(
        &mut self,
        profile: &mut [Wait],
        now_ns: u64,
        look_up: impl Fn(u32, u32) -> Option<(String, Option<String>)>,
    ) {
        let mut lookups = 0;
        for wait in profile {
            let Some(call) = &mut wait.syscall else {
                continue;
            };
            let number = i64::from(call.number);
            let may_wait_for_file = match wait.state {
                State::Uninterruptible => waits_for_file(number),
                State::Sleeping => is_write(number),
                _ => false,
            };
            if !may_wait_for_file || call.detail != Detail::None {
                continue;
            }
            let key = (wait.tgid, call.args[0] as u32);
            let known = self.open.get(&key).filter(|open| now_ns < open.expires_ns);
            let open = match known {
                Some(open) => open.clone(),
                None if lookups < MAX_PROFILE_LOOKUPS => {
                    lookups += 1;
                    let (path, device) = look_up(key.0, key.1).unzip();
                    let open = OpenFile {
                        expires_ns: now_ns + CACHE_TTL_NS,
                        path,
                        device: device.flatten(),
                    };
                    if self.open.len() >= MAX_CACHED {
                        self.open.retain(|_, open| now_ns < open.expires_ns);
                    }
                    if self.open.len() < MAX_CACHED {
                        self.open.insert(key, open.clone());
                    }
                    open
                }
                None => continue,
            };
            // A pipe needs no path: its descriptor identifies it.
            let is_named = |path: &String| {
                wait.state == State::Uninterruptible
                    || path.starts_with('/')
                    || path.starts_with("socket:")
            };
            if let Some(path) = open.path.filter(is_named) {
                let device = open.device;
                call.detail = Detail::File { path, device };
            }
        }
    }
}

/// Whether a system call writes to the file in its first argument.
fn is_write(number: i64) -> bool {
    matches!(
        number,
        libc::SYS_write
            | libc::SYS_writev
            | libc::SYS_pwrite64
            | libc::SYS_pwritev
            | libc::SYS_sendto
            | libc::SYS_sendmsg
            | libc::SYS_sendmmsg
    )
}

/// sync_file_range(2), whose number the crate `libc` lacks on aarch64.
const SYNC_FILE_RANGE: i64 = if cfg!(target_arch = "x86_64") {
    277
} else {
    84
};

/// Whether a system call may wait for the file in its first argument.
fn waits_for_file(number: i64) -> bool {
    matches!(
        number,
        libc::SYS_read
            | libc::SYS_write
            | libc::SYS_pread64
            | libc::SYS_pwrite64
            | libc::SYS_readv
            | libc::SYS_writev
            | libc::SYS_preadv
            | libc::SYS_pwritev
            | libc::SYS_fsync
            | libc::SYS_fdatasync
            | SYNC_FILE_RANGE
            | libc::SYS_syncfs
            | libc::SYS_fallocate
            | libc::SYS_ftruncate
            | libc::SYS_getdents64
            | libc::SYS_sendfile
    )
}

fn pid_of(tgid: u32, processes: &[ProcessInfo]) -> Option<u32> {
    find(processes, tgid).map(|process| process.pid)
}

/// What a descriptor refers to, as /proc shows it.
pub(super) fn link(pid: u32, fd: u32) -> Option<String> {
    let link = fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok()?;
    Some(bounded(&link.to_string_lossy(), MAX_PATH))
}

/// Type, device and inode of the file behind a descriptor. Does not ask a remote file system, or one in user space, because it
/// might not answer.
pub(super) fn identity(pid: u32, fd: u32) -> Option<Statx> {
    let path = format!("/proc/{pid}/fd/{fd}");
    statx(
        CWD,
        path,
        AtFlags::STATX_DONT_SYNC,
        StatxFlags::TYPE | StatxFlags::INO,
    )
    .ok()
}

/// Name of the block device that a file is on.
fn device(pid: u32, fd: u32) -> Option<String> {
    let found = identity(pid, fd)?;
    block_device(found.stx_dev_major, found.stx_dev_minor)
}

/// Name of a block device.
pub(super) fn block_device(major: u32, minor: u32) -> Option<String> {
    if let Ok(block) = fs::read_link(format!("/sys/dev/block/{major}:{minor}")) {
        return Some(bounded(&block.file_name()?.to_string_lossy(), MAX_PATH));
    }
    // Container runtimes mask that directory.
    partition(&read_text("/proc/partitions", MAX_PARTITIONS), major, minor)
}

/// The name of a device in /proc/partitions: `254 0 268435456 vda`.
fn partition(text: &str, major: u32, minor: u32) -> Option<String> {
    text.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        let numbers: [u32; 2] = [fields.next()?.parse().ok()?, fields.next()?.parse().ok()?];
        let name = fields.nth(1)?;
        (numbers == [major, minor]).then(|| bounded(name, MAX_PATH))
    })
}

/// The cgroup of a process as shown to people; see [`crate::target::cgroup_path`].
pub(super) fn cgroup(pid: u32) -> Option<String> {
    let text = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("cgroup")).ok()?;
    crate::target::cgroup_path(&text)
}

/// The mappings of a process, cut after `max_bytes`. Empty if they cannot be read.
pub(super) fn maps(pid: u32, max_bytes: u64) -> String {
    let bytes = crate::target::read_process_file(pid, "maps", max_bytes);
    String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned()
}

/// The mounts that a process sees: a pid, or `self`. Those that do not fit are missing.
pub(super) fn mountinfo(process: impl Display) -> String {
    read_text(&format!("/proc/{process}/mountinfo"), MAX_MOUNTINFO)
}

/// The type of the file system that a file is on, as in `ext4`, by the fdinfo of its descriptor. `None`: its mount is not in
/// `mounts`, for instance because it is outside the mount namespace of their process.
pub(super) fn file_system<'a>(info: &str, mounts: &'a str) -> Option<&'a str> {
    let id = field(info, "mnt_id:")?;
    let mut mounts = mounts.lines();
    let mount = mounts.find(|line| line.split(' ').next() == Some(id))?;
    let (_, rest) = mount.split_once(" - ")?;
    rest.split(' ').next()
}

/// The value of a field of a file in /proc with one field per line. `key` includes the colon.
pub(super) fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix(key))?;
    Some(value.trim())
}

/// The text of a file in /proc, cut after `max_bytes`. Empty if it cannot be read.
pub(super) fn read_text(path: &str, max_bytes: u64) -> String {
    let mut bytes = Vec::new();
    let Ok(file) = fs::File::open(path) else {
        return String::new();
    };
    // What was read before an error still holds.
    let _ = file.take(max_bytes).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::sample::{Architecture, Syscall};

    pub(in crate::collect) fn wait(state: State, number: i64, fd: u64) -> Wait {
        Wait {
            tgid: 7,
            tid: 7,
            own_tid: 7,
            comm: String::new(),
            state,
            io: false,
            syscall: Some(Syscall {
                number: number as i32,
                architecture: Architecture::OWN,
                args: [fd, 0, 0, 0],
                detail: Detail::None,
            }),
            voluntary: 0,
            involuntary: 0,
            cpu_ns: 0,
            run_delay_ns: 0,
        }
    }

    fn path(wait: &Wait) -> Option<&str> {
        match &wait.syscall.as_ref()?.detail {
            Detail::File { path, .. } => Some(path),
            _ => None,
        }
    }

    #[test]
    fn a_block_device_is_named_by_its_numbers() {
        let text =
            "major minor  #blocks  name\n\n 254        0  268435456 vda\n   8        1  9 sda1\n";
        assert_eq!(partition(text, 254, 0).as_deref(), Some("vda"));
        assert_eq!(partition(text, 8, 1).as_deref(), Some("sda1"));
        assert_eq!(partition(text, 8, 0), None);
        assert_eq!(partition("8 1\n", 8, 1), None);
    }

    #[test]
    fn a_file_that_a_thread_waits_for_is_looked_up_once_per_ttl() {
        let mut paths = Paths::default();
        let lookups = Cell::new(0);
        let look_up = |_: u32, fd: u32| {
            lookups.set(lookups.get() + 1);
            Some((format!("/dev/pts/{fd}"), None))
        };
        let mut profile = [
            wait(State::Uninterruptible, libc::SYS_fsync, 1),
            wait(State::Sleeping, libc::SYS_write, 2),
            // None of these waits for a file: not looked up.
            wait(State::Sleeping, libc::SYS_read, 3),
            wait(State::Running, libc::SYS_write, 4),
            wait(State::Uninterruptible, libc::SYS_futex, 5),
        ];
        paths.resolve(&mut profile.clone(), 0, look_up);
        paths.resolve(&mut profile, CACHE_TTL_NS - 1, look_up);
        let found: Vec<_> = profile.iter().map(path).collect();
        let expected = [Some("/dev/pts/1"), Some("/dev/pts/2"), None, None, None];
        assert_eq!((found, lookups.get()), (expected.to_vec(), 2));
        paths.resolve(
            &mut [wait(State::Sleeping, libc::SYS_write, 2)],
            CACHE_TTL_NS,
            look_up,
        );
        assert_eq!(lookups.get(), 3);
    }

    #[test]
    fn lookups_per_profile_and_cached_files_are_bounded() {
        let mut paths = Paths::default();
        let lookups = Cell::new(0);
        let look_up = |_: u32, fd: u32| {
            lookups.set(lookups.get() + 1);
            Some((format!("pipe:[{fd}]"), None))
        };
        for round in 0..1_000 {
            let mut profile: Vec<Wait> = (0..64)
                .map(|fd| wait(State::Sleeping, libc::SYS_write, round * 64 + fd))
                .collect();
            paths.resolve(&mut profile, round, look_up);
            assert!(profile.iter().all(|wait| path(wait).is_none()));
        }
        assert_eq!(lookups.get(), 1_000 * MAX_PROFILE_LOOKUPS);
        assert_eq!(paths.open.len(), MAX_CACHED);
    }
}
