//! Queues that services report themselves: which processes are asked, and where; what they answered; and which connections are the
//! agent's own, so that no queue counts them.
#![forbid(unsafe_code)]

mod consumers;
mod own_connections;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs,
    net::SocketAddr,
    os::unix::fs::MetadataExt as _,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use wildmatch::WildMatch;

use super::{mono_ns, notices::Notices};
use crate::{
    app::{
        asker::{Asker, Endpoint, Login, MAX_ENDPOINTS, MAX_PROCESSES, Process, Report},
        recognize::Program,
        table::{Preset, Table},
        users,
    },
    sample::{AppAnswer, Sample, UnixSocket},
    target::{ListenerInfo, ProcessInfo, read_process_file},
};

/// Longest command line that is read, bytes: that of a JVM with a long class path.
const MAX_CMDLINE_BYTES: u64 = 64 << 10;
/// Maximum number of new processes that are examined in one discovery, twice a second.
const MAX_EXAMINED: usize = 256;
/// How often [`Apps::wait`] checks.
const WAIT_STEP: Duration = Duration::from_millis(10);

/// What the configuration says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AppSettings {
    pub table: Table,
    /// By preset.
    pub logins: BTreeMap<String, Login>,
}

#[derive(Default)]
pub(super) struct Apps {
    settings: Option<AppSettings>,
    presets: Vec<Arc<Preset>>,
    /// Started with the first process that is recognized.
    asker: Option<Asker>,
    /// By tgid.
    examined: HashMap<u32, Examined>,
    /// Unix listeners of each process, as of the last scan over all files: their paths and inodes.
    unix: BTreeMap<u32, BTreeSet<(String, u64)>>,
    /// The last answer of each process and preset.
    latest: BTreeMap<(u32, String), AppAnswer>,
    /// The processes and presets that are polled.
    polled: BTreeSet<(u32, String)>,
    /// Those that are not polled any more, until the next sample: their queues end.
    ended: BTreeSet<(u32, String)>,
    /// The agent's connections that a process was seen to have accepted.
    accepted: HashSet<(SocketAddr, SocketAddr)>,
    /// The same, of unix sockets: inodes of the agent's ends.
    accepted_unix: HashSet<u64>,
    /// By service (tgid) and address of its client: the processes that hold the client's end, of clients that take items from queues.
    consumers: HashMap<(u32, SocketAddr), BTreeSet<u32>>,
}

/// What a process executes, until its next exec.
struct Examined {
    start_ns: u64,
    exec_id: u64,
    program: Program,
    /// The presets that recognize it.
    presets: Vec<Arc<Preset>>,
}

impl Apps {
    /// `None`: nothing is asked.
    pub(super) fn set(&mut self, settings: Option<AppSettings>) {
        let presets = settings
            .iter()
            .flat_map(|settings| settings.table.presets());
        *self = Self {
            presets: presets.cloned().map(Arc::new).collect(),
            ended: self.ended_unless(|_| false),
            settings,
            unix: std::mem::take(&mut self.unix),
            ..Self::default()
        };
    }

    /// Updates the unix listeners after a scan over all files; returns whether they have changed.
    pub(super) fn set_unix(&mut self, sockets: &[UnixSocket]) -> bool {
        if self.presets.is_empty() {
            return false;
        }
        let mut unix: BTreeMap<u32, BTreeSet<(String, u64)>> = BTreeMap::new();
        for socket in sockets.iter().filter(|socket| socket.listening) {
            // Neither an abstract name nor a relative path says where it is.
            if let Some(path) = socket.path.as_ref().filter(|path| path.starts_with('/')) {
                let of_process = unix.entry(socket.tgid).or_default();
                of_process.insert((path.clone(), socket.inode));
            }
        }
        let changed = unix != self.unix;
        self.unix = unix;
        changed
    }

