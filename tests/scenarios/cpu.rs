//! The CPU is not there: others have it, a quota is used up, or the service's own work is too much.
//!
//! All on one CPU, in control groups of their own, so that what else the machine does changes nothing.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use tailback_tests::{
    container::Container,
    process::Process,
    program,
    uwsgi::{App, Uwsgi},
    wait,
};

use crate::{
    lock,
    play::{Culprit, Play},
    programs::{SOON, app, family, load, uwsgi_is_full, with_children},
};

const MOUNT: &str = "/sys/fs/cgroup/cpu";
/// More than what everybody else has (`cpu.shares`, 1,024 each) together.
pub const MOST: &str = "50000";

/// A control group with the CPU controller; it goes with its owner, after those in it.
pub struct CpuGroup(PathBuf);

impl CpuGroup {
    pub fn new(name: &str, shares: &str) -> Result<Self> {
        let mount = Path::new(MOUNT);
        ensure!(
            mount.join("cpu.shares").exists(),
            "the CPU controller of control groups version 1 is wanted at {}",
            mount.display()
        );
        let path = mount.join(format!("tailback-{name}-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        let group = Self(path);
        group.write("cpu.shares", shares)?;
        Ok(group)
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.0.join(file);
        fs::write(&path, text).with_context(|| format!("write {text:?} to {}", path.display()))
    }

    fn take_in_us(&self) -> Result<()> {
        self.write("cgroup.procs", &std::process::id().to_string())
    }

    fn name(&self) -> String {
        let name = self.0.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// Starts what follows inside, on one CPU.
    pub fn before(&self) -> Vec<String> {
        let procs = self.0.join("cgroup.procs").display().to_string();
        let enter = "echo $$ >\"$1\" && shift && exec taskset -c 1 \"$@\"";
        ["sh", "-c", enter, "sh", &procs].map(str::to_owned).into()
    }
}

impl Drop for CpuGroup {
    fn drop(&mut self) {
        let gone = wait::until("the control group to be empty", SOON, || {
            Ok(fs::remove_dir(&self.0).ok())
        });
        if let Err(error) = gone {
            eprintln!("warning: {error}");
        }
    }
}

/// While it lives, we and the servers that we start come before what else the machine computes: a build beside the
/// scenarios must not become an incident of its own. Best effort.
pub struct Ahead {
    group: CpuGroup,
    /// Where we were.
    back: PathBuf,
}

impl Ahead {
    pub fn of_others() -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        // 4:cpu,cpuacct:/user.slice
        let back = own.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            let has_cpu = controllers.split(',').any(|one| one == "cpu");
            has_cpu.then(|| Path::new(MOUNT).join(path.trim_start_matches('/')))
        })?;
        let group = CpuGroup::new("scenario", MOST).ok()?;
        let ahead = Self { group, back };
        ahead.group.take_in_us().ok()?;
        Some(ahead)
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        let procs = self.back.join("cgroup.procs");
        if let Err(error) = fs::write(&procs, std::process::id().to_string()) {
            eprintln!("warning: write {}: {error}", procs.display());
        }
    }
}

/// Somebody else's computation comes to the service's CPU.
pub fn neighbour(play: &mut Play) -> Result<()> {
    let own = CpuGroup::new("service", "1024")?;
    let other = CpuGroup::new("neighbour", MOST)?;
    let uwsgi = Uwsgi::start_app(&App {
        before: own.before(),
        ..app(2, 200)
    })?;
    let load = load(uwsgi.address(), "/compute/15", 20.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.own_words(uwsgi.process().lines(), uwsgi_is_full);
    play.healthy()?;
    let mut words = other.before();
    words.extend(
        [
            &program::need(&["stress-ng"])?.display().to_string(),
            "--cpu",
            "1",
        ]
        .map(ToString::to_string),
    );
    let stress = Process::start("stress-ng", Command::new(&words[0]).args(&words[1..]))?;
    play.planted(
        Culprit::process(stress.pid())
            .or(&other.name())
            .or("stress-ng"),
    );
    play.hold()?;
    play.removing(Some(&load));
    drop(stress);
    load.set_rate(10.0)?;
    play.recover()
}

/// Its group may use a tenth of a CPU from now on.
pub fn quota(play: &mut Play) -> Result<()> {
    let own = CpuGroup::new("service", MOST)?;
    let uwsgi = Uwsgi::start_app(&App {
        before: own.before(),
        ..app(2, 200)
    })?;
    let load = load(uwsgi.address(), "/compute/15", 20.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.own_words(uwsgi.process().lines(), uwsgi_is_full);
    play.healthy()?;
    let family = family(&uwsgi)?;
    play.planted(Culprit::default().and(family).or(&own.name()).or("quota"));
    own.write("cpu.cfs_quota_us", "10000")?;
    play.hold()?;
    play.removing(Some(&load));
    own.write("cpu.cfs_quota_us", "-1")?;
    load.set_rate(10.0)?;
    play.recover()
}

/// The same in a container: it may use a CPU, and from now on a tenth of one.
pub fn quota_of_container(play: &mut Play) -> Result<()> {
    let container = Container::new()?;
    let temp = env::temp_dir().display().to_string();
    // Its application lies in a folder of ours, and its callers come over the loopback of our network namespace.
    let options = [
        "--network=host",
        "--cpus",
        "1",
        "--volume",
        &format!("{temp}:{temp}:ro"),
    ];
    let uwsgi = Uwsgi::start_app(&App {
        before: container.before(&options)?,
        ..app(2, 200)
    })?;
    container.set_cpu_shares(MOST)?;
    let load = load(uwsgi.address(), "/compute/15", 20.0)?;
    let pid = container.pid()?;
    play.watch_pid(pid)?;
    play.own_words(uwsgi.process().lines(), uwsgi_is_full);
    play.healthy()?;
    let family = with_children(pid)?;
    play.planted(Culprit::default().and(family).or(&container.id()?));
    container.set_cpus(0.1)?;
    play.hold()?;
    play.removing(Some(&load));
    container.set_cpus(1.0)?;
    load.set_rate(10.0)?;
    play.recover()
}

/// Each request computes for much longer than before: its own threads are more than the CPU can carry.
pub fn own_threads(play: &mut Play) -> Result<()> {
    let own = CpuGroup::new("service", MOST)?;
    let before = own.before();
    let before: Vec<&str> = before.iter().map(String::as_str).collect();
    let (server, address) = lock::convoy("heavy", 16, &before)?;
    let load = load(address, "/", 20.0)?;
    let culprit = Culprit::process(server.pid()).or("convoy");
    lock::trouble(play, &server, &load, culprit)
}
