//! A thread that sleeps again and again, and whose CPU another process computes on: its waits for the CPU and its sleeps, as the
//! hooks of `--tier watch` measure them one by one.

use std::{
    env, fs,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::{
    process::{Signal, nice, set_parent_process_death_signal},
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};
use serde_json::Value;
use tailback_tests::{
    agent::{self, HOOKS, attached_hooks},
    process::{End, Process},
    temp::TempDir,
    wait,
};

use crate::report::Report;

/// Makes this program act as the process that sleeps.
pub const FLAG: &str = "--sleep";
const SLEEPS: u32 = 200;
/// Largest nice value, sched(7).
const LOWEST_PRIORITY: i32 = 19;
/// What it prints at the end.
const SLEPT: &str = "slept";
/// The timer wakes it after this time, and at most 50 µs more (the default of PR_SET_TIMERSLACK).
const SLEEP: Duration = Duration::from_millis(5);
const DEADLINE: Duration = Duration::from_secs(90);
const QUANTITIES: [&str; 3] = ["run queue waits", "run queue wait", "blocked time"];

/// Wait for a CPU, ns, and dispatches of a thread (Documentation/scheduler/sched-stats.rst).
struct Schedstat {
    delay_ns: u64,
    dispatches: u64,
}

impl Schedstat {
    fn of(process: &str) -> Result<Self> {
        let file = format!("/proc/{process}/schedstat");
        let text = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
        let fields = text.split_whitespace().map(str::parse);
        let fields: Vec<u64> = fields.collect::<Result<_, _>>()?;
        let [_, delay_ns, dispatches] = fields[..] else {
            bail!("{file} holds {text:?}");
        };
        Ok(Self {
            delay_ns,
            dispatches,
        })
    }
}

/// Killed on drop.
struct Sleeper {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Sleeper {
    fn start() -> Result<Self> {
        let mut child = Command::new(env::current_exe().context("find this program")?)
            .arg(FLAG)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the process that sleeps")?;
        let stdin = child.stdin.take().context("it has no input")?;
        let stdout = child.stdout.take().context("it has no output")?;
        Ok(Self {
            child,
            stdin,
            stdout: BufReader::new(stdout),
        })
    }

    /// Lets it sleep [`SLEEPS`] times.
    fn sleep(&mut self) -> Result<()> {
        self.stdin.write_all(b"!").context("begin the sleeps")?;
        let mut line = String::new();
        let read = self.stdout.read_line(&mut line);
        read.context("wait for the end of the sleeps")?;
        ensure!(line.trim() == SLEPT, "unexpected line {line:?}");
        Ok(())
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Main function of the process that sleeps.
pub fn sleep() -> Result<bool> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("set the parent death signal")?;
    // So that it waits for milliseconds while the other process computes.
    let _ = nice(LOWEST_PRIORITY);
    let mut begin = [0];
    io::stdin()
        .read_exact(&mut begin)
        .context("wait to begin")?;
    for _ in 0..SLEEPS {
        thread::sleep(SLEEP);
    }
    println!("{SLEPT}");
    loop {
        thread::park();
    }
}

pub fn measure(report: &mut Report) -> Result<()> {
    if let Some(why) = unavailable()? {
        for quantity in QUANTITIES {
            report.absent(quantity, &why);
        }
        return Ok(());
    }
    let allowed = sched_getaffinity(None).context("read the CPU affinity")?;
    let cpu = (0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu));
    let mut one = CpuSet::new();
    one.set(cpu.context("the CPU affinity is empty")?);
    let mut sleeper = Sleeper::start()?;
    let pid = rustix::process::Pid::from_child(&sleeper.child);
    sched_setaffinity(Some(pid), &one).context("bind the process that sleeps to a CPU")?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            // Where binding fails, the other process waits less; the truth is still the kernel's account of it.
            let _ = sched_setaffinity(None, &one);
            while !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let compared = compare(report, &mut sleeper);
        done.store(true, Ordering::Relaxed);
        compared
    })
}

fn compare(report: &mut Report, sleeper: &mut Sleeper) -> Result<()> {
    let directory = TempDir::new("hooks")?;
    let config = directory.write("tailback.toml", "hook_budget = 0.5\n")?;
    let pid = sleeper.child.id().to_string();
    // Until it waits for the first byte, it may wait for the CPU, since before the hooks are attached.
    wait::until("the process to sleep", DEADLINE, || {
        let file = format!("/proc/{pid}/stat");
        let text = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
        Ok(text.contains(") S ").then_some(()))
    })?;
    let mut command = Command::new(agent::binary()?);
    // Until it is stopped.
    command.args(["diagnose", "--json", "--tier", "watch", "--for", "10min"]);
    command.args(["--pid", &pid, "--config"]).arg(&config);
    let agent = Process::start("tailback", &mut command)?;
    wait::until("the hooks to be attached", DEADLINE, || {
        agent.check_running()?;
        Ok((attached_hooks(agent.pid()) == HOOKS).then_some(()))
    })?;
    // It waits for the first byte, and after the last sleep forever.
    let before = Schedstat::of(&pid)?;
    sleeper.sleep()?;
    // So that the second in which the last waits ended is read.
    thread::sleep(Duration::from_secs(2));
    agent.signal(Signal::INT)?;
    let end = agent.wait_end(DEADLINE)?;
    let after = Schedstat::of(&pid)?;
    agent.lines().wait_end(DEADLINE)?;
    let lines = agent.lines().all();
    ensure!(
        end == End::Code(0),
        "tailback ended with {end:?}: {lines:?}"
    );
    let waits: Vec<Value> = lines
        .iter()
        .filter_map(|line| serde_json::from_str(&line.text).ok())
        .filter(|line: &Value| line["type"] == "exact_wait" && line["tgid"] == sleeper.child.id())
        .collect();
    let note = format!("{waits:?}");
    let sum = |key: &str, is: &dyn Fn(&Value) -> bool| -> f64 {
        let values = waits.iter().filter(|wait| is(wait));
        values.filter_map(|wait| wait[key].as_f64()).sum()
    };
    let for_cpu = |wait: &Value| wait["kind"] == "run_queue";
    let asleep = |wait: &&Value| wait["call"] == "clock_nanosleep" || wait["call"] == "nanosleep";
    let dispatches = (after.dispatches - before.dispatches) as f64;
    let count = sum("count", &for_cpu);
    report.compare("run queue waits", dispatches, Some(count), &note);
    let delay_ns = (after.delay_ns - before.delay_ns) as f64;
    let mean_ns = (count > 0.0).then(|| sum("total_ns", &for_cpu) / count);
    report.compare("run queue wait", delay_ns / dispatches, mean_ns, &note);
    // The median: a machine that pauses lengthens some.
    let median_ns = waits
        .iter()
        .find(asleep)
        .and_then(|wait| wait["p50_ns"].as_f64());
    report.compare("blocked time", SLEEP.as_nanos() as f64, median_ns, &note);
    Ok(())
}

/// Why this kernel does not accept the hooks, according to `doctor`.
fn unavailable() -> Result<Option<String>> {
    let output = Command::new(agent::binary()?)
        .args(["doctor", "--json"])
        .output();
    let text = String::from_utf8(output.context("run doctor")?.stdout)?;
    let checks = text.lines().map(serde_json::from_str::<Value>);
    let checks = checks.collect::<Result<Vec<_>, _>>()?;
    let check = checks.iter().find(|check| check["name"] == "exact waits");
    let check = check.with_context(|| format!("doctor does not report exact waits: {text}"))?;
    Ok(check["why"].as_str().map(str::to_owned))
}
