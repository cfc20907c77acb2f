//! The rules behind a verdict, for `--explain`: which applied, which fired, and the numbers that decided.
//!
//! Pure: explanations in, text or JSON out.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    io::{self, Write},
    sync::Arc,
};

use serde_json::{Map, Value, json};

use crate::{
    event::{
        Episode,
        explain::{Check, Comparison, Explanation, RuleOutcome, RuleReport, Unit},
    },
    sample::{Target, TargetId},
    text::{bytes, count, duration, pad, rate, width, wrap},
};

/// Columns of the text.
const COLUMNS: usize = 100;
/// Columns of a check's indentation.
const INDENT: usize = 6;
/// Columns of the label of a group of rules that do not apply.
const SCOPE_COLUMNS: usize = 36;

/// Writes the rules behind the verdicts of some episodes. Episodes of one service may share a verdict, which is explained
/// once.
pub fn write<'a>(
    out: &mut impl Write,
    episodes: impl Iterator<Item = &'a Episode>,
    targets: &BTreeMap<TargetId, Arc<Target>>,
) -> io::Result<()> {
    let mut written: Vec<Arc<Explanation>> = Vec::new();
    for episode in episodes {
        let verdict = episode.verdict.as_ref();
        let Some(explanation) = verdict.and_then(|verdict| verdict.explanation.as_ref()) else {
            continue;
        };
        if written.iter().any(|known| Arc::ptr_eq(known, explanation)) {
            continue;
        }
        written.push(Arc::clone(explanation));
        for line in lines(explanation, targets) {
            writeln!(out, "{}", line.trim_end())?;
        }
    }
    out.flush()
}

fn lines(explanation: &Explanation, targets: &BTreeMap<TargetId, Arc<Target>>) -> Vec<String> {
    let key = &explanation.queue;
    let target = targets.get(&key.target);
    let target = target.map_or("?", |target| target.name.as_str());
    let mut lines = vec![format!(
        "Rules behind the verdict on {target} {} {}, in the order of evaluation",
        key.kind.name(),
        key.name()
    )];
    let activity = explanation.main_activity;
    let activity = activity.map_or_else(String::new, |activity| {
        format!(
            "; main activity: {} ({})",
            activity.name(),
            activity.words()
        )
    });
    lines.push(format!(
        "  {} threads, {} samples in {}{activity}",
        count(explanation.threads as u64),
        count(explanation.samples),
        duration(explanation.window_ns)
    ));
    let applicable = explanation
        .rules
        .iter()
        .filter(|rule| rule.outcome != RuleOutcome::NotApplicable);
    for rule in applicable {
        lines.extend(rule_lines(rule));
    }
    lines.extend(not_applicable(&explanation.rules));
    lines.push(String::new());
    lines
}

fn rule_lines(rule: &RuleReport) -> Vec<String> {
    let outcome = match rule.outcome {
        RuleOutcome::NotApplicable => "not applicable",
        RuleOutcome::DidNotFire => "did not fire",
        RuleOutcome::Fired => "fired, but a rule above decided",
        RuleOutcome::Withheld => "FIRED, but there is too little evidence to name it",
        RuleOutcome::Chosen => "CHOSEN",
    };
    let mut lines = vec![format!(
        "  {} ({}): {outcome}",
        rule.cause.name(),
        rule.rule
    )];
    let widest = |text: fn(&Check) -> String| {
        let widths = rule.checks.iter().map(|check| width(&text(check)));
        widths.max().unwrap_or(0)
    };
    let name = widest(|check| check.name.to_owned());
    let values = widest(value);
    for check in &rule.checks {
        let mark = match check.condition {
            Some(condition) if condition.holds => "✓",
            Some(_) => "✗",
            None => " ",
        };
        lines.push(format!(
            "{:INDENT$}{mark} {}  {}  {}",
            "",
            pad(check.name, name),
            pad(&value(check), values),
            condition(check)
        ));
    }
    lines
}

