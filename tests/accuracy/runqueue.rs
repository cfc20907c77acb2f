//! More threads than one CPU can run.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::{
    course::{Course, meanwhile},
    look::{self, Seen},
    report::Report,
};

const SPINNING: usize = 3;

pub fn measure(report: &mut Report) -> Result<()> {
    let allowed = sched_getaffinity(None).context("ask which CPUs are ours")?;
    let cpu = (0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu));
    let mut one = CpuSet::new();
    one.set(cpu.context("no CPU is ours")?);
    let done = AtomicBool::new(false);
    let measured = thread::scope(|scope| {
        let spin = || {
            // Where it cannot be bound it spins all the same: schedstat tells what came of it.
            let _ = sched_setaffinity(None, &one);
            while !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        };
        // Not before the agent looks: it would have to share an emulated CPU with them while it starts.
        let begin = || {
            (0..SPINNING).for_each(|_| drop(scope.spawn(spin)));
            Ok(())
        };
        let look = || look::during(Duration::from_millis(3000), begin).map(|(looks, ())| looks);
        let mut threads = Threads::default();
        let measured = meanwhile(Duration::from_millis(1), || threads.look(), look);
        done.store(true, Ordering::Relaxed);
        measured
    });
    let (looks, [delay, dispatches]) = measured?;
    let queue = looks.queue("runqueue", |name| name == "threads");
    compare(report, &queue, &delay, &dispatches);
    Ok(())
}

/// Over all looks together: the kernel adds a wait when it ends, so that a window's edges weigh.
fn compare(report: &mut Report, queue: &Seen<'_>, delay: &Course, dispatches: &Course) {
    let queue = match queue {
        Ok(queue) => queue,
        Err(said) => {
            report.compare("run delay", f64::from(SPINNING as u32 - 1), None, said);
            return report.compare("wait", 0.0, None, said);
        }
    };
    let (mut told_ns, mut told_dispatches, mut was_ns, mut was_dispatches) = (0.0, 0.0, 0.0, 0.0);
    let mut seconds = 0.0;
    let mut complete = true;
    for (line, from, to) in queue.windows() {
        let (share, wait) = (line["run_delay_per_s"].as_f64(), line["wait_ns"].as_f64());
        let (Some(share), Some(wait)) = (share, wait) else {
            complete = false;
            continue;
        };
        let elapsed_ns = (to - from) as f64;
        told_ns += share * elapsed_ns;
        told_dispatches += share * elapsed_ns / wait.max(1.0);
        was_ns += delay.between(to) - delay.between(from);
        was_dispatches += dispatches.between(to) - dispatches.between(from);
        seconds += elapsed_ns / 1e9;
    }
    let per_second = |ns: f64| ns / 1e9 / f64::max(seconds, 1e-9);
    let said = "a look tells no run delay";
    let told = |value: f64| complete.then_some(value);
    report.compare(
        "run delay",
        per_second(was_ns),
        told(per_second(told_ns)),
        said,
    );
    let wait = |ns: f64, dispatches: f64| ns / f64::max(dispatches, 1.0);
    report.compare(
        "wait",
        wait(was_ns, was_dispatches),
        told(wait(told_ns, told_dispatches)),
        said,
    );
}

/// Run delay of each of our threads, ns, and how often it was given a CPU (Documentation/scheduler/sched-stats.rst), as
/// last seen: a thread that has ended keeps what it had.
#[derive(Default)]
struct Threads(BTreeMap<PathBuf, [f64; 2]>);

impl Threads {
    /// The sums over all of them.
    fn look(&mut self) -> Result<[f64; 2]> {
        for task in fs::read_dir("/proc/self/task").context("list our threads")? {
            let file = task.context("list our threads")?.path().join("schedstat");
            let Ok(text) = fs::read_to_string(&file) else {
                // It has ended since.
                continue;
            };
            let fields: Vec<f64> = text
                .split_whitespace()
                .filter_map(|field| field.parse().ok())
                .collect();
            let [_, delay, dispatches] = fields[..] else {
                anyhow::bail!("{} holds {text:?}", file.display());
            };
            self.0.insert(file, [delay, dispatches]);
        }
        let sum = |index: usize| self.0.values().map(|thread| thread[index]).sum();
        Ok([sum(0), sum(1)])
    }
}
