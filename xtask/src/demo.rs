//! `cargo xtask demo`: a service fills up before one's eyes, who notices first, and who says why.
//!
//! Everything that is printed comes from the running processes. `scene` is what runs, `stage` puts Tailback beside it,
//! `story` makes things happen and tells them in order, `heard` keeps what was said so far, `words` turns what
//! Tailback says into sentences, `timeline` prints them.

mod heard;
mod scene;
mod stage;
mod story;
mod timeline;
mod words;

use std::{env, path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::ValueEnum as _;

use crate::{
    cargo,
    setup::{self, Purpose},
};

#[derive(clap::Args)]
pub struct Args {
    /// What happens
    #[arg(value_enum, default_value = "flash-sale")]
    story: Choice,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Choice {
    /// uWSGI -> PostgreSQL: a session keeps the row that all want
    FlashSale,
    /// uvicorn -> uvicorn: the provider behind a gateway becomes slow
    LlmGateway,
    /// Devices -> Mosquitto -> consumer -> PostgreSQL: the last stalls
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

    /// As one types it.
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
            setup::ensure(Purpose::Demo)?;
            cargo::build(cargo::AGENT)?
        }
    };
    story::tell(&agent, args.story.set()?, &args.story.command())?;
    Ok(ExitCode::SUCCESS)
}
