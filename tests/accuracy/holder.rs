//! Another process that holds something open, and does nothing with it.

use std::{
    env, fs,
    os::fd::OwnedFd,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result};
use rustix::process::{Signal, set_parent_process_death_signal};
use tailback_tests::temp::TempDir;

pub const FLAG: &str = "--hold";

/// Ended on drop.
pub struct Holder {
    child: Child,
    _folder: TempDir,
}

impl Holder {
    /// The file is its standard input. It executes a copy of this program: the agent takes a process's children for
    /// its workers where they execute the same file.
    pub fn of(file: OwnedFd) -> Result<Self> {
        let folder = TempDir::new("holder")?;
        let copy = folder.path().join("holder");
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
            _folder: folder,
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

/// What the other process does.
pub fn hold() -> Result<bool> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("ask to end with the parent")?;
    loop {
        std::thread::park();
    }
}
