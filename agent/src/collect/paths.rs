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
/// Longest path that is kept, bytes.
const MAX_PATH: usize = 256;

#[derive(Default)]
pub(super) struct Paths {
    /// Of each pipe the path, where it is a FIFO.
    pipes: HashMap<u64, Option<String>>,
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
