//! The waits that hooks measure, compared with the clock of the program that waits.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    process::{self, Command},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};
use tailback_tests::{
    agent::{Agent, attached_hooks, binary, hooks_in_use, is_confined},
    exact_waits::{diagnose, measured, wait_attached, write_times},
    needs,
    process::Process,
    program,
    temp::TempDir,
    wait,
};

use crate::{DEADLINE, SUBJECT, alone};

/// The hooks stay attached for 10 s after the last queue has recovered.
const DETACH_DEADLINE: Duration = Duration::from_secs(60);
/// Largest error: a share of the true value, and ns. The second covers what lies between the hook and the program's clock: the
/// ways into and out of the system calls of reader and writer, 10 to 20 µs with cold caches.
const MAX_ERROR: f64 = 0.05;
const MAX_ERROR_NS: f64 = 100_000.0;

/// Whether this kernel accepts the hooks, according to `doctor`; if not, why.
fn are_available() -> Result<Result<(), String>> {
    let output = Command::new(binary()?).args(["doctor", "--json"]).output();
    let text = String::from_utf8(output.context("run doctor")?.stdout)?;
    for line in text.lines() {
        let check: Value = serde_json::from_str(line)?;
        if check["name"] == "exact waits" {
            let reason = check["why"].as_str().map(str::to_owned);
            return Ok(reason.map_or(Ok(()), Err));
        }
    }
    bail!("doctor does not report exact waits: {text}");
}

/// Compares a measured value with the true one.
fn compare(what: &str, measured: &Value, truth: f64) -> Result<()> {
    let measured = measured
        .as_f64()
        .with_context(|| format!("{what} was not measured"))?;
    let error = measured - truth;
    println!(
        "{what}: {measured:.0} ns, true {truth:.0} ns, error {error:.0} ns ({:.2}%)",
        error / truth * 100.0
    );
    let most = (truth * MAX_ERROR).max(MAX_ERROR_NS);
    ensure!(
        error.abs() <= most,
        "{what}: {measured:.0} ns, true {truth:.0} ns: off by more than {most:.0} ns"
    );
    Ok(())
}

fn pinned(program: &str, nice: &str) -> Result<Command> {
    let mut command = Command::new(program::need(&["taskset"])?);
    command.args(["--cpu-list", "0"]);
    command
        .arg(program::need(&["nice"])?)
        .args(["-n", nice, program]);
    Ok(command)
}

/// Dispatches of the first thread of a process, and how long it waited for a CPU, ns, by the kernel's own account.
fn schedstat(pid: u32) -> Result<(u64, f64)> {
    let file = format!("/proc/{pid}/task/{pid}/schedstat");
    let text = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
    let fields = text.split_whitespace().map(str::parse::<u64>);
    let fields: Vec<u64> = fields.collect::<Result<_, _>>()?;
    let [_, delay_ns, dispatches] = fields[..] else {
        bail!("{file} has {text:?}");
    };
    Ok((dispatches, delay_ns as f64))
}

#[test]
fn waits_for_a_cpu_and_in_a_call_are_those_of_the_programs_clock() -> Result<()> {
    const TEST: &str = "waits_for_a_cpu_and_in_a_call_are_those_of_the_programs_clock";
    if !needs::met(TEST, &["taskset", "nice"]) {
        return Ok(());
    }
    ensure!(are_available()?.is_ok(), "{:?}", are_available()?);
    let _alone = alone();
    wait::unless_paused(compare_with_the_programs_clock)
}

