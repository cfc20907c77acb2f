//! Results as they come, kept in a file, and their summary.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use super::{
    outcome::{Bound, Measure, Outcome, ms},
    parts::Part,
    run::{AtRest, Run},
    scenario::Scenario,
    service::Service,
};
use crate::{
    bench::{
        figure::{self, Figure, Goal, Report},
        statistics::between,
    },
    tools,
};

/// All results so far.
pub struct Results {
    path: PathBuf,
    file: File,
    /// All values, in order of first appearance.
    values: Vec<(Key, Vec<Measure>)>,
    /// Titles and errors of the parts that failed.
    failures: Vec<(String, String)>,
}

/// Key of a value.
#[derive(Clone, Copy, PartialEq)]
struct Key {
    consumer: &'static str,
    kind: &'static str,
    service: Option<Service>,
    scenario: Scenario,
    name: &'static str,
}

impl Key {
    fn of(part: &Part, name: &'static str) -> Self {
        Self {
            consumer: part.consumer.name,
            kind: part.consumer.kind.name(),
            service: part.service,
            scenario: part.scenario,
            name,
        }
    }
}

impl Results {
    /// Creates the file, which begins with the machine.
    pub fn create() -> Result<Self> {
        let directory = tools::root().join("target/bench");
        fs::create_dir_all(&directory)
            .with_context(|| format!("create {}", directory.display()))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let path = directory.join(format!("overload-{now}.jsonl"));
        let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        let mut results = Self {
            path,
            file,
            values: Vec::new(),
            failures: Vec::new(),
        };
        results.write(&figure::machine())?;
        Ok(results)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One line, complete on disk when this returns.
    fn write(&mut self, line: &Value) -> Result<()> {
        writeln!(self.file, "{line}").with_context(|| format!("write {}", self.path.display()))
    }

    fn add_line(&mut self, report: &mut Report, line: &Value) -> Result<()> {
        self.write(line)?;
        report.line(line);
        Ok(())
    }

    pub fn add_at_rest(
        &mut self,
        report: &mut Report,
        service: Service,
        workers: u32,
        at_rest: &AtRest,
    ) -> Result<()> {
        let line = json!({
            "type": "at_rest", "bench": "overload", "service": service.name(), "workers": workers,
            "capacity_per_s": at_rest.capacity_per_s,
            "median_ms": ms(at_rest.median), "p99_ms": ms(at_rest.p99),
        });
        self.add_line(report, &line)
    }

    pub fn add(
        &mut self,
        report: &mut Report,
        round: u32,
        part: &Part,
        outcome: &Outcome,
    ) -> Result<()> {
        let mut line = head("outcome", round, part);
        for measure in &outcome.0 {
            let key = Key::of(part, measure.name);
            match self.values.iter_mut().find(|(known, _)| *known == key) {
                Some((_, values)) => values.push(*measure),
                None => self.values.push((key, vec![*measure])),
            }
            let mut value = json!({"value": measure.value, "unit": measure.unit});
            if let Some(goal) = measure.goal {
                value["goal"] = json!(goal.text());
                value["met"] = json!(goal.is_met(measure.value));
            }
            line.insert(measure.name.replace([' ', '-'], "_"), value);
        }
        self.add_line(report, &Value::Object(line))
    }

    pub fn add_failure(
        &mut self,
        report: &mut Report,
        round: u32,
        part: &Part,
        error: &anyhow::Error,
    ) -> Result<()> {
        let error = format!("{error:#}");
        let mut line = head("failure", round, part);
        line.insert("error".to_owned(), json!(error));
        self.failures.push((part.title(), error));
        self.add_line(report, &Value::Object(line))
    }

    /// Parts that failed, with their errors.
    pub fn failures(&self) -> &[(String, String)] {
        &self.failures
    }

    /// The median over all rounds.
    pub fn median(
        &self,
        consumer: &str,
        service: Service,
        scenario: Scenario,
        name: &str,
    ) -> Option<f64> {
        let (_, values) = self.values.iter().find(|(key, _)| {
            key.consumer == consumer
                && key.service == Some(service)
                && key.scenario == scenario
                && key.name == name
        })?;
        let values: Vec<f64> = values.iter().map(|measure| measure.value).collect();
        between(&values).map(|spread| spread.median)
    }

    /// Medians over all rounds, also written to the file.
    pub fn figures(&mut self, run: &Run, rounds: u32) -> Result<Vec<Figure>> {
        let figures: Vec<Figure> = self
            .values
            .iter()
            .filter_map(|(key, measures)| summary(key, measures, run, rounds))
            .collect();
        for figure in &figures {
            self.write(&figure.json())?;
        }
        Ok(figures)
    }
}

fn head(kind: &str, round: u32, part: &Part) -> Map<String, Value> {
    let mut line = Map::from_iter([
        ("type".to_owned(), json!(kind)),
        ("bench".to_owned(), json!("overload")),
        ("round".to_owned(), json!(round)),
        ("consumer".to_owned(), json!(part.consumer.name)),
        ("kind".to_owned(), json!(part.consumer.kind.name())),
    ]);
    if let Some(service) = part.service {
        line.insert("service".to_owned(), json!(service.name()));
    }
    line.insert("scenario".to_owned(), json!(part.scenario.name()));
    line
}

fn summary(key: &Key, measures: &[Measure], run: &Run, rounds: u32) -> Option<Figure> {
    let first = measures.first()?;
    let values: Vec<f64> = measures.iter().map(|measure| measure.value).collect();
    let value = between(&values)?;
    let scenario = key.scenario.name();
    let mut keys = json!({
        "bench": "overload", "consumer": key.consumer, "kind": key.kind, "scenario": scenario, "measured": key.name,
        "rounds": rounds,
    });
    let mut what = format!("{}, {scenario}: {}", key.consumer, key.name);
    if let Some(service) = key.service {
        keys["service"] = json!(service.name());
        keys["workers"] = json!(run.workers(service));
        what = format!("{}, {what}", service.name());
    }
    Some(Figure {
        what,
        keys,
        unit: first.unit,
        value,
        spread: if rounds > 1 {
            "minimum to maximum"
        } else {
            "one run"
        },
        goal: median_bound(measures).map(|bound| match bound {
            Bound::AtLeast(limit) => Goal::at_least(limit, &value),
            Bound::AtMost(limit) => Goal::at_most(limit, &value),
        }),
    })
}

/// The goal of the median: a limit may differ between rounds, like the latency at rest.
fn median_bound(measures: &[Measure]) -> Option<Bound> {
    let limits: Vec<f64> = measures
        .iter()
        .filter_map(|measure| match measure.goal? {
            Bound::AtLeast(limit) | Bound::AtMost(limit) => Some(limit),
        })
        .collect();
    let median = between(&limits)?.median;
    measures.first()?.goal.map(|goal| match goal {
        Bound::AtLeast(_) => Bound::AtLeast(median),
        Bound::AtMost(_) => Bound::AtMost(median),
    })
}
