//! A gateway with a bounded connection pool in front of a provider that streams long responses.

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

/// The provider's time to first token rises from 50 ms to 3 s.
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

/// The provider is fast, but the pool is too small from the start: 3 connections / 0.27 s serve 11 requests a second.
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
