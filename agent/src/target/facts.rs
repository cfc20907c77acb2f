//! What /proc says about one process. Read once per process and exec, never in a sample.
#![forbid(unsafe_code)]

use std::{
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use super::{
    namespaces::{self, is_initial},
    place::{Place, container_id_in, place},
    process_file::{self, Unread},
};
use crate::text::{bounded, harmless};

/// Maximum number of bytes read of an environment or a command line. A variable beyond that is not found.
const MAX_READ: u64 = 256 * 1024;
/// Longest service name that is taken from a program or a command line, bytes: as long as the name of a page's directory.
const MAX_PROGRAM_NAME: usize = 64;

/// A program that runs other programs: the service is named after the script.
struct Interpreter {
    /// Base name of the executable; a version may follow.
    name: &'static str,
    /// Short options that take code instead of a script.
    code: &'static str,
    /// Options whose value is the next argument.
    with_value: &'static [&'static str],
}

const INTERPRETERS: &[Interpreter] = &[
    interpreter("python", "c", &["-W", "-X"]),
    interpreter("node", "ep", &["-r", "--require", "--import"]),
    interpreter("ruby", "e", &["-I", "-r"]),
    interpreter("perl", "eE", &["-I", "-M"]),
    interpreter("php", "r", &["-c", "-d", "-S", "-t"]),
    interpreter(
        "java",
        "",
        &["-cp", "-classpath", "--class-path", "-p", "--module-path"],
    ),
    interpreter("bash", "c", &["-o", "-O"]),
    interpreter("sh", "c", &["-o"]),
];
/// Long options that take code instead of a script, of any interpreter.
const CODE_OPTIONS: &[&str] = &["--eval", "--print", "--run"];

const fn interpreter(
    name: &'static str,
    code: &'static str,
    with_value: &'static [&'static str],
) -> Interpreter {
    Interpreter {
        name,
        code,
        with_value,
    }
}

/// The highest user id of a process that cannot be read: nobody trusts its name.
const UNKNOWN_USER: u32 = 65_534;

/// Where a process comes from. Cheap to read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) exe: PathBuf,
    pub(super) place: Place,
    pub(super) cgroup: Option<String>,
    pub(super) container: Option<String>,
    /// Of its real, effective and saved user ids, the highest: a program that runs with the rights of root for a user is the user's.
    pub(super) uid: u32,
    /// CPUs that it may run on.
    pub(super) cpus: u32,
    /// It has ended, and its parent has not waited for it (wait(2)).
    pub(super) is_zombie: bool,
}

impl Origin {
    /// Reads it. What cannot be read, because the process has ended or access is denied, is left empty.
    pub(super) fn read(pid: u32) -> Self {
        Self::try_read(pid).unwrap_or_else(|| Self {
            uid: UNKNOWN_USER,
            cpus: 1,
            ..Self::default()
        })
    }

    /// Like [`Origin::read`]; `None` if the process has ended.
    pub(super) fn try_read(pid: u32) -> Option<Self> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let membership = fs::read(proc.join("cgroup")).unwrap_or_default();
        let membership = String::from_utf8_lossy(&membership);
        let cgroup = cgroup_path(&membership).or_else(|| own_container(&membership));
        // Not necessarily UTF-8: it holds the name that the process gave itself.
        let status = fs::read(proc.join("status")).ok()?;
        let status = Status::parse(&String::from_utf8_lossy(&status));
        let exe = fs::read_link(proc.join("exe")).unwrap_or_default();
        Some(Self {
            exe: without_deleted(exe),
            place: place(&membership),
            container: cgroup.as_deref().and_then(container_id),
            cgroup,
            uid: status.uid.unwrap_or(UNKNOWN_USER),
            cpus: status.cpus.unwrap_or(1),
            is_zombie: status.is_zombie,
        })
    }
}

