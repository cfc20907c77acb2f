//! The Debian package, built with dpkg-deb from a staged tree.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::contents::{self, File};
use crate::{architecture::Architecture, command::Cmd, tools};

/// `authors` of the workspace: name and address.
const MAINTAINER: &str = env!("CARGO_PKG_AUTHORS");
/// End of an address that is a placeholder: no mail can be sent there (RFC 2606).
const PLACEHOLDER: &str = ".invalid>";
/// Year of the first commit.
const YEAR: u32 = 2026;
const DOC: &str = "usr/share/doc/tailback";

/// Builds the package into `directory`.
pub fn package(
    contents: &[File],
    stage: &Path,
    directory: &Path,
    epoch: &str,
    architecture: Architecture,
) -> Result<PathBuf> {
    for file in contents {
        if let Some(path) = &file.package {
            file.copy_to(&stage.join(path))?;
        }
    }
    if MAINTAINER.ends_with(PLACEHOLDER) {
        eprintln!(
            "note: the package's maintainer is {MAINTAINER}: set `authors` in the workspace's Cargo.toml before you publish it"
        );
    }
    let date = Cmd::new("date")
        .args(["--utc", "--rfc-email", &format!("--date=@{epoch}")])
        .output()?;
    write(stage, &format!("{DOC}/copyright"), &copyright()?)?;
    write(
        stage,
        &format!("{DOC}/changelog.Debian"),
        &changelog(date.trim()),
    )?;
    write(stage, "usr/share/lintian/overrides/tailback", LINTIAN)?;
    for path in compressed(contents) {
        Cmd::new("gzip")
            .args(["-9n"])
            .arg(stage.join(path))
            .output()?;
    }
    write(
        stage,
        "DEBIAN/control",
        &control(bytes_in(stage)?.div_ceil(1024), architecture),
    )?;
    write(stage, "DEBIAN/conffiles", "/etc/tailback/tailback.toml\n")?;
    for (name, script) in SCRIPTS {
        write(stage, &format!("DEBIAN/{name}"), script)?;
        let path = stage.join(format!("DEBIAN/{name}"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("make {} executable", path.display()))?;
    }
    let sums = Cmd::new("sh").current_dir(stage).args([
        "-c",
        "find * -type f -not -path 'DEBIAN/*' | LC_ALL=C sort | xargs md5sum",
    ]);
    write(stage, "DEBIAN/md5sums", &sums.output()?)?;
    contents::fix_modes(stage)?;
    let package = directory.join(format!(
        "tailback_{}_{}.deb",
        env!("CARGO_PKG_VERSION"),
        architecture.debian()
    ));
    Cmd::new("dpkg-deb")
        // One thread: several would divide the data into blocks.
        .args(["--root-owner-group", "-Zxz", "--threads-max=1", "--build"])
        .arg(stage)
        .arg(&package)
        .env("SOURCE_DATE_EPOCH", epoch)
        .output()?;
    Ok(package)
}

/// Total size of the files below a directory.
fn bytes_in(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))? {
        let path = entry?.path();
        bytes += if path.is_dir() {
            bytes_in(&path)?
        } else {
            fs::metadata(&path)
                .with_context(|| format!("measure {}", path.display()))?
                .len()
        };
    }
    Ok(bytes)
}

/// Files that Debian's policy wants compressed.
fn compressed(contents: &[File]) -> Vec<String> {
    let pages = contents.iter().filter_map(|file| file.package.clone());
    let mut paths: Vec<String> = pages
        .filter(|path| path.starts_with("usr/share/man/"))
        .collect();
    paths.extend(
        ["changelog", "changelog.Debian", contents::LICENCES].map(|name| format!("{DOC}/{name}")),
    );
    paths
}

fn control(installed_kib: u64, architecture: Architecture) -> String {
    format!(
        "Package: tailback\n\
         Version: {}\n\
         Architecture: {}\n\
         Maintainer: {MAINTAINER}\n\
         Installed-Size: {installed_kib}\n\
         Section: admin\n\
         Priority: optional\n\
         Description: finds the queue that is filling in an unmodified service\n \
         Tailback reads the kernel's own queues with eBPF iterators: accept and\n \
         receive queues, requests in flight, run queues, locks, disks, memory. It\n \
         says which queue of a service is filling and why, names the process that\n \
         is the root cause, and publishes how much work the service can take.\n",
        env!("CARGO_PKG_VERSION"),
        architecture.debian(),
    )
}

fn changelog(date: &str) -> String {
    format!(
        "tailback ({}) unstable; urgency=medium\n\n  * See changelog.gz.\n\n -- {MAINTAINER}  {date}\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// In Debian's machine-readable format. The Apache licence and the GPL are on every Debian system.
fn copyright() -> Result<String> {
    let mit = fs::read_to_string(tools::root().join("LICENSE-MIT")).context("read LICENSE-MIT")?;
    let (_, mit) = mit
        .split_once("\n\n")
        .context("LICENSE-MIT begins with the copyright")?;
    let lines = mit.trim_end().lines();
    let mit: String = lines
        .map(|line| {
            if line.is_empty() {
                " .\n".to_owned()
            } else {
                format!(" {line}\n")
            }
        })
        .collect();
    Ok(format!(
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\
         Upstream-Name: Tailback\n\
         Comment: The licences of the libraries are in LICENSES-OF-LIBRARIES.gz.\n\n\
         Files: *\n\
         Copyright: {YEAR} The Tailback contributors\n\
         License: MIT or Apache-2.0\n\n\
         Files: ebpf/*\n\
         Copyright: {YEAR} The Tailback contributors\n\
         License: MIT or Apache-2.0 or GPL-2\n\n\
         License: MIT\n{mit}\n\
         License: Apache-2.0\n See /usr/share/common-licenses/Apache-2.0.\n\n\
         License: GPL-2\n See /usr/share/common-licenses/GPL-2.\n"
    ))
}

const LINTIAN: &str = "\
# A static executable at a random address (static-pie) is taken for a library.
tailback: shared-library-lacks-prerequisites [usr/bin/tailback]
";

/// The service is neither enabled nor started: which services to watch is the administrator's decision.
const SCRIPTS: &[(&str, &str)] = &[
    (
        "postinst",
        "#!/bin/sh\nset -e\nif [ \"$1\" = configure ] && [ -z \"${DPKG_ROOT:-}\" ] && [ -d /run/systemd/system ]; then\n    \
         systemctl --system daemon-reload >/dev/null || true\n    \
         if [ -n \"$2\" ]; then deb-systemd-invoke try-restart tailback.service >/dev/null || true; fi\nfi\n",
    ),
    (
        "prerm",
        "#!/bin/sh\nset -e\nif [ \"$1\" = remove ] && [ -z \"${DPKG_ROOT:-}\" ] && [ -d /run/systemd/system ]; then\n    \
         deb-systemd-invoke stop tailback.service >/dev/null || true\nfi\n",
    ),
    (
        "postrm",
        "#!/bin/sh\nset -e\nif [ -z \"${DPKG_ROOT:-}\" ] && [ -d /run/systemd/system ]; then\n    \
         systemctl --system daemon-reload >/dev/null || true\nfi\n",
    ),
];

fn write(stage: &Path, path: &str, text: &str) -> Result<()> {
    let path = stage.join(path);
    contents::create_parent(&path)?;
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))
}
