//! `cargo xtask setup`: finds every part in the table of `parts`, and installs the missing ones.
//!
//! A part is detected by its presence (a program on `PATH`, a file of the right version), not by a record of earlier
//! runs. So a second run does nothing, and existing installations are used. Debian packages are installed only on
//! Debian and as root; otherwise the commands are printed.

mod cargo_tools;
mod debian;
pub mod ebpf;
mod envoy;
mod helm;
mod jaeger;
pub mod kubernetes;
mod machine;
mod parts;
mod vmlinuz;
mod wheel;

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
    /// Only print what would be done
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
    /// Parts that only `.ci/run` needs
    Ci,
    /// `cargo xtask test --cluster`
    Cluster,
    /// Releases for aarch64, and its kernel
    Aarch64,
    /// All of them but the cluster and aarch64
    All,
}

/// Whether a part is present: a description, or why not.
pub enum State {
    Found(String),
    Missing(String),
}

/// One method to install a part.
pub struct Method {
    /// Progress text.
    pub title: String,
    pub actions: Vec<Action>,
}

/// A step of a method.
pub enum Action {
    /// Install Debian packages. The only step that needs root.
    Apt(&'static [&'static str]),
    Run(Cmd),
    /// Write a line to a file.
    Write(PathBuf, String),
    /// Fetch a kernel from Debian's archive.
    Kernel(&'static Kernel),
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let machine = Machine::detect(args.print);
    let outcome = get(|part| part.is_for(args.purpose), &machine, Verbosity::All)?;
    Ok(if !outcome.failed.is_empty() {
        ExitCode::FAILURE
    } else if !outcome.manual.is_empty() && !args.print {
        ExitCode::from(2)
    } else {
        ExitCode::SUCCESS
    })
}

/// For commands that need the parts: prints only missing parts, and fails only if building is impossible. A test whose part
/// is missing reports that itself.
pub fn ensure(purpose: Purpose) -> Result<()> {
    ensure_with_kernels(purpose, &[])
}

/// Like [`ensure`], for commands that boot these kernels.
pub fn ensure_with_kernels(purpose: Purpose, kernels: &[&Kernel]) -> Result<()> {
    let wanted = |part: &Part| match part.kernel() {
        Some(kernel) => kernels.iter().any(|one| one.name == kernel.name),
        None => {
            let mut others = kernels.iter().filter(|one| !one.architecture.is_own());
            part.is_for(purpose) || others.any(|_| part.is_for(Purpose::Aarch64))
        }
    };
    let outcome = get(wanted, &Machine::detect(false), Verbosity::Missing)?;
    let missing = outcome
        .failed
        .iter()
        .chain(outcome.manual.iter().map(|(part, _)| part));
    let blocking: Vec<&str> = missing
        .filter(|part| part.is_for(Purpose::Build))
        .map(|part| part.name.as_str())
        .collect();
    if !blocking.is_empty() {
        bail!("cannot build without: {}", blocking.join(", "));
    }
    Ok(())
}

/// Installs the missing ones of these parts, for a command that cannot do without any of them. Fails with their names if that
/// is impossible, and says nothing if all are present.
pub fn ensure_parts(names: &[&str]) -> Result<()> {
    let is_missing = |part: &Part| {
        names.contains(&part.name.as_str()) && matches!(part.find(), State::Missing(_))
    };
    let missing = parts::table().into_iter().filter(is_missing);
    let missing: Vec<String> = missing.map(|part| part.name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let outcome = get(
        |part| missing.contains(&part.name),
        &Machine::detect(false),
        Verbosity::Missing,
    )?;
    let manual = outcome.manual.iter().map(|(part, _)| part);
    let absent = outcome.failed.iter().chain(manual);
    let absent: Vec<&str> = absent.map(|part| part.name.as_str()).collect();
    if !absent.is_empty() {
        bail!("cannot begin without: {}", absent.join(", "));
    }
    Ok(())
}

/// Installs the missing parts for a purpose that needs all of them. Fails with their names if that is impossible.
pub fn ensure_all(purpose: Purpose) -> Result<()> {
    let parts = parts::table().into_iter();
    let parts = parts.filter(|part| part.is_for(purpose));
    let names: Vec<String> = parts.map(|part| part.name).collect();
    ensure_parts(&names.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Whether the table has this part.
#[cfg(test)]
pub fn has_part(name: &str) -> bool {
    parts::table().iter().any(|part| part.name == name)
}

/// Result of a run.
#[derive(Default)]
struct Outcome {
    found: usize,
    installed: usize,
    failed: Vec<Part>,
    /// Parts to install manually, with the commands.
    manual: Vec<(Part, Vec<String>)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verbosity {
    All,
    Missing,
}

fn get(wanted: impl Fn(&Part) -> bool, machine: &Machine, verbosity: Verbosity) -> Result<Outcome> {
    let start = Instant::now();
    let cache = tools::cache();
    fs::create_dir_all(&cache)
        .with_context(|| format!("create the cache directory {}", cache.display()))?;
    let mut outcome = Outcome::default();
    for part in parts::table().into_iter().filter(wanted) {
        let why = match part.find() {
            State::Found(what) => {
                outcome.found += 1;
                if verbosity == Verbosity::All {
                    line("found", &part, &what);
                }
                continue;
            }
            State::Missing(why) => why,
        };
        line("missing", &part, &why);
        let methods = part.methods();
        if machine.print || !methods.iter().any(|method| machine.can(method)) {
            let commands = manual(&part, &methods);
            outcome.manual.push((part, commands));
        } else if let Err(error) = install(&part, &methods, machine) {
            line("failed", &part, &format!("{error:#}"));
            outcome.failed.push(part);
        } else {
            outcome.installed += 1;
        }
    }
    if verbosity == Verbosity::Missing
        && outcome.installed + outcome.failed.len() + outcome.manual.len() == 0
    {
        return Ok(outcome);
    }
    println!(
        "setup: {} found, {} installed, {} failed, {} manual ({})",
        outcome.found,
        outcome.installed,
        outcome.failed.len(),
        outcome.manual.len(),
        seconds(start.elapsed())
    );
    print_by_hand(&outcome.manual, machine);
    Ok(outcome)
}

/// Tries the methods that this machine allows, in order, until the part is present.
fn install(part: &Part, methods: &[Method], machine: &Machine) -> Result<()> {
    let mut methods = methods
        .iter()
        .filter(|method| machine.can(method))
        .peekable();
    while let Some(method) = methods.next() {
        line("getting", part, &method.title);
        let start = Instant::now();
        let acted = method
            .actions
            .iter()
            .try_for_each(|action| machine.run(action));
        let took = seconds(start.elapsed());
        let why = match (acted, part.find()) {
            (Ok(()), State::Found(what)) => {
                line("installed", part, &format!("{what} (in {took})"));
                return Ok(());
            }
            (Ok(()), State::Missing(why)) => format!("all steps succeeded, but {why}"),
            (Err(error), _) => format!("{error:#}"),
        };
        if methods.peek().is_none() {
            bail!("{why} (after {took})");
        }
        line("refused", part, &format!("{why} (after {took})"));
    }
    bail!("no method to install it works here")
}

/// The commands of the first method, or else a hint.
fn manual(part: &Part, methods: &[Method]) -> Vec<String> {
    match methods.first() {
        Some(method) => method.actions.iter().map(Action::command_line).collect(),
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
            "\nOn other distributions the packages have other names: only the programs matter."
        );
    }
    println!();
}

fn line(state: &str, part: &Part, text: &str) {
    println!("  {state:<10} {:<18} {text}", part.name);
}

/// A duration with one decimal, for display.
pub fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}
