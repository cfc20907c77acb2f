//! `cargo xtask dist`: the files of a release, in `target/dist`: an archive for any Linux, a Debian package, a list of what
//! the binary was built from (SBOM), and checksums.
//!
//! `contents` lists what is in them and where, `debian` adds what a package needs. `crates` finds what the binary is built
//! from, for `sbom` and `licences`. `check` installs and uses the results. The same binary gives the same bytes: every time
//! is that of the commit. The binary names no directory of the machine that built it.

mod check;
mod contents;
mod crates;
mod debian;
mod licences;
mod sbom;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail, ensure};
use tailback_tests::temp::TempDir;

use crate::{
    architecture::{AARCH64_EMULATOR, Architecture},
    cargo,
    command::Cmd,
    setup,
    test::{Outcome, Tally},
    tools,
};
use contents::Programs;

/// Largest binary, in bytes: it is copied to every node.
const MAX_BINARY_BYTES: u64 = 13_000_000;

#[derive(clap::Args)]
pub struct Args {
    /// Architecture to build for; other than this machine's: aarch64 on x86_64
    #[arg(long, value_name = "ARCHITECTURE", value_enum, default_value_t = Architecture::OWN)]
    target: Architecture,
    /// Pack this binary instead of building one for release
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let architecture = args.target;
    let emulator: &[&str] = match architecture.is_own() {
        true => &[],
        false => &[AARCH64_EMULATOR],
    };
    let parts = [
        &["gcc", "dpkg-deb"],
        check::PARTS,
        architecture.parts(),
        emulator,
    ];
    setup::ensure_parts(&parts.concat())?;
    if let Some(why) = architecture.obstacle() {
        bail!("cannot build for {}: {why}", architecture.name());
    }
    let agent = match &args.binary {
        Some(binary) => binary.clone(),
        None => small(cargo::build_for_release(cargo::AGENT, architecture)?)?,
    };
    let programs = Programs {
        agent,
        manual: cargo::build(cargo::MANUAL)?,
        architecture,
    };
    let directory = tools::root().join(match architecture.is_own() {
        true => "target/dist".to_owned(),
        false => format!("target/dist-{}", architecture.name()),
    });
    empty(&directory)?;
    let release = pack(&programs, &directory)?;
    check::all(&release)?;
    for file in release.files() {
        let bytes = fs::metadata(file).map_or(0, |about| about.len());
        println!("{bytes:>10}  {}", file.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn small(binary: PathBuf) -> Result<PathBuf> {
    let bytes = fs::metadata(&binary).context("measure the binary")?.len();
    ensure!(
        bytes < MAX_BINARY_BYTES,
        "the binary has {bytes} bytes; the limit is {MAX_BINARY_BYTES}"
    );
    Ok(binary)
}

/// Packs the programs of the tests, and checks the results. They are neither optimized across crates nor small.
pub fn run_here(programs: [&Path; 2], filter: Option<&str>, tally: &mut Tally) {
    const NAME: &str = "release: archive and package install and work";
    if filter.is_some_and(|filter| !NAME.contains(filter)) {
        return;
    }
    let [agent, manual] = programs.map(Path::to_owned);
    let outcome = match packed_and_checked(&Programs {
        agent,
        manual,
        architecture: Architecture::OWN,
    }) {
        Ok(()) => Outcome::Passed,
        Err(error) => Outcome::Failed(format!("{error:#}")),
    };
    tally.record(NAME, outcome);
}

fn packed_and_checked(programs: &Programs) -> Result<()> {
    let (one, other) = (TempDir::new("dist")?, TempDir::new("dist")?);
    let release = pack(programs, one.path())?;
    check::all(&release)?;
    check::same(&release, &pack(programs, other.path())?)
}

/// The files of a release.
struct Release {
    architecture: Architecture,
    archive: PathBuf,
    package: PathBuf,
    sbom: PathBuf,
    sums: PathBuf,
}

impl Release {
    fn files(&self) -> [&Path; 4] {
        [&self.archive, &self.package, &self.sbom, &self.sums]
    }
}

/// Packs a release into an existing directory.
fn pack(programs: &Programs, directory: &Path) -> Result<Release> {
    let stage = directory.join("stage");
    let epoch = commit_time()?;
    let architecture = programs.architecture;
    let crates = crates::linked(architecture)?;
    let sbom = directory.join(format!("{}.cdx.json", name(architecture)));
    fs::write(&sbom, sbom::json(&crates, &epoch)?)
        .with_context(|| format!("write {}", sbom.display()))?;
    let licences = licences::of_libraries(&crates)?;
    let contents = contents::gather(programs, &sbom, &licences, &stage.join("generated"))?;
    let release = Release {
        architecture,
        archive: archive(&contents, &stage, directory, &epoch, architecture)?,
        package: debian::package(
            &contents,
            &stage.join("package"),
            directory,
            &epoch,
            architecture,
        )?,
        sbom,
        sums: directory.join("SHA256SUMS"),
    };
    fs::remove_dir_all(&stage).with_context(|| format!("remove {}", stage.display()))?;
    let summed = [&release.archive, &release.package, &release.sbom];
    let names = summed.into_iter().filter_map(|file| file.file_name());
    let sums = Cmd::new("sha256sum")
        .current_dir(directory)
        .args(names)
        .output()?;
    fs::write(&release.sums, sums).with_context(|| format!("write {}", release.sums.display()))?;
    Ok(release)
}

/// Name of the archive and of its only directory.
fn name(architecture: Architecture) -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!("tailback-{version}-{}-linux", architecture.name())
}

fn archive(
    contents: &[contents::File],
    stage: &Path,
    directory: &Path,
    epoch: &str,
    architecture: Architecture,
) -> Result<PathBuf> {
    let name = name(architecture);
    let root = stage.join(&name);
    for file in contents {
        file.copy_to(&root.join(&file.archive))?;
    }
    contents::fix_modes(&root)?;
    let archive = directory.join(format!("{name}.tar.gz"));
    Cmd::new("tar")
        .args([
            "--create",
            "--sort=name",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "--format=gnu",
        ])
        .arg(format!("--mtime=@{epoch}"))
        .args(["--use-compress-program=gzip -9n", "--file"])
        .arg(&archive)
        .arg("--directory")
        .arg(stage)
        .arg(&name)
        .output()?;
    Ok(archive)
}

/// Seconds since 1970, when the commit was made.
fn commit_time() -> Result<String> {
    let time = Cmd::new("git")
        .current_dir(tools::root())
        .args(["log", "-1", "--format=%ct"])
        .output()?;
    Ok(time.trim().to_owned())
}

fn empty(directory: &Path) -> Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory).with_context(|| format!("empty {}", directory.display()))?;
    }
    fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))
}
