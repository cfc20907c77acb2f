//! Open files of a process.

use std::{
    fs::{self, File},
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tailback_tests::lines::unix_ns;

use crate::{
    look::{self, standing},
    report::Report,
};

const MORE: usize = 150;
const LIMIT: u64 = 400;

pub fn measure(report: &mut Report) -> Result<()> {
    let limit = Rlimit {
        current: Some(LIMIT),
        ..getrlimit(Resource::Nofile)
    };
    setrlimit(Resource::Nofile, limit).context("set RLIMIT_NOFILE")?;
    let files: std::io::Result<Vec<File>> = (0..MORE).map(|_| File::open("/dev/null")).collect();
    let files = files.context("open /dev/null")?;
    let since_ns = unix_ns();
    // Counted while the agent runs: what is open towards it counts as well.
    let (looks, open) = look::during(Duration::from_millis(600), || {
        let entries = fs::read_dir("/proc/self/fd").context("read /proc/self/fd")?;
        // One of them is the folder itself.
        Ok(entries.count() - 1)
    })?;
    drop(files);
    let queue = looks.queue("fd", |_| true);
    let keys = [
        ("depth", "depth", open as f64),
        ("limit", "limit", LIMIT as f64),
    ];
    standing(report, &queue, since_ns, &keys);
    Ok(())
}
