//! `cargo xtask object`: builds the eBPF object, and keeps it in the repository.
//!
//! So building the agent needs only a stable compiler. `agent/build.rs` embeds `ebpf/object/scanner.o.zst` if
//! `ebpf/object/SHA256SUMS` matches the sources. The object also depends on the toolchain, the versions in
//! `Cargo.lock` and the build profile. The tests check these: they build the object again and compare.

use std::{env, ffi::OsString, fs, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};

use crate::{
    command::Cmd,
    setup::{self, ebpf},
    test::{Outcome, Tally},
    tools,
};

/// The kept object, in the directory of the eBPF crate. It is the same for all architectures.
const OBJECT: &str = "object/scanner.o.zst";
/// The architecture whose C types the eBPF library assumes. It declares more than the programs use: what differs between
/// architectures is not among that.
const ARCH: &str = "x86_64";
/// zstd compression level: the highest one that needs little memory.
const LEVEL: i32 = 19;

#[derive(clap::Args)]
pub struct Args {
    /// Compare the kept object with what the sources build, and change nothing
    #[arg(long)]
    check: bool,
}

pub fn main(args: &Args) -> Result<ExitCode> {
    setup::ensure_parts(&["eBPF toolchain", "bpf-linker"])?;
    if args.check {
        check()?;
    } else {
        keep()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Checks, as part of the tests, that the kept object is what the sources build.
pub fn run_here(filter: Option<&str>, tally: &mut Tally) {
    const NAME: &str = "sources: build the kept eBPF object";
    if filter.is_some_and(|filter| !NAME.contains(filter)) {
        return;
    }
    let outcome = match check() {
        _ if ebpf::with_debian() => Outcome::Skipped("the eBPF toolchain is Debian's".to_owned()),
        Ok(()) => Outcome::Passed,
        Err(error) => Outcome::Failed(format!("{error:#}")),
    };
    tally.record(NAME, outcome);
}

fn check() -> Result<()> {
    let path = kept();
    let sums = Cmd::new("sha256sum").args(["--check", "--strict", "--quiet", "object/SHA256SUMS"]);
    sums.current_dir(directory()).output()?;
    let compressed = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    let kept = zstd::decode_all(&*compressed).context("decompress the kept object")?;
    let built = build()?;
    ensure!(
        kept == built,
        "these sources build another object ({} bytes) than the kept one ({} bytes): run `cargo xtask object`",
        built.len(),
        kept.len()
    );
    Ok(())
}

fn keep() -> Result<()> {
    let compressed = zstd::encode_all(&*build()?, LEVEL).context("compress the object")?;
    let path = kept();
    fs::write(&path, &compressed).with_context(|| format!("write {}", path.display()))?;
    let sums = Cmd::new("sha256sum")
        .current_dir(directory())
        .args(sources()?)
        .output()?;
    let list = directory().join("object/SHA256SUMS");
    fs::write(&list, sums).with_context(|| format!("write {}", list.display()))?;
    println!("{}: {} bytes", path.display(), compressed.len());
    if ebpf::with_debian() {
        println!(
            "Debian's compiler built it; the tests accept only what {} builds.",
            ebpf::NIGHTLY
        );
    }
    Ok(())
}

fn directory() -> PathBuf {
    tools::root().join("ebpf")
}

fn kept() -> PathBuf {
    directory().join(OBJECT)
}

/// Everything in the list of sums, in the order of `agent/build.rs`.
fn sources() -> Result<Vec<PathBuf>> {
    let mut files = vec![PathBuf::from("Cargo.toml"), OBJECT.into()];
    for entry in fs::read_dir(directory().join("src")).context("list ebpf/src")? {
        let name = PathBuf::from("src").join(entry?.file_name());
        if name.extension().is_some_and(|extension| extension == "rs") {
            files.push(name);
        }
    }
    files.sort();
    Ok(files)
}

/// Builds the object. The same sources give the same bytes in any directory.
fn build() -> Result<Vec<u8>> {
    let target = tools::root().join("target/ebpf");
    let flags = [
        &format!("--cfg=bpf_target_arch=\"{ARCH}\""),
        "-Cdebuginfo=2",
        "-Clink-arg=--btf",
    ];
    let cargo = Cmd::new("rustup")
        .current_dir(tools::root())
        .args([
            "run",
            ebpf::TOOLCHAIN,
            "cargo",
            "build",
            "--quiet",
            "--locked",
            "--release",
        ])
        .args(["--package", "tailback-ebpf", "--bin", "scanner"])
        .args(["--no-default-features", "--features", "object"])
        .args([
            "--target",
            "bpfel-unknown-none",
            "-Zbuild-std=core",
            "--target-dir",
        ])
        .arg(&target)
        // The types of the object name its source files: without the directories of this machine.
        .args([
            "-Ztrim-paths",
            "--config",
            "profile.release.trim-paths='all'",
        ])
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        // Permits -Z on a stable compiler.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("PATH", path_with_linker()?);
    let status = cargo
        .command()
        .status()
        .with_context(|| format!("start `{cargo}`"))?;
    if !status.success() {
        bail!("`{cargo}` failed: {status}");
    }
    let built = target.join("bpfel-unknown-none/release/scanner");
    let built = fs::read(&built).with_context(|| format!("read {}", built.display()))?;
    without_dwarf(&built).context("remove the debug sections")
}

/// `PATH`, with the linker that setup installed first.
fn path_with_linker() -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let linker = ebpf::linker_root().join("bin");
    env::join_paths([linker].into_iter().chain(env::split_paths(&path)))
        .context("PATH contains a directory whose name cannot be part of PATH")
}

/// The object without DWARF, which is four fifths of it: the kernel and the agent use BTF only.
fn without_dwarf(elf: &[u8]) -> Result<Vec<u8>> {
    let mut elf = Builder::read(elf)?;
    for section in &mut elf.sections {
        let name = section.name.as_slice();
        section.delete = name.starts_with(b".debug") || name.starts_with(b".rel.debug");
    }
    // The linker keeps the names of sections in the table of symbol names, the builder in one of their own.
    let names = elf.sections.add();
    names.name = ".shstrtab".into();
    names.sh_type = SHT_STRTAB;
    names.data = SectionData::SectionString;
    elf.delete_orphans();
    let mut stripped = Vec::new();
    elf.write(&mut stripped)?;
    Ok(stripped)
}
