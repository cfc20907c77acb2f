//! Which file stands behind a descriptor, asked of /proc where the kernel's records do not say, and remembered.
#![forbid(unsafe_code)]

use std::{collections::HashMap, fs, os::unix::fs::MetadataExt as _, path::Path};

use crate::{
    sample::{Detail, Pipe, State, Wait},
    target::ProcessSeen,
    text::bounded,
};

/// Descriptors that are looked up per sample; the rest waits for the next.
const MAX_LOOKUPS: usize = 64;
/// Descriptors that are looked up per look of the profile, for how long they are kept, and how many.
const MAX_PROFILE_LOOKUPS: usize = 8;
const KEPT_NS: u64 = 1_000_000_000;
const MAX_KEPT: usize = 1024;
/// Longest path that is kept, bytes.
const MAX_PATH: usize = 256;

#[derive(Default)]
pub(super) struct Paths {
    /// Of each pipe the path, where it is a FIFO.
    pipes: HashMap<u64, Option<String>>,
    /// What stands behind a descriptor (of a tgid), for a moment: the profile asks a hundred times a second.
    open: HashMap<(u32, u32), Open>,
}

#[derive(Clone, Debug)]
struct Open {
    until_ns: u64,
    path: Option<String>,
    device: Option<String>,
}

impl Paths {
    /// Gives FIFOs their paths.
    pub(super) fn resolve_pipes(&mut self, pipes: &mut [Pipe], processes: &[ProcessSeen]) {
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
                    let path = pid_of(pipe.tgid, processes).and_then(|pid| target(pid, pipe.fd));
                    path.filter(|path| path.starts_with('/'))
                }
                None => continue,
            };
            pipe.path.clone_from(&path);
            known.insert(pipe.inode, path);
        }
        self.pipes = known;
    }

    /// Names the file and the device that a thread waits for while it cannot be interrupted.
    pub(super) fn resolve_waits(&mut self, waits: &mut [Wait], processes: &[ProcessSeen]) {
        let waits = waits
            .iter_mut()
            .filter(|wait| wait.state == State::Uninterruptible);
        for wait in waits.take(MAX_LOOKUPS) {
            let Some(call) = &mut wait.syscall else {
                continue;
            };
            if takes_a_file(i64::from(call.number))
                && call.detail == Detail::None
                && let Some(pid) = pid_of(wait.tgid, processes)
                && let Some(path) = target(pid, call.args[0] as u32)
            {
                let device = device(pid, call.args[0] as u32);
                call.detail = Detail::File { path, device };
            }
        }
    }

    /// As [`Paths::resolve_waits`], and names a file that a thread sleeps on while it writes: a terminal. Remembers for a
    /// moment what it found.
    pub(super) fn resolve_profile(
        &mut self,
        profile: &mut [Wait],
        processes: &[ProcessSeen],
        now_ns: u64,
    ) {
        self.resolve(profile, now_ns, |tgid, fd| {
            let pid = pid_of(tgid, processes)?;
            let path = target(pid, fd)?;
            Some((path, device(pid, fd)))
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
            let is_held_up = match wait.state {
                State::Uninterruptible => takes_a_file(number),
                State::Sleeping => puts_out(number),
                _ => false,
            };
            if !is_held_up || call.detail != Detail::None {
                continue;
            }
            let key = (wait.tgid, call.args[0] as u32);
            let known = self.open.get(&key).filter(|open| now_ns < open.until_ns);
            let open = match known {
                Some(open) => open.clone(),
                None if lookups < MAX_PROFILE_LOOKUPS => {
                    lookups += 1;
                    let (path, device) = look_up(key.0, key.1).unzip();
                    let open = Open {
                        until_ns: now_ns + KEPT_NS,
                        path,
                        device: device.flatten(),
                    };
                    if self.open.len() >= MAX_KEPT {
                        self.open.retain(|_, open| now_ns < open.until_ns);
                    }
                    if self.open.len() < MAX_KEPT {
                        self.open.insert(key, open.clone());
                    }
                    open
                }
                None => continue,
            };
            // A pipe or a socket has no path: it is told by its descriptor.
            let is_named =
                |path: &String| wait.state == State::Uninterruptible || path.starts_with('/');
            if let Some(path) = open.path.filter(is_named) {
                let device = open.device;
                call.detail = Detail::File { path, device };
            }
        }
    }
}

