use std::collections::HashSet;

use opentelemetry::trace::SpanId;
use opentelemetry_sdk::trace::SpanData;

use super::*;
use crate::{
    emit::{
        fixture::{
            GATEWAY, INCIDENT, POSTGRES, SHOP, at, cause, culprit, episode, gateway, shop, targets,
            verdict,
        },
        spans::Host,
    },
    event::{Episode, Event},
    queue::Kind,
};

fn opened(episode: &Episode) -> Event {
    Event::EpisodeOpened(Box::new(Episode {
        verdict: None,
        ..episode.clone()
    }))
}

fn cause_event(episode: &Episode, index: u32) -> Event {
    Event::Cause(Box::new(cause(episode, index, at(10), at(20))))
}

fn ended(episode: Episode) -> Event {
    Event::Episode(Box::new(Episode {
        ongoing: false,
        ..episode
    }))
}

/// Each span with the service whose it is.
fn spans_of(events: &[Event]) -> Vec<(String, SpanData)> {
    let mut spans = Spans::new(Host::default());
    let all = events
        .iter()
        .flat_map(|event| spans.take(event))
        .flat_map(|batch| {
            let service = batch.resource.get(&"service.name".into()).unwrap();
            let service = service.to_string();
            batch.spans.into_iter().map(move |it| (service.clone(), it))
        })
        .collect();
    assert_eq!(spans.orphans(), 0);
    all
}

fn story() -> Vec<Event> {
    vec![
        targets(),
        opened(&shop()),
        opened(&gateway()),
        cause_event(&gateway(), 0),
        cause_event(&shop(), 0),
        ended(shop()),
        ended(gateway()),
    ]
}

fn attribute(span: &SpanData, key: &str) -> Option<String> {
    let mut attributes = span.attributes.iter();
    let found = attributes.find(|kv| kv.key.as_str() == key);
    found.map(|kv| kv.value.to_string())
}

fn linked(span: &SpanData) -> Vec<(String, SpanId)> {
    let contexts = span.links.iter().map(|link| &link.span_context);
    contexts
        .map(|it| (it.trace_id().to_string(), it.span_id()))
        .collect()
}

#[test]
fn a_trace_shows_every_service_of_the_wait_chain_under_its_own_name() {
    let spans = spans_of(&story());
    let names: Vec<_> = spans
        .iter()
        .map(|(service, span)| (service.as_str(), span.name.as_ref()))
        .collect();
    let expected = [
        ("shop", "queue.incident"),
        ("shop", "queue.onset accept"),
        ("gateway", "queue.onset accept"),
        // The shop has an episode to show itself; the database has none.
        ("postgres", "queue.cause lock_contention"),
        ("postgres", "queue.cause lock_contention"),
        ("gateway", "queue.cause downstream_slow"),
        ("postgres", "queue.cause lock_contention"),
        ("postgres", "queue.cause lock_contention"),
        ("shop", "queue.cause downstream_slow"),
        ("shop", "queue.saturation accept"),
        ("gateway", "queue.saturation accept"),
    ];
    assert_eq!(names, expected);
    for (_, span) in &spans {
        assert_eq!(span.span_context.trace_id().to_string(), INCIDENT);
    }
}

#[test]
fn all_cause_spans_are_children_of_the_affected_queues_onset() {
    let spans = spans_of(&story());
    let id = |i: usize| spans[i].1.span_context.span_id();
    for (child, parent) in [(3, 2), (4, 2), (5, 2), (6, 1), (7, 1), (8, 1)] {
        assert_eq!(spans[child].1.parent_span_id, id(parent), "span {child}");
    }
    let ids: HashSet<_> = (0..spans.len()).map(id).collect();
    assert_eq!(ids.len(), spans.len(), "a span is there twice");
}

#[test]
fn without_an_episode_the_culprits_wait_chain_span_is_linked() {
    let spans = spans_of(&story());
    let id = |i: usize| (INCIDENT.to_owned(), spans[i].1.span_context.span_id());
    assert_eq!(linked(&spans[5].1), [id(4)]);
    assert_eq!(linked(&spans[8].1), [id(7)]);
    // At the end to the last.
    assert_eq!(linked(&spans[9].1), [id(7)]);
    assert_eq!(linked(&spans[10].1), [id(7)]);
}

