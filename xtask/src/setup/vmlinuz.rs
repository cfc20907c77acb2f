//! The kernels of the matrix: images and a few modules from Debian packages of other suites. They are fetched with private apt
//! lists and caches, so that the machine's own apt configuration stays unchanged.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use super::{Action, Method, State};
use crate::{
    architecture::Architecture,
    command::Cmd,
    kernels::{Kernel, MODULES},
};

/// Metapackage that depends on the newest kernel of its suite.
fn newest(architecture: Architecture) -> String {
    format!("linux-image-cloud-{}", architecture.debian())
}

/// Whether the kernel and its modules are present.
pub fn locate(kernel: &Kernel) -> State {
    let (image, modules) = (kernel.image(), kernel.modules());
    if !image.is_file() {
        State::Missing(format!("{} does not exist", image.display()))
    } else if !modules.is_dir() {
        State::Missing(format!("{} does not exist", modules.display()))
    } else {
        State::Found(format!("{}, {}", kernel.release(), image.display()))
    }
}

pub fn methods(kernel: &'static Kernel) -> Vec<Method> {
    vec![Method {
        title: format!("from Debian's archive ({}), about 15 seconds", kernel.suite),
        actions: vec![Action::Kernel(kernel)],
    }]
}

/// Manual instructions.
pub fn instructions(kernel: &Kernel) -> String {
    format!(
        "extract vmlinuz from Debian's newest {} ({}) to {}; extract its modules {}, decompressed, to {}",
        newest(kernel.architecture),
        kernel.suite,
        kernel.image().display(),
        MODULES.join(", "),
        kernel.modules().display()
    )
}

/// Fetches the kernel and its modules.
pub fn fetch(kernel: &Kernel, log: &Path) -> Result<()> {
    let work = kernel.directory().join("fetching");
    let apt = PrivateApt::new(&work, kernel)?;
    apt.get().arg("update").run_logged(log)?;

    let image = apt.depends(&newest(kernel.architecture), "linux-image-")?;
    // Since 7.x the image and the modules are in separate packages.
    let parts = ["linux-binary-", "linux-modules-"].map(|start| apt.depends(&image, start));
    let mut packages: Vec<String> = parts.into_iter().flatten().collect();
    if packages.is_empty() {
        packages.push(image.clone());
    }
    let tree = work.join("tree");
    for package in packages {
        let directory = work.join(&package);
        fs::create_dir_all(&directory)
            .with_context(|| format!("create {}", directory.display()))?;
        apt.get()
            .args(["download", &package])
            .current_dir(&directory)
            .run_logged(log)?;
        let archive = find(&directory, &|name| name.ends_with(".deb"))?;
        Cmd::new("dpkg-deb")
            .arg("-x")
            .args([&archive, &tree])
            .run_logged(log)?;
    }
    let vmlinuz = find(&tree, &|name| name.starts_with("vmlinuz"))?;
    let modules = work.join("modules");
    unpack_modules(&tree, &modules, log)?;

    let release = image.trim_start_matches("linux-image-");
    // Modules of another release would not load.
    let _ = fs::remove_dir_all(kernel.modules());
    fs::create_dir_all(kernel.directory())
        .and_then(|()| fs::write(kernel.release_file(), release))
        .and_then(|()| fs::rename(&vmlinuz, kernel.image()))
        .and_then(|()| fs::rename(&modules, kernel.modules()))
        .with_context(|| {
            format!(
                "keep {} in {}",
                vmlinuz.display(),
                kernel.directory().display()
            )
        })?;
    fs::remove_dir_all(&work).with_context(|| format!("remove {}", work.display()))
}

/// Extracts the modules of [`MODULES`]. Those that are built in are not there, and others may be missing. If none is
/// there, the directory is wrong.
fn unpack_modules(tree: &Path, into: &Path, log: &Path) -> Result<()> {
    fs::create_dir_all(into).with_context(|| format!("create {}", into.display()))?;
    let mut count = 0;
    for module in MODULES {
        let plain = format!("{module}.ko");
        let packed = format!("{module}.ko.xz");
        let Ok(found) = find(tree, &|name| name == plain || name == packed) else {
            continue;
        };
        let is_packed = found.extension().is_some_and(|last| last == "xz");
        let name = if is_packed { &packed } else { &plain };
        let file = into.join(name);
        fs::rename(&found, &file).with_context(|| format!("move {}", found.display()))?;
        if is_packed {
            Cmd::new("xz").arg("-d").arg(&file).run_logged(log)?;
        }
        count += 1;
    }
    if count == 0 {
        bail!("none of the modules {MODULES:?} is in {}", tree.display());
    }
    Ok(())
}

/// An apt configuration for one suite that writes only inside one directory.
struct PrivateApt {
    options: Vec<String>,
}

