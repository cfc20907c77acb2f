//! Finds and reads the file in which a HotSpot JVM keeps its performance data: `/tmp/hsperfdata_USER/PID`, by the names and numbers
//! of the JVM's own namespaces.
//!
//! The JVM maps this file, so /proc/PID/maps names it. Its content is read through a descriptor, and not from the memory of the
//! process: a page that is not resident would have to be faulted in, which the agent never does, and the eBPF programs that read
//! resident memory return single words, not 32 KiB. /proc/PID/map_files needs a capability that the agent does not keep.
//!
//! The process chooses everything below its root directory: mounts, links, special files. So
//!
//! - each directory is opened with `O_PATH` and without following a link, which asks no file system for more than one name, and
//!   only if the file system that it is on is local ([`FILE_SYSTEMS`]);
//! - the file is checked by its descriptor before it is opened for reading: a regular file of the process's own user, of the size
//!   that a JVM gives it;
//! - all of this happens in the thread that reads slow files of /proc, under the same limits of time and number: a file
//!   system can still be one that never answers, under an overlay or behind the number of a mount that was just replaced.
#![forbid(unsafe_code)]

use std::{
    fs::{File, OpenOptions},
    io::Read as _,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxFlags, openat, statx};

use crate::{
    collect::paths::{MAX_FDINFO, field, file_system, maps, mountinfo, read_text},
    target::run_in_reader,
};

/// Longest text read from /proc/PID/maps, bytes: 50,000 lines of usual length.
const MAX_MAPS_BYTES: u64 = 8 << 20;
/// Longest text read from /proc/PID/status, bytes: the user is in its first lines.
const MAX_STATUS: u64 = 4 * 1024;
/// The directory in which HotSpot creates its own, whatever `java.io.tmpdir` says (`os::get_temp_directory`).
const PARENT: &str = "tmp";
/// How that one's name begins.
const DIRECTORY_PREFIX: &str = "hsperfdata_";
/// Longest name of a file, bytes (NAME_MAX).
const MAX_NAME: usize = 255;
/// A JVM makes the file 32 KiB long, or as long as `-XX:PerfDataMemorySize` says, in whole pages.
const MAX_BYTES: u64 = 64 * 1024;
const PAGE_BYTES: u64 = 4 * 1024;
/// File systems on which the file is read: those that no remote machine and no other process serves.
const FILE_SYSTEMS: &[&str] = &[
    "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs",
];

/// The performance data of one JVM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::collect) struct PerfFile {
    /// `hsperfdata_USER`
    directory: String,
    /// The process's number in its own pid namespace.
    name: String,
}

impl PerfFile {
    /// The file that a line of /proc/PID/maps names, if it can be performance data. A deleted file does not match, because
    /// ` (deleted)` follows its name.
    pub(super) fn mapped(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let is_shared = words.nth(1)?.as_bytes().get(3) == Some(&b's');
        let path = words.nth(3)?.strip_prefix('/')?;
        let (directory, name) = path
            .strip_prefix(PARENT)?
            .strip_prefix('/')?
            .split_once('/')?;
        let is_directory = directory
            .strip_prefix(DIRECTORY_PREFIX)
            .is_some_and(|user| !user.is_empty());
        // The kernel writes white space and backslashes as octal numbers after a backslash.
        let is_literal = directory.len() <= MAX_NAME && !directory.contains('\\');
        let is_number =
            (1..=10).contains(&name.len()) && name.bytes().all(|it| it.is_ascii_digit());
        let is_whole = words.next().is_none();
        (is_shared && is_directory && is_literal && is_number && is_whole).then(|| Self {
            directory: directory.to_owned(),
            name: name.to_owned(),
        })
    }
}

/// The performance data that a process maps.
pub(in crate::collect) fn find(pid: u32) -> Option<PerfFile> {
    let maps = maps(pid, MAX_MAPS_BYTES);
    maps.lines().find_map(PerfFile::mapped)
}

