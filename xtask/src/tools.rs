//! Finds files and programs: the checkout, setup's cache directory, and installed programs.

use std::{
    env,
    path::{Path, PathBuf},
};

/// The checkout that this xtask was built from.
pub fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// Directory of everything that setup builds or fetches. It can be deleted at any time.
pub fn cache() -> PathBuf {
    env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .unwrap_or_else(|| PathBuf::from("/var/cache"))
        .join("tailback")
}

/// Directory of rustup's toolchains.
pub fn rustup_home() -> PathBuf {
    env::var_os("RUSTUP_HOME").map_or_else(
        || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".rustup"),
        PathBuf::from,
    )
}

/// Directory of cargo's registry.
pub fn cargo_home() -> PathBuf {
    env::var_os("CARGO_HOME").map_or_else(
        || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        PathBuf::from,
    )
}

/// The program of this name on `PATH` or in the sbin directories, which are only on root's `PATH`.
pub fn program(name: &str) -> Option<PathBuf> {
    tailback_tests::program::find(&[name])
}

/// Jaeger on `PATH`, else the one that setup builds.
pub fn jaeger() -> Option<PathBuf> {
    program("jaeger").or_else(|| Some(cache().join("bin/jaeger")).filter(|file| file.is_file()))
}

/// Helm on `PATH`, else the one that setup builds.
pub fn helm() -> Option<PathBuf> {
    program("helm").or_else(|| Some(cache().join("bin/helm")).filter(|file| file.is_file()))
}

/// cargo-nextest, as setup installs it.
pub fn nextest() -> PathBuf {
    cache().join("cargo-nextest/bin/cargo-nextest")
}

/// cargo-deny, as setup installs it.
pub fn deny() -> PathBuf {
    cache().join("cargo-deny/bin/cargo-deny")
}
