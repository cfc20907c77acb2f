//! The container image, as podman runs it: without a writable file system, without a way to new privileges, with little memory and
//! CPU, and with what the seccomp profile of containerd allows.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tailback_tests::{
    needs,
    process::{End, Process},
    program,
    temp::TempDir,
    wait,
};

use crate::{DEADLINE, allowed, json_lines};

/// podman's own profile, which forbids bpf(2) without CAP_SYS_ADMIN.
const PODMAN_PROFILES: [&str; 2] = [
    "/usr/share/containers/seccomp.json",
    "/etc/containers/seccomp.json",
];
/// What the image is specified to start with: 50 millicores and 64 MiB, within 10 s.
const SMALL: [&str; 3] = ["--cpus=0.05", "--memory=64m", "--memory-swap=64m"];
const START_TIME: Duration = Duration::from_secs(10);
/// Starts of which the shortest counts.
const START_ATTEMPTS: u32 = 3;
const ADDED: &str = "--cap-add=BPF,PERFMON,SYS_PTRACE,DAC_READ_SEARCH";
/// podman gives added capabilities to any user; Kubernetes to root only. So the tests of another user start as root, and become that
/// user by the machine's setpriv(1), which takes its loader and libraries along.
const USR: &str = "--volume=/usr:/machine/usr:ro";
const LOADER: &str = "/machine/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";
const LIBRARIES: &str = "/machine/usr/lib/x86_64-linux-gnu";
const SETPRIV: [&str; 3] = ["--library-path", LIBRARIES, "/machine/usr/bin/setpriv"];
const BECOME: [&str; 4] = [
    "--reuid=65532",
    "--regid=65532",
    "--clear-groups",
    "--inh-caps=-all",
];

/// The image, loaded once per test process.
fn image() -> Result<&'static str> {
    static IMAGE: OnceLock<Result<String, String>> = OnceLock::new();
    let load = || -> Result<String> {
        let archive = env::var_os("TAILBACK_IMAGE")
            .map(PathBuf::from)
            .context("TAILBACK_IMAGE is not set: `cargo xtask test` makes the image")?;
        // The tests of this file start at the same time, each in a process of its own: they load it one after the other.
        let lock = fs::File::open(&archive)?;
        lock.lock()?;
        let mut podman = Command::new(program::need(&["podman"])?);
        let output = podman
            .args(["load", "--quiet", "--input"])
            .arg(&archive)
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "podman load: {error}");
        let name = text.trim().rsplit(' ').next().unwrap_or_default();
        Ok(name.to_owned())
    };
    match IMAGE.get_or_init(|| load().map_err(|error| format!("{error:#}"))) {
        Ok(name) => Ok(name),
        Err(error) => bail!("{error}"),
    }
}

/// podman's profile with the two rules that containerd's has in addition: bpf(2) with CAP_BPF, perf_event_open(2) with CAP_PERFMON.
fn profile(directory: &TempDir) -> Result<PathBuf> {
    let found = PODMAN_PROFILES
        .iter()
        .find(|path| Path::new(path).is_file());
    let text = fs::read_to_string(found.context("podman has no seccomp profile")?)?;
    let mut profile: Value = serde_json::from_str(&text)?;
    let rules = profile["syscalls"].as_array_mut().context("no rules")?;
    // An earlier rule that denies them would win.
    for rule in rules.iter_mut() {
        if let Some(names) = rule["names"].as_array_mut() {
            names.retain(|name| name != "bpf" && name != "perf_event_open");
        }
    }
    for (name, capability) in [("bpf", "CAP_BPF"), ("perf_event_open", "CAP_PERFMON")] {
        rules.push(json!({
            "names": [name], "action": "SCMP_ACT_ALLOW", "args": [],
            "includes": {"caps": [capability]}, "excludes": {},
        }));
    }
    directory.write("seccomp.json", &profile.to_string())
}

/// A container of the image. Removed on drop.
struct Run {
    process: Process,
    name: String,
    _directory: TempDir,
}

impl Run {
    fn start(options: &[&str], arguments: &[&str]) -> Result<Self> {
        let directory = TempDir::new("image")?;
        let profile = profile(&directory)?;
        let name = directory.path().file_name().unwrap_or_default();
        let name = name.to_string_lossy().into_owned();
        let mut command = Command::new(program::need(&["podman"])?);
        command.args(["--runtime", "runc", "--cgroup-manager=cgroupfs"]);
        command.args([
            "run",
            "--rm",
            "--name",
            &name,
            "--read-only",
            "--read-only-tmpfs=false",
        ]);
        command.args(["--pid=host", "--network=host", "--cap-drop=ALL"]);
        // As an emptyDir: every user may write there.
        let pages = directory.path().join("run");
        fs::create_dir(&pages)?;
        fs::set_permissions(&pages, fs::Permissions::from_mode(0o777))?;
        command.arg(format!("--volume={}:/run/tailback", pages.display()));
        command.arg("--timeout=120");
        command.args(["--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000"]);
        command.arg(format!("--security-opt=seccomp={}", profile.display()));
        command.args(options).arg(image()?).args(arguments);
        Self::of(command, name, directory)
    }

    /// As Kubernetes starts it for user 65532; with `more` options of setpriv(1).
    fn start_as_other(options: &[&str], more: &[&str], arguments: &[&str]) -> Result<Self> {
        let entry = format!("--entrypoint={LOADER}");
        let with = [USR, "--user=0", "--cap-add=SETUID,SETGID", &entry];
        let options = [options, &with].concat();
        // The first keeps the capabilities of root, which the second loses when it is started.
        let first = [&SETPRIV[..], &BECOME].concat();
        let second = [&[LOADER], &SETPRIV[..], &["--inh-caps=-all"], more].concat();
        let arguments = [&first, &second, &["/usr/bin/tailback"][..], arguments].concat();
        Self::start(&options, &arguments)
    }

