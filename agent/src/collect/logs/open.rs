//! Finds the logs among a process's descriptors in /proc, and opens them for reading.
#![forbid(unsafe_code)]

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd as _},
        unix::fs::OpenOptionsExt as _,
    },
    time::{Duration, SystemTime},
};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

use crate::{
    collect::paths::{MAX_FDINFO, field, file_system, mountinfo, read_text},
    text::bounded,
};

/// Maximum number of descriptors of a process that are examined, lowest first: logs are opened early.
const MAX_DESCRIPTORS: usize = 256;
/// Longest path that is kept, bytes.
const MAX_PATH: usize = 256;
/// File systems that a remote machine or another process serves (FUSE aside): a request to them may hang.
const REMOTE_FILE_SYSTEMS: &[&str] = &[
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "gfs2",
    "glusterfs",
    "lustre",
    "ncpfs",
    "nfs",
    "nfs4",
    "ocfs2",
    "smb3",
    "smbfs",
    "virtiofs",
];

/// Identifies a file, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FileId {
    /// Major and minor number.
    device: (u32, u32),
    inode: u64,
}

/// What is known of a regular file without asking its file system, which might not answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Metadata {
    pub(super) file: FileId,
    pub(super) len: u64,
    /// `None`: the file system does not record it.
    pub(super) created: Option<SystemTime>,
}

impl Metadata {
    /// Metadata of the file at `path`, relative to `directory`. `None`: it is not a regular file, or cannot be examined.
    fn of(directory: impl AsFd, path: &str) -> Option<Self> {
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::EMPTY_PATH;
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let found = statx(directory, path, flags, wanted).ok()?;
        let is_file = FileType::from_raw_mode(found.stx_mode.into()) == FileType::RegularFile;
        let created = StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::BTIME);
        let seconds = u64::try_from(found.stx_btime.tv_sec).unwrap_or(0);
        let since_1970 = Duration::new(seconds, found.stx_btime.tv_nsec);
        is_file.then_some(Self {
            file: FileId {
                device: (found.stx_dev_major, found.stx_dev_minor),
                inode: found.stx_ino,
            },
            len: found.stx_size,
            created: created
                .then(|| SystemTime::UNIX_EPOCH.checked_add(since_1970))
                .flatten(),
        })
    }
}

/// A log that a process writes to.
#[derive(Debug)]
pub(super) struct Log {
    pub(super) fd: u32,
    pub(super) path: String,
    pub(super) metadata: Metadata,
}

/// The logs of a process: regular files that it has open write-only or for appending, and that are its standard output or
/// error, or have "log" in their path.
pub(super) fn logs(pid: u32) -> Vec<Log> {
    let mut logs = Vec::new();
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        // The process has ended.
        return logs;
    };
    let mut mounts: Option<String> = None;
    for entry in entries.flatten().take(MAX_DESCRIPTORS) {
        let name = entry.file_name();
        let Some(fd) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Some(path) = path(pid, fd).filter(|path| is_log(fd, path)) else {
            continue;
        };
        let info = read_text(&format!("/proc/{pid}/fdinfo/{fd}"), MAX_FDINFO);
        let mounts = mounts.get_or_insert_with(|| mountinfo(pid));
        if !is_for_writing(&info) || is_remote(&info, mounts) {
            continue;
        }
        if let Some(metadata) = metadata(pid, fd) {
            logs.push(Log { fd, path, metadata });
        }
    }
    logs
}

/// The path of a file, as its process sees it. `None`: it has none, so it is not a regular file.
pub(super) fn path(pid: u32, fd: u32) -> Option<String> {
    let link = fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok()?;
    let path = bounded(&link.to_string_lossy(), MAX_PATH);
    path.starts_with('/').then_some(path)
}

/// Metadata of a regular file, in any mount namespace.
pub(super) fn metadata(pid: u32, fd: u32) -> Option<Metadata> {
    Metadata::of(CWD, &format!("/proc/{pid}/fd/{fd}"))
}

/// Opens a log for reading, with an offset of its own. `Ok(None)`: the descriptor now refers to another file, or to one
/// whose file system might not answer.
pub(super) fn open(pid: u32, fd: u32, file: FileId) -> io::Result<Option<File>> {
    // Checked through O_PATH first, which asks no file system: opening a FIFO or a terminal for reading would affect its
    // writers, and the process may replace the file at any time.
    let path_fd = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(format!("/proc/{pid}/fd/{fd}"))?;
    if Metadata::of(&path_fd, "").is_none_or(|metadata| metadata.file != file) {
        return Ok(None);
    }
    let own_info = format!("/proc/self/fdinfo/{}", path_fd.as_raw_fd());
    if is_remote(&read_text(&own_info, MAX_FDINFO), &mountinfo(pid)) {
        return Ok(None);
    }
    // Non-blocking, so that it fails rather than breaks a lease on the file.
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", path_fd.as_raw_fd()))?;
    Ok(Some(opened))
}

fn is_log(fd: u32, path: &str) -> bool {
    let is_named_log = |path: &str| {
        path.as_bytes()
            .windows(3)
            .any(|part| part.eq_ignore_ascii_case(b"log"))
    };
    matches!(fd, 1 | 2) || is_named_log(path)
}

/// Whether `flags` in fdinfo (octal) mean write-only, or read-write with appending.
fn is_for_writing(info: &str) -> bool {
    let flags = field(info, "flags:").and_then(|text| i32::from_str_radix(text, 8).ok());
    flags.is_some_and(|flags| {
        let mode = flags & libc::O_ACCMODE;
        mode == libc::O_WRONLY || (mode == libc::O_RDWR && flags & libc::O_APPEND != 0)
    })
}

/// Whether the descriptor's mount is of a remote file system. A mount that is not listed, because it is outside the process's
/// mount namespace, counts as remote.
fn is_remote(info: &str, mounts: &str) -> bool {
    let kind = file_system(info, mounts);
    kind.is_none_or(|kind| REMOTE_FILE_SYSTEMS.contains(&kind) || kind.starts_with("fuse"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_output_and_files_named_log_are_logs() {
        assert!(is_log(1, "/data/out"));
        assert!(is_log(2, "/tmp/err (deleted)"));
        assert!(is_log(9, "/var/log/nginx/error"));
        assert!(is_log(9, "/srv/app/Server.LOG"));
        assert!(!is_log(9, "/var/lib/app/data"));
    }

    #[test]
    fn a_file_open_for_reading_is_a_log_only_if_it_is_appended_to() {
        let info = |flags| format!("pos:\t0\nflags:\t{flags}\nmnt_id:\t26\nino:\t7\n");
        assert!(is_for_writing(&info("0100001")));
        assert!(is_for_writing(&info("0102001")));
        assert!(is_for_writing(&info("0102002")));
        assert!(!is_for_writing(&info("0100002")));
        assert!(!is_for_writing(&info("0102000")));
        assert!(!is_for_writing("flags:\tx"));
    }

    #[test]
    fn files_on_remote_file_systems_are_left_alone() {
        let mounts = "26 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
            27 26 0:50 / /mnt rw - nfs4 server:/x rw\n\
            28 26 0:51 / /s rw - fuse.sshfs server:/x rw\n\
            29 26 0:52 / /o rw - overlay overlay rw\n\
            30 26 8:1 / /b rw - fuseblk /dev/sda1 rw\n";
        let remote = |id| is_remote(&format!("flags:\t01\nmnt_id:\t{id}\n"), mounts);
        assert!(!remote(26) && !remote(29));
        assert!(remote(27) && remote(28) && remote(30) && remote(99));
        assert!(is_remote("flags:\t01\n", mounts));
    }
}
