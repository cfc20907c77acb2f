//! Plays scenarios, each in a process of its own: first those that need the machine for themselves, then the others beside
//! each other. Each has its own network, control groups and directories.

use std::{
    fs,
    path::Path,
    process::Stdio,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use anyhow::{Context as _, Result, ensure};
use tailback_tests::scenario::{Listed, Row};

use crate::command::Cmd;

/// Number of scenarios played beside each other on a machine with at least two CPUs. Each uses 5% to 30% of a CPU.
const AT_ONCE: usize = 3;

/// All scenarios that the program can play.
pub fn list(program: &Path) -> Result<Vec<Listed>> {
    let listed = Cmd::new(program).arg("--list").output()?;
    Ok(listed.lines().map(Listed::parse).collect())
}

/// Plays these scenarios once, and reports each as soon as it has been played. `keep`: directory for their recordings.
pub fn play_each(
    program: &Path,
    agent: &Path,
    scenarios: &[Listed],
    keep: Option<&Path>,
    mut report: impl FnMut(&str, Result<Row>),
) {
    let (alone, others): (Vec<_>, Vec<_>) = scenarios.iter().partition(|scenario| scenario.alone);
    for scenario in alone {
        let name = &scenario.name;
        report(name, play(program, agent, name, keep));
    }
    let at_once = match thread::available_parallelism().map_or(1, usize::from) {
        1 => 1,
        _ => AT_ONCE,
    };
    each_of(
        &others,
        at_once,
        |scenario| play(program, agent, &scenario.name, keep),
        |scenario, row| report(&scenario.name, row),
    );
}

/// Does `work` for each item on this many threads, and passes on the results in the order in which they arrive.
fn each_of<T: Sync, R: Send>(
    items: &[T],
    threads: usize,
    work: impl Fn(&T) -> R + Sync,
    mut report: impl FnMut(&T, R),
) {
    let next = AtomicUsize::new(0);
    let (send, receive) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..threads {
            let (send, next, work) = (send.clone(), &next, &work);
            scope.spawn(move || {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    // The receiver outlives the threads.
                    let _ = send.send((item, work(item)));
                }
            });
        }
        drop(send);
        for (item, result) in receive {
            report(item, result);
        }
    });
}

fn play(program: &Path, agent: &Path, scenario: &str, keep: Option<&Path>) -> Result<Row> {
    let mut cmd = Cmd::new(program).env("TAILBACK_BIN", agent);
    if let Some(directory) = keep {
        fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
        cmd = cmd.arg("--keep").arg(directory);
    }
    let cmd = cmd.arg(scenario);
    let output = cmd.command().stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("start `{cmd}`"))?;
    // Exit code 1 means a wrong verdict, which the row explains.
    ensure!(
        matches!(output.status.code(), Some(0 | 1)),
        "`{cmd}` ended with {}",
        output.status
    );
    let text = String::from_utf8_lossy(&output.stdout);
    let row = text.lines().find_map(Row::from_json);
    row.with_context(|| format!("`{cmd}` printed no row: {text:?}"))
}

#[cfg(test)]
mod tests {
    use std::{sync::Barrier, time::Duration};

    use super::*;

    #[test]
    fn every_item_is_reported_once_and_as_many_run_at_once_as_allowed() {
        let items: Vec<u32> = (0..9).collect();
        // Each waits for two others: with fewer threads this would never end.
        let three = Barrier::new(3);
        let running = AtomicUsize::new(0);
        let mut seen = Vec::new();
        let work = |item: &u32| {
            three.wait();
            let most = running.fetch_add(1, Ordering::SeqCst) + 1;
            thread::sleep(Duration::from_millis(1));
            running.fetch_sub(1, Ordering::SeqCst);
            assert!(most <= 3, "{most} at once");
            item * 2
        };
        each_of(&items, 3, work, |item, twice| seen.push((*item, twice)));
        seen.sort_unstable();
        let all: Vec<(u32, u32)> = items.iter().map(|item| (*item, item * 2)).collect();
        assert_eq!(seen, all);
    }
}
