//! `cargo xtask demo`: plants a fault in a real system and shows live how the queue fills, when Tailback warns, and which
//! cause it reports.
//!
//! Everything printed comes from the running processes. `scene` starts the system, `stage` starts Tailback beside it, `story`
//! runs the phases, `observed` collects the events so far, `phrases` turns Tailback's JSON into sentences, `timeline` prints
//! them.

mod observed;
mod phrases;
mod scene;
mod stage;
mod story;
mod timeline;

use std::{env, path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::ValueEnum as _;

use crate::{
    cargo,
    setup::{self, Purpose},
};

#[derive(clap::Args)]
pub struct Args {
    /// Scenario
    #[arg(value_enum, default_value = "flash-sale")]
    story: Choice,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Choice {
    /// uWSGI -> PostgreSQL: a session holds the lock of a popular row
    FlashSale,
    /// uvicorn -> uvicorn: the provider behind a gateway becomes slow
    LlmGateway,
    /// Devices -> Mosquitto -> consumer -> PostgreSQL: PostgreSQL stalls
    IotGridlock,
}

impl Choice {
    fn set(self) -> Result<Box<dyn scene::Scene>> {
        Ok(match self {
            Self::FlashSale => Box::new(scene::FlashSale::set()?),
            Self::LlmGateway => Box::new(scene::LlmGateway::set()?),
            Self::IotGridlock => Box::new(scene::IotGridlock::set()?),
        })
    }

    /// What setup must have installed for it.
    fn parts(self) -> &'static [&'static str] {
        match self {
            Self::FlashSale => &["python3", "uWSGI", "PostgreSQL", "psycopg2"],
            Self::LlmGateway => &["python3", "uvicorn"],
            Self::IotGridlock => &["mosquitto", "PostgreSQL", "psycopg2", "paho.mqtt.client"],
        }
    }

    /// The command line of this demo.
    fn command(self) -> String {
        let name = self.to_possible_value().filter(|_| self != Self::FlashSale);
        let name = name.map_or_else(String::new, |value| format!(" {}", value.get_name()));
        format!("cargo xtask demo{name}")
    }
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let agent = match env::var_os("TAILBACK_BIN") {
        Some(path) => PathBuf::from(path),
        None => {
            setup::ensure(Purpose::Build)?;
            setup::ensure_parts(args.story.parts())?;
            cargo::build(cargo::AGENT)?
        }
    };
    story::run(&agent, args.story.set()?, &args.story.command())?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn setup_knows_the_parts_of_each_demo() {
        for part in Choice::value_variants()
            .iter()
            .flat_map(|story| story.parts())
        {
            assert!(setup::has_part(part), "{part}");
        }
    }
}
