use std::net::SocketAddr;

use super::*;
use crate::target::place::place;

const SECOND: u64 = 1_000_000_000;

fn process(tgid: u32, parent: u32, comm: &str) -> ProcessInfo {
    ProcessInfo {
        tgid,
        pid: tgid,
        parent,
        start_ns: u64::from(tgid),
        exec_id: u64::from(tgid),
        kernel: false,
        comm: comm.to_owned(),
    }
}

fn listener(tgid: u32, port: u16) -> ListenerInfo {
    ListenerInfo {
        tgid,
        cookie: u64::from(port),
        netns: 1,
        address: SocketAddr::from(([0, 0, 0, 0], port)),
    }
}

/// A process, and the control group and executable that it has.
struct Row {
    process: ProcessInfo,
    origin: Origin,
}

fn row(tgid: u32, parent: u32, group: &str, exe: &str) -> Row {
    Row {
        process: process(tgid, parent, exe),
        origin: Origin {
            exe: format!("/usr/bin/{exe}").into(),
            place: place(&format!("0::{group}\n")),
            ..Origin::default()
        },
    }
}

/// The services, each by its name and the tgids of its processes. `pods`: by container id; other containers are sandboxes.
fn services_of(
    rows: &[Row],
    listeners: &[ListenerInfo],
    pods: &HashMap<String, ContainerName>,
    every_process: bool,
) -> (Vec<(String, Vec<u32>)>, LeftOut) {
    let candidates: Vec<Candidate<'_>> = rows
        .iter()
        .map(|row| {
            let container = match &row.origin.place {
                Place::Container { id, .. } => pods.get(id),
                _ => None,
            };
            Candidate {
                process: &row.process,
                origin: &row.origin,
                container,
                is_sandbox: container.is_none() && !pods.is_empty(),
            }
        })
        .collect();
    let (services, left_out) = services(&candidates, listeners, every_process);
    let mut named: Vec<(String, Vec<u32>)> = services
        .into_iter()
        .map(|service| {
            let tgids: Vec<u32> = service
                .members
                .iter()
                .map(|at| rows[*at].process.tgid)
                .collect();
            let own = rows[service.members[0]].process.comm.clone();
            (service.name.unwrap_or(own), tgids)
        })
        .collect();
    named.sort();
    (named, left_out)
}

fn named(list: &[(&str, &[u32])]) -> Vec<(String, Vec<u32>)> {
    let list = list.iter();
    list.map(|(name, tgids)| ((*name).to_owned(), tgids.to_vec()))
        .collect()
}

fn id(digit: char) -> String {
    digit.to_string().repeat(64)
}

fn pod(namespace: &str, name: &str, container: &str) -> ContainerName {
    ContainerName::Pod(Pod {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        container: container.to_owned(),
    })
}

#[test]
fn all_processes_of_a_unit_are_one_service() {
    let rows = [
        row(1, 0, "/init.scope", "systemd"),
        row(10, 1, "/system.slice/shop.service", "bash"),
        row(11, 10, "/system.slice/shop.service", "uwsgi"),
        row(12, 11, "/system.slice/shop.service/workers", "uwsgi"),
        row(13, 10, "/system.slice/shop.service", "sleep"),
    ];
    // The socket is systemd's, too.
    let listeners = [listener(1, 80), listener(11, 80), listener(12, 80)];
    let (services, _) = services_of(&rows, &listeners, &HashMap::new(), false);
    let expected = named(&[("shop", &[10, 11, 12, 13]), ("systemd", &[1])]);
    assert_eq!(services, expected);
}

