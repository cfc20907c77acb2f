//! Writes the manual pages and the shell completions of the command line into a directory, for `cargo xtask dist`.
#![forbid(unsafe_code)]

use std::{env, path::PathBuf};

use anyhow::{Context as _, Result};
use clap_complete::Shell;

fn main() -> Result<()> {
    let directory = env::args_os().nth(1).context("usage: manual DIRECTORY")?;
    let directory = PathBuf::from(directory);
    let command = tailback::cli::command();
    clap_mangen::generate_to(command.clone(), &directory)
        .with_context(|| format!("write manual pages to {}", directory.display()))?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        clap_complete::generate_to(shell, &mut command.clone(), "tailback", &directory)
            .with_context(|| format!("write completions for {shell} to {}", directory.display()))?;
    }
    Ok(())
}
