//! Formatting for people: numbers with units, untrusted names made safe to print, lines wrapped by display width.
#![forbid(unsafe_code)]

use std::borrow::Cow;

use textwrap::{Options, WordSeparator, WordSplitter, WrapAlgorithm};
use unicode_width::UnicodeWidthStr as _;

/// Maximum number of bytes of an untrusted name in one line of output.
const MAX_NAME_BYTES: usize = 200;

/// Formats nanoseconds: `1.2 s`, `340 ms`, `52 µs`, `3 min 20 s`. What would be rounded up to the next unit is in that unit:
/// `1.0 s`, not `1000 ms`.
pub fn duration(ns: u64) -> String {
    let seconds = ns as f64 / 1e9;
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..999_500 => format!("{:.0} µs", ns as f64 / 1e3),
        999_500..9_950_000 => format!("{:.1} ms", ns as f64 / 1e6),
        9_950_000..999_500_000 => format!("{:.0} ms", ns as f64 / 1e6),
        999_500_000..9_950_000_000 => format!("{seconds:.1} s"),
        9_950_000_000..119_500_000_000 => format!("{seconds:.0} s"),
        119_500_000_000..7_200_000_000_000 => {
            let seconds = ns / 1_000_000_000;
            format!("{} min {} s", seconds / 60, seconds % 60)
        }
        _ => format!("{:.1} h", seconds / 3600.0),
    }
}

/// Groups digits by thousands: `12,345`.
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Formats bytes with SI units (powers of 1000): `812 B`, `4.2 kB`, `16 MB`.
pub fn bytes(value: u64) -> String {
    let mut scaled = value as f64;
    for unit in ["B", "kB", "MB", "GB", "TB"] {
        if scaled < 999.5 {
            return if unit == "B" || scaled >= 99.5 {
                format!("{scaled:.0} {unit}")
            } else {
                format!("{scaled:.1} {unit}")
            };
        }
        scaled /= 1000.0;
    }
    format!("{scaled:.0} PB")
}

/// Formats a queue's depth with its limit and unit: `23 of 100 connections`, `4.2 kB of 213 kB`, `7 calls`.
pub fn amount(value: u64, limit: Option<u64>, unit: &str) -> String {
    match (unit, limit) {
        ("bytes", Some(limit)) => format!("{} of {}", bytes(value), bytes(limit)),
        ("bytes", None) => bytes(value),
        (_, Some(limit)) => format!("{} of {} {unit}", count(value), count(limit)),
        (_, None) => format!("{} {unit}", count(value)),
    }
}

/// Formats a rate per second: one decimal below 100, whole numbers above.
pub fn rate(per_s: f64) -> String {
    if per_s >= 100.0 {
        count(per_s.round() as u64)
    } else {
        format!("{per_s:.1}")
    }
}

/// Makes an untrusted name (of a process, a path) safe to print on one line.
pub fn harmless(name: &str) -> String {
    bounded(name, MAX_NAME_BYTES)
}

/// Escapes control characters in an untrusted text and truncates it to `max` bytes, ending with `…`.
pub fn bounded(text: &str, max: usize) -> String {
    const ELLIPSIS: &str = "…";
    let mut out = String::with_capacity(text.len().min(max));
    for character in text.chars() {
        let start = out.len();
        if character.is_control() || is_bidi_control(character) {
            out.extend(character.escape_default());
        } else {
            out.push(character);
        }
        if out.len() > max {
            out.truncate(start);
            while out.len() + ELLIPSIS.len() > max && out.pop().is_some() {}
            out.push_str(ELLIPSIS);
            break;
        }
    }
    out
}