/// The path of an executable whose file has been replaced or removed, as it was.
fn without_deleted(exe: PathBuf) -> PathBuf {
    let path = exe.as_os_str().as_bytes().strip_suffix(b" (deleted)");
    let path = path.map(|path| PathBuf::from(OsStr::from_bytes(path)));
    path.unwrap_or(exe)
}

/// What `/proc/PID/status` says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Status {
    uid: Option<u32>,
    cpus: Option<u32>,
    is_zombie: bool,
}

impl Status {
    fn parse(text: &str) -> Self {
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
        // Of several threads, the first may have ended before the others.
        let is_last_thread = value("Threads:").is_none_or(|count| count.trim() == "1");
        let uids = value("Uid:").map(|uids| uids.split_whitespace().take(3));
        Self {
            uid: uids.and_then(|uids| uids.filter_map(|uid| uid.parse().ok()).max()),
            cpus: value("Cpus_allowed_list:").and_then(cpus_in),
            is_zombie: is_last_thread
                && value("State:").is_some_and(|it| it.trim().starts_with('Z')),
        }
    }
}

/// What a process says about itself until it calls exec.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// The name that it gave itself: by OTEL_SERVICE_NAME, or that of its program.
    pub(super) service: String,
    /// `service` is from OTEL_SERVICE_NAME.
    pub(super) is_declared: bool,
    /// Further resource attributes.
    pub(super) attributes: Vec<(String, String)>,
    /// The command line or the environment could not be read in time. What follows from them is missing.
    pub(super) is_incomplete: bool,
}

impl Facts {
    /// Reads the facts. What cannot be read, because the process has ended or access is denied, is left empty.
    pub(super) fn read(pid: u32, comm: &str, exe: &Path) -> Self {
        let mut is_incomplete = false;
        let mut read = |file| {
            let list = read_list(pid, file);
            is_incomplete |= list == Err(Unread::Late);
            list.unwrap_or_default()
        };
        let args = read("cmdline");
        let environ = read("environ");
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
        let service_name = attributes.iter().position(|(key, _)| key == "service.name");
        let service_name = service_name.map(|index| attributes.remove(index).1);
        let declared = variable("OTEL_SERVICE_NAME")
            .filter(|name| !name.is_empty())
            .or(service_name);
        Self {
            is_declared: declared.is_some(),
            service: declared.map_or_else(
                || bounded(&program(exe, &args, comm), MAX_PROGRAM_NAME),
                |name| harmless(&name),
            ),
            attributes,
            is_incomplete,
        }
    }
}

/// The NUL-terminated strings of a file of /proc/PID.
fn read_list(pid: u32, file: &str) -> Result<Vec<String>, Unread> {
    let bytes = process_file::try_read(pid, file, MAX_READ)?;
    let parts = bytes
        .split(|byte| *byte == 0)
        .filter(|part| !part.is_empty());
    Ok(parts
        .map(|part| String::from_utf8_lossy(part).into_owned())
        .collect())
}

/// The name of a program: its script's if an interpreter runs one, else its executable's, else `comm`.
fn program(exe: &Path, args: &[String], comm: &str) -> String {
    let exe = exe.to_string_lossy();
    if exe.starts_with("/memfd:") {
        // A file in memory, run by its descriptor: unless it has named itself, the process is called by the number of the descriptor or
        // by the file.
        let is_named = !is_number(comm) && !comm.starts_with("memfd");
        return if is_named { comm } else { "memfd" }.to_owned();
    }
    let exe = file_name(&exe).unwrap_or_else(|| comm.to_owned());
    if let Some(interpreter) = interpreter_of(&exe) {
        let script = interpreter.script(args);
        // Without the minor version: an upgrade does not rename the service.
        return script.unwrap_or_else(|| exe.split('.').next().unwrap_or(&exe).to_owned());
    }
    // One file may have several names: redis-server is a link to redis-check-rdb. So the name it was started by counts.
    let started_as = args.first().and_then(|arg| file_name(arg));
    let is_comm = started_as.is_some_and(|name| name.starts_with(comm));
    if is_comm && !comm.is_empty() && !exe.starts_with(comm) {
        return comm.to_owned();
    }
    exe
}

