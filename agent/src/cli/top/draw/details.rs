//! The lines about one service: verdict, wait chain, what to do, signal, queues.

use ratatui::{
    style::{Modifier, Style},
    text::{Line, Span},
};

use super::{
    style_of, text_style,
    words::{cut, cut_left_aligned, fill_bar, observed, signal, spark},
};
use crate::{
    cli::top::source::Shown,
    emit::terminal::Colour,
    event::Level,
    signal::live::view::{Episode, Queue, Service, Step, Wait},
    text::{amount, bounded, bytes, count, duration, pad, rate, width, wrap},
};

/// Width of a label.
const LABEL: usize = 9;
/// Widest name of a hop.
const MAX_HOP_NAME: usize = 30;
/// Narrowest column of what a hop does.
const MIN_STATE: usize = 10;
/// Longest untrusted text, in bytes.
const MAX_BYTES: usize = 1_000;
/// `kind` of waits for a CPU.
const RUN_QUEUE: &str = "run_queue";
/// Longest path of a file, in bytes.
const MAX_PATH_BYTES: usize = 60;
/// Width of the bar, and of the ten minutes, of a queue.
const BAR: usize = 10;
const TREND: usize = 20;

/// All lines, the most important first.
pub(super) fn lines(
    service: &Service,
    shown: &Shown,
    columns: usize,
    colour: Colour,
) -> Vec<Line<'static>> {
    let mut lines = Lines {
        columns,
        observed: observed(&shown.view),
        all: Vec::new(),
    };
    let lead = service.episodes.first();
    lines.headline(service, lead, colour);
    if let Some(lead) = lead {
        lines.path(lead);
        lines.row("do", &lead.advice);
    }
    let words = signal(service);
    let words = if shown.is_unpublished {
        format!("{words} (not published: no agent runs)")
    } else {
        words
    };
    lines.row("signal", &words);
    if !shown.is_unpublished {
        lines.row("to", &consumers(service, shown));
    }
    for (index, queue) in service.queues.iter().enumerate() {
        lines.queue(if index == 0 { "queues" } else { "" }, queue, colour);
    }
    if service.queues_omitted > 0 {
        let more = count(service.queues_omitted as u64);
        lines.row("", &format!("{more} more, less busy"));
    }
    if let Some(lead) = lead {
        lines.row("evidence", &lead.evidence);
        let lasted = shown.view.time_unix_ns.saturating_sub(lead.onset_unix_ns);
        let confidence = lead.confidence.as_deref();
        let confidence = confidence.map_or_else(String::new, |it| format!(", confidence {it}"));
        let since = super::words::clock(lead.onset_unix_ns);
        lines.row(
            "since",
            &format!("{since}, for {}{confidence}", duration(lasted)),
        );
        if lead.losses > 0 {
            lines.row("lost", &count(lead.losses));
        }
    }
    lines.waits(&service.waits);
    for other in service.episodes.iter().skip(1) {
        let why = other.verdict.as_deref();
        let why = why.map_or_else(String::new, |why| format!(": {why}"));
        let text = format!(
            "{} {} is {}{why}",
            other.kind,
            other.name,
            other.level.name()
        );
        lines.row("also", &text);
    }
    let ended = shown.view.ended.iter();
    let ended = ended.filter(|it| it.target.as_deref() == Some(service.target.as_str()));
    for over in ended {
        let why = over.verdict.as_deref();
        let why = why.map_or_else(String::new, |why| format!("; {why}"));
        let end = over.end_unix_ns.unwrap_or(over.onset_unix_ns);
        let text = format!(
            "{}: {} {} was {} for {}{why}",
            super::words::clock(end),
            over.kind,
            over.name,
            over.level_max.name(),
            duration(end.saturating_sub(over.onset_unix_ns))
        );
        lines.row("over", &text);
    }
    lines.all
}

