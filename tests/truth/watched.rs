//! WATCHED

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use tailback_tests::{
    agent::{Agent, Event},
    network::Network,
    service::Service,
};

use crate::{SOON, SUBJECT};

/// A service that accepts, in a network of its own, and the agent that watches it and has looked once.
pub struct Watched {
    // Dropped first: the agent, then the service, then the network that it is in.
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
        agent.wait_for("whom it watches", SOON, |event| event.is("target"))?;
        Ok(Self {
            agent,
            service,
            network,
        })
    }

    /// How the kernel counted since `before`.
    pub fn counted(&self, before: &BTreeMap<String, u64>, name: &str) -> Result<u64> {
        let now = self.network.counters()?;
        let count = |counters: &BTreeMap<String, u64>| {
            counters
                .get(name)
                .copied()
                .with_context(|| format!("nstat does not know {name}"))
        };
        Ok(count(&now)? - count(before)?)
    }

    pub fn level(&self, level: &str) -> Result<Event> {
        self.agent
            .wait_for(&format!("{level} of the accept queue"), SOON, |event| {
                event.is("level") && event.text("kind") == "accept" && event.text("to") == level
            })
    }

    /// The episode of the accept queue, once it is over.
    pub fn episode(&self) -> Result<Event> {
        self.agent
            .wait_for("the end of the episode", SOON, |event| {
                event.is("episode")
                    && event.text("kind") == "accept"
                    && event.value.get("ongoing").is_none()
            })
    }
}
