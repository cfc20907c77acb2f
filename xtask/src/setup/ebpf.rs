//! The toolchain for the eBPF object (`cargo xtask object`): a compiler with the source of `core`, and a linker that matches
//! its LLVM.
//!
//! A nightly includes the source. Where none can be downloaded, Debian 12's security archive has a compiler of the same age
//! with its source; its object has the same code, but not the same bytes.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Action, Method, State};
use crate::{command::Cmd, tools};

/// Name under which either toolchain is linked.
pub const TOOLCHAIN: &str = "tailback-ebpf";
/// The nightly and the linker must match: both use LLVM 22.
pub const NIGHTLY: &str = "nightly-2026-05-20";
const BPF_LINKER: &str = "0.10.3";
const LLVM: &str = "22";
/// Prefix of Debian's toolchain.
const DEBIAN: &str = "/usr";

pub fn toolchain() -> State {
    let link = tools::rustup_home().join("toolchains").join(TOOLCHAIN);
    let Ok(directory) = link.canonicalize() else {
        return State::Missing(format!("rustup has no toolchain {TOOLCHAIN}"));
    };
    if !directory
        .join("lib/rustlib/src/rust/library/core/Cargo.toml")
        .is_file()
    {
        return State::Missing(format!(
            "the toolchain {TOOLCHAIN} lacks the source of core"
        ));
    }
    match Cmd::new(directory.join("bin/rustc")).arg("-vV").output() {
        Ok(about) if about.contains(&format!("LLVM version: {LLVM}.")) => {
            let version = about.lines().next().unwrap_or_default();
            State::Found(format!(
                "{version} with the source of core, {}",
                directory.display()
            ))
        }
        Ok(_) => State::Missing(format!(
            "the toolchain {TOOLCHAIN} does not use LLVM {LLVM}"
        )),
        Err(error) => State::Missing(format!("the toolchain {TOOLCHAIN} does not run: {error}")),
    }
}

pub fn toolchain_methods() -> Vec<Method> {
    if tools::program("rustup").is_none() {
        return Vec::new();
    }
    let rustup = || Cmd::new("rustup").limit(Duration::from_secs(300));
    let link = |to: &Path| Action::Run(rustup().args(["toolchain", "link", TOOLCHAIN]).arg(to));
    let directory = format!("{NIGHTLY}-{}-unknown-linux-gnu", std::env::consts::ARCH);
    vec![
        Method {
            title: format!("{NIGHTLY} with rust-src from rustup, up to 5 minutes"),
            actions: vec![
                Action::Run(rustup().args([
                    "toolchain",
                    "install",
                    NIGHTLY,
                    "--profile=minimal",
                    "--component=rust-src",
                    "--no-self-update",
                ])),
                link(&tools::rustup_home().join("toolchains").join(directory)),
            ],
        },
        Method {
            title: "Debian's compiler and its source".to_owned(),
            actions: vec![
                Action::Apt(&["rustc-web", "cargo-web", "rust-web-src"]),
                link(Path::new(DEBIAN)),
            ],
        },
    ]
}

pub fn linker() -> State {
    // cargo's record of the programs installed under this root.
    let record = fs::read_to_string(linker_root().join(".crates2.json")).unwrap_or_default();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap_or_default();
    let installed = record["installs"].as_object().into_iter().flatten();
    let mut matching = installed.filter(|(name, about)| {
        name.starts_with(&format!("bpf-linker {BPF_LINKER} "))
            && about["no_default_features"] == with_debian()
    });
    let program = linker_root().join("bin/bpf-linker");
    if matching.next().is_some() && program.is_file() {
        State::Found(format!("{BPF_LINKER}, {}", program.display()))
    } else {
        State::Missing(format!(
            "{BPF_LINKER}, built to match the toolchain, is not in {}",
            linker_root().display()
        ))
    }
}

pub fn linker_methods() -> Vec<Method> {
    let install = Cmd::new("cargo")
        .args(["install", "--locked", "--force", "--root"])
        .arg(linker_root())
        .arg(format!("bpf-linker@{BPF_LINKER}"));
    let title = "built from crates.io, about a minute".to_owned();
    if !with_debian() {
        return vec![Method {
            title,
            actions: vec![Action::Run(install)],
        }];
    }
    // Debian's compiler does not expose its LLVM: the linker uses the LLVM of the development package.
    let install = install
        .args(["--no-default-features", "--features", "llvm-22"])
        .env("LLVM_PREFIX", format!("/usr/lib/llvm-{LLVM}"));
    vec![Method {
        title,
        actions: vec![
            Action::Apt(&[
                "llvm-22-dev",
                "libpolly-22-dev",
                "libxml2-dev",
                "libzstd-dev",
                "zlib1g-dev",
            ]),
            Action::Run(install),
        ],
    }]
}

/// The directory that the linker is installed under.
pub fn linker_root() -> PathBuf {
    tools::cache().join("bpf-linker")
}

/// Whether the linked toolchain is Debian's.
pub fn with_debian() -> bool {
    let link = tools::rustup_home().join("toolchains").join(TOOLCHAIN);
    link.canonicalize()
        .is_ok_and(|directory| directory == Path::new(DEBIAN))
}
