//! Events as text for people: one line per level change, one summary per episode.
//!
//! Times are in UTC, so that a replay prints the same everywhere.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    io::{self, Write},
    sync::Arc,
};

use super::{
    Sink, cause,
    cause::Reported,
    churn::{Churn, Omitted},
};
use crate::{
    event::{Episode, Event, Instant, Level, QueueState, Verdict},
    queue::{Kind, QueueKey},
    sample::{AgentReport, Target, TargetId},
    text::{amount, bounded, count, duration, sparkline},
};

/// Bound for one line of text; regular lines are much shorter.
const MAX_LINE_BYTES: usize = 2_000;

/// Longest list of services that is printed with a line for each.
const MAX_LIST: usize = 5;

/// Whether to use ANSI colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    Always,
    Never,
}

/// How much to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verbosity {
    /// Only changes of targets, and episode summaries.
    Quiet,
    Normal,
    /// Also the agent's own reports, and changes of a target's processes.
    Verbose,
}

/// Writes events as text lines.
pub struct Terminal<W: Write> {
    out: W,
    colour: Colour,
    verbosity: Verbosity,
    targets: BTreeMap<TargetId, Arc<Target>>,
    reported: Reported,
    churn: Churn,
}

impl<W: Write> Terminal<W> {
    /// Writes to `out`, flushed after each event.
    pub fn new(out: W, colour: Colour, verbosity: Verbosity) -> Self {
        Self {
            out,
            colour,
            verbosity,
            targets: BTreeMap::new(),
            reported: Reported::default(),
            churn: Churn::default(),
        }
    }

    fn line(
        &mut self,
        at: Instant,
        level: Option<Level>,
        word: &str,
        text: &str,
    ) -> io::Result<()> {
        let (on, off) = match (self.colour, level) {
            (Colour::Always, Some(level)) => (style(level), "\x1b[0m"),
            (Colour::Always, None) => ("\x1b[2m", "\x1b[0m"),
            (Colour::Never, _) => ("", ""),
        };
        // Names from a live system are escaped already; a recording may contain anything.
        let text = bounded(text, MAX_LINE_BYTES);
        writeln!(
            self.out,
            "{}  {on}{word:<8}{off}  {text}",
            clock(at.unix_ns)
        )
    }

    fn queue_name(&self, key: &QueueKey) -> String {
        let target = self
            .targets
            .get(&key.target)
            .map_or("?", |target| target.name.as_str());
        format!("{target} {} {}", key.kind.name(), key.name())
    }

    fn targets_changed(&mut self, at: Instant, targets: &[Arc<Target>]) -> io::Result<()> {
        let now: BTreeMap<TargetId, Arc<Target>> = targets
            .iter()
            .map(|target| (target.id, Arc::clone(target)))
            .collect();
        let before = std::mem::replace(&mut self.targets, now.clone());
        let only_in = |some: &BTreeMap<TargetId, Arc<Target>>, other: &BTreeMap<_, _>| {
            some.values()
                .filter(|target| !other.contains_key(&target.id))
                .map(|target| describe(target))
                .collect::<Vec<String>>()
        };
        let (exited, started) = (only_in(&before, &now), only_in(&now, &before));
        let grown: Vec<String> = if self.verbosity >= Verbosity::Verbose {
            let grown = now.values().filter(|target| {
                let before = before.get(&target.id);
                before.is_some_and(|before| before.tgids.len() != target.tgids.len())
            });
            grown.map(|target| describe(target)).collect()
        } else {
            Vec::new()
        };
        self.churn_summary(at)?;
        let lists = [
            ("exited", exited),
            ("watching", started),
            ("changed", grown),
        ];
        let lines = lists.iter().map(|(_, list)| line_count(list)).sum();
        if !self.churn.take(lines) {
            let [exited, started, changed] = lists.map(|(_, list)| list.len());
            self.churn.omit(Omitted {
                started,
                exited,
                changed,
            });
            return Ok(());
        }
        for (word, list) in lists {
            self.lines(at, word, &list)?;
        }
        Ok(())
    }

    /// Once per interval, how many services started and exited without a line.
    fn churn_summary(&mut self, at: Instant) -> io::Result<()> {
        let Some(omitted) = self.churn.begin(at) else {
            return Ok(());
        };
        let text = format!(
            "{} more services started and {} exited; {} are watched",
            count(omitted.started as u64),
            count(omitted.exited as u64),
            count(self.targets.len() as u64)
        );
        self.line(at, None, "services", &text)
    }

