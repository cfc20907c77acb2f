//! A file for Envoy's resource monitor `injected_resource`: the pressure as a number from 0 to 1.
//!
//! Envoy watches for the file being moved into place, and for nothing else; so it is written beside it and renamed.

use std::{
    fs,
    io::{self, Write as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::{
    fs::{AtFlags, Mode, OFlags},
    io::Errno,
};
use tailback_page::Pressure;

use super::{Shared, adapter_stats::AdapterStats, clock};
use crate::config::signal::Envoy;

const EVERY: Duration = Duration::from_millis(100);

fn value(pressure: &Pressure) -> String {
    format!("{:.3}\n", pressure.score.clamp(0.0, 1.0))
}

/// Writes whenever there is something else to say, until dropped.
pub async fn serve(config: Envoy, tally: Arc<AdapterStats>, shared: Arc<Shared>) {
    let mut clock = clock(EVERY);
    let mut last = None;
    loop {
        clock.tick().await;
        let text = value(&shared.pressure(&config.target));
        if last.as_ref() == Some(&text) {
            continue;
        }
        // Where the file is on a mount that hangs, nobody else is to wait for it.
        let (file, value) = (config.file.clone(), text.clone());
        let written = tokio::task::spawn_blocking(move || put(&file, &value)).await;
        match written.map_err(Into::into).flatten() {
            Ok(()) => {
                tally.said(&text);
                last = Some(text);
            }
            Err(error) => tally.failed(&format!("{error:#}")),
        }
    }
}

/// Writes the file, whole or not at all. The directory may be another user's: nothing there is followed or gone on with.
pub fn put(path: &Path, text: &str) -> Result<()> {
    let write = || -> io::Result<()> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let folder = rustix::fs::open(folder, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let mut beside = name.to_owned();
        beside.push(".new");
        match rustix::fs::unlinkat(&folder, &beside, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&folder, &beside, flags, Mode::from_raw_mode(0o644))?;
        fs::File::from(file).write_all(text.as_bytes())?;
        Ok(rustix::fs::renameat(&folder, &beside, &folder, name)?)
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