/// Who receives the signal of a service.
fn consumers(service: &Service, shown: &Shown) -> String {
    let readers = service.readers.iter();
    let readers = readers.map(|reader| format!("{} ({})", reader.name, reader.pid));
    let is_own = |target: &Option<String>| {
        let target = target.as_deref();
        target == Some(service.target.as_str()) || target == Some(service.directory.as_str())
    };
    let adapters = shown.adapters.iter().filter(|(_, target)| is_own(target));
    let adapters = adapters.map(|(name, _)| name.clone());
    let subscribers = shown.view.subscribers.iter();
    let subscribers = subscribers
        .filter(|of| of.target.is_none() || of.target.as_ref() == Some(&service.target))
        .map(|of| match of.pid {
            Some(pid) => format!("subscriber {pid}"),
            None => "a subscriber".to_owned(),
        });
    let all: Vec<String> = readers.chain(adapters).chain(subscribers).collect();
    if all.is_empty() {
        return "nobody".to_owned();
    }
    all.join(", ")
}

/// `read /var/log/db: 1,204 waits, p50 12 µs, p99 1.2 ms, longest 5.0 ms`.
fn exact_wait(wait: &Wait) -> String {
    let what = match (&wait.call, &wait.path) {
        (None, _) => String::new(),
        (Some(call), None) if call == "none" => "no system call: ".to_owned(),
        (Some(call), None) => format!("{call}: "),
        (Some(call), Some(path)) => format!("{call} {}: ", bounded(path, MAX_PATH_BYTES)),
    };
    let waits = if wait.count == 1 { "wait" } else { "waits" };
    let mut text = format!(
        "{what}{} {waits}, p50 {}, p99 {}, longest {}",
        count(wait.count),
        duration(wait.p50_ns),
        duration(wait.p99_ns),
        duration(wait.max_ns),
    );
    if let (Some(culprit), Some(tid)) = (&wait.culprit, wait.culprit_tid) {
        let culprit_ns = duration(wait.culprit_ns.unwrap_or(0));
        text += &format!(", when {culprit} ({tid}) had the CPU for {culprit_ns}");
    }
    text
}

struct Lines {
    columns: usize,
    observed: usize,
    all: Vec<Line<'static>>,
}

impl Lines {
    /// `shop (4711): it waits for another service, postgres (812)`.
    fn headline(&mut self, service: &Service, lead: Option<&Episode>, colour: Colour) {
        let verdict = match lead {
            None if service.level == Level::Ok => "all queues are ok".to_owned(),
            None => "cause not known yet".to_owned(),
            Some(lead) => lead
                .verdict
                .clone()
                .unwrap_or_else(|| format!("its {} queue fills; cause not known yet", lead.kind)),
        };
        let text = format!("{} ({}): {verdict}", service.target, service.pid);
        let style = text_style(style_of(service.level, colour)).add_modifier(Modifier::BOLD);
        for line in wrap(&bounded(&text, MAX_BYTES), self.columns) {
            self.all.push(Line::styled(line, style));
        }
    }

