//! Whether adapter clients can delay the agent: compares how regularly the page is renewed without clients and with clients that
//! query, hold and subscribe to all adapters.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::{fs::FileExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::json;
use tailback_tests::{agent::Agent, http, ports, temp::TempDir, wait};

use super::{
    cpu,
    figure::{Figure, Goal, Report},
    hold,
    statistics::{Spread, quartiles},
};

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(20);
/// Enough sockets that the CPU budget limits the sampling rate.
const SOCKETS: usize = 5_000;
/// Goal: renewal rate with clients, relative to the rate without.
const MIN_RENEWAL_RATIO: f64 = 0.95;
/// Offset of the publication time in the page (docs/reference/page-format.md).
const PUBLISHED_AT: u64 = 24;
/// HTTP connections that send nothing.
const SILENT: usize = 500;
/// Event stream subscribers that never read.
const DEAF: usize = 300;
/// Pause of each client between two queries.
const PAUSE: Duration = Duration::from_millis(5);
/// Time until all clients are connected.
const SETTLE: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub struct Args {
    /// Number of rounds: each measures one window without clients and one with clients at all adapters
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(2..))]
    rounds: u32,
    /// Duration of each window, in seconds
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(2..))]
    seconds: u64,
}

pub fn measure(args: &Args, report: &mut Report) -> Result<()> {
    let stage = Stage::start()?;
    let length = Duration::from_secs(args.seconds);
    let (mut quiet, mut queried) = (Windows::default(), Windows::default());
    for round in 0..args.rounds {
        report.progress(&format!("round {} of {} …", round + 1, args.rounds));
        quiet.add(&stage.window(length)?);
        let clients = Clients::start(&stage);
        thread::sleep(SETTLE);
        let before = clients.responses();
        queried.add(&stage.window(length)?);
        queried.responses += clients.responses() - before;
        clients.end()?;
        // The adapter process closes a thousand connections.
        thread::sleep(SETTLE);
    }
    let ratios: Vec<f64> = queried
        .renewals
        .iter()
        .zip(&quiet.renewals)
        .map(|(queried, quiet)| queried / quiet)
        .collect();
    let ratio = quartiles(&ratios).context("no round")?;
    let responses = queried.responses as f64 / length.as_secs_f64() / f64::from(args.rounds);
    quiet.add_to(report, "no clients", "quiet")?;
    queried.add_to(report, "all adapters queried", "queried")?;
    let what = "all adapters queried: responses per second";
    report.add(figure(
        what,
        "responses",
        "",
        Spread::exact(responses),
        None,
    ));
    let goal = Goal::at_least(MIN_RENEWAL_RATIO, &ratio);
    let what = "renewals, queried / quiet";
    report.add(figure(what, "ratio", "", ratio, Some(goal)));
    Ok(())
}

/// Results of all windows of one kind.
#[derive(Default)]
struct Windows {
    /// Renewals per second.
    renewals: Vec<f64>,
    /// Longest time between two renewals, ms.
    longest_ms: f64,
    /// CPU use of the agent, as a share of one core.
    shares: Vec<f64>,
    responses: u64,
}

/// Result of one window.
struct Window {
    renewals: f64,
    longest_ms: f64,
    share: f64,
}

impl Windows {
    fn add(&mut self, window: &Window) {
        self.renewals.push(window.renewals);
        self.longest_ms = self.longest_ms.max(window.longest_ms);
        self.shares.push(window.share);
    }

    fn add_to(self, report: &mut Report, what: &str, key: &str) -> Result<()> {
        let renewals = quartiles(&self.renewals).context("no window")?;
        let share = quartiles(&self.shares).context("no window")?;
        for (of, unit, value) in [
            ("renewals per second", "", renewals),
            ("longest gap", "ms", Spread::exact(self.longest_ms)),
            ("CPU of the agent", "%", share.map(|share| 100.0 * share)),
        ] {
            let what = format!("{what}: {of}");
            report.add(figure(&what, &format!("{key}: {of}"), unit, value, None));
        }
        Ok(())
    }
}

fn figure(what: &str, key: &str, unit: &'static str, value: Spread, goal: Option<Goal>) -> Figure {
    Figure {
        what: what.to_owned(),
        keys: json!({"bench": "adapters", "measured": key}),
        unit,
        value,
        spread: "quartiles of the windows",
        goal,
    }
}

/// An agent that publishes, with all socket adapters.
struct Stage {
    http: SocketAddr,
    haproxy: SocketAddr,
    pressure: PathBuf,
    directory: PathBuf,
    page: File,
    agent: Agent,
    _holders: Vec<tailback_tests::process::Process>,
    _temp: TempDir,
}

