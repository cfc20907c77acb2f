//! Podman containers that run programs of this machine: the root directory holds only links into `/usr`, which is
//! mounted read-only.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::{cleanup, program, temp::TempDir, wait};

/// Podman options that work with both cgroup v1 and v2.
const PODMAN: &[&str] = &["--runtime", "runc", "--cgroup-manager=cgroupfs"];
/// Read-only mounts: the programs, and the links of Debian's alternatives.
const MOUNTS: [&str; 2] = ["/usr:/usr:ro", "/etc:/etc:ro"];
/// Maximum life time, seconds, in case nothing is left to remove the container.
const TIMEOUT_S: &str = "300";
/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(20);
const CGROUPS: &str = "/sys/fs/cgroup";

static COUNT: AtomicU32 = AtomicU32::new(0);

/// Removed on drop, with all its processes.
pub struct Container {
    /// Name of the container and of its parent cgroup.
    name: String,
    root: TempDir,
}

impl Container {
    /// Prepares the root directory. Start the container with [`Container::before`].
    pub fn new() -> Result<Self> {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("tailback-container-{}-{count}", process::id());
        let root = TempDir::new("container")?;
        for directory in ["bin", "lib", "lib64"] {
            let link = root.path().join(directory);
            symlink(format!("usr/{directory}"), &link)
                .with_context(|| format!("create {}", link.display()))?;
        }
        Ok(Self { name, root })
    }

    /// Runs `true` with these podman options; the error is podman's. Tries a few times: a test that is skipped fails the run.
    pub fn check_can_run(options: &[&str]) -> Result<()> {
        const ATTEMPTS: u32 = 3;
        (1..ATTEMPTS)
            .find_map(|_| Self::run_true(options).ok())
            .map_or_else(|| Self::run_true(options), Ok)
    }

    fn run_true(options: &[&str]) -> Result<()> {
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

    /// Its name, for podman.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory that is `/` inside.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// The command prefix that runs a program inside; `options` are podman's.
    pub fn before(&self, options: &[&str]) -> Result<Vec<String>> {
        self.before_with(&MOUNTS, options)
    }

    /// Like [`Container::before`], with an `/etc` of its own.
    pub fn before_without_etc(&self, options: &[&str]) -> Result<Vec<String>> {
        self.before_with(&MOUNTS[..1], options)
    }

    fn before_with(&self, mounts: &[&str], options: &[&str]) -> Result<Vec<String>> {
        let podman = program::need(&["podman"])?.display().to_string();
        let root = self.root().display().to_string();
        let group = format!("/{}", self.name);
        let mut words = vec![podman.as_str()];
        words.extend(PODMAN);
        words.extend(["run", "--rm", "--name", &self.name, "--timeout", TIMEOUT_S]);
        words.extend(["--cgroup-parent", &group]);
        for directory in mounts {
            words.extend(["--volume", directory]);
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

    /// Runs a command inside, and returns what it prints.
    pub fn exec(&self, command: &[&str]) -> Result<String> {
        let mut podman = Command::new(program::need(&["podman"])?);
        podman.args(PODMAN).args(["exec", &self.name]).args(command);
        let output = podman.output().context("start podman")?;
        ensure!(
            output.status.success(),
            "{command:?} in a container: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Pid of its main process, in the host's pid namespace.
    pub fn pid(&self) -> Result<u32> {
        let pid = self.podman("inspect", &["--format", "{{.State.Pid}}"])?;
        pid.parse()
            .with_context(|| format!("read the pid {pid:?} of a container"))
    }

    pub fn id(&self) -> Result<String> {
        self.podman("inspect", &["--format", "{{.Id}}"])
    }

    /// Changes the CPU quota.
    pub fn set_cpus(&self, cpus: f64) -> Result<()> {
        self.podman("update", &["--cpus", &cpus.to_string()])
            .map(drop)
    }

    /// Sets the CPU weight under contention (cgroup v1 `cpu.shares`; the default is 1,024).
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

    /// Removes the parent cgroups that podman leaves behind in each hierarchy: the container's parent and the one of conmon
    /// below it.
    fn remove_groups(&self) -> Result<()> {
        let mounts = fs::read_dir(CGROUPS).with_context(|| format!("read {CGROUPS}"))?;
        let mounts = mounts.flatten().map(|mount| mount.path());
        let all = mounts.chain([PathBuf::from(CGROUPS)]);
        for group in all.map(|mount| mount.join(&self.name)) {
            wait::until("the container's cgroups to be empty", DEADLINE, || {
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

/// A link as the kubelet makes one for each container, removed on drop.
pub struct PodLink {
    link: PathBuf,
    /// The directory, if there was none before.
    made: Option<PathBuf>,
}

impl PodLink {
    /// `name`: `POD_NAMESPACE_CONTAINER-ID.log`.
    pub fn new(name: &str) -> Result<Self> {
        let directory = PathBuf::from("/var/log/containers");
        let link = directory.join(name);
        // Another test may remove the directory, which it has made, just before the link is made.
        let made = wait::until("a link of the kubelet", DEADLINE, || {
            let made = fs::create_dir(&directory).is_ok();
            match symlink("/var/log/pods/none", &link) {
                Ok(()) => Ok(Some(made)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error).with_context(|| format!("create {}", link.display())),
            }
        })?;
        let made = made.then_some(directory);
        // A signal ends this process without drop.
        let (link_made, directory_made) = (link.clone(), made.clone());
        cleanup::on_interrupt(move || remove_link(&link_made, directory_made.as_deref()));
        Ok(Self { link, made })
    }
}

impl Drop for PodLink {
    fn drop(&mut self) {
        remove_link(&self.link, self.made.as_deref());
    }
}

fn remove_link(link: &Path, directory: Option<&Path>) {
    let _ = fs::remove_file(link);
    if let Some(directory) = directory {
        // Fails while other links are there.
        let _ = fs::remove_dir(directory);
    }
}
