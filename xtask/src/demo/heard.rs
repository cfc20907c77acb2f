//! What Tailback and the application have said so far. Pure: events in, state out.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use tailback_tests::{agent::Event, lines::Line};

#[derive(Default)]
pub struct Heard {
    /// Kinds of the queues that must fill.
    queues: &'static [&'static str],
    /// The process that is to be named, from the moment on at which it has done something.
    pub culprit: Option<u32>,
    /// The first level above ok of such a queue.
    pub warning: Option<Event>,
    /// The first cause of such a queue that names the culprit.
    pub cause: Option<Event>,
    /// The application's own words.
    pub full: Option<Line>,
    /// Episodes under way.
    open: BTreeSet<String>,
    /// Service, cause and culprit, as far as they were told.
    causes: BTreeSet<[String; 3]>,
    /// Episodes of such queues that are over, in the order in which they began.
    pub over: Vec<Event>,
}

impl Heard {
    pub fn of(queues: &'static [&'static str]) -> Self {
        Self {
            queues,
            ..Self::default()
        }
    }

    /// Whether it is news of the queues that must fill.
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
            let told = [event.text("target"), event.text("cause"), culprit].map(str::to_owned);
            return ours && self.causes.insert(told);
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

    /// Whether all that had begun is over.
    pub fn recovered(&self) -> bool {
        self.warning.is_some() && self.open.is_empty()
    }

    /// From the warning to `later`.
    pub fn lead(&self, later: Instant) -> Option<Duration> {
        let warning = self.warning.as_ref()?;
        Some(later.saturating_duration_since(warning.at))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn heard(events: impl IntoIterator<Item = Value>) -> Heard {
        let mut heard = Heard::of(&["accept"]);
        heard.culprit = Some(812);
        for value in events {
            heard.take(&Event {
                at: Instant::now(),
                unix_ns: 0,
                value,
            });
        }
        heard
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
        assert!(heard([cause(9)]).cause.is_none());
        let cause = heard([cause(9), cause(812)]).cause.unwrap();
        assert_eq!(cause.value["culprit"]["pid"], 812);
    }

    #[test]
    fn a_cause_is_news_once() {
        let event = |cause: &str| Event {
            at: Instant::now(),
            unix_ns: 0,
            value: json!({"type": "cause", "kind": "accept", "target": "shop", "cause": cause}),
        };
        let mut heard = heard([]);
        assert!(heard.take(&event("cpu_bound")));
        assert!(!heard.take(&event("cpu_bound")));
        assert!(heard.take(&event("disk_slow")));
    }

    #[test]
    fn all_is_well_when_every_episode_is_over() {
        assert!(!heard([]).recovered(), "nothing has happened yet");
        let both = [level("accept", "a"), level("recv", "b")];
        let one_over = both.clone().into_iter().chain([over("accept", "a", 2)]);
        assert!(!heard(one_over).recovered());
        let all_over = [over("accept", "a", 2), over("recv", "b", 1)];
        let heard = heard(both.into_iter().chain(all_over));
        assert!(heard.recovered());
        assert_eq!(
            heard.over.len(),
            1,
            "the story is not about the other queue"
        );
    }
}
