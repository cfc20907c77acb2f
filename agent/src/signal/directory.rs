//! The directory of pages and sockets: one in which only the agent's user can write.
//!
//! The configured directory is used itself if it belongs to the agent's user and nobody else may write to it. Otherwise, as in
//! a Kubernetes `emptyDir` (mode 0777, or the pod's group), the agent publishes in a subdirectory of its own. Others can rename
//! or replace that one, but not make the agent write anywhere else: it works through the descriptor that it has opened.
#![forbid(unsafe_code)]

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::fs::{DirBuilderExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    fs::{self, AtFlags, FlockOperation, Mode, OFlags, Stat},
    io::Errno,
    process::geteuid,
};

use super::{page::check_own_file, stream::SOCKET};

/// Flags to open a directory without following a symbolic link.
pub(super) const FLAGS: OFlags = OFlags::DIRECTORY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);
/// Mode of the directories: readers of any user may enter.
pub(super) const MODE: Mode = Mode::from_raw_mode(0o755);
/// Permission to write, for users other than the owner.
const WRITE_BY_OTHERS: u32 = 0o022;
/// Users may remove only their own files from the directory.
const STICKY: u32 = 0o1000;
/// The subdirectory in a directory that others may write to.
pub const OWN_NAME: &str = "tailback";
/// Lock file of the agent that writes the pages; contains its pid.
pub(super) const LOCK: &str = "agent.lock";
/// Name of the adapter process's socket in the directory. It replies to any request with the status as JSON.
pub const ADAPTERS_SOCKET: &str = "adapters.sock";
/// Levels of directories: the agent's own, `pods`, and one for each container in it.
const LEVELS: u32 = 3;

/// A directory in which only the agent's user can write.
#[derive(Debug)]
pub struct Directory {
    pub fd: OwnedFd,
    pub path: PathBuf,
    /// The configured directory, if this is a subdirectory of it.
    parent: Option<OwnedFd>,
}

impl Directory {
    /// Opens the directory, creating it if needed, or the agent's own one below it.
    ///
    /// # Errors
    /// If it cannot be created, or another user has put something else in its place.
    pub fn open(path: &Path) -> Result<Self> {
        let mut builder = std::fs::DirBuilder::new();
        let created = builder
            .recursive(true)
            .mode(MODE.as_raw_mode())
            .create(path);
        created.with_context(|| format!("cannot create the directory {}", path.display()))?;
        let fd = fs::open(path, FLAGS, Mode::empty())
            .with_context(|| format!("cannot open the directory {}", path.display()))?;
        let in_use = || format!("cannot use the directory {}", path.display());
        let stat = stat(&fd).with_context(in_use)?;
        let is_own = stat.st_uid == geteuid().as_raw();
        let is_writable = stat.st_mode & WRITE_BY_OTHERS != 0;
        if is_own && !is_writable {
            return Ok(Self {
                fd,
                path: path.to_owned(),
                parent: None,
            });
        }
        if !is_writable && is_locked(&fd) {
            bail!(
                "the agent of user {} publishes in {}: run as that user, or set another `directory` in [signal]",
                stat.st_uid,
                path.display()
            );
        }
        let own = own_below(&fd, &stat).with_context(in_use)?;
        Ok(Self {
            fd: own,
            path: path.join(OWN_NAME),
            parent: Some(fd),
        })
    }

    /// Opens the directory of a running agent, as that agent uses it.
    ///
    /// # Errors
    /// If others may write to it.
    pub fn open_in_use(path: &Path) -> Result<Self> {
        let fd = fs::open(path, FLAGS, Mode::empty())
            .map_err(anyhow::Error::from)
            .and_then(|fd| check_owner(&fd).map(|()| fd))
            .with_context(|| format!("cannot use the directory {}", path.display()))?;
        Ok(Self {
            fd,
            path: path.to_owned(),
            parent: None,
        })
    }

