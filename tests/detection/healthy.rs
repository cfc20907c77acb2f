//! HEALTHY

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
    sockets, ss,
};

use crate::{NOT_RUNQUEUE, SOON, alone, check_silence, ended, service, watch};

#[test]
fn a_burst_that_drains_is_no_episode() -> Result<()> {
    const TEST: &str = "a_burst_that_drains_is_no_episode";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    let _alone = alone();
    // 60 connections take 120 ms.
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
        ss::wait_for(None, port, "the burst to drain", |waiting| waiting == 0)?;
        longest = longest.max(begun.elapsed());
        drop(clients);
        // The load's own spacing.
        thread::sleep(Duration::from_millis(250));
    }
    println!(
        "bursts of 60 on a backlog of 100: up to {deepest} seen waiting, drained within {longest:?}"
    );
    ensure!(deepest > 20, "that was no burst");
    check_silence(&ended(&agent)?, &NOT_RUNQUEUE)
}

#[test]
fn a_busy_nginx_that_is_well_gives_no_episode() -> Result<()> {
    const TEST: &str = "a_busy_nginx_that_is_well_gives_no_episode";
    if !needs::met(TEST, &["nginx", "wrk"]) {
        return Ok(());
    }
    let _alone = alone();
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
    let well = done.iter().filter(|request| request.ok()).count();
    println!("open loop: {well} of {} requests answered", done.len());

    let url = format!("http://{}/", nginx.address());
    let mut wrk = Command::new(program::need(&["wrk"])?);
    let wrk = Process::start("wrk", wrk.args(["-c", "4", "-t", "1", "-d", "5s", &url]))?;
    ensure!(wrk.wait_end(SOON)? == End::Code(0), "wrk failed");
    let served = nginx.requests()? - before;
    println!("open and closed loop: {served} requests served");
    ensure!(
        well == done.len() && served > 3_000,
        "that was no healthy, busy server"
    );
    check_silence(&ended(&agent)?, &NOT_RUNQUEUE)
}

#[test]
fn a_busy_redis_that_is_well_gives_no_episode() -> Result<()> {
    const TEST: &str = "a_busy_redis_that_is_well_gives_no_episode";
    if !needs::met(TEST, &["redis-server", "redis-benchmark"]) {
        return Ok(());
    }
    let _alone = alone();
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
    println!("300,000 commands of 50 clients in {:?}", begun.elapsed());
    check_silence(&ended(&agent)?, &NOT_RUNQUEUE)
}
