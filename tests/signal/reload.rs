//! The configuration of a running agent changes: as a ConfigMap, by SIGHUP, and in every way that goes wrong.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::{
    fs::{CWD, FileType, Mode, mknodat},
    process::{Pid, Signal, kill_process},
};
use serde_json::Value;
use tailback_page::Page;
use tailback_tests::{
    agent::{Event, binary},
    needs, ports,
    temp::TempDir,
    wait,
};

use crate::{
    confined::child,
    stage::{DEADLINE, LONG_TTL, Stage, agent_check, jam},
};

/// A directory that is updated as the kubelet updates a ConfigMap's volume: the files are links through `..data`, which is
/// replaced by a rename. Then the former files are removed.
struct ConfigMap {
    path: PathBuf,
    version: u32,
}

impl ConfigMap {
    fn new(path: PathBuf, text: &str) -> Result<Self> {
        fs::create_dir(&path)?;
        symlink("..data/tailback.toml", path.join("tailback.toml"))?;
        let mut map = Self { path, version: 0 };
        map.update(text)?;
        Ok(map)
    }

    fn file(&self) -> PathBuf {
        self.path.join("tailback.toml")
    }

    fn update(&mut self, text: &str) -> Result<()> {
        let at = |version: u32| self.path.join(format!("..{version}"));
        let former = at(self.version);
        self.version += 1;
        fs::create_dir(at(self.version))?;
        fs::write(at(self.version).join("tailback.toml"), text)?;
        let next = self.path.join("..data_tmp");
        symlink(format!("..{}", self.version), &next)?;
        fs::rename(&next, self.path.join("..data"))?;
        if self.version > 1 {
            fs::remove_dir_all(former)?;
        }
        Ok(())
    }
}

fn is_notice(event: &Event, code: &str) -> bool {
    event.is("notice") && event.text("code") == code
}

/// Watches the page from another thread: whether it ever shows no pressure.
struct Watch {
    is_over: Arc<AtomicBool>,
    thread: thread::JoinHandle<u64>,
}

impl Watch {
    fn start(page: &Path) -> Self {
        let (page, is_over) = (Page::open(page), Arc::new(AtomicBool::new(false)));
        let until = Arc::clone(&is_over);
        let thread = thread::spawn(move || {
            let mut gaps = 0;
            while !until.load(Ordering::Relaxed) {
                let pressure = page.pressure();
                gaps += u64::from(!pressure.alive || pressure.level == 0);
                thread::sleep(Duration::from_millis(2));
            }
            gaps
        });
        Self { is_over, thread }
    }

    fn gaps(self) -> u64 {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or(u64::MAX)
    }
}

impl Stage {
    /// The state of the configuration, from the agent itself.
    fn config_status(&self) -> Result<Value> {
        let status: Value = serde_json::from_str(&self.send_line("{\"ask\": \"status\"}\n")?)?;
        Ok(status["config"].clone())
    }

    /// Kills the adapter process, and waits for another one.
    fn replace_adapter_process(&self) -> Result<()> {
        let killed = self.adapter_process()?;
        let raw = Pid::from_raw(killed.cast_signed()).context("no pid")?;
        kill_process(raw, Signal::KILL)?;
        wait::until("another adapter process", DEADLINE, || {
            Ok(self.adapter_process().ok().filter(|pid| *pid != killed))
        })?;
        Ok(())
    }

    fn tailback(&self, args: &[&str]) -> Result<(bool, String)> {
        let output = Command::new(binary()?)
            .args(args)
            .arg("--config")
            .arg(&self.config)
            .output()?;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.success(), String::from_utf8(text)?))
    }
}

