//! What the hooks of `--tier watch` cost: a pipe ping-pong, which does nothing but switch between two threads, and busy
//! servers; each of them watched, and beside an agent that watches another process. Another tool that measures waits for a
//! CPU is compared where it is installed.

use std::{
    cell::RefCell,
    env, fs,
    io::{self, PipeReader, PipeWriter, Read as _, Write as _},
    path::PathBuf,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use rustix::process::{Signal, set_parent_process_death_signal};
use serde_json::{Value, json};
use tailback_tests::{
    agent::{Agent, Event, HOOKS, hooks_in_use},
    process::Process,
    program,
    temp::TempDir,
    wait,
};

use super::{
    figure::{Goal, Report},
    overhead,
    pairs::{self, Companion, Count, Figures, Pair, Windows},
    pins::Pins,
    statistics::bootstrap,
};

/// Goals: at most this much throughput lost, in percent, by what is measured and whether it is watched.
const PING_PONG_GOALS: [f64; 2] = [8.0, 5.0];
/// See [`PING_PONG_GOALS`].
const SERVER_GOALS: [f64; 2] = [2.0, 1.0];
/// The hooks must not be detached because they are expensive: that is what is measured here.
const CONFIG: &str = "hook_budget = 0.5\n";
/// Names of a tool that measures waits for a CPU, as Debian installs it (libbpf-tools, bpfcc-tools).
const PEERS: &[&str] = &["runqlat", "runqlat-bpfcc"];
const START_DEADLINE: Duration = Duration::from_secs(30);

#[derive(clap::Args)]
pub struct Args {
    /// Pairs of windows, one with the hooks and one without, for each row
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u32).range(5..))]
    pairs: u32,
    #[command(flatten)]
    windows: Windows,
    /// What to measure [default: all]
    what: Vec<Subject>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Subject {
    PingPong,
    Redis,
    Nginx,
}

/// Two threads that wake each other up in turns, forever.
#[derive(clap::Args)]
pub struct PingPong {}

impl PingPong {
    /// Runs until this process or its parent is killed.
    #[expect(clippy::unused_self, reason = "the subcommand has no options")]
    pub fn forever(&self) -> Result<()> {
        set_parent_process_death_signal(Some(Signal::KILL))
            .context("set the parent death signal")?;
        let (ping, pong) = (pipe()?, pipe()?);
        let (mut ping_end, mut pong_end) = ((ping.0, pong.1), (pong.0, ping.1));
        thread::spawn(move || pass_on(&mut ping_end.0, &mut ping_end.1));
        pong_end.1.write_all(&[0]).context("write to a pipe")?;
        println!("playing");
        pass_on(&mut pong_end.0, &mut pong_end.1)
    }
}

fn pipe() -> Result<(PipeReader, PipeWriter)> {
    io::pipe().context("create a pipe")
}

fn pass_on(from: &mut PipeReader, to: &mut PipeWriter) -> Result<()> {
    let mut byte = [0];
    loop {
        from.read_exact(&mut byte).context("read from a pipe")?;
        to.write_all(&byte).context("write to a pipe")?;
    }
}

pub fn measure(args: &Args, report: &mut Report) -> Result<()> {
    let bench = Bench {
        args,
        program: super::agent()?,
        temp: TempDir::new("watch")?,
        programs: RefCell::default(),
    };
    let pins = Pins::choose();
    report.progress(&pins.text());
    let is_wanted = |subject| args.what.is_empty() || args.what.contains(&subject);
    if is_wanted(Subject::PingPong) {
        let mut words = vec![env::current_exe()?.display().to_string()];
        words.extend(["bench", "ping-pong"].map(str::to_owned));
        // Both threads on one CPU, so that each message is a switch.
        pins.pin(&mut words, Pins::SERVER);
        let service = Process::start("ping-pong", Command::new(&words[0]).args(&words[1..]))?;
        service.wait_line("playing", START_DEADLINE)?;
        let pid = service.pid();
        let mut count = || blocked_times(pid);
        let service = Service {
            name: "ping-pong",
            text: "pipe ping-pong on one CPU",
            goals: PING_PONG_GOALS,
            process: &service,
        };
        bench.compare(&service, &mut count, report)?;
    }
    if is_wanted(Subject::Redis) {
        overhead::with_redis(&pins, |process, text, count| {
            let service = Service {
                name: "redis",
                text,
                goals: SERVER_GOALS,
                process,
            };
            bench.compare(&service, count, report)
        })?;
    }
    if is_wanted(Subject::Nginx) {
        overhead::with_nginx(&pins, |process, text, count| {
            let service = Service {
                name: "nginx",
                text,
                goals: SERVER_GOALS,
                process,
            };
            bench.compare(&service, count, report)
        })?;
    }
    Ok(())
}

