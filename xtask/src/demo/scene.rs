//! What a demo plays: servers, their callers, and a cause that comes and goes.

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

/// Whether this line says that a queue is full.
pub type IsFull = fn(&Line) -> bool;

/// All that runs beside the agent. It ends with its owner.
pub trait Scene {
    /// Who serves whom, and under what load, in sentences.
    fn opening(&self) -> Vec<String>;
    /// Whom Tailback watches: its arguments.
    fn targets(&self) -> Vec<String>;
    /// Kinds of the queues that must fill, and of which is told.
    fn queues(&self) -> &'static [&'static str];
    /// All that should be alive.
    fn processes(&self) -> Vec<&Process>;
    fn load(&self) -> Option<&Load> {
        None
    }
    /// Whoever says, too late, that its queue is full, and what tells such a line.
    fn own_words(&self) -> Option<(&Process, IsFull)> {
        None
    }
    /// When somebody asks why.
    fn look(&self) -> Look {
        Look::WhenItIsLate("5s")
    }
    /// The cause is there from now on.
    fn plant(&mut self) -> Result<Planted>;
    /// The cause is gone. Says so in a sentence.
    fn remove(&mut self) -> Result<String>;
}

/// For how long `tailback diagnose` looks.
#[derive(Clone, Copy)]
pub enum Look {
    /// While all is well already.
    FromTheStart(&'static str),
    /// Once a cause is known.
    WhenItIsLate(&'static str),
}

pub struct Planted {
    /// The process that is to be named.
    pub culprit: u32,
    pub told: String,
}

/// Requests that do not wait for answers.
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

fn watch(selector: &str, number: impl Into<u32>) -> [String; 2] {
    [selector.to_owned(), number.into().to_string()]
}

/// A session takes the row that everybody wants, and keeps it.
pub struct FlashSale {
    // First, so that it ends before its server.
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
                "A flash sale: uWSGI on port {}, {} workers, a listen queue of {}; each request updates one and the \
                 same row in PostgreSQL on port {}.",
                self.sale.uwsgi.port(),
                Self::WORKERS,
                Self::BACKLOG,
                self.sale.postgres.port()
            ),
            format!(
                "{} requests a second come in, whether it answers or not.",
                Self::PER_S
            ),
        ]
    }

    fn targets(&self) -> Vec<String> {
        watch("--port", self.sale.uwsgi.port()).into()
    }

    fn queues(&self) -> &'static [&'static str] {
        &["accept"]
    }

    fn processes(&self) -> Vec<&Process> {
        vec![self.sale.uwsgi.process(), self.sale.postgres.process()]
    }

    fn load(&self) -> Option<&Load> {
        Some(&self.load)
    }

    fn own_words(&self) -> Option<(&Process, IsFull)> {
        Some((self.sale.uwsgi.process(), reports_full))
    }

    fn plant(&mut self) -> Result<Planted> {
        let holder = self.holder.insert(self.sale.hold_the_row()?);
        Ok(Planted {
            culprit: holder.backend,
            told: format!(
                "Somebody's session updates the row, too, and does not commit. PostgreSQL serves it in process {}.",
                holder.backend
            ),
        })
    }

    fn remove(&mut self) -> Result<String> {
        self.holder = None;
        Ok("That session ends.".to_owned())
    }
}

/// The provider of a gateway answers slowly.
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
                 (process {}); an answer is a stream of {} ms.",
                self.chat.gateway.port,
                Self::POOL,
                self.chat.provider.port,
                self.chat.provider.process.pid(),
                workloads::LlmGateway::RESPONSE.as_millis()
            ),
            format!(
                "{} requests a second come in, whether it answers or not.",
                Self::PER_S
            ),
        ]
    }

    fn targets(&self) -> Vec<String> {
        watch("--port", self.chat.gateway.port).into()
    }

    fn queues(&self) -> &'static [&'static str] {
        &["inflight", "downstream", "recv", "accept"]
    }

    /// What is in progress has no limit of its own: only who has seen what is usual can tell that it is too much.
    fn look(&self) -> Look {
        Look::FromTheStart("16s")
    }

    fn processes(&self) -> Vec<&Process> {
        vec![&self.chat.gateway.process, &self.chat.provider.process]
    }

    fn load(&self) -> Option<&Load> {
        Some(&self.load)
    }

    fn plant(&mut self) -> Result<Planted> {
        self.chat.slow_provider(Self::SLOW)?;
        Ok(Planted {
            culprit: self.chat.provider.process.pid(),
            told: format!(
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
    // First, so that it ends before its server.
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
                "Devices send {} reports a second to Mosquitto on port {}; a consumer (process {}) writes them into \
                 PostgreSQL on port {}.",
                Self::PER_S,
                self.devices.broker.port(),
                self.devices.consumer.pid(),
                self.devices.postgres.port()
            ),
            "The devices send, whatever becomes of it.".to_owned(),
        ]
    }

    fn targets(&self) -> Vec<String> {
        [
            watch("--port", self.devices.broker.port()),
            watch("--pid", self.devices.consumer.pid()),
            watch("--port", self.devices.postgres.port()),
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
            told: format!(
                "Somebody's session locks the table. PostgreSQL serves it in process {}.",
                holder.backend
            ),
        })
    }

    fn remove(&mut self) -> Result<String> {
        self.holder = None;
        Ok("That session ends.".to_owned())
    }
}
