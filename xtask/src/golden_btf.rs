//! `cargo xtask golden-btf`: the BTF of kernels, reduced to the types that the agent reads.
//!
//! `agent/tests/golden/offsets.txt` lists the fields and their offsets on each kernel. For each requested kernel, its BTF is
//! extracted from the image (`vmlinuz`), reduced to these fields (`cut`) and written next to the table. Then the kernel's column
//! of the table is updated. Review the changes before committing. The agent's own resolver is not used here;
//! `agent/tests/layout.rs` compares it with the table.

mod cut;
mod table;
mod vmlinuz;

use std::{fs, process::ExitCode};

use anyhow::{Context as _, Result, ensure};

use crate::{
    kernels::{self, KERNELS, Kernel, version},
    setup::{self, Purpose},
    tools,
};
use cut::Types;
use table::Table;

/// BTF of the running kernel.
const RUNNING: &str = "/sys/kernel/btf/vmlinux";

#[derive(clap::Args)]
pub struct Args {
    /// Kernels of the matrix, or `running` for this machine's kernel [default: all of the matrix]
    kernels: Vec<String>,
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let sources = sources(&args.kernels)?;
    let wanted: Vec<&Kernel> = sources
        .iter()
        .filter_map(|source| match source {
            Source::Matrix(kernel) => Some(*kernel),
            Source::Running => None,
        })
        .collect();
    if !wanted.is_empty() {
        setup::ensure_with_kernels(Purpose::Boot, &wanted)?;
    }
    let directory = tools::root().join("agent/tests/golden");
    let file = directory.join("offsets.txt");
    let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    let mut table = Table::parse(&text).with_context(|| format!("read {}", file.display()))?;
    for source in &sources {
        let (release, btf) = source.btf()?;
        let version = version(&release);
        let small = golden(&btf, &mut table, &version, &release)
            .with_context(|| format!("cut the BTF of {release}"))?;
        let out = directory.join(format!("{version}.btf"));
        fs::write(&out, &small).with_context(|| format!("write {}", out.display()))?;
        println!(
            "{}: {} bytes of the {} of {release}",
            out.display(),
            small.len(),
            btf.len()
        );
    }
    fs::write(&file, table.to_string()).with_context(|| format!("write {}", file.display()))?;
    println!("{}: review the changes", file.display());
    Ok(ExitCode::SUCCESS)
}

enum Source {
    Matrix(&'static Kernel),
    Running,
}

fn sources(names: &[String]) -> Result<Vec<Source>> {
    if names.is_empty() {
        return Ok(KERNELS.iter().map(Source::Matrix).collect());
    }
    let mut sources = Vec::new();
    for name in names {
        if name == "running" {
            sources.push(Source::Running);
        } else {
            sources.extend(kernels::choose(name)?.into_iter().map(Source::Matrix));
        }
    }
    Ok(sources)
}

impl Source {
    /// Release and complete BTF of the kernel.
    fn btf(&self) -> Result<(String, Vec<u8>)> {
        match self {
            Self::Matrix(kernel) => Ok((kernel.release(), vmlinuz::btf(&kernel.image())?)),
            Self::Running => {
                let release = rustix::system::uname()
                    .release()
                    .to_string_lossy()
                    .into_owned();
                let btf = fs::read(RUNNING).with_context(|| format!("read {RUNNING}"))?;
                Ok((release, btf))
            }
        }
    }
}

/// Reduces the BTF of one kernel and updates its column of the table. Checks that the offsets are unchanged.
fn golden(btf: &[u8], table: &mut Table, version: &str, release: &str) -> Result<Vec<u8>> {
    let whole = Types::parse(btf)?;
    let paths: Vec<_> = table.places().collect();
    let small = whole.cut(&paths)?;
    let cut = Types::parse(&small)?;
    let mut column = Vec::with_capacity(paths.len());
    for place in &paths {
        let (before, after) = (whole.offset(place), cut.offset(place));
        ensure!(
            before == after,
            "{place} is at {before:?}, and at {after:?} once cut"
        );
        column.push(before);
    }
    table.set(version, release, column);
    Ok(small)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_has_two_numbers() {
        assert_eq!(version("6.12.107+deb13-cloud-amd64"), "6.12");
        assert_eq!(version("7.2.13"), "7.2");
    }

    /// The committed files are the output of this command.
    #[test]
    fn the_running_kernel_is_cut_to_a_few_kilobytes() -> Result<()> {
        let Ok(btf) = fs::read(RUNNING) else {
            return Ok(());
        };
        let text = include_str!("../../agent/tests/golden/offsets.txt");
        let small = golden(&btf, &mut Table::parse(text)?, "0.0", "this one")?;
        assert!((1_000..10_000).contains(&small.len()), "{}", small.len());
        Ok(())
    }
}
