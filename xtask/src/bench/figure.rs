//! Measured figures, as a table and as JSON.

use std::{fs, thread};

use rustix::system::uname;
use serde_json::{Map, Value, json};

use super::statistics::Spread;

/// One figure.
pub struct Figure {
    /// Description in the table.
    pub what: String,
    /// The description as JSON keys.
    pub keys: Value,
    pub unit: &'static str,
    pub value: Spread,
    /// Meaning of `low` and `high`.
    pub spread: &'static str,
    pub goal: Option<Goal>,
}

/// The goal of a figure.
pub struct Goal {
    pub text: String,
    pub met: bool,
}

impl Goal {
    /// The median must be at most `limit`.
    pub fn at_most(limit: f64, value: &Spread) -> Self {
        Self {
            text: format!("≤ {limit}"),
            met: value.median <= limit,
        }
    }

    /// The median must be at least `limit`.
    pub fn at_least(limit: f64, value: &Spread) -> Self {
        Self {
            text: format!("≥ {limit}"),
            met: value.median >= limit,
        }
    }
}

/// All figures of one benchmark.
pub struct Report {
    json_only: bool,
    /// Whether the machine was printed as JSON, which comes first.
    has_machine: bool,
    figures: Vec<Figure>,
}

impl Report {
    pub fn new(json_only: bool) -> Self {
        Self {
            json_only,
            has_machine: false,
            figures: Vec::new(),
        }
    }

    /// Prints progress to standard error, unless only JSON is wanted.
    pub fn progress(&self, text: &str) {
        if !self.json_only {
            eprintln!("{text}");
        }
    }

    /// Prints a result at once, if only JSON is wanted.
    pub fn line(&mut self, line: &Value) {
        if self.json_only {
            self.print_machine();
            println!("{line}");
        }
    }

    pub fn add(&mut self, figure: Figure) {
        self.figures.push(figure);
    }

    pub fn print(&mut self) {
        if self.figures.is_empty() {
            return;
        }
        if !self.json_only {
            println!("\n{}", machine_text());
            println!("{}", table(&self.figures));
        }
        self.print_machine();
        for figure in &self.figures {
            println!("{}", figure.json());
        }
    }

    fn print_machine(&mut self) {
        if !self.has_machine {
            println!("{}", machine());
            self.has_machine = true;
        }
    }
}

impl Figure {
    fn row(&self) -> [String; 5] {
        let Spread { low, median, high } = self.value;
        let (goal, met) = match &self.goal {
            Some(goal) => (goal.text.clone(), if goal.met { "yes" } else { "NO" }),
            None => (String::new(), ""),
        };
        [
            self.what.clone(),
            format!("{} {}", short(median), self.unit)
                .trim_end()
                .to_owned(),
            if low == median && high == median {
                String::new()
            } else {
                format!("{} to {}", short(low), short(high))
            },
            goal,
            met.to_owned(),
        ]
    }

    pub fn json(&self) -> Value {
        let mut line = Map::from_iter([("type".to_owned(), json!("figure"))]);
        line.extend(self.keys.as_object().cloned().unwrap_or_default());
        line.extend([
            ("unit".to_owned(), json!(self.unit)),
            ("median".to_owned(), json!(self.value.median)),
            ("low".to_owned(), json!(self.value.low)),
            ("high".to_owned(), json!(self.value.high)),
            ("spread".to_owned(), json!(self.spread)),
        ]);
        if let Some(goal) = &self.goal {
            line.insert("goal".to_owned(), json!(goal.text));
            line.insert("met".to_owned(), json!(goal.met));
        }
        Value::Object(line)
    }
}

/// Three significant digits, more than the precision of a benchmark.
pub fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 99.95 => format!("{value:.0}"),
        size if size >= 9.995 => format!("{value:.1}"),
        size if size >= 0.9995 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn table(figures: &[Figure]) -> String {
    let mut rows = vec![["what", "median", "spread", "goal", "met"].map(str::to_owned)];
    rows.extend(figures.iter().map(Figure::row));
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or_default()
    };
    let widths = [0, 1, 2, 3, 4].map(width);
    let mut text = String::new();
    for row in &rows {
        let [what, median, spread, goal, met] = row;
        let line = format!(
            "{what:<0$}  {median:>1$}  {spread:>2$}  {goal:<3$}  {met}",
            widths[0], widths[1], widths[2], widths[3]
        );
        text += line.trim_end();
        text.push('\n');
    }
    let mut spreads: Vec<&str> = figures.iter().map(|figure| figure.spread).collect();
    spreads.retain(|spread| !spread.is_empty());
    spreads.dedup();
    if !spreads.is_empty() {
        text += &format!("spread: {}\n", spreads.join("; "));
    }
    text
}

fn cpus() -> usize {
    thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Describes the machine.
pub fn machine() -> Value {
    let name = uname();
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    json!({
        "type": "machine",
        "kernel": name.release().to_string_lossy(),
        "arch": name.machine().to_string_lossy(),
        "cpus": cpus(),
        "cpu": model.map(|(_, model)| model),
    })
}

fn machine_text() -> String {
    let machine = machine();
    let text = |key: &str| machine[key].as_str().unwrap_or("?").to_owned();
    format!(
        "Linux {}, {}, {} CPUs ({})",
        text("kernel"),
        text("arch"),
        machine["cpus"],
        text("cpu")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(what: &str, median: f64, goal: Option<Goal>) -> Figure {
        Figure {
            what: what.to_owned(),
            keys: json!({"bench": "sample", "sockets": 1000}),
            unit: "ns",
            value: Spread {
                low: median - 1.0,
                median,
                high: median + 1.0,
            },
            spread: "quartiles",
            goal,
        }
    }

    #[test]
    fn the_table_is_aligned() {
        let goal = Goal {
            text: "≤ 9".to_owned(),
            met: false,
        };
        let text = table(&[figure("a scan", 123.4, None), figure("b", 12.0, Some(goal))]);
        assert_eq!(
            text,
            "what     median        spread  goal  met\n\
             a scan   123 ns    122 to 124\n\
             b       12.0 ns  11.0 to 13.0  ≤ 9   NO\n\
             spread: quartiles\n"
        );
    }

    #[test]
    fn json_has_the_type_and_all_keys() {
        let line = figure("a scan", 2.0, None).json();
        assert_eq!(
            line,
            json!({
                "type": "figure", "bench": "sample", "sockets": 1000, "unit": "ns", "median": 2.0, "low": 1.0,
                "high": 3.0, "spread": "quartiles",
            })
        );
    }
}
