//! What was found of one kind: for each row the worst of all looks.

use serde_json::Value;
use tailback_tests::accuracy::{Finding, ROWS, Row, Verdict};

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

    /// Takes in one comparison. `said` is what there is instead of a number.
    pub fn compare(&mut self, quantity: &str, truth: f64, measured: Option<f64>, said: &str) {
        self.compare_at(quantity, truth, measured, said, 0);
    }

    /// As [`Report::compare`], where the agent looked every so often.
    pub fn compare_at(
        &mut self,
        quantity: &str,
        truth: f64,
        measured: Option<f64>,
        said: &str,
        tick_ns: u64,
    ) {
        let row = self.row(quantity);
        let allowed = row.allowed(truth, tick_ns);
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
                _ => said.to_owned(),
            },
            ..Finding::without_numbers(row, verdict, "")
        });
    }

    /// The agent says nothing of it.
    pub fn absent(&mut self, quantity: &str, said: &str) {
        let row = self.row(quantity);
        self.add(Finding::without_numbers(row, Verdict::Absent, said));
    }

    /// Compares one key of a queue's line.
    pub fn key(&mut self, quantity: &str, truth: f64, line: &Value, key: &str, tick_ns: u64) {
        let said = format!("{key} of {line}");
        self.compare_at(quantity, truth, line[key].as_f64(), &said, tick_ns);
    }

    /// Rows of which `these` is true cannot be measured here.
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
        row.unwrap_or_else(|| panic!("there is no row {}.{quantity}", self.kind))
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

/// Greater is worse: by verdict, then by the error's share of what is allowed.
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
    fn the_worst_of_all_looks_is_told() {
        let mut report = Report::new("accept");
        for measured in [Some(100.0), Some(96.0), Some(104.9), Some(99.0)] {
            report.compare("depth", 100.0, measured, "");
        }
        assert_eq!(report.found.len(), 1);
        assert_eq!(report.found[0].measured, Some(104.9));
        assert_eq!(report.found[0].verdict, Verdict::Ok);
        report.compare("depth", 100.0, None, "nothing was said");
        assert_eq!(report.found[0].verdict, Verdict::Absent);
        report.compare("depth", 100.0, Some(106.0), "");
        assert_eq!(report.found[0].verdict, Verdict::Off);
        report.compare("depth", 100.0, Some(100.0), "");
        assert_eq!(report.found[0].measured, Some(106.0));
    }
}