    /// The directory behind a descriptor that another process of this user has opened and passed on.
    ///
    /// # Errors
    /// If others may write to it.
    pub fn received(fd: OwnedFd, path: PathBuf, is_below_shared: bool) -> Result<Self> {
        check_owner(&fd).with_context(|| format!("cannot use the directory {}", path.display()))?;
        // Only whether there is one matters: the other process watches its place.
        let parent = is_below_shared.then(|| fd.try_clone()).transpose()?;
        Ok(Self { fd, path, parent })
    }

    /// A path to it for a child process. It leads through the returned descriptor, if any, which the child inherits, and so to
    /// this directory, whatever others put in its place.
    pub fn for_child(&self) -> io::Result<(PathBuf, Option<OwnedFd>)> {
        if !self.is_below_shared() {
            return Ok((self.path.clone(), None));
        }
        // Unlike the original, not closed on exec.
        let inherited = rustix::io::dup(&self.fd)?;
        let path = format!("/proc/self/fd/{}/.", inherited.as_raw_fd());
        Ok((path.into(), Some(inherited)))
    }

    /// Whether it is a subdirectory of one that others may write to.
    pub fn is_below_shared(&self) -> bool {
        self.parent.is_some()
    }

    /// Whether an agent of this user may publish in it. False for a subdirectory of a directory to which only another
    /// user may write, unless an agent publishes there.
    pub fn is_plausible(&self) -> bool {
        let of_another = self.parent.as_ref().is_some_and(|parent| {
            fs::fstat(parent).is_ok_and(|stat| stat.st_mode & WRITE_BY_OTHERS == 0)
        });
        !of_another || is_locked(&self.fd)
    }

    /// Whether its path still leads to it, so that readers find the agent's files.
    pub fn is_in_place(&self) -> bool {
        let Some(parent) = &self.parent else {
            return true;
        };
        let there = fs::statat(parent, OWN_NAME, AtFlags::SYMLINK_NOFOLLOW);
        match (there, fs::fstat(&self.fd)) {
            (Ok(there), Ok(own)) => (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino),
            _ => false,
        }
    }

    /// A path to use this file by; the empty name is the directory itself. It leads through the open descriptor if others could
    /// replace the directory.
    pub fn path_to(&self, name: &str) -> PathBuf {
        if self.is_below_shared() {
            format!("/proc/self/fd/{}/{name}", self.fd.as_raw_fd()).into()
        } else {
            self.path.join(name)
        }
    }
}

/// Opens the agent's own directory below one that others may write to.
fn own_below(parent: &OwnedFd, stat: &Stat) -> Result<OwnedFd> {
    let own = geteuid().as_raw();
    let is_new = match fs::mkdirat(parent, OWN_NAME, MODE) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(error) => {
            return Err(error).with_context(|| {
                format!(
                    "it belongs to user {}, and the agent's user {own} cannot create `{OWN_NAME}` in it: set another `directory` in \
                     [signal]; in Kubernetes, give the volume to the agent's group by `securityContext: {{fsGroup: GID}}`",
                    stat.st_uid
                )
            });
        }
    };
    let directory = fs::openat(parent, OWN_NAME, FLAGS, Mode::empty()).with_context(|| {
        format!(
            "others may write to it, and `{OWN_NAME}` in it is not a directory: remove `{OWN_NAME}`"
        )
    })?;
    let stat = self::stat(&directory)?;
    if stat.st_uid != own {
        bail!(
            "others may write to it, and `{OWN_NAME}` in it belongs to user {}, not to the agent's user {own}: remove that, \
             or set another `directory` in [signal]",
            stat.st_uid
        );
    }
    let was_writable = !is_new && stat.st_mode & WRITE_BY_OTHERS != 0;
    if was_writable && stat.st_mode & STICKY != 0 {
        bail!("any user may have files in its subdirectory `{OWN_NAME}`: remove that subdirectory");
    }
    // One that was there only loses permissions: it may be another one, under this name.
    let mode = if is_new { MODE } else { closed_mode(&stat) };
    fs::fchmod(&directory, mode).context("cannot set the mode of the directory")?;
    if was_writable {
        remove_foreign(&directory, LEVELS);
    }
    Ok(directory)
}

