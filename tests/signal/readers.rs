//! The page readers under `deploy/readers`, one per language, reading a real page.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tailback_page::Page;
use tailback_tests::{agent, needs, process::Process, program, temp::TempDir, wait};

use crate::stage::{DEADLINE, LONG_TTL, Stage, jam};

/// Directory of the readers.
pub fn readers() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/readers")
}

/// Runs a program to completion and returns its standard output.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Builds a C program of `examples`.
pub fn c_program(temp: &TempDir, name: &str) -> Result<PathBuf> {
    c(temp, Path::new("examples").join(name))
}

/// Builds a C program of the reader's directory, with all warnings as errors.
fn c(temp: &TempDir, name: impl AsRef<Path>) -> Result<PathBuf> {
    let directory = readers().join("c");
    let source = directory.join(name).with_extension("c");
    let program = temp.path().join(source.file_stem().context("no name")?);
    let mut gcc = Command::new(program::need(&["gcc"])?);
    gcc.args([
        "-std=c11",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        "-pthread",
        "-I",
    ]);
    run(gcc.arg(&directory).arg(&source).arg("-o").arg(&program))?;
    Ok(program)
}

/// Builds a package of the Go module in `directory`.
pub fn go_program(directory: &Path, package: &str, program: &Path) -> Result<PathBuf> {
    let mut go = Command::new(program::need(&["go"])?);
    go.current_dir(directory)
        .args(["build", "-o"])
        .arg(program)
        .arg(package);
    run(&mut go)?;
    Ok(program.to_owned())
}

/// Path of an example of the Rust reader, built together with the tests.
pub fn rust_example(name: &str) -> Result<PathBuf> {
    let own = env::current_exe()?;
    let builds = own.ancestors().nth(2).context("no build directory")?;
    Ok(builds.join("examples").join(name))
}

/// Builds a package of the Go reader.
pub fn go(temp: &TempDir, package: &str, name: &str) -> Result<PathBuf> {
    go_program(&readers().join("go"), package, &temp.path().join(name))
}

#[test]
fn every_reader_reads_the_published_page_and_no_pressure_without_one() -> Result<()> {
    const TEST: &str = "every_reader_reads_the_published_page_and_no_pressure_without_one";
    if !needs::met(TEST, &["gcc", "go", "node", "python3"]) {
        return Ok(());
    }
    let temp = TempDir::new("readers")?;
    let python = vec![
        program::need(&["python3"])?,
        readers().join("python/tailback_page.py"),
    ];
    let node = vec![
        program::need(&["node"])?,
        readers().join("node/tailback_page.js"),
    ];
    let readers = [
        ("C", vec![c_program(&temp, "dump")?]),
        ("Go", vec![go(&temp, "./cmd/tailback-page", "go-reader")?]),
        ("Python", python),
        ("Node", node),
    ];
    let service = jam("127.0.0.1:0", 20)?;
    let stage = Stage::start(service.address().port(), LONG_TTL)?;
    stage.wait("the floor of the admit ratio", |pressure| {
        pressure.admit_ratio <= 0.05
    })?;
    for (language, words) in &readers {
        let read = |page: &Path| -> Result<Value> {
            let text = run(Command::new(&words[0]).args(&words[1..]).arg(page))?;
            serde_json::from_str(&text)
                .with_context(|| format!("parse the output of {language}: {text:?}"))
        };
        let page_json = read(&stage.page())?;
        let page = Page::open(stage.page());
        let (own, entries) = (page.pressure(), page.entries());
        ensure!(
            page_json["alive"] == true && page_json["pid"] == service.pid(),
            "{language}: {page_json}"
        );
        ensure!(
            page_json["admit_ratio"] == own.admit_ratio
                && page_json["retry_after_ms"].as_u64() >= Some(1_000),
            "{language}: {page_json}"
        );
        ensure!(
            page_json["oldest_age_ns"].as_u64() > Some(500_000_000)
                && page_json["time_to_full_ns"].is_null(),
            "{language}: {page_json}"
        );
        ensure!(
            page_json["load"] == own.load && own.load > 1.0 && page_json["cpu"].is_number(),
            "{language}: {page_json}"
        );
        ensure!(
            page_json["concurrency_limit"].as_u64() == own.concurrency_limit.map(u64::from)
                && page_json["max_queue_wait_ns"]
                    .as_u64()
                    .map(Duration::from_nanos)
                    == own.max_queue_wait
                && own.max_queue_wait.is_some(),
            "{language}: {page_json}"
        );
        let queues = page_json["entries"].as_array().context("no entries")?;
        ensure!(queues.len() == entries.len(), "{language}: {page_json}");
        let (first, own) = (&queues[0], entries[0]);
        ensure!(
            first["kind"] == "accept"
                && first["depth"] == 20
                && first["id"] == own.id
                && first["limit"] == own.limit.unwrap_or(0),
            "{language}: {first}"
        );
        let page_json = read(Path::new("/nonexistent/page"))?;
        ensure!(
            page_json["alive"] == false
                && page_json["admit_ratio"] == 1.0
                && page_json["max_queue_wait_ns"].is_null(),
            "{language}: {page_json}"
        );
    }
    Ok(())
}

#[test]
fn the_readers_pass_their_own_tests() -> Result<()> {
    const TEST: &str = "the_readers_pass_their_own_tests";
    if !needs::met(TEST, &["gcc", "go", "node", "python3"]) {
        return Ok(());
    }
    let temp = TempDir::new("beside")?;
    run(&mut Command::new(c(&temp, "test")?))?;
    let mut go = Command::new(program::need(&["go"])?);
    // -count=1 disables cached results.
    go.current_dir(readers().join("go"))
        .args(["test", "-count=1", "./..."]);
    run(&mut go)?;
    let python = readers().join("python/test_tailback_page.py");
    run(Command::new(program::need(&["python3"])?).arg(python))?;
    let node = readers().join("node/tailback_page.test.js");
    run(Command::new(program::need(&["node"])?).arg(node))?;
    Ok(())
}

#[test]
fn no_reader_sees_a_torn_page() -> Result<()> {
    const TEST: &str = "no_reader_sees_a_torn_page";
    if !needs::met(TEST, &["gcc"]) {
        return Ok(());
    }
    let temp = TempDir::new("torn")?;
    let programs = [c_program(&temp, "torture")?, rust_example("torture")?];
    // A whole page is readable only if the writer pauses between writes: 1 us is the shortest pause.
    for (what, reads, pause) in [("header", 3_000_000, "0ms"), ("page", 200_000, "1us")] {
        let mut writer = Command::new(agent::binary()?);
        writer
            .arg("bench-page")
            .args(["--every", pause])
            .arg(temp.path());
        let writer = Process::start("the writer", &mut writer)?;
        let page = temp.path().join("page");
        wait::until("a page", DEADLINE, || {
            Ok(Page::open(&page).pressure().alive.then_some(()))
        })?;
        for program in &programs {
            let output = run(Command::new(program)
                .arg(&page)
                .args([what, &reads.to_string()]))?;
            println!("{} {what}: {output}", program.display());
            ensure!(output.contains("torn 0 "), "{output}");
            let unsettled = output
                .split("unsettled ")
                .nth(1)
                .and_then(|rest| rest.split_whitespace().next());
            let unsettled: u64 = unsettled.context("no count")?.parse()?;
            ensure!(unsettled < reads / 2, "{output}");
        }
        writer.check_running()?;
    }
    Ok(())
}