fn compare_with_the_programs_clock() -> Result<()> {
    let directory = TempDir::new("exact-waits")?;
    let fifo = directory.path().join("times");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).context("create a FIFO")?;
    // The reader waits for the CPU that the other one computes on: it has the lower priority.
    let mut command = pinned(SUBJECT, "19")?;
    command.arg("read-timed").arg("--from").arg(&fifo);
    let reader = Process::start("reader", &mut command)?;
    reader.wait_line("reading", DEADLINE)?;
    let spinning = Process::start(
        "spinning thread",
        pinned(SUBJECT, "0")?.args(["spin", "--threads", "1"]),
    )?;
    spinning.wait_line("spinning", DEADLINE)?;
    // In open(2). Until then it may wait for the CPU, since before the hooks are attached.
    wait::until("the reader to sleep", DEADLINE, || {
        let file = format!("/proc/{}/stat", reader.pid());
        let text = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
        Ok(text.contains(") S ").then_some(()))
    })?;

    let agent = diagnose(reader.pid(), &directory)?;
    // The reader sleeps until the FIFO has a writer, and after the last read.
    let (dispatches_before, delay_before_ns) = schedstat(reader.pid())?;
    write_times(&fifo)?;
    let times = reader.wait_line("times ", DEADLINE)?.text;
    let waits = measured(&agent, reader.pid())?;
    let (dispatches, delay_ns) = schedstat(reader.pid())?;

    let numbers = times.split_whitespace().skip(1).map(str::parse::<f64>);
    let numbers: Vec<f64> = numbers.collect::<Result<_, _>>()?;
    let [reads, blocked_mean, blocked_p99, cpu_mean, cpu_p99] = numbers[..] else {
        bail!("unexpected line {times:?}");
    };
    let of = |key: &str, value: &str| {
        let found = waits.iter().find(|wait| wait[key] == value);
        found.with_context(|| format!("no wait with {key} {value} in {waits:?}"))
    };
    let blocked = of("call", "read")?;
    let woken = of("after", "wakeup")?;
    println!("{reads} reads: {blocked} {woken}");
    ensure!(
        blocked["path"].as_str() == fifo.to_str(),
        "the file of the read is not named: {blocked}"
    );
    compare("blocked mean", &blocked["mean_ns"], blocked_mean)?;
    compare("blocked p99", &blocked["p99_ns"], blocked_p99)?;
    compare("CPU wait mean", &woken["mean_ns"], cpu_mean)?;
    compare("CPU wait p99", &woken["p99_ns"], cpu_p99)?;

    let for_cpu = || waits.iter().filter(|wait| wait["kind"] == "run_queue");
    let count: u64 = for_cpu().filter_map(|wait| wait["count"].as_u64()).sum();
    let total_ns: f64 = for_cpu().filter_map(|wait| wait["total_ns"].as_f64()).sum();
    ensure!(
        count == dispatches - dispatches_before,
        "{count} waits for a CPU, {} dispatches in schedstat: {waits:?}",
        dispatches - dispatches_before
    );
    let mean = json!(total_ns / count as f64);
    let true_mean = (delay_ns - delay_before_ns) / count as f64;
    compare("CPU wait mean by schedstat", &mean, true_mean)?;

    // Unless another thread ran after the spinning one, for the lesser part of the wait.
    let is_lesser = woken["culprit_ns"].as_f64() < woken["max_ns"].as_f64().map(|ns| ns / 2.0);
    ensure!(
        woken["culprit_tid"] == spinning.pid() || is_lesser,
        "the culprit is not the spinning process {}: {woken}",
        spinning.pid()
    );
    Ok(())
}

fn parked() -> Result<Process> {
    let mut command = Command::new(SUBJECT);
    Process::start("parked process", command.args(["park", "--threads", "2"]))
}

#[test]
fn no_hook_is_attached_in_the_glance_tier_nor_while_all_is_well() -> Result<()> {
    let parked = parked()?;
    let pid = parked.pid().to_string();
    let glance = Agent::run(["--all", "--duration", "4s"])?;
    let auto = Agent::run(["--pid", &pid, "--tier", "auto", "--duration", "4s"])?;
    let (glance, auto) = (glance.process(), auto.process());
    let mut was_confined = false;
    wait::until("the end of both agents", DEADLINE, || {
        was_confined |= is_confined(auto.pid());
        let attached = [attached_hooks(glance.pid()), hooks_in_use(auto.pid())];
        ensure!(attached == [0, 0], "{attached:?} hooks were attached");
        let has_ended = glance.ended()?.is_some() && auto.ended()?.is_some();
        Ok(has_ended.then_some(()))
    })?;
    ensure!(was_confined, "the agent did not drop its privileges");
    Ok(())
}