/// Whether a system call puts something out, and its first argument is where.
fn puts_out(number: i64) -> bool {
    matches!(
        number,
        libc::SYS_write | libc::SYS_writev | libc::SYS_pwrite64 | libc::SYS_pwritev
    )
}

/// Whether a system call's first argument is the file that it may wait for.
fn takes_a_file(number: i64) -> bool {
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
            | libc::SYS_sync_file_range
            | libc::SYS_syncfs
            | libc::SYS_fallocate
            | libc::SYS_ftruncate
            | libc::SYS_getdents64
            | libc::SYS_sendfile
    )
}

fn pid_of(tgid: u32, processes: &[ProcessSeen]) -> Option<u32> {
    let found = processes.binary_search_by_key(&tgid, |process| process.tgid);
    found.ok().map(|index| processes[index].pid)
}

/// What a descriptor is, as /proc names it.
fn target(pid: u32, fd: u32) -> Option<String> {
    let link = fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok()?;
    Some(bounded(&link.to_string_lossy(), MAX_PATH))
}

/// The block device that a file lies on.
fn device(pid: u32, fd: u32) -> Option<String> {
    let number = fs::metadata(format!("/proc/{pid}/fd/{fd}")).ok()?.dev();
    let (major, minor) = (libc::major(number), libc::minor(number));
    let block = fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    Some(bounded(&block.file_name()?.to_string_lossy(), MAX_PATH))
}

/// The control group of a process, for people: where it is in several, the most telling one.
pub(super) fn cgroup(pid: u32) -> Option<String> {
    let text = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("cgroup")).ok()?;
    crate::target::cgroup_path(&text)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::sample::Syscall;

    fn wait(state: State, number: i64, fd: u64) -> Wait {
        Wait {
            tgid: 7,
            tid: 7,
            own_tid: 7,
            comm: String::new(),
            state,
            io: false,
            syscall: Some(Syscall {
                number: number as i32,
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
    fn files_that_hold_a_thread_up_are_looked_up_once_a_second() {
        let mut paths = Paths::default();
        let asked = Cell::new(0);
        let look_up = |_: u32, fd: u32| {
            asked.set(asked.get() + 1);
            Some((format!("/dev/pts/{fd}"), None))
        };
        let mut profile = [
            wait(State::Uninterruptible, libc::SYS_fsync, 1),
            wait(State::Sleeping, libc::SYS_write, 2),
            // Nothing to wait for is in a file: not asked for.
            wait(State::Sleeping, libc::SYS_read, 3),
            wait(State::Running, libc::SYS_write, 4),
            wait(State::Uninterruptible, libc::SYS_futex, 5),
        ];
        paths.resolve(&mut profile.clone(), 0, look_up);
        paths.resolve(&mut profile, KEPT_NS - 1, look_up);
        let told: Vec<_> = profile.iter().map(path).collect();
        let expected = [Some("/dev/pts/1"), Some("/dev/pts/2"), None, None, None];
        assert_eq!((told, asked.get()), (expected.to_vec(), 2));
        paths.resolve(
            &mut [wait(State::Sleeping, libc::SYS_write, 2)],
            KEPT_NS,
            look_up,
        );
        assert_eq!(asked.get(), 3);
    }

    #[test]
    fn one_look_asks_for_few_files_and_remembers_a_bounded_number() {
        let mut paths = Paths::default();
        let asked = Cell::new(0);
        let look_up = |_: u32, fd: u32| {
            asked.set(asked.get() + 1);
            Some((format!("pipe:[{fd}]"), None))
        };
        for round in 0..1_000 {
            let mut profile: Vec<Wait> = (0..64)
                .map(|fd| wait(State::Sleeping, libc::SYS_write, round * 64 + fd))
                .collect();
            paths.resolve(&mut profile, round, look_up);
            assert!(profile.iter().all(|wait| path(wait).is_none()));
        }
        assert_eq!(asked.get(), 1_000 * MAX_PROFILE_LOOKUPS);
        assert_eq!(paths.open.len(), MAX_KEPT);
    }
}
