//! Changes of the release: its configuration, and its pods.

use std::{
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tailback_tests::{temp::TempDir, wait};

use super::install::{CHART, helm, repository};
use crate::{
    cluster::output,
    stage::{AGENT, DEADLINE, Stage},
};

/// Time to live of pages, the default.
pub const TTL: Duration = Duration::from_secs(1);
/// A configuration with a second adapter, KEDA's scaler.
const GOOD: &str = "
[signal]
directory_wait = \"60s\"
[signal.http]
listen = \"0.0.0.0:9400\"
[signal.keda]
listen = \"0.0.0.0:9403\"
";
const NEW_PORT: u16 = 9403;
/// Not a configuration, although the chart accepts it.
const BAD: &str = "listen = 0.0.0.0:9400\"";
/// Interval at which the adapter process is killed. Its successor starts within it.
const KILL_INTERVAL: Duration = Duration::from_secs(2);
/// Time from the end of the update to the last reading of its reader.
const AFTER: Duration = Duration::from_secs(3);

/// Upgrades the release, with the values that it has and these.
fn upgrade(stage: &Stage, values: &[&str]) -> Result<()> {
    let mut command = stage.kubectl().command(helm()?);
    command
        .args([
            "upgrade",
            AGENT,
            CHART,
            "--namespace",
            AGENT,
            "--reuse-values",
        ])
        .args(values)
        .current_dir(repository());
    output(&mut command).map(drop)
}

pub fn kill(pid: u32, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(pid.cast_signed()).context("pid 0")?;
    kill_process(pid, signal).with_context(|| format!("signal {}", pid.as_raw_nonzero()))
}

pub fn config_map(stage: &Stage) -> Result<()> {
    let before = stage.wait_agent()?;
    let loaded = before.status()?["agent"]["config"]["reloads"].as_u64();
    let directory = TempDir::new("values")?;
    let value = |name: &str, text: &str| -> Result<String> {
        Ok(format!(
            "--set-file=config={}",
            directory.write(name, text)?.display()
        ))
    };
    let good = value("good", GOOD)?;
    upgrade(stage, &[&good])?;
    // Killed again and again until the new configuration is in force: so it is also killed while the kubelet swaps the files.
    let began = Instant::now();
    let mut kills = 0;
    wait::until("the new configuration", DEADLINE, || {
        let Ok(status) = before.status() else {
            return Ok(None);
        };
        if status["agent"]["config"]["reloads"].as_u64() > loaded {
            return Ok(Some(()));
        }
        if let Some(pid) = status["adapter_process"]["pid"].as_u64() {
            kill(u32::try_from(pid)?, Signal::KILL)?;
            kills += 1;
        }
        thread::sleep(KILL_INTERVAL);
        Ok(None)
    })?;
    eprintln!(
        "    applied after {:.1} s and {kills} kills",
        began.elapsed().as_secs_f64()
    );
    wait::until_ok("the new adapter", DEADLINE, || {
        TcpStream::connect_timeout(&before.address(NEW_PORT), Duration::from_secs(1))?;
        let (code, body) = before.get("/livez")?;
        ensure!(code == 200, "{code} {body}");
        Ok(())
    })?;
    ensure!(kills > 0, "the adapter process was not killed");
    let after = stage.wait_agent()?;
    ensure!(
        after.pod == before.pod && after.restarts == before.restarts,
        "the agent was restarted"
    );

    // A bad file is rejected, and the settings in force are kept.
    upgrade(stage, &[&value("bad", BAD)?])?;
    wait::until_ok("the rejected configuration", DEADLINE, || {
        let (_, metrics) = before.get("/metrics")?;
        ensure!(
            metrics.contains("\ntailback_config_last_reload_successful 0\n"),
            "{metrics}"
        );
        Ok(())
    })?;
    TcpStream::connect_timeout(&before.address(NEW_PORT), Duration::from_secs(1))?;
    upgrade(stage, &[&good])?;
    wait::until_ok("the accepted configuration", DEADLINE, || {
        let (_, metrics) = before.get("/metrics")?;
        ensure!(
            metrics.contains("\ntailback_config_last_reload_successful 1\n"),
            "{metrics}"
        );
        Ok(())
    })
}

pub fn rolling_update(stage: &Stage) -> Result<()> {
    let before = stage.wait_agent()?;
    let watch = stage.watch("jammed")?;
    upgrade(stage, &["--set-string=podAnnotations.update=1"])?;
    let timeout = format!("--timeout={}s", DEADLINE.as_secs());
    let daemonset = format!("daemonset/{AGENT}");
    stage.kubectl().run(&[
        "--namespace",
        AGENT,
        "rollout",
        "status",
        &daemonset,
        &timeout,
    ])?;
    let after = wait::until_ok("the agent of the new pod", DEADLINE, || {
        let after = stage.wait_agent()?;
        ensure!(after.pod != before.pod, "it is still the old one");
        Ok(after)
    })?;
    thread::sleep(AFTER);
    let expired = watch.longest_expired()?;
    eprintln!("    expired for at most {expired:?}: {}", watch.report()?);
    ensure!(expired < TTL, "pages were expired for {expired:?}");
    ensure!(after.restarts == 0, "the new agent was restarted");
    Ok(())
}