    /// The wait chain, a line per hop; the root cause is named at the last one.
    fn path(&mut self, episode: &Episode) {
        let mut steps: Vec<Step> = episode.path.clone();
        let mut root = None;
        if let Some(end) = &episode.root {
            let last = steps.last().map(|step| step.name.as_str());
            match end.culprit.as_deref() {
                Some(culprit) if last != Some(culprit) => steps.push(Step {
                    name: culprit.to_owned(),
                    ..Step::default()
                }),
                None if steps.is_empty() => steps.push(Step {
                    name: end.cause.clone().unwrap_or_default(),
                    ..Step::default()
                }),
                _ => {}
            }
            root = Some(end.cause.as_deref());
        }
        let last = steps.len().saturating_sub(1);
        let names: Vec<String> = steps
            .iter()
            .enumerate()
            .map(|(depth, step)| {
                let branch = match depth {
                    0 => String::new(),
                    depth => format!("{:indent$}└─ ", "", indent = 3 * (depth - 1)),
                };
                format!("{branch}{}", cut(&step.name, MAX_HOP_NAME))
            })
            .collect();
        let column = names.iter().map(|name| width(name)).max().unwrap_or(0) + 2;
        let room = self.columns.saturating_sub(LABEL + column).max(MIN_STATE);
        for (depth, (step, name)) in steps.iter().zip(&names).enumerate() {
            let cause = root.filter(|_| depth == last);
            let state = match (step.state.as_str(), cause) {
                ("", Some(Some(cause))) => format!("root cause: {cause}"),
                ("", Some(None)) => "root cause".to_owned(),
                (state, Some(Some(cause))) if state != cause => {
                    format!("{state}; root cause: {cause}")
                }
                (state, Some(_)) => format!("{state} (root cause)"),
                (state, None) => state.to_owned(),
            };
            let texts = wrap(&bounded(&state, MAX_BYTES), room);
            for (index, text) in texts.into_iter().enumerate() {
                let name = if index == 0 { name.as_str() } else { "" };
                let label = if depth + index == 0 { "path" } else { "" };
                self.labelled(label, vec![Span::raw(pad(name, column)), Span::raw(text)]);
            }
        }
    }

    fn queue(&mut self, label: &str, queue: &Queue, colour: Colour) {
        let style = text_style(style_of(queue.level, colour));
        let mut facts = vec![amount(
            queue.depth,
            queue.limit,
            &bounded(&queue.unit, MAX_BYTES),
        )];
        if let Some(wait) = queue.wait_ns {
            facts.push(format!("wait {}", duration(wait)));
        }
        if let Some(left) = queue.time_to_full_ns
            && queue.level < Level::Full
        {
            facts.push(format!("full in {}", duration(left)));
        }
        if let (Some(ins), Some(outs)) = (queue.arrivals_per_s, queue.departures_per_s) {
            let flow = |per_s: f64| match queue.unit.as_str() {
                "bytes" => bytes(per_s as u64),
                _ => rate(per_s),
            };
            facts.push(format!("in {}/s, out {}/s", flow(ins), flow(outs)));
        }
        if queue.losses > 0 {
            facts.push(format!("{} lost", count(queue.losses)));
        }
        let level = match queue.level {
            Level::Ok => String::new(),
            level => format!(" ({})", level.name()),
        };
        let room = self.columns.saturating_sub(LABEL + BAR + TREND + 3);
        let name = format!("{} {}{level}", queue.kind, queue.name);
        let name = cut_left_aligned(&name, room);
        self.labelled(
            label,
            vec![
                Span::styled(format!("{} ", fill_bar(queue, BAR)), style),
                Span::raw(format!("{} ", spark(queue, TREND, self.observed))),
                Span::styled(name, style),
            ],
        );
        self.row("", &facts.join(", "));
    }

    /// The waits that hooks have measured in the last second.
    fn waits(&mut self, waits: &[Wait]) {
        let mut is_blocked = false;
        for wait in waits {
            let is_first = wait.kind == RUN_QUEUE || !is_blocked;
            is_blocked |= wait.kind != RUN_QUEUE;
            let label = match (wait.kind.as_str(), is_first) {
                (_, false) => "",
                (RUN_QUEUE, _) => "CPU wait",
                _ => "blocked",
            };
            self.row(label, &exact_wait(wait));
        }
    }

    /// A labelled text, wrapped.
    fn row(&mut self, label: &str, text: &str) {
        let texts = wrap(
            &bounded(text, MAX_BYTES),
            self.columns.saturating_sub(LABEL),
        );
        for (index, text) in texts.into_iter().enumerate() {
            self.labelled(if index == 0 { label } else { "" }, vec![Span::raw(text)]);
        }
    }

    fn labelled(&mut self, label: &str, mut spans: Vec<Span<'static>>) {
        let label = format!("{label:<LABEL$}");
        spans.insert(
            0,
            Span::styled(label, Style::new().add_modifier(Modifier::DIM)),
        );
        self.all.push(Line::from(spans));
    }
}
