//! The servers and callers that several scenarios share.

use std::{
    ffi::OsStr,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
pub use tailback_tests::workloads::{Program, app};
use tailback_tests::{
    load::{Load, Plan, Spacing},
    process::children_of,
    program,
    temp::TempDir,
    uwsgi::Uwsgi,
};

/// Deadline of each wait: a JVM or an interpreter may start beside five others.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Whether this is uWSGI's message about a full listen queue.
pub fn uwsgi_is_full(line: &str) -> bool {
    line.contains("uWSGI listen queue of socket") && line.contains("full !!!")
}

/// An open-loop load with Poisson arrivals, like many independent callers.
pub fn load(to: SocketAddr, path: &str, per_s: f64) -> Result<Load> {
    spaced_load(to, path, per_s, Spacing::Poisson { seed: 7 })
}

/// An open-loop load with evenly spaced arrivals.
pub fn steady_load(to: SocketAddr, path: &str, per_s: f64) -> Result<Load> {
    spaced_load(to, path, per_s, Spacing::Even)
}

fn spaced_load(to: SocketAddr, path: &str, per_s: f64, spacing: Spacing) -> Result<Load> {
    Load::start(Plan {
        to,
        path: path.to_owned(),
        per_s,
        spacing,
        duration: Duration::from_secs(90),
        timeout: Duration::from_secs(30),
        max_in_flight: 2000,
    })
}

/// uWSGI's own pid and its workers'.
pub fn family(uwsgi: &Uwsgi) -> Result<Vec<u32>> {
    with_children(uwsgi.process().pid())
}

pub fn with_children(pid: u32) -> Result<Vec<u32>> {
    Ok([pid].into_iter().chain(children_of(pid)?).collect())
}

/// Compiles a Go program into the directory and returns its path.
pub fn go(directory: &TempDir, name: &str, text: &str) -> Result<PathBuf> {
    let source = directory.write(&format!("{name}.go"), text)?;
    go_build(directory, name, directory.path(), source.as_os_str())
}

/// The same for a module in `apps`. Go downloads what it requires, once.
pub fn go_module(directory: &TempDir, name: &str) -> Result<PathBuf> {
    let apps = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios/apps");
    go_build(directory, name, &apps.join(name), OsStr::new("."))
}

fn go_build(directory: &TempDir, name: &str, at: &Path, what: &OsStr) -> Result<PathBuf> {
    let binary = directory.path().join(name);
    let mut go = Command::new(program::need(&["go"])?);
    go.current_dir(at);
    // Inside a repository Go would run Git, which fails in one of another user.
    go.args(["build", "-buildvcs=false", "-o"]).arg(&binary);
    let built = go.arg(what).output().context("start go")?;
    ensure!(
        built.status.success(),
        "go build {name}: {}",
        String::from_utf8_lossy(&built.stderr)
    );
    Ok(binary)
}
