//! What setup can do on this machine, and how it does it.

use std::{cell::Cell, fs};

use anyhow::{Context as _, Result};

use super::{Action, Method, debian, vmlinuz};
use crate::tools;

pub struct Machine {
    /// Whether this is Debian itself. Derivatives have other package versions, so there commands are only printed.
    pub debian: bool,
    root: bool,
    /// Only print what would be done.
    pub print: bool,
    /// Whether the package lists were updated in this run.
    lists_fresh: Cell<bool>,
}

impl Machine {
    pub fn detect(print: bool) -> Self {
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        Self {
            debian: release.lines().any(|line| line == "ID=debian"),
            root: rustix::process::geteuid().is_root(),
            print,
            lists_fresh: Cell::new(false),
        }
    }

    /// Whether every step of this method can run here.
    pub fn can(&self, method: &Method) -> bool {
        method.actions.iter().all(|action| match action {
            Action::Apt(_) => self.root && self.debian,
            Action::Run(cmd) => tools::program(cmd.program()).is_some(),
            Action::Write(..) => true,
            Action::Kernel(_) => {
                self.debian
                    && tools::program("apt-get").is_some()
                    && tools::program("dpkg-deb").is_some()
            }
        })
    }

    pub fn run(&self, action: &Action) -> Result<()> {
        let log = tools::cache().join("setup.log");
        match action {
            Action::Apt(packages) => {
                if !self.lists_fresh.get() {
                    debian::update(&log)?;
                    self.lists_fresh.set(true);
                }
                debian::install(packages, &log)
            }
            Action::Run(cmd) => cmd.run_logged(&log),
            Action::Write(file, line) => {
                fs::write(file, line).with_context(|| format!("write {}", file.display()))
            }
            Action::Kernel(kernel) => vmlinuz::fetch(kernel, &log),
        }
    }
}

impl Action {
    /// As a shell command line, or as an instruction.
    pub fn command_line(&self) -> String {
        match self {
            Self::Apt(packages) => {
                format!(
                    "sudo apt-get update && sudo apt-get install --no-install-recommends {}",
                    packages.join(" ")
                )
            }
            Self::Run(cmd) => cmd.to_string(),
            Self::Write(file, line) => format!("echo {line} > {}", file.display()),
            Self::Kernel(kernel) => vmlinuz::instructions(kernel),
        }
    }
}
