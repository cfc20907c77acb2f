//! What a user, a kernel, a disk or a stranger can get wrong: each case with its exit code, the words that say what
//! is wrong and how to mend it, and never a panic.

mod names;
mod privileges;
mod recordings;
mod settings;
mod signals;
mod streams;
mod targets;

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tailback_tests::{
    agent::{self, Agent},
    lines::Stream,
    needs,
    process::{End, Process},
    program,
    skip::skip,
};

/// For what should take a second or two.
const SOON: Duration = Duration::from_secs(30);

/// How the agent ended, and what it said.
struct Ran {
    end: End,
    out: Vec<String>,
    err: Vec<String>,
}

impl Ran {
    /// Everything that it said, for people.
    fn words(&self) -> String {
        [self.out.join("\n"), self.err.join("\n")].concat()
    }

    /// It ended with this code, and its standard error has these words.
    fn said(&self, code: i32, words: &[&str]) -> Result<()> {
        let err = self.err.join("\n");
        ensure!(
            self.end == End::Code(code),
            "it ended with {:?}, not {code}: {}",
            self.end,
            self.words()
        );
        for word in words {
            ensure!(err.contains(word), "{word:?} is not said: {err}");
        }
        Ok(())
    }
}

fn tailback(args: &[&str]) -> Result<Command> {
    let mut command = Command::new(agent::binary()?);
    command.args(args);
    Ok(command)
}

/// Waits for the end, and checks what must hold however it ended.
fn end(process: &Process) -> Result<Ran> {
    let end = process.wait_end(SOON)?;
    // The process may end before its last line is read.
    let lines = process.lines();
    let _ = lines.wait("the end of the output", usize::MAX, SOON, |_| None::<()>);
    let of = |stream| {
        let lines = lines.all().into_iter().filter(|line| line.stream == stream);
        lines.map(|line| line.text).collect()
    };
    let ran = Ran {
        end,
        out: of(Stream::Stdout),
        err: of(Stream::Stderr),
    };
    ensure!(!ran.words().contains("panicked"), "{}", ran.words());
    Ok(ran)
}

fn run(command: &mut Command) -> Result<Ran> {
    end(&Process::start("tailback", command)?)
}

fn ran(args: &[&str]) -> Result<Ran> {
    run(&mut tailback(args)?)
}

/// Whether the agent can watch anything here; if not, `test` is reported as skipped.
fn allowed(test: &str) -> bool {
    needs::met(test, &["sh", "sleep", "unshare"])
}

/// Runs a script of the shell, in which `$0` is the agent, with mounts of its own. Its `nothing_mounted` says that
/// there can be none here: then `test` is reported as skipped.
fn with_own_mounts(test: &str, script: &str, args: &[&str]) -> Result<Option<Ran>> {
    const NOTHING_MOUNTED: i32 = 99;
    let script = format!("nothing_mounted() {{ exit {NOTHING_MOUNTED}; }}\n{script}");
    let mut command = Command::new(program::need(&["unshare"])?);
    command
        .args(["--mount", "sh", "-c", &script])
        .arg(agent::binary()?);
    let ran = run(command.args(args))?;
    if ran.end == End::Code(NOTHING_MOUNTED) {
        let said = ran.words();
        skip(test, &format!("nothing can be mounted here: {said}"));
        return Ok(None);
    }
    Ok(Some(ran))
}

/// A process that does nothing: somebody to watch.
fn idle() -> Result<Process> {
    Process::start("sleep", Command::new("sleep").arg("1000"))
}

/// A process that never reads its standard input, a pipe that is full.
struct Stuck {
    _shell: Process,
    pid: String,
}

impl Stuck {
    fn new() -> Result<Self> {
        let script = r#"yes | sh -c 'echo pid $$; exec sleep 1000'"#;
        let shell = Process::start("sh", Command::new("sh").args(["-c", script]))?;
        let line = shell.wait_line("pid ", SOON)?;
        let pid = line.text.trim_start_matches("pid ").to_owned();
        Ok(Self { _shell: shell, pid })
    }

    /// An agent that has seen the pipe fill up.
    fn watched(&self, more: &[&str]) -> Result<Agent> {
        let agent = Agent::run(["--pid", &self.pid].iter().chain(more))?;
        agent.wait_for("that the pipe is full", SOON, |event| {
            event.is("level") && event.text("kind") == "pipe"
        })?;
        Ok(agent)
    }
}

fn json(lines: &[String]) -> Result<Vec<Value>> {
    let parse = |line: &String| serde_json::from_str(line).with_context(|| format!("read {line}"));
    lines.iter().map(parse).collect()
}
