//! Programs in Python that need more than Python itself.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Result, bail};

use crate::program;

/// A Python that has these modules: the first on `PATH`, or Debian's, whose packages no other Python sees.
pub fn with(modules: &[&str]) -> Result<PathBuf> {
    let import = format!("import {}", modules.join(", "));
    let has = |python: &Path| {
        let mut command = Command::new(python);
        command.args(["-c", &import]).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let debian = PathBuf::from("/usr/bin/python3");
    for python in program::find(&["python3"]).into_iter().chain([debian]) {
        if has(&python) {
            return Ok(python);
        }
    }
    bail!(
        "no Python has {}: run `cargo xtask setup`",
        modules.join(" and ")
    )
}
