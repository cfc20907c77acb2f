//! Each scenario once, as a test. `cargo xtask scenarios` repeats them.

use std::{
    env,
    process::Command,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tailback_tests::{
    lines::Stream,
    process::Process,
    scenario::{Outcome, Row, SECOND_TRY},
    skip::skip,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_tailback-scenarios");
const DEADLINE: Duration = Duration::from_secs(120);

/// They measure time, and each wants the machine for itself.
static ALONE: Mutex<()> = Mutex::new(());

/// What is asked of a verdict is that it is right four times of five. One run says so if it is right. One that is wrong may be
/// the one of five, and a second the other of ten: the runs that follow have to be right. A third is one too many.
const WRONG_ONE_IN: usize = 5;
const RUNS: usize = 10;

fn play(test: &str, scenario: &str) -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(
        env::var_os(SECOND_TRY).is_none(),
        "its repeats were its first try"
    );
    let mut all_wrong = Vec::new();
    for run in 1..=RUNS {
        let told = match once(scenario) {
            Ok(row) if row.outcome == Outcome::Skipped && run == 1 => {
                skip(test, &row.why.join("; "));
                return Ok(());
            }
            Ok(row) => (row.outcome != Outcome::Right).then(|| wrong(&row)),
            Err(error) => Some(format!("{error:#}")),
        };
        if let Some(told) = told {
            println!("{told}");
            all_wrong.push(told);
        }
        if all_wrong.len() * WRONG_ONE_IN <= run {
            break;
        }
        ensure!(
            all_wrong.len() * WRONG_ONE_IN <= RUNS,
            "wrong {} times in {run} runs: {}",
            all_wrong.len(),
            all_wrong.join("\nthen ")
        );
    }
    Ok(())
}

fn wrong(row: &Row) -> String {
    format!(
        "{}, planted {}: {}\nepisodes: {}",
        row.scenario,
        row.planted,
        row.why.join("; "),
        row.episodes.join(", ")
    )
}

/// Plays it in a process of its own: limits and children that it leaves behind are nobody else's.
fn once(scenario: &str) -> Result<Row> {
    let process = Process::start(scenario, Command::new(PROGRAM).arg(scenario))?;
    process.wait_end(DEADLINE)?;
    // The end of the process may be seen before its last line; whoever still holds its output is not waited for.
    let _ = process.lines().wait_end(Duration::from_secs(1));
    let lines = process.lines().all();
    let out = lines.iter().filter(|line| line.stream == Stream::Stdout);
    let row = out.filter_map(|line| Row::from_json(&line.text)).next();
    let row = row.with_context(|| {
        let last = lines.last().map(|line| line.text.clone());
        format!("{scenario} was not played: {}", last.unwrap_or_default())
    })?;
    println!("{}", row.to_json());
    Ok(row)
}

macro_rules! scenarios {
    ($($test:ident $scenario:literal,)*) => {
        const PLAYED: &[&str] = &[$($scenario,)*];

        $(#[test]
        fn $test() -> Result<()> {
            play(stringify!($test), $scenario)
        })*
    };
}

scenarios! {
    flash_sale "flash-sale",
    slow_redis "slow-redis",
    redis_blocked "redis-blocked",
    pool_exhausted "pool-exhausted",
    few_workers "few-workers",
    surge "surge",
    surge_nginx "surge-nginx",
    stopped "stopped",
    convoy "convoy",
    convoy_downstream "convoy-downstream",
    deadlock "deadlock",
    interpreter_lock "interpreter-lock",
    event_loop "event-loop",
    output_pipe "output-pipe",
    cpu_neighbour "cpu-neighbour",
    own_threads "own-threads",
    quota "quota",
    quota_podman "quota-podman",
    silent_clients "silent-clients",
    mute_clients_haproxy "mute-clients-haproxy",
    deaf_clients "deaf-clients",
    deaf_clients_nginx "deaf-clients-nginx",
    llm_slow_provider "llm-slow-provider",
    llm_small_pool "llm-small-pool",
    iot_gridlock "iot-gridlock",
    fsync "fsync",
    link_limited "link-limited",
    small_backlog "small-backlog",
    files_exhausted "files-exhausted",
    busy "busy",
    bursty "bursty",
    batch "batch",
    keep_alive "keep-alive",
    rolling_restart "rolling-restart",
    slow_by_design "slow-by-design",
}

#[test]
fn every_scenario_is_played() -> Result<()> {
    let output = Command::new(PROGRAM).arg("--list").output();
    let output = output.context("list the scenarios")?;
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(listed.lines().collect::<Vec<_>>(), PLAYED);
    Ok(())
}
