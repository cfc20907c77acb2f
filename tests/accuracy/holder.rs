//! A child process that holds a file descriptor open and does nothing with it.

use std::{
    env, fs,
    os::fd::OwnedFd,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result};
use rustix::process::{Signal, set_parent_process_death_signal};
use tailback_tests::temp::TempDir;

/// Makes this program act as the holder.
pub const FLAG: &str = "--hold";

/// Killed on drop.
pub struct Holder {
    child: Child,
    _directory: TempDir,
}

impl Holder {
    /// Passes the file as standard input. Runs a copy of this program, because the agent takes children with the same
    /// executable for workers.
    pub fn of(file: OwnedFd) -> Result<Self> {
        let directory = TempDir::new("holder")?;
        let copy = directory.path().join("holder");
        let own = env::current_exe().context("find this program")?;
        fs::copy(&own, &copy).with_context(|| format!("copy {}", own.display()))?;
        let child = Command::new(&copy)
            .arg(FLAG)
            .stdin(Stdio::from(file))
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("start {}", copy.display()))?;
        Ok(Self {
            child,
            _directory: directory,
        })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Main function of the holder process.
pub fn hold() -> Result<bool> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("set the parent death signal")?;
    loop {
        std::thread::park();
    }
}