    /// Updates which processes are asked. `watched`: the processes of all targets; `listeners`: all TCP listeners of the machine.
    pub(super) fn update(
        &mut self,
        watched: &[ProcessInfo],
        listeners: &[ListenerInfo],
        is_focused: impl Fn(u32) -> bool,
        notices: &mut Notices,
    ) {
        if self.settings.is_none() {
            return;
        }
        self.examine(watched);
        let mut processes = self.processes(watched, listeners, is_focused);
        if processes.len() > MAX_PROCESSES {
            let further = processes.len() - MAX_PROCESSES;
            notices.report_once("too_many_app_services", || {
                format!(
                    "limit of services that are asked for their own queues reached: {further} are not asked"
                )
            });
            processes.truncate(MAX_PROCESSES);
        }
        self.polled = processes
            .iter()
            .map(|process| (process.tgid, process.preset.name.clone()))
            .collect();
        self.ended = self.ended_unless(|key| self.polled.contains(key));
        self.latest.retain(|key, _| self.polled.contains(key));
        if self.asker.is_none() {
            if processes.is_empty() {
                return;
            }
            let settings = self.settings.as_ref();
            let logins = settings.map(|settings| settings.logins.clone());
            match Asker::start(logins.unwrap_or_default(), mono_ns) {
                Ok(asker) => self.asker = Some(asker),
                Err(error) => {
                    notices.report_once("app_not_asked", || {
                        format!("services are not asked for their queues: cannot start a thread: {error}")
                    });
                    return;
                }
            }
        }
        if let Some(asker) = &self.asker {
            asker.set_processes(processes);
        }
    }

    /// Those whose queues end: nobody asks for them any more.
    fn ended_unless(&self, is_polled: impl Fn(&(u32, String)) -> bool) -> BTreeSet<(u32, String)> {
        let latest = self.latest.keys().filter(|key| !is_polled(key));
        self.ended.iter().chain(latest).cloned().collect()
    }

    /// Recognizes new processes, and those that have called exec.
    fn examine(&mut self, watched: &[ProcessInfo]) {
        let tgids: HashSet<u32> = watched.iter().map(|process| process.tgid).collect();
        self.examined.retain(|tgid, _| tgids.contains(tgid));
        let is_known = |process: &&ProcessInfo| {
            let known = self.examined.get(&process.tgid);
            known.is_some_and(|known| {
                (known.start_ns, known.exec_id) == (process.start_ns, process.exec_id)
            })
        };
        let new: Vec<&ProcessInfo> = watched
            .iter()
            .filter(|process| !is_known(process))
            .take(MAX_EXAMINED)
            .collect();
        for process in new {
            let program = program(process.pid, &self.presets);
            let presets = self.presets.iter();
            let presets = presets.filter(|preset| program.is(&preset.find));
            let examined = Examined {
                start_ns: process.start_ns,
                exec_id: process.exec_id,
                presets: presets.cloned().collect(),
                program,
            };
            self.examined.insert(process.tgid, examined);
        }
    }

    /// Each listener is asked once, for the first process that holds it.
    fn processes(
        &self,
        watched: &[ProcessInfo],
        listeners: &[ListenerInfo],
        is_focused: impl Fn(u32) -> bool,
    ) -> Vec<Process> {
        let own_netns = own_netns();
        let mut taken: HashSet<Socket> = HashSet::new();
        let mut processes = Vec::new();
        for process in watched {
            let Some(examined) = self.examined.get(&process.tgid) else {
                continue;
            };
            for preset in &examined.presets {
                let (endpoints, elsewhere) =
                    self.endpoints(process, examined, preset, listeners, own_netns);
                let had = endpoints.len();
                let endpoints: Vec<Endpoint> = endpoints
                    .into_iter()
                    .filter(|endpoint| taken.insert(Socket::of(endpoint)))
                    .take(MAX_ENDPOINTS)
                    .collect();
                // Another process of the service is asked there.
                if had > 0 && endpoints.is_empty() {
                    continue;
                }
                let unreachable = elsewhere.then(|| {
                    "its listeners are in another network namespace, which the agent does not enter: run the agent as a \
                     sidecar of it"
                        .to_owned()
                });
                processes.push(Process {
                    tgid: process.tgid,
                    start_ns: process.start_ns,
                    preset: Arc::clone(preset),
                    program: examined.program.clone(),
                    // It may change without an exec.
                    uid: self.has_login(preset).then(|| user(process.pid)).flatten(),
                    unreachable: unreachable.filter(|_| endpoints.is_empty()),
                    endpoints,
                    is_focused: is_focused(process.tgid),
                });
            }
        }
        // Workers without a listener of their own are asked through their parent.
        let is_asked = |process: &Process| !process.endpoints.is_empty();
        let asked = processes.iter().filter(|process| is_asked(process));
        let asked: BTreeSet<String> = asked.map(|process| process.preset.name.clone()).collect();
        processes.retain(|process| {
            is_asked(process)
                || process.unreachable.is_some()
                || !asked.contains(&process.preset.name)
        });
        processes
    }

