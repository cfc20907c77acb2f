//! Every queue once, as a table for a person.
#![forbid(unsafe_code)]

use std::io::{self, Write};

use crate::{
    detect::QueueState,
    queue::Kind,
    sample::Target,
    text::{count, duration, rate},
};

const HEADS: [&str; 11] = [
    "TARGET", "PID", "KIND", "QUEUE", "DEPTH", "LIMIT", "IN/s", "OUT/s", "WAIT", "OLDEST", "LEVEL",
];

/// Writes one row per queue, the worst first. Idle connection queues and pipes are left out unless `all`; the answer
/// says how many.
pub fn write(
    out: &mut impl Write,
    states: &[QueueState],
    name: impl Fn(u32) -> Option<std::sync::Arc<Target>>,
    all: bool,
) -> io::Result<()> {
    let mut shown: Vec<&QueueState> = states
        .iter()
        .filter(|state| all || !is_idle(state))
        .collect();
    shown.sort_by(|a, b| {
        b.level
            .cmp(&a.level)
            .then(b.score.total_cmp(&a.score))
            .then_with(|| a.key.cmp(&b.key))
    });
    let unknown = || "-".to_owned();
    let rows: Vec<[String; 11]> = shown
        .iter()
        .map(|state| {
            let target = name(state.key.target);
            [
                target
                    .as_ref()
                    .map_or_else(unknown, |target| target.name.clone()),
                target
                    .as_ref()
                    .map_or_else(unknown, |target| target.pid.to_string()),
                state.key.kind.name().to_owned(),
                state.key.name.clone(),
                count(state.reading.depth),
                state.reading.limit.map_or_else(unknown, count),
                state.arrivals_per_s.map_or_else(unknown, rate),
                state.departures_per_s.map_or_else(unknown, rate),
                state.reading.wait_ns.map_or_else(unknown, duration),
                state.reading.oldest_ns.map_or_else(unknown, duration),
                state.level.name().to_owned(),
            ]
        })
        .collect();
    let mut widths = HEADS.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    write_row(out, &HEADS.map(str::to_owned), &widths)?;
    for row in &rows {
        write_row(out, row, &widths)?;
    }
    let hidden = states.len() - shown.len();
    if hidden > 0 {
        writeln!(out, "{hidden} empty queues not shown (-v shows them)")?;
    }
    Ok(())
}

fn is_idle(state: &QueueState) -> bool {
    matches!(state.key.kind, Kind::Recv | Kind::Send | Kind::Pipe)
        && state.reading.depth == 0
        && state.reading.losses == 0
}

fn write_row(out: &mut impl Write, cells: &[String; 11], widths: &[usize; 11]) -> io::Result<()> {
    let mut line = String::new();
    for (index, (cell, width)) in cells.iter().zip(widths).enumerate() {
        // Numbers to the right, names to the left.
        if matches!(index, 1 | 4..=9) {
            line += &format!("{cell:>width$}  ");
        } else {
            line += &format!("{cell:<width$}  ");
        }
    }
    writeln!(out, "{}", line.trim_end())
}
