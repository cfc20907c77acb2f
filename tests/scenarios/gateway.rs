//! A gateway in front of a provider whose answers are long streams, with a bounded pool of connections to it.
//!
//! Callers are accepted at once and wait inside: what fills is not the accept queue.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};
use tailback_tests::{http, ports, process::Process, python, temp::TempDir, wait};

use crate::{
    play::{Culprit, Play},
    programs::{SOON, load},
};

/// uvicorn with one of our applications.
pub struct Uvicorn {
    pub process: Process,
    pub port: u16,
    _folder: TempDir,
}

impl Uvicorn {
    pub fn start(name: &str, text: &str, env: &[(&str, String)]) -> Result<Self> {
        Self::start_within(&[], name, text, env)
    }

    /// `before` is what starts it.
    pub fn start_within(
        before: &[String],
        name: &str,
        text: &str,
        env: &[(&str, String)],
    ) -> Result<Self> {
        let folder = TempDir::new(name)?;
        folder.write("app.py", text)?;
        let port = ports::free()?;
        let python = python::with(&["uvicorn"])?.display().to_string();
        let mut words = before.iter().chain([&python]);
        let mut command = Command::new(words.next().unwrap_or(&python));
        command
            .args(words)
            .args(["-m", "uvicorn", "--no-access-log", "--loop", "asyncio"])
            .args(["--timeout-keep-alive", "75"])
            .args(["--port", &port.to_string(), "app:application"])
            .envs(env.iter().map(|(key, value)| (key, value)))
            .current_dir(folder.path());
        let process = Process::start(name, &mut command)?;
        wait::until(&format!("an answer of {name}"), SOON, || {
            process.check_running()?;
            Ok(http::get(ports::local(port), "/", SOON).ok())
        })?;
        Ok(Self {
            process,
            port,
            _folder: folder,
        })
    }
}

struct Pair {
    provider: Uvicorn,
    gateway: Uvicorn,
    slow: TempDir,
}

fn pair(pool: u32) -> Result<Pair> {
    let slow = TempDir::new("slow")?;
    let file = slow.path().join("ms").display().to_string();
    let text = include_str!("apps/provider.py");
    let provider = Uvicorn::start("provider", text, &[("PROVIDER_SLOW", file)])?;
    let env = [
        ("GATEWAY_PROVIDER", provider.port.to_string()),
        ("GATEWAY_POOL", pool.to_string()),
    ];
    let gateway = Uvicorn::start("gateway", include_str!("apps/gateway.py"), &env)?;
    Ok(Pair {
        provider,
        gateway,
        slow,
    })
}

/// The provider takes 3 s to its first word instead of 50 ms.
pub fn slow_provider(play: &mut Play) -> Result<()> {
    let Pair {
        provider,
        gateway,
        slow,
    } = pair(16)?;
    let load = load(ports::local(gateway.port), "/chat", 15.0)?;
    play.watch_pid(gateway.process.pid())?;
    play.healthy()?;
    play.planted(Culprit::server(provider.process.pid(), provider.port));
    let file = slow.write("ms", "3000")?;
    play.hold()?;
    play.removing(Some(&load));
    fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
    load.set_rate(5.0)?;
    play.recover()
}

/// The provider is as fast as ever, and there are too few connections to it, from the beginning: 3 / 0.27 s serve 11 a
/// second.
pub fn small_pool(play: &mut Play) -> Result<()> {
    let Pair {
        provider, gateway, ..
    } = pair(3)?;
    play.watch_pid(gateway.process.pid())?;
    let culprit = Culprit::server(provider.process.pid(), provider.port);
    play.planted(culprit.and([gateway.process.pid()]));
    let load = load(ports::local(gateway.port), "/chat", 20.0)?;
    play.hold()?;
    play.removing(Some(&load));
    load.set_rate(3.0)?;
    play.recover()
}
