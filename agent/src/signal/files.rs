//! Creates and removes the files of services in the directory of pages.
//!
//! Once the agent has dropped its privileges it cannot create a file at all. A helper process does these four operations for it
//! (`cli/helper`).
#![forbid(unsafe_code)]

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use anyhow::{Context as _, Result, bail};
use rustix::{
    fs::{self, AtFlags, Mode},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use super::{
    directory::{self, check_owner, replace_file},
    names::PODS,
    page,
};

/// Mode of the files for a later agent: only the agent reads and writes them.
const STATE_MODE: Mode = Mode::from_raw_mode(0o600);
/// Longest name of a directory entry, bytes: NAME_MAX of Linux.
const MAX_NAME_BYTES: usize = 255;

/// Operations on the files of services. A `name` is the name of a service's directory, or `pods/` and a container's file name.
pub trait Files: Send {
    /// Opens the page of this name, creating it and its directories if needed.
    fn open_page(&self, name: &str) -> Result<OwnedFd>;
    /// Removes a page, but not its directory.
    fn remove_page(&self, name: &str) -> Result<()>;
    /// Removes the directory of a page, if it is empty.
    fn remove_directory(&self, name: &str) -> Result<()>;
    /// Replaces a file for a later agent.
    fn save(&self, file: StateFile, contents: &[u8]) -> Result<()>;
}

/// A file of state that the agent saves for its successor.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum StateFile {
    /// What was learned about services.
    Learned,
    /// The owners of names.
    Owners,
}

impl StateFile {
    /// Its name, and its name while it is being written.
    pub(super) const fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Learned => ("learned.json", "learned.json.new"),
            Self::Owners => ("owners.json", "owners.json.new"),
        }
    }

    /// Maximum size, bytes. Owners: 2 × 4096 names, each with its owner.
    pub fn max_bytes(self) -> u64 {
        match self {
            Self::Learned => 4 << 20,
            Self::Owners => 8 << 20,
        }
    }
}

/// Does so in a directory that this process has opened.
#[derive(Debug)]
pub struct OwnFiles(pub OwnedFd);

impl Files for OwnFiles {
    fn open_page(&self, name: &str) -> Result<OwnedFd> {
        check_name(name)?;
        if name.contains('/') {
            make_directory(self.0.as_fd(), PODS)?;
        }
        let directory = self.descend(name, make_directory)?;
        page::create(directory.as_fd(), page::NAME)
    }

    fn remove_page(&self, name: &str) -> Result<()> {
        check_name(name)?;
        page::remove(enter(self.0.as_fd(), name)?.as_fd());
        Ok(())
    }

    fn remove_directory(&self, name: &str) -> Result<()> {
        check_name(name)?;
        self.descend(name, |parent, name| {
            Ok(fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?)
        })
    }

    fn save(&self, file: StateFile, contents: &[u8]) -> Result<()> {
        replace_file(&self.0, file.names(), STATE_MODE, contents)
    }
}

impl OwnFiles {
    /// Calls `last` with the directory that contains this one, and the name in it.
    fn descend<T>(
        &self,
        name: &str,
        last: impl FnOnce(BorrowedFd<'_>, &str) -> Result<T>,
    ) -> Result<T> {
        let root = self.0.as_fd();
        match name.split_once('/') {
            Some((parent, name)) => last(enter_one(root, parent)?.as_fd(), name),
            None => last(root, name),
        }
    }
}

/// Opens a directory below this one. Only the agent's user can write to each on the way.
pub(super) fn enter(root: BorrowedFd<'_>, name: &str) -> Result<OwnedFd> {
    match name.split_once('/') {
        Some((parent, name)) => enter_one(enter_one(root, parent)?.as_fd(), name),
        None => enter_one(root, name),
    }
}

/// A name leads to a directory below the one of pages, and nowhere else.
fn check_name(name: &str) -> Result<()> {
    let last = match name.split_once('/') {
        Some((PODS, container)) => container,
        _ => name,
    };
    let is_one = !last.is_empty() && last.len() <= MAX_NAME_BYTES && !last.contains(['/', '\0']);
    if !is_one || last.starts_with('.') {
        bail!("{name:?} cannot be the name of a page");
    }
    Ok(())
}

/// Opens a directory to which only the agent's user can write.
fn enter_one(parent: BorrowedFd<'_>, name: &str) -> Result<OwnedFd> {
    let directory = fs::openat(parent, name, directory::FLAGS, Mode::empty())
        .context("cannot open the directory")?;
    check_owner(&directory)?;
    Ok(directory)
}

/// Opens such a directory, creating it if needed.
fn make_directory(parent: BorrowedFd<'_>, name: &str) -> Result<OwnedFd> {
    match fs::mkdirat(parent, name, directory::MODE) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error).context("cannot create the directory"),
    }
    let directory = enter_one(parent, name)?;
    // Independent of the umask.
    fs::fchmod(&directory, directory::MODE).context("cannot make the directory accessible")?;
    Ok(directory)
}

#[cfg(test)]
mod tests {
    use tailback_tests::temp::TempDir;

    use super::*;

    #[test]
    fn no_name_leads_out_of_the_directory() {
        let temp = TempDir::new("files").unwrap();
        let inside = temp.path().join("run");
        std::fs::create_dir(&inside).unwrap();
        let directory = fs::open(&inside, directory::FLAGS, Mode::empty()).unwrap();
        let files = OwnFiles(directory);
        let long = "x".repeat(MAX_NAME_BYTES + 1);
        for name in [
            "",
            ".",
            "..",
            "../x",
            "/x",
            "x/y",
            "pods/",
            "pods/..",
            "pods/a/b",
            "pods/../x",
            "a\0b",
            &long,
        ] {
            assert!(files.open_page(name).is_err(), "{name:?}");
            assert!(files.remove_page(name).is_err(), "{name:?}");
            assert!(files.remove_directory(name).is_err(), "{name:?}");
        }
        assert_eq!(std::fs::read_dir(&inside).unwrap().count(), 0);
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 1);
        for name in ["shop", "pods/default_shop_web"] {
            files.open_page(name).unwrap();
            assert!(files.remove_directory(name).is_err(), "it is not empty");
            files.remove_page(name).unwrap();
            files.remove_directory(name).unwrap();
        }
    }
}