    /// One line per service, or a single line for more than `MAX_LINES`.
    fn lines(&mut self, at: Instant, word: &str, targets: &[String]) -> io::Result<()> {
        if targets.len() > MAX_LIST {
            let text = format!(
                "{} services: {}, …",
                targets.len(),
                targets[..MAX_LIST].join(", ")
            );
            return self.line(at, None, word, &text);
        }
        for target in targets {
            self.line(at, None, word, target)?;
        }
        Ok(())
    }

    fn level(&mut self, state: &QueueState, from: Level, to: Level) -> io::Result<()> {
        let name = self.queue_name(&state.key);
        let mut text = format!(
            "{name}: {}",
            depth(
                state.key.kind,
                state.reading.unit.unwrap_or(state.key.kind.unit()),
                state.reading.depth,
                state.reading.limit
            )
        );
        if let Some(oldest) = state
            .reading
            .oldest_age_ns
            .filter(|_| state.reading.depth > 0)
        {
            text += &format!(", oldest {}", duration(oldest));
        } else if let Some(wait) = state.reading.wait_ns.filter(|_| state.reading.depth > 0) {
            text += &format!(", wait {}", duration(wait));
        }
        if state.reading.losses > 0 {
            text += &format!(", {} lost", count(state.reading.losses));
        }
        match state.time_to_full_ns {
            Some(left) if to > from && to < Level::Full && left > 0 => {
                text += &format!(", full in about {}", duration(left));
            }
            _ => {}
        }
        if let (Some(arrivals), Some(departures)) = (state.arrivals_per_s, state.departures_per_s)
            && to > from
            && state.key.kind != Kind::Runqueue
        {
            text += &format!(
                " (in {}/s, out {}/s)",
                crate::text::rate(arrivals),
                crate::text::rate(departures)
            );
        }
        self.line(state.at, Some(to), to.name(), &text)
    }

    fn episode(&mut self, episode: &Episode) -> io::Result<()> {
        let name = self.queue_name(&episode.key);
        let lasted = duration(episode.end.mono_ns.saturating_sub(episode.start.mono_ns));
        let (word, verb) = if episode.ongoing {
            ("episode", "ongoing for")
        } else {
            ("episode", "over after")
        };
        self.line(
            episode.end,
            Some(Level::Ok),
            word,
            &format!("{name}: {verb} {lasted}"),
        )?;
        let scale = episode.limit.unwrap_or(0).max(episode.depth_max);
        let indent = " ".repeat(24);
        let row = |out: &mut W, label: &str, text: &str| writeln!(out, "{indent}{label:<11}{text}");
        row(
            &mut self.out,
            "depth",
            &format!(
                "{}  max {}",
                sparkline(&episode.depths, scale),
                depth(
                    episode.key.kind,
                    episode.unit,
                    episode.depth_max,
                    episode.limit
                )
            ),
        )?;
        if let Some(max) = episode.wait_max_ns {
            let quantile = |label: &str, ns: Option<u64>| {
                ns.map_or_else(String::new, |ns| format!("{label} {}, ", duration(ns)))
            };
            row(
                &mut self.out,
                "wait",
                &format!(
                    "{}{}max {}",
                    quantile("p50", episode.wait_p50_ns),
                    quantile("p99", episode.wait_p99_ns),
                    duration(max)
                ),
            )?;
        }
        let lost = if episode.losses > 0 {
            count(episode.losses)
        } else {
            "nothing".to_owned()
        };
        row(&mut self.out, "lost", &lost)?;
        row(
            &mut self.out,
            "warned",
            &match episode.lead_ns {
                Some(lead) => format!("{} before it was full", duration(lead)),
                None => format!(
                    "the queue did not become full (max level: {})",
                    episode.level_max.name()
                ),
            },
        )?;
        let side = episode.verdict.as_ref();
        let side = side.map_or(episode.driven_by, |verdict| verdict.driven_by);
        row(&mut self.out, "driven by", cause::driven_by(side))?;
        let (evidence, advice) = match episode.verdict.as_deref() {
            Some(verdict) => {
                let share = verdict.share.map_or_else(String::new, |share| {
                    format!("{:.0}% of its time, ", share * 100.0)
                });
                let text = format!(
                    "{} ({share}{} confidence)",
                    cause::verdict(verdict),
                    verdict.confidence.name()
                );
                row(&mut self.out, "cause", &bounded(&text, MAX_LINE_BYTES))?;
                (&verdict.evidence, &verdict.advice)
            }
            None => (&episode.evidence, &episode.advice),
        };
        row(
            &mut self.out,
            "evidence",
            &bounded(evidence, MAX_LINE_BYTES),
        )?;
        row(&mut self.out, "advice", &bounded(advice, MAX_LINE_BYTES))?;
        row(&mut self.out, "trace", &episode.incident)
    }

