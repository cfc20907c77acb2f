use wildmatch::WildMatch;

use super::*;

const NOW_NS: u64 = 1_000_000_000_000;
const NO_NEIGHBOURS: BTreeSet<u32> = BTreeSet::new();

fn process(tgid: u32, parent: u32, comm: &str) -> ProcessInfo {
    ProcessInfo {
        // Pids above the kernel's maximum, so that /proc has no such processes.
        tgid: tgid + 5_000_000,
        pid: tgid + 5_000_000,
        parent: parent + 5_000_000,
        start_ns: u64::from(tgid),
        exec_id: 1,
        kernel: false,
        comm: comm.to_owned(),
    }
}

fn listener(tgid: u32, cookie: u64, port: u16) -> ListenerInfo {
    ListenerInfo {
        tgid: tgid + 5_000_000,
        cookie,
        netns: 1,
        address: SocketAddr::from(([127, 0, 0, 1], port)),
    }
}

fn discovery(selector: Selector) -> Discovery {
    Discovery::new(vec![selector.into()], 1)
}

#[test]
fn processes_that_share_a_listener_are_one_target() {
    let processes = [
        process(1, 0, "web"),
        process(2, 0, "web"),
        process(3, 0, "other"),
    ];
    let listeners = [
        listener(1, 77, 80),
        listener(2, 77, 80),
        listener(3, 99, 81),
    ];
    let found = discovery(Selector::Port(80)).scan(NOW_NS, &processes, &listeners, &NO_NEIGHBOURS);
    assert_eq!(found.targets.len(), 1);
    assert_eq!(found.targets[0].tgids, [5_000_001, 5_000_002]);
    assert!(found.changed);
}

#[test]
fn reuseport_sockets_of_one_port_are_one_target() {
    let processes = [process(1, 0, "web"), process(2, 0, "web")];
    let listeners = [listener(1, 77, 80), listener(2, 78, 80)];
    let found = discovery(Selector::Name(WildMatch::new("web"))).scan(
        NOW_NS,
        &processes,
        &listeners,
        &NO_NEIGHBOURS,
    );
    assert_eq!(found.targets.len(), 1);
}

#[test]
fn unrelated_processes_with_the_same_name_are_separate_targets() {
    let processes = [process(1, 0, "web"), process(2, 0, "web")];
    let found = discovery(Selector::Name(WildMatch::new("w*"))).scan(
        NOW_NS,
        &processes,
        &[],
        &NO_NEIGHBOURS,
    );
    assert_eq!(found.targets.len(), 2);
    assert_ne!(found.targets[0].id, found.targets[1].id);
}

#[test]
fn a_target_keeps_its_id_while_its_workers_come_and_go() {
    let mut discovery = discovery(Selector::Port(80));
    let first = discovery.scan(
        NOW_NS,
        &[process(1, 0, "web"), process(2, 0, "web")],
        &[listener(1, 77, 80), listener(2, 77, 80)],
        &NO_NEIGHBOURS,
    );
    let second = discovery.scan(
        NOW_NS,
        &[process(2, 0, "web"), process(3, 0, "web")],
        &[listener(2, 77, 80), listener(3, 77, 80)],
        &NO_NEIGHBOURS,
    );
    assert_eq!(first.targets[0].id, second.targets[0].id);
    assert!(second.changed);
    let third = discovery.scan(
        NOW_NS,
        &[process(2, 0, "web"), process(3, 0, "web")],
        &[listener(2, 77, 80), listener(3, 77, 80)],
        &NO_NEIGHBOURS,
    );
    assert!(!third.changed);
}

#[test]
fn selectors_without_a_match_are_returned() {
    let found = discovery(Selector::Pid(4_999_999)).scan(
        NOW_NS,
        &[process(1, 0, "web")],
        &[],
        &NO_NEIGHBOURS,
    );
    assert_eq!(found.unmatched, [Selector::Pid(4_999_999)]);
    assert!(found.targets.is_empty());
}

