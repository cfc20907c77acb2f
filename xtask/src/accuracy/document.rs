//! docs/appendix/accuracy.md: the table as a page that a user reads.

use std::fmt::Write as _;

use tailback_tests::accuracy::{Finding, ROWS, Row, Verdict};

use super::{Column, table};

const HEAD: &str = "\
# Accuracy tables

The error of each number that `tailback sample` reports, against a source outside Tailback: the worst of all samples. [Accuracy](../accuracy.md) has
the summary.

Goals: depths and rates within 5%. Ages within 5% or one sampling interval as measured (100 ms, slightly more in an emulator). Limits and
losses exact. Waits that hooks measure within 5% or 20 µs. Where the kernel keeps no timestamp, an age counts from the first sample that
saw the item at the head of the queue. The item may have arrived just after the sample before. So its age is up to one interval too low.

Written by `cargo xtask accuracy --kernels all --write`. The same rows are tests of `cargo xtask test`. They fail at twice the goal, or at any error
if the goal is exact. The first column is the running kernel; the others run in an
emulator with one CPU. \"absent\": not reported there. \"skipped\": could not be set up
there.

";

pub fn of(columns: &[Column]) -> String {
    let mut text = HEAD.to_owned();
    let mut head = "| queue | compared with |".to_owned();
    let mut rule = "| --- | --- |".to_owned();
    for column in columns {
        let _ = write!(head, " {} |", column.release);
        rule.push_str(" ---: |");
    }
    let _ = writeln!(text, "{head}\n{rule}");
    let mut notes: Vec<String> = Vec::new();
    for row in ROWS {
        let _ = write!(text, "| {} {} | {} |", row.kind, row.quantity, row.truth);
        for column in columns {
            let _ = write!(text, " {} |", cell(column, row, &mut notes));
        }
        text.push('\n');
    }
    for (at, note) in notes.iter().enumerate() {
        let _ = write!(text, "\n{}. {note}", at + 1);
    }
    if !notes.is_empty() {
        text.push('\n');
    }
    text
}

/// An error, or the number of the note that explains its absence.
fn cell(column: &Column, row: &Row, notes: &mut Vec<String>) -> String {
    let Some(finding) = column.find(row) else {
        return "not measured".to_owned();
    };
    let note = reason(column, finding);
    let mut refer = || {
        let at = notes.iter().position(|known| *known == note);
        at.unwrap_or_else(|| {
            notes.push(note.clone());
            notes.len() - 1
        }) + 1
    };
    match finding.verdict {
        Verdict::Ok => table::error(finding).unwrap_or_default(),
        Verdict::Off => match table::error(finding) {
            Some(error) => format!("**{error}**"),
            None => format!("**failed** ({})", refer()),
        },
        Verdict::Absent => format!("absent ({})", refer()),
        Verdict::Skipped => format!("skipped ({})", refer()),
    }
}

/// A note without the parts that differ from run to run.
fn reason(column: &Column, finding: &Finding) -> String {
    let name = format!("{}.{}", finding.kind, finding.quantity);
    let known = column.absent.iter().find(|(row, _)| *row == name);
    match (known, finding.verdict) {
        (Some((_, why)), Verdict::Absent) => (*why).to_owned(),
        (None, Verdict::Absent) => "not expected: the agent does not report it".to_owned(),
        _ => table::short(&finding.note.replace('|', "/").replace('\n', " "), 200),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_that_several_cells_share_is_given_once() {
        let skipped = |row| Finding::without_numbers(row, Verdict::Skipped, "no slow disk");
        let mut findings: Vec<Finding> = ROWS.iter().map(skipped).collect();
        findings[0] = Finding {
            truth: Some(4.0),
            measured: Some(4.0),
            verdict: Verdict::Ok,
            ..findings[0].clone()
        };
        let column = Column {
            name: "6.1".to_owned(),
            release: "6.1.0".to_owned(),
            findings,
            absent: &[],
        };
        let text = of(&[column]);
        assert_eq!(text.matches("no slow disk").count(), 1);
        assert!(text.contains(&format!("| {} {} |", ROWS[0].kind, ROWS[0].quantity)));
        assert!(text.contains("| 0 |\n"), "{text}");
    }
}
