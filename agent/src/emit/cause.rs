//! A verdict in words, and when it is worth a line.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use crate::{
    cause::Cause,
    event::{Culprit, DrivenBy, Verdict},
};

/// Characters of a container's id that the field's tools show.
const SHORT_ID: usize = 12;

/// `it waits for another service, postgres (812) at 127.0.0.1:5432`.
pub(super) fn verdict(verdict: &Verdict) -> String {
    let title = verdict.cause.title();
    match &verdict.culprit {
        Some(named) => format!("{title}, {}", culprit(named)),
        None => title.to_owned(),
    }
}

/// `postgres (812) at 127.0.0.1:5432, container c0ffee123456`.
pub(super) fn culprit(culprit: &Culprit) -> String {
    let mut text = culprit.name.clone();
    if let Some(endpoint) = &culprit.endpoint
        && !culprit.name.contains(endpoint.as_str())
    {
        text += &format!(" at {endpoint}");
    }
    if let Some(container) = &culprit.container {
        let short: String = container.chars().take(SHORT_ID).collect();
        if !culprit.name.contains(&short) {
            text += &format!(", container {short}");
        }
    }
    text
}

/// Which side the queue fills from.
pub(super) fn driven_by(side: DrivenBy) -> &'static str {
    match side {
        DrivenBy::Producer => "producer: more came in than usual",
        DrivenBy::Consumer => "consumer: less was taken out than usual",
        DrivenBy::Both => "both: more came in and less was taken out than usual",
        DrivenBy::Unknown => "unknown: neither side is clearly out of its usual range",
    }
}

/// What was last said of each open episode: a verdict is told when it is another one, not when its numbers move.
#[derive(Default)]
pub(super) struct Told(HashMap<String, Gist>);

#[derive(PartialEq)]
struct Gist {
    cause: Cause,
    culprit: Option<Who>,
}

/// A culprit's name may hold numbers that move; what it is does not.
#[derive(PartialEq)]
enum Who {
    Process(u32),
    Endpoint(String),
    Named(String),
}

impl Told {
    /// Whether this is another verdict than the one that was last told of the episode. From now on it is told.
    pub(super) fn is_news(&mut self, episode: &str, verdict: &Verdict) -> bool {
        let culprit = verdict.culprit.as_ref();
        let gist = Gist {
            cause: verdict.cause,
            culprit: culprit.map(|culprit| match (culprit.pid, &culprit.endpoint) {
                (Some(pid), _) => Who::Process(pid),
                (None, Some(endpoint)) => Who::Endpoint(endpoint.clone()),
                (None, None) => Who::Named(culprit.name.clone()),
            }),
        };
        if self.0.get(episode) == Some(&gist) {
            return false;
        }
        // That nothing is seen is worth no line, unless something was.
        let is_first = self.0.insert(episode.to_owned(), gist).is_none();
        !(is_first && verdict.cause == Cause::Unknown)
    }

    /// The episode is over.
    pub(super) fn forget(&mut self, episode: &str) {
        self.0.remove(episode);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Confidence, CulpritKind};

    fn blaming(cause: Cause, pid: Option<u32>, name: &str) -> Verdict {
        Verdict {
            cause,
            share: Some(0.9),
            confidence: Confidence::High,
            runner_up: None,
            driven_by: DrivenBy::Consumer,
            culprit: Some(Culprit {
                kind: CulpritKind::Process,
                target: None,
                pid,
                name: name.to_owned(),
                endpoint: Some("10.0.0.5:5432".to_owned()),
                container: Some("c0ffee1234567890".to_owned()),
            }),
            root: None,
            path: Vec::new(),
            shares: Vec::new(),
            samples: 0,
            evidence: String::new(),
            advice: String::new(),
            messages: Vec::new(),
        }
    }

    #[test]
    fn a_verdict_is_news_when_its_cause_or_its_culprit_is_another() {
        let mut told = Told::default();
        let mut is_news =
            |cause, pid, name: &str| told.is_news("e1", &blaming(cause, Some(pid), name));
        assert!(is_news(Cause::DownstreamSlow, 812, "postgres (812)"));
        assert!(!is_news(
            Cause::DownstreamSlow,
            812,
            "postgres (812), for 3 s"
        ));
        assert!(is_news(Cause::DownstreamSlow, 813, "postgres (813)"));
        assert!(is_news(Cause::CpuBound, 813, "postgres (813)"));
        assert!(!told.is_news("e1", &blaming(Cause::CpuBound, Some(813), "")));
        told.forget("e1");
        assert!(told.is_news("e1", &blaming(Cause::CpuBound, Some(813), "")));
    }

    #[test]
    fn that_the_cause_is_not_seen_is_news_only_where_one_was() {
        let mut told = Told::default();
        assert!(!told.is_news("e1", &blaming(Cause::Unknown, None, "")));
        assert!(told.is_news("e1", &blaming(Cause::CpuBound, None, "")));
        assert!(told.is_news("e1", &blaming(Cause::Unknown, None, "")));
    }

    #[test]
    fn a_culprit_is_named_with_where_it_is_and_nothing_twice() {
        assert_eq!(
            verdict(&blaming(Cause::DownstreamSlow, None, "postgres (812)")),
            "it waits for another service, postgres (812) at 10.0.0.5:5432, container c0ffee123456"
        );
        assert_eq!(
            verdict(&blaming(
                Cause::NetworkLimited,
                None,
                "10.0.0.5:5432 in c0ffee1234567890"
            )),
            "the network carries no more, 10.0.0.5:5432 in c0ffee1234567890"
        );
    }
}
