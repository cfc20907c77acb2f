//! `helm uninstall`.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use tailback_page::Page;
use tailback_tests::wait;

use super::install::helm;
use crate::{
    cluster::output,
    stage::{AGENT, DEADLINE, Stage},
};

/// Where pages are, on the node.
const PAGES: &str = "/run/tailback";
/// Files that outlive the agent, beside pages.
const STATE: [&str; 7] = [
    "adapters.lock",
    "adapters.sock",
    "agent.lock",
    "agent.page",
    "agent.sock",
    "learned.json",
    "owners.json",
];
/// Keys in the description of a descriptor that name an object of eBPF.
const OBJECTS: [(&str, &str); 3] = [
    ("prog_id:", "prog"),
    ("map_id:", "map"),
    ("link_id:", "link"),
];

/// eBPF objects that a process holds: kind and id.
fn objects(pid: u32) -> Result<BTreeSet<(&'static str, u32)>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).context("read descriptors")? {
        // It may be closed by now.
        let text = fs::read_to_string(entry?.path()).unwrap_or_default();
        for line in text.lines() {
            for (key, kind) in OBJECTS {
                if let Some(id) = line.strip_prefix(key) {
                    found.insert((kind, id.trim().parse()?));
                }
            }
        }
    }
    Ok(found)
}

/// Whether the kernel still has an object.
fn exists(kind: &str, id: u32) -> Result<bool> {
    let program = tailback_tests::program::need(&["bpftool"])?;
    let mut command = std::process::Command::new(program);
    let output = command
        .args([kind, "show", "id", &id.to_string()])
        .output()?;
    Ok(output.status.success())
}

/// All files below a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| {
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_directory {
                files(&entry.path())
            } else {
                vec![entry.path()]
            }
        })
        .collect()
}

pub fn leaves_nothing(stage: &Stage) -> Result<()> {
    let agent = stage.wait_agent()?;
    let pid = agent.pid("agent")?;
    let objects = objects(pid)?;
    ensure!(
        objects.len() > 5,
        "too few eBPF objects to mean anything: {objects:?}"
    );
    for (kind, id) in &objects {
        ensure!(exists(kind, *id)?, "{kind} {id} is not found");
    }
    let pages = files(Path::new(PAGES));
    ensure!(
        pages.iter().any(|file| file.ends_with("page")),
        "no pages: {pages:?}"
    );

    let mut command = stage.kubectl().command(helm()?);
    output(command.args(["uninstall", AGENT, "--namespace", AGENT, "--wait"]))?;
    wait::until_ok("the end of the agent's pods", DEADLINE, || {
        let left = stage
            .kubectl()
            .run(&["--namespace", AGENT, "get", "pods", "--output=name"])?;
        ensure!(left.is_empty(), "{left}");
        Ok(())
    })?;
    let kinds = "daemonset,configmap,networkpolicy,serviceaccount,priorityclass";
    let of_release = format!("--selector=app.kubernetes.io/instance={AGENT}");
    let left = stage.kubectl().run(&[
        "--namespace",
        AGENT,
        "get",
        kinds,
        &of_release,
        "--output=name",
    ])?;
    ensure!(left.is_empty(), "left in the API: {left}");
    wait::until_ok("the end of all eBPF objects", DEADLINE, || {
        for (kind, id) in &objects {
            ensure!(!exists(kind, *id)?, "{kind} {id} still exists");
        }
        Ok(())
    })?;
    eprintln!("    {} eBPF objects are gone", objects.len());

    let page = stage.page("throttled")?;
    ensure!(
        page["alive"] == false && page["admit_ratio"] == 1.0,
        "{page}"
    );
    // For the next agent, until the node boots: pages that have expired, what it has learned, and files of sockets and locks.
    for file in files(Path::new(PAGES)) {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let is_expired = || !Page::open(&file).pressure().alive;
        ensure!(
            STATE.contains(&&*name) || name == "page" && is_expired(),
            "left on the node: {}",
            file.display()
        );
        if file.extension().is_some_and(|end| end == "sock") {
            ensure!(
                UnixStream::connect(&file).is_err(),
                "{} answers",
                file.display()
            );
        }
    }
    Ok(())
}