impl PrivateApt {
    fn new(directory: &Path, kernel: &Kernel) -> Result<Self> {
        let _ = fs::remove_dir_all(directory);
        let make = |name: &str| {
            let path = directory.join(name);
            fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))
        };
        make("lists/partial")?;
        make("cache/archives/partial")?;
        let source = directory.join("sources.list");
        let (mirror, suite) = (mirror()?, kernel.suite);
        let line = format!("deb [signed-by={KEYS}] {mirror} {suite} main\n");
        fs::write(&source, line).with_context(|| format!("write {}", source.display()))?;
        let option = |name: &str, value: &str| ["-o".to_owned(), format!("{name}={value}")];
        let options = [
            option("Dir::Etc::SourceList", &source.to_string_lossy()),
            option("Dir::Etc::SourceParts", "/dev/null"),
            option(
                "Dir::State::Lists",
                &directory.join("lists").to_string_lossy(),
            ),
            option("Dir::Cache", &directory.join("cache").to_string_lossy()),
            // apt's sandbox user may not read the directory; only the package lists are needed.
            option("APT::Sandbox::User", "root"),
            option("Acquire::Languages", "none"),
            option(
                "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled",
                "false",
            ),
            option("APT::Architecture", kernel.architecture.debian()),
            option("APT::Architectures", kernel.architecture.debian()),
            // A mirror that is weeks old has kernels too; signatures are still checked.
            option("Acquire::Check-Valid-Until", "false"),
            option("Acquire::Retries", "2"),
        ];
        Ok(Self {
            options: options.concat(),
        })
    }

    fn get(&self) -> Cmd {
        Cmd::new("apt-get")
            .args(&self.options)
            .limit(Duration::from_secs(300))
    }

    /// The dependency of `package` whose name starts with `start` and a digit.
    fn depends(&self, package: &str, start: &str) -> Result<String> {
        let about = Cmd::new("apt-cache")
            .args(&self.options)
            .args(["show", "--no-all-versions", package])
            .output()?;
        match dependency(&about, start) {
            Some(name) => Ok(name.to_owned()),
            None => bail!("Debian's {package} depends on no package {start}…"),
        }
    }
}

/// Keyring of the Debian archive.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// URI of the main archive in this machine's apt configuration.
fn mirror() -> Result<String> {
    let format = "$(REPO_URI) $(ORIGIN)/$(LABEL)";
    let targets = Cmd::new("apt-get")
        .args(["indextargets", "--format", format, "Created-By: Packages"])
        .output()?;
    let by_label = targets
        .lines()
        .find_map(|line| line.strip_suffix(" Debian/Debian"));
    // Labels are only known after `apt-get update`.
    let by_path = || {
        let mut uris = targets
            .lines()
            .filter_map(|line| line.split_whitespace().next());
        uris.find(|uri| uri.trim_end_matches('/').ends_with("/debian"))
    };
    let mirror = by_label.or_else(by_path).map(str::to_owned);
    mirror.context(
        "find the mirror of Debian's main archive in apt's configuration (run `apt-get update`)",
    )
}

fn dependency<'a>(about: &'a str, start: &str) -> Option<&'a str> {
    let depends = about
        .lines()
        .filter_map(|line| line.strip_prefix("Depends: "));
    let mut names = depends
        .flat_map(|list| list.split(", "))
        .filter_map(|one| one.split_whitespace().next());
    names.find(|name| {
        name.starts_with(start) && name[start.len()..].starts_with(|c: char| c.is_ascii_digit())
    })
}

/// The first file below `directory` whose name satisfies `fits`.
fn find(directory: &Path, fits: &dyn Fn(&str) -> bool) -> Result<PathBuf> {
    fn search(directory: &Path, fits: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
        let entries = fs::read_dir(directory).ok()?.flatten();
        entries
            .into_iter()
            .find_map(|entry| match entry.file_type() {
                Ok(kind) if kind.is_dir() => search(&entry.path(), fits),
                Ok(kind) if kind.is_file() && fits(&entry.file_name().to_string_lossy()) => {
                    Some(entry.path())
                }
                _ => None,
            })
    }
    search(directory, fits)
        .with_context(|| format!("find a matching file in {}", directory.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_is_found_by_its_dependency() {
        let about = "Package: linux-image-cloud-amd64\nDepends: linux-base-cloud-amd64 (= 7.2.13-1), \
                     linux-image-7.2.13+deb14-cloud-amd64 (= 7.2.13-1)\n";
        assert_eq!(
            dependency(about, "linux-image-"),
            Some("linux-image-7.2.13+deb14-cloud-amd64")
        );
        assert_eq!(dependency(about, "linux-binary-"), None);
    }
}
