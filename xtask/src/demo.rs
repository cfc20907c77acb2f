//! `cargo xtask demo`: a service fills up before one's eyes, and who notices first.
//!
//! Everything that is printed comes from the running processes. `stage` starts them, `story` makes things happen
//! and tells them in order, `words` turns what Tailback says into sentences, `timeline` prints them.

mod stage;
mod story;
mod timeline;
mod words;

use std::{env, path::PathBuf, process::ExitCode};

use anyhow::Result;

use crate::{
    cargo::{self, Link},
    setup::{self, Purpose},
};

#[derive(clap::Args)]
pub struct Args {}

pub fn main(_args: &Args) -> Result<ExitCode> {
    let agent = match env::var_os("TAILBACK_BIN") {
        Some(path) => PathBuf::from(path),
        None => {
            setup::ensure(Purpose::Demo)?;
            cargo::build("tailback", "tailback", Link::Usual)?
        }
    };
    story::tell(&agent)?;
    Ok(ExitCode::SUCCESS)
}
