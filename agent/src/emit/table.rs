//! Every queue once, as a table for a person: worst first, with what is idle left out.
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
    text::{bounded, bytes, count, duration, rate},
};

const COLUMNS: usize = 10;
const HEADS: [&str; COLUMNS] = [
    "TARGET", "PID", "KIND", "QUEUE", "DEPTH", "LIMIT", "IN/s", "OUT/s", "WAITS", "LEVEL",
];
/// Columns of numbers, which stand to the right.
const NUMBERS: [usize; 6] = [1, 4, 5, 6, 7, 8];
/// Longest name in a cell, characters.
const MAX_NAME: usize = 40;
/// Rows that are not ok and are told more of, below the table.
const MAX_NOTES: usize = 10;

/// Writes one row per queue, the worst first, then what more there is to say of those that are not ok. Queues in which
/// nothing waits are left out unless `all` (but each service keeps one row); the last line says how many.
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
            // What a service is for says more of it than what it has.
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
    let mut widths = HEADS.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    write_row(out, &HEADS.map(str::to_owned), &widths, None)?;
    for (state, row) in shown.iter().zip(&rows) {
        let paint = (colour == Colour::Always).then(|| style(state.level));
        write_row(out, row, &widths, paint)?;
    }
    write_notes(out, &shown, &target)?;
    write_sum(out, states, shown.len())
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
    let waits = reading
        .oldest_age_ns
        .max(reading.wait_ns)
        .filter(|_| reading.depth > 0);
    [
        target.map_or_else(unknown, |target| bounded(&target.name, MAX_NAME)),
        target.map_or_else(unknown, |target| target.pid.to_string()),
        state.key.kind.name().to_owned(),
        bounded(state.key.name(), MAX_NAME),
        amount(reading.depth),
        reading.limit.map_or_else(unknown, amount),
        state.arrivals_per_s.map_or_else(unknown, flow),
        state.departures_per_s.map_or_else(unknown, flow),
        waits.map_or_else(unknown, duration),
        state.level.name().to_owned(),
    ]
}

/// Which part of each bad queue is worst off, and what was lost.
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
            let said: Vec<String> = state
                .reading
                .worst
                .clone()
                .into_iter()
                .chain(lost)
                .collect();
            let name =
                target(state.key.target).map_or_else(String::new, |target| target.name.clone());
            (!said.is_empty()).then(|| {
                let kind = state.key.kind.name();
                format!("  {name} {kind} {}: {}", state.key.name(), said.join("; "))
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

fn write_sum(out: &mut impl Write, states: &[QueueState], shown: usize) -> io::Result<()> {
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
        n => format!(
            "; {} in which nothing waits not shown (-v shows them)",
            count(n as u64)
        ),
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

/// Nothing waits in it. How many files are open, or how much memory is used, is never nothing: that is of interest when
/// it comes near its limit.
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
        let cell = if NUMBERS.contains(&index) {
            format!("{cell:>width$}  ")
        } else {
            format!("{cell:<width$}  ")
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
    fn the_worst_stands_first_and_what_is_idle_is_left_out() {
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
            text.ends_with("3 services, 4 queues: 1 not ok; 1 in which nothing waits not shown (-v shows them)\n"),
            "{text}"
        );
        assert!(table(&states, true).ends_with("4 queues: 1 not ok\n"));
    }
}
