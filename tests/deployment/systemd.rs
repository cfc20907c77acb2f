//! The unit in deploy/systemd, started by a real systemd in a container; and the protocol by which the agent reports to it.

use std::{
    fs,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use tailback_tests::{
    agent::{self, Agent},
    container::Container,
    needs,
    process::Process,
    program,
    skip::skip,
    temp::TempDir,
    wait,
};

use crate::{DEADLINE, allowed};

const UNIT: &str = include_str!("../../deploy/systemd/tailback.service");
const CONFIG: &str = include_str!("../../deploy/systemd/tailback.toml");
/// Nothing but the unit is started.
const TARGET: &str = "[Unit]\nDescription=test\nWants=tailback.service\nAfter=tailback.service\n";
const SYSTEMD: &str = "/usr/lib/systemd/systemd";

/// The socket of a service manager.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    _directory: TempDir,
}

impl Manager {
    fn new() -> Result<Self> {
        let directory = TempDir::new("notify")?;
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path)?;
        Ok(Self {
            socket,
            path,
            _directory: directory,
        })
    }

    fn agent(&self, config: &Path, watchdog: Duration) -> Result<Agent> {
        let mut command = Command::new(agent::binary()?);
        command
            .args(["run", "--json", "--all", "--config"])
            .arg(config);
        command.env("NOTIFY_SOCKET", &self.path);
        command.env("WATCHDOG_USEC", watchdog.as_micros().to_string());
        Agent::start(&mut command)
    }

    /// The fields of the next message; `None` if there is none within this time.
    fn next(&self, within: Duration) -> Result<Option<Vec<String>>> {
        self.socket.set_read_timeout(Some(within))?;
        let mut message = [0; 4_096];
        match self.socket.recv(&mut message) {
            Ok(length) => {
                let text = String::from_utf8_lossy(&message[..length]);
                Ok(Some(text.lines().map(str::to_owned).collect()))
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads messages until one has this field.
    fn wait(&self, field: &str) -> Result<Vec<String>> {
        let end = Instant::now() + DEADLINE;
        while let Some(fields) = self.next(end.saturating_duration_since(Instant::now()))? {
            if fields.iter().any(|it| it.starts_with(field)) {
                return Ok(fields);
            }
        }
        bail!("no message with {field}")
    }
}

#[test]
fn the_service_manager_learns_when_the_agent_is_ready_alive_reloaded_and_stopping() -> Result<()> {
    const TEST: &str =
        "the_service_manager_learns_when_the_agent_is_ready_alive_reloaded_and_stopping";
    if !agent_runs(TEST) {
        return Ok(());
    }
    let manager = Manager::new()?;
    let directory = TempDir::new("config")?;
    let config = directory.write("tailback.toml", "")?;
    let agent = manager.agent(&config, Duration::from_secs(1))?;
    let ready = manager.wait("READY=1")?;
    // Its pages are there before it says so.
    ensure!(agent.run_directory().join("agent.page").is_file());
    ensure!(
        ready.iter().any(|field| field.starts_with("STATUS=")),
        "{ready:?}"
    );
    // A sign of life every half of the second.
    let began = Instant::now();
    for _ in 0..4 {
        manager.wait("WATCHDOG=1")?;
    }
    ensure!(
        began.elapsed() > Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );

    // A valid file, and a bad one: both reloads end.
    for (text, status) in [
        ("interval = \"200ms\"\n", "STATUS=configuration reloaded"),
        ("nonsense\n", "STATUS=configuration rejected: line 1"),
    ] {
        fs::write(&config, text)?;
        agent.process().signal(Signal::HUP)?;
        // The agent polls the file, too: it may have loaded the former one twice.
        let reloading = manager.wait(status)?;
        let has = |start: &str| reloading.iter().any(|field| field.starts_with(start));
        ensure!(
            has("RELOADING=1") && has("MONOTONIC_USEC="),
            "{reloading:?}"
        );
        manager.wait("READY=1")?;
    }

    // No sign of life while it takes no samples.
    agent.process().freeze()?;
    while manager.next(Duration::from_millis(10))?.is_some() {}
    let silence = manager.next(Duration::from_secs(2))?;
    ensure!(silence.is_none(), "{silence:?}");
    agent.process().thaw()?;
    manager.wait("WATCHDOG=1")?;
    agent.process().signal(Signal::TERM)?;
    manager.wait("STOPPING=1")?;
    Ok(())
}

/// Whether this machine can run an agent.
fn agent_runs(test: &str) -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    skip(test, "loading eBPF programs needs root");
    false
}

/// A container whose first process is systemd, with the unit.
struct Machine {
    _process: Process,
    container: Container,
}

impl Machine {
    fn start() -> Result<Self> {
        let container = Container::new()?;
        let root = container.root();
        let units = root.join("etc/systemd/system");
        for directory in [
            "etc/systemd/system",
            "etc/tailback",
            "usr/local",
            "var",
            "root",
        ] {
            fs::create_dir_all(root.join(directory))?;
        }
        program::copy(&agent::binary()?, &root.join("tailback"))?;
        let unit = UNIT
            .replace("/usr/bin/tailback", "/tailback")
            .replace("WatchdogSec=30", "WatchdogSec=10");
        fs::write(units.join("tailback.service"), unit)?;
        fs::write(units.join("default.target"), TARGET)?;
        fs::write(root.join("etc/tailback/tailback.toml"), CONFIG)?;
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
        )?;
        fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
        fs::write(root.join("etc/machine-id"), "")?;
        let before = container.before_without_etc(&[
            "--network=host",
            "--systemd=always",
            "--security-opt=seccomp=unconfined",
            "--security-opt=unmask=ALL",
            "--cap-add=ALL",
            "--cap-drop=SYS_RESOURCE",
            "--cgroupns=private",
        ])?;
        let mut command = Command::new(&before[0]);
        command
            .args(&before[1..])
            .args([SYSTEMD, "--log-target=console"]);
        let process = Process::start("systemd", &mut command)?;
        Ok(Self {
            _process: process,
            container,
        })
    }

    /// Runs systemctl inside. The error has its output.
    fn systemctl(&self, args: &[&str]) -> Result<String> {
        let args = [&["systemctl"], args].concat();
        self.container.exec(&args)
    }

    fn property(&self, name: &str) -> Result<String> {
        self.systemctl(&["show", "--property", name, "--value", "tailback.service"])
    }

    fn wait_property(&self, name: &str, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let what = format!("the unit's {name}");
        let found = wait::until(&what, DEADLINE, || {
            // Fails until systemd listens.
            let value = self.property(name).unwrap_or_default();
            Ok(wanted(&value).then_some(value))
        });
        found.with_context(|| {
            self.systemctl(&["status", "tailback.service"])
                .unwrap_or_default()
        })
    }
}

