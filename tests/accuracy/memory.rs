//! A cgroup with a memory limit, partly used.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};
use tailback_tests::lines::unix_ns;

use crate::{
    control_group::{ControlGroup, write},
    course::meanwhile,
    report::Report,
    sampling::{self, SETTLED_NS, time_ns},
    sys,
};

/// Memory limit of the cgroup, bytes.
const LIMIT: u64 = 512 << 20;
/// Memory that this process writes to, bytes.
const USED: usize = 192 << 20;

pub fn measure(report: &mut Report) -> Result<()> {
    let group = match ControlGroup::enter("memory") {
        Ok(group) => group,
        Err(why) => {
            report.skip(&format!("{why:#}"), |_| true);
            return Ok(());
        }
    };
    let (limit, usage, inactive) = if group.is_v1 {
        (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        )
    } else {
        ("memory.max", "memory.current", "inactive_file")
    };
    write(&group.file(limit), &LIMIT.to_string())?;
    // Not zero: untouched zero pages take no memory.
    let used = vec![1_u8; USED];
    let since_ns = unix_ns();
    let count = || {
        let stat = group.file("memory.stat");
        let stat = fs::read_to_string(&stat).with_context(|| format!("read {}", stat.display()))?;
        let line = stat.lines().find_map(|line| line.strip_prefix(inactive));
        let reclaimable: f64 = line
            .unwrap_or("0")
            .trim()
            .parse()
            .context("read memory.stat")?;
        Ok([sys::number_in(group.file(usage))? - reclaimable])
    };
    let sample = || sampling::steady(Duration::from_millis(1500));
    let (samples, [memory]) = meanwhile(Duration::from_millis(10), count, sample)?;
    std::hint::black_box(&used);
    let name = group.name();
    let queue = samples.queue("memory", |queue| queue.contains(&name));
    let settled = sampling::within(&queue, since_ns + SETTLED_NS, unix_ns());
    let truth = |line: &serde_json::Value| memory.at(time_ns(line).max(memory.range_ns().0));
    sampling::compare_each(report, &settled, "depth", truth, "depth");
    sampling::compare_each(report, &settled, "limit", |_| LIMIT as f64, "limit");
    Ok(())
}
