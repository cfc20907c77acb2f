use super::super::{Kind, Model, Reading, watched};
use crate::sample::{
    Cgroup, CpuUser, Hidden, HiddenFact, Machine, Sample, Scans, Stall, Target, Thread,
};

const TICK: u64 = 100_000_000;
const SECOND: u64 = 10 * TICK;

/// What a service of two threads on two CPUs experiences in each second.
#[derive(Clone, Copy, Default)]
struct Course {
    delay_ns: u64,
    cpu_ns: u64,
    foreign_ns: u64,
    throttled_ns: u64,
    steal_ns: u64,
    quota: Option<u64>,
    without_counters: bool,
    is_quota_hidden: bool,
}

/// The reading after three seconds. Control groups and CPU users are scanned once a second.
fn after(course: Course) -> Reading {
    at(30, course)
}

/// The reading after so many samples, one every 100 ms.
fn at(samples: u64, course: Course) -> Reading {
    let mut model = Model::default();
    let mut last = Reading::default();
    for tick in 0..=samples {
        let scans = tick % 10 == 0 && !course.without_counters;
        let part = |per_second: u64| per_second * tick / 10;
        let sample = Sample {
            mono_ns: SECOND + tick * TICK,
            targets: (tick == 0).then(|| vec![target()]),
            scans: Scans {
                threads: true,
                system: scans,
                cpu_users: scans,
                ..Scans::default()
            },
            threads: (0..2)
                .map(|tid| Thread {
                    tgid: 10,
                    tid: 10 + tid,
                    runnable: true,
                    on_cpu: tid == 0,
                    run_delay_ns: part(course.delay_ns) / 2,
                    dispatches: tick * 10,
                    cpu_ns: part(course.cpu_ns) / 2,
                })
                .collect(),
            cgroups: vec![Cgroup {
                path: "/svc".to_owned(),
                quota_millicpus: course.quota,
                throttled_ns: Some(part(course.throttled_ns)),
                cpu_stall: Some(Stall {
                    some_ns: part(SECOND / 4),
                    full_ns: 0,
                }),
                ..Cgroup::default()
            }],
            machine: Some(Machine {
                cpus: 2,
                busy_ns: part(course.cpu_ns + course.foreign_ns),
                steal_ns: part(course.steal_ns),
                ..Machine::default()
            }),
            cpu_users: vec![
                cpu_user(10, "svc", course.cpu_ns),
                cpu_user(4711, "stress-ng", course.foreign_ns),
            ],
            hidden: Vec::from_iter(course.is_quota_hidden.then(|| Hidden {
                cgroup: "/svc".to_owned(),
                fact: HiddenFact::CpuQuota,
            })),
            ..Sample::default()
        };
        let readings = model.read(&sample);
        let found = readings.queues.into_iter();
        last = found
            .filter(|(key, _)| key.kind == Kind::Runqueue)
            .map(|(_, reading)| reading)
            .next()
            .unwrap();
    }
    last
}

fn target() -> Target {
    Target {
        id: 1,
        tgids: vec![10],
        cgroup: Some("/svc".to_owned()),
        cpus: 2,
        ..Target::default()
    }
}

fn cpu_user(tgid: u32, name: &str, cpu_ns: u64) -> CpuUser {
    CpuUser {
        tgid,
        name: name.to_owned(),
        cgroup: None,
        cpu_ns,
    }
}

fn extra(reading: &Reading, key: &str) -> Option<f64> {
    watched::extra(reading, key).map(|value| (value * 100.0).round() / 100.0)
}

#[test]
fn a_process_that_takes_the_cpu_is_named() {
    let reading = after(Course {
        delay_ns: SECOND,
        cpu_ns: SECOND / 2,
        foreign_ns: SECOND * 3 / 2,
        ..Course::default()
    });
    assert_eq!(extra(&reading, "foreign_share"), Some(0.75));
    assert_eq!(extra(&reading, "own_share"), Some(0.25));
    assert_eq!(extra(&reading, "quota_share"), Some(0.0));
    assert_eq!(extra(&reading, "steal_share"), Some(0.0));
    assert_eq!(extra(&reading, "cpu_stall_share"), Some(0.25));
    assert_eq!(
        reading.worst.as_deref(),
        Some("stress-ng (4711) used 1.50 CPUs")
    );
}

#[test]
fn a_service_with_more_threads_than_cpus_waits_for_itself() {
    let reading = after(Course {
        delay_ns: SECOND * 2,
        cpu_ns: SECOND * 2,
        foreign_ns: SECOND / 50,
        ..Course::default()
    });
    assert!(extra(&reading, "own_share") >= Some(0.95), "{reading:?}");
}

#[test]
fn the_share_of_a_quota_is_separated() {
    let reading = after(Course {
        delay_ns: SECOND,
        cpu_ns: SECOND / 2,
        throttled_ns: SECOND * 9 / 10,
        quota: Some(500),
        ..Course::default()
    });
    assert_eq!(extra(&reading, "quota_share"), Some(0.9));
    assert_eq!(extra(&reading, "own_share"), Some(0.1));
    assert_eq!(extra(&reading, "quota_cpus"), Some(0.5));
    assert_eq!(
        extra(&reading, "throttled_ns"),
        Some((SECOND * 9 / 10) as f64)
    );
}

#[test]
fn the_utilization_counts_the_quota_from_the_first_measurement() {
    let course = Course {
        cpu_ns: SECOND / 2,
        quota: Some(500),
        ..Course::default()
    };
    for (samples, utilization) in [(0, None), (1, Some(1.0)), (30, Some(1.0))] {
        assert_eq!(extra(&at(samples, course), "utilization"), utilization);
    }
    let unknown = Course {
        without_counters: true,
        ..course
    };
    assert_eq!(extra(&at(1, unknown), "utilization"), None);
    let unlimited = Course {
        quota: None,
        ..course
    };
    assert_eq!(extra(&at(1, unlimited), "utilization"), Some(0.25));
    let hidden = Course {
        delay_ns: SECOND,
        is_quota_hidden: true,
        ..unlimited
    };
    for measure in ["utilization", "quota_share", "throttled_ns"] {
        assert_eq!(extra(&at(30, hidden), measure), None, "{measure}");
    }
}

#[test]
fn the_share_of_a_hypervisor_is_separated() {
    let reading = after(Course {
        delay_ns: SECOND,
        cpu_ns: SECOND,
        steal_ns: SECOND,
        ..Course::default()
    });
    assert_eq!(extra(&reading, "steal_share"), Some(0.5));
    assert_eq!(extra(&reading, "own_share"), Some(0.5));
}

#[test]
fn without_counters_or_without_a_wait_nothing_is_claimed() {
    let shares = ["own_share", "foreign_share", "quota_share", "steal_share"];
    let unknown = after(Course {
        delay_ns: SECOND,
        without_counters: true,
        ..Course::default()
    });
    let idle = after(Course {
        cpu_ns: SECOND,
        ..Course::default()
    });
    for reading in [unknown, idle] {
        for share in shares {
            assert_eq!(extra(&reading, share), None, "{share}");
        }
        assert_eq!(reading.worst, None);
    }
}
