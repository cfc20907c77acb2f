//! Builds of our own programs.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    thread,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{architecture::Architecture, command::Cmd, tools};

/// One program of a package of the workspace.
#[derive(Clone, Copy)]
pub struct Program {
    package: &'static str,
    name: &'static str,
    kind: Kind,
}

/// Cargo's kind of target.
#[derive(Clone, Copy)]
enum Kind {
    Bin,
    Example,
}

pub const AGENT: Program = Program::new("tailback", "tailback");
pub const ACCURACY: Program = Program::new("tailback-tests", "tailback-accuracy");
pub const SCENARIOS: Program = Program::new("tailback-tests", "tailback-scenarios");
/// The cluster of `test --cluster`, and the program in its pods.
pub const CLUSTER: Program = Program::new("tailback-tests", "tailback-cluster");
pub const POD: Program = Program::new("tailback-tests", "tailback-pod");
pub const SUBJECT: Program = Program::new("tailback-tests", "tailback-subject");
pub const KERNEL_INIT: Program = Program::new("xtask", "kernel-init");
/// Writes the manual pages and the shell completions. It is an example, so that neither is in the agent.
pub const MANUAL: Program = Program {
    kind: Kind::Example,
    ..Program::new("tailback", "manual")
};
/// A service of `bench overload`. It is an example, so that its dependencies are not built for every `cargo xtask`.
pub const OVERLOAD_TOWER: Program = Program {
    kind: Kind::Example,
    ..Program::new("xtask", "overload-tower")
};

impl Program {
    const fn new(package: &'static str, name: &'static str) -> Self {
        Self {
            package,
            name,
            kind: Kind::Bin,
        }
    }
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Bin => "bin",
            Self::Example => "example",
        }
    }
}

/// Builds a program for release, and returns its path.
pub fn build(program: Program) -> Result<PathBuf> {
    build_all([program]).map(|[path]| path)
}

/// Builds programs for release with one command, and returns their paths.
pub fn build_all<const N: usize>(programs: [Program; N]) -> Result<[PathBuf; N]> {
    build_all_for(Architecture::OWN, programs)
}

/// Like [`build_all`], for machines of this architecture.
pub fn build_all_for<const N: usize>(
    architecture: Architecture,
    programs: [Program; N],
) -> Result<[PathBuf; N]> {
    let mut cargo = Cmd::new("cargo")
        .current_dir(tools::root())
        .args(["build", "--release"]);
    for program in programs {
        let kind = format!("--{}", program.kind.name());
        cargo = cargo.args(["--package", program.package, &kind, program.name]);
    }
    build_with(architecture.build(cargo), programs)
}

/// Builds a program as it is released, and returns its path. The same sources give the same bytes in any directory.
pub fn build_for_release(program: Program, architecture: Architecture) -> Result<PathBuf> {
    let crates = tools::cargo_home().join("registry/src");
    // They replace the flags of .cargo/config.toml.
    let mut flags = vec![
        "-Ctarget-feature=+crt-static".to_owned(),
        format!("--remap-path-prefix={}=.", tools::root().display()),
        format!("--remap-path-prefix={}=crates", crates.display()),
    ];
    if architecture == Architecture::X86_64 {
        // Half a megabyte less: relocations of a static executable at a random address (glibc 2.36, binutils 2.38). On aarch64
        // rustc links static executables at a fixed address, without relocations.
        flags.push("-Clink-arg=-Wl,-z,pack-relative-relocs".to_owned());
        // Two percent less: functions that compile to the same code are one. This is LLD's, which rustc uses on x86-64 only.
        flags.push("-Clink-arg=-Wl,--icf=all".to_owned());
    }
    let cargo = Cmd::new("cargo")
        .current_dir(tools::root())
        .args(["build", "--locked", "--profile", "dist"])
        .args(["--package", program.package, "--bin", program.name])
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    build_with(architecture.build(cargo), [program]).map(|[path]| path)
}

/// `.cargo/config.toml` links statically. Kernels of the matrix have no library to load.
fn check_static(program: &Path) -> Result<()> {
    if needs_loader(&fs::read(program).with_context(|| format!("read {}", program.display()))?) {
        bail!(
            "{} should be static, but its ELF header names a loader: RUSTFLAGS overrides .cargo/config.toml, unset it",
            program.display()
        );
    }
    Ok(())
}

/// `cargo test` on the workspace.
pub fn test() -> Cmd {
    tests(Cmd::new("cargo").args(["test", "--profile", TESTED]))
}

/// The profile with which tests, and the programs that they test, are built.
const TESTED: &str = "tested";

/// Test slots per CPU. `tests/nextest.toml` gives the slots that each test takes: one if it mostly waits, four if it computes.
const SLOTS_PER_CPU: usize = 4;

