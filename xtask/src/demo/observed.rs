//! Collects the events of Tailback and the output of the application so far. Pure: events in, state out.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use tailback_tests::{agent::Event, lines::Line};

#[derive(Default)]
pub struct Observed {
    /// Kinds of the queues that must fill.
    queues: &'static [&'static str],
    /// The process that Tailback must name, set once the fault is planted.
    pub culprit: Option<u32>,
    /// The first level above ok of one of these queues.
    pub warning: Option<Event>,
    /// The first cause of one of these queues that names the culprit.
    pub cause: Option<Event>,
    /// The application's own message that its queue is full.
    pub full: Option<Line>,
    /// Open episodes.
    open: BTreeSet<String>,
    /// (service, cause, culprit) already reported.
    causes: BTreeSet<[String; 3]>,
    /// Closed episodes of these queues, by start time.
    pub over: Vec<Event>,
}

impl Observed {
    pub fn of(queues: &'static [&'static str]) -> Self {
        Self {
            queues,
            ..Self::default()
        }
    }

    /// Records an event. Returns whether it is new information about these queues.
    pub fn take(&mut self, event: &Event) -> bool {
        let ours = self.queues.contains(&event.text("kind"));
        if event.is("level") {
            if event.text("to") != "ok" {
                self.open.insert(event.text("episode").to_owned());
                if ours && self.warning.is_none() {
                    self.warning = Some(event.clone());
                }
            }
        } else if event.is("cause") {
            if ours && self.cause.is_none() && self.names_culprit(event) {
                self.cause = Some(event.clone());
            }
            let culprit = event.value["culprit"]["name"].as_str().unwrap_or_default();
            let key = [event.text("target"), event.text("cause"), culprit].map(str::to_owned);
            return ours && self.causes.insert(key);
        } else if event.is("episode") && event.value["ongoing"] != true {
            self.open.remove(event.text("id"));
            if ours {
                self.over.push(event.clone());
                let sign = |event: &Event| event.value["onset_unix_ns"].as_u64();
                self.over.sort_by_key(sign);
            }
        }
        ours
    }

    fn names_culprit(&self, event: &Event) -> bool {
        let pid = event.value["culprit"]["pid"].as_u64();
        pid.is_some() && pid == self.culprit.map(u64::from)
    }

    /// Whether there was a warning and no episode is open any more.
    pub fn recovered(&self) -> bool {
        self.warning.is_some() && self.open.is_empty()
    }

    /// Time from the warning to `later`.
    pub fn lead(&self, later: Instant) -> Option<Duration> {
        let warning = self.warning.as_ref()?;
        Some(later.saturating_duration_since(warning.at))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn observe(events: impl IntoIterator<Item = Value>) -> Observed {
        let mut observed = Observed::of(&["accept"]);
        observed.culprit = Some(812);
        for value in events {
            observed.take(&Event {
                at: Instant::now(),
                unix_ns: 0,
                value,
            });
        }
        observed
    }

    fn level(kind: &str, episode: &str) -> Value {
        json!({"type": "level", "kind": kind, "to": "warn", "episode": episode})
    }

    fn over(kind: &str, episode: &str, sign: u64) -> Value {
        json!({"type": "episode", "kind": kind, "id": episode, "onset_unix_ns": sign})
    }

    #[test]
    fn only_a_cause_that_names_the_culprit_counts() {
        let cause = |pid: u64| json!({"type": "cause", "kind": "accept", "culprit": {"pid": pid}});
        assert!(observe([cause(9)]).cause.is_none());
        let cause = observe([cause(9), cause(812)]).cause.unwrap();
        assert_eq!(cause.value["culprit"]["pid"], 812);
    }

    #[test]
    fn a_repeated_cause_is_not_new() {
        let event = |cause: &str| Event {
            at: Instant::now(),
            unix_ns: 0,
            value: json!({"type": "cause", "kind": "accept", "target": "shop", "cause": cause}),
        };
        let mut observed = observe([]);
        assert!(observed.take(&event("cpu_bound")));
        assert!(!observed.take(&event("cpu_bound")));
        assert!(observed.take(&event("disk_slow")));
    }

    #[test]
    fn recovery_means_that_every_episode_is_closed() {
        assert!(!observe([]).recovered(), "there was no warning");
        let both = [level("accept", "a"), level("recv", "b")];
        let one_over = both.clone().into_iter().chain([over("accept", "a", 2)]);
        assert!(!observe(one_over).recovered());
        let all_over = [over("accept", "a", 2), over("recv", "b", 1)];
        let observed = observe(both.into_iter().chain(all_over));
        assert!(observed.recovered());
        assert_eq!(
            observed.over.len(),
            1,
            "the demo is not about the other queue"
        );
    }
}
