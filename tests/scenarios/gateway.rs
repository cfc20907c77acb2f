//! A gateway in front of a provider whose answers are long streams, with a bounded pool of connections to it.

use std::time::Duration;

use anyhow::Result;
pub use tailback_tests::workloads::Uvicorn;
use tailback_tests::{ports, workloads::LlmGateway};

use crate::{
    play::{Culprit, Play},
    programs::load,
};

fn provider(chat: &LlmGateway) -> Culprit {
    Culprit::server(chat.provider.process.pid(), chat.provider.port)
}

/// The provider takes 3 s to its first word instead of 50 ms.
pub fn slow_provider(play: &mut Play) -> Result<()> {
    let chat = LlmGateway::start(16)?;
    let load = load(ports::local(chat.gateway.port), LlmGateway::PATH, 15.0)?;
    play.watch_pid(chat.gateway.process.pid())?;
    play.healthy()?;
    play.planted(provider(&chat));
    chat.slow_provider(Duration::from_secs(3))?;
    play.hold()?;
    play.removing(Some(&load));
    chat.restore_provider()?;
    load.set_rate(5.0)?;
    play.recover()
}

/// The provider is as fast as ever, and there are too few connections to it, from the beginning: 3 / 0.27 s serve 11 a
/// second.
pub fn small_pool(play: &mut Play) -> Result<()> {
    let chat = LlmGateway::start(3)?;
    let gateway = chat.gateway.process.pid();
    play.watch_pid(gateway)?;
    play.planted(provider(&chat).and([gateway]));
    let load = load(ports::local(chat.gateway.port), LlmGateway::PATH, 20.0)?;
    play.hold()?;
    play.removing(Some(&load));
    load.set_rate(3.0)?;
    play.recover()
}
