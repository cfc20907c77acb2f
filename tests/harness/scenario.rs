//! The result of a scenario: one row of the table that `cargo xtask scenarios` prints. `tests/scenarios` plays them.

use std::fmt;

use serde_json::{Value, json};

/// How much of the machine a scenario needs. Those that leave room are played beside each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// It waits for most of its time, and uses 5% to 30% of a CPU.
    Little,
    /// Something in it computes for seconds, on one CPU.
    OneCpu,
    /// It computes on several CPUs, or the cause is the disk, or that another computes on the service's CPU.
    Machine,
}

impl Room {
    const ALL: [Self; 3] = [Self::Little, Self::OneCpu, Self::Machine];

    fn name(self) -> &'static str {
        match self {
            Self::Little => "little",
            Self::OneCpu => "one CPU",
            Self::Machine => "machine",
        }
    }
}

/// A scenario as a line of `tailback-scenarios --list`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub name: String,
    pub room: Room,
}

impl Listed {
    pub fn parse(line: &str) -> Option<Self> {
        let (name, room) = line.split_once('\t')?;
        let room = Room::ALL.into_iter().find(|known| known.name() == room)?;
        Some(Self {
            name: name.to_owned(),
            room,
        })
    }
}

impl fmt::Display for Listed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\t{}", self.name, self.room.name())
    }
}

/// How a verdict compares with what was planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Right,
    Wrong,
    /// This machine cannot play it.
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
    /// The planted cause; `nothing` for a healthy control.
    pub planted: String,
    /// The last verdict, with its root cause where that differs; empty if there was none.
    pub verdict: String,
    /// The culprit that the verdict named.
    pub culprit: String,
    /// The confidence of that verdict; empty if there was none.
    pub confidence: String,
    /// Share of the workers' time that supports the verdict.
    pub share: Option<f64>,
    /// Time from planting to the warning.
    pub warned_after_s: Option<f64>,
    /// Time from the warning to the application's own message or the first failed request. `None`: neither happened.
    pub lead_s: Option<f64>,
    pub outcome: Outcome,
    /// What is wrong, or why it was not played.
    pub why: Vec<String>,
    /// Whether replaying the recording reproduces the levels, episodes and causes. `None`: it was not played.
    pub replayed: Option<bool>,
    /// All episodes: kind, name and cause.
    pub episodes: Vec<String>,
    /// Duration of the run, including the start of the servers.
    pub took_s: f64,
}

impl Row {
    /// As one line of JSON.
    pub fn to_json(&self) -> Value {
        json!({
            "type": "scenario",
            "scenario": self.scenario,
            "on": self.on,
            "planted": self.planted,
            "verdict": self.verdict,
            "culprit": self.culprit,
            "confidence": self.confidence,
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

    /// `None` for a line of another type.
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
            confidence: text("confidence")?,
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
    fn a_listed_scenario_survives_its_line() {
        for room in Room::ALL {
            let listed = Listed {
                name: "quota".to_owned(),
                room,
            };
            assert_eq!(Listed::parse(&listed.to_string()), Some(listed));
        }
        assert_eq!(Listed::parse("quota"), None);
        assert_eq!(Listed::parse("quota\thalf"), None);
    }

    #[test]
    fn a_row_survives_its_line() {
        let row = Row {
            scenario: "flash-sale".to_owned(),
            on: "uWSGI -> PostgreSQL".to_owned(),
            planted: "downstream_slow".to_owned(),
            verdict: "downstream_slow".to_owned(),
            culprit: "postgres (812)".to_owned(),
            confidence: "high".to_owned(),
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
