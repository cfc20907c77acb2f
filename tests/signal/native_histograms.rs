//! Native histograms and exemplars of exact waits, as a real Prometheus stores them.

use std::{collections::BTreeMap, process::Command, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::Value;
use tailback_tests::{
    agent::hooks_in_use,
    exact_waits::{self, wait_attached, write_times},
    needs,
    process::Process,
    temp::TempDir,
    wait,
};

use crate::{
    prometheus::Prometheus,
    stage::{DEADLINE, SUBJECT, Stage},
};

/// How long Prometheus may take to scrape the last waits.
const SCRAPE_DEADLINE: Duration = Duration::from_secs(30);
/// Largest difference between two measures of one quantity, as a share of the larger one, and in seconds: see `tests/truth`.
/// The buckets of hooks and of native histograms are up to 3.1% and 2.2% wide.
const MAX_ERROR: f64 = 0.05;
const MAX_ERROR_S: f64 = 100e-6;
/// Least share of the waits that a queue counts: when exact waits begin to replace estimates, those since the last sample are lost,
/// 0.1 s of 2.4 s.
const MIN_COUNTED: f64 = 0.85;

fn compare(what: &str, measured: f64, expected: f64) -> Result<()> {
    println!("{what}: {measured:.6} s, expected {expected:.6} s");
    let most = (measured.max(expected) * MAX_ERROR).max(MAX_ERROR_S);
    ensure!(
        (measured - expected).abs() <= most,
        "{what}: {measured} s, expected {expected} s within {most} s"
    );
    Ok(())
}

#[test]
fn prometheus_gets_the_quantiles_and_the_culprits_of_exact_waits() -> Result<()> {
    const TEST: &str = "prometheus_gets_the_quantiles_and_the_culprits_of_exact_waits";
    if !needs::met(TEST, &["prometheus"]) {
        return Ok(());
    }
    wait::unless_paused(compare_with_the_programs_clock)
}

fn compare_with_the_programs_clock() -> Result<()> {
    let temp = TempDir::new("native")?;
    let fifo = temp.path().join("times");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).context("create a FIFO")?;
    let mut command = Command::new(SUBJECT);
    command.arg("read-timed").arg("--from").arg(&fifo);
    let reader = Process::start("reader", &mut command)?;
    reader.wait_line("reading", DEADLINE)?;
    let stage = Stage::start_with(TempDir::new("signal")?, |temp, base| {
        let pid = reader.pid();
        let hooks = "tier = \"watch\"\nhook_budget = 0.5\n";
        let target = format!("[[target]]\npid = {pid}\nservice_name = \"shop\"\n");
        temp.write("tailback.toml", &format!("{hooks}{target}{base}"))
    })?;
    wait_attached(stage.agent.process(), hooks_in_use)?;
    let diagnose = exact_waits::diagnose(reader.pid(), &temp)?;
    let native = Prometheus::with_features(stage.http, &["native-histograms", "exemplar-storage"])?;
    let classic = Prometheus::start(stage.http)?;

    write_times(&fifo)?;
    let times = reader.wait_line("times ", DEADLINE)?.text;
    let numbers = times.split_whitespace().skip(1).map(str::parse::<f64>);
    let numbers: Vec<f64> = numbers.collect::<Result<_, _>>()?;
    let [reads, mean_ns, ..] = numbers[..] else {
        bail!("unexpected line {times:?}");
    };
    let waits = exact_waits::measured(&diagnose, reader.pid())?;
    let of_reads = waits.iter().find(|wait| wait["call"] == "read");
    let of_reads = of_reads.with_context(|| format!("no reads in {waits:?}"))?;
    let json = |key: &str| -> Result<f64> {
        let value = of_reads[key].as_f64();
        Ok(value.with_context(|| format!("no {key} in {of_reads}"))? / 1e9)
    };

    const READS: &str = "tailback_blocked_seconds{target=\"shop\",call=\"read\",io=\"false\"}";
    let in_classic = READS.replace("_seconds", "_seconds_count");
    let of_native = format!("histogram_count({READS})");
    wait::until("all reads in both forms", SCRAPE_DEADLINE, || {
        let count = native.value(&of_native)?;
        let is_same = count == classic.value(&in_classic)?;
        Ok(count.filter(|count| is_same && *count >= reads))
    })?;
    let value = |prometheus: &Prometheus, query: &str| {
        let value = prometheus.value(query)?;
        value.with_context(|| format!("{query} returns nothing"))
    };
    let mean = format!("histogram_sum({READS}) / histogram_count({READS})");
    let mean = value(&native, &mean)?;
    compare("mean", mean, mean_ns / 1e9)?;
    compare("mean in JSON", mean, json("mean_ns")?)?;
    let quantile = |q: &str| value(&native, &format!("histogram_quantile({q}, {READS})"));
    let (p50, p99) = (quantile("0.5")?, quantile("0.99")?);
    // The program's own 99th percentile is of other ranks: it does not count the read that finds the end of the FIFO.
    compare("p99 in JSON", p99, json("p99_ns")?)?;
    compare("p50 in JSON", p50, json("p50_ns")?)?;

    // Classic buckets do not resolve more than 5 to 10 ms.
    let buckets = READS.replace("_seconds", "_seconds_bucket");
    let in_classic = value(&classic, &format!("histogram_quantile(0.5, {buckets})"))?;
    println!("p50 of classic buckets: {in_classic:.6} s");
    ensure!(
        (0.005..=0.01).contains(&in_classic) && (0.005..=0.01).contains(&p50),
        "p50 is {in_classic} by classic buckets, {p50} by native ones"
    );
    ensure!(native.value(&buckets)?.is_none(), "it stores both forms");

    // Each read ends with a wait for a CPU. The queue has those, too, from the second report of the hooks on as measured.
    for of_cpu in [
        "sum(tailback_run_queue_wait_seconds{target=\"shop\"})",
        "tailback_queue_wait_seconds{target=\"shop\",kind=\"runqueue\"}",
    ] {
        let count = value(&native, &format!("histogram_count({of_cpu})"))?;
        let p99 = value(&native, &format!("histogram_quantile(0.99, {of_cpu})"))?;
        println!("{of_cpu}: {count}, p99 {p99:.6} s");
        ensure!(
            count >= reads * MIN_COUNTED && p99 > 0.0,
            "{of_cpu}: {count} of {reads}"
        );
    }

    let exemplars = wait::until("an exemplar", SCRAPE_DEADLINE, || {
        Ok(Some(native.exemplars(READS)?).filter(|all| !all.is_empty()))
    })?;
    println!("{exemplars:?}");
    for exemplar in &exemplars {
        let seconds = exemplar["value"]
            .as_str()
            .context("no value")?
            .parse::<f64>()?;
        let labels: BTreeMap<String, Value> =
            serde_json::from_value(exemplar["labels"].clone()).context("labels")?;
        ensure!(seconds > 0.001 && seconds < 1.0, "{exemplar}");
        ensure!(
            labels["tid"].as_str().map(str::parse) == Some(Ok(reader.pid())),
            "{exemplar}"
        );
        ensure!(
            !labels.contains_key("culprit"),
            "only a CPU has one: {exemplar}"
        );
    }
    Ok(())
}