/// The interpreter that this is, whatever its version.
fn interpreter_of(exe: &str) -> Option<&'static Interpreter> {
    INTERPRETERS.iter().find(|interpreter| {
        let version = exe.strip_prefix(interpreter.name);
        version.is_some_and(|version| {
            let mut letters = version.chars();
            letters.all(|letter| letter.is_ascii_digit() || letter == '.')
        })
    })
}

impl Interpreter {
    /// The file name (or module, or main class) of the script that it runs. `None` if it runs code from its command line, or if the
    /// argument is not a plain name: code may contain secrets.
    fn script(&self, args: &[String]) -> Option<String> {
        let mut args = args.iter().skip(1);
        while let Some(arg) = args.next() {
            if arg == "-" {
                // The script is read from standard input.
                return None;
            }
            if !arg.starts_with('-') {
                // A descriptor has a number for a name.
                let name = file_name(arg).filter(|name| !is_number(name));
                return name.filter(|name| is_plain(name));
            }
            if let Some(module) = self.module(arg) {
                return Some(module.to_owned()).filter(|name| is_plain(name));
            }
            if self.with_value.contains(&arg.as_str()) {
                args.next();
            } else if self.takes_code(arg) {
                return None;
            }
        }
        None
    }

    /// The module in `-mMODULE`, which Python takes as one argument, too.
    fn module<'a>(&self, option: &'a str) -> Option<&'a str> {
        let module = option.strip_prefix("-m")?;
        (self.name == "python" && !module.is_empty()).then_some(module)
    }

    /// Whether code follows this option, or is part of it. Short options may be combined: `sh -ec`.
    fn takes_code(&self, option: &str) -> bool {
        if option.starts_with("--") {
            let name = option.split('=').next().unwrap_or_default();
            return CODE_OPTIONS.contains(&name);
        }
        // The rest of an argument is the value of an option that takes one. `-m` takes a module.
        let takes_value = |letter: char| {
            let mut options = self.with_value.iter();
            letter == 'm'
                || options
                    .any(|option| option.strip_prefix('-') == Some(letter.encode_utf8(&mut [0; 4])))
        };
        let letters = option.trim_start_matches('-').chars();
        letters
            // A digit is the value of the option before it: `perl -0777ne`.
            .take_while(|letter| letter.is_ascii_alphanumeric() && !takes_value(*letter))
            .any(|letter| self.code.contains(letter))
    }
}

fn file_name(path: &str) -> Option<String> {
    let name = Path::new(path).file_name()?;
    Some(name.to_string_lossy().into_owned())
}

