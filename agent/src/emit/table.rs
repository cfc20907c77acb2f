//! The table of `tailback sample`: one row per queue, worst first, idle queues hidden.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    io::{self, Write},
    sync::Arc,
};

use super::terminal::{Colour, style};
use crate::{
    event::{Level, QueueState},
    queue::Kind,
    sample::Target,
    text::{bounded, bytes, count, duration, pad, pad_left, rate, width as width_of},
};

const COLUMNS: usize = 10;
const HEADERS: [&str; COLUMNS] = [
    "TARGET", "PID", "KIND", "QUEUE", "DEPTH", "LIMIT", "IN/s", "OUT/s", "OLDEST", "LEVEL",
];
/// Right-aligned columns.
const NUMERIC: [usize; 6] = [1, 4, 5, 6, 7, 8];
/// Longest name in a cell, in bytes.
const MAX_NAME_BYTES: usize = 40;
/// Maximum number of notes below the table, about queues that are not ok.
const MAX_NOTES: usize = 10;

/// Writes one row per queue, worst first, then a note per queue that is not ok. Idle queues are hidden unless `all` is
/// set, but each service keeps one row; the last line counts the hidden ones.
pub fn write(
    out: &mut impl Write,
    states: &[QueueState],
    target: impl Fn(u32) -> Option<Arc<Target>>,
    all: bool,
    colour: Colour,
) -> io::Result<()> {
    let mut order: Vec<&QueueState> = states.iter().collect();
    order.sort_by(|a, b| {
        b.level
            .cmp(&a.level)
            .then(is_idle(a).cmp(&is_idle(b)))
            .then(b.score.total_cmp(&a.score))
            // The accept queue is the most informative one of an idle service.
            .then(is_accept(b).cmp(&is_accept(a)))
            .then_with(|| a.key.cmp(&b.key))
    });
    let mut shown_targets = BTreeSet::new();
    let shown: Vec<&QueueState> = order
        .into_iter()
        .filter(|state| shown_targets.insert(state.key.target) || all || !is_idle(state))
        .collect();
    let rows: Vec<[String; COLUMNS]> = shown
        .iter()
        .map(|state| row(state, target(state.key.target).as_deref()))
        .collect();
    let mut widths = HEADERS.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(width_of(cell));
        }
    }
    write_row(out, &HEADERS.map(str::to_owned), &widths, None)?;
    for (state, row) in shown.iter().zip(&rows) {
        let paint = (colour == Colour::Always).then(|| style(state.level));
        write_row(out, row, &widths, paint)?;
    }
    write_notes(out, &shown, &target)?;
    write_summary(out, states, shown.len())
}

fn row(state: &QueueState, target: Option<&Target>) -> [String; COLUMNS] {
    let unknown = || "-".to_owned();
    let reading = &state.reading;
    let unit = reading.unit.unwrap_or(state.key.kind.unit());
    let amount = |value: u64| match unit {
        "bytes" => bytes(value),
        _ => count(value),
    };
    let flow = |per_s: f64| match unit {
        "bytes" => bytes(per_s as u64),
        _ => rate(per_s),
    };
    let oldest = reading
        .oldest_age_ns
        .max(reading.wait_ns)
        .filter(|_| reading.depth > 0);
    [
        target.map_or_else(unknown, |target| bounded(&target.name, MAX_NAME_BYTES)),
        target.map_or_else(unknown, |target| target.pid.to_string()),
        state.key.kind.name().to_owned(),
        bounded(state.key.name(), MAX_NAME_BYTES),
        amount(reading.depth),
        reading.limit.map_or_else(unknown, amount),
        state.arrivals_per_s.map_or_else(unknown, flow),
        state.departures_per_s.map_or_else(unknown, flow),
        oldest.map_or_else(unknown, duration),
        state.level.name().to_owned(),
    ]
}

/// For each queue that is not ok: its worst part (a connection, a thread) and what it lost.
fn write_notes(
    out: &mut impl Write,
    shown: &[&QueueState],
    target: &impl Fn(u32) -> Option<Arc<Target>>,
) -> io::Result<()> {
    let bad = shown.iter().filter(|state| state.level > Level::Ok);
    let notes: Vec<String> = bad
        .filter_map(|state| {
            let lost = match state.reading.losses {
                0 => None,
                losses => Some(format!("{} {}", count(losses), state.key.kind.losses())),
            };
            let parts: Vec<String> = state
                .reading
                .worst
                .clone()
                .into_iter()
                .chain(lost)
                .collect();
            let name =
                target(state.key.target).map_or_else(String::new, |target| target.name.clone());
            (!parts.is_empty()).then(|| {
                let kind = state.key.kind.name();
                format!("  {name} {kind} {}: {}", state.key.name(), parts.join("; "))
            })
        })
        .collect();
    if !notes.is_empty() {
        writeln!(out)?;
    }
    for note in notes.iter().take(MAX_NOTES) {
        writeln!(out, "{note}")?;
    }
    Ok(())
}