#[test]
fn a_config_map_update_reaches_agent_and_adapters_and_a_bad_one_changes_nothing() -> Result<()> {
    const TEST: &str =
        "a_config_map_update_reaches_agent_and_adapters_and_a_bad_one_changes_nothing";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 5)?;
    let port = service.address().port();
    let target = format!("[[target]]\nport = {port}\nservice_name = \"shop\"\n");
    let check = ports::local(ports::free()?);
    let haproxy = format!("[[signal.haproxy]]\ntarget = \"shop\"\nlisten = \"{check}\"\n");
    let (mut map, mut first) = (None, String::new());
    let stage = Stage::start_with(TempDir::new("reload")?, |temp, signal| {
        first = format!("{target}{signal}{LONG_TTL}");
        let made = ConfigMap::new(temp.path().join("config"), &first)?;
        Ok(map.insert(made).file())
    })?;
    let mut map = map.context("no map")?;
    let episode = stage.agent.wait_for("the full queue", DEADLINE, |event| {
        event.is("level") && event.text("kind") == "accept"
    })?;
    stage.wait("a level", |pressure| pressure.level > 0)?;
    let watch = Watch::start(&stage.page());
    let inode = fs::metadata(stage.page())?.ino();

    // An adapter is added.
    let second = format!("{first}{haproxy}");
    map.update(&second)?;
    wait::until_ok("the added adapter", DEADLINE, || agent_check(check))?;
    let status = stage.config_status()?;
    ensure!(
        status["reloads"] == 1 && status["error"].is_null(),
        "{status}"
    );
    // The file that the agent was started with is gone.
    stage.replace_adapter_process()?;
    wait::until_ok("the adapter of the other process", DEADLINE, || {
        agent_check(check)
    })?;

    // A bad file, with which adapters are restarted as well.
    let mark = stage.agent.mark();
    map.update(&format!("intervall = \"1s\"\n{second}"))?;
    let rejected = stage
        .agent
        .wait_since(mark, "the bad file", DEADLINE, |event| {
            is_notice(event, "config_rejected")
        })?;
    ensure!(
        rejected.text("text").contains("line 1") && rejected.text("text").contains("intervall"),
        "{}",
        rejected.value
    );
    stage.replace_adapter_process()?;
    wait::until_ok("the adapter, without a valid file", DEADLINE, || {
        agent_check(check)
    })?;
    let metrics = stage.get("/metrics")?.1;
    ensure!(
        metrics.contains("\ntailback_config_last_reload_successful 0\n"),
        "{metrics}"
    );
    let (_, text) = stage.tailback(&["status"])?;
    ensure!(
        text.contains("REJECTED since then") && text.contains("\nadapters  PID"),
        "{text}"
    );
    let (is_ok, text) = stage.tailback(&["doctor"])?;
    ensure!(
        !is_ok
            && text.contains("FAIL configuration file")
            && text.contains("FAIL configuration in force"),
        "{text}"
    );

    // A good one again, and one with a setting that needs a restart.
    let mark = stage.agent.mark();
    map.update(&format!("otlp = \"http://127.0.0.1:9\"\n{second}"))?;
    let waits = stage
        .agent
        .wait_since(mark, "the restart", DEADLINE, |event| {
            is_notice(event, "config_needs_restart")
        })?;
    ensure!(waits.text("text").contains("otlp"), "{}", waits.value);
    let status = stage.config_status()?;
    ensure!(
        status["needs_restart"][0] == "otlp" && status["error"].is_null(),
        "{status}"
    );

    // One adapter is removed, then all.
    map.update(&first)?;
    wait::until("the end of the adapter", DEADLINE, || {
        Ok(agent_check(check).is_err().then_some(()))
    })?;
    wait::until_ok("the other adapter", DEADLINE, || stage.get("/pressure"))?;
    let is_http = |line: &&str| line.starts_with("http.listen");
    let without: Vec<&str> = first.lines().filter(|line| !is_http(line)).collect();
    map.update(&without.join("\n"))?;
    wait::until("the end of the last adapter", DEADLINE, || {
        Ok(stage.get("/pressure").is_err().then_some(()))
    })?;
    map.update(&first)?;
    wait::until_ok("the adapter again", DEADLINE, || stage.get("/pressure"))?;

    let mark = stage.agent.mark();
    stage.agent.process().signal(Signal::HUP)?;
    stage
        .agent
        .wait_since(mark, "a reload", DEADLINE, |event| {
            is_notice(event, "config_reloaded")
        })?;
    stage.agent.process().check_running()?;
    ensure!(watch.gaps() == 0, "the page had a gap");
    ensure!(
        fs::metadata(stage.page())?.ino() == inode,
        "another page file"
    );
    let events = stage.agent.events()?;
    let mut episodes = events.iter().filter(|event| {
        event.text("kind") == "accept" && (event.is("level") || event.is("episode"))
    });
    let is_same = |event: &Event| {
        let id = event.text(if event.is("level") { "episode" } else { "id" });
        id == episode.text("episode") && (event.is("level") || event.value["ongoing"] == true)
    };
    ensure!(episodes.all(is_same), "the episode did not continue");
    Ok(())
}

/// Puts this text in the place of the configuration, and asks the agent to load it.
fn load(stage: &Stage, text: &str) -> Result<()> {
    let mark = stage.agent.mark();
    let next = stage.config.with_extension("next");
    fs::write(&next, text)?;
    fs::rename(&next, &stage.config)?;
    stage.agent.process().signal(Signal::HUP)?;
    let is_loaded = |event: &Event| is_notice(event, "config_reloaded");
    stage
        .agent
        .wait_since(mark, "a reload", DEADLINE, is_loaded)
        .map(drop)
}

