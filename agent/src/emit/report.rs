//! What a diagnosis found, for a person in an incident: the verdict first, then what speaks for it, then what to do.
//!
//! One block per incident, headed by the service at the head of the jam; then its victims, in the order in which their
//! queues filled. At most 100 columns. Pure: findings in, text out.
#![forbid(unsafe_code)]

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
    text::{bounded, count, duration, wrap},
};

const COLUMNS: usize = 100;
/// Where the rows of a block begin, and how wide their labels are.
const INDENT: usize = 2;
const LABEL: usize = 12;
const VALUE: usize = COLUMNS - INDENT - LABEL;
/// The level, before the headline.
const TAG: usize = 10;
/// The clock, before the tag of a victim.
const CLOCK: usize = 15;
/// States that are shown; what else there is stands in one line.
const MAX_SHARES: usize = 4;
/// A smaller share of the time says nothing.
const MIN_SHARE: f64 = 0.005;
const MAX_HOPS: usize = 8;
/// Longest name in the tree of the path, bytes.
const MAX_HOP_NAME: usize = 40;
const MAX_MESSAGES: usize = 3;
const MAX_QUEUES: usize = 5;
const MAX_NOTES: usize = 5;
const MAX_NO_BASELINE: usize = 5;
/// Longest foreign text in one row, bytes.
const MAX_TEXT: usize = 1_000;
const DIM: &str = "\x1b[2m";
const BOLD: &str = "\x1b[1m";
const OFF: &str = "\x1b[0m";

/// Writes the report: quiet, the headlines alone; verbose, every victim in full.
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
    report.sum();
    for line in report.lines {
        writeln!(out, "{}", line.trim_end())?;
    }
    out.flush()
}

