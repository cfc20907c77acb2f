//! Pages: location, delay, and lifetime.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tailback_page::Page;
use tailback_tests::{
    agent::Agent,
    container::{Container, PodLink},
    needs, ports,
    process::{End, Process},
    program,
    skip::skip,
    temp::TempDir,
    wait,
};

use crate::{
    readers::{readers, run},
    stage::{DEADLINE, KillAdapterProcess, LONG_TTL, Stage, agent_check, get, jam},
};

#[test]
fn a_level_change_is_on_the_page_within_one_sampling_interval() -> Result<()> {
    const TEST: &str = "a_level_change_is_on_the_page_within_one_sampling_interval";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let address = format!("127.0.0.1:{}", ports::free()?);
    let idle = jam(&address, 0)?;
    let stage = Stage::start(idle.address().port(), "")?;
    drop(idle);
    // On a busy machine the agent or this reader may be held up, but not eight times in a row.
    for _ in 0..8 {
        let delay_ms = level_delay_ms(&stage, &address)?;
        println!("on the page {delay_ms:.1} ms after the sample");
        if (-1.0..100.0).contains(&delay_ms) {
            return Ok(());
        }
        stage.wait("no level without the service", |pressure| {
            pressure.level == 0
        })?;
    }
    bail!("no level change was on the page within 100 ms")
}

/// Fills the queue of a service. Returns the time from the sample in which its level changes until the page shows it, ms.
fn level_delay_ms(stage: &Stage, address: &str) -> Result<f64> {
    let mark = stage.agent.mark();
    let _service = jam(address, 20)?;
    let page = Page::open(stage.page());
    let unix_ns = wait::until("a level on the page", DEADLINE, || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as f64;
        Ok((page.pressure().level > 0).then_some(now))
    })?;
    let change = stage
        .agent
        .wait_since(mark, "the level change", DEADLINE, |event| {
            event.is("level") && event.text("to") != "ok"
        })?;
    let sampled_ns = change
        .number("time_unix_ns")
        .context("the level has no time")?;
    Ok((unix_ns - sampled_ns) / 1e6)
}

#[test]
fn a_restarted_service_keeps_the_page_that_its_readers_have_mapped() -> Result<()> {
    const TEST: &str = "a_restarted_service_keeps_the_page_that_its_readers_have_mapped";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let port = ports::free()?;
    let address = format!("127.0.0.1:{port}");
    let service = jam(&address, 20)?;
    let stage = Stage::start(port, "")?;
    let page = Page::open(stage.page());
    let (pid, inode) = (service.pid(), fs::metadata(stage.page())?.ino());
    stage.wait("pressure", |pressure| {
        pressure.level >= 2 && pressure.pid == pid
    })?;
    drop(service);
    wait::until("no pressure without the service", DEADLINE, || {
        Ok((page.pressure().level == 0 && page.admit_ratio() >= 1.0).then_some(()))
    })?;
    let service = jam(&address, 20)?;
    wait::until(
        "pressure from the new service on the same page",
        DEADLINE,
        || {
            let pressure = page.pressure();
            Ok((pressure.level >= 2 && pressure.pid == service.pid()).then_some(()))
        },
    )?;
    // A new agent reuses the page too, so readers keep working.
    let temp = stage.into_temp();
    let stage = Stage::start_in(temp, port, "")?;
    ensure!(fs::metadata(stage.page())?.ino() == inode);
    wait::until(
        "pressure by the new agent on the same page",
        DEADLINE,
        || Ok((page.pressure().level >= 2).then_some(())),
    )?;
    Ok(())
}

#[test]
fn a_stopped_agent_leaves_no_pressure() -> Result<()> {
    const TEST: &str = "a_stopped_agent_leaves_no_pressure";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 20)?;
    let stage = Stage::start(service.address().port(), "")?;
    stage.wait("pressure", |pressure| pressure.level >= 2)?;
    stage.agent.process().signal(Signal::TERM)?;
    ensure!(stage.agent.process().wait_end(DEADLINE)? == End::Code(0));
    let pressure = stage.pressure();
    ensure!(
        pressure.level == 0 && pressure.admit_ratio >= 1.0,
        "{pressure:?}"
    );
    Ok(())
}

