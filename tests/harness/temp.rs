//! Temporary directories.

use std::{
    env, fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result};

use crate::cleanup;

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A directory that is removed with its contents on drop.
pub struct TempDir(PathBuf);

impl TempDir {
    /// Creates an empty directory whose name contains `purpose`.
    pub fn new(purpose: &str) -> Result<Self> {
        loop {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let name = format!("tailback-{purpose}-{}-{count}", process::id());
            // A process that was killed and had the same pid may have left it.
            if let Some(created) = Self::create(env::temp_dir().join(name))? {
                return Ok(created);
            }
        }
    }

    /// Creates an empty directory of this path.
    pub fn at(path: &Path) -> Result<Self> {
        Self::create(path.to_owned())?.with_context(|| format!("{} exists", path.display()))
    }

    /// `None`: it exists.
    fn create(path: PathBuf) -> Result<Option<Self>> {
        match fs::create_dir(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(None),
            created => created.with_context(|| format!("create {}", path.display()))?,
        }
        cleanup::register_directory(&path);
        Ok(Some(Self(path)))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file into the directory and returns its path.
    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.0.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        cleanup::remove_directory(&self.0);
    }
}
