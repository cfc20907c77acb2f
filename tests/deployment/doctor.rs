//! Whatever a deployment lacks, a line of `tailback doctor` names it, with the remedy for Kubernetes and for podman.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tailback_tests::{
    agent, container::Container, needs, process::Process, program, skip::skip, temp::TempDir,
};

use crate::{CAPABILITIES, allowed, contained, json_lines, without};

/// Adapters that need a capability of their own.
const ADAPTERS: &str = r#"
[signal.http]
listen = "127.0.0.1:80"
[[signal.envoy]]
target = "shop"
cluster = "shop"
symlink_root = "/run/envoy/shop"
"#;

fn doctor(options: &[&str], capabilities: &[&str]) -> Result<Vec<Value>> {
    let (_container, process) = contained(options, capabilities, &["doctor", "--json"])?;
    Ok(json_lines(&process)?.1)
}

/// Checks the state of one line, what it says is wrong, and what it says to do.
fn check(checks: &[Value], name: &str, state: &str, why: &str, remedies: &[&str]) -> Result<()> {
    let found = checks.iter().find(|check| check["name"] == name);
    let found = found.with_context(|| format!("no line {name:?}: {checks:#?}"))?;
    ensure!(found["state"] == state, "not {state}: {found}");
    let text = |key: &str| found[key].as_str().unwrap_or_default();
    ensure!(text("why").contains(why), "{why:?} is missing: {found}");
    for remedy in remedies {
        ensure!(
            text("remedy").contains(remedy),
            "{remedy:?} is missing: {found}"
        );
    }
    Ok(())
}

#[test]
fn each_missing_capability_is_named_with_its_line() -> Result<()> {
    if !allowed("each_missing_capability_is_named_with_its_line") {
        return Ok(());
    }
    for (lost, line, state) in [
        ("BPF", "capabilities", "failed"),
        ("PERFMON", "capabilities", "failed"),
        ("SYS_PTRACE", "capabilities", "failed"),
        ("DAC_READ_SEARCH", "files of other users", "off"),
        ("SETUID", "user of the adapter process", "off"),
        ("KILL", "killing a hung adapter process", "off"),
        ("DAC_OVERRIDE", "Envoy's runtime layer", "off"),
        ("NET_BIND_SERVICE", "ports of adapters", "off"),
    ] {
        let directory = TempDir::new("config")?;
        let config = directory.write("tailback.toml", ADAPTERS)?;
        let volume = format!("--volume={}:/tailback.toml:ro", config.display());
        let arguments = ["doctor", "--json", "--config", "/tailback.toml"];
        let kept = without(lost);
        // Where every port is unprivileged, no capability is needed for one.
        let ports = "--sysctl=net.ipv4.ip_unprivileged_port_start=1024";
        let options = ["--pid=host", "--network=none", ports, &volume];
        let (_container, process) = contained(&options, &kept, &arguments)?;
        let checks = json_lines(&process)?.1;
        let remedies = [
            format!("securityContext: {{capabilities: {{add: [{lost}]}}}}"),
            format!("--cap-add {lost}"),
            format!("with CAP_{lost}"),
        ];
        let remedies: Vec<&str> = remedies.iter().map(String::as_str).collect();
        check(
            &checks,
            line,
            state,
            &format!("missing CAP_{lost}"),
            &remedies,
        )?;
        // No line complains about another capability.
        let complaints = checks.iter().filter(|check| {
            let why = check["why"].as_str().unwrap_or_default();
            why.starts_with("missing CAP_")
        });
        let lost_count = without("").len() - kept.len();
        ensure!(
            complaints.count() == lost_count,
            "without {lost}: {checks:#?}"
        );
    }
    Ok(())
}