#[test]
fn a_container_with_several_listening_programs_is_one_service_for_each() {
    let group = format!(
        "/kubepods.slice/kubepods-pod1.slice/cri-containerd-{}.scope",
        id('a')
    );
    let rows = [
        row(10, 1, &group, "supervisord"),
        row(11, 10, &group, "nginx"),
        row(12, 11, &group, "nginx"),
        row(13, 10, &group, "php-fpm"),
        row(14, 10, &group, "cron"),
    ];
    let pods = HashMap::from([(id('a'), pod("default", "shop-1", "web"))]);
    let one = [listener(11, 80), listener(12, 80)];
    let (services, _) = services_of(&rows, &one, &pods, false);
    assert_eq!(
        services,
        named(&[("default/shop-1/web", &[10, 11, 12, 13, 14])])
    );
    let two = [listener(11, 80), listener(12, 80), listener(13, 9000)];
    let (services, _) = services_of(&rows, &two, &pods, false);
    let expected = named(&[
        ("default/shop-1/web", &[10, 14]),
        ("default/shop-1/web:nginx", &[11, 12]),
        ("default/shop-1/web:php-fpm", &[13]),
    ]);
    assert_eq!(services, expected);
}

#[test]
fn containers_of_one_port_are_services_of_their_own() {
    let group = |digit| format!("/docker/{}", id(digit));
    let rows = [
        row(10, 1, &group('a'), "web"),
        row(11, 1, &group('b'), "web"),
    ];
    let names = HashMap::from([(id('a'), ContainerName::Plain("shop-1".to_owned()))]);
    let listeners = [listener(10, 80), listener(11, 80)];
    let (services, _) = services_of(&rows, &listeners, &names, true);
    assert_eq!(
        services,
        named(&[("bbbbbbbbbbbb", &[11]), ("shop-1", &[10])])
    );
}

#[test]
fn the_machinery_of_kubernetes_is_left_out() {
    let pod_group = "/kubepods.slice/kubepods-pod1.slice";
    let group = |digit| format!("{pod_group}/cri-containerd-{}.scope", id(digit));
    let rows = [
        row(1, 0, "/init.scope", "systemd"),
        row(2, 1, "/system.slice/containerd.service", "containerd"),
        row(3, 1, "/system.slice/kubelet.service", "kubelet"),
        row(
            4,
            1,
            "/system.slice/systemd-journald.service",
            "systemd-journald",
        ),
        // Not by its name: a shim in a group that nobody knows.
        row(5, 1, "/unknown", "shim"),
        row(6, 5, &group('b'), "anything"),
        row(7, 5, &group('a'), "web"),
        row(8, 5, &group('c'), "kube-proxy"),
        // These names anybody can take.
        row(
            20,
            1,
            "/user.slice/user-1000.slice/session-1.scope",
            "kubelet",
        ),
        row(
            21,
            1,
            "/user.slice/user-1000.slice/session-1.scope",
            "pause",
        ),
    ];
    let pods = HashMap::from([
        (id('a'), pod("default", "shop-1", "web")),
        (id('c'), pod("kube-system", "kube-proxy-x", "kube-proxy")),
    ]);
    let listeners = [listener(3, 10_250), listener(7, 80), listener(8, 10_256)];
    let (services, left_out) = services_of(&rows, &listeners, &pods, false);
    let expected = named(&[
        ("default/shop-1/web", &[7]),
        ("kubelet", &[20]),
        ("pause", &[21]),
        ("systemd", &[1]),
    ]);
    assert_eq!(services, expected);
    assert_eq!(left_out.system, 6);
    let (all, left_out) = services_of(&rows, &listeners, &pods, true);
    assert_eq!((all.len(), left_out), (10, LeftOut::default()));
}

#[test]
fn a_container_that_listens_is_no_sandbox() {
    let group = format!(
        "/kubepods/pod0dc1c3ad-1234-4f6e-8c5e-2f9a3b1c0d4e/{}",
        id('b')
    );
    let rows = [row(6, 1, &group, "web")];
    let pods = HashMap::from([(id('a'), pod("default", "shop-1", "web"))]);
    let (services, _) = services_of(&rows, &[listener(6, 80)], &pods, false);
    assert_eq!(services, named(&[("bbbbbbbbbbbb", &[6])]));
    assert!(services_of(&rows, &[], &pods, false).0.is_empty());
}