fn is_number(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_plain(name: &str) -> bool {
    let is_plain = |letter: char| letter.is_alphanumeric() || "._-+@:".contains(letter);
    name.len() <= MAX_PROGRAM_NAME && name.chars().all(is_plain)
}

/// `key=value,key=value` with percent-encoding, as in the OpenTelemetry specification of OTEL_RESOURCE_ATTRIBUTES.
pub(super) fn resource_attributes(text: &str) -> Vec<(String, String)> {
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

/// The cgroup path to show, from /proc/PID/cgroup: one with a container id first, then the one in the unified hierarchy
/// (cgroup v2), then the longest.
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

/// The cgroup of a process that is in the agent's own container: the root of the agent's cgroup namespace. On the host that
/// is the root of the hierarchy, which has no limits.
fn own_container(text: &str) -> Option<String> {
    let is_known = text.lines().any(|line| line.ends_with(":/"));
    let is_container = is_known && matches!(is_initial(namespaces::CGROUP), Ok(false));
    is_container.then(|| "/".to_owned())
}

/// The id of the outermost container in a cgroup path: below it, a process may be allowed to create others of any name.
fn container_id(path: &str) -> Option<String> {
    path.split('/').find_map(container_id_in)
}

/// The number of CPUs in a list such as `0-3,8`.
fn cpus_in(list: &str) -> Option<u32> {
    let mut cpus = 0;
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cpus += last.parse::<u32>().ok()?.checked_sub(first.parse().ok()?)? + 1;
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use std::{
        process::{Command, Stdio},
        time::Duration,
    };

    use tailback_tests::{program, temp::TempDir, wait};

    use super::{program as name_of_program, *};

    #[test]
    fn a_service_is_named_after_its_script_else_its_executable() {
        let args = ["python3", "-u", "/srv/app/checkout.py"].map(str::to_owned);
        assert_eq!(
            name_of_program(Path::new("/usr/bin/python3.11"), &args, "python3"),
            "checkout.py"
        );
        assert_eq!(
            name_of_program(Path::new("/usr/sbin/nginx"), &[], "nginx"),
            "nginx"
        );
        assert_eq!(name_of_program(Path::new(""), &[], "kthing"), "kthing");
        let link = Path::new("/usr/bin/redis-check-rdb");
        let called = ["redis-server *:6379".to_owned()];
        assert_eq!(
            name_of_program(link, &called, "redis-server"),
            "redis-server"
        );
        // A name that a thread gave itself does not name the program.
        let node = ["/usr/bin/node".to_owned()];
        assert_eq!(
            name_of_program(Path::new("/usr/bin/node"), &node, "MainThread"),
            "node"
        );
    }

    fn name(exe: &str, args: &[&str]) -> String {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        name_of_program(Path::new(exe), &args, "comm")
    }

    #[test]
    fn code_on_a_command_line_does_not_name_a_service() {
        let python = |args: &[&str]| name("/usr/bin/python3.11", args);
        let code = "open('/run/secrets/token=hunter2')";
        assert_eq!(python(&["python3", "-c", code]), "python3");
        assert_eq!(python(&["python3", "-uc", "a/secret"]), "python3");
        assert_eq!(python(&["python3", "-", "secret"]), "python3");
        let long = "x".repeat(MAX_PROGRAM_NAME + 1);
        assert_eq!(python(&["python3", &long]), "python3");
        assert_eq!(python(&["python3", "a\nb"]), "python3");
        let node = |args: &[&str]| name("/usr/bin/node", args);
        assert_eq!(node(&["node", "--eval", "a/secret"]), "node");
        assert_eq!(node(&["node", "--print=1", "a/secret"]), "node");
        assert_eq!(name("/bin/sh", &["sh", "-ec", "/bin/secret"]), "sh");
        let perl = ["perl", "-0777ne", "/secret"];
        assert_eq!(name("/usr/bin/perl", &perl), "perl");
    }

    #[test]
    fn values_of_options_do_not_name_a_service() {
        let python = [
            "python3", "-W", "ignore", "-Xdev", "-m", "uvicorn", "app:app",
        ];
        assert_eq!(name("/usr/bin/python3", &python), "uvicorn");
        let glued = ["python3", "-muvicorn", "app:app"];
        assert_eq!(name("/usr/bin/python3", &glued), "uvicorn");
        let php = ["php", "-S", "127.0.0.1:80", "-t", "/srv/www"];
        assert_eq!(name("/usr/bin/php8.2", &php), "php8");
        let java = [
            "java",
            "-Xmx1g",
            "-cp",
            "/srv/lib/a.jar",
            "com.example.Shop",
        ];
        assert_eq!(name("/usr/bin/java", &java), "com.example.Shop");
        let ruby = ["ruby", "-rbundler/setup", "-I", "lib", "/srv/app.rb"];
        assert_eq!(name("/usr/bin/ruby", &ruby), "app.rb");
        let jar = ["java", "-jar", "/srv/shop.jar"];
        assert_eq!(name("/usr/bin/java", &jar), "shop.jar");
    }

    #[test]
    fn a_container_id_is_found_in_the_cgroup_path() {
        let id = "0123456789abcdef".repeat(4);
        assert_eq!(
            container_id(&format!(
                "/kubepods/burstable/pod12/cri-containerd-{id}.scope"
            )),
            Some(id.clone())
        );
        assert_eq!(container_id("/system.slice/nginx.service"), None);
        let other = "f".repeat(64);
        let nested = format!("/kubepods/pod12/cri-containerd-{id}.scope/kubepods/{other}");
        assert_eq!(
            container_id(&nested),
            Some(id.clone()),
            "not the own choice"
        );
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
    fn the_name_of_a_real_process_is_short_printable_and_not_its_code() {
        let sh = program::need(&["sh"]).unwrap();
        let temp = TempDir::new("names").unwrap();
        let long = format!("a\n{}", "x".repeat(200));
        let long = program::renamed(sh.to_str().unwrap(), &temp, &long).unwrap();
        for (shell, expected) in [(&sh, "sh"), (&long, "a\\nxxx")] {
            let mut command = Command::new(shell);
            command.args(["-c", "read line # /run/token=hunter2"]);
            let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
            // exec(2) releases the parent before the command line is in place.
            let line = || read_list(child.id(), "cmdline");
            let has_args = || Ok(line().ok().and_then(|args| args.first().map(drop)));
            wait::until("a command line", Duration::from_secs(5), has_args).unwrap();
            let exe = Origin::read(child.id()).exe;
            let name = Facts::read(child.id(), "sh", &exe).service;
            child.kill().unwrap();
            child.wait().unwrap();
            assert!(name.starts_with(expected), "{name}");
            assert!(name.len() <= MAX_PROGRAM_NAME, "{name}");
        }
    }

    #[test]
    fn our_own_process_has_facts() {
        let origin = Origin::read(std::process::id());
        assert!(origin.cpus >= 1 && origin.exe.is_absolute() && !origin.is_zombie);
        assert!(origin.uid >= rustix::process::geteuid().as_raw());
    }

    #[test]
    fn a_process_has_the_least_trusted_of_its_users() {
        let status = "Name:\tsu\nState:\tS (sleeping)\nUid:\t1000\t0\t0\t0\nThreads:\t1\nCpus_allowed_list:\t0-1,7\n";
        let expected = Status {
            uid: Some(1000),
            cpus: Some(3),
            is_zombie: false,
        };
        assert_eq!(Status::parse(status), expected);
        assert_eq!(Status::parse(""), Status::default());
    }

    #[test]
    fn a_zombie_has_no_thread_left() {
        let zombie = "State:\tZ (zombie)\nUid:\t0\t0\t0\t0\nThreads:\t1\n";
        assert!(Status::parse(zombie).is_zombie);
        let first_thread = zombie.replace("Threads:\t1", "Threads:\t4");
        assert!(!Status::parse(&first_thread).is_zombie);
        let mut child = Command::new("true").spawn().unwrap();
        wait::until("a zombie", Duration::from_secs(5), || {
            Ok(Origin::read(child.id()).is_zombie.then_some(()))
        })
        .unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn an_executable_keeps_its_name_when_its_file_is_replaced() {
        for (link, exe) in [
            ("/usr/sbin/php-fpm (deleted)", "/usr/sbin/php-fpm"),
            ("/usr/sbin/php-fpm", "/usr/sbin/php-fpm"),
            ("", ""),
        ] {
            assert_eq!(without_deleted(link.into()), Path::new(exe));
        }
    }

    #[test]
    fn a_program_run_by_a_descriptor_is_not_named_after_its_number() {
        let memfd = "/memfd:runc_cloned:/proc/self/exe";
        let called = |comm: &str| name_of_program(Path::new(memfd), &[], comm);
        assert_eq!(called("3"), "memfd");
        assert_eq!(called("memfd:runc_cl"), "memfd");
        assert_eq!(called("runc:[1:CHILD]"), "runc:[1:CHILD]");
        let bash = ["bash", "/dev/fd/63"];
        assert_eq!(name("/usr/bin/bash", &bash), "bash");
    }
}
