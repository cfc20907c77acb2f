//! A test whose part cannot be had is reported as skipped with the reason, never silently passed.

use std::{env, fs::OpenOptions, io::Write as _};

/// Says that `test` did not run, and why: on standard error, and in the file named by `TAILBACK_SKIP_LOG`, from
/// which `cargo xtask test` counts.
pub fn skip(test: &str, reason: &str) {
    // One line each, whatever the reason says.
    let line = format!("{test}: {}\n", reason.replace('\n', " "));
    eprint!("skipped {line}");
    let Some(log) = env::var_os("TAILBACK_SKIP_LOG") else {
        return;
    };
    // Appended in one write: tests of several processes share the file.
    let written = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .and_then(|mut file| file.write_all(line.as_bytes()));
    if let Err(error) = written {
        panic!("write to the skip log {}: {error}", log.display());
    }
}
