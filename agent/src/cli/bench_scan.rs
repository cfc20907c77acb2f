//! `tailback bench-scan`: measures the cost of scanning the targets, for the benchmarks.

use std::io;

use clap::Args;
use serde_json::json;

use super::{Failure, Targets, exit_code::Outcome, session};
use crate::{
    collect::{OutputStats, SamplePlan, Tier, mono_ns},
    pipeline::Pipeline,
};

#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    targets: Targets,
    #[arg(long, default_value_t = 50)]
    rounds: u32,
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let config = options.targets.config()?;
    let specs = options.targets.with_every_process().specs(&config)?;
    let mut collector = session::collector(
        specs,
        config.budget(),
        true,
        options.targets.load_options(Tier::Glance),
    )?;
    let mut pipeline = Pipeline::new(config.settings_for(), false);
    let (mut files_ns, mut threads_ns, mut sample_ns) = (Vec::new(), Vec::new(), Vec::new());
    let (mut bare_files_ns, mut bare_threads_ns) = (Vec::new(), Vec::new());
    let bare = collector.bare().map_err(Failure::kernel)?;
    let (mut sockets, mut threads) = (0, 0);
    for _ in 0..options.rounds {
        sockets = 0;
        threads = 0;
        let begun = mono_ns();
        collector
            .scanner()
            .scan_files(&mut |_| sockets += 1)
            .map_err(Failure::kernel)?;
        let scanned = mono_ns();
        collector
            .scanner()
            .scan_threads(&mut |_| threads += 1)
            .map_err(Failure::kernel)?;
        let done = mono_ns();
        files_ns.push(scanned - begun);
        threads_ns.push(done - scanned);
        let scanner = collector.scanner();
        scanner.scan_bare_files(&bare).map_err(Failure::kernel)?;
        let scanned = mono_ns();
        scanner.scan_bare_threads(&bare).map_err(Failure::kernel)?;
        bare_files_ns.push(scanned - done);
        bare_threads_ns.push(mono_ns() - scanned);
    }
    // The thread profile, with one iterator per process and with one over all tasks of the host.
    let mut profile_ns = [Vec::new(), Vec::new()];
    let mut profiled = 0;
    for (tasks, times) in [usize::MAX, 0].into_iter().zip(&mut profile_ns) {
        let scanner = collector.scanner();
        scanner
            .set_focused(tasks, |_| true)
            .map_err(Failure::kernel)?;
        for _ in 0..options.rounds {
            profiled = 0;
            let begun = mono_ns();
            scanner
                .scan_profile(&mut |_| profiled += 1)
                .map_err(Failure::kernel)?;
            times.push(mono_ns() - begun);
        }
        scanner
            .set_focused(tasks, |_| false)
            .map_err(Failure::kernel)?;
    }
    let [profile_bound_ns, profile_all_ns] = profile_ns;
    // As it is made ten times a second: background scans only when they are due.
    let plan = SamplePlan {
        complete: false,
        ..SamplePlan::complete()
    };
    // Separately, because a whole sample leaves little of the kernel's objects in the caches.
    for _ in 0..options.rounds {
        let begun = mono_ns();
        let sample = collector
            .sample(plan, OutputStats::default())
            .map_err(Failure::kernel)?;
        pipeline.step(&sample);
        sample_ns.push(mono_ns() - begun);
    }
    let line = json!({
        "type": "scan", "sockets": sockets, "threads": threads,
        "profiled": profiled, "profile_bound_ns": profile_bound_ns, "profile_all_ns": profile_all_ns,
        "files_ns": files_ns, "threads_ns": threads_ns, "sample_ns": sample_ns,
        "bare_files_ns": bare_files_ns, "bare_threads_ns": bare_threads_ns,
    });
    serde_json::to_writer(io::stdout(), &line)
        .map_err(|error| Failure::stdout(io::Error::from(error)))?;
    println!();
    Ok(())
}
