//! Programs on this machine.

use std::{env, path::PathBuf};

use anyhow::{Result, bail};

/// The first of `names` on `PATH`, or in the folders of servers, which only root has on its `PATH`.
pub fn find(names: &[&str]) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .collect();
    names
        .iter()
        .flat_map(|name| folders.iter().map(move |folder| folder.join(name)))
        .find(|file| file.is_file())
}

/// As [`find`]; where there is none, the error says what to do.
pub fn need(names: &[&str]) -> Result<PathBuf> {
    match find(names) {
        Some(path) => Ok(path),
        None => bail!(
            "{} is not installed: run `cargo xtask setup`",
            names.join(" or ")
        ),
    }
}
