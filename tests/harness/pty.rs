//! A program on a pseudo-terminal, and an emulator of a terminal that shows its screen.

use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::{fs::OpenOptionsExt as _, process::CommandExt as _},
    },
    process::{Child, Command},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, Signal, kill_process},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize},
};

use crate::cleanup;

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(30);

/// A running program, killed on drop.
pub struct Pty {
    child: Child,
    pid: Pid,
    terminal: File,
    /// Kept open, so that reading does not fail when the program ends.
    _other_end: File,
    screen: vt100::Parser,
    output: Vec<u8>,
}

impl Pty {
    /// Starts a program on a terminal of this size.
    pub fn start(command: &mut Command, columns: u16, rows: u16) -> Result<Self> {
        let terminal: OwnedFd = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        grantpt(&terminal)?;
        unlockpt(&terminal)?;
        let name = ptsname(&terminal, Vec::new())?.into_string()?;
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&terminal, size)?;
        let open = || {
            // Never the controlling terminal of the tests: they would get SIGHUP when it is closed.
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NOCTTY)
                .open(&name);
            file.with_context(|| format!("open {name}"))
        };
        command
            .process_group(0)
            .stdin(open()?)
            .stdout(open()?)
            .stderr(open()?);
        let (child, pid) = cleanup::start_group(|| {
            let child = command.spawn()?;
            let pid = Pid::from_child(&child);
            Ok(((child, pid), pid))
        })
        .with_context(|| format!("start {}", command.get_program().display()))?;
        Ok(Self {
            child,
            pid,
            terminal: terminal.into(),
            _other_end: open()?,
            screen: vt100::Parser::new(rows, columns, 0),
            output: Vec::new(),
        })
    }

    /// Types a text.
    pub fn write(&mut self, text: &str) -> Result<()> {
        self.terminal.write_all(text.as_bytes())?;
        Ok(())
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(self.pid, signal)?)
    }

    /// What the screen shows.
    pub fn screen(&self) -> String {
        self.screen.screen().contents()
    }

    /// Everything that was written to the terminal.
    pub fn output(&self) -> &[u8] {
        &self.output
    }

    /// Whether the program has the alternate screen, which full-screen programs use.
    pub fn is_full_screen(&self) -> bool {
        self.screen.screen().alternate_screen()
    }

    pub fn is_cursor_hidden(&self) -> bool {
        self.screen.screen().hide_cursor()
    }

    /// Whether the terminal edits lines and echoes them, as a shell needs it.
    pub fn is_cooked(&self) -> Result<bool> {
        let modes = tcgetattr(&self.terminal)?.local_modes;
        Ok(modes.contains(LocalModes::ICANON | LocalModes::ECHO))
    }

    /// Reads a part of what is there; waits for it at most this long. Returns whether there was anything.
    fn read(&mut self, wait: Duration) -> Result<bool> {
        let mut poll_fd = [PollFd::new(&self.terminal, PollFlags::IN)];
        if poll(&mut poll_fd, Some(&Timespec::try_from(wait)?))? > 0 {
            let mut buffer = [0; 65_536];
            let count = self.terminal.read(&mut buffer)?;
            self.screen.process(&buffer[..count]);
            self.output.extend(&buffer[..count]);
            return Ok(count > 0);
        }
        Ok(false)
    }

    /// Waits until the screen shows this text.
    pub fn wait(&mut self, text: &str) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        while !self.screen().contains(text) {
            ensure!(
                Instant::now() < deadline,
                "the screen does not show {text:?}, but\n{}",
                self.screen()
            );
            if let Some(status) = self.child.try_wait()? {
                while self.read(Duration::from_millis(200))? {}
                ensure!(
                    self.screen().contains(text),
                    "ended with {status}:\n{}",
                    self.screen()
                );
            }
            self.read(Duration::from_millis(100))?;
        }
        Ok(())
    }

    /// Waits for the end; returns the exit code.
    pub fn wait_end(&mut self) -> Result<Option<i32>> {
        let deadline = Instant::now() + DEADLINE;
        while Instant::now() < deadline {
            self.read(Duration::from_millis(50))?;
            if let Some(status) = self.child.try_wait()? {
                while self.read(Duration::from_millis(200))? {}
                return Ok(status.code());
            }
        }
        bail!("it does not end; the screen is\n{}", self.screen())
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        cleanup::end_group(self.pid);
        let _ = self.child.wait();
        cleanup::reap_group(self.pid);
    }
}