/// The mode without the permission to write for users other than the owner.
fn closed_mode(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode & 0o7777 & !WRITE_BY_OTHERS)
}

/// Removes what others may have put into a directory while they could write to it: every file, and the empty directories of
/// other users. Those of the agent's user stay, because containers may have them mounted, but nobody else can write to them from
/// now on. What is left is refused when it is used. Nothing is removed that others could not have removed themselves.
fn remove_foreign(directory: &OwnedFd, levels: u32) {
    let Ok(entries) = fs::Dir::read_from(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..")
            || fs::unlinkat(directory, name, AtFlags::empty()).is_ok()
        {
            continue;
        }
        let Ok(below) = fs::openat(directory, name, FLAGS, Mode::empty()) else {
            continue;
        };
        let Ok(stat) = fs::fstat(&below) else {
            continue;
        };
        if stat.st_uid != geteuid().as_raw() {
            let _ = fs::unlinkat(directory, name, AtFlags::REMOVEDIR);
        } else if stat.st_mode & WRITE_BY_OTHERS != 0 && stat.st_mode & STICKY == 0 {
            let _ = fs::fchmod(&below, closed_mode(&stat));
            if levels > 1 {
                remove_foreign(&below, levels - 1);
            }
        }
    }
}

/// Replaces this file of a directory: its readers find the former content or the new one. `new_name`: its name until it is complete.
///
/// # Errors
/// If the file cannot be written.
pub fn replace_file(
    directory: impl AsFd,
    (name, new_name): (&str, &str),
    mode: Mode,
    content: &[u8],
) -> Result<()> {
    // Left by a process that was killed.
    let _ = fs::unlinkat(&directory, new_name, AtFlags::empty());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = fs::openat(&directory, new_name, flags, mode)
        .with_context(|| format!("cannot create {new_name}"))?;
    File::from(file).write_all(content)?;
    fs::renameat(&directory, new_name, &directory, name)
        .with_context(|| format!("cannot replace {name}"))
}

/// Reads at most `max_bytes` of this file of a directory, `None` if there is none. Only the agent's user can have written it.
///
/// # Errors
/// If the file cannot be read, or others could have written it.
pub(super) fn read_own_file(
    directory: impl AsFd,
    name: &str,
    max_bytes: u64,
) -> Result<Option<Vec<u8>>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match fs::openat(directory, name, flags, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot open {name}")),
    };
    let stat = check_own_file(&file, name)?;
    if stat.st_mode & WRITE_BY_OTHERS != 0 {
        bail!("`{name}` can be written by others, but only the agent's user may: remove it");
    }
    let mut bytes = Vec::new();
    File::from(file).take(max_bytes).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// Whether an agent publishes in this directory.
