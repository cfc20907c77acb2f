//! Run delay of the threads of a process, compared with schedstat.

use std::{
    fs,
    process::Command,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::thread::{CpuSet, sched_getaffinity};
use tailback_tests::{
    lines::unix_ns,
    needs,
    process::Process,
    program,
    sample::{Sample, float, number},
};

use crate::{DEADLINE, SUBJECT, alone};

/// Total run delay of all threads of a process so far, ns.
fn run_delay(pid: u32) -> Result<u64> {
    let directory = format!("/proc/{pid}/task");
    let mut sum = 0;
    for thread in fs::read_dir(&directory).with_context(|| format!("read {directory}"))? {
        let file = thread?.path().join("schedstat");
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let delay = text
            .split_whitespace()
            .nth(1)
            .context("schedstat has no second field")?;
        sum += delay.parse::<u64>()?;
    }
    Ok(sum)
}

/// The value at `at`, interpolated between two readings.
fn between(course: &[(u64, u64)], at: u64) -> Result<f64> {
    let after = course.partition_point(|(time, _)| *time < at);
    ensure!(
        after > 0 && after < course.len(),
        "no readings around {at} ns"
    );
    let ((t0, v0), (t1, v1)) = (course[after - 1], course[after]);
    let share = (at - t0) as f64 / (t1 - t0).max(1) as f64;
    Ok(v0 as f64 + share * (v1 - v0) as f64)
}

#[test]
fn run_delay_matches_schedstat() -> Result<()> {
    const TEST: &str = "run_delay_matches_schedstat";
    if !needs::met(TEST, &["taskset"]) {
        return Ok(());
    }
    let _alone = alone();
    // Five threads on one CPU: four wait at any time if no other process uses it.
    let mut command = Command::new(program::need(&["taskset"])?);
    let cpus = sched_getaffinity(None).context("read the CPU affinity")?;
    let cpu = (0..CpuSet::MAX_CPU)
        .find(|cpu| cpus.is_set(*cpu))
        .unwrap_or(0);
    command.args(["--cpu-list", &cpu.to_string()]);
    command.args([SUBJECT, "spin", "--threads", "5"]);
    let spinning = Process::start("spinning threads", &mut command)?;
    spinning.wait_line("spinning", DEADLINE)?;
    let pid = spinning.pid();

    let course = Mutex::new(Vec::new());
    let done = AtomicBool::new(false);
    let sample = thread::scope(|scope| {
        let reader = scope.spawn(|| -> Result<()> {
            loop {
                // One more reading after the last sample, so that its end lies between two readings.
                let is_last = done.load(Ordering::Relaxed);
                let before_ns = unix_ns();
                let delay = run_delay(pid)?;
                let at_ns = before_ns.midpoint(unix_ns());
                course
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push((at_ns, delay));
                if is_last {
                    return Ok(());
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        // Twenty samples are left if the machine pauses for two seconds.
        let sample = Sample::of(&["--pid", &pid.to_string(), "--duration", "4s"]);
        done.store(true, Ordering::Relaxed);
        reader
            .join()
            .expect("the reader of schedstat does not panic")?;
        sample
    })?;
    let course = course.into_inner().unwrap_or_else(PoisonError::into_inner);
    // Windows are contiguous: what a late sample counts too much, the next counts too little.
    let (mut ours, mut truth) = (0.0, 0.0);
    let mut from = sample.first_poll_ns()?;
    let mut samples = 0;
    let threads = sample.queues("runqueue");
    for queue in threads.filter(|queue| queue["name"] == "threads") {
        let to = number(queue, "time_unix_ns")?;
        let seconds = (to - from) as f64 / 1e9;
        let reported = float(queue, "run_delay_per_s")? * seconds;
        let actual = (between(&course, to)? - between(&course, from)?) / 1e9;
        println!(
            "in {:.1} ms: agent {reported:.3} s, schedstat {actual:.3} s",
            seconds * 1e3
        );
        ours += reported;
        truth += actual;
        from = to;
        samples += 1;
    }
    let error = (ours - truth) / truth;
    println!(
        "run delay over {samples} windows: error {:+.2}%",
        error * 100.0
    );
    ensure!(samples >= 10, "only {samples} samples");
    ensure!(
        error.abs() <= 0.05,
        "the run delay is off by {:+.2}%",
        error * 100.0
    );
    Ok(())
}