    /// Prints a line when a cause is first known and when it changes.
    fn cause(
        &mut self,
        at: Instant,
        episode: &str,
        key: &QueueKey,
        verdict: &Verdict,
    ) -> io::Result<()> {
        if !self.reported.is_news(episode, verdict) || self.verbosity < Verbosity::Normal {
            return Ok(());
        }
        let name = self.queue_name(key);
        let text = format!("{name}: {}. {}", cause::verdict(verdict), verdict.evidence);
        self.line(at, None, "cause", &text)
    }

    fn agent(&mut self, at: Instant, report: &AgentReport) -> io::Result<()> {
        let text = format!(
            "{} samples, {:.2}% of a core, {:.1} MB, file scan every {}, {} spans delivered, {} dropped",
            count(report.samples),
            report.cpu_share * 100.0,
            report.rss_bytes as f64 / 1e6,
            duration(report.files_interval_ns),
            count(report.spans_delivered),
            count(report.spans_dropped),
        );
        self.line(at, None, "agent", &text)
    }
}

impl<W: Write> Sink for Terminal<W> {
    fn emit(&mut self, event: &Event) -> io::Result<()> {
        match event {
            Event::Targets { at, targets } => self.targets_changed(*at, targets)?,
            Event::Notice { at, notice }
                if self.verbosity >= Verbosity::Normal || !is_routine(&notice.code) =>
            {
                self.line(*at, None, "note", &notice.text)?;
            }
            Event::Level {
                state, from, to, ..
            } if self.verbosity >= Verbosity::Normal => {
                self.level(state, *from, *to)?;
            }
            Event::Cause(stretch) => {
                self.cause(stretch.to, &stretch.episode, &stretch.key, &stretch.verdict)?;
            }
            Event::Episode(episode) => {
                self.episode(episode)?;
                // The summary has already reported the cause.
                if !episode.ongoing {
                    self.reported.forget(&episode.id);
                } else if let Some(verdict) = &episode.verdict {
                    self.reported.is_news(&episode.id, verdict);
                }
            }
            Event::Agent { at, report } => {
                self.churn_summary(*at)?;
                if self.verbosity >= Verbosity::Verbose {
                    self.agent(*at, report)?;
                }
            }
            _ => return Ok(()),
        }
        self.out.flush()
    }
}

/// The number of lines that a list of services takes.
fn line_count(targets: &[String]) -> usize {
    if targets.len() > MAX_LIST {
        1
    } else {
        targets.len()
    }
}

/// `nginx (pid 12, 3 processes)`.
fn describe(target: &Target) -> String {
    let processes = match target.tgids.len() {
        1 => "1 process".to_owned(),
        n => format!("{n} processes"),
    };
    format!("{} (pid {}, {processes})", target.name, target.pid)
}

/// `23 of 100 connections`.
pub(super) fn depth(kind: Kind, unit: &str, depth: u64, limit: Option<u64>) -> String {
    match (kind, limit) {
        (Kind::Runqueue, Some(cpus)) => {
            format!("{} threads waiting for {} CPUs", count(depth), count(cpus))
        }
        _ => amount(depth, limit, unit),
    }
}

pub(super) fn style(level: Level) -> &'static str {
    match level {
        Level::Ok => "\x1b[32m",
        Level::Warn => "\x1b[33m",
        Level::Critical => "\x1b[31m",
        Level::Full => "\x1b[1;37;41m",
    }
}

/// Whether a notice is about something that is by design, so that nobody has to do anything: processes that are not watched, and the
/// pace of scans within the CPU budget.
fn is_routine(code: &str) -> bool {
    code == "processes_left_out" || code.ends_with("_stretched")
}

