//! What /proc says of one process. Read once per process and execve: none of it is on the path of a tick.
#![forbid(unsafe_code)]

use std::{
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use crate::text::harmless;

/// A process's environment or command line may be long; what we look for stands in its first part or is not found.
const MAX_READ: u64 = 256 * 1024;

/// Programs that run other programs: the service is the script, not the interpreter.
const INTERPRETERS: &[&str] = &[
    "python", "node", "ruby", "perl", "php", "java", "bash", "sh",
];

/// Facts of one process that hold until it executes something else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) exe: PathBuf,
    /// `service.name`.
    pub(super) service: String,
    pub(super) attributes: Vec<(String, String)>,
    pub(super) cgroup: Option<String>,
    pub(super) container: Option<String>,
    pub(super) cpus: u32,
}

impl Facts {
    /// Reads them; a process that is gone, or that we may not look into, yields what can be had.
    pub(super) fn read(pid: u32, comm: &str) -> Self {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let exe = fs::read_link(proc.join("exe")).unwrap_or_default();
        let args = read_list(&proc.join("cmdline")).unwrap_or_default();
        let environ = read_list(&proc.join("environ")).unwrap_or_default();
        let variable = |name: &str| {
            environ.iter().find_map(|entry| {
                entry
                    .strip_prefix(name)?
                    .strip_prefix('=')
                    .map(str::to_owned)
            })
        };
        let mut attributes = variable("OTEL_RESOURCE_ATTRIBUTES")
            .as_deref()
            .map(resource_attributes)
            .unwrap_or_default();
        let named = attributes.iter().position(|(key, _)| key == "service.name");
        let named = named.map(|index| attributes.remove(index).1);
        let service = variable("OTEL_SERVICE_NAME")
            .filter(|name| !name.is_empty())
            .or(named)
            .unwrap_or_else(|| program(&exe, &args, comm));
        let cgroup = fs::read_to_string(proc.join("cgroup"))
            .ok()
            .and_then(|text| cgroup_path(&text));
        Self {
            service: harmless(&service),
            attributes,
            container: cgroup.as_deref().and_then(container_id),
            cgroup,
            cpus: cpus_allowed(&proc).unwrap_or(1),
            exe,
        }
    }
}

fn read_list(path: &Path) -> io::Result<Vec<String>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?
        .take(MAX_READ)
        .read_to_end(&mut bytes)?;
    let parts = bytes
        .split(|byte| *byte == 0)
        .filter(|part| !part.is_empty());
    Ok(parts
        .map(|part| String::from_utf8_lossy(part).into_owned())
        .collect())
}

/// Base name of what runs: the script behind an interpreter, else the executable, else `comm`.
fn program(exe: &Path, args: &[String], comm: &str) -> String {
    let base = |path: &str| {
        Path::new(path)
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
    };
    let exe =
        base(&exe.to_string_lossy().replace(" (deleted)", "")).unwrap_or_else(|| comm.to_owned());
    let interprets = INTERPRETERS.iter().any(|name| {
        exe.strip_prefix(name).is_some_and(|rest| {
            rest.chars()
                .all(|letter| letter.is_ascii_digit() || letter == '.')
        })
    });
    let script = args.iter().skip(1).find(|arg| !arg.starts_with('-'));
    if let Some(script) = script
        .filter(|_| interprets)
        .and_then(|script| base(script))
    {
        return script;
    }
    // One file under several names (redis-server is a link to redis-check-rdb): what it was called as is what it is.
    let called = args.first().and_then(|arg| base(arg));
    let is_called_so = called.is_some_and(|called| called.starts_with(comm));
    if is_called_so && !comm.is_empty() && !exe.starts_with(comm) {
        return comm.to_owned();
    }
    exe
}

/// `key=value,key=value` with percent-encoding, as the OpenTelemetry specification has it.
fn resource_attributes(text: &str) -> Vec<(String, String)> {
    text.split(',')
        .filter_map(|pair| {
            let (key, value) = pair.split_once('=')?;
            Some((key.trim().to_owned(), percent_decode(value.trim())))
        })
        .filter(|(key, _)| !key.is_empty())
        .collect()
}

fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = text.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        if let Some(byte) = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            out.push(byte);
            at += 3;
        } else {
            out.push(bytes[at]);
            at += 1;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The path in the unified hierarchy, else (cgroup v1) the longest one in any.
pub(crate) fn cgroup_path(text: &str) -> Option<String> {
    let paths = text.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let unified = fields.next()? == "0";
        Some((unified, fields.nth(1)?))
    });
    let (_, path) = paths
        .filter(|(_, path)| *path != "/")
        .max_by_key(|(unified, path)| (container_id(path).is_some(), *unified, path.len()))?;
    Some(path.to_owned())
}

/// 64 hexadecimal digits somewhere in the path: how container runtimes name their cgroups.
fn container_id(path: &str) -> Option<String> {
    path.rsplit('/').find_map(|part| {
        part.split(|letter: char| !letter.is_ascii_hexdigit())
            .find(|run| run.len() == 64)
            .map(str::to_owned)
    })
}

fn cpus_allowed(proc: &Path) -> Option<u32> {
    let status = fs::read_to_string(proc.join("status")).ok()?;
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let mut cpus = 0;
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cpus += last.parse::<u32>().ok()?.checked_sub(first.parse().ok()?)? + 1;
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_is_the_service_not_its_interpreter() {
        let args = ["python3", "-u", "/srv/app/checkout.py"].map(str::to_owned);
        assert_eq!(
            program(Path::new("/usr/bin/python3.11"), &args, "python3"),
            "checkout.py"
        );
        assert_eq!(program(Path::new("/usr/sbin/nginx"), &[], "nginx"), "nginx");
        assert_eq!(program(Path::new(""), &[], "kthing"), "kthing");
        let link = Path::new("/usr/bin/redis-check-rdb");
        let called = ["redis-server *:6379".to_owned()];
        assert_eq!(program(link, &called, "redis-server"), "redis-server");
        // A name that a thread gave itself is not what the program was called as.
        let node = ["/usr/bin/node".to_owned()];
        assert_eq!(
            program(Path::new("/usr/bin/node"), &node, "MainThread"),
            "node"
        );
    }

    #[test]
    fn containers_are_told_by_their_cgroup() {
        let id = "0123456789abcdef".repeat(4);
        assert_eq!(
            container_id(&format!(
                "/kubepods/burstable/pod12/cri-containerd-{id}.scope"
            )),
            Some(id.clone())
        );
        assert_eq!(container_id("/system.slice/nginx.service"), None);
        let text = format!("12:memory:/docker/{id}\n0::/\n");
        assert_eq!(cgroup_path(&text), Some(format!("/docker/{id}")));
    }

    #[test]
    fn resource_attributes_are_decoded() {
        assert_eq!(
            resource_attributes("deployment.environment=a%2Cb, team=x,broken"),
            [
                ("deployment.environment".to_owned(), "a,b".to_owned()),
                ("team".to_owned(), "x".to_owned())
            ]
        );
    }

    #[test]
    fn our_own_process_has_facts() {
        let facts = Facts::read(std::process::id(), "test");
        assert!(facts.cpus >= 1);
        assert!(facts.exe.is_absolute());
    }
}
