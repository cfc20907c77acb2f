//! `cargo xtask setup`: looks for every part in the table of `parts`, and gets those that are missing.
//!
//! A part is looked for by what it is (a program on `PATH`, a file of the right version), never by what was done
//! before, so that a second run does nothing and a part that the machine already has is taken as it is. What can
//! be had only as root on Debian is elsewhere printed as the commands to type.

mod cargo_tools;
mod debian;
mod ebpf;
mod jaeger;
mod machine;
mod parts;
mod vmlinuz;

use std::{
    fs,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{command::Cmd, kernels::Kernel, tools};
use machine::Machine;
use parts::Part;

#[derive(clap::Args)]
pub struct Args {
    /// What to prepare for
    #[arg(long = "for", value_enum, default_value = "all")]
    purpose: Purpose,
    /// Print what would be done, and do nothing
    #[arg(long)]
    print: bool,
}

/// What a part is needed for. Building is part of every other purpose.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Purpose {
    Build,
    Test,
    /// Booting kernels
    #[value(skip)]
    Boot,
    Demo,
    /// What only `.ci/run` needs
    Ci,
    All,
}

/// What there is of a part.
pub enum State {
    Found(String),
    Missing(String),
}

/// One way to get a part.
pub struct Way {
    /// What a person reads while it runs.
    pub title: String,
    pub actions: Vec<Action>,
}

/// A step of a way.
pub enum Action {
    /// Install Debian packages. The only step that needs root.
    Apt(&'static [&'static str]),
    Run(Cmd),
    /// Note down a line in a file.
    Write(PathBuf, String),
    /// Fetch a kernel from Debian's archive.
    Kernel(&'static Kernel),
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let machine = Machine::look(args.print);
    let outcome = get(|part| part.is_for(args.purpose), &machine, Talk::All)?;
    Ok(if !outcome.failed.is_empty() {
        ExitCode::FAILURE
    } else if !outcome.by_hand.is_empty() && !args.print {
        ExitCode::from(2)
    } else {
        ExitCode::SUCCESS
    })
}

/// For commands that need the parts: says something only where something is missing, and fails only where nothing
/// can be built. A test whose part is missing says so itself.
pub fn ensure(purpose: Purpose) -> Result<()> {
    ensure_with_kernels(purpose, &[])
}

/// As [`ensure`], for commands that boot these kernels.
pub fn ensure_with_kernels(purpose: Purpose, kernels: &[&Kernel]) -> Result<()> {
    let wanted = |part: &Part| match part.kernel() {
        Some(kernel) => kernels.iter().any(|one| one.name == kernel.name),
        None => part.is_for(purpose),
    };
    let outcome = get(wanted, &Machine::look(false), Talk::Missing)?;
    let missing = outcome
        .failed
        .iter()
        .chain(outcome.by_hand.iter().map(|(part, _)| part));
    let blocking: Vec<&str> = missing
        .filter(|part| part.is_for(Purpose::Build))
        .map(|part| part.name.as_str())
        .collect();
    if !blocking.is_empty() {
        bail!("nothing can be built without: {}", blocking.join(", "));
    }
    Ok(())
}

/// What became of the parts that were looked for.
#[derive(Default)]
struct Outcome {
    found: usize,
    installed: usize,
    failed: Vec<Part>,
    /// Parts that a person has to get, and how.
    by_hand: Vec<(Part, Vec<String>)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Talk {
    All,
    Missing,
}

fn get(wanted: impl Fn(&Part) -> bool, machine: &Machine, talk: Talk) -> Result<Outcome> {
    let start = Instant::now();
    let cache = tools::cache();
    fs::create_dir_all(&cache).with_context(|| {
        format!(
            "make {}, the folder of what setup builds and fetches",
            cache.display()
        )
    })?;
    let mut outcome = Outcome::default();
    for part in parts::table().into_iter().filter(wanted) {
        let why = match part.look() {
            State::Found(what) => {
                outcome.found += 1;
                if talk == Talk::All {
                    line("found", &part, &what);
                }
                continue;
            }
            State::Missing(why) => why,
        };
        line("missing", &part, &why);
        let ways = part.ways();
        if machine.print || !ways.iter().any(|way| machine.can(way)) {
            let commands = by_hand(&part, &ways);
            outcome.by_hand.push((part, commands));
        } else if let Err(error) = install(&part, &ways, machine) {
            line("failed", &part, &format!("{error:#}"));
            outcome.failed.push(part);
        } else {
            outcome.installed += 1;
        }
    }
    println!(
        "setup: {} found, {} installed, {} failed, {} left ({})",
        outcome.found,
        outcome.installed,
        outcome.failed.len(),
        outcome.by_hand.len(),
        seconds(start.elapsed())
    );
    print_by_hand(&outcome.by_hand, machine);
    Ok(outcome)
}

/// Tries the ways that this machine allows, in turn, until the part is there.
fn install(part: &Part, ways: &[Way], machine: &Machine) -> Result<()> {
    let mut ways = ways.iter().filter(|way| machine.can(way)).peekable();
    while let Some(way) = ways.next() {
        line("getting", part, &way.title);
        let start = Instant::now();
        let acted = way
            .actions
            .iter()
            .try_for_each(|action| machine.act(action));
        let took = seconds(start.elapsed());
        let why = match (acted, part.look()) {
            (Ok(()), State::Found(what)) => {
                line("installed", part, &format!("{what} (in {took})"));
                return Ok(());
            }
            (Ok(()), State::Missing(why)) => format!("all steps were done, and still {why}"),
            (Err(error), _) => format!("{error:#}"),
        };
        if ways.peek().is_none() {
            bail!("{why} (after {took})");
        }
        line(
            "refused",
            part,
            &format!("not this way: {why} (after {took})"),
        );
    }
    bail!("there is no way to get it here")
}

/// The commands of the first way, or else what to do instead.
fn by_hand(part: &Part, ways: &[Way]) -> Vec<String> {
    match ways.first() {
        Some(way) => way.actions.iter().map(Action::typed).collect(),
        None => vec![format!("# {}", part.hint())],
    }
}

fn print_by_hand(parts: &[(Part, Vec<String>)], machine: &Machine) {
    if parts.is_empty() {
        return;
    }
    println!(
        "\nTo install {}:",
        if machine.print {
            "what is missing"
        } else {
            "the rest"
        }
    );
    for (part, commands) in parts {
        println!("\n    # {}", part.name);
        for command in commands {
            println!("    {command}");
        }
    }
    if !machine.debian {
        println!(
            "\nElsewhere than on Debian these packages have other names: what counts is the programs."
        );
    }
    println!();
}

fn line(state: &str, part: &Part, text: &str) {
    println!("  {state:<10} {:<18} {text}", part.name);
}

/// A duration for people.
pub fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}
