//! `cargo xtask fuzz`: runs the fuzzer of `agent/tests/fuzz` in an optimized build, for a chosen time.
//!
//! Overflow checks and debug assertions stay enabled, so that silent errors of a release build panic here. Each run uses a new
//! seed unless one is given, so that it does not repeat the inputs of the test runs.

use std::{
    env,
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};

use crate::tools;

#[derive(clap::Args)]
pub struct Args {
    /// Parser to fuzz [default: all, in parallel]
    #[arg(value_parser = ["btf", "records", "jvm_counters", "recordings", "config"])]
    target: Option<String>,
    /// Duration: `90s`, `10m`, `1h`
    #[arg(long = "for", value_name = "TIME", default_value = "5m", value_parser = seconds)]
    time: u64,
    /// Seed of the random numbers [default: the current time]
    #[arg(long)]
    seed: Option<u64>,
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let seed = match args.seed {
        Some(seed) => seed,
        None => SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .context("read the current time")?
            .as_secs(),
    };
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = std::process::Command::new(cargo);
    command
        .current_dir(tools::root())
        .args(["test", "--release", "--package", "tailback"])
        .args(["--test", "fuzz", "--", "--nocapture"])
        .args(["--exact"].iter().filter(|_| args.target.is_some()))
        .args(&args.target)
        .env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "true")
        .env("CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS", "true")
        .env("TAILBACK_FUZZ_SECONDS", args.time.to_string())
        .env("TAILBACK_FUZZ_SEED", seed.to_string());
    let status = command.status().context("start cargo")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// `90s`, `10m`, `1h`.
pub fn seconds(text: &str) -> Result<u64> {
    let wrong = || format!("invalid duration {text:?}: use 90s, 10m or 1h");
    let unit = text.chars().last().with_context(wrong)?;
    let factor = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        _ => bail!(wrong()),
    };
    let number: u64 = text.trim_end_matches(unit).parse().with_context(wrong)?;
    number
        .checked_mul(factor)
        .filter(|seconds| (1..=7 * 86_400).contains(seconds))
        .with_context(|| format!("{text} is out of range: 1s to 168h"))
}

#[cfg(test)]
mod tests {
    use super::seconds;

    #[test]
    fn a_duration_needs_a_unit() -> anyhow::Result<()> {
        assert_eq!(
            (seconds("90s")?, seconds("10m")?, seconds("1h")?),
            (90, 600, 3600)
        );
        for wrong in ["", "90", "h", "0s", "1d", "99999999999999999999h", "169h"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
        Ok(())
    }
}