/// The section of an adapter for HAProxy.
fn haproxy(listen: SocketAddr) -> String {
    format!("[[signal.haproxy]]\ntarget = \"shop\"\nlisten = \"{listen}\"\n")
}

/// The number of child processes.
fn children(of: u32) -> Result<usize> {
    let of = format!("\nPPid:\t{of}\n");
    let processes = fs::read_dir("/proc")?.flatten();
    Ok(processes
        .filter_map(|process| fs::read_to_string(process.path().join("status")).ok())
        .filter(|status| status.contains(&of))
        .count())
}

#[test]
fn a_longer_interval_leaves_no_gap_on_a_page() -> Result<()> {
    const TEST: &str = "a_longer_interval_leaves_no_gap_on_a_page";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    // Idle: a service under focus is sampled, and published, in between.
    let service = jam("127.0.0.1:0", 0)?;
    let ttl = "ttl = \"5s\"\n";
    let stage = Stage::start(service.address().port(), ttl)?;
    let text = fs::read_to_string(&stage.config)?.replacen(ttl, "", 1);
    load(&stage, &format!("interval = \"6s\"\n{text}"))?;
    // Beyond the former time to live, and the next sample.
    let loaded = Instant::now();
    while loaded.elapsed() < Duration::from_secs(8) {
        ensure!(stage.pressure().alive, "after {:?}", loaded.elapsed());
        thread::sleep(Duration::from_millis(20));
    }
    ensure!(stage.ttl()? >= Duration::from_secs(18), "{:?}", stage.ttl());
    Ok(())
}

#[test]
fn an_adapter_that_is_removed_drains_whatever_changes_next() -> Result<()> {
    const TEST: &str = "an_adapter_that_is_removed_drains_whatever_changes_next";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    // It drains for 2.5 s, which a pause of the machine may use up.
    wait::unless_paused(removed_adapters_drain)
}

fn removed_adapters_drain() -> Result<()> {
    const NO_PRESSURE: &str = "up ready 100%";
    let service = jam("127.0.0.1:0", 20)?;
    let (removed, added) = (ports::local(ports::free()?), ports::local(ports::free()?));
    let more = format!("{LONG_TTL}{}", haproxy(removed));
    let stage = Stage::start(service.address().port(), &more)?;
    wait::until_ok("less weight", DEADLINE, || {
        let reply = agent_check(removed)?;
        ensure!(!reply.starts_with(NO_PRESSURE), "{reply}");
        Ok(())
    })?;
    let without = fs::read_to_string(&stage.config)?.replacen(&haproxy(removed), "", 1);
    load(&stage, &without)?;
    wait::until_ok("the drain", DEADLINE, || {
        let reply = agent_check(removed)?;
        ensure!(reply.starts_with(NO_PRESSURE), "{reply}");
        Ok(())
    })?;
    let began = Instant::now();
    // Two more changes while it drains.
    load(&stage, &format!("{without}{}", haproxy(removed)))?;
    let with_other = format!("{without}{}", haproxy(added));
    load(&stage, &with_other)?;
    // It drains for 2.5 s, because HAProxy checks every 2 s by default.
    while began.elapsed() < Duration::from_millis(1_500) {
        let reply = agent_check(removed).context("closed before HAProxy could ask again")?;
        ensure!(reply.starts_with(NO_PRESSURE), "{reply}");
        thread::sleep(Duration::from_millis(50));
    }
    wait::until_ok("the added adapter", DEADLINE, || agent_check(added))?;
    wait::until("the end of the removed one", DEADLINE, || {
        Ok(agent_check(removed).is_err().then_some(()))
    })?;

    // A process is started, and at once no longer wanted.
    load(&stage, &format!("{with_other}{}", haproxy(removed)))?;
    let is_http = |line: &&str| line.starts_with("http.listen");
    let none: Vec<&str> = without.lines().filter(|line| !is_http(line)).collect();
    load(&stage, &none.join("\n"))?;
    wait::until("the end of all adapters", DEADLINE, || {
        let helper = child(stage.agent.process().pid(), "helper")?;
        Ok((children(helper)? == 0).then_some(()))
    })?;
    ensure!(agent_check(added).is_err() && stage.get("/pressure").is_err());
    ensure!(stage.pressure().alive);
    Ok(())
}