#[test]
fn a_real_systemd_starts_reloads_and_restarts_the_unit() -> Result<()> {
    const TEST: &str = "a_real_systemd_starts_reloads_and_restarts_the_unit";
    if !allowed(TEST) {
        return Ok(());
    }
    if !Path::new(SYSTEMD).is_file() {
        skip(TEST, "systemd is not installed");
        return Ok(());
    }
    let machine = Machine::start()?;
    machine.wait_property("ActiveState", |state| state == "active")?;
    machine.wait_property("StatusText", |text| text.contains("services watched"))?;
    let heartbeat = machine.container.exec(&["ls", "/run/tailback/agent.page"]);
    ensure!(heartbeat.is_ok(), "{heartbeat:?}");

    // The next status replaces this one after 5 s: on a busy machine the question may come later.
    wait::until("the reload in the status", DEADLINE, || {
        machine.systemctl(&["reload", "tailback.service"])?;
        let is_reloaded = machine.property("StatusText")? == "configuration reloaded";
        Ok(is_reloaded.then_some(()))
    })?;
    let pid = machine.property("MainPID")?;

    // One that hangs is killed and started again.
    machine.container.exec(&["kill", "-STOP", &pid])?;
    let next = machine.wait_property("MainPID", |next| next != "0" && next != pid)?;
    ensure!(next != pid);
    machine.wait_property("ActiveState", |state| state == "active")?;
    machine.systemctl(&["stop", "tailback.service"])?;
    machine.wait_property("ActiveState", |state| state == "inactive")?;
    ensure!(machine.property("Result")? == "success", "the stopped unit");
    Ok(())
}

#[test]
fn the_unit_is_valid_and_its_exposure_is_the_documented_one() -> Result<()> {
    const TEST: &str = "the_unit_is_valid_and_its_exposure_is_the_documented_one";
    if !needs::met(TEST, &["systemd-analyze"]) {
        return Ok(());
    }
    let directory = TempDir::new("unit")?;
    let unit = UNIT.replace("/usr/bin/tailback", "/bin/true");
    let file = directory.write("tailback.service", &unit)?;
    let analyze = |args: &[&str]| -> Result<String> {
        let mut command = Command::new(program::need(&["systemd-analyze"])?);
        let output = command.args(args).arg(&file).output()?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        ensure!(output.status.success(), "systemd-analyze {args:?}: {text}");
        Ok(text)
    };
    let complaints = analyze(&["verify"])?;
    ensure!(!complaints.contains("tailback.service"), "{complaints}");
    let security = analyze(&["security", "--offline=true"])?;
    let line = security
        .lines()
        .find(|line| line.contains("Overall exposure"));
    let line = line.with_context(|| security.clone())?;
    let level = line
        .split_whitespace()
        .find_map(|word| word.parse::<f64>().ok());
    let level = level.with_context(|| line.to_owned())?;
    // docs/guides/systemd.md states it; other versions of systemd weigh a little differently.
    ensure!(level < 3.5, "{line}");
    Ok(())
}
