//! Simulated pods of a node: processes in control groups as of a Kubernetes container, each with its own network namespace,
//! and the link by which the agent finds the pod's name.

use std::{
    env, fs,
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{self, Command},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Signal, set_parent_process_death_signal};
use tailback_tests::{
    cleanup, container::PodLink, idle::raise_file_limit, process::Process, sockets, temp::TempDir,
    wait,
};

/// Port of each pod, in its own network namespace.
const PORT: u16 = 8080;
const BACKLOG: i32 = 100;
const READY: &str = "serving";
/// Deadline for the start of each pod.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// Deadline for a control group to be empty after its processes were killed.
const REMOVE_DEADLINE: Duration = Duration::from_secs(5);
/// Bytes of a request and of a response.
const MESSAGE: [u8; 64] = [b'x'; 64];
/// Joins the control groups up to `--`, then a network namespace in which loopback is up, and runs the rest.
const ENTER: &str = r#"while [ "$1" != -- ]; do echo $$ >"$1" || exit 1; shift; done; shift
exec unshare --net sh -c 'ip link set lo up && exec "$@"' sh "$@""#;

/// A hidden subcommand: this program as the process of a pod.
#[derive(clap::Args)]
pub struct Pod {
    /// Connections, both ends of which are in this process
    connections: usize,
    /// Requests per second over them
    per_s: u32,
    /// While this file exists, connections are made and not accepted, and no request is sent
    jam: PathBuf,
}

impl Pod {
    /// Runs until this process or its parent is killed.
    pub fn serve(&self) -> Result<()> {
        set_parent_process_death_signal(Some(Signal::KILL))
            .context("set the parent death signal")?;
        raise_file_limit(2 * self.connections + 2 * BACKLOG as usize + 100)?;
        let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT));
        let listener = sockets::listen(address, BACKLOG, false)?;
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
        let connect = || -> Result<(TcpStream, TcpStream)> {
            let client = TcpStream::connect(to).context("connect")?;
            let (server, _) = listener.accept().context("accept")?;
            Ok((client, server))
        };
        let mut pairs = (0..self.connections)
            .map(|_| connect())
            .collect::<Result<Vec<_>>>()?;
        println!("{READY} {}", pairs.len());
        let gap = Duration::from_secs(1) / self.per_s.max(1);
        let mut due = Instant::now();
        let mut waiting = Vec::new();
        let mut message = MESSAGE;
        for next in (0..self.connections.max(1)).cycle() {
            due += gap;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if self.jam.exists() {
                // One more than the backlog: full.
                while waiting.len() <= BACKLOG as usize {
                    waiting.push(sockets::begin_connect(to)?);
                }
                continue;
            }
            if let Some((client, server)) = pairs.get_mut(next) {
                client.write_all(&MESSAGE)?;
                server.read_exact(&mut message)?;
                server.write_all(&message)?;
                client.read_exact(&mut message)?;
            }
        }
        Ok(())
    }
}

/// The pods of a node. Removed on drop.
pub struct Pods {
    directory: TempDir,
    /// Before the groups: these must be empty to be removed.
    processes: Vec<Process>,
    _links: Vec<PodLink>,
    _groups: Groups,
}

impl Pods {
    /// Starts `count` pods with this many connections and requests per second each.
    pub fn start(count: usize, connections: usize, per_s: u32) -> Result<Self> {
        let program = env::current_exe().context("find this program")?;
        let directory = TempDir::new("pods")?;
        let groups = Groups::new()?;
        let (mut processes, mut links) = (Vec::new(), Vec::new());
        for number in 0..count {
            let id = format!("{:064x}", (u64::from(process::id()) << 32) | number as u64);
            links.push(PodLink::new(&format!("pod-{number}_bench_web-{id}.log"))?);
            let mut command = Command::new("sh");
            command.args(["-c", ENTER, "sh"]);
            command
                .args(groups.add(number, &id)?)
                .arg("--")
                .arg(&program);
            command.args(["bench", "pod", &connections.to_string(), &per_s.to_string()]);
            command.arg(jam_file(directory.path(), number));
            processes.push(Process::start(&format!("pod {number}"), &mut command)?);
        }
        for process in &processes {
            process.wait_line(READY, START_DEADLINE)?;
        }
        Ok(Self {
            directory,
            processes,
            _links: links,
            _groups: groups,
        })
    }