#[test]
fn thresholds_and_targets_change_in_a_running_agent() -> Result<()> {
    const TEST: &str = "thresholds_and_targets_change_in_a_running_agent";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let (shop, cart) = (jam("127.0.0.1:0", 3)?, jam("127.0.0.1:0", 3)?);
    let stage = Stage::start(shop.address().port(), LONG_TTL)?;
    stage.wait("a level", |pressure| pressure.level > 0)?;
    let text = fs::read_to_string(&stage.config)?;
    let both = format!(
        "{text}[detect.accept]\ntarget = \"1h\"\n[[target]]\nport = {}\nservice_name = \"cart\"\n",
        cart.address().port()
    );
    let next = stage.config.with_extension("next");
    fs::write(&next, &both)?;
    fs::rename(&next, &stage.config)?;
    stage.wait("no level with a longer target", |pressure| {
        pressure.alive && pressure.level == 0
    })?;
    let cart_page = Page::open(stage.directory.join("cart/page"));
    wait::until("the page of the added target", DEADLINE, || {
        Ok(cart_page.pressure().alive.then_some(()))
    })?;
    let without_shop = both.replacen(&format!("port = {}", shop.address().port()), "port = 1", 1);
    fs::write(&stage.config, without_shop)?;
    stage.wait("no service", |pressure| pressure.pid == 0)?;
    ensure!(cart_page.pressure().pid != 0, "the other target is watched");
    Ok(())
}

#[test]
fn a_file_that_is_gone_hostile_or_never_still_keeps_the_configuration() -> Result<()> {
    const TEST: &str = "a_file_that_is_gone_hostile_or_never_still_keeps_the_configuration";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 0)?;
    let stage = Stage::start(service.address().port(), LONG_TTL)?;
    let (path, text) = (&stage.config, fs::read_to_string(&stage.config)?);
    let rejected = |what: &str, change: &dyn Fn() -> Result<()>, words: &str| -> Result<()> {
        let mark = stage.agent.mark();
        change().context(what.to_owned())?;
        stage
            .agent
            .wait_since(mark, what, DEADLINE, |event| {
                is_notice(event, "config_rejected") && event.text("text").contains(words)
            })
            .map(drop)
    };
    rejected(
        "a missing file",
        &|| Ok(fs::remove_file(path)?),
        "No such file",
    )?;
    rejected(
        "a directory",
        &|| Ok(fs::create_dir(path)?),
        "not a regular file",
    )?;
    let fifo = || -> Result<()> {
        fs::remove_dir(path)?;
        Ok(mknodat(CWD, path, FileType::Fifo, Mode::RUSR, 0)?)
    };
    // The same reason is not repeated: ask for it.
    let asked = || -> Result<()> {
        fifo()?;
        stage.agent.process().signal(Signal::HUP)
    };
    rejected("a FIFO", &asked, "not a regular file")?;
    let open_to_all = || -> Result<()> {
        fs::remove_file(path)?;
        fs::write(path, &text)?;
        Ok(fs::set_permissions(
            path,
            fs::Permissions::from_mode(0o666),
        )?)
    };
    rejected("a file of everyone", &open_to_all, "chmod o-w")?;
    let of_another = || -> Result<()> {
        fs::set_permissions(path, fs::Permissions::from_mode(0o644))?;
        Ok(chown(path, Some(65_534), None)?)
    };
    rejected(
        "a file of another user",
        &of_another,
        "belongs to user 65534 now",
    )?;
    ensure!(stage.config_status()?["reloads"] == 0);
    ensure!(stage.pressure().alive);

    // It changes a hundred times a second, every other time to something invalid.
    let before = stage.config_status()?;
    let began = Instant::now();
    for round in 0..150 {
        let next = path.with_extension("next");
        let bad = if round % 2 == 0 { "[detect" } else { "" };
        fs::write(&next, format!("{text}{bad}\n# {round}\n"))?;
        fs::rename(&next, path)?;
        thread::sleep(Duration::from_millis(10));
    }
    let status = wait::until("the last content", DEADLINE, || {
        let status = stage.config_status()?;
        Ok(status["error"].is_null().then_some(status))
    })?;
    let read = |status: &Value| {
        status["reloads"].as_u64().unwrap_or(0) + status["rejected"].as_u64().unwrap_or(0)
    };
    // At most one per check of the file, every 500 ms.
    let bound = began.elapsed().as_millis() as u64 / 500 + 2;
    ensure!(
        read(&status) - read(&before) <= bound,
        "{before} {status} in {:?}",
        began.elapsed()
    );
    ensure!(stage.pressure().alive);
    stage.agent.process().check_running()?;
    Ok(())
}