/// Test slots of this machine. Live scenarios share them out in the same way.
pub fn test_slots() -> usize {
    SLOTS_PER_CPU * thread::available_parallelism().map_or(1, usize::from)
}

/// `cargo nextest run` on the workspace: the same build as [`test()`].
pub fn nextest() -> Cmd {
    let nextest = Cmd::new(tools::nextest())
        .args(["nextest", "run", "--cargo-profile", TESTED])
        .args(["--config-file", "tests/nextest.toml"])
        .args(["--test-threads", &test_slots().to_string()]);
    tests(nextest)
}

/// The tests of the workspace. The eBPF crate is left out: its object is loaded and tested by the agent.
fn tests(cmd: Cmd) -> Cmd {
    cmd.current_dir(tools::root())
        .args(["--workspace", "--exclude", "tailback-ebpf"])
}

/// Where [`nextest`] leaves its report, as `tests/nextest.toml` configures it.
pub fn junit_report() -> PathBuf {
    tools::root().join("target/nextest/default/junit.xml")
}

/// Builds the tests, and returns the paths of these programs, which are built with them.
pub fn build_tests<const N: usize>(programs: [Program; N]) -> Result<[PathBuf; N]> {
    build_with(test().arg("--no-run"), programs)
}

/// Runs a build, and returns the paths of these programs.
fn build_with<const N: usize>(cargo: Cmd, programs: [Program; N]) -> Result<[PathBuf; N]> {
    let cargo = cargo.arg("--message-format=json-render-diagnostics");
    let output = cargo
        .command()
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("start `{cargo}`"))?;
    if !output.status.success() {
        bail!("`{cargo}` failed: {}", output.status);
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let mut built = [const { PathBuf::new() }; N];
    for (path, program) in built.iter_mut().zip(programs) {
        *path = messages
            .lines()
            .find_map(|line| executable(line, program))
            .with_context(|| format!("`{cargo}` did not report the path of {}", program.name))?;
        check_static(path)?;
    }
    Ok(built)
}

/// The program's path, if this message of cargo's is about it. The program's unit tests have the same name.
fn executable(message: &str, program: Program) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(message).ok()?;
    let is_program = message["target"]["name"] == program.name
        && message["target"]["kind"][0] == program.kind.name()
        && message["profile"]["test"] == false;
    message["executable"]
        .as_str()
        .filter(|_| is_program)
        .map(PathBuf::from)
}

/// Whether a 64-bit little-endian ELF file has a segment that names its loader (`PT_INTERP`; see elf(5)).
pub fn needs_loader(elf: &[u8]) -> bool {
    const PT_INTERP: u64 = 3;
    let field = |at: usize, len: usize| -> Option<u64> {
        let bytes = elf.get(at..at.checked_add(len)?)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0, |number, byte| number << 8 | u64::from(*byte)),
        )
    };
    let segments = || -> Option<Vec<u64>> {
        let (start, size, count) = (field(32, 8)?, field(54, 2)?, field(56, 2)?);
        (0..count)
            .map(|n| field(usize::try_from(start + n * size).ok()?, 4))
            .collect()
    };
    segments().is_none_or(|types| types.contains(&PT_INTERP))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_dynamically_linked_program_needs_a_loader() -> Result<()> {
        // Every Linux distribution links its shell dynamically.
        assert!(needs_loader(&fs::read("/bin/sh")?));
        Ok(())
    }

    #[test]
    fn a_program_without_the_segment_does_not() {
        let mut elf = vec![0; 64 + 56];
        (elf[32], elf[54], elf[56], elf[64]) = (64, 56, 1, 1);
        assert!(!needs_loader(&elf));
        elf[64] = 3;
        assert!(needs_loader(&elf));
    }

    #[test]
    fn finds_the_program_in_the_messages() {
        let message = |kind: &str, test: bool| {
            json!({
                "reason": "compiler-artifact",
                "target": {"name": "a", "kind": [kind]},
                "profile": {"test": test},
                "executable": "/x/a",
            })
            .to_string()
        };
        let named = |name| Program::new("package", name);
        let program = message("bin", false);
        assert_eq!(
            executable(&program, named("a")),
            Some(PathBuf::from("/x/a"))
        );
        assert_eq!(executable(&program, named("b")), None);
        assert_eq!(executable(&message("bin", true), named("a")), None);
        assert_eq!(executable(&message("test", true), named("a")), None);
        let example = message("example", false);
        assert_eq!(executable(&example, named("a")), None);
        let kind = Kind::Example;
        let named = Program { kind, ..named("a") };
        assert_eq!(executable(&example, named), Some(PathBuf::from("/x/a")));
    }
}