/// Whether a terminal would reorder the text around this character.
fn is_bidi_control(character: char) -> bool {
    matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Wraps a text to lines of at most `columns` terminal columns: at spaces, and inside words longer than a line. Runs of
/// spaces become one.
pub fn wrap(text: &str, columns: usize) -> Vec<String> {
    let words: Vec<&str> = text.split(' ').filter(|word| !word.is_empty()).collect();
    let text = words.join(" ");
    let options = Options::new(columns.max(1))
        .word_separator(WordSeparator::AsciiSpace)
        .word_splitter(WordSplitter::NoHyphenation)
        .wrap_algorithm(WrapAlgorithm::FirstFit);
    textwrap::wrap(&text, options)
        .into_iter()
        .map(Cow::into_owned)
        .collect()
}

/// The number of terminal columns of a text: 2 for each wide character (CJK, most emoji).
pub fn width(text: &str) -> usize {
    text.width()
}

/// Pads a text on the right to `columns` terminal columns.
pub fn pad(text: &str, columns: usize) -> String {
    format!(
        "{text}{:gap$}",
        "",
        gap = columns.saturating_sub(width(text))
    )
}

/// Pads a text on the left to `columns` terminal columns, for numbers.
pub fn pad_left(text: &str, columns: usize) -> String {
    format!(
        "{:gap$}{text}",
        "",
        gap = columns.saturating_sub(width(text))
    )
}

/// Draws values over time as one line, scaled to `max`: `▁▂▃▅█`.
pub fn sparkline(values: &[u64], max: u64) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let top = BARS.len() as u64 - 1;
    values
        .iter()
        .map(|value| {
            let scaled = u128::from(*value) * u128::from(top) / u128::from(max.max(1));
            BARS[scaled.min(u128::from(top)) as usize]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit_and_few_digits() {
        assert_eq!(duration(640), "640 ns");
        assert_eq!(duration(1_500_000), "1.5 ms");
        assert_eq!(duration(340_000_000), "340 ms");
        assert_eq!(duration(2_340_000_000), "2.3 s");
        assert_eq!(duration(200_000_000_000), "3 min 20 s");
        assert_eq!(duration(999_700), "1.0 ms");
        assert_eq!(duration(9_960_000), "10 ms");
        assert_eq!(duration(999_700_000), "1.0 s");
        assert_eq!(duration(9_960_000_000), "10 s");
        assert_eq!(duration(119_700_000_000), "1 min 59 s");
    }

    #[test]
    fn control_characters_in_names_are_escaped() {
        assert_eq!(harmless("a\nb\u{1b}[2J"), "a\\nb\\u{1b}[2J");
        assert!(harmless(&"x".repeat(5_000)).len() <= 200);
        assert_eq!(harmless("nginx: worker ü 漢"), "nginx: worker ü 漢");
    }

    #[test]
    fn truncation_keeps_the_byte_limit_and_whole_characters() {
        assert_eq!(bounded("abcd", 4), "abcd");
        for max in 3..40 {
            let cut = bounded(&"漢\n".repeat(100), max);
            assert!(cut.len() <= max, "{max}: {} bytes", cut.len());
            assert!(cut.ends_with('…'));
        }
    }

    #[test]
    fn lines_break_at_spaces_and_never_exceed_the_display_width() {
        assert_eq!(wrap("one two  three", 7), ["one two", "three"]);
        assert_eq!(wrap("a longestword b", 5), ["a", "longe", "stwor", "d b"]);
        assert_eq!(wrap("", 5), [""]);
        assert_eq!(wrap("well-known /a/b-c", 10), ["well-known", "/a/b-c"]);
        let text = "größe 漢字漢字漢字 x ".repeat(20);
        // A line cannot be narrower than its widest character, two columns.
        for columns in 2..30 {
            let lines = wrap(&text, columns);
            assert!(lines.iter().all(|line| width(line) <= columns));
            let letters = |text: &str| text.replace(' ', "");
            assert_eq!(letters(&lines.concat()), letters(&text));
        }
    }

    #[test]
    fn columns_align_by_display_width() {
        assert_eq!(width("漢字"), 4);
        assert_eq!(pad("漢字", 6) + "|", "漢字  |");
        assert_eq!(pad_left("7", 3), "  7");
        assert_eq!(pad("longer than", 3), "longer than");
    }

    #[test]
    fn counts_are_grouped_by_thousands() {
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(count(999), "999");
    }
}
