//! Installs and uses the results, as a user would.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail, ensure};
use tailback_tests::temp::TempDir;

use super::{Release, contents, name};
use crate::{cargo, command::Cmd, tools};

/// What the checks need from setup.
pub const PARTS: &[&str] = &["man", "zsh", "fish"];

/// A word of the command line, and the beginning that completion must extend to it.
const COMPLETED: (&str, &str) = ("diagnose", "dia");

pub fn all(release: &Release) -> Result<()> {
    sums(release).context("check the checksums")?;
    archive(release).context("check the archive")?;
    if release.architecture.is_own() {
        package(release)
    } else {
        foreign_package(release)
    }
    .context("check the Debian package")
}

/// Compares two releases of the same sources, byte for byte.
pub fn same(one: &Release, other: &Release) -> Result<()> {
    for (one, other) in one.files().into_iter().zip(other.files()) {
        let bytes =
            |file: &Path| fs::read(file).with_context(|| format!("read {}", file.display()));
        ensure!(
            bytes(one)? == bytes(other)?,
            "{} and {} differ, although they were packed from the same files",
            one.display(),
            other.display()
        );
    }
    Ok(())
}

fn sums(release: &Release) -> Result<()> {
    let directory = release.sums.parent().unwrap_or(&release.sums);
    Cmd::new("sha256sum")
        .current_dir(directory)
        .args(["--check", "--strict"])
        .arg(&release.sums)
        .output()?;
    Ok(())
}

fn archive(release: &Release) -> Result<()> {
    let directory = TempDir::new("dist-archive")?;
    Cmd::new("tar")
        .args(["--extract", "--file"])
        .arg(&release.archive)
        .arg("--directory")
        .arg(directory.path())
        .output()?;
    let root = directory.path().join(name(release.architecture));
    let tailback = release.architecture.run(root.join("tailback"));
    runs(&tailback)?;
    checks_configuration(&tailback, &root.join("systemd/tailback.toml"))?;
    if !release.architecture.is_own() {
        replays_alike(&tailback)?;
    }
    for file in [
        "LICENSE-MIT",
        "LICENSE-APACHE",
        "LICENSE-GPL-2.0",
        contents::LICENCES,
        "README.md",
    ] {
        let bytes = fs::metadata(root.join(file))
            .with_context(|| format!("find {file}"))?
            .len();
        ensure!(bytes > 0, "{file} is empty");
    }
    let completions = root.join("completions");
    bash(&completions.join("tailback.bash"))?;
    zsh(&completions.join("_tailback"))?;
    fish(&completions.join("tailback.fish"))?;
    manual(&root.join("man"))
}

/// Installs it into an otherwise empty root, in which there is no library and no shell, and removes it.
fn package(release: &Release) -> Result<()> {
    let root = TempDir::new("dist-package")?;
    for directory in ["var/lib/dpkg/info", "var/lib/dpkg/updates"] {
        let path = root.path().join(directory);
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
    }
    root.write("var/lib/dpkg/status", "")?;
    let dpkg = |args: &[&str]| {
        as_root("dpkg")
            .arg(format!("--root={}", root.path().display()))
            // Scripts run outside, with DPKG_ROOT set.
            .args(["--force-script-chrootless", "--log=/dev/null"])
            .args(args)
            .output()
    };
    dpkg(&["--install", &release.package.display().to_string()])?;
    let installed = |args: &[&str]| {
        as_root("chroot")
            .arg(root.path())
            .arg("/usr/bin/tailback")
            .args(args)
            .output()
    };
    let version = installed(&["--version"])?;
    ensure!(
        version.trim() == expected_version(),
        "the installed binary says {version:?}"
    );
    installed(&["config", "check", "/etc/tailback/tailback.toml"])?;
    let share = root.path().join("usr/share");
    bash(&share.join("bash-completion/completions/tailback"))?;
    zsh(&share.join("zsh/vendor-completions/_tailback"))?;
    fish(&share.join("fish/vendor_completions.d/tailback.fish"))?;
    manual(&share.join("man"))?;

    // The administrator's configuration survives removal, as policy demands, and nothing else does.
    let config = root.path().join("etc/tailback/tailback.toml");
    dpkg(&["--remove", "tailback"])?;
    ensure!(
        config.is_file(),
        "removing the package deleted the configuration"
    );
    dpkg(&["--purge", "tailback"])?;
    for left in ["etc/tailback", "usr"] {
        ensure!(
            !root.path().join(left).exists(),
            "/{left} is left after the package was purged"
        );
    }
    Ok(())
}