/// Checks that an agent that cannot publish reports the reason, in a notice with these words, and keeps monitoring. The
/// result of `setup` is dropped before its directory.
fn check_notice<Kept>(
    directory: &str,
    setup: impl Fn(&Path) -> Result<Kept>,
    words: &[&str],
) -> Result<()> {
    let temp = TempDir::new("refused")?;
    let _kept = setup(temp.path())?;
    let directory = temp.path().join(directory);
    let text = format!(
        "[[target]]\npid = {}\n[signal]\ndirectory = \"{}\"\n",
        std::process::id(),
        directory.display()
    );
    let config = temp.write("tailback.toml", &text)?;
    let agent = Agent::run([Path::new("--config"), &config])?;
    let notice = agent.wait_for("the notice", DEADLINE, |event| {
        event.is("notice") && matches!(event.text("code"), "not_published" | "no_page")
    })?;
    for word in words {
        ensure!(
            notice.text("text").contains(word),
            "{word}: {}",
            notice.text("text")
        );
    }
    agent.wait_for("its own report", Duration::from_secs(30), |event| {
        event.is("agent")
    })?;
    Ok(())
}

#[test]
fn an_unusable_directory_is_named_and_monitoring_continues() -> Result<()> {
    const TEST: &str = "an_unusable_directory_is_named_and_monitoring_continues";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    check_notice(
        "file/run",
        |temp| Ok(fs::write(temp.join("file"), "")?),
        &["cannot create the directory"],
    )?;
    // Others may write to the directory, and one of them was there first.
    let directory_of_another = |temp: &Path| {
        shared(&temp.join("run"), 0o777, 0)?;
        fs::create_dir(temp.join("run/tailback"))?;
        Ok(chown(temp.join("run/tailback"), Some(4711), None)?)
    };
    check_notice(
        "run",
        directory_of_another,
        &["belongs to user 4711", "remove that"],
    )?;
    let link = |temp: &Path| {
        shared(&temp.join("run"), 0o777, 0)?;
        fs::create_dir(temp.join("victim"))?;
        symlink(temp.join("victim"), temp.join("run/tailback"))?;
        Ok(Unchanged(temp.join("victim")))
    };
    check_notice("run", link, &["is not a directory", "remove `tailback`"])
}

/// A directory in which an agent must not create anything.
struct Unchanged(PathBuf);

impl Drop for Unchanged {
    fn drop(&mut self) {
        let entries = fs::read_dir(&self.0).map_or(usize::MAX, Iterator::count);
        assert_eq!(entries, 0, "{} was written to", self.0.display());
    }
}

/// A directory `run` that every user may write to. Another user attacks it, to make the agent write into `victim`.
struct Attacked {
    run: PathBuf,
    /// Checked before it is removed.
    victim: Unchanged,
    temp: TempDir,
}

impl Attacked {
    fn new() -> Result<Self> {
        let temp = TempDir::new("shared")?;
        let (run, victim) = (temp.path().join("run"), temp.path().join("victim"));
        shared(&run, 0o777, 0)?;
        fs::create_dir(&victim)?;
        let victim = Unchanged(victim);
        Ok(Self { run, victim, temp })
    }

    /// Replaces the agent's own directory by another one, runs this command in it, and leads these names in it to the victim.
    fn attack(&self, command: &str, names: &str) -> Result<()> {
        let script = format!(
            "cd {} && mv tailback away && mkdir -m 777 tailback && cd tailback && {command} && \
             for name in {names}; do ln -s {} $name; done",
            self.run.display(),
            self.victim.0.display()
        );
        let mut as_other = Command::new("setpriv");
        as_other.args(["--reuid=4711", "--regid=4711", "--clear-groups", "sh", "-c"]);
        run_text(as_other.arg(script)).map(drop)
    }
}

