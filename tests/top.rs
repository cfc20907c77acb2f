//! `tailback top` on a real terminal, with a real service, a running agent, and a recording.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use tailback_tests::{
    agent::{self, Agent},
    needs,
    process::{End, Process},
    pty::Pty,
    service::Service,
    temp::TempDir,
};

const SUBJECT: &str = env!("CARGO_BIN_EXE_tailback-subject");
/// A recorded incident: uWSGI waits for a session of PostgreSQL.
const RECORDING: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../agent/tests/incidents/flash-sale.tbk"
);
/// A name that would clear the screen.
const HOSTILE: &str = "evil\u{1b}[2J\u{202e}";

/// A service with a full listen queue, which it never accepts from.
fn jammed() -> Result<Service> {
    let mut command = Command::new(SUBJECT);
    command.env("OTEL_SERVICE_NAME", HOSTILE);
    let args = ["jam", "--listen", "127.0.0.1:0", "--waiting", "101"];
    Service::start(&mut command, &args)
}

fn top(args: &[&str], directory: &Path) -> Result<Command> {
    let mut command = Command::new(agent::binary()?);
    command
        .arg("top")
        .args(args)
        .env("RUNTIME_DIRECTORY", directory)
        .env("TERM", "xterm-256color")
        .env_remove("NO_COLOR");
    Ok(command)
}

/// Checks that the program has left the terminal as it was.
fn check_restored(pty: &mut Pty, code: Option<i32>) -> Result<()> {
    let end = pty.wait_end()?;
    ensure!(end == code, "exit code {end:?}:\n{}", pty.screen());
    ensure!(!pty.is_full_screen(), "still on the alternate screen");
    ensure!(!pty.is_cursor_hidden(), "the cursor is hidden");
    ensure!(pty.is_cooked()?, "the terminal is raw");
    Ok(())
}

#[test]
fn top_shows_a_jammed_service_from_own_samples_and_restores_the_terminal() -> Result<()> {
    const TEST: &str = "top_shows_a_jammed_service_from_own_samples_and_restores_the_terminal";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let (service, directory) = (jammed()?, TempDir::new("top")?);
    let pid = service.pid().to_string();
    let mut command = top(&["--pid", &pid], directory.path())?;
    let mut pty = Pty::start(&mut command, 80, 24)?;
    pty.wait("1 of 1 services not ok")?;
    ensure!(
        pty.is_full_screen() && !pty.is_cooked()?,
        "the terminal is not taken over"
    );
    pty.wait("root cause")?;
    for text in [
        "▶ FULL",
        "evil\\u{1b}[2",
        "own samples",
        "101",
        "no agent runs",
        "in the queue",
    ] {
        // A frame arrives in parts.
        pty.wait(text)?;
    }
    // Colours are ANSI sequences with these numbers.
    let is_coloured = |output: &[u8]| {
        let text = String::from_utf8_lossy(output);
        text.contains("\u{1b}[38;5;") || text.contains("\u{1b}[31m")
    };
    ensure!(is_coloured(pty.output()), "no colour");
    pty.write("\r")?;
    pty.wait("evidence")?;
    pty.write("?")?;
    pty.wait("select a service")?;
    pty.write("q")?;
    check_restored(&mut pty, Some(0))?;
    ensure!(
        !pty.output().windows(5).any(|bytes| bytes == b"evil\x1b"),
        "a name has escaped"
    );

    let mut command = top(&["--pid", &pid], directory.path())?;
    let mut pty = Pty::start(command.env("NO_COLOR", "1"), 80, 24)?;
    pty.wait("1 of 1 services not ok")?;
    ensure!(!is_coloured(pty.output()), "coloured in spite of NO_COLOR");
    pty.signal(Signal::TERM)?;
    check_restored(&mut pty, Some(0))
}