#[test]
fn a_pid_namespace_without_the_services_is_named() -> Result<()> {
    if !allowed("a_pid_namespace_without_the_services_is_named") {
        return Ok(());
    }
    let remedies = [
        "shareProcessNamespace: true",
        "hostPID: true",
        "--pid=container:NAME",
        "--pid=host",
    ];
    let alone = doctor(&[], &CAPABILITIES)?;
    check(
        &alone,
        "processes",
        "failed",
        "no process but its own",
        &remedies,
    )?;
    let shared = Container::new()?;
    let before = shared.before(&["--network=host"])?;
    let mut sleep = Command::new(&before[0]);
    sleep.args(&before[1..]).args(["/usr/bin/sh", "-c"]);
    sleep.arg("echo ready; exec sleep 100");
    let process = Process::start("podman", &mut sleep)?;
    process.wait_line("ready", crate::DEADLINE)?;
    let beside = format!("--pid=container:{}", shared.name());
    let beside = doctor(&[&beside], &CAPABILITIES)?;
    check(
        &beside,
        "processes",
        "off",
        "of its pid namespace only",
        &remedies,
    )?;
    let on_node = doctor(&["--pid=host", "--cgroupns=private"], &CAPABILITIES)?;
    check(&on_node, "processes", "ok", "", &[])?;
    check(&on_node, "limits of services", "ok", "", &[])
}

#[test]
fn missing_types_and_covered_files_are_named() -> Result<()> {
    if !allowed("missing_types_and_covered_files_are_named") {
        return Ok(());
    }
    let options = ["--mount=type=tmpfs,destination=/sys/kernel/btf,notmpcopyup"];
    let checks = doctor(&options, &CAPABILITIES)?;
    let remedies = [
        "hostPath: {path: /sys/kernel/btf}",
        "--volume /sys/kernel/btf:/sys/kernel/btf:ro",
    ];
    check(
        &checks,
        "BTF",
        "failed",
        "/sys/kernel/btf/vmlinux",
        &remedies,
    )?;
    let directory = TempDir::new("meminfo")?;
    let file = directory.write("meminfo", "MemTotal: 1 kB\n")?;
    let volume = format!("--volume={}:/proc/meminfo:ro", file.display());
    let checks = doctor(&[&volume], &CAPABILITIES)?;
    let remedies = ["procMount: Unmasked", "--security-opt unmask=ALL"];
    check(
        &checks,
        "files of /proc",
        "failed",
        "/proc/meminfo is covered by",
        &remedies,
    )
}

#[test]
fn hidden_processes_and_a_user_namespace_are_named() -> Result<()> {
    const TEST: &str = "hidden_processes_and_a_user_namespace_are_named";
    if !needs::met(TEST, &["unshare", "setpriv"]) {
        return Ok(());
    }
    let agent = agent::binary()?;
    let script = r#"mount -t proc -o hidepid=2 proc /proc || exit 99
        exec setpriv --regid=65534 --clear-groups --bounding-set=-sys_ptrace,-dac_read_search,-dac_override "$0" doctor --json"#;
    let mut command = Command::new(program::need(&["unshare"])?);
    command.args(["--mount", "sh", "-c", script]).arg(&agent);
    let process = Process::start("tailback", &mut command)?;
    let (end, checks) = json_lines(&process)?;
    if end == tailback_tests::process::End::Code(99) {
        skip(TEST, "cannot mount here");
        return Ok(());
    }
    let why = "mounted with hidepid=";
    check(
        &checks,
        "processes in /proc",
        "failed",
        why,
        &["without hidepid", "SYS_PTRACE"],
    )?;
    let mut command = Command::new(program::need(&["unshare"])?);
    command.args(["--user", "--map-root-user"]).arg(&agent);
    let process = Process::start("tailback", command.args(["doctor", "--json"]))?;
    let (_, checks) = json_lines(&process)?;
    let remedies = ["hostUsers: true", "--userns"];
    check(
        &checks,
        "user namespace",
        "failed",
        "not in the host's user namespace",
        &remedies,
    )?;
    let why = "do not count outside the host's user namespace";
    check(&checks, "capabilities", "failed", why, &[])
}
