//! What is reported of a cause while its episode lasts.

use std::sync::Arc;

use super::{
    super::open_episode::OpenEpisode,
    scene::{Scene, filling},
};
use crate::{
    cause::Cause,
    event::{Culprit, CulpritKind, Episode, Event, Instant, Verdict},
};

/// The culprits that are reported after the first verdict, of verdicts that are made at these times.
fn reported(verdicts: &[(u64, &str)]) -> Vec<String> {
    let at = |ms: u64| Instant {
        mono_ns: ms * 1_000_000,
        unix_ns: 0,
    };
    let any = Scene::of(&[&[10]]).verdict(&filling());
    let of = |name: &str| {
        let mut culprit = Culprit::named(CulpritKind::Process, name.to_owned());
        culprit.pid = name.bytes().next().map(u32::from);
        Arc::new(Verdict {
            culprit: Some(culprit),
            ..any.clone()
        })
    };
    let mut open = OpenEpisode::new(at(0), filling(), of("a"));
    let mut names = Vec::new();
    for (ms, name) in verdicts {
        for event in open.update(at(*ms), &of(name)) {
            if let Event::Cause(stretch) = event
                && stretch.from == stretch.to
            {
                names.extend(stretch.verdict.culprit.clone().map(|culprit| culprit.name));
            }
        }
    }
    names
}

#[test]
fn another_culprit_is_reported_at_most_once_a_second() {
    assert_eq!(
        reported(&[(300, "b"), (900, "b"), (1_100, "b"), (1_900, "b")]),
        ["b"]
    );
    assert!(reported(&[(300, "b"), (900, "a"), (1_500, "a")]).is_empty());
    assert_eq!(
        reported(&[(1_100, "b"), (1_200, "a"), (2_200, "a")]),
        ["b", "a"]
    );
}

#[test]
fn a_queue_that_drains_is_judged_only_if_it_fills_in_bursts_and_has_no_verdict_yet() {
    let any = Scene::of(&[&[10]]).verdict(&filling());
    let of = |cause: Cause| {
        Arc::new(Verdict {
            cause,
            ..any.clone()
        })
    };
    let at = |ms: u64| Instant {
        mono_ns: ms * 1_000_000,
        unix_ns: 0,
    };
    for (empty_share, wait_max_ns, first, expected) in [
        (0.9, 0, Cause::Unknown, Cause::UndersizedLimit),
        (0.1, 0, Cause::Unknown, Cause::Unknown),
        (0.9, 4_900_000_000, Cause::Unknown, Cause::Unknown),
        (0.9, 0, Cause::CpuBound, Cause::CpuBound),
    ] {
        let episode = Episode {
            depth: 0,
            depth_max: 8,
            empty_share,
            wait_max_ns: Some(wait_max_ns),
            ..filling()
        };
        let mut open = OpenEpisode::new(at(0), episode, of(first));
        open.update(at(1_000), &of(Cause::UndersizedLimit));
        assert_eq!(
            open.verdict.cause, expected,
            "empty: {empty_share}, {first:?}"
        );
    }
}