    fn has_login(&self, preset: &Preset) -> bool {
        let settings = self.settings.as_ref();
        settings.is_some_and(|settings| settings.logins.contains_key(&preset.name))
    }

    /// Where a process may be asked: unix sockets first. Also returns whether it has listeners that cannot be reached.
    fn endpoints(
        &self,
        process: &ProcessInfo,
        examined: &Examined,
        preset: &Preset,
        listeners: &[ListenerInfo],
        own_netns: Option<u32>,
    ) -> (Vec<Endpoint>, bool) {
        let at = &preset.at;
        let is_named = |(path, _): &(&str, u64)| {
            let name = path.rsplit('/').next().unwrap_or_default();
            at.sockets
                .iter()
                .any(|glob| WildMatch::new(glob).matches(name))
        };
        let paths = self.unix.get(&process.tgid).into_iter().flatten();
        let mut endpoints: Vec<Endpoint> = paths
            .map(|(path, inode)| (final_path(path), *inode))
            .filter(is_named)
            .map(|(path, inode)| Endpoint::Unix {
                path: path.to_owned(),
                inode,
                pid: process.pid,
            })
            .collect();
        if at.only_sockets {
            return (endpoints, false);
        }
        let ports = examined.program.ports(at);
        let mut own: Vec<&ListenerInfo> = listeners
            .iter()
            .filter(|listener| listener.tgid == process.tgid)
            .filter(|listener| ports.is_empty() || ports.contains(&listener.address.port()))
            .collect();
        // IPv4 before IPv6.
        own.sort_by_key(|listener| (listener.address.port(), listener.address, listener.cookie));
        let (here, elsewhere): (Vec<&ListenerInfo>, Vec<&ListenerInfo>) = own
            .into_iter()
            .partition(|listener| Some(listener.netns) == own_netns);
        let mut seen = BTreeSet::new();
        let here = here
            .into_iter()
            .filter(|listener| seen.insert(listener.address.port()));
        endpoints.extend(here.map(|listener| Endpoint::Tcp {
            address: listener.address,
            cookie: listener.cookie,
            pid: process.pid,
        }));
        (endpoints, !elsewhere.is_empty())
    }

    /// Puts the answers since the last sample into this one; into a complete sample, the last answer of each process.
    pub(super) fn report(&mut self, sample: &mut Sample, is_complete: bool, notices: &mut Notices) {
        let ended = std::mem::take(&mut self.ended);
        sample.app = ended.into_iter().map(without_queues).collect();
        let Some(asker) = &self.asker else {
            return;
        };
        let mut new = asker.take();
        // Of a process that is not polled any more: its queues have ended.
        new.retain(|answer| {
            let key = (answer.tgid, answer.preset.clone());
            self.polled.contains(&key)
        });
        for answer in &mut new {
            self.add_consumers(answer);
        }
        for answer in &new {
            let key = (answer.tgid, answer.preset.clone());
            if answer.queues.is_some() {
                self.latest.insert(key, answer.clone());
            }
        }
        if !new.is_empty() {
            let over_limit: usize = asker.reports().iter().map(|report| report.left_out).sum();
            if over_limit > 0 {
                notices.report_once("too_many_app_queues", || {
                    format!(
                        "limit of queues inside one service reached: {over_limit} are not observed"
                    )
                });
            }
        }
        match is_complete {
            true => sample.app.extend(self.latest.values().cloned()),
            false => sample.app.extend(new),
        }
    }

