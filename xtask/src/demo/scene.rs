//! The systems of the demo: servers, their clients, and a fault that can be planted and removed.

use std::time::Duration;

use anyhow::Result;
use tailback_tests::{
    lines::Line,
    load::{Load, Plan, Spacing},
    ports,
    process::Process,
    uwsgi::reports_full,
    workloads::{self, Session},
};

/// Whether this line reports a full queue.
pub type IsFull = fn(&Line) -> bool;

/// A running system, stopped on drop.
pub trait Scene {
    /// Describes the system and its load, in sentences.
    fn opening(&self) -> Vec<String>;
    /// Tailback's target arguments.
    fn targets(&self) -> Vec<String>;
    /// Kinds of the queues that must fill; the demo shows only these.
    fn queues(&self) -> &'static [&'static str];
    /// Processes that must stay alive.
    fn processes(&self) -> Vec<&Process>;
    /// The client load, if it is open-loop over HTTP.
    fn load(&self) -> Option<&Load> {
        None
    }
    /// The process that itself reports its full queue, too late, and a test for such a line.
    fn own_report(&self) -> Option<(&Process, IsFull)> {
        None
    }
    /// When `tailback diagnose` runs, and for how long.
    fn diagnosis(&self) -> Diagnose {
        Diagnose::AfterCause("5s")
    }
    /// Plants the fault.
    fn plant(&mut self) -> Result<Planted>;
    /// Removes the fault and describes that in a sentence.
    fn remove(&mut self) -> Result<String>;
}

/// When `tailback diagnose` runs; the value is its `--for`.
#[derive(Clone, Copy)]
pub enum Diagnose {
    /// From the healthy phase on.
    FromStart(&'static str),
    /// Once a cause is reported.
    AfterCause(&'static str),
}

pub struct Planted {
    /// The process that Tailback must name.
    pub culprit: u32,
    /// Description of the fault.
    pub text: String,
}

/// An open-loop load.
fn load(port: u16, path: &str, per_s: f64) -> Result<Load> {
    Load::start(Plan {
        to: ports::local(port),
        path: path.to_owned(),
        per_s,
        spacing: Spacing::Even,
        duration: Duration::from_secs(120),
        timeout: Duration::from_secs(30),
        max_in_flight: 1000,
    })
}

fn target(selector: &str, number: impl Into<u32>) -> [String; 2] {
    [selector.to_owned(), number.into().to_string()]
}

/// A session locks the row that every request updates.
pub struct FlashSale {
    // Dropped before its server.
    holder: Option<Session>,
    load: Load,
    sale: workloads::FlashSale,
}

impl FlashSale {
    const WORKERS: u32 = 4;
    const BACKLOG: u32 = 100;
    const PER_S: f64 = 12.0;

    pub fn set() -> Result<Self> {
        let sale = workloads::FlashSale::start(Self::WORKERS, Self::BACKLOG)?;
        Ok(Self {
            holder: None,
            load: load(sale.uwsgi.port(), workloads::FlashSale::PATH, Self::PER_S)?,
            sale,
        })
    }
}

impl Scene for FlashSale {
    fn opening(&self) -> Vec<String> {
        vec![
            format!(
                "A flash sale: uWSGI on port {}, {} workers, a listen queue of {}; each request updates the same row \
                 in PostgreSQL on port {}.",
                self.sale.uwsgi.port(),
                Self::WORKERS,
                Self::BACKLOG,
                self.sale.postgres.port()
            ),
            format!("Load: {} requests per second, open-loop.", Self::PER_S),
        ]
    }

    fn targets(&self) -> Vec<String> {
        target("--port", self.sale.uwsgi.port()).into()
    }

    fn queues(&self) -> &'static [&'static str] {
        &["accept"]
    }

    fn processes(&self) -> Vec<&Process> {
        vec![self.sale.uwsgi.process(), self.sale.postgres.process()]
    }

    /// The client load, if it is open-loop over HTTP.
    fn load(&self) -> Option<&Load> {
        Some(&self.load)
    }

    fn own_report(&self) -> Option<(&Process, IsFull)> {
        Some((self.sale.uwsgi.process(), reports_full))
    }

    fn plant(&mut self) -> Result<Planted> {
        let holder = self.holder.insert(self.sale.hold_the_row()?);
        Ok(Planted {
            culprit: holder.backend,
            text: format!(
                "A session updates the row and does not commit. PostgreSQL serves it in process {}.",
                holder.backend
            ),
        })
    }

    fn remove(&mut self) -> Result<String> {
        self.holder = None;
        Ok("That session ends.".to_owned())
    }
}

/// The provider behind a gateway becomes slow.
pub struct LlmGateway {
    load: Load,
    chat: workloads::LlmGateway,
}

impl LlmGateway {
    const POOL: u32 = 16;
    const PER_S: f64 = 15.0;
    const SLOW: Duration = Duration::from_secs(3);

