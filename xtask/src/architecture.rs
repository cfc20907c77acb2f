//! The processor architectures that the agent is released for. Programs for the other one are cross-built, and run in emulators.

use crate::{command::Cmd, tools};

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Architecture {
    #[value(name = "x86_64")]
    X86_64,
    #[value(name = "aarch64")]
    Aarch64,
}

/// The compiler that links programs for the other architecture, and compiles the C code in them.
pub const AARCH64_COMPILER: &str = "aarch64-linux-gnu-gcc";
/// Runs a program for the other architecture.
pub const AARCH64_EMULATOR: &str = "qemu-aarch64-static";
/// The part of setup that is Rust's standard library for the other architecture.
pub const AARCH64_LIBRARY: &str = "Rust's library for aarch64";

impl Architecture {
    /// That of this machine.
    #[cfg(target_arch = "x86_64")]
    pub const OWN: Self = Self::X86_64;
    #[cfg(target_arch = "aarch64")]
    pub const OWN: Self = Self::Aarch64;

    pub fn is_own(self) -> bool {
        self == Self::OWN
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// Debian's name.
    pub fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// Rust's name of the target that programs are built for.
    pub fn triple(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-gnu",
            Self::Aarch64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// The emulator of a whole machine.
    pub fn machine_emulator(self) -> &'static str {
        match self {
            Self::X86_64 => "qemu-system-x86_64",
            Self::Aarch64 => "qemu-system-aarch64",
        }
    }

    /// The parts of setup that a build for it needs on this machine.
    pub fn parts(self) -> &'static [&'static str] {
        match self {
            Self::Aarch64 if !self.is_own() => &[AARCH64_COMPILER, AARCH64_LIBRARY],
            _ => &[],
        }
    }

    /// Why programs for it cannot be built on this machine.
    pub fn obstacle(self) -> Option<String> {
        match self {
            _ if self.is_own() => None,
            Self::X86_64 => Some("programs for x86_64 are built on x86_64 only".to_owned()),
            Self::Aarch64 if tools::program(AARCH64_COMPILER).is_none() => {
                Some(format!("{AARCH64_COMPILER} is not installed"))
            }
            Self::Aarch64 => None,
        }
    }

    /// A build by cargo for it.
    pub fn build(self, cargo: Cmd) -> Cmd {
        match self {
            Self::Aarch64 if !self.is_own() => cargo.args(["--target", self.triple()]).env(
                "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER",
                AARCH64_COMPILER,
            ),
            _ => cargo,
        }
    }

    /// A command that runs a program which was built for it.
    pub fn run(self, program: impl AsRef<std::ffi::OsStr>) -> Cmd {
        if self.is_own() {
            Cmd::new(program)
        } else {
            Cmd::new(AARCH64_EMULATOR).arg(program)
        }
    }
}
