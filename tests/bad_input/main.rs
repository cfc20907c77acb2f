//! Invalid input from users, kernels, disks and other processes. Each case checks the exit code and an error message that
//! says what is wrong and how to fix it. The agent never panics.

mod memory;
mod names;
mod privileges;
mod recordings;
mod settings;
mod signals;
mod streams;
mod targets;

use std::{cell::RefCell, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tailback_tests::{
    agent::{self, Agent},
    lines::Stream,
    needs,
    process::{End, Process},
    program,
    skip::skip,
    temp::TempDir,
};

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(60);

/// Exit status and output lines of the agent.
struct Output {
    end: End,
    out: Vec<String>,
    err: Vec<String>,
}

impl Output {
    /// Standard output and standard error as one text.
    fn text(&self) -> String {
        [self.out.join("\n"), self.err.join("\n")].concat()
    }

    /// Checks the exit code, and that standard error contains these words.
    fn check(&self, code: i32, words: &[&str]) -> Result<()> {
        let err = self.err.join("\n");
        ensure!(
            self.end == End::Code(code),
            "exit with {:?}, not {code}: {}",
            self.end,
            self.text()
        );
        for word in words {
            ensure!(err.contains(word), "{word:?} is missing: {err}");
        }
        Ok(())
    }
}

fn tailback(args: &[&str]) -> Result<Command> {
    thread_local! {
        /// Removed at the end of the test.
        static RUN: RefCell<Vec<TempDir>> = const { RefCell::new(Vec::new()) };
    }
    // Only one agent may use a directory, and tests beside this one run agents, too.
    let run = TempDir::new("run")?;
    let mut command = Command::new(agent::binary()?);
    command.env("RUNTIME_DIRECTORY", run.path()).args(args);
    RUN.with_borrow_mut(|all| all.push(run));
    Ok(command)
}

/// Waits for the exit, and checks that the agent did not panic.
fn end(process: &Process) -> Result<Output> {
    let end = process.wait_end(DEADLINE)?;
    // The process may end before its last line is read.
    let lines = process.lines();
    let _ = lines.wait(
        "the end of the output",
        usize::MAX,
        DEADLINE,
        |_| None::<()>,
    );
    let of = |stream| {
        let lines = lines.all().into_iter().filter(|line| line.stream == stream);
        lines.map(|line| line.text).collect()
    };
    let output = Output {
        end,
        out: of(Stream::Stdout),
        err: of(Stream::Stderr),
    };
    ensure!(!output.text().contains("panicked"), "{}", output.text());
    Ok(output)
}

fn run_command(command: &mut Command) -> Result<Output> {
    end(&Process::start("tailback", command)?)
}

fn run(args: &[&str]) -> Result<Output> {
    run_command(&mut tailback(args)?)
}

/// Whether the agent can run here. If not, `test` is reported as skipped.
fn allowed(test: &str) -> bool {
    needs::met(test, &["sh", "sleep", "unshare"])
}

/// Runs a shell script in its own mount namespace, with the agent as `$0`. The script calls `nothing_mounted` if it cannot
/// mount; then `test` is reported as skipped.
fn with_own_mounts(test: &str, script: &str, args: &[&str]) -> Result<Option<Output>> {
    const NOTHING_MOUNTED: i32 = 99;
    let script = format!("nothing_mounted() {{ exit {NOTHING_MOUNTED}; }}\n{script}");
    let mut command = Command::new(program::need(&["unshare"])?);
    command
        .args(["--mount", "sh", "-c", &script])
        .arg(agent::binary()?);
    let output = run_command(command.args(args))?;
    if output.end == End::Code(NOTHING_MOUNTED) {
        let error = output.text();
        skip(test, &format!("cannot mount here: {error}"));
        return Ok(None);
    }
    Ok(Some(output))
}

/// An idle process to monitor.
fn idle() -> Result<Process> {
    Process::start("sleep", Command::new("sleep").arg("1000"))
}

/// A process that never reads its standard input, so that the pipe is full.
struct Stuck {
    _shell: Process,
    pid: String,
}

impl Stuck {
    fn new() -> Result<Self> {
        let script = r#"yes | sh -c 'echo pid $$; exec sleep 1000'"#;
        let shell = Process::start("sh", Command::new("sh").args(["-c", script]))?;
        let line = shell.wait_line("pid ", DEADLINE)?;
        let pid = line.text.trim_start_matches("pid ").to_owned();
        Ok(Self { _shell: shell, pid })
    }

    /// Starts an agent and waits until it reports the full pipe.
    fn watched(&self, more: &[&str]) -> Result<Agent> {
        let agent = Agent::run(["--pid", &self.pid].iter().chain(more))?;
        agent.wait_for("the full pipe", DEADLINE, |event| {
            event.is("level") && event.text("kind") == "pipe"
        })?;
        Ok(agent)
    }
}

fn json(lines: &[String]) -> Result<Vec<Value>> {
    let parse = |line: &String| serde_json::from_str(line).with_context(|| format!("read {line}"));
    lines.iter().map(parse).collect()
}
