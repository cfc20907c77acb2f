//! Runs the phases of the demo and prints them. If a phase does not go as planned, the error reports what happened instead.

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
    observed::Observed,
    phrases,
    scene::{Diagnose, Scene},
    stage::{self, Diagnosis, Stage},
    timeline::{Colour, Timeline},
};

/// Healthy phase, long enough for Tailback to learn the baseline.
const HEALTHY: Duration = Duration::from_secs(7);
/// Maximum time from the fault to the warning.
const WARNING: Duration = Duration::from_secs(12);
/// Maximum time from the warning to the cause.
const CAUSE: Duration = Duration::from_secs(8);
/// Maximum run time of `tailback diagnose`, including start and exit.
const REPORT: Duration = Duration::from_secs(15);
/// Maximum time until the application itself reports its full queue.
const FULL: Duration = Duration::from_secs(15);
/// The fault stays this long after that, so that its effect on clients is visible.
const IMPACT: Duration = Duration::from_millis(1500);
/// Maximum time from the removal of the fault to full recovery.
const RECOVERY: Duration = Duration::from_secs(20);
/// Healthy phase after the recovery.
const AFTER_RECOVERY: Duration = Duration::from_secs(3);
/// Minimum lead time of the warning before the queue is full.
const MIN_LEAD: Duration = Duration::from_secs(3);

/// Window of the client statistics.
const CLIENT_WINDOW: Duration = Duration::from_secs(3);

struct Story {
    timeline: Timeline,
    stage: Stage,
    observed: Observed,
    diagnosis: Option<Diagnosis>,
    agent_mark: usize,
    own_mark: usize,
}

