//! A service in its own network namespace, monitored by an agent.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use tailback_tests::{
    agent::{Agent, Event},
    network::Network,
    service::Service,
};

use crate::{DEADLINE, SUBJECT};

/// A service in its own network namespace, where no other traffic is counted, and the agent that monitors it. The agent has
/// taken its first sample.
pub struct Watched {
    // Fields drop in this order: the agent, the service, then its network.
    pub agent: Agent,
    pub service: Service,
    pub network: Network,
}

impl Watched {
    pub fn start(args: &[&str], agent_args: &[&str]) -> Result<Self> {
        let network = Network::new()?;
        let mut words = vec!["take", "--listen", "127.0.0.1:0"];
        words.extend(args);
        let service = Service::start(&mut network.command(SUBJECT)?, &words)?;
        let pid = service.pid().to_string();
        let agent = Agent::run(["--pid", &pid].iter().chain(agent_args))?;
        agent.wait_for("its target", DEADLINE, |event| event.is("target"))?;
        Ok(Self {
            agent,
            service,
            network,
        })
    }

    /// Growth of a kernel counter since `before`.
    pub fn counted(&self, before: &BTreeMap<String, u64>, name: &str) -> Result<u64> {
        let now = self.network.counters()?;
        let count = |counters: &BTreeMap<String, u64>| {
            counters
                .get(name)
                .copied()
                .with_context(|| format!("nstat has no counter {name}"))
        };
        Ok(count(&now)? - count(before)?)
    }

    /// Waits until the accept queue reaches this level.
    pub fn level(&self, level: &str) -> Result<Event> {
        self.agent.wait_for(
            &format!("level {level} of the accept queue"),
            DEADLINE,
            |event| {
                event.is("level") && event.text("kind") == "accept" && event.text("to") == level
            },
        )
    }

    /// Waits for the end of the episode of the accept queue.
    pub fn episode(&self) -> Result<Event> {
        self.agent
            .wait_for("the end of the episode", DEADLINE, |event| {
                event.is("episode")
                    && event.text("kind") == "accept"
                    && event.value.get("ongoing").is_none()
            })
    }
}
