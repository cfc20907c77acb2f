//! The forecast of the time until an accept queue is full.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use tailback_tests::{lines::unix_ns, needs, sample::number, sockets, ss, temp::TempDir, wait};

use crate::{alone, watched::Watched};

/// Fills a queue of 200 at a steady rate. Returns the time to full forecast at half depth, and the actual time, s.
fn forecast(pace_ms: Option<f64>, per_s: f64) -> Result<(f64, f64)> {
    const BACKLOG: u64 = 200;
    let directory = TempDir::new("forecast")?;
    // Warn at half depth, and not at the standing delay, which would warn sooner.
    let config = directory.write(
        "tailback.toml",
        "[detect.accept]\nwarn = 0.5\ntarget = \"1h\"\ndwell = \"100ms\"\n",
    )?;
    let pace = directory.write("pace", &pace_ms.unwrap_or(0.0).to_string())?;
    let (config, pace) = (config.display().to_string(), pace.display().to_string());
    let watched = Watched::start(
        &["--backlog", &BACKLOG.to_string(), "--pace", &pace],
        &["--config", &config],
    )?;
    if pace_ms.is_none() {
        watched.service.process().freeze()?;
    }
    let to = watched.service.address();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| {
            watched.network.inside(|| {
                let mut clients = Vec::new();
                let mut due = Instant::now();
                while !done.load(Ordering::Relaxed) {
                    clients.push(sockets::begin_connect(to)?);
                    due += Duration::from_secs_f64(1.0 / per_s);
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                }
                Ok(())
            })
        });
        let measure = || -> Result<(f64, f64)> {
            let warned = watched.level("warn")?;
            let is_full = |waiting| waiting >= BACKLOG;
            ss::wait_for(Some(&watched.network), to.port(), "a full queue", is_full)?;
            let full_ns = unix_ns();
            let forecast = number(&warned.value, "time_to_full_ns")? as f64 / 1e9;
            let actual = (full_ns - number(&warned.value, "time_unix_ns")?) as f64 / 1e9;
            println!(
                "arrivals {per_s}/s, departures {}: at {} of {BACKLOG} forecast {forecast:.2} s to full, actual {actual:.2} s: error {:+.1}%",
                pace_ms.map_or("none".to_owned(), |ms| format!("{:.0}/s", 1e3 / ms)),
                warned.value["depth"],
                (forecast - actual) / actual * 100.0
            );
            Ok((forecast, actual))
        };
        let measured = measure();
        done.store(true, Ordering::Relaxed);
        load.join().expect("the load does not panic")?;
        measured
    })
}

#[test]
fn time_to_full_at_half_depth_is_forecast_within_30_percent() -> Result<()> {
    const TEST: &str = "time_to_full_at_half_depth_is_forecast_within_30_percent";
    if !needs::met(TEST, &["ip", "nsenter", "ss", "unshare"]) {
        return Ok(());
    }
    let _alone = alone();
    let is_close = |(forecast, actual): (f64, f64)| ((forecast - actual) / actual).abs() <= 0.3;
    for (pace_ms, per_s) in [(None, 25.0), (None, 60.0), (Some(50.0), 60.0)] {
        wait::unless_paused(|| {
            // On a busy machine the load is sometimes unsteady, but not twice in a row.
            let first = forecast(pace_ms, per_s)?;
            if !is_close(first) {
                let (predicted, actual) = forecast(pace_ms, per_s)?;
                ensure!(
                    is_close((predicted, actual)),
                    "forecast {predicted:.2} s, actual {actual:.2} s, and before that {first:?}"
                );
            }
            Ok(())
        })?;
    }
    Ok(())
}
