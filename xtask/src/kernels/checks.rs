//! The tests of the matrix: what `bin/kernel-init` checks on each kernel, one test for each kernel and check, and
//! each row of the accuracy table.

use std::{fs, thread};

use anyhow::Result;
use tailback_tests::accuracy::ROWS;

use super::{
    GuestPrograms, Initramfs, Kernel, LIMIT, add_modules,
    protocol::CHECKS,
    qemu::{self, Console},
    transcript::{self, Verdict, findings, verdicts},
};
use crate::{
    accuracy,
    command::last_lines,
    plans::{self, Plan},
    setup::seconds,
    test::{Outcome, Tally},
    tools,
};

/// Emulated kernels that run at once for each CPU of the host. Each has one CPU, and computes for two thirds of its time.
const AT_ONCE_PER_CPU: usize = 2;
/// The test that compares a kernel's capabilities with its column of docs/reference/kernels.md.
const PLAN: &str = "plan";

pub fn run(kernels: &[&'static Kernel], programs: &GuestPrograms, tally: &mut Tally) {
    let (own, others): (Vec<_>, Vec<_>) = kernels
        .iter()
        .copied()
        .partition(|kernel| kernel.architecture.is_own());
    run_programs(&own, programs, tally);
    others
        .into_iter()
        .for_each(|kernel| run_alone(kernel, tally));
}

/// Runs the checks on one kernel, with programs that are built for it.
pub fn run_alone(kernel: &'static Kernel, tally: &mut Tally) {
    let end = match obstacle(kernel) {
        Some(why) => Outcome::Skipped(why),
        None => match GuestPrograms::build(kernel.architecture) {
            Ok(programs) => return run_programs(&[kernel], &programs, tally),
            Err(error) => Outcome::Failed(format!("its programs cannot be built: {error:#}")),
        },
    };
    tests().for_each(|test| tally.record(&name(kernel, &test), end.clone()));
}

/// Boots kernels of the architecture that the programs are for.
fn run_programs(kernels: &[&'static Kernel], programs: &GuestPrograms, tally: &mut Tally) {
    let (ready, unready): (Vec<_>, Vec<_>) = kernels
        .iter()
        .map(|kernel| (kernel, obstacle(kernel)))
        .partition(|(_, obstacle)| obstacle.is_none());
    for (kernel, why) in unready {
        let why = why.unwrap_or_default();
        tests().for_each(|test| tally.record(&name(kernel, &test), Outcome::Skipped(why.clone())));
    }
    if ready.is_empty() {
        return;
    }
    let initramfs = match programs.initramfs() {
        Ok(initramfs) => initramfs,
        Err(error) => {
            let why = format!("the initramfs cannot be made: {error:#}");
            for (kernel, _) in ready {
                tests().for_each(|test| {
                    tally.record(&name(kernel, &test), Outcome::Failed(why.clone()));
                });
            }
            return;
        }
    };
    let at_once = AT_ONCE_PER_CPU * thread::available_parallelism().map_or(1, usize::from);
    for kernels in ready.chunks(at_once) {
        let booted = thread::scope(|scope| {
            let initramfs = &initramfs;
            let boots: Vec<_> = kernels
                .iter()
                .map(|(kernel, _)| scope.spawn(|| boot(kernel, initramfs.clone())))
                .collect();
            boots
                .into_iter()
                .map(thread::ScopedJoinHandle::join)
                .collect::<Vec<_>>()
        });
        for ((kernel, _), booted) in kernels.iter().zip(booted) {
            let why = match booted {
                Ok(Ok(console)) => {
                    record(kernel, &console, programs, tally);
                    continue;
                }
                Ok(Err(error)) => format!("{error:#}"),
                Err(_) => "the thread that booted it panicked".to_owned(),
            };
            tests()
                .for_each(|test| tally.record(&name(kernel, &test), Outcome::Failed(why.clone())));
        }
    }
}

fn boot(kernel: &Kernel, mut initramfs: Initramfs) -> Result<Console> {
    add_modules(&mut initramfs, kernel)?;
    qemu::boot(kernel, &initramfs.finish()?, LIMIT)
}

/// The checks, and the rows of the accuracy table.
fn tests() -> impl Iterator<Item = String> {
    let checks = CHECKS.iter().map(|check| (*check).to_owned());
    checks
        .chain([PLAN.to_owned()])
        .chain(ROWS.iter().map(accuracy::test_name))
}

/// Why a kernel cannot be tested on this machine.
pub fn obstacle(kernel: &Kernel) -> Option<String> {
    let emulator = kernel.architecture.machine_emulator();
    if tools::program(emulator).is_none() {
        Some(format!("{emulator} is not installed"))
    } else if !kernel.image().is_file() {
        Some(format!(
            "no image of it in {}",
            kernel.directory().display()
        ))
    } else {
        kernel.architecture.obstacle()
    }
}

fn record(kernel: &Kernel, console: &Console, programs: &GuestPrograms, tally: &mut Tally) {
    println!(
        "\n     Booted kernel {} ({}) in {}{}",
        kernel.name,
        kernel.release(),
        seconds(console.took),
        match console.restarts {
            0 => String::new(),
            n => format!(
                ", at attempt {}: the emulator died before the first process began",
                n + 1
            ),
        }
    );
    let before = tally.failures().count();
    for (check, verdict) in verdicts(&console.text) {
        let name = name(kernel, check);
        match (verdict, &console.fault) {
            (Verdict::Ok, _) => tally.record(&name, Outcome::Passed),
            (Verdict::Failed(why), _) => tally.record(&name, Outcome::Failed(why)),
            (Verdict::Absent, Some(fault)) => tally.record(&name, Outcome::Failed(fault.clone())),
            (Verdict::Absent, None) => {
                tally.record(&name, Outcome::Failed("it did not run".to_owned()));
            }
        }
    }
    match Plan::parse(&kernel.release(), transcript::plan(&console.text)) {
        Ok(plan) => plans::record(&name(kernel, PLAN), &plan, tally),
        Err(error) => tally.record(&name(kernel, PLAN), Outcome::Failed(format!("{error:#}"))),
    }
    let missing = console.fault.as_deref();
    let missing = missing.unwrap_or("the console does not mention it");
    let found = findings(&console.text);
    let remeasure = |kinds: &[String]| super::measure(kernel, programs, kinds);
    let found = accuracy::settle(found, kernel.absent, remeasure);
    accuracy::record(&found, kernel.absent, missing, &name(kernel, ""), tally);
    if tally.failures().count() > before {
        let log = kernel.directory().join("console.log");
        let kept = fs::write(&log, &console.text);
        let kept = kept.map_or_else(|error| error.to_string(), |()| log.display().to_string());
        println!(
            "the last lines of the console of kernel {} (all of it: {kept}):",
            kernel.name
        );
        println!("{}", last_lines(&console.text, 20));
    }
}

fn name(kernel: &Kernel, check: &str) -> String {
    format!("kernel {}: {check}", kernel.name)
}
