use std::{fs, path::PathBuf};

use tailback_ebpf::{CONTROLLER_CPU, CONTROLLER_IO, CONTROLLER_MEMORY, CONTROLLER_NONE};

use super::{
    kernel_groups::tests::{groups, record},
    mounts::{CgroupDirs, Mounts, points},
    *,
};

const V2: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
broken
";

fn dirs(found: Option<CgroupDirs>) -> Vec<String> {
    let dirs = found.map(|found| found.dirs).unwrap_or_default();
    dirs.iter().map(|dir| dir.display().to_string()).collect()
}

#[test]
fn each_controller_is_found_in_its_hierarchy() {
    let v2 = Mounts::parse(V2);
    assert_eq!(
        dirs(v2.cgroup_dirs("memory", "0::/system.slice/svc.service\n")),
        [
            "/sys/fs/cgroup/system.slice/svc.service",
            "/sys/fs/cgroup/system.slice",
            "/sys/fs/cgroup"
        ]
    );
    let hybrid = Mounts::parse(HYBRID);
    let membership = "4:memory:/pod/a\n2:cpu,cpuacct:/quota\n0::/unified-a\n";
    assert_eq!(
        dirs(hybrid.cgroup_dirs("cpu", membership)),
        [
            "/sys/fs/cgroup/cpu,cpuacct/quota",
            "/sys/fs/cgroup/cpu,cpuacct"
        ]
    );
    assert_eq!(
        dirs(hybrid.cgroup_dirs("memory", membership)),
        [
            "/sys/fs/cgroup/memory/pod/a",
            "/sys/fs/cgroup/memory/pod",
            "/sys/fs/cgroup/memory"
        ]
    );
    assert_eq!(
        dirs(hybrid.unified_dirs(membership)),
        ["/sys/fs/cgroup/unified/unified-a", "/sys/fs/cgroup/unified"]
    );
}

#[test]
fn a_cgroup_outside_the_mounted_hierarchy_has_no_directories() {
    let mounts = Mounts::parse(V2);
    // In a container, paths do not show which group the mount point belongs to.
    assert_eq!(mounts.unified_dirs("0::/../other\n"), None);
    assert_eq!(mounts.unified_dirs("0::/a/../../etc\n"), None);
    assert_eq!(mounts.unified_dirs("12:pids:/x\n"), None);
    let below = Mounts::parse("1 2 0:1 /docker/x /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n");
    assert_eq!(
        dirs(below.unified_dirs("0::/docker/x\n")),
        ["/sys/fs/cgroup"]
    );
    assert_eq!(below.unified_dirs("0::/elsewhere\n"), None);
    let blank = Mounts::parse("1 2 0:1 / /sys/my\\040groups\\ rw - cgroup2 cgroup2 rw\n");
    assert_eq!(dirs(blank.unified_dirs("0::/\n")), ["/sys/my groups\\"]);
}

#[test]
fn kernel_file_formats_are_parsed() {
    let quota = cpu_max("50000 100000\n").map(Quota::millicpus);
    assert_eq!(quota, Some(500));
    assert_eq!(cpu_max("max 100000\n"), None);
    assert_eq!(cpu_max("50000 0\n").map(Quota::millicpus), Some(u64::MAX));
    assert_eq!(cpu_max(""), None);
    let pressure = "some avg10=0.00 avg60=1.00 avg300=0.00 total=7\nfull avg10=0.00 total=3\n";
    let expected = Stall {
        some_ns: 7_000,
        full_ns: 3_000,
    };
    assert_eq!(stall(pressure), Some(expected));
    assert_eq!(stall("some avg10=0.00 total=\n"), None);
    let stat = "usage_usec 17\nnr_throttled 4\nthrottled_usec 9\n";
    assert_eq!(keyed(stat, "nr_throttled"), Some(4));
    assert_eq!(keyed(stat, "usage"), None);
    assert_eq!(keyed("oom_kill x\n", "oom_kill"), None);
    let cpu = "cpu  10 1 5 100 7 2 3 50 9 0\ncpu0 10 1 5 100 7 2 3 50 9 0\nintr 1\n";
    assert_eq!(
        cpu_line(cpu),
        Some([210_000_000, 1_070_000_000, 500_000_000])
    );
    assert_eq!(cpu_line("cpu  1 2 3\n"), None);
    assert_eq!(cpu.lines().filter(|line| is_one_cpu(line)).count(), 1);
    assert_eq!(
        kibibytes("MemTotal:       16384 kB\n", "MemTotal:"),
        Some(16 << 20)
    );
    assert_eq!(kibibytes("MemTotal: kB\n", "MemTotal:"), None);
}

/// A directory of files that is removed with the test.
struct Tree(PathBuf);

