//! Writes that must reach a slow disk.

use std::{
    fs::{self, File},
    path::PathBuf,
};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{fstat, major, minor};
use tailback_tests::{
    redis::Redis,
    uwsgi::{App, Uwsgi},
    wait,
};

use crate::{
    play::{Culprit, Play},
    programs::{DEADLINE, app, load},
};

/// A control group whose writes to the disk of the temporary directory can be throttled.
struct DiskGroup {
    path: PathBuf,
    device: String,
}

impl DiskGroup {
    fn new() -> Result<Self> {
        let path = PathBuf::from(format!(
            "/sys/fs/cgroup/blkio/tailback-disk-{}",
            std::process::id()
        ));
        fs::create_dir(&path)
            .with_context(|| format!("create {} (control groups version 1)", path.display()))?;
        let directory = std::env::temp_dir();
        let device = fstat(File::open(&directory)?).context("fstat")?.st_dev;
        let device = format!("{}:{}", major(device), minor(device));
        let group = Self { path, device };
        ensure!(
            !group.device.starts_with("0:"),
            "{} is not on a block device",
            directory.display()
        );
        Ok(group)
    }

    /// 0: unlimited.
    fn allow_writes(&self, per_s: u32) -> Result<()> {
        let path = self.path.join("blkio.throttle.write_iops_device");
        fs::write(&path, format!("{} {per_s}", self.device))
            .with_context(|| format!("write {}", path.display()))
    }
}

impl Drop for DiskGroup {
    fn drop(&mut self) {
        let gone = wait::until("the control group to be empty", DEADLINE, || {
            Ok(fs::remove_dir(&self.path).ok())
        });
        if let Err(error) = gone {
            eprintln!("warning: {error}");
        }
    }
}

/// Redis acknowledges a write only once it is on disk, and the disk takes a few writes a second.
pub fn fsync(play: &mut Play) -> Result<()> {
    let group = DiskGroup::new()?;
    let procs = group.path.join("cgroup.procs").display().to_string();
    let redis = Redis::start_with(|words| {
        words.extend(["--appendonly", "yes", "--appendfsync", "always"].map(str::to_owned));
        let enter = "echo $$ >\"$1\" && shift && exec \"$@\"";
        let before = ["sh", "-c", enter, "sh", &procs].map(str::to_owned);
        words.splice(0..0, before);
    })?;
    let uwsgi = Uwsgi::start_app(&App {
        env: vec![
            ("APP_REDIS_PORT", redis.port().to_string()),
            ("APP_REDIS_COMMAND", "SET greeting hello".to_owned()),
        ],
        ..app(8, 400)
    })?;
    let load = load(uwsgi.address(), "/ask/1/sleep/10", 20.0)?;
    play.watch_pid(redis.process().pid())?;
    play.healthy()?;
    play.planted(
        Culprit::process(redis.process().pid())
            .or("appendonly")
            .or(&group.device),
    );
    group.allow_writes(1)?;
    let held = play.hold();
    play.removing(Some(&load));
    group.allow_writes(0)?;
    held?;
    play.recover()
}
