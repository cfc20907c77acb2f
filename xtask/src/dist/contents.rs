//! What is in a release, and where.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{architecture::Architecture, command::Cmd, tools};

/// Name of the file with the licences of the libraries.
pub const LICENCES: &str = "LICENSES-OF-LIBRARIES";

/// The programs that a release is made from.
pub struct Programs {
    /// The binary itself.
    pub agent: PathBuf,
    /// Writes manual pages and shell completions: `agent/examples/manual.rs`.
    pub manual: PathBuf,
    /// Of the agent; `manual` runs on this machine.
    pub architecture: Architecture,
}

/// One file of a release.
pub struct File {
    source: PathBuf,
    /// Path in the archive.
    pub archive: String,
    /// Path in the Debian package, if it is there.
    pub package: Option<String>,
    mode: u32,
}

impl File {
    /// Copies it, with its mode, and creates the directories on the way.
    pub fn copy_to(&self, path: &Path) -> Result<()> {
        create_parent(path)?;
        fs::copy(&self.source, path)
            .and_then(|_| fs::set_permissions(path, fs::Permissions::from_mode(self.mode)))
            .with_context(|| format!("copy {} to {}", self.source.display(), path.display()))
    }
}

/// Creates the directories above a file.
pub fn create_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))
}

/// Gives a staged tree the same modes under every umask.
pub fn fix_modes(stage: &Path) -> Result<()> {
    let chmod = Cmd::new("chmod").args(["--recursive", "u+rwX,go+rX,go-w"]);
    chmod.arg(stage).output().map(drop)
}

/// Paths in the archive and in the package of what `programs.manual` writes.
const COMPLETIONS: &[[&str; 2]] = &[
    [
        "tailback.bash",
        "usr/share/bash-completion/completions/tailback",
    ],
    ["_tailback", "usr/share/zsh/vendor-completions/_tailback"],
    [
        "tailback.fish",
        "usr/share/fish/vendor_completions.d/tailback.fish",
    ],
];
/// Files of the repository, with their paths in the archive and in the package. In the package, `copyright` stands for the
/// licences.
const REPOSITORY: &[(&str, &str, Option<&str>)] = &[
    (
        "deploy/systemd/tailback.toml",
        "systemd/tailback.toml",
        Some("etc/tailback/tailback.toml"),
    ),
    (
        "deploy/systemd/tailback.service",
        "systemd/tailback.service",
        Some("usr/lib/systemd/system/tailback.service"),
    ),
    (
        "README.md",
        "README.md",
        Some("usr/share/doc/tailback/README.md"),
    ),
    (
        "CHANGELOG.md",
        "CHANGELOG.md",
        Some("usr/share/doc/tailback/changelog"),
    ),
    ("LICENSE-MIT", "LICENSE-MIT", None),
    ("LICENSE-APACHE", "LICENSE-APACHE", None),
    ("LICENSE-GPL-2.0", "LICENSE-GPL-2.0", None),
];

/// The files of a release. What does not exist yet is written to `generated`.
pub fn gather(
    programs: &Programs,
    sbom: &Path,
    licences: &str,
    generated: &Path,
) -> Result<Vec<File>> {
    fs::create_dir_all(generated).with_context(|| format!("create {}", generated.display()))?;
    Cmd::new(&programs.manual).arg(generated).output()?;
    let texts = generated.join(LICENCES);
    fs::write(&texts, licences).with_context(|| format!("write {}", texts.display()))?;

    let mut files = vec![
        File {
            mode: 0o755,
            ..file(&programs.agent, "tailback", Some("usr/bin/tailback"))
        },
        file(
            &texts,
            LICENCES,
            Some(&format!("usr/share/doc/tailback/{LICENCES}")),
        ),
        file(
            sbom,
            "tailback.cdx.json",
            Some("usr/share/doc/tailback/tailback.cdx.json"),
        ),
    ];
    for (source, archive, package) in REPOSITORY {
        files.push(file(&tools::root().join(source), archive, *package));
    }
    for [name, package] in COMPLETIONS {
        files.push(file(
            &generated.join(name),
            &format!("completions/{name}"),
            Some(package),
        ));
    }
    for page in manual_pages(generated)? {
        let name = page.file_name().unwrap_or_default().display().to_string();
        let package = format!("usr/share/man/man1/{name}");
        files.push(file(&page, &format!("man/man1/{name}"), Some(&package)));
    }
    Ok(files)
}

fn manual_pages(generated: &Path) -> Result<Vec<PathBuf>> {
    let mut pages = Vec::new();
    for entry in fs::read_dir(generated).context("list the manual pages")? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "1") {
            pages.push(path);
        }
    }
    Ok(pages)
}

fn file(source: &Path, archive: &str, package: Option<&str>) -> File {
    File {
        source: source.to_owned(),
        archive: archive.to_owned(),
        package: package.map(str::to_owned),
        mode: 0o644,
    }
}