/// Runs the demo. `command` starts it, for the closing hint.
pub fn run(tailback: &Path, scene: Box<dyn Scene>, command: &str) -> Result<()> {
    let own_mark = scene
        .own_report()
        .map_or(0, |(process, _)| process.lines().count());
    let queues = scene.queues();
    let stage = Stage::set(tailback, scene)?;
    let mut story = Story {
        timeline: Timeline::start(),
        own_mark,
        agent_mark: 0,
        observed: Observed::of(queues),
        diagnosis: None,
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
        opening.push("Tailback monitors from outside; no process is modified.".to_owned());
        for (row, text) in opening.iter().enumerate() {
            match row {
                0 => self.demo(text),
                _ => self.timeline.add(Colour::Plain, text),
            }
        }
    }

    fn healthy(&mut self) -> Result<()> {
        if let Diagnose::FromStart(time) = self.stage.scene.diagnosis() {
            self.start_diagnosis(time)?;
        }
        if self.watch_until(HEALTHY, |observed| Ok(observed.warning.is_some()))? {
            bail!("the demo failed: Tailback warned in the healthy phase. Is this machine busy?");
        }
        let sample = phrases::sample(&self.stage.sample()?);
        self.tailback(Colour::Green, &format!("healthy   {sample}"));
        self.clients();
        Ok(())
    }

    fn filling(&mut self) -> Result<()> {
        let planted = self.stage.scene.plant()?;
        self.observed.culprit = Some(planted.culprit);
        self.demo(&planted.text);
        if !self.watch_until(WARNING, |observed| Ok(observed.warning.is_some()))? {
            bail!(
                "the demo failed: Tailback did not warn within {WARNING:?}: {}",
                self.sampled()
            );
        }
        if !self.watch_until(CAUSE, |observed| Ok(observed.cause.is_some()))? {
            bail!(
                "the demo failed: Tailback did not name process {} within {CAUSE:?}: {}",
                planted.culprit,
                self.sampled()
            );
        }
        self.print_diagnosis(planted.culprit)?;
        self.own_report()?;
        self.watch_until(IMPACT, |_| Ok(false))?;
        self.clients();
        Ok(())
    }

    fn start_diagnosis(&mut self, time: &str) -> Result<()> {
        let diagnosis = self.stage.diagnose(time)?;
        let text = format!("$ {}", diagnosis.command);
        self.timeline
            .entry(Instant::now(), "shell", Colour::Cyan, &text);
        self.diagnosis = Some(diagnosis);
        Ok(())
    }

    /// Prints the report of `tailback diagnose`, and checks that it names the culprit.
    fn print_diagnosis(&mut self, culprit: u32) -> Result<()> {
        if let Diagnose::AfterCause(time) = self.stage.scene.diagnosis() {
            self.start_diagnosis(time)?;
        }
        let diagnosis = self.diagnosis.take().context("diagnose was not started")?;
        if !self.watch_until(REPORT, |_| diagnosis.is_done())? {
            bail!("`{}` did not end within {REPORT:?}", diagnosis.command);
        }
        let report = Diagnosis::report(diagnosis)?;
        self.timeline.remark("");
        for line in &report {
            self.timeline.remark(line);
        }
        self.timeline.remark("");
        if !report
            .iter()
            .any(|line| line.contains(&format!("({culprit})")))
        {
            bail!("the demo failed: the report does not name process {culprit}");
        }
        Ok(())
    }

    /// Waits for the application's own report of a full queue, if it makes one, and checks the lead time.
    fn own_report(&mut self) -> Result<()> {
        let Some((process, _)) = self.stage.scene.own_report() else {
            return Ok(());
        };
        let name = process.name().to_owned();
        if !self.watch_until(FULL, |observed| Ok(observed.full.is_some()))? {
            bail!(
                "the demo failed: {name} did not report a full queue within {FULL:?}: {}",
                self.sampled()
            );
        }
        let full = self.observed.full.as_ref();
        let lead = full.and_then(|full| self.observed.lead(full.at));
        let lead =
            phrases::duration_text(lead.filter(|lead| *lead >= MIN_LEAD).with_context(|| {
                format!(
                    "the demo failed: Tailback did not warn {} before {name} reported a full queue",
                    phrases::duration_text(MIN_LEAD)
                )
            })?);
        let text = format!("Tailback warned {lead} before {name}.");
        self.timeline.add(Colour::Cyan, &text);
        Ok(())
    }

    fn recovery(&mut self) -> Result<()> {
        let text = self.stage.scene.remove()?;
        self.demo(&text);
        if !self.watch_until(RECOVERY, |observed| Ok(observed.recovered()))? {
            bail!(
                "the demo failed: not every episode ended within {RECOVERY:?}: {}",
                self.sampled()
            );
        }
        // Long enough that the client statistics cover only this phase.
        self.watch_until(AFTER_RECOVERY, |_| Ok(false))?;
        self.clients();
        Ok(())
    }

    fn closing(self, command: &str) -> Result<()> {
        for Event { value, .. } in &self.observed.over {
            let text = format!(
                "Summary of {} {} {}:",
                phrases::text(value, "target"),
                phrases::text(value, "kind"),
                phrases::text(value, "name")
            );
            self.tailback(Colour::Cyan, &text);
            for (name, text) in phrases::summary(value) {
                self.timeline.add_row(name, &text);
            }
        }
        let episode = self
            .observed
            .over
            .first()
            .context("no episode was reported")?;
        let (service, trace) = (episode.text("target"), episode.text("trace_id"));
        // Ctrl-C: the agent delivers pending spans and exits.
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
        for row in phrases::trace_hint(endpoint.as_deref(), service, trace, command) {
            self.timeline.remark(&row);
        }
        Ok(())
    }

    /// Prints new output until `enough` holds (true) or the time is over (false).
    fn watch_until(
        &mut self,
        time: Duration,
        enough: impl Fn(&Observed) -> Result<bool>,
    ) -> Result<bool> {
        let end = Instant::now() + time;
        loop {
            self.print_new_output()?;
            if enough(&self.observed)? {
                return Ok(true);
            }
            if Instant::now() >= end {
                return Ok(false);
            }
            self.stage.check()?;
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Prints new lines of the agent and the application, by time.
    fn print_new_output(&mut self) -> Result<()> {
        let agent = self.stage.agent.process().lines().since(self.agent_mark);
        let own = self.stage.scene.own_report();
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
                (true, Stream::Stdout) => self.handle_event(&Event::try_from(&line)?),
                (true, Stream::Stderr) => {}
                (false, _) => self.handle_own_line(line),
            }
        }
        Ok(())
    }

    /// Prints events about the queues of the demo; a cause only when it changes.
    fn handle_event(&mut self, event: &Event) {
        let news = self.observed.take(event);
        if !news {
            return;
        }
        let at = event.at;
        if event.is("level") {
            let colour = phrases::colour(event.text("to"));
            let text = phrases::level(&event.value);
            self.timeline.entry(at, "Tailback", colour, &text);
        } else if event.is("cause") {
            let text = phrases::cause(&event.value);
            self.timeline.entry(at, "Tailback", Colour::Magenta, &text);
            self.timeline.add(Colour::Plain, event.text("evidence"));
        }
    }

    /// Prints only the application's first line about a full queue, which it repeats every second.
    fn handle_own_line(&mut self, line: Line) {
        let Some((process, is_full)) = self.stage.scene.own_report() else {
            return;
        };
        if !is_full(&line) || self.observed.full.is_some() {
            return;
        }
        // Without the date prefix.
        let text = line
            .text
            .find("***")
            .map_or(line.text.as_str(), |start| &line.text[start..]);
        self.timeline
            .entry(line.at, process.name(), Colour::Red, text);
        self.observed.full = Some(line);
    }

    /// State of the queues, for error messages.
    fn sampled(&self) -> String {
        let kinds = self.stage.scene.queues();
        match self.stage.sample() {
            Ok(queues) => {
                let ours = queues
                    .iter()
                    .filter(|queue| kinds.contains(&phrases::text(queue, "kind")));
                let ours: Vec<String> = ours.map(phrases::queue).collect();
                ours.join(", ")
            }
            Err(error) => format!("{error:#}"),
        }
    }

    /// Prints the latency and throughput that clients see.
    fn clients(&self) {
        let Some(load) = self.stage.scene.load() else {
            return;
        };
        let mut done = load.done();
        done.retain(|request| request.ended.elapsed() < CLIENT_WINDOW);
        let mut took: Vec<Duration> = done
            .iter()
            .filter(|request| request.ok())
            .map(Request::took)
            .collect();
        took.sort();
        let failed = done.len() - took.len();
        let window = CLIENT_WINDOW.as_secs();
        let mut text = match took.get(took.len() / 2) {
            Some(median) => format!(
                "{} responses per second, latency {} (median of the last {window} s)",
                took.len() as u64 / window,
                phrases::duration_text(*median),
            ),
            None => format!("no response in the last {window} s"),
        };
        if failed > 0 {
            text += &format!("; {failed} requests failed");
        }
        self.timeline
            .entry(Instant::now(), "clients", Colour::Dim, &text);
    }

    fn demo(&self, text: &str) {
        self.timeline
            .entry(Instant::now(), "demo", Colour::Cyan, text);
    }

    fn tailback(&self, colour: Colour, text: &str) {
        self.timeline
            .entry(Instant::now(), "Tailback", colour, text);
    }
}
