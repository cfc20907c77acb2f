//! Plays incidents on real, stock servers, and compares the agent's verdicts with what was planted.
//!
//! A scenario uses only the agent's command line and its JSON lines. `table` lists the scenarios, `play` runs one,
//! `judge` turns its events into a row; the other files hold the scenarios, grouped by what they plant.

mod accelerators;
mod blocked;
mod brokers;
mod collectors;
mod control;
mod cpu;
mod database;
mod disk;
mod downstream;
mod gateway;
mod gridlock;
mod judge;
mod leaks;
mod limits;
mod lock;
mod memory;
mod network;
mod peers;
mod play;
mod pools;
mod programs;
mod proxies;
mod resolver;
mod reuseport;
mod routine;
mod shared;
mod storms;
mod table;
mod tracking;

use std::{
    env,
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use tailback_tests::{
    exit_code, program, python,
    scenario::{Listed, Outcome, Row},
};

use play::Play;
use table::{SCENARIOS, Scenario};

/// Argument: play in the current network namespace.
const HERE: &str = "--here";

const USAGE: &str = "\
Usage: tailback-scenarios [--list] [--keep DIR] [SCENARIO...]

Plays scenarios with the agent (TAILBACK_BIN) beside them: one JSON object per line. --keep: the samples of each run as
DIR/SCENARIO.tbk, for `tailback replay`. Exit code 0 if all is as it should be, 1 if not, 2 for a mistake in the
arguments.";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    if words == ["--list"] {
        for scenario in SCENARIOS {
            let listed = Listed {
                name: scenario.name.to_owned(),
                room: scenario.room,
            };
            println!("{listed}");
        }
        return ExitCode::SUCCESS;
    }
    let (here, words) = match words.split_first() {
        Some((&HERE, rest)) => (true, rest),
        _ => (false, words.as_slice()),
    };
    let args = match Args::read(words) {
        Ok(args) => args,
        Err(error) => {
            eprintln!("error: {error:#}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let done = match args.scenarios.as_slice() {
        _ if here => play_here(&args),
        // A single scenario replaces this process, so that a signal to this pid reaches it.
        [one] => inside(one, &args).and_then(|mut command| {
            let error = command.exec();
            Err(error).context("play a scenario")
        }),
        _ => play_all(&args),
    };
    exit_code::of(done)
}

/// The command line.
struct Args {
    keep: Option<PathBuf>,
    scenarios: Vec<&'static Scenario>,
}

impl Args {
    fn read(words: &[&str]) -> Result<Self> {
        let mut args = Self {
            keep: None,
            scenarios: Vec::new(),
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            if *word == "--keep" {
                args.keep = Some(words.next().context("--keep needs a directory")?.into());
                continue;
            }
            match SCENARIOS.iter().find(|scenario| scenario.name == *word) {
                Some(scenario) => args.scenarios.push(scenario),
                None => bail!("no such scenario: {word:?}; `--list` prints all of them"),
            }
        }
        if args.scenarios.is_empty() {
            args.scenarios = SCENARIOS.iter().collect();
        }
        Ok(args)
    }
}

/// Plays each in its own process and network namespace, so that limits, ports and kernel counters are its own.
fn play_all(args: &Args) -> Result<bool> {
    let mut good = true;
    for scenario in &args.scenarios {
        let status = inside(scenario, args)?.status();
        good &= status.context("play a scenario")?.success();
    }
    Ok(good)
}

/// The command that plays a scenario in its own network namespace; without root, in the current one.
fn inside(scenario: &Scenario, args: &Args) -> Result<Command> {
    let program = env::current_exe().context("find this program")?;
    let up = "ip link set lo up && exec \"$@\"";
    let mut command = if rustix::process::geteuid().is_root() {
        let mut command = Command::new(program::need(&["unshare"])?);
        command
            .args(["--net", "--", "sh", "-c", up, "sh"])
            .arg(program);
        command
    } else {
        Command::new(program)
    };
    command.args([HERE, scenario.name]);
    if let Some(directory) = &args.keep {
        command.arg("--keep").arg(directory);
    }
    Ok(command)
}

fn play_here(args: &Args) -> Result<bool> {
    let mut good = true;
    for scenario in &args.scenarios {
        let begun = Instant::now();
        let mut row = row(scenario, args);
        row.took_s = begun.elapsed().as_secs_f64();
        good &= row.outcome != Outcome::Wrong;
        println!("{}", row.to_json());
        std::io::stdout().flush().context("write the row")?;
    }
    Ok(good)
}

fn row(scenario: &Scenario, args: &Args) -> Row {
    let record = args
        .keep
        .as_ref()
        .map(|directory| directory.join(format!("{}.tbk", scenario.name)));
    let missing = missing(scenario);
    let (outcome, why) = match missing {
        Some(missing) => (Outcome::Skipped, missing),
        None => match play(scenario, record) {
            Ok(row) => return row,
            Err(error) => (Outcome::Wrong, format!("{error:#}")),
        },
    };
    let mut row = judge::row(scenario, &play::Story::default());
    row.outcome = outcome;
    row.why = vec![why];
    row
}

fn play(scenario: &Scenario, record: Option<PathBuf>) -> Result<Row> {
    let _priority = cpu::RaisedPriority::of_others();
    let mut play = Play::new(scenario.planted, record)?;
    let played = (scenario.play)(&mut play);
    if let Err(error) = played {
        return Err(error.context("play it"));
    }
    let story = play.end()?;
    if env::var_os("TAILBACK_SCENARIO_LOG").is_some() {
        for event in &story.events {
            if ["level", "episode", "notice"].contains(&event.text("type")) {
                let planted = story.planted.map(|at| {
                    event.at.saturating_duration_since(at).as_secs_f64()
                        - at.saturating_duration_since(event.at).as_secs_f64()
                });
                eprintln!("{:+.2} {}", planted.unwrap_or_default(), event.value);
            }
        }
    }
    Ok(judge::row(scenario, &story))
}

/// Why this machine cannot play the scenario.
fn missing(scenario: &Scenario) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("only root may load eBPF programs".to_owned());
    }
    let programs = scenario.programs.iter();
    let missing = programs.filter_map(|program| program::need(&[program]).err());
    let modules = (!scenario.modules.is_empty())
        .then(|| python::with(scenario.modules).err())
        .flatten();
    missing
        .chain(modules)
        .map(|error| format!("{error:#}"))
        .next()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_scenario_is_listed_once() {
        let names: BTreeSet<&str> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
        assert_eq!(names.len(), SCENARIOS.len());
    }

    #[test]
    fn a_scenario_that_does_not_exist_cannot_be_asked_for() {
        assert!(Args::read(&["flash-sale"]).is_ok());
        assert!(Args::read(&["sausages"]).is_err());
        assert!(Args::read(&["--keep"]).is_err());
    }
}
