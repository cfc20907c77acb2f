use std::sync::Arc;

use super::{super::fixture, *};

#[test]
fn every_family_is_documented_with_its_type_labels_and_help() {
    let text = render(&fixture::state()).text();
    let sections = [
        "Per service",
        "Where services run",
        "Per queue",
        "Per admission controller",
        "Waits for a CPU",
        "Blocked time",
        "Hooks",
        "The agent",
    ];
    let samples = reference::assert_documented(&sections, &text);
    for (name, labels, value) in samples {
        // Every time in the state is 2.5 s.
        if name.ends_with("_seconds") || name.ends_with("_seconds_total") {
            assert_eq!(value, 2.5, "{name}{{{labels}}}");
        }
        if name.ends_with("_ratio") {
            assert!((0.0..=2.0).contains(&value), "{name}{{{labels}}} {value}");
        }
    }
}

#[test]
fn names_follow_the_conventions_of_prometheus() {
    let text = render(&fixture::state()).text();
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    for (name, kind) in types.filter_map(|line| line.split_once(' ')) {
        assert_eq!(name.ends_with("_total"), kind == "counter", "{name} {kind}");
        for unit in ["_ns", "_ms", "_percent", "_milliseconds", "_share"] {
            assert!(!name.ends_with(unit), "{name}: not a base unit");
        }
    }
}

/// A node with many services: none is left out for the idle queues of another one, and queues that are not ok come first.
#[test]
fn beyond_the_bound_idle_queues_are_omitted_first() {
    const SERVICES: usize = 300;
    const QUEUES: usize = 10;
    let ports = |service: usize| {
        let queue = move |number: usize| {
            let port = (service * QUEUES + number) as u16;
            let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
            let key = QueueKey::new(
                service as u32,
                crate::queue::Kind::Accept,
                crate::queue::QueueId::Local(address),
            );
            (Arc::new(key), Gauge::default())
        };
        (0..QUEUES).map(queue).collect::<Vec<_>>()
    };
    let mut pressures = vec![fixture::pressure(); SERVICES];
    for (service, pressure) in pressures.iter_mut().enumerate() {
        pressure.queues = ports(service);
    }
    // All queues of the last service.
    for (_, gauge) in &mut pressures[SERVICES - 1].queues {
        gauge.level = Level::Warn;
    }
    let names = (0..SERVICES).map(|service| format!("shop-{service:03}"));
    let snapshot = Snapshot {
        pressures: Arc::new(pressures.clone()),
        names: Arc::new(names.collect()),
        ..Snapshot::default()
    };
    let (queues, omitted) = exported(&snapshot);
    assert_eq!(queues.len(), MAX_QUEUES);
    assert_eq!(omitted.all, SERVICES * QUEUES - MAX_QUEUES);
    assert_eq!(omitted.saturated, 0);
    let of = |name: &str| queues.keys().filter(|(of, _)| *of == name).count();
    assert_eq!(of("shop-299"), QUEUES, "not ok");
    for service in ["shop-000", "shop-150", "shop-298"] {
        assert!(of(service) >= MAX_QUEUES / SERVICES, "{service}");
    }

    for pressure in &mut pressures {
        for (_, gauge) in &mut pressure.queues {
            gauge.level = Level::Critical;
        }
    }
    let snapshot = Snapshot {
        pressures: Arc::new(pressures),
        ..snapshot
    };
    assert_eq!(
        exported(&snapshot).1.saturated,
        SERVICES * QUEUES - MAX_QUEUES
    );
}
