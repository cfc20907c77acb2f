//! Whether those who listen can slow the agent's tick: how regularly its page is renewed while nobody asks, and while all
//! adapters are asked, held and subscribed to.

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

const SOON: Duration = Duration::from_secs(20);
/// So many that the budget bounds how often they are looked at.
const SOCKETS: usize = 5_000;
/// The page is renewed nearly as often while all ask.
const LEAST: f64 = 0.95;
/// What the page says of when it was written: docs/reference/page-format.md.
const PUBLISHED_AT: u64 = 24;
/// Connections to HTTP that say nothing, and subscribers of the stream that never read.
const SILENT: usize = 500;
const DEAF: usize = 300;
/// Between two questions of each asker.
const PAUSE: Duration = Duration::from_millis(5);
/// From the beginning of the asking on, until all are connected.
const SETTLE: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub struct Args {
    /// Windows of each kind, in turn
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(2..))]
    rounds: u32,
    /// How long each lasts
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(2..))]
    seconds: u64,
}

pub fn measure(args: &Args, report: &mut Report) -> Result<()> {
    let stage = Stage::start()?;
    let length = Duration::from_secs(args.seconds);
    let (mut quiet, mut asked) = (Windows::default(), Windows::default());
    for round in 0..args.rounds {
        report.progress(&format!("round {} of {} …", round + 1, args.rounds));
        quiet.add(&stage.window(length)?);
        let crowd = Crowd::start(&stage);
        thread::sleep(SETTLE);
        let before = crowd.answers();
        asked.add(&stage.window(length)?);
        asked.answers += crowd.answers() - before;
        crowd.end()?;
        // The guard lets go of a thousand connections.
        thread::sleep(SETTLE);
    }
    let ratios: Vec<f64> = asked
        .renewals
        .iter()
        .zip(&quiet.renewals)
        .map(|(asked, quiet)| asked / quiet)
        .collect();
    let ratio = quartiles(&ratios).context("no round")?;
    let answers = asked.answers as f64 / length.as_secs_f64() / f64::from(args.rounds);
    quiet.add_to(report, "nobody asks", "quiet")?;
    asked.add_to(report, "all adapters asked", "asked")?;
    let what = "all adapters asked: answers a second";
    report.add(figure(what, "answers", "", Spread::exact(answers), None));
    let goal = Goal::at_least(LEAST, &ratio);
    let what = "renewals, asked over not asked";
    report.add(figure(what, "ratio", "", ratio, Some(goal)));
    Ok(())
}

/// What windows of one kind showed.
#[derive(Default)]
struct Windows {
    /// A second.
    renewals: Vec<f64>,
    /// The longest time between two, ms.
    longest_ms: f64,
    /// CPU time of the agent, as a share of one core.
    shares: Vec<f64>,
    answers: u64,
}

/// What one window showed.
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
            ("renewals a second", "", renewals),
            ("longest between two", "ms", Spread::exact(self.longest_ms)),
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

/// An agent that publishes, with all adapters that are asked over a socket.
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
        // Holders are this very program.
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
        let page = wait::until("the page", SOON, || {
            agent.process().check_running()?;
            Ok(page_in(&directory))
        })?;
        wait::until("an answer of the guard", SOON, || {
            Ok(http::get(http, "/health", SOON).ok())
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

/// Those who listen.
struct Crowd {
    over: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Crowd {
    fn start(stage: &Stage) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let answers = Arc::new(AtomicU64::new(0));
        let mut threads = Vec::new();
        let mut spawn = |work: Box<dyn Fn() -> Result<()> + Send>| {
            let (over, answers) = (Arc::clone(&over), Arc::clone(&answers));
            threads.push(thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    // Who is refused a place asks again.
                    if work().is_ok() {
                        answers.fetch_add(1, Ordering::Relaxed);
                    }
                    thread::sleep(PAUSE);
                }
                Ok(())
            }));
        };
        let (http, haproxy) = (stage.http, stage.haproxy);
        for path in ["/metrics", "/pressure", "/status", "/ready"] {
            spawn(Box::new(move || http::get(http, path, SOON).map(drop)));
        }
        spawn(Box::new(move || {
            let mut line = String::new();
            TcpStream::connect(haproxy)?.read_to_string(&mut line)?;
            Ok(())
        }));
        let socket = stage.directory.join("agent.sock");
        let ask = socket.clone();
        spawn(Box::new(move || {
            let mut stream = UnixStream::connect(&ask)?;
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
            answers,
            threads,
        }
    }

    fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    fn end(self) -> Result<()> {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("one of those who ask panicked"))??;
        }
        Ok(())
    }
}