#[test]
fn top_shows_what_a_running_agent_knows_and_when_it_is_gone() -> Result<()> {
    const TEST: &str = "top_shows_what_a_running_agent_knows_and_when_it_is_gone";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let service = jammed()?;
    let agent = Agent::run(["--pid", &service.pid().to_string()])?;
    agent.wait_for("a cause", Duration::from_secs(30), |event| {
        event.is("cause")
    })?;
    let mut command = top(&[], agent.run_directory())?;
    let mut pty = Pty::start(&mut command, 80, 24)?;
    pty.wait("root cause")?;
    let origin = format!("agent {}", agent.process().pid());
    for text in ["▶ FULL", origin.as_str(), "nobody"] {
        pty.wait(text)?;
    }
    let screen = pty.screen();
    ensure!(!screen.contains("no agent runs"), "{screen}");
    agent.process().signal(Signal::KILL)?;
    pty.wait("no reply from the agent")?;
    // Ctrl-C, which a raw terminal passes on as a key.
    pty.write("\u{3}")?;
    check_restored(&mut pty, Some(0))
}

#[test]
fn top_plays_a_recording_on_a_terminal_and_as_plain_text() -> Result<()> {
    let directory = TempDir::new("top")?;
    let mut command = top(&["--replay", RECORDING], directory.path())?;
    let mut pty = Pty::start(&mut command, 80, 24)?;
    pty.wait("flash-sale.tbk 0:0")?;
    // 10 s forward, beyond the beginning of the incident.
    pty.write("\u{1b}[C")?;
    pty.wait("root cause")?;
    pty.wait("postgres")?;
    // Back to where all was well, and no further.
    pty.write("p")?;
    pty.wait("PAUSED")?;
    // The recording plays while this waits: on a busy machine it is further than three steps.
    pty.write(&"\u{1b}[D".repeat(12))?;
    pty.wait("flash-sale.tbk 0:00 of")?;
    pty.write("q")?;
    check_restored(&mut pty, Some(0))?;

    let mut command = top(&["--replay", RECORDING], directory.path())?;
    let dumb = Process::start("tailback top", command.env("TERM", "dumb"))?;
    ensure!(
        dumb.wait_end(Duration::from_secs(60))? == End::Code(0),
        "{:?}",
        dumb.ended()?
    );
    dumb.lines().wait_end(Duration::from_secs(5))?;
    let lines = dumb.lines().all();
    let has = |text: &str| lines.iter().any(|line| line.text.contains(text));
    ensure!(has("root cause") && has("postgres"), "{lines:?}");
    ensure!(!has("\u{1b}"), "escape sequences on a dumb terminal");
    Ok(())
}

#[test]
fn top_says_what_is_wrong_before_it_takes_over_the_terminal() -> Result<()> {
    let directory = TempDir::new("top")?;
    let broken = directory.path().join("broken.tbk");
    fs::write(&broken, "no recording")?;
    let broken = broken.to_string_lossy();
    for (args, text) in [
        (&["--replay", &broken][..], "cannot replay"),
        (&["--replay", "/nonexistent"], "cannot replay /nonexistent"),
        (
            &["--replay", RECORDING, "--pid", "1"],
            "cannot be used with",
        ),
        (&["--replay", RECORDING, "--log", "debug"], "2> top.log"),
        (&["--pid", "1", "--log-bpf"], "2> top.log"),
    ] {
        let mut pty = Pty::start(&mut top(args, directory.path())?, 80, 24)?;
        check_restored(&mut pty, Some(2))?;
        let screen = pty.screen();
        ensure!(screen.contains(text), "no {text:?} in {screen}");
        let output = String::from_utf8_lossy(pty.output());
        ensure!(
            !output.contains("\u{1b}[?1049h"),
            "it took over the terminal"
        );
    }
    Ok(())
}

/// The first signal asks for a stop, which the program notices after its current step. The second one ends it at once.
#[test]
fn a_second_signal_ends_top_at_once_and_restores_the_terminal() -> Result<()> {
    let directory = TempDir::new("top")?;
    // Which of the two ways the program takes is a race: several times.
    let mut codes = Vec::new();
    for _ in 0..5 {
        let mut command = top(&["--replay", RECORDING], directory.path())?;
        let mut pty = Pty::start(&mut command, 80, 24)?;
        pty.wait("flash-sale.tbk 0:0")?;
        // Both arrive while it is stopped, so before it can notice the first one.
        for signal in [Signal::STOP, Signal::TERM, Signal::INT, Signal::CONT] {
            pty.signal(signal)?;
        }
        let code = pty.wait_end()?;
        ensure!(
            matches!(code, Some(0 | 130 | 143)),
            "exit code {code:?}:\n{}",
            pty.screen()
        );
        check_restored(&mut pty, code)?;
        codes.push(code);
    }
    println!("{codes:?}");
    Ok(())
}