    /// Waits until all recognized processes were asked once, but not longer than `limit`.
    pub(super) fn wait(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let is_done = |asker: &Asker| {
            let (asked, all) = asker.progress();
            asked >= all
        };
        while let Some(asker) = &self.asker
            && !is_done(asker)
            && Instant::now() < until
        {
            thread::sleep(WAIT_STEP);
        }
    }

    pub(super) fn reports(&self) -> Vec<Report> {
        self.asker.as_ref().map(Asker::reports).unwrap_or_default()
    }
}

/// Stands for an answer of a process that is not polled any more.
fn without_queues((tgid, preset): (u32, String)) -> AppAnswer {
    AppAnswer {
        tgid,
        preset,
        at_ns: mono_ns(),
        took_ns: 0,
        queues: Some(Vec::new()),
    }
}

/// What is asked once, whichever processes hold it.
#[derive(PartialEq, Eq, Hash)]
enum Socket {
    Tcp { cookie: u64 },
    Unix { inode: u64 },
}

impl Socket {
    fn of(endpoint: &Endpoint) -> Self {
        match endpoint {
            Endpoint::Tcp { cookie, .. } => Self::Tcp { cookie: *cookie },
            Endpoint::Unix { inode, .. } => Self::Unix { inode: *inode },
        }
    }
}

/// HAProxy binds `PATH.PID.tmp` and renames it; the kernel keeps the first name.
fn final_path(path: &str) -> &str {
    let final_path = path.strip_suffix(".tmp").and_then(|path| {
        let (path, pid) = path.rsplit_once('.')?;
        pid.bytes()
            .all(|digit| digit.is_ascii_digit())
            .then_some(path)
    });
    final_path.unwrap_or(path)
}

/// IPv4-mapped IPv6 addresses become IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Inode of the agent's network namespace.
fn own_netns() -> Option<u32> {
    let namespace = fs::metadata("/proc/self/ns/net").ok()?;
    u32::try_from(namespace.ino()).ok()
}

/// The arguments are read only if a preset could recognize the process: there are many others.
fn program(pid: u32, presets: &[Arc<Preset>]) -> Program {
    let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let exe = exe.to_string_lossy();
    let exe = exe.strip_suffix(" (deleted)").unwrap_or(&exe);
    let program = Program::new(exe, b"");
    if !presets.iter().any(|preset| program.may_be(&preset.find)) {
        return program;
    }
    let cmdline = read_process_file(pid, "cmdline", MAX_CMDLINE_BYTES).unwrap_or_default();
    Program::new(exe, &cmdline)
}

