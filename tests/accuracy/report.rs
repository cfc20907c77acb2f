//! Results for one kind of queue: the worst sample for each row.

use serde_json::Value;
use tailback_tests::accuracy::{Finding, ROWS, Row, Verdict};

/// Collects comparisons and keeps the worst of each row.
pub struct Report {
    kind: &'static str,
    found: Vec<Finding>,
}

impl Report {
    pub fn new(kind: &str) -> Self {
        let row = ROWS.iter().find(|row| row.kind == kind);
        Self {
            kind: row.map_or("", |row| row.kind),
            found: Vec::new(),
        }
    }

    /// Adds one comparison. `note` explains a missing or wrong number.
    pub fn compare(&mut self, quantity: &str, truth: f64, measured: Option<f64>, note: &str) {
        self.compare_at(quantity, truth, measured, note, 0);
    }

    /// Like [`Report::compare`], with the sampling interval, ns, by which an age may be off.
    pub fn compare_at(
        &mut self,
        quantity: &str,
        truth: f64,
        measured: Option<f64>,
        note: &str,
        interval_ns: u64,
    ) {
        let row = self.row(quantity);
        let allowed = row.allowed(truth, interval_ns);
        let verdict = match measured {
            None => Verdict::Absent,
            Some(measured) if (measured - truth).abs() <= allowed => Verdict::Ok,
            Some(_) => Verdict::Off,
        };
        self.add(Finding {
            truth: Some(truth),
            measured,
            allowed: Some(allowed),
            note: match verdict {
                Verdict::Ok => String::new(),
                _ => note.to_owned(),
            },
            ..Finding::without_numbers(row, verdict, "")
        });
    }

    /// Adds that the agent does not report the quantity.
    pub fn absent(&mut self, quantity: &str, note: &str) {
        let row = self.row(quantity);
        self.add(Finding::without_numbers(row, Verdict::Absent, note));
    }

    /// Compares one key of a queue's line.
    pub fn key(&mut self, quantity: &str, truth: f64, line: &Value, key: &str, interval_ns: u64) {
        let note = format!("{key} of {line}");
        self.compare_at(quantity, truth, line[key].as_f64(), &note, interval_ns);
    }

    /// Marks the rows selected by `these` as not measurable here.
    pub fn skip(&mut self, why: &str, these: impl Fn(&str) -> bool) {
        let kind = self.kind;
        let rows = ROWS.iter().filter(|row| row.kind == kind);
        for row in rows.filter(|row| these(row.quantity)) {
            self.add(Finding::without_numbers(row, Verdict::Skipped, why));
        }
    }

    pub fn print(&self) {
        for finding in &self.found {
            println!("{}", finding.to_json());
        }
    }

    fn row(&self, quantity: &str) -> &'static Row {
        let row = ROWS
            .iter()
            .find(|row| row.kind == self.kind && row.quantity == quantity);
        row.unwrap_or_else(|| panic!("no such row: {}.{quantity}", self.kind))
    }

    fn add(&mut self, finding: Finding) {
        let same = |known: &&mut Finding| known.quantity == finding.quantity;
        match self.found.iter_mut().find(same) {
            Some(known) if badness(&finding) > badness(known) => *known = finding,
            Some(_) => {}
            None => self.found.push(finding),
        }
    }
}

/// Greater is worse: by verdict, then by the error relative to the allowed error.
fn badness(finding: &Finding) -> (u8, f64) {
    let verdict = match finding.verdict {
        Verdict::Skipped => 0,
        Verdict::Ok => 1,
        Verdict::Absent => 2,
        Verdict::Off => 3,
    };
    let share = finding
        .error()
        .zip(finding.allowed)
        .map_or(0.0, |(error, allowed)| error.abs() / allowed.max(1e-9));
    (verdict, share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_sample_is_reported() {
        let mut report = Report::new("accept");
        for measured in [Some(100.0), Some(96.0), Some(104.9), Some(99.0)] {
            report.compare("depth", 100.0, measured, "");
        }
        assert_eq!(report.found.len(), 1);
        assert_eq!(report.found[0].measured, Some(104.9));
        assert_eq!(report.found[0].verdict, Verdict::Ok);
        report.compare("depth", 100.0, None, "no value");
        assert_eq!(report.found[0].verdict, Verdict::Absent);
        report.compare("depth", 100.0, Some(106.0), "");
        assert_eq!(report.found[0].verdict, Verdict::Off);
        report.compare("depth", 100.0, Some(100.0), "");
        assert_eq!(report.found[0].measured, Some(106.0));
    }
}