impl Tree {
    fn new(name: &str, files: &[(&str, &str)]) -> Self {
        let root = std::env::temp_dir().join(format!("tailback-{name}-{}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Self(root)
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

fn system(mountinfo: &str) -> System {
    System {
        mounts: Mounts::parse(mountinfo),
        sees_roots: true,
        sees_processes: true,
        files: Files::default(),
        reach: Reach::default(),
        left_out: 0,
        cpus: 0,
    }
}

fn place<'a>(path: &'a str, membership: &'a str) -> Place<'a> {
    Place {
        path,
        pid: std::process::id(),
        membership,
        kernel: None,
    }
}

/// What is read of one group, from files alone.
fn group(system: &mut System, path: &str, membership: &str) -> (Cgroup, Option<Refaults>) {
    let mut groups = Groups::default();
    system.group(place(path, membership), &mut groups);
    assert_eq!(groups.hidden, []);
    (groups.cgroups.remove(0), groups.refaults.pop())
}

fn io_limits(mountinfo: &str, path: &str, membership: &str) -> Vec<IoLimit> {
    let mut groups = Groups::default();
    system(mountinfo).io_limits(place(path, membership), &mut groups);
    assert_eq!(groups.hidden, []);
    groups.io_limits
}

#[test]
fn the_lowest_quota_and_limit_of_a_cgroup_and_its_parents_apply() {
    let tree = Tree::new(
        "v2",
        &[
            ("pod/cpu.max", "150000 100000\n"),
            (
                "pod/cpu.stat",
                "usage_usec 9\nnr_throttled 2\nthrottled_usec 5\n",
            ),
            ("pod/memory.max", "1000000\n"),
            ("pod/memory.current", "900000\n"),
            ("pod/memory.stat", "anon 1\ninactive_file 100\n"),
            ("pod/memory.events", "low 0\nmax 12\noom_kill 3\n"),
            ("pod/a/cpu.max", "max 100000\n"),
            ("pod/a/cpu.stat", "usage_usec 7\n"),
            ("pod/a/memory.max", "max\n"),
            ("pod/a/memory.current", "5\n"),
            ("pod/a/memory.events", "max 0\noom_kill 1\n"),
            ("pod/a/memory.pressure", "some avg10=0 total=4\n"),
            ("pod/a/cpu.pressure", "garbage"),
        ],
    );
    let mountinfo = format!("1 2 0:1 / {} rw - cgroup2 cgroup2 rw\n", tree.0.display());
    let (group, _) = group(&mut system(&mountinfo), "/pod/a", "0::/pod/a\n");
    let expected = Cgroup {
        path: "/pod/a".to_owned(),
        quota_millicpus: Some(1500),
        throttled_periods: Some(2),
        throttled_ns: Some(5_000),
        cpu_ns: Some(7_000),
        memory: Some(900_000),
        reclaimable: Some(100),
        memory_limit: Some(1_000_000),
        limit_hits: Some(12),
        oom_kills: Some(1),
        memory_stall: Some(Stall {
            some_ns: 4_000,
            full_ns: 0,
        }),
        ..Cgroup::default()
    };
    assert_eq!(group, expected);
}

#[test]
fn cgroup_v1_provides_the_same_values() {
    let tree = Tree::new(
        "v1",
        &[
            ("cpu/q/cpu.cfs_quota_us", "50000\n"),
            ("cpu/q/cpu.cfs_period_us", "100000\n"),
            (
                "cpu/q/cpu.stat",
                "nr_periods 9\nnr_throttled 8\nthrottled_time 77\n",
            ),
            ("cpu/cpu.cfs_quota_us", "-1\n"),
            ("cpuacct/q/cpuacct.usage", "123\n"),
            ("memory/m/memory.usage_in_bytes", "4096\n"),
            ("memory/m/memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory/m/memory.stat", "cache 1\ntotal_inactive_file 64\n"),
            ("memory/m/memory.failcnt", "0\n"),
            (
                "memory/m/memory.oom_control",
                "oom_kill_disable 0\noom_kill 2\n",
            ),
        ],
    );
    let mounts: String = ["cpu", "cpuacct", "memory"]
        .map(|name| {
            format!(
                "1 2 0:1 / {}/{name} rw - cgroup cgroup rw,{name}\n",
                tree.0.display()
            )
        })
        .concat();
    let membership = "3:memory:/m\n2:cpuacct:/q\n1:cpu:/q\n0::/\n";
    let (group, _) = group(&mut system(&mounts), "/q", membership);
    let expected = Cgroup {
        path: "/q".to_owned(),
        quota_millicpus: Some(500),
        throttled_periods: Some(8),
        throttled_ns: Some(77),
        cpu_ns: Some(123),
        memory: Some(4096),
        reclaimable: Some(64),
        memory_limit: None,
        limit_hits: Some(0),
        oom_kills: Some(2),
        ..Cgroup::default()
    };
    assert_eq!(group, expected);
}

#[test]
fn a_removed_cgroup_leaves_no_open_file_and_no_values() {
    let tree = Tree::new("gone", &[("a/memory.current", "5\n")]);
    let mountinfo = format!("1 2 0:1 / {} rw - cgroup2 cgroup2 rw\n", tree.0.display());
    let mut system = system(&mountinfo);
    system.files.poll = 1;
    assert_eq!(group(&mut system, "/a", "0::/a\n").0.memory, Some(5));
    assert_eq!(system.files.open.len(), 1);
    drop(tree);
    system.files.poll = 2;
    system.files.close_unused();
    assert!(system.files.open.is_empty());
    let mut groups = Groups::default();
    system.group(place("/a", "0::/a\n"), &mut groups);
    assert_eq!(groups.cgroups[0].memory, None);
    let hidden: Vec<HiddenFact> = groups.hidden.iter().map(|hidden| hidden.fact).collect();
    assert_eq!(hidden, [HiddenFact::CpuQuota, HiddenFact::MemoryLimit]);
}

#[test]
fn this_machine_and_the_agents_own_cgroup_can_be_read() {
    let own = |id, pid| Target {
        id,
        pid,
        cgroup: Some("/ours".to_owned()),
        ..Target::default()
    };
    let targets = [own(1, std::process::id()), own(2, std::process::id())];
    let mut system = System::default();
    let (groups, machine) = system.read(&targets, &HashMap::new());
    assert_eq!(groups.cgroups.len(), 1);
    assert!(machine.cpus >= 1);
    assert!(machine.memory > 0 && machine.memory >= machine.memory_available);
    assert!(machine.busy_ns > 0);
    let (_, later) = system.read(&[own(3, u32::MAX)], &HashMap::new());
    assert!(later.busy_ns >= machine.busy_ns);
    assert_eq!(system.left_out, 0);
}

#[test]
fn memory_high_is_a_limit_if_it_is_the_lowest() {
    let tree = Tree::new(
        "high",
        &[
            ("a/memory.max", "1000000\n"),
            ("a/memory.high", "600000\n"),
            ("a/memory.current", "599999\n"),
            ("a/memory.events", "high 77\nmax 1\noom_kill 0\n"),
            (
                "a/memory.stat",
                "inactive_file 5\nworkingset_refault_file 9\npgsteal 12\n",
            ),
        ],
    );
    let mountinfo = format!("1 2 0:1 / {} rw - cgroup2 cgroup2 rw\n", tree.0.display());
    let mut system = system(&mountinfo);
    let (group, refaults) = group(&mut system, "/a", "0::/a\n");
    let refaults = refaults.unwrap();
    assert_eq!((refaults.refaults, refaults.pages), (9, 12));
    assert_eq!(
        (group.memory_limit, group.limit_hits),
        (Some(600_000), Some(77))
    );
}

#[test]
fn io_limits_are_those_of_the_cgroup_and_its_parents() {
    let expected = |cgroup: &str| IoLimit {
        cgroup: cgroup.to_owned(),
        device: "9999:1".to_owned(),
        writes_per_s: Some(5),
        read_bytes_per_s: Some(4_096),
        ..IoLimit::default()
    };
    let v2 = Tree::new(
        "io2",
        &[
            ("a/io.max", "9999:1 rbps=max wbps=max riops=max wiops=9\n"),
            ("a/b/io.max", "9999:1 rbps=4096 wiops=5 x=7\ngarbage\n"),
        ],
    );
    let mountinfo = format!("1 2 0:1 / {} rw - cgroup2 cgroup2 rw\n", v2.0.display());
    let limits = io_limits(&mountinfo, "/a/b", "0::/a/b\n");
    assert_eq!(limits, [expected("/a/b")]);
    let v1 = Tree::new(
        "io1",
        &[
            ("blkio/a/blkio.throttle.write_iops_device", "9999:1 5\n"),
            ("blkio/a/blkio.throttle.read_bps_device", "9999:1 4096\nx\n"),
            ("blkio/a/blkio.throttle.read_iops_device", "\n"),
        ],
    );
    let mountinfo = format!(
        "1 2 0:1 / {}/blkio rw - cgroup cgroup rw,blkio\n",
        v1.0.display()
    );
    let limits = io_limits(&mountinfo, "/q", "3:blkio:/a\n0::/\n");
    assert_eq!(limits, [expected("/q")]);
}

#[test]
fn limits_outside_a_container_that_has_none_itself_are_hidden() {
    let tree = Tree::new(
        "inside",
        &[
            ("a/cpu.max", "max 100000\n"),
            ("a/memory.max", "max\n"),
            ("a/io.max", ""),
            ("b/cpu.max", "50000 100000\n"),
        ],
    );
    let mountinfo = format!("1 2 0:1 / {} rw - cgroup2 cgroup2 rw\n", tree.0.display());
    let mut system = system(&mountinfo);
    // In a private cgroup namespace.
    system.sees_roots = false;
    let facts = |system: &mut System, path, membership| {
        let mut groups = Groups::default();
        system.group(place(path, membership), &mut groups);
        system.io_limits(place(path, membership), &mut groups);
        let facts = groups.hidden.iter().map(|hidden| hidden.fact);
        (groups.cgroups[0].quota_millicpus, facts.collect::<Vec<_>>())
    };
    let outer = HiddenFact::OuterIoLimits;
    let (quota, hidden) = facts(&mut system, "/a", "0::/a\n");
    assert_eq!(quota, None);
    assert_eq!(
        hidden,
        [HiddenFact::CpuQuota, HiddenFact::MemoryLimit, outer]
    );
    let (quota, hidden) = facts(&mut system, "/b", "0::/b\n");
    assert_eq!(quota, Some(500));
    assert_eq!(hidden, [HiddenFact::MemoryLimit, outer]);
    let (quota, hidden) = facts(&mut system, "/../c", "0::/../c\n");
    assert_eq!(quota, None);
    let all = [
        HiddenFact::CpuQuota,
        HiddenFact::MemoryLimit,
        HiddenFact::IoLimits,
    ];
    assert_eq!(hidden, all);
}

#[test]
fn a_group_without_files_in_sight_has_the_limits_that_the_kernel_reports() {
    let none = u64::MAX;
    let no_limit = i64::MAX as u64 / page_size() as u64;
    let pages = (64 << 20) / page_size() as u64;
    // No mount leads to groups with these ids.
    let own = |controller, values| record(controller, (0, none - 1, "own"), Some(values));
    let root = |controller, values| record(controller, (1, none, ""), values);
    let free = Some([no_limit, no_limit, no_limit, 0, 0, 0, 0]);
    let kernel = groups(&[
        own(CONTROLLER_CPU, [50_000_000, 100_000_000, 3, 700, 0, 0, 0]),
        root(CONTROLLER_CPU, Some([none, 100_000_000, 0, 0, 0, 0, 0])),
        own(CONTROLLER_MEMORY, [9, pages, no_limit, 0, 0, 7, 1]),
        root(CONTROLLER_MEMORY, free),
        own(CONTROLLER_IO, [0; 7]),
        root(CONTROLLER_IO, None),
        own(CONTROLLER_NONE, [0, 0, 5, 0, 0, 0, 0]),
        root(CONTROLLER_NONE, None),
    ]);
    let mut system = system("");
    let mut found = Groups::default();
    let place = Place {
        // No such process.
        pid: u32::MAX,
        kernel: Some(&kernel),
        ..place("/own", "0::/own\n")
    };
    system.group(place, &mut found);
    system.io_limits(place, &mut found);
    let group = &found.cgroups[0];
    assert_eq!(
        (group.quota_millicpus, group.throttled_ns),
        (Some(500), Some(700))
    );
    assert_eq!(group.memory_limit, Some(64 << 20));
    assert_eq!((group.limit_hits, group.oom_kills), (Some(7), Some(1)));
    assert_eq!(group.memory_stall.map(|stall| stall.some_ns), Some(5));
    assert_eq!((group.reclaimable, group.cpu_ns), (None, None));
    let hidden: Vec<HiddenFact> = found.hidden.iter().map(|hidden| hidden.fact).collect();
    assert_eq!(hidden, [HiddenFact::IoLimits]);
}

#[test]
fn io_limits_that_cannot_be_read_are_hidden() {
    let tree = Tree::new(
        "unreadable",
        &[("a/io.max/in_its_place", ""), ("b/io.max", "")],
    );
    let mountinfo = format!("1 2 0:1 / {} rw - cgroup2 cgroup2 rw\n", tree.0.display());
    let hidden = |path, membership| {
        let mut groups = Groups::default();
        system(&mountinfo).io_limits(place(path, membership), &mut groups);
        groups.hidden
    };
    let expected = Hidden {
        cgroup: "/a".to_owned(),
        fact: HiddenFact::IoLimits,
    };
    assert_eq!(hidden("/a", "0::/a\n"), [expected]);
    assert_eq!(hidden("/b", "0::/b\n"), []);
}

#[test]
fn mount_points_of_a_hierarchy_are_found_with_all_duplicates() {
    let text = format!("{HYBRID}{V2}");
    let found = |controller, unified| {
        let points = points(&text, controller, unified).into_iter();
        points
            .map(|point| point.path.display().to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        found("", true),
        ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
    );
    assert_eq!(found("cpu", false), ["/sys/fs/cgroup/cpu,cpuacct"]);
    assert_eq!(found("blkio", false), [""; 0]);
}
