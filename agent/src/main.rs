//! The agent's binary: a shell around [`tailback::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    tailback::cli::main()
}