    /// The first pods accept nothing from now on.
    pub fn jam(&self, count: usize) -> Result<()> {
        for number in 0..count {
            let file = jam_file(self.directory.path(), number);
            fs::write(&file, "").with_context(|| format!("write {}", file.display()))?;
        }
        Ok(())
    }

    pub fn check_running(&self) -> Result<()> {
        self.processes.iter().try_for_each(Process::check_running)
    }
}

fn jam_file(directory: &Path, number: usize) -> PathBuf {
    directory.join(format!("jam-{number}"))
}

/// Control groups as the kubelet and containerd make them, in each hierarchy.
struct Groups {
    /// The group above all of them, per hierarchy.
    tops: Vec<PathBuf>,
    /// In the order in which they were made. Shared with the clean-up after Ctrl-C.
    made: Arc<Mutex<Vec<PathBuf>>>,
}

impl Groups {
    fn new() -> Result<Self> {
        let mount = Path::new("/sys/fs/cgroup");
        let hierarchies = ["", "unified", "systemd", "cpu", "cpuacct", "memory", "pids"];
        let hierarchies = hierarchies.map(|name| mount.join(name));
        // One hierarchy may have several names: cpu is often a link to cpu,cpuacct.
        let places: std::collections::BTreeSet<PathBuf> = hierarchies
            .iter()
            .filter(|place| place.join("cgroup.procs").exists())
            .filter_map(|place| place.canonicalize().ok())
            .collect();
        let tops: Vec<PathBuf> = places
            .iter()
            .map(|place| place.join(format!("kubepods-bench-{}.slice", process::id())))
            .collect();
        ensure!(
            !tops.is_empty(),
            "no control groups below {}",
            mount.display()
        );
        let made = Arc::<Mutex<Vec<PathBuf>>>::default();
        let groups = Self {
            tops,
            made: Arc::clone(&made),
        };
        // A signal ends this process without drop, when the pods have been killed.
        cleanup::on_interrupt(move || remove(&made));
        for top in &groups.tops {
            groups.make(top.clone())?;
        }
        Ok(groups)
    }

    /// Makes the groups of a pod with one container. Returns the files by which a process joins them.
    fn add(&self, number: usize, id: &str) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for top in &self.tops {
            let pod = top.join(format!("kubepods-bench-pod{number:08}.slice"));
            let container = pod.join(format!("cri-containerd-{id}.scope"));
            files.push(container.join("cgroup.procs"));
            self.make(pod)?;
            self.make(container)?;
        }
        Ok(files)
    }

    fn make(&self, path: PathBuf) -> Result<()> {
        // Locked meanwhile: a group that the clean-up does not know would stay.
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        fs::create_dir(&path).with_context(|| format!("create the cgroup {}", path.display()))?;
        made.push(path);
        Ok(())
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        remove(&self.made);
    }
}

/// Removes the groups, innermost first. A process that was killed leaves its group a moment later.
fn remove(made: &Mutex<Vec<PathBuf>>) {
    let mut made = made.lock().unwrap_or_else(PoisonError::into_inner);
    while let Some(path) = made.pop() {
        let is_gone = || -> Result<Option<()>> {
            match fs::remove_dir(&path) {
                Err(error) if error.kind() == ErrorKind::ResourceBusy => Ok(None),
                Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
                _ => Ok(Some(())),
            }
        };
        if let Err(error) = wait::until("it to be empty", REMOVE_DEADLINE, is_gone) {
            eprintln!("warning: remove the cgroup {}: {error:#}", path.display());
        }
    }
}
