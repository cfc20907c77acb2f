//! The licences of the libraries in the binary, which their notices must accompany.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::Path,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::crates::Crate;
use crate::{command::Cmd, tools};

/// Beginnings of the names of files that hold a licence or a notice.
const NAMES: &[&str] = &["license", "licence", "copying", "notice", "unlicense"];

/// The text of every licence, after the crates that it is for.
pub fn of_libraries(crates: &BTreeMap<String, Crate>) -> Result<String> {
    let mut all = "Libraries in the tailback binary, and their licences:\n\n".to_owned();
    let mut texts: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    let directories = directories()?;
    // Our own crates are under the licences of the repository.
    for (key, part) in crates.iter().filter(|(_, part)| part.sha256.is_some()) {
        writeln!(all, "{key}: {}", part.licence)?;
        let manifest = directories
            .get(key)
            .with_context(|| format!("find the sources of {key}"))?;
        let directory = Path::new(manifest)
            .parent()
            .context("a manifest has a directory")?;
        for text in texts_in(directory)? {
            texts.entry(text).or_default().push(key);
        }
    }
    for (text, keys) in texts {
        write!(
            all,
            "\n{}\n{}:\n\n{}\n",
            "-".repeat(80),
            keys.join(", "),
            text.trim_end()
        )?;
    }
    Ok(all)
}

/// Manifest of each crate, by `NAME@VERSION`.
fn directories() -> Result<BTreeMap<String, String>> {
    let metadata = Cmd::new("cargo")
        .current_dir(tools::root())
        .args([
            "metadata",
            "--locked",
            "--all-features",
            "--format-version",
            "1",
        ])
        .output()?;
    let metadata: Value =
        serde_json::from_str(&metadata).context("parse the output of `cargo metadata`")?;
    let packages = metadata["packages"]
        .as_array()
        .context("`cargo metadata` lists no packages")?;
    let entry = |package: &Value| {
        let field = |name: &str| package[name].as_str();
        let key = format!("{}@{}", field("name")?, field("version")?);
        Some((key, field("manifest_path")?.to_owned()))
    };
    Ok(packages.iter().filter_map(entry).collect())
}

fn texts_in(directory: &Path) -> Result<BTreeSet<String>> {
    let mut texts = BTreeSet::new();
    for entry in fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .to_lowercase();
        if path.is_file() && NAMES.iter().any(|start| name.starts_with(start)) {
            let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            texts.insert(String::from_utf8_lossy(&text).into_owned());
        }
    }
    Ok(texts)
}
