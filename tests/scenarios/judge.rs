//! Compares what the agent reported with what was planted. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use serde_json::Value;
use tailback_tests::{
    agent::Event,
    scenario::{Outcome, Row},
};

use crate::{
    play::{Culprit, Story},
    table::{Planted, Scenario},
};

/// All reports on one episode, in order.
struct Episode<'a> {
    reports: Vec<&'a Event>,
}

impl<'a> Episode<'a> {
    fn kind(&self) -> &'a str {
        self.reports.first().map_or("", |event| event.text("kind"))
    }

    /// The last report before `end`.
    fn last_before(&self, end: Option<Instant>) -> Option<&'a Event> {
        let before = |event: &&&Event| end.is_none_or(|end| event.at <= end);
        self.reports.iter().rev().find(before).copied()
    }

    fn last(&self) -> Option<&'a Event> {
        self.reports.last().copied()
    }

    fn text(&self) -> String {
        let last = self.last();
        let text = |key| last.map_or("", |event| event.text(key));
        let end = last.is_some_and(|event| event.value.get("ongoing").is_some());
        format!(
            "{} {}: {}{}",
            text("kind"),
            text("name"),
            last.map_or_else(String::new, verdict_text),
            if end { " (still open)" } else { "" }
        )
    }
}

pub fn row(scenario: &Scenario, story: &Story) -> Row {
    let episodes = episodes(&story.events);
    let mut row = Row {
        scenario: scenario.name.to_owned(),
        on: scenario.on.to_owned(),
        planted: scenario
            .planted
            .map_or("nothing", |planted| planted.cause)
            .to_owned(),
        verdict: String::new(),
        culprit: String::new(),
        confidence: String::new(),
        share: None,
        warned_after_s: None,
        lead_s: None,
        outcome: Outcome::Right,
        why: Vec::new(),
        replayed: story.replayed,
        episodes: episodes.iter().map(Episode::text).collect(),
        took_s: 0.0,
    };
    match scenario.planted {
        Some(planted) => judge(&planted, story, &episodes, &mut row),
        None if !episodes.is_empty() => row.why.push("a healthy service has an episode".to_owned()),
        None => (),
    }
    if !row.why.is_empty() {
        row.outcome = Outcome::Wrong;
    }
    row
}

fn judge(planted: &Planted, story: &Story, episodes: &[Episode<'_>], row: &mut Row) {
    let asked: BTreeSet<u64> = story
        .events
        .iter()
        .filter(|event| event.is("target") && event.value["neighbour"] != true)
        .filter_map(|event| event.value["pid"].as_u64())
        .collect();
    let named = |episode: &&Episode<'_>| {
        let pid = episode
            .reports
            .first()
            .and_then(|event| event.value["pid"].as_u64());
        let ours = pid.is_none_or(|pid| asked.is_empty() || asked.contains(&pid));
        ours && planted.queues.contains(&episode.kind())
    };
    let early = episodes.iter().filter(|episode| {
        let first = episode.reports.first().map(|event| event.at);
        first < story.planted
    });
    let early: Vec<String> = early.map(Episode::text).collect();
    if !early.is_empty() {
        row.why.push(format!(
            "before the cause was planted: {}",
            early.join(", ")
        ));
    }
    let warned = story.events.iter().find(|event| {
        let named = event.is("level") && planted.queues.contains(&event.text("kind"));
        named && Some(event.at) >= story.planted && event.text("to") != "ok"
    });
    row.warned_after_s = seconds(story.planted, warned.map(|event| event.at));
    let own = story.own_message.into_iter().chain(story.failed).min();
    row.lead_s = seconds(warned.map(|event| event.at), own);
    if warned.is_none() {
        let kinds = planted.queues.join(" or ");
        row.why.push(format!("no warning of {kinds}"));
        return;
    }
    if row.lead_s.is_some_and(|lead| lead <= 0.0) {
        row.why.push("the application reported it first".to_owned());
    }
    for episode in episodes.iter().filter(named) {
        let reports = [
            (
                "while the cause was present",
                episode.last_before(story.removed),
            ),
            ("at the end", episode.last()),
        ];
        for (when, event) in reports {
            let Some(event) = event else { continue };
            row.verdict = verdict_text(event);
            row.culprit = culprit_of(event);
            row.confidence = event.text("confidence").to_owned();
            row.share = event.number("share");
            let wrong = wrong(planted, &story.culprit, event);
            row.why
                .extend(wrong.map(|wrong| format!("{when}: {wrong}")));
        }
    }
    for episode in episodes.iter().filter(|episode| !named(episode)) {
        for event in &episode.reports {
            if !is_allowed(planted, &story.culprit, event) {
                row.why
                    .push(format!("on another queue: {}", episode.text()));
                break;
            }
        }
    }
    if story.recovered.is_none() {
        row.why.push("no recovery".to_owned());
    }
}

