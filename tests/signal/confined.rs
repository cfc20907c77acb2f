//! A running agent has dropped its privileges, and its helper and adapter processes have those that they need.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tailback_tests::{ports, process::End, wait};

use crate::stage::{DEADLINE, Stage, jam};

/// CAP_DAC_READ_SEARCH and CAP_SYS_PTRACE, as /proc shows them.
const KEPT: u64 = 1 << 2 | 1 << 19;
/// CAP_BPF, which is kept before Linux 5.19.
const BPF: u64 = 1 << 39;
/// CAP_DAC_OVERRIDE, CAP_KILL, CAP_SETUID and CAP_NET_BIND_SERVICE.
const OF_HELPER: u64 = 1 << 1 | 1 << 5 | 1 << 7 | 1 << 10;

/// The values of a line of /proc/PID/task/TID/status, for each thread.
fn of_threads(pid: u32, key: &str) -> Result<Vec<String>> {
    let mut values = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let Ok(status) = fs::read_to_string(thread?.path().join("status")) else {
            // It has ended.
            continue;
        };
        let mut lines = status.lines();
        let value = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        values.push(value.context("no such line")?.trim().to_owned());
    }
    Ok(values)
}

fn capabilities(pid: u32, key: &str) -> Result<Vec<u64>> {
    let values = of_threads(pid, key)?;
    values
        .iter()
        .map(|value| Ok(u64::from_str_radix(value, 16)?))
        .collect()
}

/// The process that this one has started with this argument.
pub fn child(parent: u32, argument: &str) -> Result<u32> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let path: PathBuf = entry.path();
        let (Ok(status), Ok(words)) = (
            fs::read_to_string(path.join("status")),
            fs::read(path.join("cmdline")),
        ) else {
            continue;
        };
        let is_child = status
            .lines()
            .any(|line| line == format!("PPid:\t{parent}"));
        let mut words = words.split(|byte| *byte == 0);
        if is_child && words.any(|word| word == argument.as_bytes()) {
            let name = entry.file_name();
            return name.to_string_lossy().parse().context("a pid");
        }
    }
    anyhow::bail!("process {parent} has started no `{argument}`")
}

#[test]
fn the_agent_and_its_processes_keep_the_privileges_that_they_need() -> Result<()> {
    let port = ports::free()?;
    let _service = jam(&ports::local(port).to_string(), 3)?;
    let stage = Stage::start(port, "")?;
    let agent = stage.agent.process().pid();

    for key in ["CapPrm", "CapEff"] {
        let held = capabilities(agent, key)?;
        let is_kept = |set: &u64| *set & !BPF == KEPT;
        ensure!(
            held.len() > 3 && held.iter().all(is_kept),
            "{key}: {held:x?}"
        );
    }
    for (key, value) in [("NoNewPrivs", "1"), ("Seccomp", "2")] {
        let values = of_threads(agent, key)?;
        ensure!(values.iter().all(|it| it == value), "{key}: {values:?}");
    }
    let helper = child(agent, "helper")?;
    let held = capabilities(helper, "CapPrm")?;
    ensure!(held.iter().all(|set| set & !OF_HELPER == 0), "{held:x?}");
    let adapters = child(helper, "adapters")?;
    ensure!(adapters == stage.adapter_process()?);
    let held = capabilities(adapters, "CapPrm")?;
    ensure!(held.iter().all(|set| *set == 0), "{held:x?}");
    let filters = of_threads(adapters, "Seccomp")?;
    ensure!(filters.iter().all(|filter| filter == "2"), "{filters:?}");
    let users = of_threads(adapters, "Uid")?;
    ensure!(
        users.iter().all(|user| user.starts_with("65534")),
        "{users:?}"
    );

    // A new service gets a page, although the agent can create none itself.
    let port = ports::free()?;
    let text = fs::read_to_string(&stage.config)?;
    let more = format!("[[target]]\nport = {port}\nservice_name = \"another\"\n{text}");
    fs::write(&stage.config, more)?;
    let _another = jam(&ports::local(port).to_string(), 3)?;
    wait::until("the page of a new service", DEADLINE, || {
        Ok(stage.directory.join("another/page").is_file().then_some(()))
    })?;

    // Without its helper the agent ends, so that the service manager starts both again.
    let raw = Pid::from_raw(helper.cast_signed()).context("no pid")?;
    kill_process(raw, Signal::KILL)?;
    let port = ports::free()?;
    let text = fs::read_to_string(&stage.config)?;
    let more = format!("[[target]]\nport = {port}\nservice_name = \"third\"\n{text}");
    fs::write(&stage.config, more)?;
    let _third = jam(&ports::local(port).to_string(), 3)?;
    let end = stage.agent.process().wait_end(DEADLINE)?;
    ensure!(end == End::Code(70), "{end:?}");
    Ok(())
}