fn is_locked(directory: &OwnedFd) -> bool {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let lock = fs::openat(directory, LOCK, flags, Mode::empty());
    lock.is_ok_and(|lock| {
        fs::flock(&lock, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
    })
}

fn stat(directory: &OwnedFd) -> Result<Stat> {
    fs::fstat(directory).context("cannot read its owner")
}

/// Fails unless only the agent's user can write to this directory.
pub(super) fn check_owner(directory: &OwnedFd) -> Result<()> {
    let stat = stat(directory)?;
    let own = geteuid().as_raw();
    if stat.st_uid != own {
        bail!(
            "it belongs to user {}, not to the agent's user {own}: remove it, or set another `directory` in [signal]",
            stat.st_uid
        );
    }
    if stat.st_mode & WRITE_BY_OTHERS != 0 {
        bail!("directory is group/world-writable, so pages could be spoofed; run `chmod go-w DIR`");
    }
    Ok(())
}

/// The directory in which an agent (or its adapter process) with this configured directory publishes: its subdirectory
/// if that has a socket, and either others may write to the configured one, or that has no socket. Otherwise the
/// configured one.
pub fn in_use(configured: &Path) -> PathBuf {
    let has_socket = |directory: &Path| {
        [SOCKET, ADAPTERS_SOCKET]
            .iter()
            .any(|name| std::fs::symlink_metadata(directory.join(name)).is_ok())
    };
    let is_writable = std::fs::metadata(configured)
        .is_ok_and(|directory| directory.mode() & WRITE_BY_OTHERS != 0);
    let below = configured.join(OWN_NAME);
    if has_socket(&below) && (is_writable || !has_socket(configured)) {
        below
    } else {
        configured.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    use tailback_tests::temp::TempDir;

    use super::*;

    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_directory_of_ones_own_is_used_itself() {
        let temp = TempDir::new("directory").unwrap();
        let path = temp.path().join("a/run");
        let directory = Directory::open(&path).unwrap();
        assert_eq!(directory.path, path);
        assert_eq!(directory.path_to("x"), path.join("x"));
        assert!(!directory.is_below_shared() && directory.is_in_place());
    }

    #[test]
    fn in_a_shared_directory_an_own_one_is_used() {
        let temp = TempDir::new("directory").unwrap();
        for mode in [0o777, 0o1777, 0o2777, 0o775] {
            let path = temp.path().join(format!("{mode:o}"));
            std::fs::create_dir(&path).unwrap();
            set_mode(&path, mode);
            let directory = Directory::open(&path).unwrap();
            assert_eq!(directory.path, path.join(OWN_NAME));
            let own = std::fs::metadata(&directory.path).unwrap();
            assert_eq!(own.mode() & 0o777, 0o755);
            assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, mode);
            // Replaced: what the agent writes still goes to its own.
            std::fs::rename(&directory.path, path.join("away")).unwrap();
            std::fs::create_dir(&directory.path).unwrap();
            assert!(!directory.is_in_place());
            std::fs::write(directory.path_to("x"), "").unwrap();
            assert!(path.join("away/x").exists() && !directory.path.join("x").exists());
        }
    }

    #[test]
    fn an_own_directory_that_is_there_only_loses_permissions() {
        let temp = TempDir::new("directory").unwrap();
        set_mode(temp.path(), 0o777);
        let own = temp.path().join(OWN_NAME);
        std::fs::create_dir(&own).unwrap();
        for (before, after) in [(0o777, 0o755), (0o700, 0o700), (0o2775, 0o2755)] {
            set_mode(&own, before);
            Directory::open(temp.path()).unwrap();
            assert_eq!(std::fs::metadata(&own).unwrap().mode() & 0o7777, after);
        }
    }

    #[test]
    fn what_others_put_into_the_own_directory_is_removed_when_they_no_longer_can() {
        let temp = TempDir::new("directory").unwrap();
        set_mode(temp.path(), 0o777);
        let own = temp.path().join(OWN_NAME);
        let victim = TempDir::new("victim").unwrap();
        std::fs::write(victim.path().join("page"), "").unwrap();
        // As a container runtime makes it for a mount.
        std::fs::create_dir_all(own.join("shop")).unwrap();
        set_mode(&own, 0o777);
        set_mode(&own.join("shop"), 0o777);
        symlink(victim.path(), own.join("pods")).unwrap();
        symlink(victim.path().join("page"), own.join("shop/page")).unwrap();
        for name in ["adapters.next.new", "learned.json.new", LOCK] {
            fs::mknodat(fs::CWD, own.join(name), fs::FileType::Fifo, MODE, 0).unwrap();
        }
        if geteuid().is_root() {
            std::fs::create_dir(own.join("cart")).unwrap();
            chown(own.join("cart"), Some(4_711), None).unwrap();
        }
        let directory = Directory::open(temp.path()).unwrap();
        let left: Vec<_> = std::fs::read_dir(&own).unwrap().flatten().collect();
        assert!(left.len() == 1 && left[0].file_name() == "shop", "{left:?}");
        let shop = std::fs::metadata(own.join("shop")).unwrap();
        assert_eq!(shop.mode() & 0o777, 0o755);
        assert_eq!(std::fs::read_dir(own.join("shop")).unwrap().count(), 0);
        assert!(victim.path().join("page").exists());
        // What the agent has put there itself stays, as does what others could not have removed.
        std::fs::write(directory.path_to("x"), "").unwrap();
        Directory::open(temp.path()).unwrap();
        set_mode(&own, 0o1777);
        let error = format!("{:#}", Directory::open(temp.path()).unwrap_err());
        assert!(error.contains("any user may have files"), "{error}");
        assert!(own.join("x").exists());
    }

    #[test]
    fn a_child_finds_the_directory_that_others_have_moved_and_replaced() {
        let temp = TempDir::new("directory").unwrap();
        set_mode(temp.path(), 0o777);
        let directory = Directory::open(temp.path()).unwrap();
        let (path, inherited) = directory.for_child().unwrap();
        let inherited = inherited.unwrap();
        let flags = rustix::io::fcntl_getfd(&inherited).unwrap();
        assert!(!flags.contains(rustix::io::FdFlags::CLOEXEC));
        std::fs::rename(&directory.path, temp.path().join("away")).unwrap();
        std::fs::create_dir(&directory.path).unwrap();
        let of_child = Directory::open_in_use(&path).unwrap();
        assert!(!of_child.is_below_shared());
        std::fs::write(of_child.path_to("x"), "").unwrap();
        assert!(temp.path().join("away/x").exists());
        set_mode(&temp.path().join("away"), 0o777);
        assert!(Directory::open_in_use(&path).is_err());
    }

    #[test]
    fn a_directory_in_which_another_users_agent_publishes_is_refused() {
        if !geteuid().is_root() {
            return;
        }
        let temp = TempDir::new("directory").unwrap();
        let lock = File::create(temp.path().join(LOCK)).unwrap();
        chown(temp.path(), Some(4_711), None).unwrap();
        fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
        let error = format!("{:#}", Directory::open(temp.path()).unwrap_err());
        assert!(error.contains("agent of user 4711"), "{error}");
        drop(lock);
        assert!(Directory::open(temp.path()).unwrap().is_below_shared());
    }

    #[test]
    fn what_another_user_has_put_there_is_refused() {
        let temp = TempDir::new("directory").unwrap();
        set_mode(temp.path(), 0o777);
        let own = temp.path().join(OWN_NAME);
        let error = || format!("{:#}", Directory::open(temp.path()).unwrap_err());
        let other = TempDir::new("other").unwrap();
        symlink(other.path(), &own).unwrap();
        assert!(error().contains("is not a directory"), "{}", error());
        std::fs::remove_file(&own).unwrap();
        std::fs::write(&own, "").unwrap();
        assert!(error().contains("is not a directory"));
        std::fs::remove_file(&own).unwrap();
        if geteuid().is_root() {
            std::fs::create_dir(&own).unwrap();
            chown(&own, Some(4_711), None).unwrap();
            assert!(error().contains("belongs to user 4711"));
        }
        assert_eq!(std::fs::read_dir(other.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_directory_in_use_is_the_one_with_a_socket() {
        let temp = TempDir::new("directory").unwrap();
        assert_eq!(in_use(temp.path()), temp.path());
        let own = temp.path().join(OWN_NAME);
        std::fs::create_dir(&own).unwrap();
        std::fs::write(own.join(SOCKET), "").unwrap();
        assert_eq!(in_use(temp.path()), own);
        std::fs::write(temp.path().join(SOCKET), "").unwrap();
        assert_eq!(in_use(temp.path()), temp.path());
        // A socket that anyone could have put there.
        set_mode(temp.path(), 0o777);
        assert_eq!(in_use(temp.path()), own);
    }
}