/// Of the process's real, effective and saved user ids, the highest: a program that runs with the rights of root for a user is the
/// user's.
fn user(pid: u32) -> Option<u32> {
    users(pid).into_iter().max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::AppQueue;

    #[test]
    fn a_socket_that_was_renamed_is_found_under_its_last_name() {
        assert_eq!(final_path("/run/admin.sock.4711.tmp"), "/run/admin.sock");
        assert_eq!(final_path("/run/admin.sock.tmp"), "/run/admin.sock.tmp");
        assert_eq!(final_path("/run/admin.sock"), "/run/admin.sock");
    }

    fn apps(preset: &str) -> Apps {
        let presets: BTreeMap<String, Vec<Preset>> =
            toml::from_str(&format!("[[preset]]\n{preset}")).unwrap();
        let table = Table::new(&presets["preset"], &[], &[]).unwrap();
        let mut apps = Apps::default();
        apps.set(Some(AppSettings {
            table,
            logins: BTreeMap::new(),
        }));
        apps
    }

    const SHOP: &str = r#"
        name = "shop"
        find = { exe = ["shopd"] }
        at = { ports = [80, 81], sockets = ["*.sock"] }
        proof = "waiting"
        ask = [{ protocol = "prometheus", paths = ["/"] }]
        queue = [{ name = "q", unit = "jobs", depth = "waiting" }]
    "#;

    #[test]
    fn queues_end_when_their_service_is_not_polled_any_more() {
        let mut notices = Notices::default();
        let key = (10, "shop".to_owned());
        let answered = |apps: &mut Apps| {
            let queues = Some(vec![AppQueue::default()]);
            let answer = AppAnswer {
                queues,
                ..without_queues(key.clone())
            };
            apps.polled.insert(key.clone());
            apps.latest.insert(key.clone(), answer);
        };
        let reported = |apps: &mut Apps, notices: &mut Notices| {
            let mut sample = Sample::default();
            apps.report(&mut sample, false, notices);
            let app = sample.app.into_iter();
            app.map(|answer| (answer.tgid, answer.queues.map(|queues| queues.len())))
                .collect::<Vec<_>>()
        };
        // The process leaves the list.
        let mut apps = apps(SHOP);
        answered(&mut apps);
        apps.update(&[], &[], |_| false, &mut notices);
        assert_eq!(reported(&mut apps, &mut notices), [(10, Some(0))]);
        assert!(reported(&mut apps, &mut notices).is_empty());
        // The feature is turned off.
        answered(&mut apps);
        apps.set(None);
        assert_eq!(reported(&mut apps, &mut notices), [(10, Some(0))]);
        assert!(reported(&mut apps, &mut notices).is_empty());
    }

    fn process(tgid: u32) -> ProcessInfo {
        ProcessInfo {
            tgid,
            pid: tgid,
            parent: 1,
            start_ns: 1,
            exec_id: 1,
            kernel: false,
            comm: "shopd".to_owned(),
        }
    }

    fn listening(tgid: u32, cookie: u64, netns: u32, address: &str) -> ListenerInfo {
        ListenerInfo {
            tgid,
            cookie,
            netns,
            address: address.parse().unwrap(),
        }
    }

    #[test]
    fn only_a_recognized_process_is_asked_and_only_at_its_own_listeners() {
        let here = own_netns().unwrap();
        let mut apps = apps(SHOP);
        let shop = apps.presets[0].clone();
        for (tgid, exe) in [(10, "shopd"), (11, "shopd"), (12, "other")] {
            let program = Program::new(exe, b"");
            let presets = program.is(&shop.find).then(|| shop.clone());
            let examined = Examined {
                start_ns: 1,
                exec_id: 1,
                program,
                presets: presets.into_iter().collect(),
            };
            apps.examined.insert(tgid, examined);
        }
        apps.unix.insert(
            10,
            [("/run/a.sock".to_owned(), 7), ("/run/a.log".to_owned(), 8)].into(),
        );
        let listeners = [
            listening(10, 1, here, "[::]:80"),
            listening(10, 2, here, "0.0.0.0:80"),
            listening(10, 3, here, "127.0.0.1:9999"),
            listening(11, 2, here, "0.0.0.0:80"),
            listening(12, 4, here, "127.0.0.1:81"),
            listening(13, 5, here, "127.0.0.1:81"),
        ];
        let watched = [10, 11, 12].map(process);
        let found = apps.processes(&watched, &listeners, |_| false);
        assert_eq!(found.len(), 1, "{found:?}");
        let shown: Vec<String> = found[0].endpoints.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["/run/a.sock", "0.0.0.0:80"]);
        // Its unix socket is that of process 10, as a worker's is.
        apps.unix.insert(11, [("/run/a.sock".to_owned(), 7)].into());
        let found = apps.processes(&watched, &listeners, |_| false);
        assert_eq!(found.len(), 1, "{found:?}");
        let elsewhere = [listening(10, 1, here + 1, "0.0.0.0:80")];
        apps.unix.clear();
        let found = apps.processes(&watched, &elsewhere, |_| false);
        assert!(found[0].endpoints.is_empty());
        assert!(
            found[0]
                .unreachable
                .as_ref()
                .unwrap()
                .contains("network namespace")
        );
    }
}