/// What is wrong with the verdict on the affected queue.
fn wrong(planted: &Planted, culprit: &Culprit, event: &Event) -> Option<String> {
    let (cause, root) = (event.text("cause"), event.text("root"));
    let right = cause == planted.cause
        || planted
            .seen_as
            .is_some_and(|seen| (cause, root) == (seen, planted.cause));
    if !right {
        return Some(match cause {
            "" => "no verdict".to_owned(),
            _ => format!("the verdict is {}", verdict_text(event)),
        });
    }
    (planted.names && !is_named(culprit, event)).then(|| format!("it names {}", culprit_of(event)))
}

/// Whether a queue that need not have a verdict may have this one.
fn is_allowed(planted: &Planted, culprit: &Culprit, event: &Event) -> bool {
    let cause = event.text("cause");
    let says = !matches!(cause, "" | "unknown");
    let same = cause == planted.cause && !planted.names;
    !says || same || planted.also.contains(&cause) || (planted.names && is_named(culprit, event))
}

fn is_named(planted: &Culprit, event: &Event) -> bool {
    let culprit = &event.value["culprit"];
    let pid = culprit["pid"]
        .as_u64()
        .and_then(|pid| u32::try_from(pid).ok());
    if pid.is_some_and(|pid| planted.pids.contains(&pid)) {
        return true;
    }
    let texts: Vec<&str> = ["name", "endpoint", "container"]
        .iter()
        .filter_map(|key| culprit[key].as_str())
        .collect();
    planted
        .words
        .iter()
        .any(|word| texts.iter().any(|text| text.contains(word.as_str())))
}

/// The cause, with its root cause where that differs.
fn verdict_text(event: &Event) -> String {
    match (event.text("cause"), event.text("root")) {
        (cause, "") => cause.to_owned(),
        (cause, root) if cause == root => cause.to_owned(),
        (cause, root) => format!("{cause} ({root})"),
    }
}

fn culprit_of(event: &Event) -> String {
    match &event.value["culprit"] {
        Value::Null => "nobody".to_owned(),
        culprit => culprit["name"].as_str().unwrap_or_default().to_owned(),
    }
}

fn episodes(events: &[Event]) -> Vec<Episode<'_>> {
    let mut all: Vec<Episode<'_>> = Vec::new();
    let mut at: BTreeMap<&str, usize> = BTreeMap::new();
    for event in events.iter().filter(|event| event.is("episode")) {
        let index = *at.entry(event.text("id")).or_insert_with(|| {
            all.push(Episode {
                reports: Vec::new(),
            });
            all.len() - 1
        });
        all[index].reports.push(event);
    }
    all
}