impl Stage {
    fn start() -> Result<Self> {
        let holders = hold::sockets(SOCKETS)?;
        let temp = TempDir::new("adapters")?;
        let directory = temp.path().join("run");
        let [http, haproxy, orca, keda] = [(); 4].map(|()| ports::free().map(ports::local));
        let (http, haproxy) = (http?, haproxy?);
        let pressure = temp.path().join("pressure.sock");
        // The holders run this program, so the target is named xtask.
        let text = format!(
            "[signal]\ndirectory = \"{}\"\n\
             [signal.http]\nlisten = \"{http}\"\n\
             [[signal.haproxy]]\ntarget = \"xtask\"\nlisten = \"{haproxy}\"\n\
             [[signal.orca]]\ntarget = \"xtask\"\nlisten = \"{}\"\n\
             [signal.keda]\nlisten = \"{}\"\n\
             [[signal.pressure_socket]]\ntarget = \"xtask\"\npath = \"{}\"\n",
            directory.display(),
            orca?,
            keda?,
            pressure.display(),
        );
        let config = temp.write("tailback.toml", &text)?;
        let mut command = Command::new(super::agent()?);
        command.args(["run", "--json", "--config"]).arg(config);
        let agent = Agent::start(command.args(hold::targets(&holders)))?;
        let page = wait::until("the page", DEADLINE, || {
            agent.process().check_running()?;
            Ok(page_in(&directory))
        })?;
        wait::until("a response from the adapter process", DEADLINE, || {
            Ok(http::get(http, "/ready", DEADLINE).ok())
        })?;
        Ok(Self {
            http,
            haproxy,
            pressure,
            directory,
            page,
            agent,
            _holders: holders,
            _temp: temp,
        })
    }

    fn window(&self, length: Duration) -> Result<Window> {
        let pid = self.agent.process().pid();
        let (began, used) = (Instant::now(), cpu::of_process(pid)?);
        let first_ns = self.published_ns()?;
        let (mut last_ns, mut count, mut longest_ns) = (first_ns, 0_u32, 0);
        while began.elapsed() < length {
            thread::sleep(Duration::from_millis(2));
            let now_ns = self.published_ns()?;
            if now_ns != last_ns {
                longest_ns = longest_ns.max(now_ns.saturating_sub(last_ns));
                last_ns = now_ns;
                count += 1;
            }
        }
        let used = cpu::of_process(pid)? - used;
        Ok(Window {
            renewals: f64::from(count) * 1e9 / last_ns.saturating_sub(first_ns).max(1) as f64,
            longest_ms: longest_ns as f64 / 1e6,
            share: used.as_secs_f64() / began.elapsed().as_secs_f64(),
        })
    }

    fn published_ns(&self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.page
            .read_exact_at(&mut bytes, PUBLISHED_AT)
            .context("read the page")?;
        Ok(u64::from_le_bytes(bytes))
    }
}

fn page_in(directory: &Path) -> Option<File> {
    let services = fs::read_dir(directory).ok()?;
    services
        .flatten()
        .find_map(|service| File::open(service.path().join("page")).ok())
}

/// The clients.
struct Clients {
    over: Arc<AtomicBool>,
    responses: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Clients {
    fn start(stage: &Stage) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let responses = Arc::new(AtomicU64::new(0));
        let mut threads = Vec::new();
        let mut spawn = |work: Box<dyn Fn() -> Result<()> + Send>| {
            let (over, responses) = (Arc::clone(&over), Arc::clone(&responses));
            threads.push(thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    // A rejected client retries.
                    if work().is_ok() {
                        responses.fetch_add(1, Ordering::Relaxed);
                    }
                    thread::sleep(PAUSE);
                }
                Ok(())
            }));
        };
        let (http, haproxy) = (stage.http, stage.haproxy);
        for path in ["/metrics", "/pressure", "/status", "/ready"] {
            spawn(Box::new(move || http::get(http, path, DEADLINE).map(drop)));
        }
        spawn(Box::new(move || {
            let mut line = String::new();
            TcpStream::connect(haproxy)?.read_to_string(&mut line)?;
            Ok(())
        }));
        let socket = stage.directory.join("agent.sock");
        let query = socket.clone();
        spawn(Box::new(move || {
            let mut stream = UnixStream::connect(&query)?;
            stream.write_all(b"{\"ask\": \"metrics\"}\n")?;
            stream.read_to_end(&mut Vec::new())?;
            Ok(())
        }));
        let (stop, pressure) = (Arc::clone(&over), stage.pressure.clone());
        threads.push(thread::spawn(move || {
            let mut held = Vec::new();
            let mut silent = Vec::new();
            for _ in 0..SILENT {
                silent.push(TcpStream::connect(http)?);
                held.extend(UnixStream::connect(&pressure));
            }
            for _ in 0..DEAF {
                let mut stream = UnixStream::connect(&socket)?;
                let _ = stream.write_all(b"{}\n");
                held.push(stream);
            }
            while !stop.load(Ordering::Relaxed) {
                thread::sleep(PAUSE);
            }
            Ok(())
        }));
        Self {
            over,
            responses,
            threads,
        }
    }

    fn responses(&self) -> u64 {
        self.responses.load(Ordering::Relaxed)
    }

    fn end(self) -> Result<()> {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a client thread panicked"))??;
        }
        Ok(())
    }
}
