//! `cargo xtask …`: the only build tool that a newcomer has to know.
//!
//! Each subcommand is a module of the same name (`kernel` is `kernels`). Shared modules: `tools` finds files and
//! programs, `command` runs programs, `cargo` builds ours, `architecture` has what differs between x86-64 and aarch64.
#![forbid(unsafe_code)]

mod accuracy;
mod architecture;
mod bench;
mod calibration;
mod cargo;
mod command;
mod demo;
mod dist;
mod fuzz;
mod golden_btf;
mod image;
mod kernels;
mod object;
mod plans;
mod scenarios;
mod setup;
mod soak;
mod test;
mod tools;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Sets up, tests, demonstrates and measures Tailback.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Find or install everything that building, testing and the demo need
    Setup(setup::Args),
    /// Show a service's queue filling up, and Tailback warning before it is full
    Demo(demo::Args),
    /// Run all tests, on this kernel and on the kernels of the matrix
    Test(test::Args),
    /// Compare what Tailback reports with the known state of queues, on this kernel and on the kernels of the matrix
    Accuracy(accuracy::Args),
    /// Play incidents on real servers and compare Tailback's verdicts with the planted causes
    Scenarios(scenarios::Args),
    /// Count how often verdicts on recorded incidents are right, by their confidence
    Calibration(calibration::Args),
    /// Compare how the agent reads each fact on each kernel with docs/reference/kernels.md
    Plans(plans::Args),
    /// Measure the cost of Tailback
    Bench(bench::Args),
    /// Fuzz the agent's parsers for longer than the tests do
    Fuzz(fuzz::Args),
    /// Run a node agent under churn, and check that memory, descriptors and samples stay within bounds
    Soak(soak::Args),
    /// Build the files of a release, install them, and check that they work
    Dist(dist::Args),
    /// Build the eBPF object, and keep it in the repository
    Object(object::Args),
    /// Reduce kernels' BTF to the fields that the agent reads, for its tests
    GoldenBtf(golden_btf::Args),
    /// Write the container image as an OCI archive
    Image(image::Args),
    /// Run one command on a kernel of the matrix and print its output
    Kernel(kernels::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Setup(args) => setup::main(&args),
        Task::Demo(args) => demo::main(&args),
        Task::Test(args) => test::main(&args),
        Task::Accuracy(args) => accuracy::main(&args),
        Task::Scenarios(args) => scenarios::main(&args),
        Task::Calibration(args) => calibration::main(&args),
        Task::Plans(args) => plans::main(&args),
        Task::Bench(args) => bench::main(&args),
        Task::Fuzz(args) => fuzz::main(&args),
        Task::Soak(args) => soak::main(&args),
        Task::Dist(args) => dist::main(&args),
        Task::Object(args) => object::main(&args),
        Task::GoldenBtf(args) => golden_btf::main(&args),
        Task::Image(args) => image::main(&args),
        Task::Kernel(args) => kernels::main(&args),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs};

    use clap::error::ErrorKind;

    use super::*;
    use crate::command::Cmd;

    #[test]
    fn the_documentation_names_only_commands_that_are_accepted() -> anyhow::Result<()> {
        let files = Cmd::new("git")
            .current_dir(tools::root())
            .args(["ls-files", "*.md"])
            .output()?;
        let (mut commands, mut rejected) = (BTreeSet::new(), Vec::new());
        for file in files.lines() {
            for command in commands_in(&fs::read_to_string(tools::root().join(file))?) {
                match Cli::try_parse_from(command.split_whitespace().skip(1)) {
                    // `cargo xtask bench` stands for all of its subcommands.
                    Err(error) if !is_help(error.kind()) => {
                        rejected.push(format!("{file}: {command}\n{error}"));
                    }
                    _ => {}
                }
                commands.insert(command);
            }
        }
        assert!(rejected.is_empty(), "{}", rejected.join("\n"));
        // The figures in the documentation are worth as much as the commands that measure them.
        for bench in [
            "sample",
            "overhead",
            "footprint",
            "profile",
            "overload",
            "page",
            "adapters",
        ] {
            let command = format!("cargo xtask bench {bench}");
            let named = commands.iter().any(|named| named.starts_with(&command));
            assert!(named, "no document names `{command}`");
        }
        Ok(())
    }

    fn is_help(kind: ErrorKind) -> bool {
        matches!(
            kind,
            ErrorKind::DisplayHelp | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
        )
    }

    #[test]
    fn commands_are_found_in_prose_and_in_blocks() {
        let text = "Run `cargo xtask test NAME`, or `cargo xtask …`:\n\ncargo xtask bench sample   # fast\n";
        assert_eq!(
            commands_in(text),
            ["cargo xtask test NAME", "cargo xtask bench sample"]
        );
    }

    /// The commands of a document: each ends with its code span, its line, a comment, or another command.
    fn commands_in(text: &str) -> Vec<String> {
        let starts = text.match_indices("cargo xtask ");
        let commands = starts.filter_map(|(at, _)| {
            let end = |letter| matches!(letter, '`' | '\n' | '#' | '&' | '|');
            let command = text[at..].split(end).next()?.trim_end();
            (!command.contains('…')).then(|| command.to_owned())
        });
        commands.collect()
    }
}
