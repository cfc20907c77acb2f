//! More runnable threads than one CPU can run: run delay and wait.

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
    report::Report,
    sampling::{self, Sampled},
};

const SPINNING: usize = 3;
/// The kernel adds a wait to its counters when the wait ends, so the edges of the window carry an error of one time slice
/// per thread. On an emulated CPU that was up to 10% of 3 s.
const WINDOW: Duration = Duration::from_secs(9);

pub fn measure(report: &mut Report) -> Result<()> {
    let allowed = sched_getaffinity(None).context("read the CPU affinity")?;
    let cpu = (0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu));
    let mut one = CpuSet::new();
    one.set(cpu.context("the CPU affinity is empty")?);
    let done = AtomicBool::new(false);
    let measured = thread::scope(|scope| {
        let spin = || {
            // Where pinning fails it still spins: schedstat reports the resulting delay.
            let _ = sched_setaffinity(None, &one);
            while !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        };
        // Started once the agent samples: it would share an emulated CPU with them while it starts.
        let begin = || {
            (0..SPINNING).for_each(|_| drop(scope.spawn(spin)));
            Ok(())
        };
        let sample = || sampling::during(WINDOW, begin).map(|(samples, ())| samples);
        let mut threads = Threads::default();
        let measured = meanwhile(Duration::from_millis(1), || threads.read(), sample);
        done.store(true, Ordering::Relaxed);
        measured
    });
    let (samples, [delay, dispatches]) = measured?;
    let queue = samples.queue("runqueue", |name| name == "threads");
    compare(report, &queue, &delay, &dispatches);
    Ok(())
}

/// Compares sums over all samples: the kernel adds a wait when it ends, so single windows have edge errors.
fn compare(report: &mut Report, queue: &Sampled<'_>, delay: &Course, dispatches: &Course) {
    let queue = match queue {
        Ok(queue) => queue,
        Err(reason) => {
            report.compare("run delay", f64::from(SPINNING as u32 - 1), None, reason);
            return report.compare("wait", 0.0, None, reason);
        }
    };
    let (mut measured_ns, mut measured_dispatches, mut true_ns, mut true_dispatches) =
        (0.0, 0.0, 0.0, 0.0);
    let mut seconds = 0.0;
    let mut complete = true;
    for (line, from, to) in queue.windows() {
        let (share, wait) = (line["run_delay_per_s"].as_f64(), line["wait_ns"].as_f64());
        let (Some(share), Some(wait)) = (share, wait) else {
            complete = false;
            continue;
        };
        let elapsed_ns = (to - from) as f64;
        measured_ns += share * elapsed_ns;
        measured_dispatches += share * elapsed_ns / wait.max(1.0);
        true_ns += delay.between(to) - delay.between(from);
        true_dispatches += dispatches.between(to) - dispatches.between(from);
        seconds += elapsed_ns / 1e9;
    }
    let per_second = |ns: f64| ns / 1e9 / f64::max(seconds, 1e-9);
    let note = "a sample without run delay";
    let if_complete = |value: f64| complete.then_some(value);
    report.compare(
        "run delay",
        per_second(true_ns),
        if_complete(per_second(measured_ns)),
        note,
    );
    let wait = |ns: f64, dispatches: f64| ns / f64::max(dispatches, 1.0);
    report.compare(
        "wait",
        wait(true_ns, true_dispatches),
        if_complete(wait(measured_ns, measured_dispatches)),
        note,
    );
}

/// Run delay, ns, and dispatches of each of our threads (Documentation/scheduler/sched-stats.rst). Threads that have exited
/// keep their last values.
#[derive(Default)]
struct Threads(BTreeMap<PathBuf, [f64; 2]>);

impl Threads {
    /// Reads all threads and returns the sums.
    fn read(&mut self) -> Result<[f64; 2]> {
        for task in fs::read_dir("/proc/self/task").context("list our threads")? {
            let file = task.context("list our threads")?.path().join("schedstat");
            let Ok(text) = fs::read_to_string(&file) else {
                // The thread has exited.
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
