//! Writes the file that Envoy's resource monitor `injected_resource` reads: the share of new requests to reject, from 0 to 1.
//!
//! Envoy only notices a file that is moved into place, so each value is written to a temporary file and renamed.

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

/// How often the pressure is checked for a change.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// 1 − admit ratio: a `scaled` trigger from 0 to 1 rejects with exactly this probability. The score would not do: it says that work
/// waits, not how much to reject, so that Envoy rejects too much and too little in turn.
fn value(pressure: &Pressure) -> String {
    format!("{:.3}\n", (1.0 - pressure.admit_ratio).clamp(0.0, 1.0))
}

/// Writes the file whenever the value changes, until dropped.
pub async fn serve(config: Envoy, stats: Arc<AdapterStats>, shared: Arc<Shared>) {
    let mut clock = clock(CHECK_INTERVAL);
    let mut last = None;
    loop {
        clock.tick().await;
        let text = value(&shared.pressure(&config.target));
        if last.as_ref() == Some(&text) {
            continue;
        }
        // In a thread of its own: the file may be on a mount that hangs.
        let (file, value) = (config.file.clone(), text.clone());
        let written = tokio::task::spawn_blocking(move || put(&file, &value)).await;
        match written.map_err(Into::into).flatten() {
            Ok(()) => {
                stats.replied(&text);
                last = Some(text);
            }
            Err(error) => stats.failed(&format!("{error:#}")),
        }
    }
}

/// Writes the file atomically. The directory may belong to another user, so symbolic links are not followed and a leftover
/// temporary file is not reused.
pub fn put(path: &Path, text: &str) -> Result<()> {
    let write = || -> io::Result<()> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let directory = rustix::fs::open(
            directory,
            OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let mut temporary = name.to_owned();
        temporary.push(".new");
        match rustix::fs::unlinkat(&directory, &temporary, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&directory, &temporary, flags, Mode::from_raw_mode(0o644))?;
        fs::File::from(file).write_all(text.as_bytes())?;
        Ok(rustix::fs::renameat(
            &directory, &temporary, &directory, name,
        )?)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_is_the_share_to_reject() {
        let at = |admit_ratio: f64| {
            value(&Pressure {
                admit_ratio,
                ..Pressure::NONE
            })
        };
        assert_eq!(
            (at(1.0), at(0.2636), at(-1.0)),
            ("0.000\n".into(), "0.736\n".into(), "1.000\n".into())
        );
        assert_eq!(value(&Pressure::NONE), "0.000\n", "without an agent");
    }
}
