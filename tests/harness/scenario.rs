//! What a scenario found: one row of the table that `cargo xtask scenarios` prints. `tests/scenarios` plays them.

use serde_json::{Value, json};

/// How a verdict compares with what was planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Right,
    Wrong,
    /// It cannot be played here.
    Skipped,
}

impl Outcome {
    pub fn name(self) -> &'static str {
        match self {
            Self::Right => "right",
            Self::Wrong => "wrong",
            Self::Skipped => "skipped",
        }
    }
}

/// One run of one scenario.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub scenario: String,
    /// The servers.
    pub on: String,
    /// The cause; `nothing` of a healthy control.
    pub planted: String,
    /// What was said in the end, with its root where that is another; empty where nothing was.
    pub verdict: String,
    /// Who was named.
    pub culprit: String,
    /// Share of the workers' time that spoke for it.
    pub share: Option<f64>,
    /// From planting to the warning.
    pub warned_after_s: Option<f64>,
    /// From the warning to the application's own message, or the first error a caller saw. `None`: neither came.
    pub lead_s: Option<f64>,
    pub outcome: Outcome,
    /// What is wrong, or why it was not played.
    pub why: Vec<String>,
    /// The recording of the run, replayed, gives the levels, episodes and causes of the live run. `None`: nothing was played.
    pub replayed: Option<bool>,
    /// All episodes: kind, name, cause.
    pub episodes: Vec<String>,
    /// The whole run, servers' start included.
    pub took_s: f64,
}

impl Row {
    /// As one line of JSON has it.
    pub fn to_json(&self) -> Value {
        json!({
            "type": "scenario",
            "scenario": self.scenario,
            "on": self.on,
            "planted": self.planted,
            "verdict": self.verdict,
            "culprit": self.culprit,
            "share": self.share,
            "warned_after_s": self.warned_after_s,
            "lead_s": self.lead_s,
            "outcome": self.outcome.name(),
            "why": self.why,
            "replayed": self.replayed,
            "episodes": self.episodes,
            "took_s": self.took_s,
        })
    }

    /// `None` for a line that is about something else.
    pub fn from_json(line: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(line).ok()?;
        if value["type"] != "scenario" {
            return None;
        }
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        let texts = |key: &str| -> Option<Vec<String>> {
            let list = value[key].as_array()?.iter();
            list.map(|text| text.as_str().map(str::to_owned)).collect()
        };
        let outcomes = [Outcome::Right, Outcome::Wrong, Outcome::Skipped];
        Some(Self {
            scenario: text("scenario")?,
            on: text("on")?,
            planted: text("planted")?,
            verdict: text("verdict")?,
            culprit: text("culprit")?,
            share: value["share"].as_f64(),
            warned_after_s: value["warned_after_s"].as_f64(),
            lead_s: value["lead_s"].as_f64(),
            outcome: outcomes
                .into_iter()
                .find(|outcome| value["outcome"] == outcome.name())?,
            why: texts("why")?,
            replayed: value["replayed"].as_bool(),
            episodes: texts("episodes")?,
            took_s: value["took_s"].as_f64()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_survives_its_line() {
        let row = Row {
            scenario: "flash-sale".to_owned(),
            on: "uWSGI -> PostgreSQL".to_owned(),
            planted: "downstream_slow".to_owned(),
            verdict: "downstream_slow".to_owned(),
            culprit: "postgres (812)".to_owned(),
            share: Some(0.98),
            warned_after_s: Some(1.25),
            lead_s: None,
            outcome: Outcome::Right,
            why: vec![],
            replayed: Some(true),
            episodes: vec!["accept 127.0.0.1:8080: downstream_slow".to_owned()],
            took_s: 19.5,
        };
        assert_eq!(Row::from_json(&row.to_json().to_string()), Some(row));
        assert_eq!(Row::from_json("{\"type\":\"queue\"}"), None);
    }
}
