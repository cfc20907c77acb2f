//! The table for the terminal.

use std::fmt::Write as _;

use tailback_tests::accuracy::{Finding, ROWS, Unit, Verdict};

use super::Column;

const HEADINGS: [&str; 8] = [
    "kind", "quantity", "kernel", "truth", "measured", "error", "allowed", "verdict",
];

/// One line for each row and kernel, aligned.
pub fn of(columns: &[Column], colour: bool) -> String {
    let mut lines: Vec<([String; 8], Option<&Finding>)> = vec![(HEADINGS.map(str::to_owned), None)];
    for row in ROWS {
        for column in columns {
            let Some(finding) = column.find(row) else {
                continue;
            };
            let number =
                |value: Option<f64>| value.map_or("-".to_owned(), |value| amount(finding, value));
            let cells = [
                row.kind.to_owned(),
                row.quantity.to_owned(),
                column.name.clone(),
                number(finding.truth),
                number(finding.measured),
                error(finding).unwrap_or_else(|| "-".to_owned()),
                number(finding.allowed),
                finding.verdict.name().to_owned(),
            ];
            lines.push((cells, Some(finding)));
        }
    }
    let width = |at: usize| {
        lines
            .iter()
            .map(|(cells, _)| cells[at].chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..HEADINGS.len())
        .map(|at| width(at).unwrap_or(0))
        .collect();
    let mut text = String::new();
    for (cells, finding) in &lines {
        let mut line = String::new();
        for (at, (cell, width)) in cells.iter().zip(&widths).enumerate() {
            // Numbers are right-aligned.
            let _ = if (3..7).contains(&at) {
                write!(line, "{cell:>width$}  ")
            } else {
                write!(line, "{cell:<width$}  ")
            };
        }
        let mut line = line.trim_end().to_owned();
        if let Some(finding) = finding.filter(|finding| finding.verdict != Verdict::Ok) {
            let _ = write!(line, "  {}", short(&finding.note, 160));
        }
        let off = finding.is_some_and(|finding| finding.verdict == Verdict::Off);
        let _ = match colour && off {
            true => writeln!(text, "\x1b[31m{line}\x1b[0m"),
            false => writeln!(text, "{line}"),
        };
    }
    text
}

/// A finding in words: `5 instead of 7`.
pub fn words(finding: &Finding) -> String {
    let number =
        |value: Option<f64>| value.map_or("nothing".to_owned(), |value| amount(finding, value));
    format!(
        "{} instead of {}",
        number(finding.measured),
        number(finding.truth)
    )
}

/// An error in the unit that fits: a time as a time, a large number in percent, an exact one as it is.
pub fn error(finding: &Finding) -> Option<String> {
    let error = finding.error()?;
    if finding.unit == Unit::Nanoseconds.name() {
        return Some(format!("{:+.1} ms", error / 1e6));
    }
    let truth = finding.truth.unwrap_or_default();
    Some(if error == 0.0 {
        "0".to_owned()
    } else if truth == 0.0 {
        format!("{error:+}")
    } else {
        format!("{:+.2}%", error / truth * 100.0)
    })
}

fn amount(finding: &Finding, value: f64) -> String {
    if finding.unit == Unit::Nanoseconds.name() {
        format!("{:.1} ms", value / 1e6)
    } else if value.fract() == 0.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

pub fn short(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((at, _)) => format!("{} [...]", &text[..at]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_shown_in_a_suitable_unit() {
        let finding = |quantity: &str, truth: f64, measured: f64| {
            let row = ROWS.iter().find(|row| row.quantity == quantity);
            Finding {
                truth: Some(truth),
                measured: Some(measured),
                ..Finding::without_numbers(row.unwrap_or(&ROWS[0]), Verdict::Ok, "")
            }
        };
        let said = |quantity, truth, measured| error(&finding(quantity, truth, measured));
        assert_eq!(said("depth", 200.0, 199.0).as_deref(), Some("-0.50%"));
        assert_eq!(said("depth", 200.0, 200.0).as_deref(), Some("0"));
        assert_eq!(said("losses", 0.0, 3.0).as_deref(), Some("+3"));
        assert_eq!(said("oldest", 1e9, 1.025e9).as_deref(), Some("+25.0 ms"));
        assert_eq!(words(&finding("depth", 7.0, 5.0)), "5 instead of 7");
    }
}
