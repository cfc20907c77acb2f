//! The first process of a test kernel: it prepares the machine, runs the checks or one command, writes the results to the
//! console, and powers off.
//!
//! It is linked statically and is `/init` in the initramfs that `xtask/src/kernels` packs, beside `/tailback` (the agent)
//! and `/accuracy` (its measurements, from `tests/accuracy`).

mod checks;
mod clock;
mod control_groups;
mod machine;
#[path = "../../kernels/protocol.rs"]
mod protocol;

use std::{
    env, fs,
    path::Path,
    process,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result};

use control_groups::BUSY;
use protocol::{BYE, BYTES, CHECK, END, HELLO, TASK, sum};

fn main() -> ExitCode {
    if process::id() != 1 {
        let arguments: Vec<String> = env::args().skip(1).collect();
        if let [role, group] = arguments.as_slice()
            && role == BUSY
            && let Err(error) = control_groups::busy(Path::new(group))
        {
            println!("{error:#}");
            return ExitCode::FAILURE;
        }
        eprintln!(
            "kernel-init is the first process of a test kernel, which it powers off at its end: it must not run here"
        );
        return ExitCode::from(2);
    }
    println!(
        "\n{HELLO} {}",
        rustix::system::uname().release().to_string_lossy()
    );
    machine::prepare();
    match fs::read_to_string(format!("/{TASK}")) {
        Ok(task) => run(&task),
        Err(_) => check(),
    }
    println!("{BYE}");
    machine::power_off()
}

fn check() {
    for (name, check) in checks::all() {
        report(name, &check());
    }
    if let Err(error) = checks::accuracy() {
        println!("accuracy was not measured: {error:#}");
    }
}

fn report(name: &str, result: &Result<()>) {
    match result {
        Ok(()) => println!("{CHECK} ok {name}"),
        // On one line.
        Err(error) => println!(
            "{CHECK} failed {name}: {}",
            format!("{error:#}").replace('\n', "; ")
        ),
    }
}

/// Runs the task's command and writes its output as lines of hexadecimal digits.
fn run(task: &str) {
    let (bytes, status) = output(task).unwrap_or_else(|error| {
        println!("{error:#}");
        (Vec::new(), 127)
    });
    for line in bytes.chunks(64) {
        let digits: String = line.iter().map(|byte| format!("{byte:02x}")).collect();
        println!("{BYTES} {digits}");
    }
    println!("{END} {} {} {status}", bytes.len(), sum(&bytes));
}

fn output(task: &str) -> Result<(Vec<u8>, i32)> {
    let mut words = task.lines();
    let program = words.next().context("the task names no command")?;
    if program == "cat" {
        // The guest has only the agent and its measurements.
        let file = words.next().context("cat wants a file")?;
        return Ok((fs::read(file).with_context(|| format!("read {file}"))?, 0));
    }
    if program == "check" {
        let name = words.next().context("check wants the name of a check")?;
        let known = checks::all().find(|(known, _)| *known == name);
        let (name, check) = known.with_context(|| format!("no such check: {name:?}"))?;
        let result = check();
        report(name, &result);
        return Ok((Vec::new(), i32::from(result.is_err())));
    }
    let output = Command::new(program)
        .args(words)
        .stderr(process::Stdio::inherit())
        .output()
        .with_context(|| format!("start {program}"))?;
    Ok((output.stdout, output.status.code().unwrap_or(128)))
}
