//! Temporary directories.

use std::{
    env, fs,
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
            let path = env::temp_dir().join(name);
            let created = fs::create_dir(&path);
            // Left by a process that was killed and had the same pid.
            if created
                .as_ref()
                .is_err_and(|error| error.kind() == std::io::ErrorKind::AlreadyExists)
            {
                continue;
            }
            created.with_context(|| format!("create {}", path.display()))?;
            cleanup::register_directory(&path);
            return Ok(Self(path));
        }
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
