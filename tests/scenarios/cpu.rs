//! CPU shortage: another process has it, a quota is exhausted, or the service itself needs too much.
//!
//! Everything runs on one CPU in its own control groups, so that other load on the machine has no effect.

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
    programs::{DEADLINE, app, family, load, uwsgi_is_full, with_children},
};

const MOUNT: &str = "/sys/fs/cgroup/cpu";
/// `cpu.shares` above those of all other groups together (1,024 each).
pub const HIGH_CPU_SHARES: &str = "50000";

/// A control group with the CPU controller. Dropping it removes the group, after the processes in it have ended.
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

    /// Moves the command that is started next into the group, on one CPU.
    pub fn before(&self) -> Vec<String> {
        let procs = self.0.join("cgroup.procs").display().to_string();
        let enter = "echo $$ >\"$1\" && shift && exec taskset -c 1 \"$@\"";
        ["sh", "-c", enter, "sh", &procs].map(str::to_owned).into()
    }
}

impl Drop for CpuGroup {
    fn drop(&mut self) {
        let gone = wait::until("the control group to be empty", DEADLINE, || {
            Ok(fs::remove_dir(&self.0).ok())
        });
        if let Err(error) = gone {
            eprintln!("warning: {error}");
        }
    }
}

/// While it lives, this process and the servers it starts have priority over other load, so that a build beside the
/// scenarios does not become an incident. Best effort.
pub struct RaisedPriority {
    group: CpuGroup,
    /// The previous group of this process.
    back: PathBuf,
}

impl RaisedPriority {
    pub fn of_others() -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        // 4:cpu,cpuacct:/user.slice
        let back = own.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            let has_cpu = controllers.split(',').any(|one| one == "cpu");
            has_cpu.then(|| Path::new(MOUNT).join(path.trim_start_matches('/')))
        })?;
        let group = CpuGroup::new("scenario", HIGH_CPU_SHARES).ok()?;
        let ahead = Self { group, back };
        ahead.group.take_in_us().ok()?;
        Some(ahead)
    }
}

impl Drop for RaisedPriority {
    fn drop(&mut self) {
        let procs = self.back.join("cgroup.procs");
        if let Err(error) = fs::write(&procs, std::process::id().to_string()) {
            eprintln!("warning: write {}: {error}", procs.display());
        }
    }
}

/// A process that computes on the service's CPU, in this group.
fn stress(group: &CpuGroup) -> Result<Process> {
    let mut words = group.before();
    words.push(program::need(&["stress-ng"])?.display().to_string());
    words.extend(["--cpu", "1"].map(str::to_owned));
    Process::start("stress-ng", Command::new(&words[0]).args(&words[1..]))
}

/// A neighbour starts to compute on the service's CPU.
pub fn neighbour(play: &mut Play) -> Result<()> {
    let own = CpuGroup::new("service", "1024")?;
    let other = CpuGroup::new("neighbour", HIGH_CPU_SHARES)?;
    let uwsgi = Uwsgi::start_app(&App {
        before: own.before(),
        ..app(2, 200)
    })?;
    let load = load(uwsgi.address(), "/compute/15", 20.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.watch_own_messages(uwsgi.process().lines(), uwsgi_is_full);
    play.healthy()?;
    let stress = stress(&other)?;
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

/// The same, while another process computes on another CPU. That one uses more CPU time than the neighbour, and only hooks can see
/// which of the two the workers wait for.
pub fn neighbour_of_workers(play: &mut Play) -> Result<()> {
    let own = CpuGroup::new("service", "1024")?;
    let other = CpuGroup::new("neighbour", "1024")?;
    let daemon = "exec taskset -c 0 sh -c 'while :; do :; done'";
    let uwsgi = Uwsgi::start_app(&App {
        before: own.before(),
        args: vec!["--attach-daemon".to_owned(), daemon.to_owned()],
        ..app(2, 200)
    })?;
    let load = load(uwsgi.address(), "/compute/15", 30.0)?;
    let pid = uwsgi.process().pid().to_string();
    play.watch(&["--pid", &pid, "--tier", "watch"])?;
    play.watch_own_messages(uwsgi.process().lines(), uwsgi_is_full);
    play.healthy()?;
    let stress = stress(&other)?;
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

/// The group's quota drops to a tenth of a CPU.
pub fn quota(play: &mut Play) -> Result<()> {
    let own = CpuGroup::new("service", HIGH_CPU_SHARES)?;
    let uwsgi = Uwsgi::start_app(&App {
        before: own.before(),
        ..app(2, 200)
    })?;
    let load = load(uwsgi.address(), "/compute/15", 20.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.watch_own_messages(uwsgi.process().lines(), uwsgi_is_full);
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

/// The same in a container: the quota drops from one CPU to a tenth.
pub fn quota_of_container(play: &mut Play) -> Result<()> {
    let container = Container::new()?;
    let temp = env::temp_dir().display().to_string();
    // The application is mounted from a directory of the test; callers use the loopback of the test's network namespace.
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
    container.set_cpu_shares(HIGH_CPU_SHARES)?;
    let load = load(uwsgi.address(), "/compute/15", 20.0)?;
    let pid = container.pid()?;
    play.watch_pid(pid)?;
    play.watch_own_messages(uwsgi.process().lines(), uwsgi_is_full);
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

/// Each request computes much longer than before: the service's own threads overload the CPU.
pub fn own_threads(play: &mut Play) -> Result<()> {
    let own = CpuGroup::new("service", HIGH_CPU_SHARES)?;
    let before = own.before();
    let before: Vec<&str> = before.iter().map(String::as_str).collect();
    let (server, address) = lock::convoy("heavy", 16, &before)?;
    let load = load(address, "/", 20.0)?;
    let culprit = Culprit::process(server.pid()).or("convoy");
    lock::trouble(play, &server, &load, culprit)
}