/// Creates a directory as a volume has it.
fn shared(path: &Path, mode: u32, owner: u32) -> Result<()> {
    fs::create_dir(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(chown(path, Some(owner), Some(4_711))?)
}

/// An agent for the service on `port` that publishes in `run` below `temp`.
fn agent_in(temp: &TempDir, port: u16) -> Result<(Agent, PathBuf)> {
    let text = format!(
        "[[target]]\nport = {port}\nservice_name = \"shop\"\n[signal]\ndirectory = \"{}\"\n{LONG_TTL}",
        temp.path().join("run").display()
    );
    let config = temp.write("tailback.toml", &text)?;
    let agent = Agent::run([Path::new("--config"), &config])?;
    Ok((agent, config))
}

#[test]
fn in_a_directory_of_others_the_agent_publishes_in_its_own() -> Result<()> {
    const TEST: &str = "in_a_directory_of_others_the_agent_publishes_in_its_own";
    if !needs::met(TEST, &["setpriv", "sh"]) {
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 20)?;
    let port = service.address().port();
    // An emptyDir, one with fsGroup, and a directory of another user.
    for (mode, owner) in [(0o777, 0), (0o2_775, 0), (0o755, 4_711)] {
        let temp = TempDir::new("shared")?;
        let run = temp.path().join("run");
        shared(&run, mode, owner)?;
        let (agent, config) = agent_in(&temp, port)?;
        let page = Page::open(run.join("tailback/shop/page"));
        wait::until("the page", DEADLINE, || {
            agent.process().check_running()?;
            Ok((page.pressure().level > 0).then_some(()))
        })?;
        let notice = agent.wait_for("the notice", DEADLINE, |event| {
            event.text("code") == "directory_shared"
        })?;
        ensure!(
            notice.text("text").contains("run/tailback"),
            "{}",
            notice.value
        );
        let metadata = fs::metadata(&run)?;
        ensure!(metadata.mode() & 0o7_777 == mode && metadata.uid() == owner);
        // On a busy machine the agent may not reply within 2 s.
        wait::until_ok("the status", DEADLINE, || {
            let mut status = Command::new(tailback_tests::agent::binary()?);
            let status = run_text(status.args(["status", "--config"]).arg(&config))?;
            ensure!(
                status.contains("1 in ") && status.contains("run/tailback"),
                "{status}"
            );
            Ok(())
        })?;
    }

    // Another user replaces the directory, and leads the names of the agent's files elsewhere.
    let attacked = Attacked::new()?;
    let (agent, _) = agent_in(&attacked.temp, port)?;
    let page = Page::open(attacked.run.join("tailback/shop/page"));
    wait::until("the page", DEADLINE, || {
        Ok((page.pressure().level > 0).then_some(()))
    })?;
    attacked.attack(
        "true",
        "shop cart pods agent.sock agent.lock agent.page learned.json learned.json.new owners.json owners.json.new",
    )?;
    agent.wait_for("the replaced directory", DEADLINE, |event| {
        event.text("code") == "directory_replaced"
    })?;
    // What a reader has mapped stays true.
    wait::until("pressure on the mapped page", DEADLINE, || {
        Ok((page.pressure().level > 0).then_some(()))
    })?;
    agent.process().signal(Signal::TERM)?;
    ensure!(agent.process().wait_end(DEADLINE)? == End::Code(0));
    let (agent, _) = agent_in(&attacked.temp, port)?;
    let notice = agent.wait_for("the refusal", DEADLINE, |event| {
        event.text("code") == "not_published"
    })?;
    ensure!(
        notice.text("text").contains("belongs to user 4711"),
        "{}",
        notice.value
    );
    Ok(())
}

#[test]
fn adapters_stay_with_the_agents_directory_when_another_user_replaces_it() -> Result<()> {
    const TEST: &str = "adapters_stay_with_the_agents_directory_when_another_user_replaces_it";
    if !needs::met(TEST, &["setpriv", "sh", "mkfifo"]) {
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 20)?;
    let attacked = Attacked::new()?;
    let (http, check) = (ports::local(ports::free()?), ports::local(ports::free()?));
    let text = format!(
        "[[target]]\nport = {}\nservice_name = \"shop\"\n\
         [signal]\ndirectory = \"{}\"\nhttp.listen = \"{http}\"\n{LONG_TTL}\
         [[signal.haproxy]]\ntarget = \"shop\"\nlisten = \"{check}\"\n",
        service.address().port(),
        attacked.run.display()
    );
    let config = attacked.temp.write("tailback.toml", &text)?;
    let _adapters = KillAdapterProcess(http);
    let agent = Agent::run([Path::new("--config"), &config])?;
    let pid = || -> Result<u64> {
        let status: Value = serde_json::from_str(&get(http, "/status")?.1)?;
        status["adapter_process"]["pid"].as_u64().context("no pid")
    };
    let is_true = || -> Result<()> {
        agent.process().check_running()?;
        let reply = agent_check(check)?;
        ensure!(!reply.starts_with("up ready 100%"), "{reply}");
        for path in ["/livez", "/readyz", "/pressure"] {
            let (head, body) = get(http, path)?;
            ensure!(head.starts_with("HTTP/1.1 200"), "{path}: {head} {body}");
            ensure!(path != "/pressure" || body.contains("\"shop\""), "{body}");
        }
        Ok(())
    };
    wait::until_ok("the adapters", DEADLINE, is_true)?;
    let before = pid()?;
    // Names that the adapter process and its clients read, a page that would be too short to map, and a request to exit that would
    // never end.
    attacked.attack(
        "mkdir shop && echo >shop/page && mkfifo adapters.next",
        "agent.sock agent.page agent.lock adapters.sock adapters.lock adapters.next.new",
    )?;
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(3) {
        // A check that comes late, as after a pause of the machine, is answered with 100%.
        wait::until_ok("true replies", DEADLINE, is_true)?;
        thread::sleep(Duration::from_millis(50));
    }
    ensure!(pid()? == before, "another adapter process");
    // One that is started now finds the agent's directory, too.
    let killed = Pid::from_raw(i32::try_from(before)?).context("no pid")?;
    kill_process(killed, Signal::KILL)?;
    wait::until_ok("another adapter process", DEADLINE, || {
        is_true()?;
        ensure!(pid()? != before);
        Ok(())
    })?;
    for below in ["away/tailback", "tailback/tailback"] {
        ensure!(!attacked.run.join(below).exists(), "{below}");
    }
    Ok(())
}

/// Runs a command that must succeed; returns its standard output.
fn run_text(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    let text = String::from_utf8([output.stdout, output.stderr].concat())?;
    ensure!(output.status.success(), "{command:?}: {text}");
    Ok(text)
}

#[test]
fn a_container_has_a_page_by_the_names_of_its_pod_whatever_it_calls_itself() -> Result<()> {
    const TEST: &str = "a_container_has_a_page_by_the_names_of_its_pod_whatever_it_calls_itself";
    if !needs::met(TEST, &["podman", "sleep"]) {
        return Ok(());
    }
    let options = ["--network=none", "--env=OTEL_SERVICE_NAME=shop"];
    if let Err(error) = Container::check_can_run(&options) {
        skip(TEST, &format!("podman cannot run here: {error:#}"));
        return Ok(());
    }
    let mut replicas = Vec::new();
    for replica in ["a", "b"] {
        let container = Container::new()?;
        let before = container.before(&options)?;
        let mut command = Command::new(&before[0]);
        command.args(&before[1..]).args(["/usr/bin/sleep", "100"]);
        let process = Process::start("the container", &mut command)?;
        let pid = wait::until_ok("the container", DEADLINE, || {
            let pid = container.pid()?;
            ensure!(pid > 0);
            Ok(pid)
        })?;
        let link = PodLink::new(&format!("shop-{replica}_test_web-{}.log", container.id()?))?;
        replicas.push((pid, container, process, link));
    }
    let temp = TempDir::new("pods")?;
    let pids: Vec<String> = replicas.iter().map(|(pid, ..)| pid.to_string()).collect();
    let start = || {
        let mut command = Command::new(tailback_tests::agent::binary()?);
        command.env("RUNTIME_DIRECTORY", temp.path());
        command.args(["run", "--json"]);
        for pid in &pids {
            command.args(["--pid", pid]);
        }
        Agent::start(&mut command)
    };
    let agent = start()?;
    let page = |replica: &str| {
        let path = format!("pods/test_shop-{replica}_web/page");
        Page::open(temp.path().join(path))
    };
    let published = |agent: &Agent| {
        for ((pid, ..), replica) in replicas.iter().zip(["a", "b"]) {
            wait::until("the page of the pod", DEADLINE, || {
                agent.process().check_running()?;
                Ok((page(replica).pressure().pid == *pid).then_some(()))
            })?;
        }
        Ok::<_, anyhow::Error>(())
    };
    published(&agent)?;
    drop(agent);
    let agent = start()?;
    published(&agent)?;
    Ok(())
}

#[test]
fn a_full_file_system_is_reported_and_monitoring_continues() -> Result<()> {
    const TEST: &str = "a_full_file_system_is_reported_and_monitoring_continues";
    if !needs::met(TEST, &["mount", "umount"]) {
        return Ok(());
    }
    struct Mounted(PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
        }
    }
    let full = |temp: &Path| {
        let run = temp.join("run");
        fs::create_dir(&run)?;
        // Two pages; the lock file takes one.
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=8k,mode=755", "tailback-test"])
            .arg(&run)
            .status()?;
        ensure!(mounted.success(), "cannot mount a small file system");
        let mounted = Mounted(run);
        fs::write(mounted.0.join("other"), [0; 4096])?;
        Ok(mounted)
    };
    check_notice("run", full, &["no space for a page of 4096 bytes"])
}