    pub fn set() -> Result<Self> {
        let chat = workloads::LlmGateway::start(Self::POOL)?;
        Ok(Self {
            load: load(chat.gateway.port, workloads::LlmGateway::PATH, Self::PER_S)?,
            chat,
        })
    }
}

impl Scene for LlmGateway {
    fn opening(&self) -> Vec<String> {
        vec![
            format!(
                "An LLM gateway: uvicorn on port {}, with at most {} connections to its provider, uvicorn on port {} \
                 (process {}); a response is a stream of {} ms.",
                self.chat.gateway.port,
                Self::POOL,
                self.chat.provider.port,
                self.chat.provider.process.pid(),
                workloads::LlmGateway::RESPONSE.as_millis()
            ),
            format!("Load: {} requests per second, open-loop.", Self::PER_S),
        ]
    }

    fn targets(&self) -> Vec<String> {
        target("--port", self.chat.gateway.port).into()
    }

    fn queues(&self) -> &'static [&'static str] {
        &["inflight", "downstream", "recv", "accept"]
    }

    /// Requests in flight have no limit: Tailback needs the baseline to judge them.
    fn diagnosis(&self) -> Diagnose {
        Diagnose::FromStart("16s")
    }

    fn processes(&self) -> Vec<&Process> {
        vec![&self.chat.gateway.process, &self.chat.provider.process]
    }

    /// The client load, if it is open-loop over HTTP.
    fn load(&self) -> Option<&Load> {
        Some(&self.load)
    }

    fn plant(&mut self) -> Result<Planted> {
        self.chat.slow_provider(Self::SLOW)?;
        Ok(Planted {
            culprit: self.chat.provider.process.pid(),
            text: format!(
                "The provider becomes slow: {} s to the first word instead of {} ms.",
                Self::SLOW.as_secs(),
                workloads::LlmGateway::FIRST_WORD.as_millis()
            ),
        })
    }

    fn remove(&mut self) -> Result<String> {
        self.chat.restore_provider()?;
        Ok("The provider is fast again.".to_owned())
    }
}

/// A database stalls behind three hops.
pub struct IotGridlock {
    // Dropped before its server.
    holder: Option<Session>,
    devices: workloads::IotGridlock,
}

impl IotGridlock {
    const PER_S: u32 = 300;

    pub fn set() -> Result<Self> {
        Ok(Self {
            holder: None,
            devices: workloads::IotGridlock::start(Self::PER_S)?,
        })
    }
}

impl Scene for IotGridlock {
    fn opening(&self) -> Vec<String> {
        vec![
            format!(
                "Devices send {} reports per second to Mosquitto on port {}; a consumer (process {}) writes them into \
                 PostgreSQL on port {}.",
                Self::PER_S,
                self.devices.broker.port(),
                self.devices.consumer.pid(),
                self.devices.postgres.port()
            ),
            "The devices send open-loop.".to_owned(),
        ]
    }

    fn targets(&self) -> Vec<String> {
        [
            target("--port", self.devices.broker.port()),
            target("--pid", self.devices.consumer.pid()),
            target("--port", self.devices.postgres.port()),
        ]
        .concat()
    }

    fn queues(&self) -> &'static [&'static str] {
        &["recv", "send"]
    }

    fn processes(&self) -> Vec<&Process> {
        vec![
            &self.devices.devices.process,
            &self.devices.consumer.process,
            self.devices.broker.process(),
            self.devices.postgres.process(),
        ]
    }

    fn plant(&mut self) -> Result<Planted> {
        let holder = self.holder.insert(self.devices.lock_the_table()?);
        Ok(Planted {
            culprit: holder.backend,
            text: format!(
                "A session locks the table. PostgreSQL serves it in process {}.",
                holder.backend
            ),
        })
    }

    fn remove(&mut self) -> Result<String> {
        self.holder = None;
        Ok("That session ends.".to_owned())
    }
}