/// The content of the file. `None`: it cannot be read, not in time, or not safely.
pub(in crate::collect) fn read(pid: u32, file: &PerfFile) -> Option<Vec<u8>> {
    let file = file.clone();
    run_in_reader(pid, move || {
        let file = open(pid, &file)?;
        content(file)
    })
}

/// As much of it as a JVM uses: the file may have grown since its size was checked.
fn content(file: File) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

fn open(pid: u32, file: &PerfFile) -> Option<File> {
    let mounts = mountinfo(pid);
    let is_local = |fd: &OwnedFd| {
        let info = read_text(&format!("/proc/self/fdinfo/{}", fd.as_raw_fd()), MAX_FDINFO);
        file_system(&info, &mounts).is_some_and(|kind| FILE_SYSTEMS.contains(&kind))
    };
    let by_path = OFlags::PATH | OFlags::CLOEXEC;
    // A link of /proc, which leads to the directory without asking a file system.
    let root = format!("/proc/{pid}/root");
    let mut directory = openat(CWD, root, by_path | OFlags::DIRECTORY, Mode::empty()).ok()?;
    let by_name = by_path | OFlags::NOFOLLOW;
    for name in [PARENT, file.directory.as_str()] {
        if !is_local(&directory) {
            return None;
        }
        let flags = by_name | OFlags::DIRECTORY;
        directory = openat(&directory, name, flags, Mode::empty()).ok()?;
    }
    if !is_local(&directory) {
        return None;
    }
    let found = openat(&directory, file.name.as_str(), by_name, Mode::empty()).ok()?;
    if !is_local(&found) || !is_perf_data(&found, &user_ids(pid)?) {
        return None;
    }
    // Opened again by its descriptor: nothing can take its place. Non-blocking, so that it fails rather than breaks a lease.
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", found.as_raw_fd()))
        .ok()
}

/// Whether a file is one that a JVM of one of these users creates.
fn is_perf_data(file: impl AsFd, users: &[u32]) -> bool {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::EMPTY_PATH;
    let Ok(found) = statx(file, "", flags, StatxFlags::BASIC_STATS) else {
        return false;
    };
    let has_length = found.stx_size > 0
        && found.stx_size <= MAX_BYTES
        && found.stx_size.is_multiple_of(PAGE_BYTES);
    FileType::from_raw_mode(found.stx_mode.into()) == FileType::RegularFile
        && users.contains(&found.stx_uid)
        && has_length
}