/// Unpacks a package for another architecture, which dpkg would not install, and runs its binary.
fn foreign_package(release: &Release) -> Result<()> {
    let architecture = release.architecture;
    let field = Cmd::new("dpkg-deb").arg("--field").arg(&release.package);
    let named = field.arg("Architecture").output()?;
    ensure!(
        named.trim() == architecture.debian(),
        "the package is for {named:?}"
    );
    let root = TempDir::new("dist-package")?;
    let unpack = Cmd::new("dpkg-deb").arg("--extract").arg(&release.package);
    unpack.arg(root.path()).output()?;
    let tailback = architecture.run(root.path().join("usr/bin/tailback"));
    runs(&tailback)?;
    checks_configuration(&tailback, &root.path().join("etc/tailback/tailback.toml"))
}

/// Runs a program as root: as that of a user namespace, if the user is another.
fn as_root(program: &str) -> Cmd {
    if rustix::process::geteuid().is_root() {
        Cmd::new(program)
    } else {
        Cmd::new("unshare").args(["--map-root-user", program])
    }
}

fn expected_version() -> String {
    format!("tailback {}", env!("CARGO_PKG_VERSION"))
}

fn runs(tailback: &Cmd) -> Result<()> {
    let version = tailback.clone().arg("--version").output()?;
    ensure!(
        version.trim() == expected_version(),
        "the binary says {version:?}"
    );
    Ok(())
}

/// Replays the recorded incidents, and compares the output with that of this machine's agent, byte for byte.
fn replays_alike(tailback: &Cmd) -> Result<()> {
    let own = Cmd::new(cargo::build(cargo::AGENT)?);
    let incidents = tools::root().join("agent/tests/incidents");
    for entry in fs::read_dir(&incidents).context("list the recorded incidents")? {
        let recording = entry?.path();
        let replayed = |agent: &Cmd| {
            let replay = agent.clone().args(["replay", "--json"]);
            replay.arg(&recording).output()
        };
        ensure!(
            replayed(tailback)? == replayed(&own)?,
            "{} replays to another output than on this machine",
            recording.display()
        );
    }
    Ok(())
}

fn checks_configuration(tailback: &Cmd, file: &Path) -> Result<()> {
    tailback
        .clone()
        .args(["config", "check"])
        .arg(file)
        .output()
        .map(drop)
}

/// Every page can be shown, and documents its command.
fn manual(directory: &Path) -> Result<()> {
    for (page, content) in [
        ("tailback", "diagnose"),
        ("tailback-diagnose", "--port"),
        ("tailback-config-check", "FILE"),
    ] {
        let man = Cmd::new("man")
            .env("MANPATH", directory.display().to_string())
            .env("MANWIDTH", "100")
            .env("LC_ALL", "C.UTF-8")
            .args(["--warnings", "--pager=cat", "1", page]);
        let output = man
            .command()
            .output()
            .with_context(|| format!("start `{man}`"))?;
        let warnings = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() || !warnings.is_empty() {
            bail!("`{man}` ended with {}: {warnings}", output.status);
        }
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(
            text.contains(content),
            "{page}(1) does not mention {content}:\n{text}"
        );
    }
    Ok(())
}

fn bash(script: &Path) -> Result<()> {
    let (whole, start) = COMPLETED;
    completes(
        &Cmd::new("bash").args(["--norc", "-c"]).arg(format!(
            "source '{}'; COMP_WORDS=(tailback {start}); COMP_CWORD=1; _tailback tailback {start} tailback; \
             echo \"${{COMPREPLY[@]}}\"",
            script.display()
        )),
        whole,
    )
}

/// Completion in zsh needs a terminal: that the shell can parse the script is all that is checked.
fn zsh(script: &Path) -> Result<()> {
    Cmd::new("zsh")
        .args(["--no-rcs", "--no-exec"])
        .arg(script)
        .output()
        .map(drop)
}

fn fish(script: &Path) -> Result<()> {
    let (whole, start) = COMPLETED;
    let command = format!(
        "source '{}'; complete --do-complete 'tailback {start}'",
        script.display()
    );
    completes(
        &Cmd::new("fish").args(["--no-config", "--command", &command]),
        whole,
    )
}

fn completes(shell: &Cmd, whole: &str) -> Result<()> {
    let words = shell.output()?;
    ensure!(
        words.split_whitespace().next() == Some(whole),
        "`{shell}` printed {words:?}"
    );
    Ok(())
}
