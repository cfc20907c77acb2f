//! Checks of the agent's environment: namespaces, /proc, BTF, control groups. Each remedy is given for Kubernetes and for podman.

use std::{collections::BTreeSet, fs, os::unix::fs::FileTypeExt as _};

use super::{Check, apps};
use crate::{
    cli::capabilities::to_add,
    collect::{Budget, Collector},
    config::Config,
    kernel::scanner::{BTF_PATH, Scanner},
    sample::{Hidden, HiddenFact},
    target::{
        Selector, Spec,
        namespaces::{self, is_initial},
    },
    text::harmless,
};

/// Files of /proc that describe the machine, and that a container runtime may mask or replace.
const MACHINE_FILES: [&str; 7] = [
    "stat",
    "meminfo",
    "vmstat",
    "locks",
    "pressure/cpu",
    "pressure/memory",
    "pressure/io",
];
/// Maximum number of control groups that a line names.
const MAX_NAMED: usize = 3;

/// The checks that need no eBPF program.
pub(super) fn environment() -> Vec<Check> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")
        .map(|release| release.trim().to_owned())
        .map_err(|error| format!("cannot read /proc: {error}"));
    let btf = fs::metadata(BTF_PATH)
        .map(|metadata| format!("{BTF_PATH}, {:.1} MB", metadata.len() as f64 / 1e6))
        .map_err(|error| format!("{BTF_PATH}: {error}"));
    vec![
        Check {
            name: "kernel".into(),
            state: kernel,
            cost: "-",
            remedy: "mount /proc".into(),
            required: true,
        },
        Check {
            name: "BTF".into(),
            state: btf,
            cost: "nothing can be watched: the offsets of kernel fields are unknown",
            remedy: "a kernel built with CONFIG_DEBUG_INFO_BTF=y (Debian 11, Ubuntu 20.10, RHEL 8.2 and later have it); in a container \
                     without /sys, mount it: `volumes: [{name: btf, hostPath: {path: /sys/kernel/btf}}]` with `volumeMounts: [{name: btf, \
                     mountPath: /sys/kernel/btf, readOnly: true}]`; podman: `--volume /sys/kernel/btf:/sys/kernel/btf:ro`"
                .into(),
            required: true,
        },
        processes(),
        machine_files(),
    ]
}

/// Whether the processes of the machine are in sight.
fn processes() -> Check {
    let others = others_in_proc();
    let state = match others {
        _ if is_initial(namespaces::PID) == Ok(true) => Ok("all of this machine".to_owned()),
        0 => Err("the agent sees no process but its own".to_owned()),
        others => Err(format!(
            "the agent sees the {others} processes of its pid namespace only"
        )),
    };
    Check {
        name: "processes".into(),
        state,
        cost: "processes elsewhere on this machine are not followed: a wait for one ends at its address, with low confidence if that is a loopback address",
        remedy: "beside one service `shareProcessNamespace: true`, for a node `hostPID: true` in the pod's spec; podman: \
                 `--pid=container:NAME` or `--pid=host`"
            .into(),
        required: others == 0,
    }
}

fn others_in_proc() -> usize {
    let own = std::process::id().to_string();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let is_other = |name: &str| name != own && name.bytes().all(|byte| byte.is_ascii_digit());
    let pids = entries.filter(|entry| entry.file_name().to_str().is_some_and(is_other));
    pids.count()
}

/// Whether the files of /proc that describe the machine are the kernel's own, not masked or replaced.
fn machine_files() -> Check {
    let mountinfo = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let mut problems = replaced(&String::from_utf8_lossy(&mountinfo));
    // Pressure files are absent on a kernel without PSI.
    for file in ["stat", "meminfo", "vmstat"] {
        let path = format!("/proc/{file}");
        let is_readable = fs::read(&path).is_ok_and(|bytes| !bytes.is_empty());
        let is_device = fs::metadata(&path).is_ok_and(|file| file.file_type().is_char_device());
        if !is_readable || is_device {
            problems.insert(format!("{path} is hidden"));
        }
    }
    Check {
        name: "files of /proc".into(),
        state: if problems.is_empty() {
            Ok("those of the kernel".to_owned())
        } else {
            Err(Vec::from_iter(problems).join(", "))
        },
        cost: "CPU, memory and stalls of the machine, and the holders of file locks, are unknown or those of the container",
        remedy: "mount /proc without subset=pid, and nothing over its files: `securityContext: {procMount: Unmasked}`; podman: \
                 `--security-opt unmask=ALL`"
            .into(),
        required: true,
    }
}

/// Files of /proc over which something else is mounted, and what.
fn replaced(mountinfo: &str) -> BTreeSet<String> {
    let covers = |point: &str, file: &str| {
        let below = file.strip_prefix(point);
        below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let mounts = mountinfo.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let point = before.split(' ').nth(4)?.strip_prefix("/proc/")?;
        Some((point, after.split(' ').next()?))
    });
    // A bind mount of the kernel's own files, to make them read-only, hides nothing.
    let foreign = mounts.filter(|(_, kind)| *kind != "proc");
    let files = foreign.flat_map(|(point, kind)| {
        let files = MACHINE_FILES.iter().filter(move |file| covers(point, file));
        files.map(move |file| format!("/proc/{file} is covered by {kind}"))
    });
    files.collect()
}

