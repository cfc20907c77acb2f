//! Verdicts where a connection tracking table has no room for new connections.

use super::{
    scene::{Scene, filling, local, thread},
    verdicts::culprit,
};
use crate::{cause::Cause, event::CulpritKind, sample::Conntrack};

const SYN_SENT: u8 = 2;
const DISTANT: [u8; 4] = [10, 0, 0, 7];
const LOOPBACK: [u8; 4] = [127, 0, 0, 1];

fn full(netns: u32, is_of_host: bool) -> Conntrack {
    Conntrack {
        netns,
        is_of_host,
        entries: 1_000,
        limit: 1_000,
        drops: 12,
    }
}

/// A service whose thread waits in connect(2) while a request is in service.
fn scene(tables: &[Conntrack], remote: [u8; 4]) -> Scene {
    let mut scene = Scene::of(&[&[10]]);
    scene.accepts(1, (10, 5), 80);
    scene.awaits(1);
    scene.calls(2, (10, 6), (remote, 5432).into()).state = SYN_SENT;
    let connects = [thread(10, 0).call(libc::SYS_connect, [6, 0, 0, 0])];
    scene.sample().conntrack = Some(tables.to_vec());
    scene.take_samples(60, &connects);
    scene
}

#[test]
fn a_connection_request_that_finds_no_room_is_the_fault_of_the_table() {
    for table in [full(1, false), full(7, true)] {
        let verdict = scene(&[table], DISTANT).verdict(&filling());
        assert_eq!(verdict.cause, Cause::NetworkLimited, "{table:?}");
        let (kind, _, name) = culprit(&verdict);
        assert_eq!(kind, CulpritKind::Limit);
        assert!(name.contains("connection tracking"), "{name}");
        assert!(verdict.advice.contains("nf_conntrack_max"));
    }
}

#[test]
fn a_table_elsewhere_does_not_matter() {
    let cases = [
        (vec![full(7, false)], DISTANT),
        (Vec::new(), DISTANT),
        // Such a connection does not leave the namespace.
        (vec![full(7, true)], LOOPBACK),
    ];
    for (tables, remote) in cases {
        let verdict = scene(&tables, remote).verdict(&filling());
        assert_eq!(verdict.cause, Cause::DownstreamSlow, "{tables:?}");
    }
}

#[test]
fn a_full_table_does_not_matter_to_a_service_whose_connections_are_open() {
    let mut scene = Scene::of(&[&[10]]);
    scene.accepts(1, (10, 5), 80);
    scene.awaits(1);
    scene.calls(2, (10, 6), local(5432));
    scene.awaits(2);
    scene.sample().conntrack = Some(vec![full(1, false)]);
    let reads = [thread(10, 0).call(libc::SYS_recvfrom, [6, 0, 0, 0])];
    scene.take_samples(60, &reads);
    let verdict = scene.verdict(&filling());
    assert_eq!(verdict.cause, Cause::DownstreamSlow);
}

#[test]
fn a_table_that_has_room_again_matters_to_requests_that_were_dropped_before() {
    let connects = [thread(10, 0).call(libc::SYS_connect, [6, 0, 0, 0])];
    let mut dropped_before = scene(&[full(1, false)], DISTANT);
    dropped_before.sample().conntrack = Some(Vec::new());
    dropped_before.take_samples(20, &connects);
    let verdict = dropped_before.verdict(&filling());
    assert_eq!(verdict.cause, Cause::NetworkLimited);

    let mut sent_after = Scene::of(&[&[10]]);
    sent_after.accepts(1, (10, 5), 80);
    sent_after.awaits(1);
    sent_after.sample().conntrack = Some(vec![full(1, false)]);
    sent_after.take_samples(5, &[thread(10, 0)]);
    sent_after.sample().conntrack = Some(Vec::new());
    sent_after.take_samples(5, &[thread(10, 0)]);
    sent_after.calls(2, (10, 6), (DISTANT, 5432).into()).state = SYN_SENT;
    sent_after.take_samples(60, &connects);
    let verdict = sent_after.verdict(&filling());
    assert_eq!(verdict.cause, Cause::DownstreamSlow);
}
