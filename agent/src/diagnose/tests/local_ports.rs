//! Verdicts where no local ports are left for connections to an address.

use super::{
    scene::{Scene, filling, local, thread},
    verdicts::culprit,
};
use crate::{
    cause::Cause,
    event::{Confidence, CulpritKind},
    queue::{Kind, Reading},
    sample::LocalPorts,
};

fn used_up(remote: u16, netns: u32, time_wait: u32) -> LocalPorts {
    LocalPorts {
        netns,
        remote: local(remote),
        lowest: 40_000,
        highest: 40_999,
        used: 999,
        time_wait,
    }
}

/// A service that sleeps with a request in service, and that calls port 5432 now and then.
fn scene(ports: LocalPorts) -> Scene {
    let mut scene = Scene::of(&[&[10]]);
    scene.accepts(1, (10, 5), 80);
    scene.awaits(1);
    scene.calls(2, (10, 6), local(5432));
    scene.queue(1, Kind::Downstream, "-> 127.0.0.1:5432", Reading::default());
    let sleeps = [thread(10, 0).call(libc::SYS_clock_nanosleep, [0; 4])];
    scene.take_samples(1, &sleeps);
    // It has no connection left, and none that could be opened.
    scene.sample().connections.pop();
    scene.sample().local_ports = Some(vec![ports]);
    scene.take_samples(60, &sleeps);
    scene
}

#[test]
fn a_service_that_tries_again_for_lack_of_ports_is_not_short_of_workers() {
    let verdict = scene(used_up(5432, 1, 990)).verdict(&filling());
    assert_eq!(verdict.cause, Cause::PortsExhausted);
    assert_eq!(verdict.confidence, Confidence::High);
    let (kind, _, name) = culprit(&verdict);
    assert_eq!(kind, CulpritKind::Limit);
    assert!(name.contains("40000 to 40999"), "{name}");
    assert!(
        verdict.advice.contains("tcp_tw_reuse"),
        "{}",
        verdict.advice
    );
}

#[test]
fn ports_of_open_connections_are_not_freed_by_reuse() {
    let verdict = scene(used_up(5432, 1, 0)).verdict(&filling());
    assert_eq!(verdict.cause, Cause::PortsExhausted);
    assert!(
        !verdict.advice.contains("tcp_tw_reuse"),
        "{}",
        verdict.advice
    );
}

#[test]
fn ports_used_up_towards_another_address_or_elsewhere_do_not_matter() {
    for ports in [used_up(6379, 1, 990), used_up(5432, 2, 990)] {
        let verdict = scene(ports).verdict(&filling());
        assert_eq!(verdict.cause, Cause::UndersizedLimit);
    }
}
