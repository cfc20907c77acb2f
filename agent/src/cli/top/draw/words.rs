//! Texts, numbers and bars of a given width.

use crate::{
    signal::live::view::{Queue, Service, View},
    text::{bounded, bytes, count, duration, pad, sparkline, width},
};

/// Longest untrusted text, in bytes.
const MAX_BYTES: usize = 1_000;
/// Points of a history, with the one in progress: ten minutes.
const POINTS: usize = 121;

/// An untrusted text, escaped, of at most this width.
pub(super) fn cut(text: &str, columns: usize) -> String {
    let text = bounded(text, MAX_BYTES);
    if width(&text) <= columns {
        return text;
    }
    let mut out = String::new();
    let mut used = 0;
    for character in text.chars() {
        used += width(character.encode_utf8(&mut [0; 4]));
        // One column is for the ellipsis.
        if used >= columns {
            break;
        }
        out.push(character);
    }
    if columns > 0 {
        out.push('…');
    }
    out
}

/// Like [`cut`], padded to exactly this width.
pub(super) fn cut_left_aligned(text: &str, columns: usize) -> String {
    pad(&cut(text, columns), columns)
}

/// Time of day, in UTC as in all outputs: `12:00:05Z`.
pub(super) fn clock(unix_ns: u64) -> String {
    let seconds = unix_ns / 1_000_000_000 % 86_400;
    format!(
        "{:02}:{:02}:{:02}Z",
        seconds / 3_600,
        seconds / 60 % 60,
        seconds % 60
    )
}

/// A duration of at most seven columns: `340ms`, `3m20s`.
pub(super) fn seconds_short(ns: u64) -> String {
    let seconds = ns / 1_000_000_000;
    match seconds {
        0..120 => duration(ns).replace(' ', ""),
        120..6_000 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h", seconds / 3_600),
    }
}

/// `101/100`, `84kB/213kB`, without the limit if it is too long.
pub(super) fn depth_short(queue: &Queue) -> String {
    let amount = |value: u64| match (queue.unit.as_str(), value) {
        ("bytes", _) => bytes(value).replace(' ', "").replace(".0", ""),
        (_, 0..100_000) => value.to_string(),
        (_, 100_000..10_000_000) => format!("{}k", value / 1_000),
        _ => format!("{}M", value / 1_000_000),
    };
    match queue.limit {
        Some(limit) => {
            let both = format!("{}/{}", amount(queue.depth), amount(limit));
            if both.len() < super::DEPTH {
                both
            } else {
                amount(queue.depth)
            }
        }
        None => amount(queue.depth),
    }
}

/// `█████···`: how full the queue is. Empty without a limit.
pub(super) fn fill_bar(queue: &Queue, columns: usize) -> String {
    const PARTS: [char; 7] = ['▏', '▎', '▍', '▌', '▋', '▊', '▉'];
    let Some(limit) = queue.limit.filter(|limit| *limit > 0) else {
        return " ".repeat(columns);
    };
    let share = queue.fill.unwrap_or(queue.depth as f64 / limit as f64);
    let eighths = (share.clamp(0.0, 1.0) * columns as f64 * 8.0).round() as usize;
    // Any work shows.
    let eighths = eighths.max(usize::from(queue.depth > 0));
    let mut bar = "█".repeat(eighths / 8);
    bar.extend((eighths % 8).checked_sub(1).map(|part| PARTS[part]));
    let rest = columns.saturating_sub(bar.chars().count());
    bar + &"·".repeat(rest)
}

/// Number of points that a view covers: fewer than all if it began lately.
pub(super) fn observed(view: &View) -> usize {
    let passed_ns = view.time_unix_ns.saturating_sub(view.began_unix_ns);
    let points = passed_ns / view.point_ns.max(1) + 1;
    usize::try_from(points).unwrap_or(usize::MAX)
}

/// Depth over the observed time: each column is the maximum of its part, the last one is now.
pub(super) fn spark(queue: &Queue, columns: usize, observed: usize) -> String {
    let points = observed.clamp(columns, POINTS.max(columns));
    let max = queue.depths.iter().copied().max().unwrap_or(0);
    let scale = max.max(
        queue
            .limit
            .filter(|limit| *limit <= max.saturating_mul(8))
            .unwrap_or(0),
    );
    let depths = &queue.depths[queue.depths.len().saturating_sub(points)..];
    let empty = points - depths.len();
    let part = |column: usize| {
        let (from, to) = (column * points / columns, (column + 1) * points / columns);
        let range = from.saturating_sub(empty)..to.saturating_sub(empty);
        let values = depths.get(range).unwrap_or_default();
        values.iter().copied().max().unwrap_or(0)
    };
    let values: Vec<u64> = (0..columns).map(part).collect();
    sparkline(&values, scale)
}

/// `62%`.
pub(super) fn admit(ratio: f64) -> String {
    format!("{:.0}%", ratio * 100.0)
}

/// `admit 62%, at most 6 at once, reject after 15 ms in the queue, retry after 2.3 s`.
pub(super) fn signal(service: &Service) -> String {
    let mut parts = Vec::new();
    if service.admit_ratio < 1.0 {
        parts.push(format!("admit {}", admit(service.admit_ratio)));
    }
    if let Some(limit) = service.concurrency_limit {
        parts.push(format!("at most {} at once", count(limit.into())));
    }
    if let Some(wait) = service.max_queue_wait_ns {
        parts.push(format!("reject after {} in the queue", duration(wait)));
    }
    if service.retry_after_ms > 0 {
        let wait = duration(u64::from(service.retry_after_ms) * 1_000_000);
        parts.push(format!("retry after {wait}"));
    }
    if parts.is_empty() {
        return "admit everything".to_owned();
    }
    parts.join(", ")
}
