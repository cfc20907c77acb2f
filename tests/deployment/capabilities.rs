//! The agent without one of its capabilities: it does what docs/guides/deployment.md says.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tailback_tests::{
    needs, ports,
    process::{End, Process},
    program,
    temp::TempDir,
    wait,
};

use crate::{CAPABILITIES, DEADLINE, SERVICE, allowed, contained, json_lines, without};

/// A service of another user that names itself by its environment.
struct Named {
    _process: Process,
    port: String,
}

impl Named {
    fn start() -> Result<Self> {
        let port = ports::free()?.to_string();
        let mut command = Command::new(program::need(&["setpriv"])?);
        command.args(["--reuid=65533", "--regid=65533", "--clear-groups"]);
        command.args(["/usr/bin/python3", "-c", SERVICE, "compute", &port, "2"]);
        command.env("OTEL_SERVICE_NAME", "named-by-environment");
        let process = Process::start("the service", &mut command)?;
        process.wait_line("listening", DEADLINE)?;
        Ok(Self {
            _process: process,
            port,
        })
    }

    /// One sample by an agent with these capabilities: the names of the services with a queue that it reports.
    fn names(&self, capabilities: &[&str]) -> Result<Vec<String>> {
        let arguments = ["sample", "--port", &self.port, "--json"];
        let (_container, process) = contained(&["--pid=host"], capabilities, &arguments)?;
        let (end, lines) = json_lines(&process)?;
        ensure!(end == End::Code(0), "{end:?}: {:?}", process.lines().all());
        let names = lines.iter().filter_map(|line| line["target"].as_str());
        Ok(names.map(str::to_owned).collect())
    }
}

#[test]
fn without_a_capability_to_load_the_agent_ends_and_names_it() -> Result<()> {
    if !allowed("without_a_capability_to_load_the_agent_ends_and_names_it") {
        return Ok(());
    }
    for lost in ["BPF", "PERFMON"] {
        let (_container, process) = contained(&["--pid=host"], &without(lost), &["run", "--all"])?;
        ensure!(
            process.wait_end(DEADLINE)? == End::Code(3),
            "without {lost}"
        );
        let line = process.wait_line(&format!("missing CAP_{lost}"), DEADLINE)?;
        ensure!(line.text.contains(&format!("add: [{lost}]")), "{line:?}");
    }
    Ok(())
}

#[test]
fn without_a_capability_to_read_other_users_services_are_still_watched() -> Result<()> {
    const TEST: &str = "without_a_capability_to_read_other_users_services_are_still_watched";
    if !allowed(TEST) || !needs::met(TEST, &["setpriv"]) {
        return Ok(());
    }
    let service = Named::start()?;
    let all = service.names(&CAPABILITIES)?;
    ensure!(all.contains(&"named-by-environment".to_owned()), "{all:?}");
    for lost in ["DAC_READ_SEARCH", "SYS_PTRACE"] {
        let names = service.names(&without(lost))?;
        ensure!(!names.is_empty(), "without {lost}: no queue");
        // Newer kernels let CAP_PERFMON read what otherwise needs CAP_SYS_PTRACE; not what needs the other one.
        let is_named = names.contains(&"named-by-environment".to_owned());
        ensure!(
            !is_named || lost == "SYS_PTRACE",
            "without {lost}: {names:?}"
        );
    }
    Ok(())
}

#[test]
fn without_setuid_pages_are_published_but_no_adapter_serves() -> Result<()> {
    if !allowed("without_setuid_pages_are_published_but_no_adapter_serves") {
        return Ok(());
    }
    let directory = TempDir::new("config")?;
    let port = ports::free()?;
    let text = format!("[signal.http]\nlisten = \"127.0.0.1:{port}\"\n");
    let config = directory.write("tailback.toml", &text)?;
    let volume = format!("--volume={}:/tailback.toml:ro", config.display());
    let options = ["--pid=host", &volume];
    let arguments = ["run", "--all", "--json", "--config", "/tailback.toml"];
    let (container, process) = contained(&options, &without("SETUID"), &arguments)?;
    let is_notice = |text: &str| {
        serde_json::from_str::<Value>(text)
            .is_ok_and(|line| line["code"] == "adapter_process_exited")
    };
    let what = "the notice that the adapter process exited";
    process.lines().wait(what, 0, DEADLINE, |line| {
        is_notice(&line.text).then_some(())
    })?;
    process.wait_line("cannot switch to the user nobody", DEADLINE)?;
    // The agent itself is not affected.
    let heartbeat = container.root().join("tmp/agent.page");
    let content = || fs::read(&heartbeat).context("read the agent's own page");
    let before = content()?;
    wait::until("the agent's own page to be renewed", DEADLINE, || {
        Ok((content()? != before).then_some(()))
    })
}
