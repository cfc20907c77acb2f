//! How often verdicts of each level of confidence are right.

use std::{collections::BTreeMap, fmt};

use serde_json::{Value, json};

/// Levels of confidence, with the share of verdicts that must be right.
const REQUIRED: &[(&str, Option<f64>)] =
    &[("high", Some(0.97)), ("medium", Some(0.85)), ("low", None)];
/// Type of a line of JSON.
const TYPE: &str = "judged";

/// One verdict that was compared with what was planted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// The incident, and the queue.
    pub of: String,
    pub cause: String,
    /// `high`, `medium`, or `low`.
    pub confidence: String,
    pub right: bool,
}

impl Judged {
    /// As one line of JSON.
    pub fn to_json(&self) -> Value {
        json!({
            "type": TYPE,
            "of": self.of,
            "cause": self.cause,
            "confidence": self.confidence,
            "right": self.right,
        })
    }

    /// `None` for a line of another type.
    pub fn from_json(line: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(line).ok()?;
        if value["type"] != TYPE {
            return None;
        }
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        Some(Self {
            of: text("of")?,
            cause: text("cause")?,
            confidence: text("confidence")?,
            right: value["right"].as_bool()?,
        })
    }
}

/// Verdicts by their confidence.
#[derive(Clone, Debug, Default)]
pub struct Calibration {
    /// Number of right verdicts, and of all.
    by_confidence: BTreeMap<String, (u64, u64)>,
    /// The wrong ones.
    wrong: Vec<Judged>,
}

impl Calibration {
    pub fn add(&mut self, judged: Judged) {
        let (right, all) = self
            .by_confidence
            .entry(judged.confidence.clone())
            .or_default();
        *right += u64::from(judged.right);
        *all += 1;
        if !judged.right {
            self.wrong.push(judged);
        }
    }

    /// The verdicts added so far.
    pub fn verdicts(&self) -> u64 {
        self.by_confidence.values().map(|(_, all)| all).sum()
    }

    /// A message for each level at which too few verdicts are right.
    pub fn missed(&self) -> Vec<String> {
        let missed = REQUIRED.iter().filter_map(|(level, required)| {
            let (share, required) = (self.share(level)?, (*required)?);
            (share < required).then(|| {
                format!(
                    "{:.0}% of the verdicts with {level} confidence are right; {:.0}% must be",
                    share * 100.0,
                    required * 100.0
                )
            })
        });
        missed.collect()
    }

    /// The share of right verdicts. `None`: there is no verdict.
    fn share(&self, level: &str) -> Option<f64> {
        let (right, all) = self.by_confidence.get(level).copied()?;
        (all > 0).then(|| right as f64 / all as f64)
    }
}

/// The table, and the wrong verdicts.
impl fmt::Display for Calibration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<12}{:>7}{:>7}{:>7}{:>10}",
            "confidence", "right", "wrong", "share", "required"
        )?;
        for (level, required) in REQUIRED {
            let (right, all) = self.by_confidence.get(*level).copied().unwrap_or_default();
            let percent = |share: Option<f64>| {
                share.map_or_else(|| "-".to_owned(), |share| format!("{:.0}%", share * 100.0))
            };
            writeln!(
                f,
                "{level:<12}{right:>7}{:>7}{:>7}{:>10}",
                all - right,
                percent(self.share(level)),
                percent(*required)
            )?;
        }
        for judged in &self.wrong {
            writeln!(
                f,
                "wrong, {} confidence: {}: {}",
                judged.confidence, judged.of, judged.cause
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(confidence: &str, right: bool) -> Judged {
        Judged {
            of: "surge accept".to_owned(),
            cause: "producer_surge".to_owned(),
            confidence: confidence.to_owned(),
            right,
        }
    }

    fn of(high: (u64, u64), medium: (u64, u64), low: (u64, u64)) -> Calibration {
        let mut calibration = Calibration::default();
        for (level, (right, wrong)) in [("high", high), ("medium", medium), ("low", low)] {
            (0..right).for_each(|_| calibration.add(judged(level, true)));
            (0..wrong).for_each(|_| calibration.add(judged(level, false)));
        }
        calibration
    }

    #[test]
    fn a_judged_verdict_survives_its_line() {
        let judged = judged("high", false);
        assert_eq!(
            Judged::from_json(&judged.to_json().to_string()),
            Some(judged)
        );
        assert_eq!(Judged::from_json("{\"type\":\"scenario\"}"), None);
    }

    #[test]
    fn each_level_has_its_bound_and_low_has_none() {
        assert_eq!(of((97, 3), (85, 15), (0, 9)).missed(), [""; 0]);
        assert_eq!(of((96, 4), (85, 15), (0, 0)).missed().len(), 1);
        assert_eq!(of((97, 3), (84, 16), (0, 0)).missed().len(), 1);
        assert_eq!(of((0, 1), (0, 1), (0, 1)).missed().len(), 2);
        assert_eq!(Calibration::default().missed(), [""; 0]);
    }
}
