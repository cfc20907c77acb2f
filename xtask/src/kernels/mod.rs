//! The kernel matrix: the statically linked agent on real kernels, booted by an emulator.
//!
//! `initramfs` packs the agent, the programs that measure it (`tests/accuracy`), a few kernel modules, and the first
//! process (`bin/kernel-init`), which takes its instructions from a file. `qemu` boots and collects the console.
//! `protocol` defines what the first process writes there, `transcript` reads it. `checks` are the tests of the matrix; the
//! command here runs anything else.

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

use anyhow::{Context as _, Result, bail, ensure};
use tailback_tests::accuracy::Finding;

use crate::{
    accuracy::Programs,
    architecture::Architecture,
    cargo,
    command::last_lines,
    setup::{self, Purpose},
    test::{self, Tally},
    tools,
};
pub use checks::{obstacle, run as run_checks};
use initramfs::Initramfs;
pub use protocol::MODULES;
use protocol::{TASK, module_file};

/// Time limit of one guest. A boot takes seconds and all measurements some minutes, several times that on a busy machine.
const LIMIT: Duration = Duration::from_secs(900);

/// The kernels of the matrix, oldest first.
pub const KERNELS: &[Kernel] = &[
    Kernel::new("5.10", "bullseye"),
    Kernel::new("6.1", "bookworm"),
    Kernel::new("6.12", "trixie"),
    Kernel::new("sid", "sid"),
];

/// Kernels that are booted only if they are named. The programs for them are cross-built.
pub const OTHERS: &[Kernel] = &[Kernel {
    architecture: Architecture::Aarch64,
    ..Kernel::new("6.12-arm64", "trixie")
}];

/// All kernels that have a name.
pub fn known() -> impl Iterator<Item = &'static Kernel> {
    KERNELS.iter().chain(OTHERS)
}

/// One of Debian's kernels for virtual machines.
pub struct Kernel {
    pub name: &'static str,
    /// The Debian suite whose newest kernel it is.
    pub suite: &'static str,
    pub architecture: Architecture,
    /// What the agent cannot report there, by row of the accuracy table (`lock.holder`), and why.
    pub absent: &'static [(&'static str, &'static str)],
}

impl Kernel {
    const fn new(name: &'static str, suite: &'static str) -> Self {
        Self {
            name,
            suite,
            architecture: Architecture::X86_64,
            absent: &[],
        }
    }

    pub fn directory(&self) -> PathBuf {
        tools::cache().join("kernels").join(self.name)
    }

    pub fn image(&self) -> PathBuf {
        self.directory().join("vmlinuz")
    }

    /// Directory of those of [`MODULES`] that this kernel builds as modules.
    pub fn modules(&self) -> PathBuf {
        self.directory().join("modules")
    }

    pub fn release_file(&self) -> PathBuf {
        self.directory().join("release")
    }

    /// The release of the fetched kernel, as `uname -r` prints it.
    pub fn release(&self) -> String {
        fs::read_to_string(self.release_file()).unwrap_or_else(|_| "unknown release".to_owned())
    }
}

/// `6.12` of `6.12.107+deb13-cloud-amd64`.
pub fn version(release: &str) -> String {
    let numbers: Vec<&str> = release
        .split(|c: char| !c.is_ascii_digit())
        .take(2)
        .collect();
    numbers.join(".")
}

/// The kernels of a list: `all` of the matrix, `none`, or names separated by commas.
pub fn choose(list: &str) -> Result<Vec<&'static Kernel>> {
    match list {
        "all" => Ok(KERNELS.iter().collect()),
        "none" => Ok(Vec::new()),
        _ => list.split(',').map(by_name).collect(),
    }
}

fn by_name(name: &str) -> Result<&'static Kernel> {
    known().find(|kernel| kernel.name == name).with_context(|| {
        let names: Vec<&str> = known().map(|kernel| kernel.name).collect();
        format!(
            "no such kernel: `{name}`; the table has {}",
            names.join(", ")
        )
    })
}

#[derive(clap::Args)]
pub struct Args {
    /// One of the kernels that can be booted: 5.10, 6.1, 6.12, sid, 6.12-arm64
    kernel: String,
    /// Write what the command printed to this file instead of standard output
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// The command: /tailback (the agent), /accuracy (its measurements), `cat FILE`, or `check NAME` (one of the matrix's
    /// own checks); the guest has no other programs [default: all checks and measurements, as `test` runs them]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let kernel = by_name(&args.kernel)?;
    setup::ensure_with_kernels(Purpose::Boot, &[kernel])?;
    if args.command.is_empty() {
        let mut tally = Tally::default();
        checks::run_alone(kernel, &mut tally);
        return Ok(test::end(&tally));
    }
    let output = run(kernel, &args.command)?;
    match &args.out {
        Some(file) => {
            fs::write(file, &output.bytes).with_context(|| format!("write {}", file.display()))?;
        }
        None => io::stdout()
            .write_all(&output.bytes)
            .context("write to standard output")?,
    }
    // The exit code of the command in the guest.
    Ok(ExitCode::from(
        u8::try_from(output.status).unwrap_or(u8::MAX),
    ))
}

