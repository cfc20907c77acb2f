//! What happens, in order, and how it is told. Where it does not happen, the error says what did.

use std::{
    env,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::process::Signal;
use tailback_tests::{
    agent::Event,
    lines::{Line, Stream},
    load::Request,
    process::End,
};

use super::{
    heard::Heard,
    scene::{Look, Scene},
    stage::{self, Diagnosis, Stage},
    timeline::{Colour, Timeline},
    words,
};

/// Of ordinary life, before anything happens: long enough for Tailback to learn what is usual.
const HEALTHY: Duration = Duration::from_secs(7);
/// After the cause is there, until Tailback must have warned.
const WARNING: Duration = Duration::from_secs(12);
/// From then until it must have said why.
const CAUSE: Duration = Duration::from_secs(8);
/// The longest look of a report, and what it takes to start and to end.
const REPORT: Duration = Duration::from_secs(15);
/// From then until the application must have said itself that its queue is full.
const FULL: Duration = Duration::from_secs(15);
/// The cause stays for so long after that, so that it can be seen what it does.
const SUFFER: Duration = Duration::from_millis(1500);
/// After the cause is gone, until all must have recovered.
const RECOVERY: Duration = Duration::from_secs(20);
/// And of ordinary life after that.
const WELL: Duration = Duration::from_secs(3);
/// A warning that comes later than this before the queue is full is of no use.
const LEAD: Duration = Duration::from_secs(3);

/// What the clients are asked about.
const RECENT: Duration = Duration::from_secs(3);

struct Story {
    timeline: Timeline,
    stage: Stage,
    heard: Heard,
    asked: Option<Diagnosis>,
    agent_mark: usize,
    own_mark: usize,
}

/// `command` is how one starts this demo.
pub fn tell(tailback: &Path, scene: Box<dyn Scene>, command: &str) -> Result<()> {
    let own_mark = scene
        .own_words()
        .map_or(0, |(process, _)| process.lines().count());
    let queues = scene.queues();
    let stage = Stage::set(tailback, scene)?;
    let mut story = Story {
        timeline: Timeline::start(),
        own_mark,
        agent_mark: 0,
        heard: Heard::of(queues),
        asked: None,
        stage,
    };
    story.opening();
    story.healthy()?;
    story.filling()?;
    story.recovery()?;
    story.closing(command)
}

impl Story {
    fn opening(&self) {
        let mut opening = self.stage.scene.opening();
        opening.push("Tailback watches from outside; none of them knows of it.".to_owned());
        for (row, text) in opening.iter().enumerate() {
            match row {
                0 => self.demo(text),
                _ => self.timeline.add(Colour::Plain, text),
            }
        }
    }

    fn healthy(&mut self) -> Result<()> {
        if let Look::FromTheStart(time) = self.stage.scene.look() {
            self.ask(time)?;
        }
        if self.watch_until(HEALTHY, |heard| Ok(heard.warning.is_some()))? {
            bail!(
                "the demo did not go as it should: Tailback warned while all was well. Is this machine busy?"
            );
        }
        let sample = words::sample(&self.stage.sample()?);
        self.tailback(Colour::Green, &format!("healthy   {sample}"));
        self.clients();
        Ok(())
    }

    fn filling(&mut self) -> Result<()> {
        let planted = self.stage.scene.plant()?;
        self.heard.culprit = Some(planted.culprit);
        self.demo(&planted.told);
        if !self.watch_until(WARNING, |heard| Ok(heard.warning.is_some()))? {
            bail!(
                "the demo did not go as it should: Tailback did not warn within {WARNING:?}: {}",
                self.sampled()
            );
        }
        if !self.watch_until(CAUSE, |heard| Ok(heard.cause.is_some()))? {
            bail!(
                "the demo did not go as it should: Tailback did not name process {} within {CAUSE:?}: {}",
                planted.culprit,
                self.sampled()
            );
        }
        self.diagnosis(planted.culprit)?;
        self.too_late()?;
        self.watch_until(SUFFER, |_| Ok(false))?;
        self.clients();
        Ok(())
    }

    fn ask(&mut self, time: &str) -> Result<()> {
        let asked = self.stage.diagnose(time)?;
        let text = format!("$ {}", asked.command);
        self.timeline
            .tell(Instant::now(), "shell", Colour::Cyan, &text);
        self.asked = Some(asked);
        Ok(())
    }

    /// What a person reads who asks why, while it goes on.
    fn diagnosis(&mut self, culprit: u32) -> Result<()> {
        if let Look::WhenItIsLate(time) = self.stage.scene.look() {
            self.ask(time)?;
        }
        let asked = self.asked.take().context("nobody asked why")?;
        if !self.watch_until(REPORT, |_| asked.is_done())? {
            bail!("`{}` did not answer within {REPORT:?}", asked.command);
        }
        let report = Diagnosis::report(asked)?;
        self.timeline.remark("");
        for line in &report {
            self.timeline.remark(line);
        }
        self.timeline.remark("");
        if !report
            .iter()
            .any(|line| line.contains(&format!("({culprit})")))
        {
            bail!("the demo did not go as it should: the report does not name process {culprit}");
        }
        Ok(())
    }

    /// The application says itself that it is full, where it says such things.
    fn too_late(&mut self) -> Result<()> {
        let Some((process, _)) = self.stage.scene.own_words() else {
            return Ok(());
        };
        let name = process.name().to_owned();
        if !self.watch_until(FULL, |heard| Ok(heard.full.is_some()))? {
            bail!(
                "the demo did not go as it should: {name} did not say within {FULL:?} that its queue is full: {}",
                self.sampled()
            );
        }
        let full = self.heard.full.as_ref();
        let lead = full.and_then(|full| self.heard.lead(full.at));
        let lead = words::for_people(lead.filter(|lead| *lead >= LEAD).with_context(|| {
            format!(
                "the demo did not go as it should: Tailback did not warn {} before {name} said that its queue is full",
                words::for_people(LEAD)
            )
        })?);
        let text = format!("Tailback's warning came {lead} before what {name} says.");
        self.timeline.add(Colour::Cyan, &text);
        Ok(())
    }

    fn recovery(&mut self) -> Result<()> {
        let told = self.stage.scene.remove()?;
        self.demo(&told);
        if !self.watch_until(RECOVERY, |heard| Ok(heard.recovered()))? {
            bail!(
                "the demo did not go as it should: not all episodes ended within {RECOVERY:?}: {}",
                self.sampled()
            );
        }
        // Long enough that the clients tell of nothing but this.
        self.watch_until(WELL, |_| Ok(false))?;
        self.clients();
        Ok(())
    }

    fn closing(self, command: &str) -> Result<()> {
        for Event { value, .. } in &self.heard.over {
            let text = format!(
                "In short, {} {} {}:",
                words::text(value, "target"),
                words::text(value, "kind"),
                words::text(value, "name")
            );
            self.tailback(Colour::Cyan, &text);
            for (name, said) in words::summary(value) {
                self.timeline.add_row(name, &said);
            }
        }
        let episode = self.heard.over.first().context("no episode was told")?;
        let (service, trace) = (episode.text("target"), episode.text("trace_id"));
        // As a person would: it sends what it still has to send, and leaves.
        let agent = self.stage.agent.into_process();
        agent.signal(Signal::INT)?;
        let end = agent.wait_end(Duration::from_secs(15))?;
        if end != End::Code(0) {
            bail!("tailback ended with {end:?}:\n{}", stage::errors_of(&agent));
        }
        self.timeline.remark("");
        let endpoint = [
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            "OTEL_EXPORTER_OTLP_ENDPOINT",
        ]
        .iter()
        .find_map(|name| env::var(name).ok())
        .filter(|endpoint| !endpoint.is_empty());
        let trace = Some(trace).filter(|id| !id.is_empty());
        for row in words::where_to_look(endpoint.as_deref(), service, trace, command) {
            self.timeline.remark(&row);
        }
        Ok(())
    }

    /// Tells what is said, until `enough` (true) or until the time is over (false).
    fn watch_until(
        &mut self,
        time: Duration,
        enough: impl Fn(&Heard) -> Result<bool>,
    ) -> Result<bool> {
        let end = Instant::now() + time;
        loop {
            self.tell_news()?;
            if enough(&self.heard)? {
                return Ok(true);
            }
            if Instant::now() >= end {
                return Ok(false);
            }
            self.stage.check()?;
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What the agent and the application said since the last time, in the order in which they did.
    fn tell_news(&mut self) -> Result<()> {
        let agent = self.stage.agent.process().lines().since(self.agent_mark);
        let own = self.stage.scene.own_words();
        let own = own.map_or(Vec::new(), |(process, _)| {
            process.lines().since(self.own_mark)
        });
        self.agent_mark += agent.len();
        self.own_mark += own.len();
        let mut news: Vec<(bool, Line)> = agent.into_iter().map(|line| (true, line)).collect();
        news.extend(own.into_iter().map(|line| (false, line)));
        news.sort_by_key(|(_, line)| line.at);
        for (from_agent, line) in news {
            match (from_agent, line.stream) {
                (true, Stream::Stdout) => self.hear_agent(&Event::try_from(&line)?),
                (true, Stream::Stderr) => {}
                (false, _) => self.hear_own(line),
            }
        }
        Ok(())
    }

    /// Of the queues that the story is about; a cause again only where it is another one.
    fn hear_agent(&mut self, event: &Event) {
        let news = self.heard.take(event);
        if !news {
            return;
        }
        let at = event.at;
        if event.is("level") {
            let colour = words::colour(event.text("to"));
            let text = words::level(&event.value);
            self.timeline.tell(at, "Tailback", colour, &text);
        } else if event.is("cause") {
            let text = words::cause(&event.value);
            self.timeline.tell(at, "Tailback", Colour::Magenta, &text);
            self.timeline.add(Colour::Plain, event.text("evidence"));
        }
    }

    /// Only its first line about the full queue: it repeats it every second.
    fn hear_own(&mut self, line: Line) {
        let Some((process, is_full)) = self.stage.scene.own_words() else {
            return;
        };
        if !is_full(&line) || self.heard.full.is_some() {
            return;
        }
        // Without the date that it may have put in front.
        let said = line
            .text
            .find("***")
            .map_or(line.text.as_str(), |start| &line.text[start..]);
        self.timeline
            .tell(line.at, process.name(), Colour::Red, said);
        self.heard.full = Some(line);
    }

    /// For an error: how full the queues are.
    fn sampled(&self) -> String {
        let kinds = self.stage.scene.queues();
        match self.stage.sample() {
            Ok(queues) => {
                let ours = queues
                    .iter()
                    .filter(|queue| kinds.contains(&words::text(queue, "kind")));
                let ours: Vec<String> = ours.map(words::queue).collect();
                ours.join(", ")
            }
            Err(error) => format!("{error:#}"),
        }
    }

    /// How the service looks to those who ask it.
    fn clients(&self) {
        let Some(load) = self.stage.scene.load() else {
            return;
        };
        let mut done = load.done();
        done.retain(|request| request.ended.elapsed() < RECENT);
        let mut took: Vec<Duration> = done
            .iter()
            .filter(|request| request.ok())
            .map(Request::took)
            .collect();
        took.sort();
        let failed = done.len() - took.len();
        let window = RECENT.as_secs();
        let mut said = match took.get(took.len() / 2) {
            Some(median) => format!(
                "{} answers a second, each after {} (median of the last {window} s)",
                took.len() as u64 / window,
                words::for_people(*median),
            ),
            None => format!("no answer in the last {window} s"),
        };
        if failed > 0 {
            said += &format!("; {failed} requests failed");
        }
        self.timeline
            .tell(Instant::now(), "clients", Colour::Dim, &said);
    }

    fn demo(&self, text: &str) {
        self.timeline
            .tell(Instant::now(), "demo", Colour::Cyan, text);
    }

    fn tailback(&self, colour: Colour, text: &str) {
        self.timeline.tell(Instant::now(), "Tailback", colour, text);
    }
}
