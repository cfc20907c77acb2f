//! `cargo xtask test --cluster`: Tailback in a real Kubernetes cluster of one node, installed as the documentation says.
//!
//! The components (etcd, API server, controller manager, scheduler, kubelet, containerd) run in a network namespace and a mount
//! namespace of their own, so that nothing of them is left when their processes have ended. The pid namespace and the control groups are
//! the machine's, as on a real node. The checks run in order on one cluster. Each prints a line of JSON.
#![forbid(unsafe_code)]

mod checks;
mod cluster;
mod config;
mod kubectl;
mod remains;
mod stage;

use std::{
    env,
    os::unix::process::CommandExt as _,
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use tailback_tests::{checked::Checked, cleanup, exit_code, program};

use checks::{CHECKS, Need};
use stage::Stage;

/// First argument of the program once it is in its own namespaces.
const INSIDE: &str = "--inside";

fn main() -> ExitCode {
    let mut words = env::args().skip(1).peekable();
    let is_inside = words.next_if_eq(INSIDE).is_some();
    let filter = words.next();
    let done = if is_inside {
        run(filter.as_deref())
    } else {
        enter_namespaces(filter.as_deref()).map(|()| false)
    };
    exit_code::of(done)
}

/// Runs this program again in a network namespace and a mount namespace of its own. Returns only if that fails.
fn enter_namespaces(filter: Option<&str>) -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "only root can start a cluster"
    );
    let mut command = Command::new(program::need(&["unshare"])?);
    command
        .args(["--net", "--mount", "--propagation=private", "--"])
        .arg(env::current_exe()?)
        .arg(INSIDE)
        .args(filter);
    Err(command.exec()).context("enter namespaces")
}

/// Runs the checks whose names contain the filter, and those that they need. Returns whether all passed.
fn run(filter: Option<&str>) -> Result<bool> {
    cleanup::adopt_orphans();
    remains::check_none()?;
    let wanted = |name: &str| filter.is_none_or(|filter| name.contains(filter));
    ensure!(
        CHECKS.iter().any(|check| wanted(check.name)),
        "no check has a name that contains {:?}",
        filter.unwrap_or_default()
    );
    let mut results = Results::default();
    let stage = results.run("the_cluster_starts", Stage::start);
    if let Some(stage) = stage {
        for check in CHECKS {
            let is_needed = check.need == Need::Always;
            if !(is_needed || wanted(check.name)) {
                continue;
            }
            let done = results.run(check.name, || (check.run)(&stage));
            if done.is_none() {
                stage.save_logs(check.name);
                if is_needed {
                    break;
                }
            }
        }
        results.run("the_cluster_ends_and_leaves_nothing", || stage.end());
    }
    // Of a cluster that did not start.
    remains::remove();
    Ok(results.failed == 0)
}

#[derive(Default)]
struct Results {
    failed: usize,
}

impl Results {
    fn run<T>(&mut self, name: &str, check: impl FnOnce() -> Result<T>) -> Option<T> {
        eprintln!("{name} …");
        let start = Instant::now();
        let done = check();
        let checked = Checked {
            name: name.to_owned(),
            took_s: start.elapsed().as_secs_f64(),
            failure: done.as_ref().err().map(|error| format!("{error:#}")),
        };
        println!("{}", checked.to_json());
        self.failed += usize::from(done.is_err());
        done.ok()
    }
}
