//! A file for Envoy's resource monitor `injected_resource`: the pressure as a number from 0 to 1.
//!
//! Envoy watches for the file being moved into place, and for nothing else; so it is written beside it and renamed.

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use tailback_page::Pressure;

use super::{Shared, tally::Tally};
use crate::config::signal::Envoy;

const EVERY: Duration = Duration::from_millis(100);

fn value(pressure: &Pressure) -> String {
    format!("{:.3}\n", pressure.score.clamp(0.0, 1.0))
}

/// Writes whenever there is something else to say, until dropped.
pub async fn serve(config: Envoy, tally: Arc<Tally>, shared: Arc<Shared>) {
    let mut clock = tokio::time::interval(EVERY);
    clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last = None;
    loop {
        clock.tick().await;
        let text = value(&shared.pressure(&config.target));
        if last.as_ref() == Some(&text) {
            continue;
        }
        match put(&config.file, &text) {
            Ok(()) => {
                tally.said(&text);
                last = Some(text);
            }
            Err(error) => tally.failed(&format!("{error:#}")),
        }
    }
}

/// Writes the file, whole or not at all.
pub fn put(path: &Path, text: &str) -> Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let write = || -> io::Result<()> {
        fs::write(&beside, text)?;
        fs::rename(&beside, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_stays_within_what_envoy_takes() {
        let at = |score: f64| {
            value(&Pressure {
                score,
                ..Pressure::NONE
            })
        };
        assert_eq!(
            (at(0.0), at(0.7364), at(3.0)),
            ("0.000\n".into(), "0.736\n".into(), "1.000\n".into())
        );
    }
}
