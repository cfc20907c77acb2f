//! Devices, a broker, a consumer and a database: when the database stalls, backpressure propagates to the devices.

use anyhow::Result;

use super::{DEADLINE, Program, Session};
use crate::{mosquitto::Mosquitto, postgres::Postgres};

/// Devices that report to Mosquitto, from which a consumer writes into PostgreSQL.
pub struct IotGridlock {
    // Dropped in this order, so that no process logs that its upstream is gone.
    pub devices: Program,
    pub consumer: Program,
    pub broker: Mosquitto,
    pub postgres: Postgres,
}

impl IotGridlock {
    /// Starts all of them. A report has 1,000 bytes.
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
        consumer.process.wait_line("subscribed", DEADLINE)?;
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

    /// Pids of the services in the order of the data flow.
    pub fn pids(&self) -> [u32; 3] {
        [
            self.broker.process().pid(),
            self.consumer.pid(),
            self.postgres.process().pid(),
        ]
    }

    /// Plants the fault: a session locks the consumer's table and does not commit.
    pub fn lock_the_table(&self) -> Result<Session> {
        let lock = "LOCK TABLE readings IN ACCESS EXCLUSIVE MODE";
        Session::open(self.postgres.port(), &[lock])
    }
}
