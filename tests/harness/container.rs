//! A podman container that runs programs of this machine: its root folder holds nothing but links into `/usr`, which it sees
//! as it is here and cannot write to.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::{program, temp::TempDir, wait};

/// Of the ways in which podman can start a container, the one that works with control groups of both versions.
const PODMAN: &[&str] = &["--runtime", "runc", "--cgroup-manager=cgroupfs"];
/// The programs, and where links among them lead through.
const SEEN: [&str; 2] = ["/usr:/usr:ro", "/etc:/etc:ro"];
/// It ends by itself after so many seconds, should nobody be left to remove it.
const LONGEST: &str = "300";
const SOON: Duration = Duration::from_secs(20);
const CGROUPS: &str = "/sys/fs/cgroup";

static COUNT: AtomicU32 = AtomicU32::new(0);

/// Removed on drop, whoever runs in it.
pub struct Container {
    /// Its own, and that of the control group that podman makes it in.
    name: String,
    root: TempDir,
}

impl Container {
    /// To be started with [`Container::before`].
    pub fn new() -> Result<Self> {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("tailback-container-{}-{count}", process::id());
        let root = TempDir::new("container")?;
        for folder in ["bin", "lib", "lib64"] {
            let link = root.path().join(folder);
            symlink(format!("usr/{folder}"), &link)
                .with_context(|| format!("make {}", link.display()))?;
        }
        Ok(Self { name, root })
    }

    /// Whether podman can run anything here with these of its options; else what it says.
    pub fn try_out(options: &[&str]) -> Result<()> {
        let container = Self::new()?;
        let before = container.before(options)?;
        let mut podman = Command::new(&before[0]);
        let output = podman.args(&before[1..]).arg("/usr/bin/true").output();
        let output = output.context("start podman")?;
        ensure!(
            output.status.success(),
            "{}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// What it sees as `/`.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// The words that start what follows inside; `options` are podman's.
    pub fn before(&self, options: &[&str]) -> Result<Vec<String>> {
        let podman = program::need(&["podman"])?.display().to_string();
        let root = self.root().display().to_string();
        let group = format!("/{}", self.name);
        let mut words = vec![podman.as_str()];
        words.extend(PODMAN);
        words.extend(["run", "--rm", "--name", &self.name, "--timeout", LONGEST]);
        words.extend(["--cgroup-parent", &group]);
        for folder in SEEN {
            words.extend(["--volume", folder]);
        }
        words.extend([
            "--ulimit",
            "nofile=1024:1024",
            "--ulimit",
            "nproc=1000:1000",
        ]);
        words.extend(options);
        words.extend(["--rootfs", &root]);
        Ok(words.into_iter().map(str::to_owned).collect())
    }

    /// The process that it was started for, as this machine numbers it.
    pub fn pid(&self) -> Result<u32> {
        let pid = self.podman("inspect", &["--format", "{{.State.Pid}}"])?;
        pid.parse()
            .with_context(|| format!("read the pid {pid:?} of a container"))
    }

    pub fn id(&self) -> Result<String> {
        self.podman("inspect", &["--format", "{{.Id}}"])
    }

    /// So many CPUs it may use from now on.
    pub fn set_cpus(&self, cpus: f64) -> Result<()> {
        self.podman("update", &["--cpus", &cpus.to_string()])
            .map(drop)
    }

    /// Its part of the CPUs where others want them, too (`cpu.shares`; everybody else has 1,024 each).
    pub fn set_cpu_shares(&self, shares: &str) -> Result<()> {
        let file = Path::new(CGROUPS)
            .join("cpu")
            .join(&self.name)
            .join("cpu.shares");
        fs::write(&file, shares).with_context(|| format!("write {}", file.display()))
    }

    fn podman(&self, verb: &str, args: &[&str]) -> Result<String> {
        let mut podman = Command::new(program::need(&["podman"])?);
        podman.args(PODMAN).arg(verb).args(args).arg(&self.name);
        let output = podman.output().context("start podman")?;
        ensure!(
            output.status.success(),
            "podman {verb} {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Podman leaves the groups around the container's own behind, in each hierarchy: one for all, and below it one for
    /// the process that looks after the container.
    fn remove_groups(&self) -> Result<()> {
        let mounts = fs::read_dir(CGROUPS).with_context(|| format!("read {CGROUPS}"))?;
        let mounts = mounts.flatten().map(|mount| mount.path());
        let all = mounts.chain([PathBuf::from(CGROUPS)]);
        for group in all.map(|mount| mount.join(&self.name)) {
            wait::until("the container's control groups to be empty", SOON, || {
                let _ = fs::remove_dir(group.join("conmon"));
                let _ = fs::remove_dir(&group);
                Ok((!group.exists()).then_some(()))
            })?;
        }
        Ok(())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let removed = self.podman("rm", &["--force", "--time=0", "--ignore"]);
        if let Err(error) = removed.and_then(|_| self.remove_groups()) {
            eprintln!("warning: {error:#}");
        }
    }
}