fn seconds(from: Option<Instant>, to: Option<Instant>) -> Option<f64> {
    let (from, to) = (from?, to?);
    Some(match to.checked_duration_since(from) {
        Some(after) => after.as_secs_f64(),
        None => -from.duration_since(to).as_secs_f64(),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::table::SCENARIOS;

    const HOLDER: u32 = 812;

    /// A flash sale as it should be reported, modified by `change`; times are seconds after the first sample.
    fn judged(change: impl FnOnce(&mut Vec<(u64, Value)>, &mut Story)) -> Row {
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let verdict = json!({"pid": HOLDER, "name": "postgres (812)"});
        let episode = |end: bool| {
            let mut report = json!({
                "type": "episode", "id": "e", "kind": "accept", "name": "127.0.0.1:80",
                "cause": "downstream_slow", "share": 0.9, "culprit": verdict,
            });
            if !end {
                report["ongoing"] = true.into();
            }
            report
        };
        let level = json!({"type": "level", "kind": "accept", "to": "warn"});
        let mut reports = vec![
            (7, level),
            (9, episode(false)),
            (12, episode(false)),
            (16, episode(true)),
        ];
        let mut story = Story {
            planted: Some(at(6)),
            removed: Some(at(13)),
            recovered: Some(at(16)),
            culprit: Culprit::process(HOLDER),
            own_message: Some(at(10)),
            ..Story::default()
        };
        change(&mut reports, &mut story);
        reports.sort_by_key(|(s, _)| *s);
        story.events = reports
            .into_iter()
            .map(|(s, value)| Event {
                at: at(s),
                unix_ns: s * 1_000_000_000,
                value,
            })
            .collect();
        row(&SCENARIOS[0], &story)
    }

    fn wrong(change: impl FnOnce(&mut Vec<(u64, Value)>, &mut Story)) -> String {
        let row = judged(change);
        assert_eq!(row.outcome, Outcome::Wrong);
        row.why.join("; ")
    }

    #[test]
    fn a_verdict_that_names_what_was_planted_is_right() {
        let row = judged(|_, _| ());
        assert_eq!((row.outcome, row.why.len()), (Outcome::Right, 0));
        assert_eq!((row.warned_after_s, row.lead_s), (Some(1.0), Some(3.0)));
        assert_eq!(
            (row.verdict.as_str(), row.share),
            ("downstream_slow", Some(0.9))
        );
    }

    #[test]
    fn another_cause_or_another_culprit_is_wrong() {
        let why = wrong(|reports, _| reports[2].1["cause"] = "cpu_bound".into());
        assert_eq!(why, "while the cause was present: the verdict is cpu_bound");
        let why =
            wrong(|reports, _| reports[3].1["culprit"] = json!({"pid": 9, "name": "cron (9)"}));
        assert_eq!(why, "at the end: it names cron (9)");
        let why = wrong(|reports, _| {
            reports[3]
                .1
                .as_object_mut()
                .map(|report| report.remove("cause"));
        });
        assert_eq!(why, "at the end: no verdict");
    }

    #[test]
    fn another_queue_must_not_have_another_verdict() {
        let other = |cause: &str, pid: u32| {
            json!({"type": "episode", "id": "f", "kind": "recv", "name": ":80",
                   "cause": cause, "culprit": {"pid": pid, "name": "x"}})
        };
        assert!(
            wrong(|reports, _| reports.push((14, other("disk_slow", 9))))
                .starts_with("on another queue")
        );
        for (cause, pid) in [("unknown", 9), ("disk_slow", HOLDER)] {
            let row = judged(|reports, _| reports.push((14, other(cause, pid))));
            assert_eq!(row.outcome, Outcome::Right, "{cause}: {:?}", row.why);
        }
    }

    #[test]
    fn late_or_missing_warnings_and_missing_recovery_are_wrong() {
        assert_eq!(
            wrong(|reports, _| drop(reports.remove(0))),
            "no warning of accept"
        );
        assert_eq!(
            wrong(|reports, _| reports[0].0 = 11),
            "the application reported it first"
        );
        assert_eq!(wrong(|_, story| story.recovered = None), "no recovery");
        let early = wrong(|reports, story| {
            story.planted = story.planted.map(|at| at + Duration::from_secs(4));
            reports[0].0 = 11;
            story.own_message = None;
        });
        assert!(early.starts_with("before the cause was planted"), "{early}");
    }
}
