//! One run: the agent beside the servers, and what it says before, while and after the cause is there.

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

const SOON: Duration = Duration::from_secs(20);
/// How long a healthy service is watched before anything happens to it: the agent learns what is usual.
const HEALTHY: Duration = Duration::from_secs(6);
/// A warning that comes later than this is none.
const WARNING: Duration = Duration::from_secs(12);
/// The verdict that counts is told at least so long after the warning.
const SETTLED: Duration = Duration::from_secs(4);
const RECOVERY: Duration = Duration::from_secs(20);
/// What is worth a closer look is told so often.
const CONFIG_FILE: &str = "tailback.toml";
const CONFIG: &str = "[detect.all]\nrepeat_interval = \"1s\"\n";

/// Who stands at the head of the jam, known only when the servers run.
#[derive(Clone, Debug, Default)]
pub struct Culprit {
    /// Any of these processes or threads.
    pub pids: Vec<u32>,
    /// Or any of these in a name or an endpoint.
    pub words: Vec<String>,
}

impl Culprit {
    pub fn process(pid: u32) -> Self {
        Self {
            pids: vec![pid],
            words: Vec::new(),
        }
    }

    /// A thread is named by its own number, also where the culprit's `pid` is its process.
    pub fn thread(tid: u32) -> Self {
        Self {
            pids: vec![tid],
            words: vec![format!("({tid})")],
        }
    }

    /// A server: by its process, or by where it listens.
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

/// All that is noted of one run; [`crate::judge`] makes a row of it.
#[derive(Default)]
pub struct Story {
    pub events: Vec<Event>,
    pub watched: Option<Instant>,
    pub planted: Option<Instant>,
    pub removed: Option<Instant>,
    pub recovered: Option<Instant>,
    pub culprit: Culprit,
    /// The application's own message.
    pub said: Option<Instant>,
    /// The first request that failed after planting.
    pub failed: Option<Instant>,
    /// The recording of the run gives the same levels, episodes and causes.
    pub replayed: Option<bool>,
}

/// A story under way.
pub struct Play {
    planted: Option<Planted>,
    record: PathBuf,
    folder: TempDir,
    agent: Option<Agent>,
    story: Story,
    own: RefCell<Vec<Own>>,
}

impl Play {
    pub fn new(planted: Option<Planted>, record: Option<PathBuf>) -> Result<Self> {
        let folder = TempDir::new("scenario")?;
        Ok(Self {
            planted,
            record: record.unwrap_or_else(|| folder.path().join("run.tbk")),
            folder,
            agent: None,
            story: Story::default(),
            own: RefCell::default(),
        })
    }

    /// Starts the agent on these targets: `["--pid", "812"]`. It has found `targets` of them.
    pub fn watch(&mut self, args: &[&str]) -> Result<()> {
        let config = self.folder.write(CONFIG_FILE, CONFIG)?;
        let mut all: Vec<OsString> = args.iter().map(OsString::from).collect();
        all.extend(["--config".into(), config.into()]);
        all.extend(["--record".into(), self.record.clone().into()]);
        let agent = Agent::run(&all)?;
        agent.wait_for("whom it watches", SOON, |event| event.is("target"))?;
        self.story.watched = Some(Instant::now());
        self.agent = Some(agent);
        Ok(())
    }

    pub fn watch_pid(&mut self, pid: u32) -> Result<()> {
        self.watch(&["--pid", &pid.to_string()])
    }

    /// A healthy service, watched under its usual load.
    pub fn healthy(&self) -> Result<()> {
        self.lasts(HEALTHY)
    }

    /// The load goes on for so long, unless the agent ends.
    pub fn lasts(&self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        let agent = self.agent()?;
        while Instant::now() < end {
            agent.process().check_running()?;
            thread::sleep(Duration::from_millis(50).min(end - Instant::now()));
        }
        Ok(())
    }

