//! The kernel matrix: the agent, linked statically, on real kernels that an emulator boots.
//!
//! `initramfs` packs what a kernel finds when it comes up: the agent and the first process (`bin/kernel-init`),
//! which is told what to do by a file. `qemu` boots, and collects the console. `protocol` says what the first
//! process writes there, `transcript` reads it. `checks` are the tests of the matrix; the command here runs
//! anything else.

mod checks;
mod initramfs;
mod protocol;
mod qemu;
mod transcript;

use std::{
    fs,
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};

use crate::{
    cargo::{self, Link},
    command::last_lines,
    setup::{self, Purpose},
    tools,
};
pub use checks::run as run_checks;
use initramfs::Initramfs;
use protocol::TASK;

/// A boot takes a few seconds, or several times that where all CPUs are busy.
const LIMIT: Duration = Duration::from_secs(120);

/// The kernels that can be booted, oldest first.
pub const KERNELS: &[Kernel] = &[
    // The agent's iterators need helpers that came with 5.15.
    Kernel::new("5.10", "bullseye", Agent::NotYet),
    Kernel::new("6.1", "bookworm", Agent::Works),
    Kernel::new("6.12", "trixie", Agent::Works),
    Kernel::new("sid", "sid", Agent::Works),
];

/// A kernel of Debian's, made for virtual machines.
pub struct Kernel {
    pub name: &'static str,
    /// The suite whose newest kernel it is.
    pub suite: &'static str,
    agent: Agent,
}

/// Whether the agent supports a kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Agent {
    Works,
    /// The kernel can be booted for its own sake.
    NotYet,
}

impl Kernel {
    const fn new(name: &'static str, suite: &'static str, agent: Agent) -> Self {
        Self { name, suite, agent }
    }

    /// Whether it is one of `--kernels all`, and fetched by setup without being asked for.
    pub fn is_tested(&self) -> bool {
        self.agent == Agent::Works
    }

    pub fn folder(&self) -> PathBuf {
        tools::cache().join("kernels").join(self.name)
    }

    pub fn image(&self) -> PathBuf {
        self.folder().join("vmlinuz")
    }

    pub fn release_file(&self) -> PathBuf {
        self.folder().join("release")
    }

    /// Which kernel was fetched, as `uname -r` would say.
    pub fn release(&self) -> String {
        fs::read_to_string(self.release_file()).unwrap_or_else(|_| "unknown release".to_owned())
    }
}

/// The kernels of a list: `all`, `none`, or names separated by commas.
pub fn choose(list: &str) -> Result<Vec<&'static Kernel>> {
    match list {
        "all" => Ok(KERNELS.iter().filter(|kernel| kernel.is_tested()).collect()),
        "none" => Ok(Vec::new()),
        _ => list.split(',').map(by_name).collect(),
    }
}

fn by_name(name: &str) -> Result<&'static Kernel> {
    KERNELS
        .iter()
        .find(|kernel| kernel.name == name)
        .with_context(|| {
            let names: Vec<&str> = KERNELS.iter().map(|kernel| kernel.name).collect();
            format!(
                "there is no kernel `{name}` in the table, which has {}",
                names.join(", ")
            )
        })
}

#[derive(clap::Args)]
pub struct Args {
    /// One of the kernels that can be booted: 5.10, 6.1, 6.12, sid
    kernel: String,
    /// Write what the command printed to this file instead of standard output
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// The command: the agent is /tailback, and `cat FILE` is known; there is nothing else
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let kernel = by_name(&args.kernel)?;
    setup::ensure_with_kernels(Purpose::Boot, &[kernel])?;
    let printed = fetch(kernel, &args.command)?;
    match &args.out {
        Some(file) => {
            fs::write(file, printed).with_context(|| format!("write {}", file.display()))?;
        }
        None => io::stdout()
            .write_all(&printed)
            .context("write to standard output")?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs one command on a kernel, and returns what it wrote to standard output, byte for byte. Its standard error
/// goes to ours.
pub fn fetch(kernel: &Kernel, command: &[String]) -> Result<Vec<u8>> {
    let mut initramfs = guest()?;
    initramfs.file(TASK, 0o644, command.join("\n").as_bytes());
    let console = qemu::boot(kernel, &initramfs.finish()?, LIMIT)?;
    let what = || format!("run `{}` on kernel {}", command.join(" "), kernel.name);
    if let Some(fault) = &console.fault {
        return Err(anyhow!("{fault}:\n{}", last_lines(&console.text, 20))).with_context(what);
    }
    let output = transcript::output(&console.text).with_context(what)?;
    for line in &output.other {
        eprintln!("{line}");
    }
    if output.status != 0 {
        return Err(anyhow!("exit status {}", output.status)).with_context(what);
    }
    Ok(output.bytes)
}

/// An initramfs with the agent and the first process, built if need be.
fn guest() -> Result<Initramfs> {
    let mut initramfs = Initramfs::default();
    for (package, program, name) in [
        ("tailback", "tailback", "tailback"),
        ("xtask", "kernel-init", "init"),
    ] {
        let built = cargo::build(package, program, Link::Static)?;
        let content = fs::read(&built).with_context(|| format!("read {}", built.display()))?;
        initramfs.file(name, 0o755, &content);
    }
    Ok(initramfs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_chosen_by_name() -> Result<()> {
        let names = |list| {
            Ok::<_, anyhow::Error>(
                choose(list)?
                    .iter()
                    .map(|kernel| kernel.name)
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(names("all")?, ["6.1", "6.12", "sid"]);
        assert_eq!(names("6.12,6.1")?, ["6.12", "6.1"]);
        assert!(names("none")?.is_empty());
        let error = names("2.6")
            .expect_err("2.6 is not in the table")
            .to_string();
        assert_eq!(
            error,
            "there is no kernel `2.6` in the table, which has 5.10, 6.1, 6.12, sid"
        );
        Ok(())
    }
}
