//! Which of a process's descriptors are logs, asked of /proc.
#![forbid(unsafe_code)]

use std::{
    fs::{self, File, Metadata, OpenOptions},
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
};

use crate::text::bounded;

/// Descriptors of a process that are looked at, lowest first: logs are opened early.
const MAX_DESCRIPTORS: usize = 256;
/// Longest path that is kept, bytes.
const MAX_PATH: usize = 256;
/// File systems that are another machine's, or a process's: asking them may take for ever.
const REMOTE: &[&str] = &[
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

/// Which file it is, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
}

impl From<&Metadata> for Identity {
    fn from(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

/// A log that a process writes to.
#[derive(Debug)]
pub(super) struct Log {
    pub(super) fd: u32,
    pub(super) path: String,
    pub(super) metadata: Metadata,
}

/// The logs of a process: regular files that it only writes to, or appends to, and which are its standard output or
/// error, or called a log.
pub(super) fn logs(pid: u32) -> Vec<Log> {
    let mut logs = Vec::new();
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        // It has ended.
        return logs;
    };
    let mut mounts: Option<String> = None;
    for entry in entries.flatten().take(MAX_DESCRIPTORS) {
        let name = entry.file_name();
        let Some(fd) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Some(path) = path(pid, fd).filter(|path| is_wanted(fd, path)) else {
            continue;
        };
        let Ok(info) = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")) else {
            continue;
        };
        let mounts = mounts.get_or_insert_with(|| {
            fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default()
        });
        if !is_written(&info) || is_remote(&info, mounts) {
            continue;
        }
        if let Some(metadata) = metadata(pid, fd) {
            logs.push(Log { fd, path, metadata });
        }
    }
    logs
}

/// Where the file is, as its process sees it. `None`: it has no path, so it is none.
pub(super) fn path(pid: u32, fd: u32) -> Option<String> {
    let link = fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok()?;
    let path = bounded(&link.to_string_lossy(), MAX_PATH);
    path.starts_with('/').then_some(path)
}

/// Of a regular file, whatever namespace it is in.
pub(super) fn metadata(pid: u32, fd: u32) -> Option<Metadata> {
    let metadata = fs::metadata(format!("/proc/{pid}/fd/{fd}")).ok()?;
    metadata.is_file().then_some(metadata)
}

/// Opens a log for reading, with an offset of our own. `Ok(None)`: by now the descriptor is something else.
pub(super) fn open(pid: u32, fd: u32, identity: Identity) -> io::Result<Option<File>> {
    // Held first and looked at: opening a FIFO or a terminal for reading would be felt by those who write to it.
    let held = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(format!("/proc/{pid}/fd/{fd}"))?;
    let metadata = held.metadata()?;
    if !metadata.is_file() || Identity::from(&metadata) != identity {
        return Ok(None);
    }
    // Non-blocking: a lease on the file is left alone.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", held.as_raw_fd()))?;
    Ok(Some(file))
}

fn is_wanted(fd: u32, path: &str) -> bool {
    let is_log = |path: &str| {
        path.as_bytes()
            .windows(3)
            .any(|part| part.eq_ignore_ascii_case(b"log"))
    };
    matches!(fd, 1 | 2) || is_log(path)
}

/// By `flags`, in octal: write-only, or appending.
fn is_written(info: &str) -> bool {
    let flags = field(info, "flags:").and_then(|text| i32::from_str_radix(text, 8).ok());
    flags.is_some_and(|flags| {
        let mode = flags & libc::O_ACCMODE;
        mode == libc::O_WRONLY || (mode == libc::O_RDWR && flags & libc::O_APPEND != 0)
    })
}

/// Whether the mount that the descriptor lies on is of such a kind. One that is not listed is not in the process's
/// namespace, and not asked either.
fn is_remote(info: &str, mounts: &str) -> bool {
    let Some(id) = field(info, "mnt_id:") else {
        return true;
    };
    let mount = mounts
        .lines()
        .find(|line| line.split(' ').next() == Some(id));
    let kind = mount
        .and_then(|line| line.split_once(" - "))
        .and_then(|(_, rest)| rest.split(' ').next());
    kind.is_none_or(|kind| REMOTE.contains(&kind) || kind == "fuse" || kind.starts_with("fuse."))
}

fn field<'a>(info: &'a str, key: &str) -> Option<&'a str> {
    info.lines()
        .find_map(|line| line.strip_prefix(key))
        .map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_output_and_what_is_called_a_log_are_wanted() {
        assert!(is_wanted(1, "/data/out"));
        assert!(is_wanted(2, "/tmp/err (deleted)"));
        assert!(is_wanted(9, "/var/log/nginx/error"));
        assert!(is_wanted(9, "/srv/app/Server.LOG"));
        assert!(!is_wanted(9, "/var/lib/app/data"));
    }

    #[test]
    fn a_file_that_is_read_too_is_no_log_unless_it_is_appended_to() {
        let info = |flags| format!("pos:\t0\nflags:\t{flags}\nmnt_id:\t26\nino:\t7\n");
        assert!(is_written(&info("0100001")));
        assert!(is_written(&info("0102001")));
        assert!(is_written(&info("0102002")));
        assert!(!is_written(&info("0100002")));
        assert!(!is_written(&info("0102000")));
        assert!(!is_written("flags:\tx"));
    }

    #[test]
    fn other_machines_files_are_not_asked() {
        let mounts = "26 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
            27 26 0:50 / /mnt rw - nfs4 server:/x rw\n\
            28 26 0:51 / /s rw - fuse.sshfs server:/x rw\n\
            29 26 0:52 / /o rw - overlay overlay rw\n";
        let remote = |id| is_remote(&format!("flags:\t01\nmnt_id:\t{id}\n"), mounts);
        assert!(!remote(26) && !remote(29));
        assert!(remote(27) && remote(28) && remote(99));
        assert!(is_remote("flags:\t01\n", mounts));
    }
}
