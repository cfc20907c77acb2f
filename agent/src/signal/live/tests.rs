//! The view: its keys, its order and its bounds.

use std::sync::Arc;

use super::{
    Live, fixture,
    view::{Episode, Service, View},
};
use crate::{
    cause::Cause,
    emit::{
        fixture::{SHOP, at, targets},
        json::reference::assert_documented,
    },
    event::{Event, Level},
    queue::{Kind, QueueKey},
    sample::Target,
    signal::{fixture as state, status},
};

#[test]
fn the_keys_of_the_view_are_those_of_the_documentation() {
    let lock = fixture::view();
    // A root cause that describes its culprit.
    let mut computing = fixture::view();
    let open = computing
        .services
        .iter_mut()
        .flat_map(|it| &mut it.episodes);
    let roots = open
        .chain(&mut computing.ended)
        .filter_map(|it| it.root.as_mut());
    roots.for_each(|root| root.cause = Some(Cause::CpuBound.title().to_owned()));
    assert_documented(
        "live",
        &[lock, computing].map(|view| serde_json::to_value(&view).unwrap()),
    );
}

#[test]
fn the_reply_of_an_agent_can_be_read_again() {
    let text = status::live(&state::state(), std::path::Path::new("/nonexistent"));
    let view: View = serde_json::from_str(&text).unwrap();
    assert_eq!(view.services[0].target, "shop");
    assert_eq!(view.subscribers[0].target.as_deref(), Some("shop"));
    assert!(view.agent.unwrap().sampling);
    // By an older or a newer one.
    let view: View = serde_json::from_str(r#"{"services": [{"colour": "red"}]}"#).unwrap();
    assert_eq!(view.services, [Service::default()]);
}

#[test]
fn the_worst_service_comes_first_with_its_verdict_and_its_history() {
    let view = fixture::view();
    let names: Vec<&str> = view.services.iter().map(|it| it.target.as_str()).collect();
    assert_eq!(names, ["shop", "gateway", "calm"]);
    let shop = &view.services[0];
    assert_eq!((shop.level, shop.admit_ratio), (Level::Full, 0.62));
    assert_eq!(shop.readers.len(), 1);
    let accept = &shop.queues[0];
    assert_eq!(
        (accept.kind.as_str(), accept.depth, accept.limit),
        ("accept", 100, Some(100))
    );
    assert_eq!(accept.depths.last(), Some(&100));
    assert!(
        accept.depths.len() > 8 && accept.depths.is_sorted(),
        "{accept:?}"
    );
    assert_eq!(accept.waits_ms.last(), Some(&2_300));
    let episode = &shop.episodes[0];
    let path: Vec<&str> = episode.path.iter().map(|step| step.name.as_str()).collect();
    assert_eq!(path, ["uwsgi (4711)", "postgres (815)", "postgres (812)"]);
    assert_eq!(
        episode.path[1].target.as_deref(),
        Some("postgres"),
        "a neighbour"
    );
    let root = episode.root.as_ref().unwrap();
    assert_eq!(root.cause, None, "the culprit holds the lock");
    assert_eq!(root.culprit.as_deref(), Some("postgres (812)"));
    assert_eq!(view.ended.len(), 1);
    let calm = &view.services[2];
    assert_eq!(calm.queues.len(), 1, "one row, although it is idle");
    assert!(calm.queues[0].depths.is_empty());
}

#[test]
fn a_cause_and_a_level_reach_the_open_episode_and_its_end_moves_it() {
    let mut live = Live::default();
    live.take(&targets());
    let mut opened = crate::emit::fixture::shop();
    opened.verdict = None;
    opened.level_max = Level::Warn;
    live.take(&Event::EpisodeOpened(Box::new(opened.clone())));
    let target = Arc::clone(&live.targets[&SHOP]);
    let queues = vec![(Arc::clone(&opened.key), fixture::gauge(9, 100, Level::Warn))];
    let now = [fixture::pressure(&target, queues)];
    live.read(at(1).mono_ns, at(1).unix_ns, &now);
    let episode = |live: &Live| -> Episode {
        let view = View::of(at(1).unix_ns, &now, &[], live);
        view.services[0].episodes[0].clone()
    };
    let before = episode(&live);
    assert_eq!((before.level, before.verdict), (Level::Warn, None));
    assert_eq!(before.evidence, opened.evidence);
    let stretch = crate::emit::fixture::cause(&opened, 0, at(8), at(9));
    assert!(live.take(&Event::Cause(Box::new(stretch))));
    let text = episode(&live).verdict.unwrap();
    assert!(
        text.starts_with("it waits for another service, postgres (812)"),
        "{text}"
    );
    opened.ongoing = false;
    live.take(&Event::Episode(Box::new(opened)));
    let view = View::of(at(1).unix_ns, &now, &[], &live);
    assert!(view.services[0].episodes.is_empty());
    let ended = &view.ended[0];
    assert_eq!(
        (ended.level, ended.end_unix_ns),
        (Level::Ok, Some(at(20).unix_ns))
    );
    assert!(ended.verdict.is_some(), "kept from before");
    live.read(at(700).mono_ns, at(700).unix_ns, &now);
    assert!(
        View::of(0, &now, &[], &live).ended.is_empty(),
        "more than ten minutes ago"
    );
}

/// 400 services with 60 busy queues each: what is sent stays bounded.
#[test]
fn a_crowd_of_services_and_queues_is_cut_and_counted() {
    let mut live = Live::default();
    let crowd: Vec<_> = (0..400)
        .map(|id| {
            let target = Arc::new(Target {
                id,
                name: "x".repeat(200),
                ..Target::default()
            });
            let queues = (0..60).map(|number| {
                let key = QueueKey::new(id, Kind::Pipe, format!("pipe:[{number}]").as_str().into());
                (
                    Arc::new(key),
                    fixture::gauge(number + 1, 1_000, Level::Warn),
                )
            });
            fixture::pressure(&target, queues.collect())
        })
        .collect();
    for seconds in 0..700 {
        // The same state each time: once is enough for the rest of the crowd.
        let some = if seconds == 0 {
            &crowd[..]
        } else {
            &crowd[..1]
        };
        live.read(at(seconds).mono_ns, at(seconds).unix_ns, some);
    }
    let view = View::of(0, &crowd, &[], &live);
    assert_eq!(view.services.len() + view.services_omitted, 400);
    for service in &view.services {
        assert_eq!(service.queues.len() + service.queues_omitted, 60);
    }
    let text = serde_json::to_string(&view).unwrap();
    assert!(text.len() < 1_000_000, "{} bytes", text.len());
}
