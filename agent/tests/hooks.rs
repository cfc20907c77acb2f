//! The hooks of `--tier` leave nothing in the kernel.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{
    collections::BTreeSet,
    fs,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use aya::{
    maps::loaded_maps,
    programs::{loaded_links, loaded_programs},
};
use tailback_tests::{
    agent::{HOOKS, hooks_in_use},
    needs,
    temp::TempDir,
};

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(20);

/// Ids of programs, maps and links.
#[derive(Debug, Default, PartialEq, Eq)]
struct Ids([BTreeSet<u32>; 3]);

/// What this process holds in its descriptors.
fn held(pid: u32) -> Ids {
    let mut held = Ids::default();
    let infos = fs::read_dir(format!("/proc/{pid}/fdinfo"));
    for info in infos.into_iter().flatten().flatten() {
        let text = fs::read_to_string(info.path()).unwrap_or_default();
        for (ids, key) in held.0.iter_mut().zip(["prog_id:", "map_id:", "link_id:"]) {
            let lines = text.lines().filter_map(|line| line.strip_prefix(key));
            ids.extend(lines.filter_map(|id| id.trim().parse::<u32>().ok()));
        }
    }
    held
}

/// Those of them that the kernel still has.
fn left(of: &Ids) -> Ids {
    let present = [
        loaded_programs().flatten().map(|it| it.id()).collect(),
        loaded_maps().flatten().map(|it| it.id()).collect(),
        loaded_links().flatten().map(|it| it.id()).collect(),
    ];
    let mut left = Ids::default();
    for ((left, of), present) in left.0.iter_mut().zip(&of.0).zip(&present) {
        *left = of.intersection(present).copied().collect();
    }
    left
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < end, "timed out waiting for {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// An agent that is killed at the end.
struct Agent(Child);

impl Agent {
    /// Watches everything in the tier `watch`. Its pages are in this directory.
    fn start(directory: &TempDir) -> Self {
        // Other tests may cause more context switches than the default budget allows.
        let config = directory
            .write("tailback.toml", "hook_budget = 0.5\n")
            .unwrap();
        let agent = Command::new(env!("CARGO_BIN_EXE_tailback"))
            .args(["run", "--all", "--quiet", "--tier", "watch", "--config"])
            .arg(config)
            .env("RUNTIME_DIRECTORY", directory.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(agent)
    }

    /// What it holds once its hooks are attached, after it has dropped its privileges.
    fn held(&self) -> Ids {
        let pid = self.0.id();
        let mut ids = Ids::default();
        until("the hooks to be attached", || {
            let is_attached = || hooks_in_use(pid) == HOOKS;
            let before = is_attached();
            ids = held(pid);
            before && is_attached()
        });
        assert!(ids.0.iter().all(|ids| !ids.is_empty()), "{ids:?}");
        assert_eq!(left(&ids), ids, "the kernel lists what is loaded");
        ids
    }

    /// SIGKILL.
    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_killed_agent_leaves_no_program_map_or_link() {
    if !needs::met("a_killed_agent_leaves_no_program_map_or_link", &[]) {
        return;
    }
    let directory = TempDir::new("hooks").unwrap();
    let agent = Agent::start(&directory);
    let ids = agent.held();
    agent.kill();
    // The kernel frees programs and maps after a grace period.
    until("programs, maps and links to be freed", || {
        left(&ids) == Ids::default()
    });
}

#[test]
fn two_agents_do_not_share_their_hooks() {
    if !needs::met("two_agents_do_not_share_their_hooks", &[]) {
        return;
    }
    let directories = ["hooks-1", "hooks-2"].map(|name| TempDir::new(name).unwrap());
    let [first, second] = directories.each_ref().map(Agent::start);
    let (of_first, of_second) = (first.held(), second.held());
    for (first, second) in of_first.0.iter().zip(&of_second.0) {
        assert!(first.is_disjoint(second), "{of_first:?} {of_second:?}");
    }
    first.kill();
    until("programs, maps and links to be freed", || {
        left(&of_first) == Ids::default()
    });
    assert_eq!(hooks_in_use(second.0.id()), HOOKS);
    assert_eq!(left(&of_second), of_second);
}
