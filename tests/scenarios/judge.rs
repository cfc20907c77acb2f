//! Compares what was said with what was planted. Pure.

use std::{collections::BTreeMap, time::Instant};

use serde_json::Value;
use tailback_tests::{
    agent::Event,
    scenario::{Outcome, Row},
};

use crate::{
    play::{Culprit, Story},
    table::{Planted, Scenario},
};

/// All that was told of one episode, in order.
struct Episode<'a> {
    told: Vec<&'a Event>,
}

impl<'a> Episode<'a> {
    fn kind(&self) -> &'a str {
        self.told.first().map_or("", |event| event.text("kind"))
    }

    /// The last word before `end`.
    fn last_before(&self, end: Option<Instant>) -> Option<&'a Event> {
        let before = |event: &&&Event| end.is_none_or(|end| event.at <= end);
        self.told.iter().rev().find(before).copied()
    }

    fn last(&self) -> Option<&'a Event> {
        self.told.last().copied()
    }

    fn words(&self) -> String {
        let last = self.last();
        let text = |key| last.map_or("", |event| event.text(key));
        let end = last.is_some_and(|event| event.value.get("ongoing").is_some());
        format!(
            "{} {}: {}{}",
            text("kind"),
            text("name"),
            last.map_or_else(String::new, said),
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
        share: None,
        warned_after_s: None,
        lead_s: None,
        outcome: Outcome::Right,
        why: Vec::new(),
        episodes: episodes.iter().map(Episode::words).collect(),
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
    let named = |episode: &&Episode<'_>| planted.queues.contains(&episode.kind());
    let early = episodes.iter().filter(|episode| {
        let first = episode.told.first().map(|event| event.at);
        first < story.planted
    });
    let early: Vec<String> = early.map(Episode::words).collect();
    if !early.is_empty() {
        row.why
            .push(format!("before it was planted: {}", early.join(", ")));
    }
    let warned = story.events.iter().find(|event| {
        let named = event.is("level") && planted.queues.contains(&event.text("kind"));
        named && Some(event.at) >= story.planted && event.text("to") != "ok"
    });
    row.warned_after_s = seconds(story.planted, warned.map(|event| event.at));
    let own = story.said.into_iter().chain(story.failed).min();
    row.lead_s = seconds(warned.map(|event| event.at), own);
    if warned.is_none() {
        let kinds = planted.queues.join(" or ");
        row.why.push(format!("no warning of {kinds}"));
        return;
    }
    if row.lead_s.is_some_and(|lead| lead <= 0.0) {
        row.why.push("the application said it first".to_owned());
    }
    for episode in episodes.iter().filter(named) {
        let told = [
            ("while it was there", episode.last_before(story.removed)),
            ("in the end", episode.last()),
        ];
        for (when, event) in told {
            let Some(event) = event else { continue };
            row.verdict = said(event);
            row.culprit = culprit_of(event);
            row.share = event.number("share");
            let wrong = wrong(planted, &story.culprit, event);
            row.why
                .extend(wrong.map(|wrong| format!("{when}: {wrong}")));
        }
    }
    for episode in episodes.iter().filter(|episode| !named(episode)) {
        for event in &episode.told {
            if !may_say(planted, &story.culprit, event) {
                row.why.push(format!("elsewhere: {}", episode.words()));
                break;
            }
        }
    }
    if story.recovered.is_none() {
        row.why.push("no recovery".to_owned());
    }
}

/// What is wrong with the verdict of the queue that matters.
fn wrong(planted: &Planted, culprit: &Culprit, event: &Event) -> Option<String> {
    let (cause, root) = (event.text("cause"), event.text("root"));
    let right = cause == planted.cause
        || planted
            .seen_as
            .is_some_and(|seen| (cause, root) == (seen, planted.cause));
    if !right {
        return Some(match cause {
            "" => "no verdict".to_owned(),
            _ => format!("the verdict is {}", said(event)),
        });
    }
    (planted.names && !is_named(culprit, event)).then(|| format!("it names {}", culprit_of(event)))
}

/// A queue that has to say nothing, and nothing else if it says something.
fn may_say(planted: &Planted, culprit: &Culprit, event: &Event) -> bool {
    let cause = event.text("cause");
    let says = !matches!(cause, "" | "unknown");
    let same = cause == planted.cause && !planted.names;
    !says || same || planted.also.contains(&cause) || (planted.names && is_named(culprit, event))
}

fn is_named(culprit: &Culprit, event: &Event) -> bool {
    let told = &event.value["culprit"];
    let pid = told["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    if pid.is_some_and(|pid| culprit.pids.contains(&pid)) {
        return true;
    }
    let texts: Vec<&str> = ["name", "endpoint", "container"]
        .iter()
        .filter_map(|key| told[key].as_str())
        .collect();
    culprit
        .words
        .iter()
        .any(|word| texts.iter().any(|text| text.contains(word.as_str())))
}

/// The cause, with its root where that is another.
fn said(event: &Event) -> String {
    match (event.text("cause"), event.text("root")) {
        (cause, "") => cause.to_owned(),
        (cause, root) if cause == root => cause.to_owned(),
        (cause, root) => format!("{cause} ({root})"),
    }
}

fn culprit_of(event: &Event) -> String {
    match &event.value["culprit"] {
        Value::Null => "nobody".to_owned(),
        told => told["name"].as_str().unwrap_or_default().to_owned(),
    }
}

fn episodes(events: &[Event]) -> Vec<Episode<'_>> {
    let mut all: Vec<Episode<'_>> = Vec::new();
    let mut at: BTreeMap<&str, usize> = BTreeMap::new();
    for event in events.iter().filter(|event| event.is("episode")) {
        let index = *at.entry(event.text("id")).or_insert_with(|| {
            all.push(Episode { told: Vec::new() });
            all.len() - 1
        });
        all[index].told.push(event);
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