/// How often the first thread has blocked: once per round trip.
fn blocked_times(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    let count = line.context("the status has no voluntary switches")?.trim();
    count.parse().context("read the number of switches")
}

struct Service<'a> {
    name: &'a str,
    text: &'a str,
    goals: [f64; 2],
    process: &'a Process,
}

struct Bench<'a> {
    args: &'a Args,
    program: PathBuf,
    temp: TempDir,
    /// What each agent reported about its hooks at the end of its window.
    programs: RefCell<Vec<Value>>,
}

impl Bench<'_> {
    fn compare(
        &self,
        service: &Service<'_>,
        count: &mut Count<'_>,
        report: &mut Report,
    ) -> Result<()> {
        let pid = service.process.pid();
        let watched = self.pairs(service, count, report, || self.agent(pid))?;
        self.add(service, "watched", Some(service.goals[0]), &watched, report)?;
        self.add_hooks(service, report)?;
        if self.args.windows.control {
            return Ok(());
        }
        let other = Process::start("another process", Command::new("sleep").arg("86400"))?;
        let other = other.pid();
        let unwatched = self.pairs(service, count, report, || self.agent(other))?;
        self.programs.borrow_mut().clear();
        let what = "another process is watched";
        self.add(service, what, Some(service.goals[1]), &unwatched, report)?;
        let Some(peer) = program::find(PEERS) else {
            report.progress("no runqlat: Debian's libbpf-tools has it");
            return Ok(());
        };
        let with_peer = self.pairs(service, count, report, || Peer::start(&peer))?;
        self.add(service, "beside runqlat", None, &with_peer, report)
    }

    fn pairs<C: Companion>(
        &self,
        service: &Service<'_>,
        count: &mut Count<'_>,
        report: &Report,
        start: impl Fn() -> Result<C>,
    ) -> Result<Vec<Pair>> {
        let Args { windows, pairs, .. } = self.args;
        pairs::measure(windows, *pairs, service.process, count, start, report)
    }

    /// Starts an agent that watches a process, and waits until its hooks are attached.
    fn agent(&self, pid: u32) -> Result<HookedAgent<'_>> {
        let config = self.temp.write("watch.toml", CONFIG)?;
        let mut command = Command::new(&self.program);
        command.args([
            "run",
            "--json",
            "--tier",
            "watch",
            "--pid",
            &pid.to_string(),
        ]);
        command.arg("--config").arg(config);
        let agent = Agent::start(&mut command)?;
        wait::until("the hooks to be attached", START_DEADLINE, || {
            agent.process().check_running()?;
            let attached = hooks_in_use(agent.process().pid());
            Ok((attached == HOOKS).then_some(()))
        })?;
        Ok(HookedAgent { agent, bench: self })
    }

    /// Runs and CPU time of each hook, as the agent reports them.
    fn hooks(&self, agent: &Agent) -> Result<Value> {
        let output = Command::new(&self.program)
            .args(["status", "--json"])
            .env("RUNTIME_DIRECTORY", agent.run_directory())
            .output()
            .context("run tailback status")?;
        let text = String::from_utf8(output.stdout).context("the status is not text")?;
        let lines = text.lines().map(serde_json::from_str::<Value>);
        let lines = lines.collect::<Result<Vec<Value>, _>>()?;
        let hooks = lines.iter().map(|line| &line["hooks"]);
        let hooks = hooks.clone().find(|hooks| hooks.is_object());
        let hooks = hooks.with_context(|| format!("no hooks in the status: {text}"))?;
        ensure!(
            hooks["attached"] == true,
            "the hooks were detached: {hooks}"
        );
        Ok(hooks.clone())
    }

    fn add(
        &self,
        service: &Service<'_>,
        what: &str,
        goal: Option<f64>,
        pairs: &[Pair],
        report: &mut Report,
    ) -> Result<()> {
        let control = self.args.windows.control;
        let keys = |measured: &str| {
            json!({
                "bench": "watch", "measured": measured, "service": service.name, "with": what,
                "pairs": pairs.len(), "control": control,
            })
        };
        let what = format!("{}, {what}", service.text);
        let mut figures = Figures {
            what: &what,
            keys: &keys,
            pairs,
            report,
        };
        let loss = figures
            .spread(|pair| 100.0 * (1.0 - pair.on.requests_per_s / pair.off.requests_per_s))?;
        let goal = goal
            .filter(|_| !control)
            .map(|goal| Goal::at_most(goal, &loss));
        figures.add("throughput lost", "loss", "%", loss, goal);
        figures.add_circumstances(control)
    }

    /// Adds the price of a run of each hook, for a service that is watched.
    fn add_hooks(&self, service: &Service<'_>, report: &mut Report) -> Result<()> {
        let reports = self.programs.take();
        for hook in ["sched_switch", "sched_wakeup"] {
            let of_hook = reports.iter().filter_map(|hooks| {
                let programs = hooks["programs"].as_array()?;
                programs.iter().find(|program| program["name"] == hook)
            });
            let ns = of_hook.filter_map(|program| {
                let (ns, runs) = (program["cpu_ns"].as_f64()?, program["runs"].as_f64()?);
                (runs > 0.0).then(|| ns / runs)
            });
            let Some(ns) = bootstrap(&ns.collect::<Vec<f64>>()) else {
                continue;
            };
            let keys = |measured: &str| json!({"bench": "watch", "measured": measured, "service": service.name, "hook": hook});
            let mut figures = Figures {
                what: service.text,
                keys: &keys,
                pairs: &[],
                report,
            };
            let text = format!("{hook}, by the agent's account");
            figures.add(&text, "ns_per_run", "ns", ns, None);
        }
        Ok(())
    }
}