#[test]
fn the_second_agent_in_a_directory_names_the_first_and_publishes_nothing() -> Result<()> {
    const TEST: &str = "the_second_agent_in_a_directory_names_the_first_and_publishes_nothing";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 20)?;
    let stage = Stage::start(service.address().port(), "")?;
    let temp = TempDir::new("second")?;
    let text = format!(
        "[[target]]\npid = {}\n[signal]\ndirectory = \"{}\"\n",
        std::process::id(),
        stage.directory.display()
    );
    let config = temp.write("tailback.toml", &text)?;
    let second = Agent::run([Path::new("--config"), &config])?;
    let notice = second.wait_for("the notice about the other agent", DEADLINE, |event| {
        event.text("code") == "not_published"
    })?;
    let holder = format!("process {}", stage.agent.process().pid());
    ensure!(
        notice.text("text").contains(&holder),
        "{}",
        notice.text("text")
    );
    let pages: Vec<String> = fs::read_dir(&stage.directory)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| stage.directory.join(name).is_dir())
        .collect();
    ensure!(pages == ["shop"], "{pages:?}");
    Ok(())
}

#[test]
fn a_container_reads_the_page_of_its_service_through_a_mounted_directory() -> Result<()> {
    const TEST: &str = "a_container_reads_the_page_of_its_service_through_a_mounted_directory";
    if !needs::met(TEST, &["podman", "python3"]) {
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 20)?;
    let stage = Stage::start(service.address().port(), "")?;
    stage.wait("the floor of the admit ratio", |pressure| {
        pressure.admit_ratio <= 0.05
    })?;
    let page_directory = stage.page();
    let page_directory = page_directory
        .parent()
        .context("no parent directory")?
        .display();
    let options = [
        "--network=none",
        "--volume",
        &format!("{page_directory}:/run/tailback:ro"),
    ];
    if let Err(error) = Container::check_can_run(&options) {
        skip(TEST, &format!("podman cannot run here: {error:#}"));
        return Ok(());
    }
    let reader = readers().join("python/tailback_page.py");
    let read = || -> Result<Value> {
        let container = Container::new()?;
        program::copy(&reader, &container.root().join("reader.py"))?;
        let before = container.before(&options)?;
        let mut podman = Command::new(&before[0]);
        podman.args(&before[1..]);
        let page_json = run(podman.args(["/usr/bin/python3", "/reader.py", "/run/tailback/page"]))?;
        serde_json::from_str(&page_json)
            .with_context(|| format!("parse the reader's output {page_json:?}"))
    };
    // On a busy machine the page may briefly go stale.
    wait::until_ok("the page inside the container", DEADLINE, || {
        let page_json = read()?;
        ensure!(
            page_json["alive"] == true
                && page_json["admit_ratio"] == 0.05
                && page_json["entries"][0]["depth"] == 20,
            "{page_json}"
        );
        Ok(())
    })?;
    stage.agent.process().signal(Signal::KILL)?;
    stage.wait("a stale page", |pressure| !pressure.alive)?;
    let page_json = read()?;
    ensure!(
        page_json["alive"] == false && page_json["admit_ratio"] == 1.0,
        "{page_json}"
    );
    Ok(())
}
