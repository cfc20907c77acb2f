//! The text report of `tailback diagnose`: the verdict, its evidence, and advice.
//!
//! Each incident is one block. It starts with the service that most of the others wait for; the affected services follow in
//! the order in which their queues filled. Services that were not selected come last. Lines have at most 100 columns. Pure:
//! findings in, text out.
#![forbid(unsafe_code)]

mod exact_waits;
mod findings;
mod words;

use std::{
    io::{self, Write},
    time::Duration,
};

pub use findings::Findings;
use findings::{Incident, Seen, Service};
use words::{
    advice, at_most, bar, confidence, evidence, message, no_baseline, queue, rates, since,
};

use super::{
    cause,
    terminal::{Colour, Verbosity, clock, style},
};
use crate::{
    event::{Activity, Episode, Hop, Level, Verdict},
    text::{bounded, count, duration, pad, width, wrap},
};

// Layout, in terminal columns.

/// Width of the report.
const COLUMNS: usize = 100;
/// Indentation of the rows of a block.
const INDENT: usize = 2;
/// Width of a row's label.
const LABEL: usize = 12;
/// Width of a row's value.
const VALUE: usize = COLUMNS - INDENT - LABEL;
/// Width of the level before a headline.
const TAG: usize = 10;
/// Width of the time before an affected service.
const CLOCK: usize = 15;

// Limits of what is shown; the report counts the rest.

/// Thread states with a bar of their own; the others share one.
const MAX_SHARES: usize = 4;
/// Smallest share of time that is shown.
const MIN_SHARE: f64 = 0.005;
/// Hops of the wait chain.
const MAX_HOPS: usize = 8;
/// Longest name in the wait chain, in bytes.
const MAX_HOP_NAME_BYTES: usize = 40;
/// Log messages per service.
const MAX_MESSAGES: usize = 3;
/// Further queues per service.
const MAX_QUEUES: usize = 5;
/// Notices of the agent.
const MAX_NOTES: usize = 5;
/// Queues without a baseline.
const MAX_NO_BASELINE: usize = 5;
/// Longest untrusted text in one row, in bytes.
const MAX_TEXT_BYTES: usize = 1_000;
const DIM: &str = "\x1b[2m";
const BOLD: &str = "\x1b[1m";
const OFF: &str = "\x1b[0m";

/// Writes the report. Quiet prints only headlines; verbose prints every affected service in full.
pub fn write(
    out: &mut impl Write,
    findings: &Findings,
    colour: Colour,
    verbosity: Verbosity,
) -> io::Result<()> {
    let mut report = Report {
        findings,
        colour,
        verbosity,
        lines: Vec::new(),
    };
    for incident in findings.incidents() {
        report.incident(&incident);
    }
    report.exact_waits();
    report.summary();
    for line in report.lines {
        writeln!(out, "{}", line.trim_end())?;
    }
    out.flush()
}

/// The progress line before the report: `Observing: 3 of 10 s; 16 services, 162 queues; 2 not ok`.
pub fn progress(findings: &Findings, elapsed: Duration, all: Duration) -> String {
    let not_ok = match findings.open() {
        0 => "all ok".to_owned(),
        open => format!("{} not ok", count(open as u64)),
    };
    format!(
        "Observing: {} of {}; {}, {}; {not_ok}",
        elapsed.as_secs().min(all.as_secs()),
        duration(u64::try_from(all.as_nanos()).unwrap_or(u64::MAX)),
        counted(findings.services, "service", "services"),
        counted(findings.queues, "queue", "queues"),
    )
}

struct Report<'a> {
    findings: &'a Findings,
    colour: Colour,
    verbosity: Verbosity,
    lines: Vec<String>,
}

