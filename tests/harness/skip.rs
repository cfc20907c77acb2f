//! What a test reports besides its result. `cargo xtask test` reads it and prints it.

use std::{env, fs::OpenOptions, io::Write as _, thread};

/// Reports that `test` did not run, and why: on standard error and in the file named by `TAILBACK_SKIP_LOG`. It never passes
/// silently.
pub fn skip(test: &str, reason: &str) {
    report("skipped", "TAILBACK_SKIP_LOG", test, reason);
}

/// Reports that the running test made another attempt, and why: on standard error and in the file named by
/// `TAILBACK_ATTEMPT_LOG`.
pub(crate) fn another_attempt(reason: &str) {
    let thread = thread::current();
    let test = thread.name().unwrap_or("a test");
    report("another attempt:", "TAILBACK_ATTEMPT_LOG", test, reason);
}

fn report(what: &str, variable: &str, test: &str, reason: &str) {
    // One line each, even for a multi-line reason.
    let line = format!("{test}: {}\n", reason.replace('\n', " "));
    eprint!("{what} {line}");
    let Some(log) = env::var_os(variable) else {
        return;
    };
    // Appended in one write, because tests in several processes share the file.
    let written = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .and_then(|mut file| file.write_all(line.as_bytes()));
    if let Err(error) = written {
        panic!("write to {}: {error}", log.display());
    }
}