/// `21:43:15.123Z`.
pub(super) fn clock(unix_ns: u64) -> String {
    let ms = unix_ns / 1_000_000 % 86_400_000;
    format!(
        "{:02}:{:02}:{:02}.{:03}Z",
        ms / 3_600_000,
        ms / 60_000 % 60,
        ms / 1_000 % 60,
        ms % 1_000
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emit::{
        churn::MAX_LINES,
        fixture::{at, cause, churn, episode, gateway, shop, targets},
    };

    fn text(verbosity: Verbosity, events: &[Event]) -> String {
        let mut out = Vec::new();
        let mut terminal = Terminal::new(&mut out, Colour::Never, verbosity);
        for event in events {
            terminal.emit(event).unwrap();
        }
        drop(terminal);
        String::from_utf8(out).unwrap()
    }

    fn cause_event(episode: &Episode, from: u64, to: u64) -> Event {
        Event::Cause(Box::new(cause(episode, 0, at(from), at(to))))
    }

    #[test]
    fn services_that_come_and_go_take_few_lines() {
        for (verbosity, jobs) in [(Verbosity::Normal, 5), (Verbosity::Verbose, 3)] {
            let events: Vec<Event> = (0..100).map(|second| churn(second, jobs)).collect();
            let text = text(verbosity, &events);
            let lines = text.lines().count();
            assert!(lines <= 10 * (MAX_LINES + 1), "{text}");
            assert!(text.contains("more services started and"), "{text}");
        }
    }

    #[test]
    fn a_cause_is_printed_once_per_queue_when_it_is_first_known() {
        let events = [
            targets(),
            cause_event(&shop(), 10, 10),
            cause_event(&shop(), 10, 40),
            cause_event(&gateway(), 12, 12),
            Event::Episode(Box::new(shop())),
            cause_event(&shop(), 40, 70),
        ];
        let text = text(Verbosity::Normal, &events);
        let lines: Vec<&str> = text.lines().filter(|it| it.contains("Z  cause ")).collect();
        assert_eq!(
            lines,
            [
                "00:00:10.000Z  cause     shop accept 127.0.0.1:8080: it waits for another service, postgres \
                 (812) at 127.0.0.1:5432. 4 threads of shop spent 97% waiting for postgres at 127.0.0.1:5432 in 13 s; \
                 postgres (815): 96% waiting for a row lock (reported by its process title); postgres (812): idle in \
                 a transaction for at least 8.2 s",
                "00:00:12.000Z  cause     gateway accept 0.0.0.0:80: it waits for another service, postgres \
                 (812) at 127.0.0.1:5432. 1 thread of gateway spent 95% waiting for shop at 127.0.0.1:8080 in 10 s",
            ],
            "{text}"
        );
    }

    #[test]
    fn quiet_output_reports_the_cause_in_the_summary_only() {
        let events = [targets(), cause_event(&shop(), 10, 10)];
        assert_eq!(text(Verbosity::Quiet, &events).matches("cause").count(), 0);
        let events = [targets(), Event::Episode(Box::new(shop()))];
        let text = text(Verbosity::Quiet, &events);
        for words in [
            "cause      it waits for another service, postgres (812) at 127.0.0.1:5432 (97% of its time, high \
             confidence)",
            "evidence   4 threads of shop spent 97% waiting",
            "advice     End the transaction of postgres (812)",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert!(
            !text.contains("Inspect what its workers wait for"),
            "{text}"
        );
    }

    #[test]
    fn quiet_output_has_the_notices_that_someone_has_to_act_on() {
        let notice = |code: &str| Event::Notice {
            at: at(1),
            notice: crate::sample::Notice {
                code: code.to_owned(),
                text: format!("this is {code}"),
            },
        };
        for (code, is_printed) in [
            ("no_page", true),
            ("config_rejected", true),
            ("privileges_kept", true),
            ("otlp_waiting", true),
            ("processes_left_out", false),
            ("files_stretched", false),
            ("files_not_stretched", false),
        ] {
            let has = |verbosity| text(verbosity, &[notice(code)]).contains("this is");
            assert!(has(Verbosity::Normal), "{code}");
            assert_eq!(has(Verbosity::Quiet), is_printed, "{code}");
        }
    }

    #[test]
    fn a_summary_without_a_verdict_shows_the_numbers() {
        let young = episode("e1", 1, Kind::Accept, "127.0.0.1:8080");
        let events = [targets(), Event::Episode(Box::new(young))];
        let text = text(Verbosity::Normal, &events);
        assert!(text.contains("evidence   up to 101 of 100"), "{text}");
        assert!(!text.contains("cause"), "{text}");
    }
}