/// Runs one command on a kernel, and returns what it wrote to standard output, byte for byte.
pub fn fetch(kernel: &Kernel, command: &[String]) -> Result<Vec<u8>> {
    let output = run(kernel, command)?;
    ensure!(
        output.status == 0,
        "`{}` on kernel {} ended with {}",
        command.join(" "),
        kernel.name,
        output.status
    );
    Ok(output.bytes)
}

/// Like [`fetch`], but accepts any exit code. Forwards standard error.
fn run(kernel: &Kernel, command: &[String]) -> Result<transcript::Output> {
    let what = || format!("run `{}` on kernel {}", command.join(" "), kernel.name);
    let programs = GuestPrograms::build(kernel.architecture)?;
    let output = task(kernel, &programs, command).with_context(what)?;
    for line in &output.other {
        eprintln!("{line}");
    }
    Ok(output)
}

/// Measures these kinds of queues on a kernel, or all.
pub fn measure(
    kernel: &Kernel,
    programs: &GuestPrograms,
    kinds: &[String],
) -> Result<Vec<Finding>> {
    let mut command = vec!["/accuracy".to_owned()];
    command.extend_from_slice(kinds);
    let what = || format!("measure on kernel {}", kernel.name);
    let output = task(kernel, programs, &command).with_context(what)?;
    let text = String::from_utf8_lossy(&output.bytes);
    Ok(text.lines().filter_map(Finding::from_json).collect())
}

fn task(
    kernel: &Kernel,
    programs: &GuestPrograms,
    command: &[String],
) -> Result<transcript::Output> {
    let mut initramfs = programs.initramfs()?;
    add_modules(&mut initramfs, kernel)?;
    initramfs.file(TASK, 0o644, command.join("\n").as_bytes());
    let console = qemu::boot(kernel, &initramfs.finish()?, LIMIT)?;
    if let Some(fault) = &console.fault {
        bail!("{fault}:\n{}", last_lines(&console.text, 20));
    }
    transcript::output(&console.text)
}

/// The programs of a guest, linked statically: there is no library to load.
pub struct GuestPrograms {
    pub measured: Programs,
    pub init: PathBuf,
}

impl GuestPrograms {
    pub fn build(architecture: Architecture) -> Result<Self> {
        let programs = [cargo::AGENT, cargo::ACCURACY, cargo::KERNEL_INIT];
        let [agent, accuracy, init] = cargo::build_all_for(architecture, programs)?;
        let measured = Programs { agent, accuracy };
        Ok(Self { measured, init })
    }

    /// An initramfs that holds them.
    fn initramfs(&self) -> Result<Initramfs> {
        let mut initramfs = Initramfs::default();
        let programs = [
            ("tailback", &self.measured.agent),
            ("accuracy", &self.measured.accuracy),
            ("init", &self.init),
        ];
        for (name, file) in programs {
            let content = fs::read(file).with_context(|| format!("read {}", file.display()))?;
            initramfs.file(name, 0o755, &content);
        }
        Ok(initramfs)
    }
}

/// Adds the modules that this kernel can load.
fn add_modules(initramfs: &mut Initramfs, kernel: &Kernel) -> Result<()> {
    for module in MODULES {
        let name = module_file(module);
        let file = kernel.modules().join(&name);
        match fs::read(&file) {
            Ok(content) => initramfs.file(&name, 0o644, &content),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("read {}", file.display())),
        }
    }
    Ok(())
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
        assert_eq!(names("all")?, ["5.10", "6.1", "6.12", "sid"]);
        assert_eq!(names("6.12,6.1")?, ["6.12", "6.1"]);
        assert_eq!(names("6.12-arm64")?, ["6.12-arm64"]);
        assert!(names("none")?.is_empty());
        let error = names("2.6")
            .expect_err("2.6 is not in the table")
            .to_string();
        assert_eq!(
            error,
            "no such kernel: `2.6`; the table has 5.10, 6.1, 6.12, sid, 6.12-arm64"
        );
        Ok(())
    }
}
