//! Mosquitto, an MQTT broker.

use std::{process::Command, time::Duration};

use anyhow::Result;

use crate::{ports, process::Process, program, temp::TempDir};

/// Deadline for the start.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// A running Mosquitto that accepts connections.
pub struct Mosquitto {
    process: Process,
    port: u16,
    _temp: TempDir,
}

impl Mosquitto {
    pub fn start() -> Result<Self> {
        let temp = TempDir::new("mosquitto")?;
        let port = ports::free()?;
        let config = temp.write(
            "mosquitto.conf",
            &format!(
                "listener {port} 127.0.0.1\nallow_anonymous true\nuser root\npersistence false\n"
            ),
        )?;
        let mut command = Command::new(program::need(&["mosquitto"])?);
        let process = Process::start("Mosquitto", command.arg("-c").arg(config))?;
        process.wait_line(" running", START_DEADLINE)?;
        Ok(Self {
            process,
            port,
            _temp: temp,
        })
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    pub fn port(&self) -> u16 {
        self.port
    }
}
