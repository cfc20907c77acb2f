//! Finds and copies installed programs.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::temp::TempDir;

/// The first of `names` on `PATH` or in the sbin directories, which are only on root's `PATH`.
pub fn find(names: &[&str]) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let directorys: Vec<PathBuf> = env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .collect();
    names
        .iter()
        .flat_map(|name| directorys.iter().map(move |directory| directory.join(name)))
        .find(|file| file.is_file())
}

/// Like [`find`]; the error says how to install the program.
pub fn need(names: &[&str]) -> Result<PathBuf> {
    match find(names) {
        Some(path) => Ok(path),
        None => bail!(
            "{} is not installed: run `cargo xtask setup`",
            names.join(" or ")
        ),
    }
}

/// Copies a program under a new name.
pub fn renamed(program: &str, directory: &TempDir, name: &str) -> Result<PathBuf> {
    let path = directory.path().join(name);
    copy(Path::new(program), &path)?;
    Ok(path)
}

/// Copies a program with cp(1). If we wrote the file ourselves while another thread forks, the child would inherit the
/// writable descriptor, and executing the file would fail with ETXTBSY until that child is gone.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut copy = Command::new("cp");
    let done = copy.arg("--").arg(from).arg(to).status();
    let done = done.context("start cp")?;
    ensure!(
        done.success(),
        "cp {} {}: {done}",
        from.display(),
        to.display()
    );
    Ok(())
}