/// The checks that need the loaded programs.
pub(super) fn visible(scanner: Scanner, config: Option<&anyhow::Result<Config>>) -> Vec<Check> {
    let all = Selector::All {
        every_process: true,
    };
    let mut collector = Collector::new(scanner, vec![Spec::from(all)], Budget::default());
    let seen = collector.visibility();
    let (hidden, services) = match &seen {
        Ok(seen) => (Ok(seen.hidden.as_slice()), seen.services),
        Err(error) => (Err(format!("{error:#}")), 0),
    };
    let limits = |facts: &[(HiddenFact, &str)]| {
        hidden
            .clone()
            .and_then(|hidden| hidden_limits(hidden, facts, services))
    };
    let in_proc = match &seen {
        Ok(seen) if seen.not_in_proc == 0 => Ok(format!("all {}", seen.processes)),
        Ok(seen) => Err(format!(
            "/proc does not show {} of {} processes{}",
            seen.not_in_proc,
            seen.processes,
            hidepid()
        )),
        Err(error) => Err(format!("{error:#}")),
    };
    let mut checks = vec![
        Check {
            name: "processes in /proc".into(),
            state: in_proc,
            cost: "services whose processes are hidden have no name, no control group and no known limits",
            remedy: format!(
                "mount /proc without hidepid, or {}",
                to_add(&["SYS_PTRACE"])
            )
            .into(),
            required: true,
        },
        Check {
            name: "limits of services".into(),
            state: limits(&[
                (HiddenFact::CpuQuota, "CPU quota"),
                (HiddenFact::MemoryLimit, "memory limit"),
                (HiddenFact::IoLimits, "I/O limits"),
            ]),
            cost: "a throttled service looks busy or starved, one at its memory or I/O limit looks like one with a slow disk: such verdicts \
                   have low confidence",
            remedy: CGROUP_MOUNT.into(),
            required: true,
        },
        Check {
            name: "I/O limits around services".into(),
            state: limits(&[(HiddenFact::OuterIoLimits, "I/O limits of the parents")]),
            cost: "a service held up by the I/O limit of its pod or slice looks like one with a slow disk: the evidence names the hidden limits",
            remedy: CGROUP_MOUNT.into(),
            required: false,
        },
    ];
    if seen.is_ok() {
        let default = Config::default();
        // A configuration with an error has a line of its own.
        let config = config
            .and_then(|config| config.as_ref().ok())
            .unwrap_or(&default);
        checks.extend(apps::checks(&mut collector, config.apps().ok().flatten()));
    }
    checks
}

const CGROUP_MOUNT: &str = "mount the control groups of the host: `volumes: [{name: cgroup, hostPath: {path: /sys/fs/cgroup}}]` with \
                            `volumeMounts: [{name: cgroup, mountPath: /sys/fs/cgroup, readOnly: true}]`; podman: `--volume \
                            /sys/fs/cgroup:/sys/fs/cgroup:ro`";

/// Which of these facts are hidden, and of which services.
fn hidden_limits(
    hidden: &[Hidden],
    facts: &[(HiddenFact, &str)],
    services: usize,
) -> Result<String, String> {
    let words = facts.iter().filter_map(|(fact, words)| {
        let groups = hidden.iter().filter(|hidden| hidden.fact == *fact);
        let groups: Vec<String> = groups.map(|hidden| harmless(&hidden.cgroup)).collect();
        let named = groups.iter().take(MAX_NAMED).cloned().collect::<Vec<_>>();
        let more = groups.len().saturating_sub(MAX_NAMED);
        let more = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        (!groups.is_empty()).then(|| format!("{words} of {}{more}", named.join(", ")))
    });
    let words: Vec<String> = words.collect();
    if words.is_empty() {
        Ok(format!("visible for all {services} services in sight"))
    } else {
        Err(format!("hidden: {}", words.join("; ")))
    }
}

/// The mount option that hides processes, if /proc has it.
fn hidepid() -> String {
    let mountinfo = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let mountinfo = String::from_utf8_lossy(&mountinfo);
    let mut lines = mountinfo.lines();
    let option = lines.find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        (before.split(' ').nth(4)? == "/proc").then_some(())?;
        after
            .split([' ', ','])
            .find(|option| option.starts_with("hidepid="))
            .map(str::to_owned)
    });
    option.map_or_else(String::new, |option| {
        format!(": it is mounted with {option}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_proc_that_are_covered_are_named() {
        let mountinfo = "\
            22 1 0:21 / /proc rw - proc proc rw\n\
            23 22 0:21 /sys /proc/sys ro - proc proc rw\n\
            24 22 0:50 / /proc/pressure ro - tmpfs tmpfs ro\n\
            25 22 0:51 / /proc/meminfo ro - fuse.lxcfs lxcfs ro\n\
            26 22 0:52 / /proc/st ro - tmpfs tmpfs ro\n";
        let found: Vec<String> = replaced(mountinfo).into_iter().collect();
        let expected = [
            "/proc/meminfo is covered by fuse.lxcfs",
            "/proc/pressure/cpu is covered by tmpfs",
            "/proc/pressure/io is covered by tmpfs",
            "/proc/pressure/memory is covered by tmpfs",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn hidden_limits_are_listed_up_to_a_number() {
        let hidden: Vec<Hidden> = (0..5)
            .map(|number| Hidden {
                cgroup: format!("/{number}"),
                fact: HiddenFact::CpuQuota,
            })
            .collect();
        let facts = [(HiddenFact::CpuQuota, "CPU quota")];
        assert_eq!(
            hidden_limits(&hidden, &facts, 5).unwrap_err(),
            "hidden: CPU quota of /0, /1, /2 and 2 more"
        );
        let facts = [(HiddenFact::MemoryLimit, "memory limit")];
        assert!(hidden_limits(&hidden, &facts, 5).is_ok());
    }
}
