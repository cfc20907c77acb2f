//! A cgroup that this process moves into, removed on drop.

use std::{
    fs,
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context as _, Result, bail};

/// Mount point on common distributions; the init of the test kernels mounts it here too.
const MOUNT: &str = "/sys/fs/cgroup";

/// This process is in it until drop.
pub struct ControlGroup {
    directory: PathBuf,
    parent: PathBuf,
    /// cgroup v1: one hierarchy per controller.
    pub is_v1: bool,
}

impl ControlGroup {
    /// Creates a child of our cgroup with this controller and moves this process into it. The error says why that is not
    /// possible here.
    pub fn enter(controller: &str) -> Result<Self> {
        let v1 = Path::new(MOUNT).join(controller);
        let is_v1 = v1.join("cgroup.procs").is_file();
        let parent = if is_v1 {
            v1.join(own_path(|names| {
                names.split(',').any(|name| name == controller)
            })?)
        } else {
            let v2 = Path::new(MOUNT).join(own_path(str::is_empty)?);
            let offered = fs::read_to_string(v2.join("cgroup.controllers"));
            let offered = offered.context("no cgroups are mounted")?;
            if !offered.split_whitespace().any(|name| name == controller) {
                bail!("cgroup v2 offers no {controller} controller");
            }
            write(
                &v2.join("cgroup.subtree_control"),
                &format!("+{controller}"),
            )?;
            v2
        };
        let directory = parent.join(format!("tailback-accuracy-{}", process::id()));
        fs::create_dir(&directory).with_context(|| format!("create {}", directory.display()))?;
        let group = Self {
            directory,
            parent,
            is_v1,
        };
        write(&group.file("cgroup.procs"), "0")?;
        Ok(group)
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub fn name(&self) -> String {
        let name = self.directory.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        let _ = fs::write(self.parent.join("cgroup.procs"), "0");
        let _ = fs::remove_dir(&self.directory);
    }
}

/// Path of our cgroup in the hierarchy with these controllers (cgroups(7)), without the leading slash.
fn own_path(is_it: impl Fn(&str) -> bool) -> Result<String> {
    let text = fs::read_to_string("/proc/self/cgroup").context("read /proc/self/cgroup")?;
    let path = text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        is_it(fields.next()?).then(|| fields.next())?
    });
    let path = path.context("this process is in no such cgroup")?;
    Ok(path.trim_start_matches('/').to_owned())
}

pub fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("write {text:?} to {}", file.display()))
}