#[test]
fn the_auto_tier_attaches_the_hooks_until_all_is_well_again() -> Result<()> {
    ensure!(are_available()?.is_ok(), "{:?}", are_available()?);
    let directory = TempDir::new("auto")?;
    let config = directory.write("tailback.toml", "hook_budget = 0.5\n")?;
    // A service that never accepts its connections, and one that keeps the agent running.
    let mut command = Command::new(SUBJECT);
    command.args(["jam", "--listen", "127.0.0.1:0", "--waiting", "101"]);
    let jammed = Process::start("jammed service", &mut command)?;
    let parked = parked()?;
    let pids = [&jammed, &parked].map(|process| process.pid().to_string());
    let mut command = Command::new(binary()?);
    command.args(["run", "--json", "--tier", "auto", "--config"]);
    command.arg(&config);
    command.args(["--pid", &pids[0], "--pid", &pids[1]]);
    let agent = Agent::start(&mut command)?;
    wait_attached(agent.process(), hooks_in_use)?;
    drop(jammed);
    wait::until("the hooks to be detached", DETACH_DEADLINE, || {
        agent.process().check_running()?;
        Ok((hooks_in_use(agent.process().pid()) == 0).then_some(()))
    })
}

/// Threads that each read from a pipe of their own: more than a process has histograms by object.
const READERS: usize = 150;
const ROUNDS: usize = 5;

#[test]
fn waits_on_more_descriptors_than_fit_are_counted_without_their_object() -> Result<()> {
    ensure!(are_available()?.is_ok(), "{:?}", are_available()?);
    let _alone = alone();
    wait::unless_paused(|| {
        let directory = TempDir::new("many-descriptors")?;
        let pipes = (0..READERS).map(|_| io::pipe());
        let pipes = pipes.collect::<io::Result<Vec<_>>>()?;
        let agent = thread::scope(|scope| -> Result<Process> {
            let mut writers = Vec::new();
            for (mut reader, writer) in pipes {
                writers.push(writer);
                // It ends when the writer is closed.
                scope.spawn(move || while reader.read(&mut [0]).is_ok_and(|read| read > 0) {});
            }
            let agent = diagnose(process::id(), &directory)?;
            for _ in 0..ROUNDS {
                thread::sleep(Duration::from_millis(200));
                for writer in &mut writers {
                    writer.write_all(&[0])?;
                }
            }
            Ok(agent)
        })?;
        let waits = measured(&agent, process::id())?;
        let reads = || waits.iter().filter(|wait| wait["call"] == "read");
        let count = |wait: &Value| wait["count"].as_u64().unwrap_or(0);
        let (with, without): (Vec<_>, Vec<_>) = reads().partition(|wait| wait["object"].is_u64());
        let all: u64 = reads().map(count).sum();
        println!("{all} reads: {} descriptors", with.len());
        // The first round ends waits that began before the hooks were attached; a stalled thread may miss one.
        let least = (READERS * (ROUNDS - 2)) as u64;
        ensure!(all >= least, "{all} of {least} reads: {waits:?}");
        let without: u64 = without.into_iter().map(count).sum();
        ensure!(
            (1..READERS).contains(&with.len()) && without > 0,
            "{} descriptors, and {without} reads without one: {waits:?}",
            with.len()
        );
        let runs = waits.iter().filter(|wait| wait["kind"] == "run_queue");
        let runs: u64 = runs.map(count).sum();
        ensure!(runs >= least, "{runs} waits for a CPU: {waits:?}");
        Ok(())
    })
}

#[test]
fn a_service_that_forks_all_the_time_is_measured() -> Result<()> {
    ensure!(are_available()?.is_ok(), "{:?}", are_available()?);
    let _alone = alone();
    let directory = TempDir::new("forks")?;
    let mut command = Command::new(SUBJECT);
    let forking = Process::start(
        "forking process",
        command.args(["short-lived", "--per-s", "200"]),
    )?;
    let agent = diagnose(forking.pid(), &directory)?;
    thread::sleep(Duration::from_secs(5));
    forking.check_running()?;
    let waits = measured(&agent, forking.pid())?;
    let counts = waits.iter().filter_map(|wait| wait["count"].as_u64());
    let count: u64 = counts.sum();
    ensure!(count > 0, "nothing was measured");
    Ok(())
}