impl Report<'_> {
    fn incident(&mut self, incident: &Incident<'_>) {
        let mut services = incident.services.iter();
        let Some(head) = services.next() else { return };
        self.service(head);
        let victims: Vec<&Service<'_>> = services.collect();
        if !victims.is_empty() && self.verbosity > Verbosity::Quiet {
            self.lines.push(String::new());
            let text =
                "Other services in this incident, in the order in which their queues filled:";
            self.lines.push(format!("{:INDENT$}{text}", ""));
        }
        for victim in victims {
            match self.verbosity {
                Verbosity::Verbose => {
                    self.lines.push(String::new());
                    self.service(victim);
                }
                _ => self.victim(victim, head),
            }
        }
        if self.verbosity > Verbosity::Quiet {
            self.row("trace", incident.id);
            self.lines.push(String::new());
        }
    }

    /// The full block of one service.
    fn service(&mut self, service: &Service<'_>) {
        let Some((lead, others)) = service.episodes.split_first() else {
            return;
        };
        self.headline(0, lead);
        if self.verbosity == Verbosity::Quiet {
            return;
        }
        let Seen { episode, .. } = lead;
        let verdict = episode.verdict.as_deref();
        self.row("evidence", evidence(episode));
        if let Some(verdict) = verdict {
            self.shares(verdict);
            self.path(verdict);
            if let (Some(root), Some(culprit)) = (verdict.root, &verdict.culprit) {
                let text = match cause::beside_culprit(root, Some(culprit)) {
                    Some(title) => format!("{}: {title}", culprit.name),
                    None => culprit.name.clone(),
                };
                self.row("culprit", &text);
            }
        }
        self.row("rates", &rates(episode));
        self.row("queue", &queue(episode));
        self.row("since", &since(lead));
        for logged in verdict
            .iter()
            .flat_map(|it| &it.messages)
            .take(MAX_MESSAGES)
        {
            self.row("log", &message(logged));
        }
        self.others(lead, others);
        if let Some(verdict) = verdict {
            self.row("confidence", &confidence(verdict));
        }
        self.row("advice", advice(episode));
    }

    /// The short block of a service affected by another one: only what differs from the head's block.
    fn victim(&mut self, victim: &Service<'_>, head: &Service<'_>) {
        let Some(lead) = victim.episodes.first() else {
            return;
        };
        if self.verbosity == Verbosity::Quiet {
            return self.headline(0, lead);
        }
        self.headline(INDENT + CLOCK, lead);
        let indent = INDENT + CLOCK + TAG;
        self.text(indent, evidence(&lead.episode));
        let Some(verdict) = lead.episode.verdict.as_deref() else {
            return;
        };
        if verdict.path.len() > 1 {
            let names: Vec<&str> = verdict.path.iter().map(|hop| hop.name.as_str()).collect();
            self.text(indent, &names.join(" → "));
        }
        let of_head = head.episodes.first();
        let of_head = of_head.and_then(|seen| seen.episode.verdict.as_ref());
        if of_head.is_none_or(|of_head| of_head.culprit != verdict.culprit) {
            self.text(indent, &verdict.advice);
        }
    }

    /// The level, the queue and the cause: `FULL  shop accept 0.0.0.0:80: it waits for another service, postgres (812)`.
    fn headline(&mut self, indent: usize, seen: &Seen) {
        let Seen { episode, level } = seen;
        let tag = if episode.ongoing {
            level.name().to_uppercase()
        } else {
            "OVER".to_owned()
        };
        let was = if *level < episode.level_max {
            format!(" (was {})", episode.level_max.name())
        } else {
            String::new()
        };
        let why = episode
            .verdict
            .as_deref()
            .map_or_else(|| "cause not known yet".to_owned(), cause::verdict);
        let text = format!("{}{was}: {why}", self.queue_name(episode));
        let clock = match indent {
            0 => String::new(),
            _ => format!("{:INDENT$}{:<CLOCK$}", "", clock(episode.onset.unix_ns)),
        };
        let paint = if episode.ongoing { style(*level) } else { DIM };
        let (on, bold, off) = self.paint(paint);
        let text = bounded(&text, MAX_TEXT_BYTES);
        let lines = wrap(&text, COLUMNS - indent - TAG);
        for (index, line) in lines.iter().enumerate() {
            self.lines.push(match index {
                0 => {
                    let gap = TAG.saturating_sub(tag.len());
                    format!("{clock}{on}{tag}{off}{:gap$}{bold}{line}{off}", "")
                }
                _ => format!("{:width$}{bold}{line}{off}", "", width = indent + TAG),
            });
        }
    }

    /// Where the workers' wall-clock time went: one bar per state.
    fn shares(&mut self, verdict: &Verdict) {
        let is_shown = |(_, share): &&(Activity, f64)| *share >= MIN_SHARE;
        let shown: Vec<_> = verdict
            .shares
            .iter()
            .filter(is_shown)
            .take(MAX_SHARES)
            .map(|(activity, share)| (Some(*activity), *share))
            .collect();
        if shown.is_empty() {
            return;
        }
        let all: f64 = verdict.shares.iter().map(|(_, share)| share).sum();
        let rest = all - shown.iter().map(|(_, share)| share).sum::<f64>();
        let rest = (rest >= MIN_SHARE).then_some((None, rest));
        for (index, (activity, share)) in shown.into_iter().chain(rest).enumerate() {
            let label = if index == 0 { "time" } else { "" };
            let words = activity.map_or("other", Activity::words);
            let (on, _, off) = self.paint(match activity {
                Some(Activity::Idle) | None => DIM,
                Some(Activity::OnCpu) => style(Level::Ok),
                Some(_) => style(Level::Warn),
            });
            let bar = bar(share);
            let percent = (share * 100.0).min(999.0);
            let column = width(&bar) + " 100%  ".len();
            let samples = format!("({} samples)", count(verdict.samples));
            let fits = column + words.len() + 1 + samples.len() <= VALUE;
            let beside = match (index, fits) {
                (0, true) => format!(" {samples}"),
                _ => String::new(),
            };
            self.line(
                label,
                &format!("{on}{bar}{off} {percent:>3.0}%  {words}{beside}"),
            );
            if index == 0 && !fits {
                self.line("", &format!("{:column$}{samples}", ""));
            }
        }
    }

    /// The wait chain from the queue to its root cause, one line per hop.
    fn path(&mut self, verdict: &Verdict) {
        let path = &verdict.path;
        // With a single process the evidence says it all.
        if path.len() < 2 {
            return;
        }
        let shown = path.iter().take(MAX_HOPS).enumerate();
        let rows: Vec<(String, String)> = shown
            .map(|(depth, hop)| {
                let branch = match depth {
                    0 => String::new(),
                    depth => format!("{:indent$}└─ ", "", indent = 3 * (depth - 1)),
                };
                let name = format!("{branch}{}", bounded(&hop.name, MAX_HOP_NAME_BYTES));
                let is_known = |other: &Hop| other.pid.is_some() && other.pid == hop.pid;
                let cycle = if depth > 1 && path[..depth - 1].iter().any(is_known) {
                    " (cycle)"
                } else {
                    ""
                };
                let what = match hop.state.as_str() {
                    "" => hop.cause.title(),
                    what => what,
                };
                (name, bounded(&format!("{what}{cycle}"), MAX_TEXT_BYTES))
            })
            .collect();
        let names = rows.iter().map(|(name, _)| width(name));
        let column = names.max().unwrap_or(0) + 2;
        for (index, (name, what)) in rows.iter().enumerate() {
            for (line, text) in wrap(what, VALUE - column).iter().enumerate() {
                let name = if line == 0 { name.as_str() } else { "" };
                let label = if index + line == 0 { "path" } else { "" };
                self.line(label, &format!("{}{text}", pad(name, column)));
            }
        }
        if let more @ 1.. = path.len().saturating_sub(MAX_HOPS) {
            self.line("", &format!("… and {more} more"));
        }
    }

    /// The service's other queues that are not ok.
    fn others(&mut self, lead: &Seen, others: &[&Seen]) {
        for seen in others.iter().take(MAX_QUEUES) {
            let Episode { key, verdict, .. } = &seen.episode;
            let level = match (seen.episode.ongoing, seen.level) {
                (true, level) => level.name(),
                (false, _) => "over",
            };
            let verdict = verdict.as_deref();
            let cause = |verdict: &Verdict| verdict.cause;
            let same = verdict.map(cause) == lead.episode.verdict.as_deref().map(cause);
            let why = match verdict {
                Some(verdict) if !same => format!(": {}", cause::verdict(verdict)),
                _ => String::new(),
            };
            let text = format!(
                "{} {}, {level}, {}{why}",
                key.kind.name(),
                key.name(),
                at_most(&seen.episode)
            );
            self.row("also", &text);
        }
        if let more @ 1.. = others.len().saturating_sub(MAX_QUEUES) {
            self.row("also", &format!("{more} more of its queues"));
        }
    }

    /// What hooks have measured; nothing without them. Rows of each service only if verbose.
    fn exact_waits(&mut self) {
        let findings = self.findings;
        let Some(summary) = findings.exact_waits.summary() else {
            return;
        };
        if self.verbosity == Verbosity::Verbose {
            for target in findings.targets().values() {
                let rows = findings.exact_waits.rows(target);
                if rows.is_empty() {
                    continue;
                }
                self.text(
                    0,
                    &format!("Exact waits of the threads of {}:", target.name),
                );
                for (label, text) in rows {
                    if label.is_empty() {
                        self.continued(&text);
                    } else {
                        self.row(label, &text);
                    }
                }
                self.lines.push(String::new());
            }
        }
        if self.verbosity > Verbosity::Quiet {
            self.text(0, &summary);
        }
    }

    /// The last lines: how many queues are not ok, and what was observed.
    fn summary(&mut self) {
        let found = self.findings;
        let observed = format!(
            "{}{}, {}, {} for {}",
            counted(found.services, "service", "services"),
            match found.neighbours {
                0 => String::new(),
                n => format!(" and {}", counted(n, "neighbour", "neighbours")),
            },
            counted(found.queues, "queue", "queues"),
            counted(found.threads, "thread", "threads"),
            duration(found.observed_ns()),
        );
        let verdict = match (found.episodes().next(), found.open()) {
            (None, _) => "All queues are ok".to_owned(),
            (Some(_), 0) => "All queues are ok again".to_owned(),
            (Some(_), open) => format!("{} not ok", counted(open, "queue is", "queues are")),
        };
        self.text(0, &format!("{verdict}. Observed {observed}."));
        if found.dropped > 0 {
            let text = format!(
                "{} episodes that are over are not shown.",
                count(found.dropped)
            );
            self.text(0, &text);
        }
        // Printed even if quiet: otherwise the report would imply that these queues are ok.
        for queue in found.no_baseline().iter().take(MAX_NO_BASELINE) {
            self.text(0, &no_baseline(queue, found.targets()));
        }
        if let more @ 1.. = found.no_baseline().len().saturating_sub(MAX_NO_BASELINE) {
            self.text(0, &format!("No baseline: {more} more queues."));
        }
        if self.verbosity > Verbosity::Quiet {
            for text in found.notices.values().take(MAX_NOTES) {
                self.text(0, &format!("Note: {text}"));
            }
        }
    }

    fn queue_name(&self, episode: &Episode) -> String {
        let key = &episode.key;
        let target = self.findings.targets().get(&key.target);
        let name = target.map_or("?", |target| target.name.as_str());
        format!("{name} {} {}", key.kind.name(), key.name())
    }

    /// A labelled text, wrapped. An empty text prints nothing.
    fn row(&mut self, label: &str, text: &str) {
        if text.is_empty() {
            return;
        }
        for (index, line) in wrap(&bounded(text, MAX_TEXT_BYTES), VALUE)
            .iter()
            .enumerate()
        {
            self.line(if index == 0 { label } else { "" }, line);
        }
    }

    /// A row without a label, wrapped.
    fn continued(&mut self, text: &str) {
        for line in wrap(&bounded(text, MAX_TEXT_BYTES), VALUE) {
            self.line("", &line);
        }
    }

    /// A labelled line, not wrapped.
    fn line(&mut self, label: &str, text: &str) {
        let (on, _, off) = match label {
            "" => ("", "", ""),
            _ => self.paint(DIM),
        };
        let gap = LABEL.saturating_sub(label.len());
        self.lines
            .push(format!("{:INDENT$}{on}{label}{off}{:gap$}{text}", "", ""));
    }

    fn text(&mut self, indent: usize, text: &str) {
        for line in wrap(&bounded(text, MAX_TEXT_BYTES), COLUMNS - indent) {
            self.lines.push(format!("{:indent$}{line}", ""));
        }
    }

    /// The escape sequences for this style, for bold, and for reset; empty without colour.
    fn paint<'s>(&self, style: &'s str) -> (&'s str, &'static str, &'static str) {
        match self.colour {
            Colour::Always => (style, BOLD, OFF),
            Colour::Never => ("", "", ""),
        }
    }
}

fn counted(number: usize, one: &str, many: &str) -> String {
    let word = if number == 1 { one } else { many };
    format!("{} {word}", count(number as u64))
}

#[cfg(test)]
mod tests;