/// `Looking: 3 of 10 s; 16 services, 162 queues; 2 not ok`, for the time until there is a report.
pub fn progress(findings: &Findings, elapsed: Duration, all: Duration) -> String {
    let not_ok = match findings.open() {
        0 => "all ok".to_owned(),
        open => format!("{} not ok", count(open as u64)),
    };
    format!(
        "Looking: {} of {}; {}, {}; {not_ok}",
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
            let text = "In the same incident, in the order in which the queues filled:";
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

    /// All that is known of one service.
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
                self.row("culprit", &format!("{}: {}", culprit.name, root.title()));
            }
        }
        self.row("rates", &rates(episode));
        self.row("queue", &queue(episode));
        self.row("since", &since(lead));
        for said in verdict
            .iter()
            .flat_map(|it| &it.messages)
            .take(MAX_MESSAGES)
        {
            self.row("its log", &message(said));
        }
        self.others(lead, others);
        if let Some(verdict) = verdict {
            self.row("confidence", &confidence(verdict));
        }
        self.row("advice", advice(episode));
    }

    /// A service that suffers from another's jam: what is its own.
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

    /// The level, the queue, and why: `FULL  shop accept 0.0.0.0:80: it waits for another service, postgres (812)`.
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
        let why = episode.verdict.as_deref().map_or_else(
            || "not looked at for long enough to say why".to_owned(),
            cause::verdict,
        );
        let text = format!("{}{was}: {why}", self.queue_name(episode));
        let clock = match indent {
            0 => String::new(),
            _ => format!("{:INDENT$}{:<CLOCK$}", "", clock(episode.onset.unix_ns)),
        };
        let paint = if episode.ongoing { style(*level) } else { DIM };
        let (on, bold, off) = self.paint(paint);
        let text = bounded(&text, MAX_TEXT);
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

    /// Where the workers' time went: a bar for each state.
    fn shares(&mut self, verdict: &Verdict) {
        let told = |(_, share): &&(Activity, f64)| *share >= MIN_SHARE;
        let shown: Vec<_> = verdict
            .shares
            .iter()
            .filter(told)
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
            let column = bar.chars().count() + " 100%  ".len();
            let looks = format!("(of {} looks)", count(verdict.samples));
            let fits = column + words.len() + 1 + looks.len() <= VALUE;
            let beside = match (index, fits) {
                (0, true) => format!(" {looks}"),
                _ => String::new(),
            };
            self.line(
                label,
                &format!("{on}{bar}{off} {percent:>3.0}%  {words}{beside}"),
            );
            if index == 0 && !fits {
                self.line("", &format!("{:column$}{looks}", ""));
            }
        }
    }

    /// From the queue to the head of the jam, a step a line.
    fn path(&mut self, verdict: &Verdict) {
        let path = &verdict.path;
        // What the only process does is in the evidence.
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
                let name = format!("{branch}{}", bounded(&hop.name, MAX_HOP_NAME));
                let is_known = |other: &Hop| other.pid.is_some() && other.pid == hop.pid;
                let again = if depth > 1 && path[..depth - 1].iter().any(is_known) {
                    " (again: a cycle)"
                } else {
                    ""
                };
                let what = match hop.what.as_str() {
                    "" => hop.cause.title(),
                    what => what,
                };
                (name, bounded(&format!("{what}{again}"), MAX_TEXT))
            })
            .collect();
        let names = rows.iter().map(|(name, _)| name.chars().count());
        // What they do stands in one column.
        let column = names.max().unwrap_or(0) + 2;
        for (index, (name, what)) in rows.iter().enumerate() {
            for (line, text) in wrap(what, VALUE - column).iter().enumerate() {
                let name = if line == 0 { name.as_str() } else { "" };
                let label = if index + line == 0 { "path" } else { "" };
                self.line(label, &format!("{name:<column$}{text}"));
            }
        }
        if let more @ 1.. = path.len().saturating_sub(MAX_HOPS) {
            self.line("", &format!("… and {more} more"));
        }
    }

    /// The service's other queues that stand.
    fn others(&mut self, lead: &Seen, others: &[&Seen]) {
        for seen in others.iter().take(MAX_QUEUES) {
            let Episode { key, verdict, .. } = &seen.episode;
            let standing = match (seen.episode.ongoing, seen.level) {
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
                "{} {}, {standing}, {}{why}",
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

    /// How much was looked at; whatever was found.
    fn sum(&mut self) {
        let found = self.findings;
        let looked = format!(
            "{} at {}{}, {}, {}",
            duration(found.looked_ns()),
            counted(found.services, "service", "services"),
            match found.followed {
                0 => String::new(),
                around => format!(" and {} around them", count(around as u64)),
            },
            counted(found.queues, "queue", "queues"),
            counted(found.threads, "thread", "threads"),
        );
        let verdict = match (found.episodes().next(), found.open()) {
            (None, _) => "No queue stands".to_owned(),
            (Some(_), 0) => "No queue stands any more".to_owned(),
            (Some(_), open) => format!("{} not ok", counted(open, "queue is", "queues are")),
        };
        self.text(0, &format!("{verdict}. Looked for {looked}."));
        if found.dropped > 0 {
            let text = format!("{} that are over are not shown.", count(found.dropped));
            self.text(0, &text);
        }
        // A report that keeps this to itself would call well what nobody knows.
        for queue in found.no_baseline().iter().take(MAX_NO_BASELINE) {
            self.text(0, &no_baseline(queue, found.targets()));
        }
        if let more @ 1.. = found.no_baseline().len().saturating_sub(MAX_NO_BASELINE) {
            self.text(0, &format!("No baseline: {more} more queues like that."));
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

    /// A labelled text, in as many lines as it takes. Nothing where there is no text.
    fn row(&mut self, label: &str, text: &str) {
        if text.is_empty() {
            return;
        }
        for (index, line) in wrap(&bounded(text, MAX_TEXT), VALUE).iter().enumerate() {
            self.line(if index == 0 { label } else { "" }, line);
        }
    }

    /// A labelled line as it is.
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
        for line in wrap(&bounded(text, MAX_TEXT), COLUMNS - indent) {
            self.lines.push(format!("{:indent$}{line}", ""));
        }
    }

    /// How to begin with this style, with bold, and how to end; nothing without colour.
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