#[test]
fn the_onset_of_the_culprits_episode_is_linked_even_after_its_end() {
    let database = episode("e3", POSTGRES, Kind::Lock, "0x7f00");
    let spans = spans_of(&[
        targets(),
        opened(&shop()),
        opened(&database),
        cause_event(&shop(), 0),
        ended(database),
        ended(shop()),
    ]);
    let onset = &spans[2];
    assert_eq!(onset.0, "postgres");
    let onset = (INCIDENT.to_owned(), onset.1.span_context.span_id());
    // The database shows itself: no span is made for it.
    assert_eq!(spans.len(), 6);
    assert_eq!(spans[3].1.name, "queue.cause downstream_slow");
    assert_eq!(linked(&spans[3].1), std::slice::from_ref(&onset));
    assert!(linked(&spans[4].1).is_empty());
    assert_eq!(linked(&spans[5].1), [onset]);
}

#[test]
fn a_culprit_in_another_incident_is_linked_in_its_own_trace() {
    let other = "4bf92f3577b34da6a3ce929d0e0e4736";
    let database = Episode {
        incident: other.to_owned(),
        ..episode("e3", POSTGRES, Kind::Lock, "0x7f00")
    };
    let events = [
        targets(),
        opened(&database),
        opened(&shop()),
        cause_event(&shop(), 0),
    ];
    let spans = spans_of(&events);
    let onset = spans[1].1.span_context.span_id();
    assert_eq!(
        linked(&spans.last().unwrap().1),
        [(other.to_owned(), onset)]
    );
}

#[test]
fn a_service_that_is_its_own_culprit_has_no_link() {
    let own = Episode {
        verdict: Some(Arc::new(Verdict {
            culprit: Some(crate::event::Culprit {
                target: Some(SHOP),
                ..culprit()
            }),
            path: verdict().path[..1].to_vec(),
            ..verdict()
        })),
        ..shop()
    };
    let spans = spans_of(&[targets(), opened(&own), cause_event(&own, 0), ended(own)]);
    assert_eq!(spans.len(), 4);
    assert!(spans.iter().all(|(_, span)| linked(span).is_empty()));
}

#[test]
fn the_cause_is_on_its_own_span_and_on_the_saturation_span() {
    let spans = spans_of(&story());
    let verdict = verdict();
    for i in [8, 9] {
        let of = |key: &str| attribute(&spans[i].1, key);
        assert_eq!(of("tailback.cause").as_deref(), Some("downstream_slow"));
        assert_eq!(of("tailback.cause.share").as_deref(), Some("0.97"));
        assert_eq!(
            of("tailback.cause.culprit").as_deref(),
            Some("postgres (812) at 127.0.0.1:5432")
        );
        assert_eq!(of("tailback.evidence"), Some(verdict.evidence.clone()));
        assert_eq!(of("tailback.advice"), Some(verdict.advice.clone()));
        assert_eq!(of("tailback.episode.id").as_deref(), Some("e1"));
        assert_eq!(of("tailback.queue.name").as_deref(), Some("127.0.0.1:8080"));
    }
    let hop = |key: &str| attribute(&spans[7].1, key);
    assert_eq!(
        hop("tailback.evidence").as_deref(),
        Some("postgres (812): idle in a transaction for at least 8.2 s")
    );
    assert_eq!(hop("tailback.queue.name"), None, "the queue is the shop's");
}

#[test]
fn a_cause_that_was_just_found_has_no_span_yet() {
    let first = Event::Cause(Box::new(cause(&shop(), 0, at(10), at(10))));
    assert_eq!(spans_of(&[targets(), opened(&shop()), first]).len(), 2);
}

#[test]
fn a_cause_of_an_unknown_episode_is_counted_and_not_created() {
    let mut spans = Spans::new(Host::default());
    spans.take(&targets());
    assert!(spans.take(&cause_event(&shop(), 0)).is_empty());
    assert_eq!(spans.orphans(), 1);
}

#[test]
fn long_wait_chains_are_cut_and_unknown_services_are_skipped() {
    let step = verdict().path[1].clone();
    let stranger = Hop {
        target: Some(77),
        ..step.clone()
    };
    let path = [vec![stranger], vec![step; 20]].concat();
    let long = Episode {
        verdict: Some(Arc::new(Verdict { path, ..verdict() })),
        ..shop()
    };
    let spans = spans_of(&[targets(), opened(&long), cause_event(&long, 0)]);
    let hops = spans.iter().filter(|(service, _)| service == "postgres");
    assert_eq!(hops.count(), MAX_HOPS);
}

#[test]
fn a_long_incident_does_not_grow_without_bound() {
    let mut spans = Spans::new(Host::default());
    spans.take(&targets());
    spans.take(&opened(&shop()));
    for i in 0..1_000 {
        let short = episode(&format!("s{i}"), GATEWAY, Kind::Recv, "0.0.0.0:80");
        spans.take(&opened(&short));
        spans.take(&ended(short));
    }
    assert_eq!(spans.orphans(), 0);
    assert_eq!(spans.open[INCIDENT].onsets.len(), 2);
}
