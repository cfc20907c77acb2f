//! The crates that are linked into the binary, and into the eBPF object inside it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context as _, Result};

use crate::{architecture::Architecture, command::Cmd, tools};

/// The two programs, as `cargo tree` selects them.
const PROGRAMS: &[&[&str]] = &[
    &["--package", "tailback"],
    &[
        "--package",
        "tailback-ebpf",
        "--no-default-features",
        "--features",
        "object",
    ],
];

/// One version of a crate.
pub struct Crate {
    pub name: String,
    pub version: String,
    /// SPDX expression.
    pub licence: String,
    /// SHA-256 of its archive on crates.io; our own crates have none.
    pub sha256: Option<String>,
    /// Keys of the crates that it uses.
    pub uses: BTreeSet<String>,
}

/// All linked crates, each under `NAME@VERSION`.
pub fn linked(architecture: Architecture) -> Result<BTreeMap<String, Crate>> {
    let lock = fs::read_to_string(tools::root().join("Cargo.lock")).context("read Cargo.lock")?;
    let checksums = checksums(&lock);
    let mut crates = BTreeMap::new();
    for program in PROGRAMS {
        let tree = Cmd::new("cargo")
            .current_dir(tools::root())
            .args([
                "tree",
                "--locked",
                "--target",
                architecture.triple(),
                "--edges",
                "normal,no-proc-macro",
            ])
            .args(["--prefix", "depth", "--format", "|{p}|{l}"])
            .args(*program)
            .output()?;
        add(&tree, &checksums, &mut crates).context("parse the output of `cargo tree`")?;
    }
    Ok(crates)
}

/// Adds the crates of a tree, whose lines are `DEPTH|NAME vVERSION (…)|LICENCE`, perhaps with ` (*)` for one listed before.
fn add(
    tree: &str,
    checksums: &BTreeMap<String, String>,
    crates: &mut BTreeMap<String, Crate>,
) -> Option<()> {
    let mut path: Vec<String> = Vec::new();
    for line in tree.lines() {
        let mut fields = line.splitn(3, '|');
        let (depth, package, licence) =
            (fields.next()?.parse().ok()?, fields.next()?, fields.next()?);
        let mut words = package.split_whitespace();
        let (name, version) = (words.next()?, words.next()?.strip_prefix('v')?);
        let key = format!("{name}@{version}");
        path.truncate(depth);
        if let Some(user) = path.last() {
            crates.get_mut(user)?.uses.insert(key.clone());
        }
        crates.entry(key.clone()).or_insert_with(|| Crate {
            name: name.to_owned(),
            version: version.to_owned(),
            licence: licence.trim_end_matches(" (*)").to_owned(),
            sha256: checksums.get(&key).cloned(),
            uses: BTreeSet::new(),
        });
        path.push(key);
    }
    Some(())
}

/// Checksums in a lock file, by `NAME@VERSION`.
fn checksums(lock: &str) -> BTreeMap<String, String> {
    let checksum = |package: &str| {
        let field = |name: &str| {
            let mut lines = package.lines();
            let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(" = "))?;
            Some(value.trim_matches('"').to_owned())
        };
        Some((
            format!("{}@{}", field("name")?, field("version")?),
            field("checksum")?,
        ))
    };
    lock.split("[[package]]").filter_map(checksum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_gives_crates_and_what_they_use() {
        let tree = "0|a v1.0.0 (/x/a)|MIT\n1|b v2.0.0|Zlib\n2|c v3.0.0|ISC\n1|c v3.0.0|ISC (*)\n";
        let lock = "[[package]]\nname = \"b\"\nversion = \"2.0.0\"\nchecksum = \"12ab\"\n";
        let mut crates = BTreeMap::new();
        add(tree, &checksums(lock), &mut crates).expect("the tree is valid");
        let uses = |key: &str| crates[key].uses.iter().cloned().collect::<Vec<_>>();
        assert_eq!(uses("a@1.0.0"), ["b@2.0.0", "c@3.0.0"]);
        assert_eq!(uses("b@2.0.0"), ["c@3.0.0"]);
        assert_eq!(crates["c@3.0.0"].licence, "ISC");
        assert_eq!(crates["b@2.0.0"].sha256.as_deref(), Some("12ab"));
        assert_eq!(crates["a@1.0.0"].sha256, None);
    }
}
