//! Open file descriptors and RLIMIT_NOFILE.

use std::{
    fs::{self, File},
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tailback_tests::lines::unix_ns;

use crate::{
    report::Report,
    sampling::{self, compare_steady},
};

/// Number of descriptors opened in addition to those of the process.
const EXTRA_FILES: usize = 150;
/// RLIMIT_NOFILE.
const LIMIT: u64 = 400;

pub fn measure(report: &mut Report) -> Result<()> {
    let limit = Rlimit {
        current: Some(LIMIT),
        ..getrlimit(Resource::Nofile)
    };
    setrlimit(Resource::Nofile, limit).context("set RLIMIT_NOFILE")?;
    let files: std::io::Result<Vec<File>> =
        (0..EXTRA_FILES).map(|_| File::open("/dev/null")).collect();
    let files = files.context("open /dev/null")?;
    let since_ns = unix_ns();
    // Counted while the agent runs: our pipes to it count too.
    let (samples, open) = sampling::during(Duration::from_millis(600), || {
        let entries = fs::read_dir("/proc/self/fd").context("read /proc/self/fd")?;
        // One entry is the descriptor of the directory itself.
        Ok(entries.count() - 1)
    })?;
    drop(files);
    let queue = samples.queue("fd", |_| true);
    let keys = [
        ("depth", "depth", open as f64),
        ("limit", "limit", LIMIT as f64),
    ];
    compare_steady(report, &queue, since_ns, &keys);
    Ok(())
}