    /// The cause is there from now on, and this is who is to be named.
    pub fn planted(&mut self, culprit: Culprit) {
        self.story.culprit = culprit;
        self.story.planted.get_or_insert_with(Instant::now);
    }

    /// What the application itself says when it is too late.
    pub fn own_words(&self, lines: &Lines, says: fn(&str) -> bool) {
        self.own.borrow_mut().push((lines.clone(), says));
    }

    /// Waits for the warning, and then until the episode has been told once more when its verdict had time to settle.
    /// Without a warning it returns, too: that is the row's fault, not an error of the scenario.
    pub fn hold(&self) -> Result<()> {
        let Some(planted) = self.planted else {
            return Ok(());
        };
        let since = self.story.planted.context("nothing was planted")?;
        let agent = self.agent()?;
        let is = |event: &Event, kind: &str| {
            event.at >= since && event.is(kind) && planted.queues.contains(&event.text("kind"))
        };
        let left = WARNING.saturating_sub(since.elapsed());
        let warned = agent.wait_for("that a queue is in trouble", left, |event| {
            is(event, "level") && event.text("to") != "ok"
        });
        agent.process().check_running()?;
        let Ok(warned) = warned else {
            return Ok(());
        };
        let settled = warned.at + SETTLED;
        // An episode that has ended by itself meanwhile is the row's fault again.
        let _ = agent.wait_for("the episode's standing", SETTLED * 2, |event| {
            is(event, "episode") && event.at >= settled
        });
        agent.process().check_running()
    }

    /// The cause is to go now: what callers saw of it is noted first.
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
        let over = wait::until("all episodes to end", RECOVERY, || {
            agent.process().check_running()?;
            let events = agent.events()?;
            Ok(open(&events).is_empty().then_some(()))
        });
        agent.process().check_running()?;
        self.story.recovered = over.is_ok().then(Instant::now);
        Ok(())
    }

    /// Ends the agent, and hands out what there is to judge.
    pub fn end(mut self) -> Result<Story> {
        let agent = self.agent.take().context("nothing was watched")?;
        self.story.events = agent.events()?;
        agent.process().signal(Signal::TERM)?;
        let end = agent.process().wait_end(SOON)?;
        ensure!(end == End::Code(0), "the agent ended with {end:?}");
        self.story.replayed = Some(self.replays()?);
        let planted = self.story.planted;
        for (lines, says) in self.own.borrow().iter() {
            let all = lines.all();
            let own = all.iter().filter(|line| Some(line.at) > planted);
            let first = own
                .filter(|line| says(&line.text))
                .map(|line| line.at)
                .min();
            self.story.said = self.story.said.into_iter().chain(first).min();
        }
        Ok(self.story)
    }

    /// Whether the recording gives what the live run reported, event for event.
    fn replays(&self) -> Result<bool> {
        let output = Command::new(agent::binary()?)
            .args(["replay", "--json", "--config"])
            .arg(self.folder.path().join(CONFIG_FILE))
            .arg(&self.record)
            .output()
            .context("replay the run")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let values = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        let replayed: Vec<Value> = values.filter(is_verdict).collect();
        let live = self.story.events.iter().map(|event| &event.value);
        let live: Vec<&Value> = live.filter(|value| is_verdict(value)).collect();
        // The replay goes on to the last sample; the events of the live run were taken before it ended.
        let same = replayed.iter().zip(&live).all(|(a, b)| a == *b);
        Ok(same && replayed.len() >= live.len())
    }

    fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("nothing is watched yet")
    }
}

/// What the pipeline makes of samples: it must not depend on whether they are live.
fn is_verdict(value: &Value) -> bool {
    matches!(value["type"].as_str(), Some("level" | "episode" | "cause"))
}

/// Queues that are not at ok by the last word about them.
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

/// A queue that is gone ends its episode without a level.
fn is_over(events: &[Event], episode: &str) -> bool {
    events.iter().any(|event| {
        event.is("episode") && event.text("id") == episode && event.value.get("ongoing").is_none()
    })
}
