//! Plays scenarios, each in a process of its own: those that need the machine for themselves first, then the others, beside
//! each other as far as there is room. Each has its own network, control groups and directories.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::Path,
    process::Stdio,
    sync::mpsc,
    thread,
};

use anyhow::{Context as _, Result, ensure};
use tailback_tests::scenario::{Listed, Room, Row};

use crate::{cargo::test_slots, command::Cmd};

/// The slots that a scenario takes. On a machine with two CPUs, one that computes leaves room for three that mostly wait.
fn slots(scenario: &Listed, all: usize) -> usize {
    match scenario.room {
        Room::Little => 1,
        Room::OneCpu => all.min(5),
        Room::Machine => all,
    }
}

/// All scenarios that the program can play.
pub fn list(program: &Path) -> Result<Vec<Listed>> {
    let listed = Cmd::new(program).arg("--list").output()?;
    let line =
        |line| Listed::parse(line).with_context(|| format!("read this line of the list: {line:?}"));
    listed.lines().map(line).collect()
}

/// Plays these scenarios once, and reports each as soon as it has been played. `keep`: directory for their recordings.
pub fn play_each(
    program: &Path,
    agent: &Path,
    scenarios: &[Listed],
    keep: Option<&Path>,
    mut report: impl FnMut(&str, Result<Row>),
) {
    let all = test_slots();
    let sized: Vec<(&Listed, usize)> = scenarios
        .iter()
        .map(|scenario| (scenario, slots(scenario, all)))
        .collect();
    each_of(
        sized,
        all,
        |scenario| play(program, agent, &scenario.name, keep),
        |scenario, row| report(&scenario.name, row),
    );
}

/// Does `work` for each item in a thread of its own, the largest items first. At no time do the running items take more
/// slots than there are; an item larger than that takes all of them. Passes on the results in the order in which they arrive.
fn each_of<T: Copy + Send, R: Send>(
    mut items: Vec<(T, usize)>,
    slots: usize,
    work: impl Fn(T) -> R + Sync,
    mut report: impl FnMut(T, R),
) {
    // A stable order: items of one size keep theirs.
    items.sort_by_key(|(_, size)| std::cmp::Reverse(*size));
    let (send, receive) = mpsc::channel();
    thread::scope(|scope| {
        let mut free = slots;
        loop {
            while let Some(at) = items
                .iter()
                .position(|(_, size)| (*size).min(slots) <= free)
            {
                let (item, size) = items.remove(at);
                let size = size.min(slots);
                free -= size;
                let (send, work) = (send.clone(), &work);
                scope.spawn(move || {
                    let result = catch_unwind(AssertUnwindSafe(|| work(item)));
                    // The receiver outlives the threads.
                    let _ = send.send((item, size, result));
                });
            }
            if free == slots {
                break;
            }
            let Ok((item, size, result)) = receive.recv() else {
                break;
            };
            free += size;
            match result {
                Ok(result) => report(item, result),
                Err(panic) => resume_unwind(panic),
            }
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
    use std::{
        sync::{
            Barrier,
            atomic::{AtomicUsize, Ordering},
        },
        time::Duration,
    };

    use super::*;

    #[test]
    fn every_item_is_reported_once_and_as_many_run_at_once_as_allowed() {
        // Each small one waits for two others: with fewer at once this would never end.
        let three = Barrier::new(3);
        let taken = AtomicUsize::new(0);
        let mut seen = Vec::new();
        let sizes = [1, 1, 1, 3, 1, 1, 1, 2, 1, 1, 1];
        let items: Vec<(usize, usize)> = sizes.into_iter().enumerate().collect();
        let work = |item: usize| {
            let size = sizes[item];
            if size == 1 {
                three.wait();
            }
            let now = taken.fetch_add(size, Ordering::SeqCst) + size;
            thread::sleep(Duration::from_millis(1));
            taken.fetch_sub(size, Ordering::SeqCst);
            assert!(now <= 5, "{now} slots at once");
            item * 2
        };
        each_of(items, 5, work, |item, twice| seen.push((item, twice)));
        seen.sort_unstable();
        let all: Vec<(usize, usize)> = (0..sizes.len()).map(|item| (item, item * 2)).collect();
        assert_eq!(seen, all);
    }

    #[test]
    fn the_largest_items_are_first_and_one_that_is_too_large_takes_all_slots() {
        let mut seen = Vec::new();
        each_of(
            vec![(1, 1), (2, 3), (3, 9)],
            3,
            |item| item,
            |item, _| seen.push(item),
        );
        assert_eq!(seen, [3, 2, 1]);
        let computing = Listed {
            name: "convoy".to_owned(),
            room: Room::OneCpu,
        };
        assert_eq!(slots(&computing, 3), 3);
        assert_eq!(slots(&computing, 8), 5);
    }
}
