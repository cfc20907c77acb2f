//! A verdict as text, and when a new verdict is worth a line of output.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use crate::{
    cause::Cause,
    event::{Culprit, CulpritKind, DrivenBy, Verdict},
};

/// Length of a short container id, as `docker ps` shows it.
const SHORT_ID_CHARS: usize = 12;

/// `it waits for another service, postgres (812) at 127.0.0.1:5432`.
pub(crate) fn verdict(verdict: &Verdict) -> String {
    let title = title(verdict.cause, verdict.culprit.as_ref());
    match &verdict.culprit {
        Some(named) if title == FULL => format!("{} is full", culprit(named)),
        Some(named) => format!("{title}, {}", culprit(named)),
        None => title.to_owned(),
    }
}

/// Said of a limit of the network: a connection tracking table.
const FULL: &str = "it is full";

/// The words for a cause with its culprit. A limit of the network is a table without room, and not a path without capacity.
fn title(cause: Cause, culprit: Option<&Culprit>) -> &'static str {
    match culprit {
        Some(culprit) if cause == Cause::NetworkLimited && culprit.kind == CulpritKind::Limit => {
            FULL
        }
        _ => cause.title(),
    }
}

/// The words for a root cause beside its culprit. None for causes that describe the threads that wait for the culprit: the
/// holder of a lock does not wait for that lock.
pub(crate) fn beside_culprit(root: Cause, culprit: Option<&Culprit>) -> Option<&'static str> {
    let is_of_those_who_wait = matches!(
        root,
        Cause::CpuStarved
            | Cause::LockContention
            | Cause::DownstreamSlow
            | Cause::OutputBlocked
            | Cause::PeerNotReading
            | Cause::PeerNotSending
    );
    (culprit.is_none() || !is_of_those_who_wait).then(|| title(root, culprit))
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
        let short: String = container.chars().take(SHORT_ID_CHARS).collect();
        if !culprit.name.contains(&short) {
            text += &format!(", container {short}");
        }
    }
    text
}

/// Which side made the queue fill, with the reason.
pub(super) fn driven_by(side: DrivenBy) -> &'static str {
    match side {
        DrivenBy::Producer => "producer: arrivals above baseline",
        DrivenBy::Consumer => "consumer: departures below baseline",
        DrivenBy::Both => "both: arrivals above and departures below baseline",
        DrivenBy::Unknown => "unknown: neither rate differs clearly from its baseline",
    }
}

/// The verdict last reported for each open episode. A verdict is reported again when its cause or culprit changes, not
/// when only its numbers do.
#[derive(Default)]
pub(super) struct Reported(HashMap<String, Summary>);

#[derive(PartialEq)]
struct Summary {
    cause: Cause,
    culprit: Option<Identity>,
}

/// What identifies a culprit. Its name may contain numbers that change.
#[derive(PartialEq)]
enum Identity {
    Process(u32),
    Endpoint(String),
    Named(String),
}

impl Reported {
    /// Whether this verdict differs from the one last reported for the episode; records it as reported.
    pub(super) fn is_news(&mut self, episode: &str, verdict: &Verdict) -> bool {
        let culprit = verdict.culprit.as_ref();
        let summary = Summary {
            cause: verdict.cause,
            culprit: culprit.map(|culprit| match (culprit.pid, &culprit.endpoint) {
                (Some(pid), _) => Identity::Process(pid),
                (None, Some(endpoint)) => Identity::Endpoint(endpoint.clone()),
                (None, None) => Identity::Named(culprit.name.clone()),
            }),
        };
        if self.0.get(episode) == Some(&summary) {
            return false;
        }
        // An unknown cause is news only if a cause was reported before.
        let is_first = self.0.insert(episode.to_owned(), summary).is_none();
        !(is_first && verdict.cause == Cause::Unknown)
    }

    /// Forgets an episode that has ended.
    pub(super) fn forget(&mut self, episode: &str) {
        self.0.remove(episode);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Confidence;

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
            explanation: None,
            messages: Vec::new(),
        }
    }

    #[test]
    fn a_cause_of_those_who_wait_is_not_said_of_the_culprit() {
        let holder = blaming(Cause::LockContention, Some(812), "postgres (812)").culprit;
        let words = |root| beside_culprit(root, holder.as_ref());
        assert_eq!(words(Cause::LockContention), None);
        assert_eq!(words(Cause::CpuBound), Some("it is busy computing"));
        assert_eq!(
            beside_culprit(Cause::LockContention, None),
            Some("its threads wait for a lock")
        );
    }

    #[test]
    fn a_verdict_is_news_when_its_cause_or_culprit_changes() {
        let mut reported = Reported::default();
        let mut is_news =
            |cause, pid, name: &str| reported.is_news("e1", &blaming(cause, Some(pid), name));
        assert!(is_news(Cause::DownstreamSlow, 812, "postgres (812)"));
        assert!(!is_news(
            Cause::DownstreamSlow,
            812,
            "postgres (812), for 3 s"
        ));
        assert!(is_news(Cause::DownstreamSlow, 813, "postgres (813)"));
        assert!(is_news(Cause::CpuBound, 813, "postgres (813)"));
        assert!(!reported.is_news("e1", &blaming(Cause::CpuBound, Some(813), "")));
        reported.forget("e1");
        assert!(reported.is_news("e1", &blaming(Cause::CpuBound, Some(813), "")));
    }

    #[test]
    fn an_unknown_cause_is_news_only_after_a_known_one() {
        let mut reported = Reported::default();
        assert!(!reported.is_news("e1", &blaming(Cause::Unknown, None, "")));
        assert!(reported.is_news("e1", &blaming(Cause::CpuBound, None, "")));
        assert!(reported.is_news("e1", &blaming(Cause::Unknown, None, "")));
    }

    #[test]
    fn a_culprit_is_named_with_its_endpoint_and_container_without_repetition() {
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
            "the network path is saturated, 10.0.0.5:5432 in c0ffee1234567890"
        );
    }

    #[test]
    fn a_full_connection_tracking_table_is_no_saturated_path() {
        let mut full = blaming(Cause::NetworkLimited, Some(812), "the table of the host");
        full.culprit = Some(Culprit::named(
            CulpritKind::Limit,
            "the connection tracking table of the host".to_owned(),
        ));
        assert_eq!(
            verdict(&full),
            "the connection tracking table of the host is full"
        );
        full.culprit = None;
        assert_eq!(verdict(&full), "the network path is saturated");
    }
}
