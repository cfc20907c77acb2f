//! Builds of our own programs.

use std::{env::consts::ARCH, fs, path::PathBuf, process::Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{command::Cmd, tools};

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Link {
    Usual,
    /// For an initramfs, in which there is no library to load.
    Static,
}

/// Builds one program of the workspace for release, and says where it lies.
pub fn build(package: &str, program: &str, link: Link) -> Result<PathBuf> {
    let mut cargo = Cmd::new("cargo")
        .folder(tools::root())
        .args([
            "build",
            "--release",
            "--message-format=json-render-diagnostics",
        ])
        .args(["--package", package, "--bin", program]);
    if link == Link::Static {
        // With a target named, the flags do not reach build scripts and macros, and those are shared with
        // the usual build.
        let target = format!("{ARCH}-unknown-linux-gnu");
        cargo = cargo
            .args(["--target", &target])
            .env("RUSTFLAGS", "-Ctarget-feature=+crt-static");
    }
    let output = cargo
        .command()
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("start `{cargo}`"))?;
    if !output.status.success() {
        bail!("`{cargo}` failed: {}", output.status);
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let built = messages.lines().find_map(|line| executable(line, program));
    let built = built.with_context(|| format!("`{cargo}` did not say where it put {program}"))?;
    if link == Link::Static && needs_loader(&fs::read(&built)?) {
        bail!(
            "{} was to be static, and asks for a loader",
            built.display()
        );
    }
    Ok(built)
}

/// The program's path, if this message of cargo's is about it.
fn executable(message: &str, program: &str) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(message).ok()?;
    if message["target"]["name"] != program {
        return None;
    }
    message["executable"].as_str().map(PathBuf::from)
}

/// Whether a 64-bit little-endian ELF file has a segment that names its loader (`PT_INTERP`), as elf(5) has it.
fn needs_loader(elf: &[u8]) -> bool {
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
    use super::*;

    #[test]
    fn a_usual_program_needs_a_loader() -> Result<()> {
        // This very test is one.
        assert!(needs_loader(&fs::read(std::env::current_exe()?)?));
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
        let message = r#"{"reason":"compiler-artifact","target":{"name":"a"},"executable":"/x/a"}"#;
        assert_eq!(executable(message, "a"), Some(PathBuf::from("/x/a")));
        assert_eq!(executable(message, "b"), None);
    }
}