#[test]
fn a_zombie_is_no_service() {
    let mut zombie = row(10, 1, "/", "web");
    zombie.origin.is_zombie = true;
    let rows = [zombie];
    assert!(services_of(&rows, &[], &HashMap::new(), true).0.is_empty());
}

#[test]
fn processes_in_no_unit_are_services_by_their_programs() {
    let rows = [
        row(10, 1, "/", "web"),
        row(11, 10, "/", "web"),
        row(12, 10, "/", "db"),
    ];
    let (services, _) = services_of(&rows, &[listener(12, 5432)], &HashMap::new(), false);
    assert_eq!(services, named(&[("db", &[12]), ("web", &[10, 11])]));
}

#[test]
fn beyond_the_limit_the_processes_of_people_are_left_out_first() {
    let mut rows: Vec<Row> = (0..MAX_SERVICES as u32 + 7)
        .map(|at| row(10 + at, 1, "/", "storm"))
        .collect();
    for row in &mut rows {
        row.origin.uid = FIRST_PERSON;
        row.origin.exe = format!("/tmp/{}", row.process.tgid).into();
    }
    rows.push(row(9_000, 1, "/system.slice/shop.service", "shop"));
    let (services, left_out) = services_of(&rows, &[], &HashMap::new(), false);
    assert_eq!((services.len(), left_out.services), (MAX_SERVICES, 8));
    assert!(services.contains(&named(&[("shop", &[9_000])])[0]));
}

#[test]
fn a_young_process_is_settled_if_it_listens_or_is_a_worker() {
    let now_ns = 100 * SECOND;
    let young = |tgid, parent, exec_id, comm: &str| ProcessInfo {
        start_ns: now_ns - SECOND + u64::from(tgid),
        exec_id,
        ..process(tgid, parent, comm)
    };
    let processes = [
        ProcessInfo {
            exec_id: 3,
            ..process(1, 0, "init")
        },
        ProcessInfo {
            exec_id: 7,
            ..process(10, 1, "postgres")
        },
        young(11, 10, 7, "postgres"),
        young(12, 11, 7, "postgres"),
        young(13, 10, 8, "sh"),
        young(14, 10, 8, "postgres"),
        young(15, 1, 3, "init"),
        young(16, 1, 9, "web"),
        young(17, 16, 9, "web"),
    ];
    let settled = settled(&processes, &HashSet::from([16]), now_ns);
    let tgids = processes.iter().zip(settled).filter(|(_, it)| *it);
    let tgids: Vec<u32> = tgids.map(|(process, _)| process.tgid).collect();
    assert_eq!(tgids, [1, 10, 11, 12, 16, 17]);
    let later = super::settled(&processes, &HashSet::new(), now_ns + MIN_AGE_NS);
    assert!(later.into_iter().all(|it| it));
}

#[test]
fn a_container_with_many_listening_programs_takes_no_room_of_others() {
    let group = format!("/docker/{}", id('a'));
    let many = MAX_SERVICES as u32 + 100;
    let rows: Vec<Row> = (0..many)
        .map(|at| row(10 + at, 1, &group, &format!("web-{at:04}")))
        .collect();
    let listeners: Vec<ListenerInfo> = rows
        .iter()
        .map(|row| listener(row.process.tgid, row.process.tgid as u16))
        .collect();
    let names = HashMap::from([(id('a'), ContainerName::Plain("shop".to_owned()))]);
    let (services, left_out) = services_of(&rows, &listeners, &names, false);
    // The oldest programs, and one service of all others.
    assert_eq!(services.len(), MAX_PROGRAMS + 1);
    assert_eq!(left_out, LeftOut::default());
    let rest = many as usize - MAX_PROGRAMS;
    assert_eq!((&*services[0].0, services[0].1.len()), ("shop", rest));
    assert_eq!(services[1], named(&[("shop:web-0000", &[10])])[0]);
}