    fn of(mut command: Command, name: String, directory: TempDir) -> Result<Self> {
        Ok(Self {
            process: Process::start("the image", &mut command)?,
            name,
            _directory: directory,
        })
    }

    /// When podman has started the container, which may take long on a busy machine, since 1970.
    fn started(&self) -> Result<Duration> {
        let mut podman = Command::new(program::need(&["podman"])?);
        let format = "--format={{.State.StartedAt.UnixNano}}";
        let output = podman.args(["inspect", format, &self.name]).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(Duration::from_nanos(text.trim().parse().context("a time")?))
    }

    /// Runs the program of the image once more inside, as the user of the image.
    fn exec(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program::need(&["podman"])?);
        command.args([
            "exec",
            "--user=65532:65532",
            &self.name,
            "/usr/bin/tailback",
        ]);
        command.args(arguments);
        let output = command.output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{arguments:?}: {error}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Returns when it came, since 1970.
    fn wait_first_sample(&self) -> Result<Duration> {
        let is_report = |text: &str| {
            serde_json::from_str::<Value>(text).is_ok_and(|line| line["type"] == "target")
        };
        let what = "the first sample";
        let lines = self.process.lines();
        let waited = lines.wait(what, 0, DEADLINE, |line| {
            is_report(&line.text).then_some(Duration::from_nanos(line.unix_ns))
        });
        waited.with_context(|| {
            let lines: Vec<String> = lines.all().into_iter().map(|line| line.text).collect();
            lines.join("\n")
        })
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if let Ok(podman) = program::need(&["podman"]) {
            let mut command = Command::new(podman);
            let _ = command
                .args(["rm", "--force", "--time=0", "--ignore", &self.name])
                .output();
        }
    }
}

#[test]
fn the_image_runs_as_another_user_by_its_file_capabilities() -> Result<()> {
    const TEST: &str = "the_image_runs_as_another_user_by_its_file_capabilities";
    if !allowed(TEST) || !needs::met(TEST, &["setpriv"]) {
        return Ok(());
    }
    let arguments = ["run", "--all", "--json"];
    let options = [&[ADDED], &SMALL[..]].concat();
    let start = || -> Result<(Run, Duration)> {
        let run = Run::start_as_other(&options, &[], &arguments)?;
        let took = run.wait_first_sample()?.saturating_sub(run.started()?);
        eprintln!("the first sample came after {took:?}");
        Ok((run, took))
    };
    // Tests beside this one take caches and memory bandwidth, and start processes that are read: that only adds to the CPU time of a
    // start. So the shortest of a few counts.
    let (mut run, mut took) = start()?;
    for _ in 1..START_ATTEMPTS {
        if took < START_TIME {
            break;
        }
        drop(run);
        (run, took) = start()?;
    }
    ensure!(took < START_TIME, "{took:?}");
    // With its CPU limit, the agent may not reply within 2 s.
    wait::until_ok("the status", DEADLINE, || {
        let status = run.exec(&["status"])?;
        ensure!(status.contains("/run/tailback"), "{status}");
        Ok(())
    })?;
    run.process.check_running()
}

#[test]
fn the_image_runs_as_root_without_new_privileges() -> Result<()> {
    if !allowed("the_image_runs_as_root_without_new_privileges") {
        return Ok(());
    }
    let directory = TempDir::new("config")?;
    let port = tailback_tests::ports::free()?;
    let text = format!("[signal.http]\nlisten = \"127.0.0.1:{port}\"\n");
    let config = directory.write("tailback.toml", &text)?;
    let volume = format!(
        "--volume={}:/etc/tailback/tailback.toml:ro",
        config.display()
    );
    let options = [
        ADDED,
        "--cap-add=SETUID,KILL",
        "--user=0",
        "--security-opt=no-new-privileges",
        &volume,
    ];
    let arguments = [
        "run",
        "--all",
        "--json",
        "--config",
        "/etc/tailback/tailback.toml",
    ];
    let run = Run::start(&options, &arguments)?;
    run.wait_first_sample()?;
    let at = tailback_tests::ports::local(port);
    wait::until("the adapter process", DEADLINE, || {
        let reply = tailback_tests::http::get(at, "/livez", Duration::from_secs(5));
        Ok(reply.is_ok_and(|reply| reply.status == 200).then_some(()))
    })
}

#[test]
fn without_a_way_to_its_capabilities_the_image_names_both_ways_out() -> Result<()> {
    const TEST: &str = "without_a_way_to_its_capabilities_the_image_names_both_ways_out";
    if !allowed(TEST) || !needs::met(TEST, &["setpriv"]) {
        return Ok(());
    }
    let run = Run::start_as_other(&[ADDED], &["--no-new-privs"], &["run", "--all"])?;
    let end = run.process.wait_end(DEADLINE)?;
    ensure!(end == End::Code(3), "{end:?}");
    run.process.wait_line("missing CAP_BPF", DEADLINE)?;
    for way in ["allowPrivilegeEscalation: true", "runAsUser: 0"] {
        run.process.wait_line(way, DEADLINE)?;
    }
    // Without any capability, it also starts and says so.
    let run = Run::start_as_other(&[], &[], &["doctor", "--json"])?;
    let checks = json_lines(&run.process)?.1;
    let line = checks.iter().find(|check| check["name"] == "capabilities");
    ensure!(
        line.is_some_and(|line| line["state"] == "failed"),
        "{checks:#?}"
    );
    Ok(())
}
