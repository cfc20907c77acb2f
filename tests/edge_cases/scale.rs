//! Targets with very many sockets, threads or processes, sampled within the CPU budget.

use std::{
    fs,
    io::Write as _,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use tailback_tests::{
    agent::{Agent, MAX_CPU_SHARE},
    needs,
    process::{End, Process},
    program,
    sample::{Sample, float, number},
    service::Service,
    temp::TempDir,
    wait,
};

use crate::{DEADLINE, SUBJECT, connect_all};

/// CPU time of a process from /proc, with a resolution of 10 ms.
fn cpu_time(pid: u32) -> Result<Duration> {
    let file = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
    let after_name = stat.rsplit(") ").next().unwrap_or_default();
    let numbers: Vec<u64> = after_name.split(' ').flat_map(str::parse).collect();
    // After the state, utime is field 11 and stime field 12 (fields 14 and 15 of proc(5)).
    let ticks: u64 = numbers.iter().skip(10).take(2).sum();
    Ok(Duration::from_millis(ticks * 10))
}

/// Checks that the agent keeps its CPU budget after its first ten seconds, and exits cleanly on SIGTERM.
fn check_budget(agent: &Agent) -> Result<()> {
    let report = agent.wait_for("its own cost", DEADLINE, |event| event.is("agent"))?;
    let pid = agent.process().pid();
    // A virtual machine may charge it with a pause, but not in three periods in a row.
    let mut share = f64::INFINITY;
    for _ in 0..3 {
        let (before, begun) = (cpu_time(pid)?, Instant::now());
        // The measuring period; nothing is waited for.
        thread::sleep(Duration::from_secs(6));
        share = (cpu_time(pid)? - before).as_secs_f64() / begun.elapsed().as_secs_f64();
        if share <= MAX_CPU_SHARE {
            break;
        }
    }
    let of = |key: &str| report.number(key).unwrap_or(f64::NAN);
    println!(
        "{} processes, {} records in {} samples, {:.1} MB, {} late samples; {:.4} of a core in the first ten seconds, then {share:.4}",
        of("processes"),
        of("records"),
        of("samples"),
        of("rss_bytes") / 1e6,
        of("late_samples"),
        of("cpu_share"),
    );
    ensure!(
        share <= MAX_CPU_SHARE,
        "{share} of a core: {}",
        report.value
    );
    agent.process().signal(Signal::TERM)?;
    let end = agent.process().wait_end(DEADLINE)?;
    ensure!(end == End::Code(0), "it ended with {end:?}");
    Ok(())
}

#[test]
fn all_of_20000_sockets_are_sampled_within_the_budget() -> Result<()> {
    const TEST: &str = "all_of_20000_sockets_are_sampled_within_the_budget";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    // Below the hard limit of open files on most machines.
    const SOCKETS_PER_PROCESS: u32 = 4_000;
    const PROCESSES: u32 = 5;
    let holders: Vec<Service> = (0..PROCESSES)
        .map(|_| {
            let args = ["hold", "--sockets", &SOCKETS_PER_PROCESS.to_string()];
            Service::start(&mut Command::new(SUBJECT), &args)
        })
        .collect::<Result<_>>()?;
    let mut args: Vec<String> = Vec::new();
    for holder in &holders {
        args.extend(["--pid".to_owned(), holder.pid().to_string()]);
    }
    let agent = Agent::run(&args)?;
    // One service has 100 more connections that it does not accept, with one unread byte each.
    let mut extra = connect_all(holders[0].address(), 100)?;
    for stream in &mut extra {
        stream.write_all(b"!")?;
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let sample = Sample::of(&args)?;
    let connections = |kind: &str| -> Result<f64> {
        sample
            .queues(kind)
            .map(|queue| float(queue, "connections"))
            .sum()
    };
    println!(
        "{} connections in receive queues, {} in send queues",
        connections("recv")?,
        connections("send")?
    );
    let truth = f64::from(SOCKETS_PER_PROCESS * PROCESSES);
    ensure!(connections("recv")? == truth && connections("send")? == truth);
    for holder in &holders {
        let own = sample.queue("recv", &format!(":{}", holder.address().port()))?;
        ensure!(
            float(own, "connections")? == f64::from(SOCKETS_PER_PROCESS / 2),
            "{own}"
        );
        ensure!(number(own, "depth")? == 0, "{own}");
    }
    let accept = sample.queue("accept", &holders[0].address().to_string())?;
    ensure!(number(accept, "depth")? == 100, "{accept}");
    check_budget(&agent)
}

#[test]
fn all_of_5000_threads_are_sampled_within_the_budget() -> Result<()> {
    const TEST: &str = "all_of_5000_threads_are_sampled_within_the_budget";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let mut parked = Command::new(SUBJECT);
    let parked = Process::start("threads", parked.args(["park", "--threads", "5000"]))?;
    parked.wait_line("parked", DEADLINE)?;
    let agent = Agent::run(["--pid", &parked.pid().to_string()])?;
    let sample = Sample::of_process(parked.pid())?;
    let threads = sample.queue("runqueue", "threads")?;
    println!("{threads}");
    ensure!(float(threads, "threads")? == 5_000.0, "{threads}");
    ensure!(
        number(threads, "depth")? == 0,
        "all threads sleep: {threads}"
    );
    check_budget(&agent)
}

#[test]
fn all_of_500_processes_are_monitored_at_once() -> Result<()> {
    const TEST: &str = "all_of_500_processes_are_monitored_at_once";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let directory = TempDir::new("crowd")?;
    let program = program::renamed(SUBJECT, &directory, "crowd")?;
    // Processes of one program under one parent are one service: five services of 100 listeners.
    let crowds: Vec<Process> = (0..5)
        .map(|_| {
            let args = ["crowd", "--workers", "100", "--waiting", "2"];
            Process::start("a crowd", Command::new(&program).args(args))
        })
        .collect::<Result<_>>()?;
    let addresses: Vec<String> = wait::until("500 listeners", 6 * DEADLINE, || {
        let lines = crowds.iter().flat_map(|crowd| crowd.lines().all());
        let of_listener = |line: String| line.strip_prefix("listening ").map(str::to_owned);
        let addresses: Vec<String> = lines.filter_map(|line| of_listener(line.text)).collect();
        Ok((addresses.len() == 500).then_some(addresses))
    })?;
    let agent = Agent::run(["--all"])?;
    let sample = Sample::of(&["--all"])?;
    let mut missing = 0;
    for address in &addresses {
        match sample.queue("accept", address) {
            Ok(queue) => ensure!(number(queue, "depth")? == 2, "{queue}"),
            Err(_) => missing += 1,
        }
    }
    println!(
        "{} targets, {missing} of 500 listeners missing",
        sample.targets().count()
    );
    ensure!(missing == 0, "{missing} listeners are missing");
    check_budget(&agent)
}
