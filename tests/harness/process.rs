//! Child processes. Each leads its own process group, which is killed when its owner is dropped.

use std::{
    fs,
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    io::Errno,
    process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid},
};

use crate::{
    cleanup,
    http::{self, Response},
    lines::{Line, Lines, Stream},
    wait,
};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Code(i32),
    Signal(i32),
}

/// A child process, killed with its whole group on drop.
pub struct Process {
    name: String,
    child: Child,
    pid: Pid,
    lines: Lines,
}

impl Process {
    /// Starts it without input and captures its output.
    pub fn start(name: &str, command: &mut Command) -> Result<Self> {
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let (child, pid) = cleanup::start_group(|| {
            let child = command.spawn()?;
            let pid = Pid::from_child(&child);
            Ok(((child, pid), pid))
        })
        .with_context(|| format!("start {name} ({})", command.get_program().display()))?;
        let mut process = Self {
            name: name.to_owned(),
            child,
            pid,
            lines: Lines::default(),
        };
        if let Some(stdout) = process.child.stdout.take() {
            process.lines.listen(Stream::Stdout, stdout)?;
        }
        if let Some(stderr) = process.child.stderr.take() {
            process.lines.listen(Stream::Stderr, stderr)?;
        }
        Ok(process)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Output of the process and its children, from both streams.
    pub fn lines(&self) -> &Lines {
        &self.lines
    }

    /// Waits for the first line that contains `text`, including past lines.
    pub fn wait_line(&self, text: &str, deadline: Duration) -> Result<Line> {
        let what = format!("{} to print {text:?}", self.name);
        self.lines.wait(&what, 0, deadline, |line| {
            line.text.contains(text).then(|| line.clone())
        })
    }

    /// Waits until it responds to a request for `/`.
    pub fn wait_response(&self, at: SocketAddr, deadline: Duration) -> Result<Response> {
        wait::until(&format!("a response from {}", self.name), deadline, || {
            self.check_running()?;
            Ok(http::get(at, "/", deadline).ok())
        })
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid, signal).with_context(|| format!("signal {}", self.name))
    }

    /// Signals the process and all children in its group.
    pub fn signal_group(&self, signal: Signal) -> Result<()> {
        kill_process_group(self.pid, signal)
            .with_context(|| format!("signal {} and its children", self.name))
    }

