//! One run: the agent beside the servers, and its reports before, during and after the planted cause.

use std::{
    cell::RefCell,
    ffi::OsString,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use tailback_tests::{
    agent::{self, Agent, Event},
    lines::Lines,
    load::Load,
    process::End,
    temp::TempDir,
    wait,
};

use crate::table::Planted;

const TIME_LIMIT: Duration = Duration::from_secs(20);
/// Time that the healthy service is watched before the cause is planted: the agent learns its baseline, which takes at least 3 s.
const BASELINE_TIME: Duration = Duration::from_millis(4500);
/// A warning later than this after planting does not count.
const WARNING_LIMIT: Duration = Duration::from_secs(12);
/// The judged verdict is the first one reported at least this long after the warning.
const SETTLE_TIME: Duration = Duration::from_secs(4);
const RECOVERY_LIMIT: Duration = Duration::from_secs(20);
const CONFIG_FILE: &str = "tailback.toml";
/// Open episodes are re-reported every second, so that verdicts are seen as they change.
const CONFIG: &str = "[detect.all]\nrepeat_interval = \"1s\"\n";

/// The planted root cause, known only once the servers run.
#[derive(Clone, Debug, Default)]
pub struct Culprit {
    /// Any of these processes or threads counts.
    pub pids: Vec<u32>,
    /// So does any of these texts in a name or an endpoint.
    pub words: Vec<String>,
}

impl Culprit {
    pub fn process(pid: u32) -> Self {
        Self {
            pids: vec![pid],
            words: Vec::new(),
        }
    }

    /// A thread is identified by its tid, also where the culprit's `pid` is its process.
    pub fn thread(tid: u32) -> Self {
        Self {
            pids: vec![tid],
            words: vec![format!("({tid})")],
        }
    }

    /// A server, identified by its process or its port.
    pub fn server(pid: u32, port: u16) -> Self {
        Self {
            pids: vec![pid],
            words: vec![format!(":{port}")],
        }
    }

    pub fn or(mut self, word: &str) -> Self {
        self.words.push(word.to_owned());
        self
    }

    pub fn and(mut self, pids: impl IntoIterator<Item = u32>) -> Self {
        self.pids.extend(pids);
        self
    }
}

type Own = (Lines, fn(&str) -> bool);

/// The events and times of one run; [`crate::judge`] turns it into a row.
#[derive(Default)]
pub struct Story {
    pub events: Vec<Event>,
    pub watched: Option<Instant>,
    pub planted: Option<Instant>,
    pub removed: Option<Instant>,
    pub recovered: Option<Instant>,
    pub culprit: Culprit,
    /// The application's own message.
    pub own_message: Option<Instant>,
    /// The first request that failed after planting.
    pub failed: Option<Instant>,
    /// The recording of the run gives the same levels, episodes and causes.
    pub replayed: Option<bool>,
}

/// A run in progress.
pub struct Play {
    planted: Option<Planted>,
    record: PathBuf,
    directory: TempDir,
    agent: Option<Agent>,
    story: Story,
    own_messages: RefCell<Vec<Own>>,
}

impl Play {
    pub fn new(planted: Option<Planted>, record: Option<PathBuf>) -> Result<Self> {
        let directory = TempDir::new("scenario")?;
        Ok(Self {
            planted,
            record: record.unwrap_or_else(|| directory.path().join("run.tbk")),
            directory,
            agent: None,
            story: Story::default(),
            own_messages: RefCell::default(),
        })
    }

    /// Starts the agent on these targets: `["--pid", "812"]`. Returns when it has found one.
    pub fn watch(&mut self, args: &[&str]) -> Result<()> {
        let config = self.directory.write(CONFIG_FILE, CONFIG)?;
        let mut all: Vec<OsString> = args.iter().map(OsString::from).collect();
        all.extend(["--config".into(), config.into()]);
        all.extend(["--record".into(), self.record.clone().into()]);
        let agent = Agent::run(&all)?;
        agent.wait_for("its target", TIME_LIMIT, |event| event.is("target"))?;
        self.story.watched = Some(Instant::now());
        self.agent = Some(agent);
        Ok(())
    }

    pub fn watch_pid(&mut self, pid: u32) -> Result<()> {
        self.watch(&["--pid", &pid.to_string()])
    }

    /// Watches the healthy service under its normal load.
    pub fn healthy(&self) -> Result<()> {
        self.lasts(BASELINE_TIME)
    }

    /// Lets the load run for `time`; fails if the agent ends.
    pub fn lasts(&self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        let agent = self.agent()?;
        while Instant::now() < end {
            agent.process().check_running()?;
            thread::sleep(Duration::from_millis(50).min(end - Instant::now()));
        }
        Ok(())
    }

    /// Notes that the cause is planted now, and which culprit the verdict must name.
    pub fn planted(&mut self, culprit: Culprit) {
        self.story.culprit = culprit;
        self.story.planted.get_or_insert_with(Instant::now);
    }

    /// Lines in which the application itself reports the overload.
    pub fn watch_own_messages(&self, lines: &Lines, says: fn(&str) -> bool) {
        self.own_messages.borrow_mut().push((lines.clone(), says));
    }

    /// Waits for the warning, and then for a report of the episode after its verdict had time to settle. A missing warning
    /// is not an error of the scenario: the row shows it.
    pub fn hold(&self) -> Result<()> {
        let Some(planted) = self.planted else {
            return Ok(());
        };
        let since = self.story.planted.context("nothing was planted")?;
        let agent = self.agent()?;
        let is = |event: &Event, kind: &str| {
            event.at >= since && event.is(kind) && planted.queues.contains(&event.text("kind"))
        };
        let left = WARNING_LIMIT.saturating_sub(since.elapsed());
        let warned = agent.wait_for("that a queue is in trouble", left, |event| {
            is(event, "level") && event.text("to") != "ok"
        });
        agent.process().check_running()?;
        let Ok(warned) = warned else {
            return Ok(());
        };
        let settled = warned.at + SETTLE_TIME;
        // If the episode has ended on its own meanwhile, the row shows it.
        let _ = agent.wait_for("a report of the open episode", SETTLE_TIME * 2, |event| {
            is(event, "episode") && event.at >= settled
        });
        agent.process().check_running()
    }

    /// Notes that the cause is removed now, and the first request that failed before that.
    pub fn removing(&mut self, load: Option<&Load>) {
        if let Some(load) = load {
            let planted = self.story.planted;
            let done = load.done();
            let failed = done
                .iter()
                .filter(|request| !request.ok() && Some(request.ended) > planted);
            self.story.failed = failed.map(|request| request.ended).min();
        }
        self.story.removed = Some(Instant::now());
    }

    /// Waits until all episodes are over.
    pub fn recover(&mut self) -> Result<()> {
        let agent = self.agent()?;
        let over = wait::until("all episodes to end", RECOVERY_LIMIT, || {
            agent.process().check_running()?;
            let events = agent.events()?;
            Ok(open(&events).is_empty().then_some(()))
        });
        agent.process().check_running()?;
        self.story.recovered = over.is_ok().then(Instant::now);
        Ok(())
    }

    /// Stops the agent and returns the story.
    pub fn end(mut self) -> Result<Story> {
        let agent = self.agent.take().context("nothing was watched")?;
        self.story.events = agent.events()?;
        agent.process().signal(Signal::TERM)?;
        let end = agent.process().wait_end(TIME_LIMIT)?;
        ensure!(end == End::Code(0), "the agent ended with {end:?}");
        self.story.replayed = Some(self.replays()?);
        let planted = self.story.planted;
        for (lines, says) in self.own_messages.borrow().iter() {
            let all = lines.all();
            let own = all.iter().filter(|line| Some(line.at) > planted);
            let first = own
                .filter(|line| says(&line.text))
                .map(|line| line.at)
                .min();
            self.story.own_message = self.story.own_message.into_iter().chain(first).min();
        }
        Ok(self.story)
    }

    /// Whether the recording gives what the live run reported, event for event.
    fn replays(&self) -> Result<bool> {
        let output = Command::new(agent::binary()?)
            .args(["replay", "--json", "--config"])
            .arg(self.directory.path().join(CONFIG_FILE))
            .arg(&self.record)
            .output()
            .context("replay the run")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let values = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        let replayed: Vec<Value> = values.filter_map(verdict).collect();
        let live = self.story.events.iter().map(|event| event.value.clone());
        let live: Vec<Value> = live.filter_map(verdict).collect();
        // The replay goes on to the last sample; the events of the live run were taken before it ended.
        let same = replayed.iter().zip(&live).all(|(a, b)| a == b);
        Ok(same && replayed.len() >= live.len())
    }

    fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("nothing is watched yet")
    }
}

/// An event that the pipeline derives from samples alone, live or replayed. Without the two measures that recordings do not
/// contain (docs/reference/queues/inflight.md); no verdict uses them.
fn verdict(mut value: Value) -> Option<Value> {
    if !matches!(value["type"].as_str(), Some("level" | "episode" | "cause")) {
        return None;
    }
    if let Some(event) = value.as_object_mut() {
        event.remove("responses_per_s");
        event.remove("response_bytes_per_s");
    }
    Some(value)
}

/// Queues whose last reported level is not ok.
fn open(events: &[Event]) -> Vec<String> {
    let mut open: Vec<String> = Vec::new();
    for event in events.iter().filter(|event| event.is("level")) {
        let key = format!(
            "{} {} {}",
            event.value["pid"],
            event.text("kind"),
            event.text("name")
        );
        open.retain(|known| *known != key);
        if event.text("to") != "ok" && !is_over(events, event.text("episode")) {
            open.push(key);
        }
    }
    open
}

/// Whether an episode has ended. That of a queue that disappears ends without a level event.
fn is_over(events: &[Event], episode: &str) -> bool {
    events.iter().any(|event| {
        event.is("episode") && event.text("id") == episode && event.value.get("ongoing").is_none()
    })
}
