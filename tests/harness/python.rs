//! Python interpreters with the modules that a program needs.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Result, bail};

use crate::program;

/// A Python with these modules: the first on `PATH`, else Debian's, whose packages other interpreters do not find.
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
