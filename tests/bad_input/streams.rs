//! Standard streams that are closed or cannot be written.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use anyhow::{Context as _, Result, ensure};
use tailback_tests::temp::TempDir;

use crate::{Stuck, allowed, idle, recordings, run, tailback};

/// Reads the first line of the agent's standard output and closes the pipe. Returns exit code and standard error.
fn head(args: &[&str]) -> Result<(Option<i32>, String)> {
    let mut command = tailback(args)?;
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.stdin(Stdio::null()).spawn()?;
    let mut line = String::new();
    let stdout = child.stdout.take().context("no standard output")?;
    BufReader::new(stdout).read_line(&mut line)?;
    ensure!(!line.is_empty(), "{args:?} printed nothing");
    let output = child.wait_with_output()?;
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!err.contains("panicked"), "{args:?}: {err}");
    Ok((output.status.code(), err))
}

#[test]
fn a_closed_standard_output_is_not_an_error() -> Result<()> {
    if !allowed("a_closed_standard_output_is_not_an_error") {
        return Ok(());
    }
    let directory = TempDir::new("head")?;
    fs::write(
        directory.path().join("recording"),
        recordings::recording(&directory)?,
    )?;
    let recorded = directory.path().join("recording");
    let stuck = Stuck::new()?;
    for args in [
        &["sample", "--all", "-v"][..],
        &["sample", "--all", "--json"],
        &["doctor"],
        &["doctor", "--json"],
        &["--help"],
        &["replay", &recorded.to_string_lossy()],
        // The level and the closing summary are written after the pipe is closed.
        &["run", "--pid", &stuck.pid, "--duration", "3s"],
        &["run", "--json", "--pid", &stuck.pid, "--duration", "3s"],
    ] {
        let (code, err) = head(args)?;
        ensure!(code == Some(0), "{args:?}: {code:?} {err}");
    }
    Ok(())
}

#[test]
fn a_recording_is_complete_although_standard_output_is_closed() -> Result<()> {
    if !allowed("a_recording_is_complete_although_standard_output_is_closed") {
        return Ok(());
    }
    let directory = TempDir::new("head")?;
    let file = directory.path().join("recording");
    let file = file.to_string_lossy();
    let stuck = Stuck::new()?;
    let args = ["run", "--pid", &stuck.pid, "--record", &file];
    let (code, err) = head(&[&args[..], &["--duration", "20s"]].concat())?;
    ensure!(
        code == Some(0) && err.contains("samples to"),
        "{code:?} {err}"
    );
    run(&["replay", &file])?.check(0, &[])
}

#[test]
fn a_closed_standard_error_keeps_the_exit_code() -> Result<()> {
    for (args, code) in [
        (&["run"][..], 2),
        (&["replay", "/no/such/file"], 2),
        (&["run", "--all", "--otlp", "nowhere"], 2),
    ] {
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let status = tailback(args)?.stderr(writer).status()?;
        ensure!(status.code() == Some(code), "{args:?}: {status}");
    }
    Ok(())
}

#[test]
fn unwritable_output_exits_with_74() -> Result<()> {
    if !allowed("unwritable_output_exits_with_74") {
        return Ok(());
    }
    let process = idle()?;
    let pid = process.pid().to_string();
    for args in [
        &["sample", "--pid", &pid][..],
        &["sample", "--json", "--pid", &pid],
        &["run", "--pid", &pid, "--duration", "5s"],
        &["doctor"],
    ] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full")?;
        let output = tailback(args)?.stdout(full).output()?;
        let err = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(74), "{args:?}: {err}");
        ensure!(err.contains("cannot write to standard output"), "{err}");
        ensure!(err.contains("No space left on device"), "{err}");
    }
    Ok(())
}