/// An agent whose hooks are attached.
struct HookedAgent<'a> {
    agent: Agent,
    bench: &'a Bench<'a>,
}

impl Companion for HookedAgent<'_> {
    fn process(&self) -> &Process {
        self.agent.process()
    }

    fn mark(&self) -> usize {
        self.agent.mark()
    }

    fn events_since(&self, mark: usize) -> Result<Vec<Event>> {
        self.agent.events_since(mark)
    }

    fn stop(self) -> Result<()> {
        let hooks = self.bench.hooks(&self.agent)?;
        self.bench.programs.borrow_mut().push(hooks);
        self.agent.stop()
    }
}

/// Another tool.
struct Peer(Process);

impl Peer {
    fn start(program: &std::path::Path) -> Result<Self> {
        // Line by line: into a pipe, it would keep its first line in a buffer.
        let mut command = Command::new(program::need(&["stdbuf"])?);
        // One report, long after the window.
        command.arg("-oL").arg(program).args(["3600", "1"]);
        let peer = Process::start("runqlat", &mut command)?;
        peer.wait_line("Tracing run queue latency", START_DEADLINE)?;
        Ok(Self(peer))
    }
}

impl Companion for Peer {
    fn process(&self) -> &Process {
        &self.0
    }

    fn stop(self) -> Result<()> {
        self.0.signal(Signal::INT)?;
        self.0.wait_end(START_DEADLINE)?;
        Ok(())
    }
}