/// The real and the effective user of a process.
fn user_ids(pid: u32) -> Option<Vec<u32>> {
    let status = read_text(&format!("/proc/{pid}/status"), MAX_STATUS);
    let ids = field(&status, "Uid:")?.split_ascii_whitespace().take(2);
    ids.map(|id| id.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{chown, symlink},
        path::PathBuf,
        process,
    };

    use rustix::fs::mknodat;

    use super::*;

    #[test]
    fn only_a_shared_mapping_of_performance_data_counts() {
        let line = |permissions: &str, path: &str| {
            let line = format!("7f10a000-7f112000 {permissions} 00000000 08:01 42   {path}");
            PerfFile::mapped(&line).map(|file| (file.directory, file.name))
        };
        let found = line("rw-s", "/tmp/hsperfdata_bob/17");
        let expected = ("hsperfdata_bob".to_owned(), "17".to_owned());
        assert_eq!(found, Some(expected));
        assert_eq!(line("rw-p", "/tmp/hsperfdata_bob/17"), None);
        for path in [
            "",
            "/tmp/hsperfdata_bob/17 (deleted)",
            "/tmp/hsperfdata_bob/..",
            "/tmp/hsperfdata_bob/17/18",
            "/tmp/hsperfdata_bob/12345678901",
            "/tmp/hsperfdata_bob/",
            "/tmp/hsperfdata_/17",
            "/tmp/hsperfdata_bob",
            "/tmp/hsperfdata_a\\012b/17",
            "/tmp/../17",
            "/tmp//17",
            "/tmpfs/hsperfdata_bob/17",
            "/srv/tmp/hsperfdata_bob/17",
            "tmp/hsperfdata_bob/17",
        ] {
            assert_eq!(line("rw-s", path), None, "{path}");
        }
        assert_eq!(PerfFile::mapped(""), None);
    }

    /// A directory in /tmp for files of this test.
    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let name = format!("/tmp/{DIRECTORY_PREFIX}tailback-{name}-{}", process::id());
            fs::create_dir(&name).unwrap();
            Self(name.into())
        }

        fn file(&self, name: &str) -> PerfFile {
            let directory = self.0.file_name().unwrap().to_str().unwrap();
            PerfFile {
                directory: directory.to_owned(),
                name: name.to_owned(),
            }
        }

        fn read(&self, name: &str) -> Option<Vec<u8>> {
            read(process::id(), &self.file(name))
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_file_of_the_process_is_read_and_nothing_else_in_its_place() {
        let directory = Directory::new("kinds");
        let path = |name: &str| directory.0.join(name);
        let content = vec![7; 32 * 1024];
        fs::write(path("1"), &content).unwrap();
        assert_eq!(directory.read("1"), Some(content));
        fs::write(path("2"), vec![7; 1_000]).unwrap();
        fs::write(path("3"), vec![7; 68 * 1024]).unwrap();
        fs::write(path("4"), b"").unwrap();
        symlink(path("1"), path("5")).unwrap();
        mknodat(CWD, path("6"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        fs::create_dir(path("7")).unwrap();
        for name in ["2", "3", "4", "5", "6", "7", "8"] {
            assert_eq!(directory.read(name), None, "{name}");
        }
    }

    #[test]
    fn a_directory_that_is_a_link_is_not_followed() {
        let directory = Directory::new("linked");
        fs::write(directory.0.join("1"), vec![7; 4_096]).unwrap();
        assert!(directory.read("1").is_some());
        let link = Directory::new("link");
        fs::remove_dir(&link.0).unwrap();
        symlink(&directory.0, &link.0).unwrap();
        let found = link.read("1");
        fs::remove_file(&link.0).unwrap();
        assert_eq!(found, None);
    }

    #[test]
    fn a_file_that_changes_its_length_after_it_was_opened_is_read_within_the_limit() {
        let directory = Directory::new("changing");
        let path = directory.0.join("1");
        fs::write(&path, vec![7; 4_096]).unwrap();
        let same = OpenOptions::new().write(true).open(&path).unwrap();
        let opened = || open(process::id(), &directory.file("1")).unwrap();
        let file = opened();
        same.set_len(1 << 30).unwrap();
        assert_eq!(content(file).unwrap().len() as u64, MAX_BYTES);
        same.set_len(4_096).unwrap();
        let file = opened();
        same.set_len(0).unwrap();
        assert_eq!(content(file), Some(Vec::new()));
    }

    #[test]
    fn a_file_of_another_user_is_not_read() {
        let directory = Directory::new("user");
        let path = directory.0.join("1");
        fs::write(&path, vec![7; 4_096]).unwrap();
        let file = File::open(&path).unwrap();
        let own = user_ids(process::id()).unwrap();
        assert_eq!(own.len(), 2);
        assert!(is_perf_data(&file, &own));
        let others: Vec<u32> = own.iter().map(|id| id + 1).collect();
        assert!(!is_perf_data(&file, &others));
        assert!(directory.read("1").is_some());
        // Only root may give a file away.
        if own.contains(&0) {
            chown(&path, Some(others[0]), None).unwrap();
            assert_eq!(directory.read("1"), None);
        }
    }

    #[test]
    fn a_file_system_that_may_not_answer_is_not_asked() {
        let mounts = "26 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
            27 26 0:50 / /tmp rw - fuse.sshfs server:/x rw\n\
            28 26 0:51 / /tmp rw - tmpfs tmpfs rw\n";
        let is_local = |id| {
            let info = format!("flags:\t01\nmnt_id:\t{id}\n");
            file_system(&info, mounts).is_some_and(|kind| FILE_SYSTEMS.contains(&kind))
        };
        assert!(is_local(26) && is_local(28));
        assert!(!is_local(27) && !is_local(99));
    }
}
