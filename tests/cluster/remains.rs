//! What a cluster leaves outside of its namespaces: processes, control groups of pods, links for log collectors, kernel parameters that the
//! kubelet sets, and mounts below its directory.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::mount::{UnmountFlags, unmount};
use tailback_tests::{cleanup, wait};

const CGROUPS: &str = "/sys/fs/cgroup";
/// The control group of all pods.
const PODS: &str = "kubepods";
/// The links that the kubelet makes for log collectors.
const LINKS: &str = "/var/log/containers";
/// Kernel parameters that the kubelet sets.
const PARAMETERS: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];
/// Time for control groups to be empty after their processes were killed.
const DEADLINE: Duration = Duration::from_secs(20);

/// What has to be undone.
struct Remains {
    base: PathBuf,
    /// Kernel parameters with their former values.
    parameters: Vec<(PathBuf, String)>,
    /// Directories that did not exist before.
    directories: Vec<PathBuf>,
}

static REMAINS: Mutex<Option<Remains>> = Mutex::new(None);

/// Refuses to start beside another cluster: both would share the control groups of pods.
pub fn check_none() -> Result<()> {
    if let Some(group) = groups().first() {
        anyhow::bail!(
            "{} exists: a kubelet runs on this machine, or was not ended properly; stop it, and remove its control groups",
            group.display()
        );
    }
    Ok(())
}

/// Records the state to return to. From now on [`remove`] also follows a signal.
pub fn register(base: &Path) -> Result<()> {
    let parameter = |name| {
        let file = Path::new("/proc/sys").join(name);
        let value =
            fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        Ok((file, value))
    };
    let parameters = PARAMETERS.map(parameter);
    let parameters = parameters.into_iter().collect::<Result<_>>()?;
    let mut directories = Vec::new();
    if !Path::new(LINKS).exists() {
        directories.push(PathBuf::from(LINKS));
    }
    if let Ok(mut remains) = REMAINS.lock() {
        *remains = Some(Remains {
            base: base.to_owned(),
            parameters,
            directories,
        });
    }
    cleanup::on_interrupt(remove);
    Ok(())
}

/// Removes this directory at the end; it must be empty then.
pub fn register_directory(path: &str) {
    if let Ok(mut remains) = REMAINS.lock()
        && let Some(remains) = remains.as_mut()
    {
        remains.directories.push(path.into());
    }
}

/// Ends all processes, and removes everything. Reports on standard error what cannot be removed.
pub fn remove() {
    // Locked until the end: after a signal, the process must not exit while another thread removes.
    let Ok(mut registered) = REMAINS.lock() else {
        return;
    };
    let Some(remains) = registered.take() else {
        return;
    };
    if let Err(error) = remains.remove() {
        eprintln!("warning: {error:#}");
    }
}

impl Remains {
    fn remove(&self) -> Result<()> {
        // After a signal, a check may start kubectl once more: that alone does not keep the rest from being removed.
        let is_ended = cleanup::end_descendants();
        for (file, value) in &self.parameters {
            fs::write(file, value).with_context(|| format!("write {}", file.display()))?;
        }
        for group in groups() {
            wait::until_ok("control groups of pods to be empty", DEADLINE, || {
                remove_group(&group)
            })?;
        }
        for link in links(&self.base) {
            fs::remove_file(&link).with_context(|| format!("remove {}", link.display()))?;
        }
        let private = self.directories.iter().map(PathBuf::as_path);
        for mount in mounts(private.chain([self.base.as_path()]))? {
            unmount(&mount, UnmountFlags::DETACH)
                .with_context(|| format!("unmount {}", mount.display()))?;
        }
        for directory in &self.directories {
            // Fails if others use it by now.
            let _ = fs::remove_dir(directory);
        }
        ensure!(
            is_ended,
            "processes cannot be ended: {:?}",
            cleanup::descendants()
        );
        Ok(())
    }
}

/// Fails with what is left of a cluster whose directory was `base`.
pub fn check_removed(base: &Path) -> Result<()> {
    let processes = cleanup::descendants();
    let mounts = mounts([base])?;
    let (groups, links) = (groups(), links(base));
    ensure!(
        processes.is_empty() && mounts.is_empty() && groups.is_empty() && links.is_empty(),
        "left: processes {processes:?}, mounts {mounts:?}, control groups {groups:?}, links {links:?}"
    );
    ensure!(!base.exists(), "left: {}", base.display());
    Ok(())
}

/// The control groups of all pods, in each hierarchy.
fn groups() -> Vec<PathBuf> {
    let mounts = fs::read_dir(CGROUPS).into_iter().flatten().flatten();
    let places = mounts.map(|mount| mount.path()).chain([CGROUPS.into()]);
    let groups = places.map(|place| place.join(PODS));
    groups.filter(|group| group.is_dir()).collect()
}

/// Removes a group, after those below it.
fn remove_group(group: &Path) -> Result<()> {
    // In hierarchies with several names, such as cpu and cpu,cpuacct, it is removed by the first.
    if !group.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(group)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_group(&entry.path())?;
        }
    }
    fs::remove_dir(group).with_context(|| format!("remove {}", group.display()))
}

/// Links for log collectors that lead below this directory.
fn links(base: &Path) -> Vec<PathBuf> {
    let links = fs::read_dir(LINKS).into_iter().flatten().flatten();
    let links = links.map(|link| link.path());
    links
        .filter(|link| fs::read_link(link).is_ok_and(|to| to.starts_with(base)))
        .collect()
}

/// The mount points at or below these directories, the last mounted first.
fn mounts<'a>(directories: impl IntoIterator<Item = &'a Path>) -> Result<Vec<PathBuf>> {
    let directories: Vec<&Path> = directories.into_iter().collect();
    let table = fs::read_to_string("/proc/self/mountinfo").context("read the mounts")?;
    let points = table
        .lines()
        .rev()
        .filter_map(|line| line.split(' ').nth(4));
    let points = points.map(PathBuf::from);
    Ok(points
        .filter(|point| directories.iter().any(|above| point.starts_with(above)))
        .collect())
}
