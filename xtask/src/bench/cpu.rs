//! CPU time of processes and of the machine, from /proc.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};

/// User and system time of all past and present threads of a process, from /proc/PID/stat. Resolution: one clock tick.
pub fn of_process(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let ticks = ticks(&stat).with_context(|| format!("read the CPU time in {path}"))?;
    Ok(Duration::from_secs_f64(
        ticks as f64 / rustix::param::clock_ticks_per_second() as f64,
    ))
}

/// `utime` and `stime`, fields 14 and 15 of proc_pid_stat(5). Field 2 is a name in parentheses that may contain any
/// characters.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ').skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// CPU time of the current threads of a process and its children, from their schedstat. Exact to the ns for intervals in
/// which no thread exits.
pub fn of_family(pid: u32) -> Result<Duration> {
    let mut sum = Duration::ZERO;
    let directory = format!("/proc/{pid}/task");
    for thread in fs::read_dir(&directory).with_context(|| format!("read {directory}"))? {
        let thread = thread.with_context(|| format!("read {directory}"))?.path();
        let read = |name: &str| {
            let path = thread.join(name);
            fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
        };
        // The thread has just exited; its time is lost.
        let Ok(schedstat) = read("schedstat") else {
            continue;
        };
        let on_cpu = schedstat
            .split(' ')
            .next()
            .and_then(|first| first.parse().ok());
        sum += Duration::from_nanos(
            on_cpu.with_context(|| format!("read the CPU time in {directory}"))?,
        );
        for child in read("children").unwrap_or_default().split_whitespace() {
            sum += of_family(
                child
                    .parse()
                    .with_context(|| format!("read the children in {directory}"))?,
            )?;
        }
    }
    Ok(sum)
}

/// Total non-idle time of all CPUs, including stolen time, from /proc/stat. Resolution: one clock tick.
pub fn of_machine() -> Result<Duration> {
    const FILE: &str = "/proc/stat";
    let stat = fs::read_to_string(FILE).with_context(|| format!("read {FILE}"))?;
    let ticks = busy(&stat).with_context(|| format!("read the CPU times in {FILE}"))?;
    Ok(Duration::from_secs_f64(
        ticks as f64 / rustix::param::clock_ticks_per_second() as f64,
    ))
}

/// Sum of `user nice system irq softirq steal` of the first line (proc_stat(5)), without `idle` and `iowait`.
fn busy(stat: &str) -> Option<u64> {
    let fields = stat
        .lines()
        .next()?
        .strip_prefix("cpu ")?
        .split_whitespace();
    let times: Option<Vec<u64>> = fields.take(8).map(|field| field.parse().ok()).collect();
    let [user, nice, system, _, _, irq, softirq, steal] = times?.try_into().ok()?;
    Some(user + nice + system + irq + softirq + steal)
}

#[cfg(test)]
mod tests {
    use std::{hint::black_box, process};

    use super::*;

    #[test]
    fn cpu_time_is_parsed_after_any_name() {
        let stat = "7 (a) b 1 2) S 1 7 7 0 -1 4194560 200 0 0 0 31 11 0 0 20 0 1 0 100 0 0";
        assert_eq!(ticks(stat), Some(42));
        assert_eq!(ticks("7 (a"), None);
    }

    #[test]
    fn idle_time_is_not_busy() {
        assert_eq!(busy("cpu  1 2 4 1000 1000 8 16 32 7 7\ncpu0 9"), Some(63));
        assert_eq!(busy("cpu  1 2 4"), None);
    }

    #[test]
    fn work_shows_in_both_counts() {
        let (process_before, family_before) = (
            of_process(process::id()).unwrap(),
            of_family(process::id()).unwrap(),
        );
        while of_process(process::id()).unwrap() - process_before < Duration::from_millis(50) {
            black_box((0..10_000).fold(0_u64, |sum, n| sum ^ black_box(n)));
        }
        let family = of_family(process::id()).unwrap() - family_before;
        assert!(family > Duration::from_millis(30), "{family:?}");
    }
}