/// Rules that do not apply, grouped by what they apply to.
fn not_applicable(rules: &[RuleReport]) -> Vec<String> {
    let mut groups: Vec<(&str, Vec<String>)> = Vec::new();
    let rules = rules
        .iter()
        .filter(|rule| rule.outcome == RuleOutcome::NotApplicable);
    for rule in rules {
        let name = format!("{} ({})", rule.cause.name(), rule.rule);
        match groups
            .iter_mut()
            .find(|(scope, _)| *scope == rule.applies_to)
        {
            Some((_, names)) => names.push(name),
            None => groups.push((&rule.applies_to, vec![name])),
        }
    }
    if groups.is_empty() {
        return Vec::new();
    }
    let mut lines = vec!["  Not applicable; these rules are about".to_owned()];
    for (scope, names) in groups {
        let scope = wrap(scope, SCOPE_COLUMNS);
        let names: Vec<String> = names
            .iter()
            .flat_map(|name| wrap(name, COLUMNS - INDENT - SCOPE_COLUMNS - 2))
            .collect();
        for index in 0..scope.len().max(names.len()) {
            let at = |lines: &[String]| lines.get(index).cloned().unwrap_or_default();
            lines.push(format!(
                "{:INDENT$}{}  {}",
                "",
                pad(&at(&scope), SCOPE_COLUMNS),
                at(&names)
            ));
        }
    }
    lines
}

fn value(check: &Check) -> String {
    let value = check.value;
    value.map_or_else(
        || "not known".to_owned(),
        |value| in_unit(value, check.unit),
    )
}

/// `>= 20.0%`; empty for a number that decides nothing.
fn condition(check: &Check) -> String {
    check.condition.map_or_else(String::new, |condition| {
        let threshold = in_unit(condition.threshold, check.unit);
        match condition.comparison {
            Comparison::Is => format!("needs {threshold}"),
            other => format!("{} {threshold}", other.symbol()),
        }
    })
}

fn in_unit(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Ratio => format!("{:.1}%", value * 100.0),
        Unit::Count if value.fract() != 0.0 => format!("{value:.1}"),
        Unit::Count => count(value as u64),
        Unit::Bytes => bytes(value as u64),
        Unit::Nanoseconds => duration(value as u64),
        Unit::PerSecond => format!("{}/s", rate(value)),
        Unit::YesNo if value == 0.0 => "no".to_owned(),
        Unit::YesNo => "yes".to_owned(),
    }
}

/// The rules, one object each.
pub(super) fn rules(explanation: &Explanation) -> Vec<Value> {
    explanation.rules.iter().map(rule).collect()
}

fn rule(rule: &RuleReport) -> Value {
    let mut object = Map::new();
    object.insert("cause".to_owned(), rule.cause.name().into());
    object.insert("rule".to_owned(), rule.rule.into());
    object.insert("outcome".to_owned(), rule.outcome.name().into());
    object.insert("applies_to".to_owned(), rule.applies_to.as_str().into());
    if !rule.checks.is_empty() {
        let checks: Vec<Value> = rule.checks.iter().map(check).collect();
        object.insert("checks".to_owned(), checks.into());
    }
    Value::Object(object)
}

fn check(check: &Check) -> Value {
    let number = |value: f64| match check.unit {
        Unit::YesNo => json!(value != 0.0),
        _ if value.fract() == 0.0 => json!(value as u64),
        _ => json!(value),
    };
    let mut object = Map::new();
    object.insert("name".to_owned(), check.name.into());
    if let Some(value) = check.value {
        object.insert("value".to_owned(), number(value));
    }
    object.insert("unit".to_owned(), check.unit.name().into());
    if let Some(condition) = check.condition {
        let symbol = condition.comparison.symbol();
        object.insert("comparison".to_owned(), symbol.into());
        object.insert("threshold".to_owned(), number(condition.threshold));
        object.insert("holds".to_owned(), condition.holds.into());
    }
    Value::Object(object)
}

#[cfg(test)]
mod tests;
