//! Devices, a broker, a consumer and a database: when the last stalls, the jam grows back to the first.

use anyhow::Result;

use super::{Program, SOON, Session};
use crate::{mosquitto::Mosquitto, postgres::Postgres};

/// Devices that report to Mosquitto, from which a consumer writes into PostgreSQL.
pub struct IotGridlock {
    // The first goes first, so that nobody complains that those after it are gone.
    pub devices: Program,
    pub consumer: Program,
    pub broker: Mosquitto,
    pub postgres: Postgres,
}

impl IotGridlock {
    /// A report has 1,000 bytes.
    pub fn start(reports_per_s: u32) -> Result<Self> {
        let postgres = Postgres::start()?;
        postgres.run("CREATE TABLE readings (value int)")?;
        let broker = Mosquitto::start()?;
        let (broker_port, sql_port) = (broker.port().to_string(), postgres.port().to_string());
        let consumer = Program::python(
            "consumer",
            include_str!("apps/consumer.py"),
            &["paho.mqtt.client", "psycopg2"],
            &[&broker_port, &sql_port],
        )?;
        consumer.process.wait_line("subscribed", SOON)?;
        let devices = Program::python(
            "devices",
            include_str!("apps/devices.py"),
            &["paho.mqtt.client"],
            &[&broker_port, &reports_per_s.to_string()],
        )?;
        Ok(Self {
            devices,
            consumer,
            broker,
            postgres,
        })
    }

    /// The services on the way, the first one first.
    pub fn pids(&self) -> [u32; 3] {
        [
            self.broker.process().pid(),
            self.consumer.pid(),
            self.postgres.process().pid(),
        ]
    }

    /// One session locks the table that the consumer writes into, and does not commit.
    pub fn lock_the_table(&self) -> Result<Session> {
        let lock = "LOCK TABLE readings IN ACCESS EXCLUSIVE MODE";
        Session::open(self.postgres.port(), &[lock])
    }
}
