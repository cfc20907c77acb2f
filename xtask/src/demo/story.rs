//! What happens, in order, and how it is told. Where it does not happen, the error says what did.

use std::{
    env,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use rustix::process::Signal;
use tailback_tests::{
    agent::Event,
    lines::{Line, Stream},
    load::Request,
    process::End,
    uwsgi::says_full,
};

use super::{
    stage::{self, BACKLOG, PER_S, SLOW, Stage, WORK, WORKERS},
    timeline::{Colour, Timeline},
    words,
};

/// Of ordinary life, before anything happens: long enough for Tailback to learn what is usual.
const HEALTHY: Duration = Duration::from_secs(8);
/// After Redis became slow, until Tailback must have warned.
const WARNING: Duration = Duration::from_secs(15);
/// From then until uWSGI's queue must be full.
const FULL: Duration = Duration::from_secs(25);
/// Redis stays slow for so long after that, so that it can be seen what a full queue does.
const SUFFER: Duration = Duration::from_millis(1500);
/// After Redis is fast again, until the queue must have recovered.
const RECOVERY: Duration = Duration::from_secs(20);
/// A warning that comes later than this before the queue is full is of no use.
const LEAD: Duration = Duration::from_secs(3);

/// What the clients are asked about.
const RECENT: Duration = Duration::from_secs(3);

/// What was said so far about the service's accept queue.
#[derive(Default)]
struct Seen {
    /// The first level above ok.
    warning: Option<Event>,
    /// uWSGI's own words.
    full: Option<Line>,
    episode: Option<Event>,
}

struct Story {
    timeline: Timeline,
    stage: Stage,
    seen: Seen,
    agent_mark: usize,
    uwsgi_mark: usize,
}

pub fn tell(agent: &Path) -> Result<()> {
    let stage = Stage::set(agent)?;
    let mut story = Story {
        timeline: Timeline::start(),
        uwsgi_mark: stage.uwsgi.process().lines().count(),
        agent_mark: 0,
        seen: Seen::default(),
        stage,
    };
    story.opening();
    story.healthy(agent)?;
    story.filling()?;
    story.recovery()?;
    story.closing()
}

impl Story {
    fn opening(&self) {
        let share = 100.0 * PER_S / stage::capacity_per_s();
        self.demo(&format!(
            "uWSGI serves on port {}: {WORKERS} workers, a listen queue of {BACKLOG}; a request takes {} and \
             a call to Redis.",
            self.stage.uwsgi.port(),
            words::for_people(WORK),
        ));
        self.timeline.add(
            Colour::Plain,
            &format!("{PER_S} requests a second come in, {share:.0}% of what it can serve, whether it answers or not."),
        );
        self.timeline.add(
            Colour::Plain,
            "Tailback watches from outside; nothing in uWSGI or Redis knows of it.",
        );
    }

    fn healthy(&mut self, agent: &Path) -> Result<()> {
        let early = self.watch_until(HEALTHY, |seen| seen.warning.is_some())?;
        if early {
            bail!(
                "the demo did not go as it should: Tailback warned while all was well. Is this machine busy?"
            );
        }
        let queue = self.stage.sample(agent)?;
        self.tailback(
            Colour::Green,
            &format!("healthy   {}", words::depth(&queue)),
        );
        self.clients();
        Ok(())
    }

    fn filling(&mut self) -> Result<()> {
        let hog = self.stage.slow_redis()?;
        self.demo(&format!(
            "Redis becomes slow: a script keeps it busy for {} at a time, and every call waits for its end.",
            words::for_people(SLOW)
        ));
        if !self.watch_until(WARNING, |seen| seen.warning.is_some())? {
            bail!(
                "the demo did not go as it should: Tailback did not warn within {WARNING:?}, though {} of {BACKLOG} \
                 wait by uWSGI's own account",
                self.stage.uwsgi_queue()?
            );
        }
        if !self.watch_until(FULL, |seen| seen.full.is_some())? {
            bail!(
                "the demo did not go as it should: uWSGI's queue was not full within {FULL:?}; {} of {BACKLOG} wait",
                self.stage.uwsgi_queue()?
            );
        }
        let lead = self.lead()?;
        self.timeline.add(
            Colour::Cyan,
            &format!(
                "Tailback's warning came {} before this line.",
                words::for_people(lead)
            ),
        );
        self.watch_until(SUFFER, |_| false)?;
        self.clients();
        hog.stop()
    }

    /// From Tailback's first warning to uWSGI's line.
    fn lead(&self) -> Result<Duration> {
        let (Some(warning), Some(full)) = (&self.seen.warning, &self.seen.full) else {
            bail!(
                "the demo did not go as it should: there was no warning, or the queue was never full"
            );
        };
        let lead = full.at.saturating_duration_since(warning.at);
        if lead < LEAD {
            bail!(
                "the demo did not go as it should: Tailback's warning came only {} before uWSGI's queue was full",
                words::for_people(lead)
            );
        }
        Ok(lead)
    }

    fn recovery(&mut self) -> Result<()> {
        self.demo("Redis is fast again.");
        if !self.watch_until(RECOVERY, |seen| seen.episode.is_some())? {
            bail!(
                "the demo did not go as it should: Tailback's episode did not end within {RECOVERY:?}; {} of \
                 {BACKLOG} wait",
                self.stage.uwsgi_queue()?
            );
        }
        self.clients();
        Ok(())
    }

    fn closing(self) -> Result<()> {
        let mut service = String::new();
        let mut trace = None;
        if let Some(Event { at, value, .. }) = &self.seen.episode {
            self.timeline
                .tell(*at, "Tailback", Colour::Cyan, "The episode in short:");
            for (name, said) in words::summary(value) {
                self.timeline.add_row(name, &said);
            }
            service = words::text(value, "target").to_owned();
            trace = Some(words::text(value, "trace_id").to_owned()).filter(|id| !id.is_empty());
        }
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
        for row in words::where_to_look(endpoint.as_deref(), &service, trace.as_deref()) {
            self.timeline.remark(&row);
        }
        Ok(())
    }

    /// Tells what is said, until `enough` (true) or until the time is over (false).
    fn watch_until(&mut self, time: Duration, enough: impl Fn(&Seen) -> bool) -> Result<bool> {
        let end = Instant::now() + time;
        loop {
            self.tell_news()?;
            if enough(&self.seen) {
                return Ok(true);
            }
            if Instant::now() >= end {
                return Ok(false);
            }
            self.stage.check()?;
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What the agent and uWSGI said since the last time, in the order in which they did.
    fn tell_news(&mut self) -> Result<()> {
        let agent = self.stage.agent.process().lines().since(self.agent_mark);
        let uwsgi = self.stage.uwsgi.process().lines().since(self.uwsgi_mark);
        self.agent_mark += agent.len();
        self.uwsgi_mark += uwsgi.len();
        let mut news: Vec<(bool, Line)> = agent.into_iter().map(|line| (true, line)).collect();
        news.extend(uwsgi.into_iter().map(|line| (false, line)));
        news.sort_by_key(|(_, line)| line.at);
        for (from_agent, line) in news {
            match (from_agent, line.stream) {
                (true, Stream::Stdout) => self.hear_agent(Event::try_from(&line)?),
                (true, Stream::Stderr) => {}
                (false, _) => self.hear_uwsgi(line),
            }
        }
        Ok(())
    }

    fn hear_agent(&mut self, event: Event) {
        let accept = event.text("kind") == "accept";
        if event.is("level") {
            let to = event.text("to");
            self.timeline.tell(
                event.at,
                "Tailback",
                words::colour(to),
                &words::level(&event.value),
            );
            if accept && to != "ok" && self.seen.warning.is_none() {
                self.seen.warning = Some(event);
            }
        } else if event.is("episode") && accept && event.value["ongoing"] != true {
            self.seen.episode = Some(event);
        }
    }

    /// Only its first line about the full queue: it repeats it every second.
    fn hear_uwsgi(&mut self, line: Line) {
        if !says_full(&line) || self.seen.full.is_some() {
            return;
        }
        // Without the date that it may have put in front.
        let said = line
            .text
            .find("***")
            .map_or(line.text.as_str(), |start| &line.text[start..]);
        self.timeline.tell(line.at, "uWSGI", Colour::Red, said);
        self.seen.full = Some(line);
    }

    /// How the service looks to those who ask it.
    fn clients(&self) {
        let done = self.stage.answered(RECENT);
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
