//! Checks that the kept eBPF object was built from the sources beside it. `cargo xtask object` builds it.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

/// The eBPF crate.
const EBPF: &str = "../ebpf";

fn main() -> Result<()> {
    println!("cargo::rerun-if-changed={EBPF}");
    let object = Path::new(EBPF).join("object/scanner.o.zst");
    if !object.is_file() {
        println!(
            "cargo::error=there is no eBPF object: {} does not exist, run `cargo xtask object`",
            object.display()
        );
        return Ok(());
    }
    let kept = Path::new(EBPF).join("object/SHA256SUMS");
    let kept = fs::read_to_string(&kept).with_context(|| format!("read {}", kept.display()))?;
    let present = sums()?;
    if let Some(differing) = first_difference(&kept, &present) {
        println!(
            "cargo::error=ebpf/{differing} is not the file that the object in ebpf/object was built from: \
             run `cargo xtask object`"
        );
    }
    let object = fs::canonicalize(object).context("find the eBPF object")?;
    println!("cargo::rustc-env=EBPF_OBJECT={}", object.display());
    Ok(())
}

/// What `sha256sum` prints for the sources and the objects, in the order of their names.
fn sums() -> Result<String> {
    let mut files = vec![PathBuf::from("Cargo.toml")];
    for (directory, extension) in [("object", "zst"), ("src", "rs")] {
        let path = Path::new(EBPF).join(directory);
        let entries = fs::read_dir(&path).with_context(|| format!("list {}", path.display()))?;
        for entry in entries {
            let name = PathBuf::from(directory).join(entry?.file_name());
            if name.extension().is_some_and(|found| found == extension) {
                files.push(name);
            }
        }
    }
    files.sort();
    let mut sums = String::new();
    for file in files {
        let bytes = fs::read(Path::new(EBPF).join(&file));
        let bytes = bytes.with_context(|| format!("read ebpf/{}", file.display()))?;
        for byte in Sha256::digest(bytes) {
            write!(sums, "{byte:02x}")?;
        }
        writeln!(sums, "  {}", file.display())?;
    }
    Ok(sums)
}

/// The first file that is only in one of two lists, or differs.
fn first_difference<'a>(kept: &'a str, present: &'a str) -> Option<&'a str> {
    let only_in = |one: &'a str, other: &'a str| {
        one.lines()
            .find(move |line| !other.lines().any(|known| known == *line))
    };
    let line = only_in(present, kept).or_else(|| only_in(kept, present))?;
    Some(line.rsplit(' ').next().unwrap_or(line))
}
