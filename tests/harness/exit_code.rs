//! Exit codes of the programs that play incidents, run checks, or compare numbers: 0 if all is as it should be, 1 if not, 2 if it
//! could not be found out.

use std::process::ExitCode;

use anyhow::Result;

/// The exit code for an outcome: whether all is as it should be. An error is printed on standard error.
pub fn of(outcome: Result<bool>) -> ExitCode {
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}
