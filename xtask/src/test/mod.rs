//! `cargo xtask test`: every test, on this kernel and on the kernels of the matrix, with one summary.
//!
//! Nothing turns a failure into a pass. A failed test runs once more only to classify the failure as flaky or consistent;
//! a skip that is not on the list in `skips` fails the run; so does a machine on which eBPF programs do not load.
//! Verdicts on live incidents are a rate, not a pass or a failure: see `scenarios`.

mod cluster;
mod nextest;
mod skips;
mod tally;

use std::{
    panic::resume_unwind,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Instant,
};

use anyhow::Result;

use crate::{
    accuracy::{self, Programs},
    cargo,
    command::{Cmd, last_lines},
    dist, image,
    kernels::{self, GuestPrograms},
    object, plans, scenarios,
    setup::{self, Purpose, seconds},
    tools,
};
pub use tally::{Outcome, Tally};

#[derive(clap::Args)]
pub struct Args {
    /// Kernels of the matrix: all, none, or a comma-separated list [default: all; none with a filter]
    #[arg(long, value_name = "LIST")]
    kernels: Option<String>,
    /// Instead: run Tailback in a real Kubernetes cluster of one node (3 minutes; the first time its components are built, 5 minutes more)
    #[arg(long, conflicts_with = "kernels")]
    cluster: bool,
    /// Run only the tests whose name contains this
    filter: Option<String>,
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let start = Instant::now();
    if args.cluster {
        let mut tally = Tally::default();
        cluster::run(args.filter.as_deref(), &mut tally)?;
        println!("\nthe cluster took {}", seconds(start.elapsed()));
        return Ok(end(&tally));
    }
    let default = if args.filter.is_some() { "none" } else { "all" };
    let kernels = kernels::choose(args.kernels.as_deref().unwrap_or(default))?;
    setup::ensure_with_kernels(Purpose::Test, &kernels)?;

    let mut steps = Steps::default();
    let needed = [
        cargo::AGENT,
        cargo::ACCURACY,
        cargo::SCENARIOS,
        cargo::KERNEL_INIT,
        cargo::MANUAL,
    ];
    let [agent, accuracy, scenarios, init, manual] =
        steps.run("build", || cargo::build_tests(needed))?;
    let guest = GuestPrograms {
        measured: Programs { agent, accuracy },
        init,
    };
    let programs = &guest.measured;
    let filter = args.filter.as_deref();
    let mut tally = Tally::default();
    programs_load(&programs.agent, &mut tally);
    // Neither measures anything, and neither keeps more than one CPU busy.
    steps.run("eBPF object and release", || {
        thread::scope(|scope| {
            let object = scope.spawn(|| {
                let mut tally = Tally::default();
                object::run_here(filter, &mut tally);
                tally
            });
            dist::run_here([&programs.agent, &manual], filter, &mut tally);
            match object.join() {
                Ok(object) => tally.append(object),
                Err(panic) => resume_unwind(panic),
            }
        });
    });
    let mut env: Vec<(&str, PathBuf)> = vec![("TAILBACK_BIN", programs.agent.clone())];
    let image = tools::root().join("target/tailback-test.oci.tar");
    image::write(&programs.agent, &image)?;
    env.push(("TAILBACK_IMAGE", image));
    env.extend(tools::helm().map(|helm| ("TAILBACK_HELM", helm)));
    env.extend(tools::jaeger().map(|jaeger| ("TAILBACK_JAEGER", jaeger)));
    steps.run("Rust tests", || nextest::run(filter, &env, &mut tally))?;
    if filter.is_none() {
        steps.run("documentation examples", || examples(&mut tally));
    }
    steps.run("plan", || {
        plans::run_here(&programs.agent, filter, &mut tally);
    });
    steps.run("accuracy", || {
        accuracy::run_here(programs, filter, &mut tally);
    });
    steps.run("scenarios", || {
        scenarios::run_here(&scenarios, &programs.agent, filter, &mut tally);
    });
    steps.run("kernel matrix", || {
        kernels::run_checks(&kernels, &guest, &mut tally);
    });

    println!(
        "\nall tests took {}: {}",
        seconds(start.elapsed()),
        steps.text()
    );
    Ok(end(&tally))
}

/// Prints the summary.
pub fn end(tally: &Tally) -> ExitCode {
    print!("{}", tally.summary());
    if tally.is_green() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// How long each step took.
#[derive(Default)]
struct Steps(Vec<String>);

impl Steps {
    fn run<T>(&mut self, name: &str, step: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let done = step();
        self.0.push(format!("{name} {}", seconds(start.elapsed())));
        done
    }

    fn text(&self) -> String {
        self.0.join(", ")
    }
}

/// Takes one sample of the agent's own parent process. If that fails, no other test of the agent proves anything.
fn programs_load(agent: &Path, tally: &mut Tally) {
    let pid = std::process::id().to_string();
    let sample = Cmd::new(agent).args(["sample", "--json", "--pid", &pid]);
    let outcome = match sample.command().output() {
        Ok(output) if output.status.success() => Outcome::Passed,
        Ok(output) => Outcome::Failed(format!(
            "`{sample}` ended with {}: {}",
            output.status,
            last_lines(&String::from_utf8_lossy(&output.stderr), 5)
        )),
        Err(error) => Outcome::Failed(format!("`{sample}` does not start: {error}")),
    };
    tally.record("this kernel: eBPF programs load", outcome);
}

/// Examples in documentation comments, which nextest does not run.
fn examples(tally: &mut Tally) {
    let doc = cargo::test().arg("--doc");
    let outcome = match doc.command().status() {
        Ok(status) if status.success() => Outcome::Passed,
        Ok(status) => Outcome::Failed(format!("`{doc}` ended with {status}")),
        Err(error) => Outcome::Failed(format!("`{doc}` does not start: {error}")),
    };
    tally.record("examples in documentation comments", outcome);
}
