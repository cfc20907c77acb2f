use super::{super::fixture, *};

#[test]
fn every_family_is_documented_with_its_type_labels_and_help() {
    let text = render(&fixture::state());
    let sections = [
        "Per service",
        "Where services run",
        "Per queue",
        "Per admission controller",
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
    let text = render(&fixture::state());
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    for (name, kind) in types.filter_map(|line| line.split_once(' ')) {
        assert_eq!(name.ends_with("_total"), kind == "counter", "{name} {kind}");
        for unit in ["_ns", "_ms", "_percent", "_milliseconds", "_share"] {
            assert!(!name.ends_with(unit), "{name}: not a base unit");
        }
    }
}
