//! Numbers, durations and foreign names as people read them.
#![forbid(unsafe_code)]

/// `1.2 s`, `340 ms`, `52 µs`, `3 min 20 s`.
pub fn duration(ns: u64) -> String {
    let seconds = ns as f64 / 1e9;
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.0} µs", ns as f64 / 1e3),
        1_000_000..10_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        10_000_000..1_000_000_000 => format!("{:.0} ms", ns as f64 / 1e6),
        1_000_000_000..10_000_000_000 => format!("{seconds:.1} s"),
        10_000_000_000..120_000_000_000 => format!("{seconds:.0} s"),
        120_000_000_000..7_200_000_000_000 => {
            let seconds = ns / 1_000_000_000;
            format!("{} min {} s", seconds / 60, seconds % 60)
        }
        _ => format!("{:.1} h", seconds / 3600.0),
    }
}

/// `12,345`.
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

/// `812 B`, `4.2 kB`, `16 MB`: SI units, as the field writes them.
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

/// `23 of 100 connections`, `4.2 kB of 213 kB`, `7 calls`.
pub fn amount(value: u64, limit: Option<u64>, unit: &str) -> String {
    match (unit, limit) {
        ("bytes", Some(limit)) => format!("{} of {}", bytes(value), bytes(limit)),
        ("bytes", None) => bytes(value),
        (_, Some(limit)) => format!("{} of {} {unit}", count(value), count(limit)),
        (_, None) => format!("{} {unit}", count(value)),
    }
}

/// A rate without more digits than it deserves.
pub fn rate(per_s: f64) -> String {
    if per_s >= 100.0 {
        count(per_s.round() as u64)
    } else {
        format!("{per_s:.1}")
    }
}

/// A foreign name (a process's, a path's) made harmless, for one line of output.
pub fn harmless(name: &str) -> String {
    bounded(name, 200)
}

/// A foreign text with control characters escaped, at most `max` bytes, with `…` where it was cut.
pub fn bounded(text: &str, max: usize) -> String {
    const CUT: &str = "…";
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
            while out.len() + CUT.len() > max && out.pop().is_some() {}
            out.push_str(CUT);
            break;
        }
    }
    out
}

/// Characters that reorder what stands around them on a terminal.
fn is_bidi_control(character: char) -> bool {
    matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Breaks a text into lines of at most `width` characters: at blanks, and within a word that is longer than a line.
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let width = width.max(1);
    let mut lines = Vec::new();
    let mut line = String::new();
    let mut length = 0;
    for word in text.split(' ').filter(|word| !word.is_empty()) {
        let long = word.chars().count();
        if length > 0 && length + 1 + long > width {
            lines.push(std::mem::take(&mut line));
            length = 0;
        }
        if length > 0 {
            line.push(' ');
            length += 1;
        }
        for character in word.chars() {
            if length == width {
                lines.push(std::mem::take(&mut line));
                length = 0;
            }
            line.push(character);
            length += 1;
        }
    }
    if length > 0 || lines.is_empty() {
        lines.push(line);
    }
    lines
}

/// `▁▂▃▅█`: a course in one line, scaled to `max`.
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
    fn durations_carry_a_unit_and_few_digits() {
        assert_eq!(duration(640), "640 ns");
        assert_eq!(duration(1_500_000), "1.5 ms");
        assert_eq!(duration(340_000_000), "340 ms");
        assert_eq!(duration(2_340_000_000), "2.3 s");
        assert_eq!(duration(200_000_000_000), "3 min 20 s");
    }

    #[test]
    fn hostile_names_cannot_write_to_the_terminal() {
        assert_eq!(harmless("a\nb\u{1b}[2J"), "a\\nb\\u{1b}[2J");
        assert!(harmless(&"x".repeat(5_000)).len() <= 200);
        assert_eq!(harmless("nginx: worker ü 漢"), "nginx: worker ü 漢");
    }

    #[test]
    fn a_cut_keeps_the_bound_and_whole_characters() {
        assert_eq!(bounded("abcd", 4), "abcd");
        for max in 3..40 {
            let cut = bounded(&"漢\n".repeat(100), max);
            assert!(cut.len() <= max, "{max}: {} bytes", cut.len());
            assert!(cut.ends_with('…'));
        }
    }

    #[test]
    fn lines_break_at_blanks_and_never_pass_the_width() {
        assert_eq!(wrap("one two  three", 7), ["one two", "three"]);
        assert_eq!(wrap("a longestword b", 5), ["a", "longe", "stwor", "d b"]);
        assert_eq!(wrap("", 5), [""]);
        let text = "größe 漢字漢字漢字 x ".repeat(20);
        for width in 1..30 {
            let lines = wrap(&text, width);
            assert!(lines.iter().all(|line| line.chars().count() <= width));
            let letters = |text: &str| text.replace(' ', "");
            assert_eq!(letters(&lines.concat()), letters(&text));
        }
    }

    #[test]
    fn counts_are_grouped_by_thousands() {
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(count(999), "999");
    }
}