    /// Sends SIGSTOP and waits until all threads are stopped.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)?;
        let what = format!("{} to stop", self.name);
        wait::until(&what, Duration::from_secs(10), || {
            Ok(is_stopped(self.pid())?.then_some(()))
        })
    }

    /// Like [`Process::freeze`], for all processes in its group. Resume them with [`Process::signal_group`].
    pub fn freeze_group(&self) -> Result<()> {
        self.signal_group(Signal::STOP)?;
        let what = format!("{} and its children to stop", self.name);
        wait::until(&what, Duration::from_secs(10), || {
            for pid in self.group()? {
                // A process that has exited counts as stopped.
                if !is_stopped(pid).unwrap_or(true) {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
    }

    /// The processes in its group.
    fn group(&self) -> Result<Vec<u32>> {
        let mut group = Vec::new();
        for entry in fs::read_dir("/proc").context("read /proc")? {
            let Some(pid) = entry?
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // PID (NAME) STATE PARENT GROUP
            let leader = state(&text).split(' ').nth(2);
            if leader == Some(&self.pid().to_string()) {
                group.push(pid);
            }
        }
        Ok(group)
    }

    /// Resumes it with SIGCONT.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// How it ended, if it has. It is reaped only on drop, so that its pid is not reused before then.
    pub fn ended(&self) -> Result<Option<End>> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let status = match waitid(WaitId::Pid(self.pid), options) {
            Err(Errno::INTR) => None,
            other => other.with_context(|| format!("wait for {}", self.name))?,
        };
        Ok(status.and_then(|status| {
            let code = status.exit_status().map(End::Code);
            code.or_else(|| status.terminating_signal().map(End::Signal))
        }))
    }

    /// Waits for it to end.
    pub fn wait_end(&self, deadline: Duration) -> Result<End> {
        wait::until(&format!("the end of {}", self.name), deadline, || {
            self.ended()
        })
    }

    /// Fails with its last lines if it has ended.
    pub fn check_running(&self) -> Result<()> {
        if let Some(end) = self.ended()? {
            let lines = self.lines.all();
            let last: Vec<&str> = lines[lines.len().saturating_sub(10)..]
                .iter()
                .map(|line| line.text.as_str())
                .collect();
            bail!(
                "{} ended with {end:?}:\n    {}",
                self.name,
                last.join("\n    ")
            );
        }
        Ok(())
    }

    /// Sends SIGTERM and waits for the end.
    pub fn stop(self, deadline: Duration) -> Result<End> {
        self.signal(Signal::TERM)?;
        self.wait_end(deadline)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        cleanup::end_group(self.pid);
        let _ = self.child.wait();
        cleanup::reap_group(self.pid);
    }
}

/// The fields after the name in a `stat` file; the name may contain any characters.
fn state(stat: &str) -> &str {
    stat.rsplit(") ").next().unwrap_or_default()
}

/// The child processes of a process, oldest first.
pub fn children_of(pid: u32) -> Result<Vec<u32>> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let children = text.split_whitespace().map(str::parse);
    children
        .collect::<Result<_, _>>()
        .with_context(|| format!("parse {path}"))
}

/// Whether all threads of a process are stopped.
fn is_stopped(pid: u32) -> Result<bool> {
    let directory = format!("/proc/{pid}/task");
    for thread in fs::read_dir(&directory).with_context(|| format!("read {directory}"))? {
        let Ok(text) = fs::read_to_string(thread?.path().join("stat")) else {
            // It has ended.
            continue;
        };
        if !state(&text).starts_with('T') {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// Deadline of each wait.
    const DEADLINE: Duration = Duration::from_secs(10);

    fn shell(script: &str) -> Process {
        Process::start("sh", Command::new("sh").args(["-c", script])).unwrap()
    }

    #[test]
    fn grandchildren_end_with_their_process() {
        let process = shell("sleep 1000 & echo $!; wait");
        let line = process
            .lines()
            .wait("a pid", 0, DEADLINE, |line| line.text.parse::<u32>().ok());
        let grandchild = line.unwrap();
        drop(process);
        assert!(!fs::exists(format!("/proc/{grandchild}")).unwrap());
    }

    #[test]
    fn the_exit_status_can_be_read_repeatedly() {
        let process = shell("exit 3");
        assert_eq!(process.wait_end(DEADLINE).unwrap(), End::Code(3));
        assert_eq!(process.ended().unwrap(), Some(End::Code(3)));
        assert_eq!(shell("sleep 1000").stop(DEADLINE).unwrap(), End::Signal(15));
    }

    #[test]
    fn a_frozen_process_stops_until_it_is_thawed() {
        let process = shell("while true; do echo still here; sleep 0.01; done");
        process.freeze().unwrap();
        let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap();
        assert!(stat.contains(") T "), "{stat}");
        let mark = process.lines().count();
        process.thaw().unwrap();
        let lines = process.lines();
        lines
            .wait("output after resuming", mark, DEADLINE, |_| Some(()))
            .unwrap();
    }

    #[test]
    fn lines_of_both_streams_have_their_arrival_time() {
        let before = Instant::now();
        let process = shell("echo out; echo err >&2");
        let out = process.wait_line("out", DEADLINE).unwrap();
        let err = process.wait_line("err", DEADLINE).unwrap();
        assert_eq!((out.stream, err.stream), (Stream::Stdout, Stream::Stderr));
        assert!(before < out.at && out.at <= Instant::now());
    }
}
