//! Healthy services under load open no episode.

use std::{
    net::TcpStream,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use tailback_tests::{
    load::{Load, Plan, Spacing},
    needs,
    nginx::Nginx,
    process::{End, Process},
    program,
    redis::Redis,
    service::Pace,
    sockets, ss, wait,
};

use crate::{DEADLINE, NOT_RUNQUEUE, alone, check_all_ok, service, stop, watch};

#[test]
fn a_burst_that_drains_opens_no_episode() -> Result<()> {
    const TEST: &str = "a_burst_that_drains_opens_no_episode";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    let _alone = alone();
    wait::unless_paused(bursts)
}

fn bursts() -> Result<()> {
    // 60 connections take 120 ms to serve.
    let pace = Pace::new(Duration::from_millis(2))?;
    let pace_file = pace.file().display().to_string();
    let service = service(&[
        "take",
        "--listen",
        "127.0.0.1:0",
        "--backlog",
        "100",
        "--pace",
        &pace_file,
    ])?;
    let agent = watch(service.pid(), &[])?;
    let port = service.address().port();
    let mut deepest = 0;
    let mut longest = Duration::ZERO;
    for _ in 0..10 {
        let begun = Instant::now();
        let clients: Vec<TcpStream> = (0..60)
            .map(|_| sockets::begin_connect(service.address()))
            .collect::<Result<_>>()?;
        deepest = deepest.max(ss::sums(None, port)?.0);
        ss::wait_for(None, port, "an empty queue after the burst", |waiting| {
            waiting == 0
        })?;
        longest = longest.max(begun.elapsed());
        drop(clients);
        // Paces the load.
        thread::sleep(Duration::from_millis(250));
    }
    println!("bursts of 60 on a backlog of 100: depth up to {deepest}, drained within {longest:?}");
    ensure!(deepest > 20, "the burst did not queue");
    check_all_ok(&stop(&agent)?, &NOT_RUNQUEUE)
}

#[test]
fn a_busy_healthy_nginx_opens_no_episode() -> Result<()> {
    const TEST: &str = "a_busy_healthy_nginx_opens_no_episode";
    if !needs::met(TEST, &["nginx", "wrk"]) {
        return Ok(());
    }
    let _alone = alone();
    wait::unless_paused(busy_nginx)
}

fn busy_nginx() -> Result<()> {
    let nginx = Nginx::start(2)?;
    let agent = watch(nginx.process().pid(), &[])?;
    let before = nginx.requests()?;
    let load = Load::start(Plan {
        to: nginx.address(),
        path: "/".to_owned(),
        per_s: 300.0,
        spacing: Spacing::Poisson { seed: 3 },
        duration: Duration::from_secs(6),
        timeout: Duration::from_secs(5),
        max_in_flight: 500,
    })?;
    let done = load.finish_plan()?;
    let ok = done.iter().filter(|request| request.ok()).count();
    println!("open loop: {ok} of {} requests succeeded", done.len());

    let url = format!("http://{}/", nginx.address());
    let mut wrk = Command::new(program::need(&["wrk"])?);
    let wrk = Process::start("wrk", wrk.args(["-c", "4", "-t", "1", "-d", "5s", &url]))?;
    ensure!(wrk.wait_end(DEADLINE)? == End::Code(0), "wrk failed");
    let served = nginx.requests()? - before;
    println!("open and closed loop: {served} requests served");
    ensure!(
        ok == done.len() && served > 3_000,
        "the server was not both healthy and busy"
    );
    check_all_ok(&stop(&agent)?, &NOT_RUNQUEUE)
}

#[test]
fn a_busy_healthy_redis_opens_no_episode() -> Result<()> {
    const TEST: &str = "a_busy_healthy_redis_opens_no_episode";
    if !needs::met(TEST, &["redis-server", "redis-benchmark"]) {
        return Ok(());
    }
    let _alone = alone();
    wait::unless_paused(busy_redis)
}

fn busy_redis() -> Result<()> {
    let redis = Redis::start()?;
    let agent = watch(redis.process().pid(), &[])?;
    let mut benchmark = Command::new(program::need(&["redis-benchmark"])?);
    benchmark.args([
        "-p",
        &redis.port().to_string(),
        "-c",
        "50",
        "-n",
        "150000",
        "-t",
        "set,get",
        "-q",
    ]);
    let begun = Instant::now();
    let benchmark = Process::start("redis-benchmark", &mut benchmark)?;
    ensure!(
        benchmark.wait_end(Duration::from_secs(60))? == End::Code(0),
        "redis-benchmark failed"
    );
    println!("300,000 commands from 50 clients in {:?}", begun.elapsed());
    check_all_ok(&stop(&agent)?, &NOT_RUNQUEUE)
}
