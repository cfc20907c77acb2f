//! Processes with hostile names.

use std::process::Command;

use anyhow::{Result, ensure};
use tailback_tests::{process::Process, program, temp::TempDir};

use crate::{DEADLINE, allowed, json, run};

/// A name with characters that can corrupt a terminal or a line of JSON.
const HOSTILE: &str = "evil\n\u{1b}[31mred\"\\\t\u{202e}\u{7f}";

/// Checks that no line contains control or bidirectional characters.
fn check_harmless(lines: &[String]) -> Result<()> {
    for line in lines {
        let is_harmful = |c: char| c.is_control() || "\u{200e}\u{200f}\u{202a}\u{202e}".contains(c);
        ensure!(!line.chars().any(is_harmful), "{line:?}");
    }
    Ok(())
}

#[test]
fn names_with_newlines_and_escapes_corrupt_neither_terminal_nor_json() -> Result<()> {
    if !allowed("names_with_newlines_and_escapes_corrupt_neither_terminal_nor_json") {
        return Ok(());
    }
    let directory = TempDir::new("names")?;
    let evil = directory.path().join(HOSTILE);
    program::copy(&program::need(&["sleep"])?, &evil)?;
    let by_file = Process::start("evil", Command::new(&evil).arg("1000"))?;
    // A process can name itself in two ways: comm and OTEL_SERVICE_NAME.
    let script =
        r#"printf 'a\nb\033[2J' > /proc/$$/comm; echo named; while :; do sleep 1000; done"#;
    let mut shell = Command::new("sh");
    shell.args(["-c", script]).env("OTEL_SERVICE_NAME", HOSTILE);
    let by_itself = Process::start("sh", &mut shell)?;
    by_itself.wait_line("named", DEADLINE)?;
    let toml = format!(
        "[[target]]\npid = {}\n[[target]]\npid = {}\nservice_name = \"\\u001b[2Jcalled\\n\"\n",
        by_file.pid(),
        by_itself.pid()
    );
    let config = directory.write("tailback.toml", &toml)?;
    let config = config.to_string_lossy();
    let pids = [by_file.pid(), by_itself.pid()].map(|pid| pid.to_string());
    let by_pid = ["--pid", &pids[0], "--pid", &pids[1]];
    let by_config = ["--config", &config];
    let missing = ["--name", "no\nsuch\u{1b}[2J\u{202e}"];
    for (targets, shown) in [
        (&by_pid[..], "evil\\n"),
        (&by_config, "called\\n"),
        (&missing, "no\\nsuch"),
    ] {
        for args in [&["sample", "-v"][..], &["run", "-v", "--duration", "2s"]] {
            let human = run(&[args, targets].concat())?;
            check_harmless(&human.out)?;
            check_harmless(&human.err)?;
            let text = human.text();
            ensure!(text.contains(shown), "{text}");
            let machine = run(&[args, targets, &["--json"]].concat())?;
            check_harmless(&machine.out)?;
            for line in json(&machine.out)? {
                ensure!(line["type"].is_string(), "{line}");
            }
        }
    }
    Ok(())
}
