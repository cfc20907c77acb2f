//! Reports a test that cannot run here as skipped, with the reason. It never passes silently.

use std::{env, fs::OpenOptions, io::Write as _};

/// Reports that `test` did not run, and why: on standard error and in the file named by `TAILBACK_SKIP_LOG`, which
/// `cargo xtask test` reads.
pub fn skip(test: &str, reason: &str) {
    // One line per skip, even for a multi-line reason.
    let line = format!("{test}: {}\n", reason.replace('\n', " "));
    eprint!("skipped {line}");
    let Some(log) = env::var_os("TAILBACK_SKIP_LOG") else {
        return;
    };
    // Appended in one write, because tests in several processes share the file.
    let written = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .and_then(|mut file| file.write_all(line.as_bytes()));
    if let Err(error) = written {
        panic!("write to the skip log {}: {error}", log.display());
    }
}