#[test]
fn a_neighbour_is_a_separate_target_only_while_it_is_a_neighbour() {
    let mut discovery = discovery(Selector::Port(80));
    let processes = [
        process(1, 0, "web"),
        process(2, 0, "db"),
        process(3, 0, "db"),
    ];
    let listeners = [
        listener(1, 77, 80),
        listener(2, 78, 81),
        listener(3, 78, 81),
    ];
    let neighbours = [2, 3].map(|tgid| tgid + 5_000_000).into();
    let found = discovery.scan(NOW_NS, &processes, &listeners, &neighbours);
    let targets: Vec<_> = found
        .targets
        .iter()
        .map(|target| (target.tgids.len(), target.is_neighbour))
        .collect();
    assert_eq!(targets, [(1, false), (2, true)]);
    assert_eq!(found.processes.len(), 3);
    let again = discovery.scan(NOW_NS, &processes, &listeners, &neighbours);
    assert_eq!((again.changed, &again.targets), (false, &found.targets));
    let without = discovery.scan(NOW_NS, &processes, &listeners, &NO_NEIGHBOURS);
    assert_eq!(without.targets, found.targets[..1]);
    assert!(without.unmatched.is_empty());
}

#[test]
fn a_selected_target_is_never_marked_as_followed() {
    let mut discovery = discovery(Selector::Port(80));
    let processes = [process(1, 0, "web")];
    let all = [5_000_001].into();
    let found = discovery.scan(NOW_NS, &processes, &[listener(1, 77, 80)], &all);
    assert_eq!(found.targets.len(), 1);
    assert!(!found.targets[0].is_neighbour);
}

#[test]
fn a_young_process_is_a_service_of_the_node_once_it_listens_or_is_old_enough() {
    let all = |every_process| discovery(Selector::All { every_process });
    let young = ProcessInfo {
        start_ns: NOW_NS - 1,
        ..process(2, 0, "job")
    };
    let processes = [process(1, 0, "web"), young];
    let mut node = all(false);
    let first = node.scan(NOW_NS, &processes, &[], &NO_NEIGHBOURS);
    assert_eq!(first.targets.len(), 1);
    assert_eq!((first.processes.len(), first.left_out.young), (1, 1));
    let listens = node.scan(NOW_NS, &processes, &[listener(2, 77, 80)], &NO_NEIGHBOURS);
    assert_eq!(listens.targets.len(), 2);
    assert_eq!(listens.targets[0], first.targets[0]);
    assert!(listens.targets[1].workload.listens);
    let every = all(true).scan(NOW_NS, &processes, &[], &NO_NEIGHBOURS);
    assert_eq!((every.targets.len(), every.left_out.young), (2, 0));
    // What the configuration selects is a service at any age, and under its own name.
    let spec = Spec {
        service_name: Some("batch".to_owned()),
        ..Selector::Name(WildMatch::new("job")).into()
    };
    let all = Selector::All {
        every_process: false,
    };
    let mut both = Discovery::new(vec![all.into(), spec], 1);
    let found = both.scan(NOW_NS, &processes, &[], &NO_NEIGHBOURS);
    let names: Vec<&str> = found.targets.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(names.len(), 2);
    assert!(names.contains(&"batch") && names.contains(&"web"));
    let batch = found.targets.iter().find(|it| it.name == "batch").unwrap();
    assert_eq!(batch.workload.named_by, NamedBy::Configuration);
}

#[test]
fn neither_the_agent_nor_its_adapter_process_is_a_service() {
    let own = ProcessInfo {
        pid: 1,
        ..process(1, 0, "tailback")
    };
    let processes = [own, process(2, 1, "tailback"), process(3, 0, "web")];
    let all = Selector::All {
        every_process: true,
    };
    let found = discovery(all).scan(NOW_NS, &processes, &[], &NO_NEIGHBOURS);
    let names: Vec<&str> = found.targets.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(names, ["web"]);
}

#[test]
fn a_target_can_be_limited_to_one_user() {
    let spec = Spec {
        // Processes that cannot be read are nobody's.
        user: Some(65_534),
        ..Selector::Name(WildMatch::new("web")).into()
    };
    let processes = [process(1, 0, "web")];
    let of_nobody =
        Discovery::new(vec![spec.clone()], 1).scan(NOW_NS, &processes, &[], &NO_NEIGHBOURS);
    assert_eq!(of_nobody.targets.len(), 1);
    let of_root = Spec {
        user: Some(0),
        ..spec
    };
    let of_root = Discovery::new(vec![of_root], 1).scan(NOW_NS, &processes, &[], &NO_NEIGHBOURS);
    assert!(of_root.targets.is_empty() && of_root.unmatched.len() == 1);
}
