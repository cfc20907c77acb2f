//! A service that waits for an accelerator. No test machine has one: a library that is named like a driver's spins
//! instead. This shows that a thread which spins in it is recognized, not what a driver does.

use std::{path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};
use tailback_tests::{ports, program, temp::TempDir};

use crate::{
    lock::trouble,
    play::{Culprit, Play},
    programs::{DEADLINE, Program, load},
};

const REQUESTS_PER_S: f64 = 20.0;

/// Builds the library under the name of CUDA's.
fn library(directory: &TempDir) -> Result<PathBuf> {
    let source = directory.write("device.c", include_str!("apps/device.c"))?;
    let library = directory.path().join("libcuda.so.1");
    let mut gcc = Command::new(program::need(&["gcc"])?);
    gcc.args(["-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-o"]);
    let built = gcc.arg(&library).arg(source).status();
    ensure!(built.context("start gcc")?.success(), "gcc device.c failed");
    Ok(library)
}

fn slow_device(play: &mut Play, mode: &str) -> Result<()> {
    let directory = TempDir::new("accelerator")?;
    let library = library(&directory)?.display().to_string();
    let port = ports::free()?;
    let text = include_str!("apps/accelerator.py");
    let args = [&port.to_string(), &library, mode];
    let server = Program::python("accelerator", text, &["asyncio"], &args)?;
    server.process.wait_line("listening", DEADLINE)?;
    let load = load(ports::local(port), "/", REQUESTS_PER_S)?;
    let culprit = Culprit::process(server.pid()).or("libcuda");
    trouble(play, &server, &load, culprit)
}

/// The event loop waits for the device itself.
pub fn in_the_loop(play: &mut Play) -> Result<()> {
    slow_device(play, "loop")
}

/// A thread waits for the device, and the event loop for the thread.
pub fn in_a_thread(play: &mut Play) -> Result<()> {
    slow_device(play, "thread")
}
