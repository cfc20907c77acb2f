//! A control group whose memory limit is too low for the files that its service reads: pages are evicted and read again.

use anyhow::Result;
use tailback_tests::{cgroup::Cgroup, load::Load, ports, program, temp::TempDir};

use crate::{
    play::{Culprit, Play},
    programs::{DEADLINE, Program, steady_load},
};

/// Size of the file, MiB.
const FILE_MIB: u64 = 256;
/// The limit that holds all of it, and one that holds a third.
const ENOUGH_MIB: u64 = 1024;
const TOO_LOW_MIB: u64 = 112;
const WORKERS: u32 = 4;

/// A service whose data is in a file, in a group that holds all of it, and its load. In the reverse order of their ends.
fn service(mode: &str, per_s: f64) -> Result<(TempDir, Cgroup, Load, Program)> {
    program::need(&["sh"])?;
    let group = Cgroup::with_memory(ENOUGH_MIB)?;
    let directory = TempDir::new("pages")?;
    let port = ports::free()?;
    let file = directory.path().join("data").display().to_string();
    let args = [
        port.to_string(),
        WORKERS.to_string(),
        mode.to_owned(),
        file,
        FILE_MIB.to_string(),
    ];
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let text = include_str!("apps/pages.py");
    let server = Program::python_in(&group.prefix(), "pages", text, &["mmap", "sqlite3"], &args)?;
    server.process.wait_line("listening", DEADLINE)?;
    let load = steady_load(ports::local(port), "/", per_s)?;
    Ok((directory, group, load, server))
}

fn limit_is_lowered(play: &mut Play, mode: &str, per_s: f64) -> Result<()> {
    let (_directory, group, load, server) = service(mode, per_s)?;
    play.watch_pid(server.pid())?;
    play.healthy()?;
    // Its path is that of the service's CPU group: where those of the hierarchies differ, one has to be chosen.
    play.planted(Culprit::default().or("the memory limit of"));
    group.set_memory(TOO_LOW_MIB)?;
    let held = play.hold();
    play.removing(Some(&load));
    group.set_memory(ENOUGH_MIB)?;
    load.set_rate(10.0)?;
    held?;
    play.recover()
}

/// The file is mapped: a page that is missing is a page fault, in no system call.
pub fn mapped(play: &mut Play) -> Result<()> {
    limit_is_lowered(play, "mmap", 120.0)
}

/// SQLite reads it.
pub fn read(play: &mut Play) -> Result<()> {
    limit_is_lowered(play, "sqlite", 60.0)
}

/// Healthy: the file fits.
pub fn fits(play: &mut Play) -> Result<()> {
    let (_directory, _group, load, server) = service("mmap", 60.0)?;
    play.watch_pid(server.pid())?;
    crate::control::observed(play, load)
}
