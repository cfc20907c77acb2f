//! Missing root, missing capabilities, and kernels with missing, invalid or foreign BTF.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use tailback_tests::{agent, program, skip::skip, temp::TempDir};

use crate::{Output, allowed, run_command, with_own_mounts};

/// Runs the agent with reduced privileges. `None` if setpriv(1) is not installed.
fn with_privileges(test: &str, change: &[&str], args: &[&str]) -> Result<Option<Output>> {
    let Some(setpriv) = program::find(&["setpriv"]) else {
        skip(test, "setpriv is not installed");
        return Ok(None);
    };
    // A copy that every user may execute.
    let directory = TempDir::new("unprivileged")?;
    let binary = directory.path().join("tailback");
    program::copy(&agent::binary()?, &binary)?;
    for path in [directory.path(), &binary] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    }
    let mut command = Command::new(setpriv);
    run_command(command.args(change).arg(&binary).args(args)).map(Some)
}

/// User nobody without capabilities.
const NOBODY: &[&str] = &[
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--bounding-set=-all",
];

#[test]
fn without_root_the_error_names_the_needed_capabilities() -> Result<()> {
    let test = "without_root_the_error_names_the_needed_capabilities";
    if !allowed(test) {
        return Ok(());
    }
    let hints = ["Run as root", "missing CAP_BPF, CAP_PERFMON", "setcap"];
    for args in [&["sample", "--all"][..], &["run", "--all"]] {
        let Some(output) = with_privileges(test, NOBODY, args)? else {
            return Ok(());
        };
        output.check(3, &hints)?;
        ensure!(output.out.is_empty(), "{:?}", output.out);
    }
    if let Some(output) = with_privileges(test, NOBODY, &["doctor"])? {
        output.check(3, &hints)?;
        let report = output.out.join("\n");
        ensure!(report.contains("FAIL capabilities"), "{report}");
        ensure!(report.contains("CAP_SYS_PTRACE"), "{report}");
    }
    Ok(())
}

#[test]
fn root_without_a_capability_gets_an_error_that_names_it() -> Result<()> {
    let test = "root_without_a_capability_gets_an_error_that_names_it";
    if !allowed(test) {
        return Ok(());
    }
    for lost in ["bpf", "perfmon"] {
        let change = format!("--bounding-set=-{lost},-sys_admin");
        let Some(output) = with_privileges(test, &[&change], &["sample", "--all"])? else {
            return Ok(());
        };
        let missing = format!("missing CAP_{}", lost.to_uppercase());
        let line = format!("add: [{}]", lost.to_uppercase());
        output.check(3, &[&missing, &line])?;
        if let Some(output) = with_privileges(test, &[&change], &["doctor"])? {
            ensure!(output.text().contains(&missing), "{}", output.text());
        }
    }
    Ok(())
}

#[test]
fn in_a_user_namespace_no_held_capability_is_called_missing() -> Result<()> {
    let test = "in_a_user_namespace_no_held_capability_is_called_missing";
    if !allowed(test) {
        return Ok(());
    }
    let Some(unshare) = program::find(&["unshare"]) else {
        skip(test, "unshare is not installed");
        return Ok(());
    };
    for args in [&["sample", "--all"][..], &["doctor"]] {
        let mut command = Command::new(&unshare);
        command.args(["--user", "--map-root-user"]);
        let output = run_command(command.arg(agent::binary()?).args(args))?;
        output.check(3, &["user namespace", "hostUsers: true"])?;
        ensure!(!output.text().contains("missing CAP_"), "{}", output.text());
    }
    Ok(())
}

/// Runs the agent after the shell command `mount` in a mount namespace.
fn run_after_mount(test: &str, mount: &str, args: &[&str]) -> Result<Option<Output>> {
    let script = format!(r#"{mount} || nothing_mounted; exec "$0" "$@""#);
    with_own_mounts(test, &script, args)
}

#[test]
fn without_btf_the_error_names_the_kernel_option() -> Result<()> {
    let test = "without_btf_the_error_names_the_kernel_option";
    if !allowed(test) {
        return Ok(());
    }
    let mount = "mount -t tmpfs none /sys/kernel/btf";
    let words = [
        "/sys/kernel/btf/vmlinux",
        "CONFIG_DEBUG_INFO_BTF",
        "No such file",
    ];
    for command in ["sample", "run", "record"] {
        let args: &[&str] = match command {
            "record" => &["record", "--all", "--out", "/dev/null"],
            command => &[command, "--all"],
        };
        let Some(output) = run_after_mount(test, mount, args)? else {
            return Ok(());
        };
        output.check(3, &words)?;
    }
    if let Some(output) = run_after_mount(test, mount, &["doctor"])? {
        output.check(3, &words)?;
        ensure!(output.text().contains("FAIL BTF"), "{}", output.text());
    }
    Ok(())
}

#[test]
fn invalid_btf_is_rejected_with_the_reason() -> Result<()> {
    let test = "invalid_btf_is_rejected_with_the_reason";
    if !allowed(test) {
        return Ok(());
    }
    let directory = TempDir::new("btf")?;
    let real = fs::read("/sys/kernel/btf/vmlinux").context("read the kernel's BTF")?;
    let torn = directory.path().join("torn");
    fs::write(&torn, &real[..real.len() / 2])?;
    let foreign = directory.write("foreign", "root:x:0:0:root:/root:/bin/sh\n")?;
    let empty = directory.write("empty", "")?;
    for (file, problem) in [
        (&torn, "BTF is cut short"),
        (&foreign, "not BTF"),
        (&empty, "BTF is cut short inside its header"),
    ] {
        let mount = format!("mount --bind {} /sys/kernel/btf/vmlinux", file.display());
        let Some(output) = run_after_mount(test, &mount, &["sample", "--all"])? else {
            return Ok(());
        };
        output.check(3, &["cannot use /sys/kernel/btf/vmlinux", problem])?;
    }
    Ok(())
}

/// The BTF of another kernel, reduced to the types that the agent reads.
fn golden(version: &str) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let file = format!("../agent/tests/golden/{version}.btf");
    tests.join(file)
}

#[test]
fn an_unsupported_kernel_is_rejected_with_the_reason() -> Result<()> {
    let test = "an_unsupported_kernel_is_rejected_with_the_reason";
    if !allowed(test) {
        return Ok(());
    }
    let directory = TempDir::new("btf")?;
    let mut old = fs::read(golden("5.10"))?;
    let name = b"\0start_boottime\0";
    let at = old.windows(name.len()).position(|text| text == name);
    old[at.context("find start_boottime")? + 1] = b'S';
    let file = directory.path().join("old");
    fs::write(&file, old)?;
    let mount = format!("mount --bind {} /sys/kernel/btf/vmlinux", file.display());
    if let Some(output) = run_after_mount(test, &mount, &["sample", "--all"])? {
        let words = [
            "this kernel cannot be watched",
            "struct task_struct has no field `start_boottime` or `real_start_time`",
        ];
        output.check(3, &words)?;
    }
    // All fields exist, but belong to another kernel.
    let other = golden("6.1");
    let mount = format!("mount --bind {} /sys/kernel/btf/vmlinux", other.display());
    if let Some(output) = run_after_mount(test, &mount, &["sample", "--all"])? {
        output.check(3, &["cannot load the eBPF program", "tailback doctor"])?;
    }
    Ok(())
}