fn write_summary(out: &mut impl Write, states: &[QueueState], shown: usize) -> io::Result<()> {
    let targets: BTreeSet<u32> = states.iter().map(|state| state.key.target).collect();
    let bad = states
        .iter()
        .filter(|state| state.level > Level::Ok)
        .count();
    let services = match targets.len() {
        1 => "1 service".to_owned(),
        n => format!("{n} services"),
    };
    let hidden = match states.len().saturating_sub(shown) {
        0 => String::new(),
        1 => "; 1 idle queue hidden (show with -v)".to_owned(),
        n => format!("; {} idle queues hidden (show with -v)", count(n as u64)),
    };
    let verdict = match bad {
        0 => "all ok".to_owned(),
        n => format!("{n} not ok"),
    };
    writeln!(
        out,
        "\n{services}, {} queues: {verdict}{hidden}",
        count(states.len() as u64)
    )
}

fn is_accept(state: &QueueState) -> bool {
    state.key.kind == Kind::Accept
}

/// Whether the queue is empty. Open files and used memory are never zero, so those kinds count as idle below half of
/// their limit.
fn is_idle(state: &QueueState) -> bool {
    let reading = &state.reading;
    let is_stock = matches!(state.key.kind, Kind::Fd | Kind::Memory);
    state.level == Level::Ok
        && reading.losses == 0
        && (reading.depth == 0 || is_stock && reading.fill.is_none_or(|fill| fill < 0.5))
}

fn write_row(
    out: &mut impl Write,
    cells: &[String; COLUMNS],
    widths: &[usize; COLUMNS],
    paint_level: Option<&str>,
) -> io::Result<()> {
    let mut line = String::new();
    for (index, (cell, width)) in cells.iter().zip(widths).enumerate() {
        let cell = if NUMERIC.contains(&index) {
            pad_left(cell, *width) + "  "
        } else {
            pad(cell, *width) + "  "
        };
        match paint_level.filter(|_| index == COLUMNS - 1) {
            Some(paint) => line += &format!("{paint}{}\x1b[0m", cell.trim_end()),
            None => line += &cell,
        }
    }
    writeln!(out, "{}", line.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        event::Instant,
        queue::{QueueKey, Reading},
    };

    fn state(target: u32, kind: Kind, depth: u64, level: Level) -> QueueState {
        QueueState {
            at: Instant::default(),
            key: Arc::new(QueueKey::new(target, kind, "q".into())),
            reading: Reading {
                depth,
                worst: (depth > 0).then(|| "fd 3".to_owned()),
                ..Reading::default()
            },
            score: 0.0,
            level,
            arrivals_per_s: None,
            departures_per_s: None,
            time_to_full_ns: None,
        }
    }

    fn table(states: &[QueueState], all: bool) -> String {
        let target = |id: u32| {
            Some(Arc::new(Target {
                id,
                name: format!("s{id}"),
                ..Target::default()
            }))
        };
        let mut out = Vec::new();
        write(&mut out, states, target, all, Colour::Never).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_worst_queue_comes_first_and_idle_ones_are_hidden() {
        let states = [
            state(1, Kind::Recv, 0, Level::Ok),
            state(1, Kind::Send, 5, Level::Ok),
            state(2, Kind::Pipe, 16, Level::Full),
            state(3, Kind::Recv, 0, Level::Ok),
        ];
        let text = table(&states, false);
        let names: Vec<&str> = text
            .lines()
            .skip(1)
            .map_while(|line| line.split_whitespace().next())
            .collect();
        assert_eq!(names, ["s2", "s1", "s3"], "{text}");
        assert!(text.contains("s2 pipe q: fd 3"), "{text}");
        assert!(
            text.ends_with("3 services, 4 queues: 1 not ok; 1 idle queue hidden (show with -v)\n"),
            "{text}"
        );
        assert!(table(&states, true).ends_with("4 queues: 1 not ok\n"));
    }
}
