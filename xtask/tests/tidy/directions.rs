//! The agent's modules point in one direction, and everything between the kernel and the outputs is pure.

use std::{collections::BTreeSet, path::PathBuf};

use crate::rust_source::{Source, sources};

/// The modules of `agent/src`, upstream first, each with the modules that it may import. Each of those has a row above: that is
/// what makes it one direction. `lib.rs` and `main.rs` hold everything together and have no row.
const MODULES: &[(&str, &[&str])] = &[
    // Tools without a domain.
    ("text", &[]),
    ("ewma", &[]),
    ("hash", &[]),
    ("in_order", &[]),
    // Closed lists.
    ("cause", &[]),
    ("messages", &["cause"]),
    // The pipeline.
    ("sample", &["messages"]),
    ("queue", &["ewma", "hash", "in_order", "sample", "text"]),
    ("event", &["cause", "queue", "sample"]),
    (
        "detect",
        &["event", "ewma", "hash", "queue", "sample", "text"],
    ),
    (
        "diagnose",
        &[
            "cause", "detect", "event", "ewma", "hash", "queue", "sample", "text",
        ],
    ),
    (
        "pipeline",
        &["detect", "diagnose", "event", "queue", "sample"],
    ),
    // What reads the kernel, and fills the samples.
    ("kernel", &[]),
    ("target", &["sample", "text"]),
    (
        "collect",
        &["in_order", "kernel", "messages", "sample", "target", "text"],
    ),
    // What users say, and what they get.
    (
        "config",
        &["collect", "detect", "messages", "queue", "target"],
    ),
    (
        "emit",
        &["cause", "diagnose", "event", "queue", "sample", "text"],
    ),
    (
        "signal",
        &[
            "collect", "config", "detect", "emit", "event", "ewma", "pipeline", "queue", "sample",
        ],
    ),
    ("adapters", &["collect", "config", "signal"]),
    (
        "cli",
        &[
            "adapters", "collect", "config", "emit", "event", "kernel", "pipeline", "sample",
            "signal", "target", "text",
        ],
    ),
];

/// The same within `diagnose`: facts before the wait graph, the wait graph before the rules, the rules before what keeps verdicts.
const DIAGNOSE: &[(&str, &[&str])] = &[
    ("inputs", &[]),
    ("titles", &[]),
    ("topology", &["titles"]),
    ("log_evidence", &[]),
    ("classify", &["topology"]),
    ("profile", &["classify", "inputs", "topology"]),
    ("no_baseline", &["inputs", "topology"]),
    ("thread_set", &["profile"]),
    (
        "wait_graph",
        &["classify", "profile", "thread_set", "topology"],
    ),
    ("case", &["inputs", "wait_graph"]),
    (
        "words",
        &["case", "classify", "profile", "topology", "wait_graph"],
    ),
    (
        "rules",
        &[
            "case",
            "classify",
            "inputs",
            "profile",
            "topology",
            "wait_graph",
            "words",
        ],
    ),
    ("open_episode", &["rules"]),
];

/// The same within `diagnose/rules`: what the rules share, then one file per cause, then the table of all rules, then the engine
/// that tries them.
const RULES: &[(&str, &[&str])] = &[
    ("checks", &[]),
    ("rule", &["checks"]),
    ("shared", &["checks", "rule"]),
    ("consumer_stalled", CAUSE_IMPORTS),
    ("cpu_bound", CAUSE_IMPORTS),
    ("cpu_starved", CAUSE_IMPORTS),
    ("cpu_throttled", CAUSE_IMPORTS),
    ("disk_slow", CAUSE_IMPORTS),
    ("downstream_slow", CAUSE_IMPORTS),
    ("event_loop_blocked", CAUSE_IMPORTS),
    ("fd_exhausted", CAUSE_IMPORTS),
    ("lock_contention", CAUSE_IMPORTS),
    ("memory_stalled", CAUSE_IMPORTS),
    ("network_limited", CAUSE_IMPORTS),
    ("output_blocked", CAUSE_IMPORTS),
    ("peer_not_reading", CAUSE_IMPORTS),
    ("peer_not_sending", CAUSE_IMPORTS),
    ("pool_exhausted", CAUSE_IMPORTS),
    ("producer_surge", CAUSE_IMPORTS),
    ("undersized_limit", CAUSE_IMPORTS),
    (
        "table",
        &[
            "rule",
            "consumer_stalled",
            "cpu_bound",
            "cpu_starved",
            "cpu_throttled",
            "disk_slow",
            "downstream_slow",
            "event_loop_blocked",
            "fd_exhausted",
            "lock_contention",
            "memory_stalled",
            "network_limited",
            "output_blocked",
            "peer_not_reading",
            "peer_not_sending",
            "pool_exhausted",
            "producer_surge",
            "undersized_limit",
        ],
    ),
    ("assemble", &["rule", "shared", "table"]),
];

/// What the file of one cause may import: no other cause.
const CAUSE_IMPORTS: &[&str] = &["checks", "rule", "shared"];

/// From the sample to the verdict: a function of the stream of samples and of nothing else, so that a recording replays to the
/// same output on any machine.
const PURE: &[&str] = &[
    "text", "ewma", "hash", "in_order", "cause", "messages", "sample", "queue", "event", "detect",
    "diagnose", "pipeline",
];

/// Clocks, files, sockets, processes, threads, the environment.
const WORLD: &[&str] = &[
    "std::time::Instant",
    "std::time::SystemTime",
    "std::time::UNIX_EPOCH",
    "std::fs",
    "std::io",
    "std::net::TcpListener",
    "std::net::TcpStream",
    "std::net::UdpSocket",
    "std::net::ToSocketAddrs",
    "std::os",
    "std::env",
    "std::process",
    "std::thread",
];

/// Macros that write to standard output or error, or read the environment of the build.
const WORLD_MACROS: &[&str] = &["print", "println", "eprint", "eprintln", "dbg", "env"];

/// Crates that compute, and that the pure modules may use; every other dependency of the agent may touch the world.
const PURE_CRATES: &[&str] = &[
    "aho_corasick",
    "anyhow",
    "postcard",
    "rustc_hash",
    "serde",
    "serde_json",
    "textwrap",
    "unicode_width",
    "zstd",
];

/// Where a pure module names something of the list above nevertheless, with the reason.
const ARGUED: &[(&str, &str, &str)] = &[
    (
        "sample/file.rs",
        "std::io",
        "the traits Read and Write: whoever opens the file passes it in",
    ),
    (
        "queue/syscalls.rs",
        "libc",
        "the numbers of system calls, which are constants",
    ),
];

fn agent() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../agent")
}

/// What is wrong with the imports of the files below the module `parent`, whose submodules are the rows of `table`.
fn against_the_direction(
    files: &[Source],
    parent: &[&str],
    table: &[(&str, &[&str])],
) -> Vec<String> {
    let mut wrong = Vec::new();
    let is_below = |path: &[String]| path.len() > parent.len() && path.starts_with_all(parent);
    for file in files
        .iter()
        .filter(|file| !file.is_test() && is_below(&file.module))
    {
        let own = &file.module[parent.len()];
        let Some((_, allowed)) = table.iter().find(|(name, _)| name == own) else {
            wrong.push(format!(
                "{}: the module {own} has no row in the table",
                file.file
            ));
            continue;
        };
        for named in file.paths() {
            let [root, path @ ..] = named.path.as_slice() else {
                continue;
            };
            if root != "crate" || !is_below(path) {
                continue;
            }
            let module = &path[parent.len()];
            if module != own && !allowed.contains(&module.as_str()) {
                wrong.push(format!(
                    "{}:{}: {own} may not import {module}",
                    file.file, named.line
                ));
            }
        }
    }
    wrong
}

trait StartsWithAll {
    fn starts_with_all(&self, names: &[&str]) -> bool;
}

impl StartsWithAll for [String] {
    fn starts_with_all(&self, names: &[&str]) -> bool {
        self.len() >= names.len() && self.iter().zip(names).all(|(own, name)| own == name)
    }
}

/// The files that no `mod` line declares: the compiler does not read them.
fn orphans(files: &[Source]) -> Vec<String> {
    let is_declared = |file: &Source| {
        let Some((name, parent)) = file.module.split_last() else {
            return true;
        };
        let declaration = format!("mod {name};");
        files
            .iter()
            .any(|other| other.module == parent && other.text.contains(&declaration))
    };
    let undeclared = files.iter().filter(|file| !is_declared(file));
    undeclared.map(|file| file.file.clone()).collect()
}

/// What is wrong with the table itself.
fn against_the_order(table: &[(&str, &[&str])]) -> Vec<String> {
    let mut above = BTreeSet::new();
    let mut wrong = Vec::new();
    for (module, allowed) in table {
        for import in *allowed {
            if !above.contains(import) {
                wrong.push(format!(
                    "{module} may import {import}, which has no row above it"
                ));
            }
        }
        above.insert(*module);
    }
    wrong
}

/// Where these files, of pure modules, name something that touches the world. `dependencies`: the crates that the agent uses.
fn impure(files: &[Source], dependencies: &[String]) -> Vec<String> {
    let mut wrong = Vec::new();
    for file in files.iter().filter(|file| !file.is_test()) {
        for named in file.paths() {
            let path = named.path.join("::");
            let is_below = |inner: &str, outer: &str| {
                inner == outer
                    || inner
                        .strip_prefix(outer)
                        .is_some_and(|rest| rest.starts_with("::"))
            };
            // A whole module that holds something of the list (`use std::time;`) is refused as well.
            let world = WORLD
                .iter()
                .find(|world| is_below(&path, world) || is_below(world, &path) && path != "std");
            let root = named.path.first().map_or("", String::as_str);
            let is_macro = named.is_macro && WORLD_MACROS.contains(&path.as_str());
            let is_foreign =
                dependencies.iter().any(|name| name == root) && !PURE_CRATES.contains(&root);
            let what = world
                .copied()
                .or(is_foreign.then_some(root))
                .or(is_macro.then_some(root));
            let is_argued = |what: &str| {
                ARGUED
                    .iter()
                    .any(|(at, argued, _)| *at == file.file && *argued == what)
            };
            if what.is_some_and(|what| !is_argued(what)) {
                wrong.push(format!("{}:{}: {path}", file.file, named.line));
            }
        }
    }
    wrong
}

/// The crates under `[dependencies]`, as code names them.
fn dependencies(manifest: &str) -> Vec<String> {
    let mut section = "";
    let mut names = Vec::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            section = line.trim();
        } else if section == "[dependencies]" || section.starts_with("[target.") {
            let name = line.split(['.', ' ', '=']).next().unwrap_or("");
            if !name.is_empty() && !name.starts_with('#') {
                names.push(name.replace('-', "_"));
            }
        }
    }
    names
}

#[test]
fn no_module_imports_a_later_one() {
    let files = sources(&agent().join("src"));
    /// Modules, each with those that it may import.
    type Table = [(&'static str, &'static [&'static str])];
    let trees: [(&[&str], &Table); 3] = [
        (&[], MODULES),
        (&["diagnose"], DIAGNOSE),
        (&["diagnose", "rules"], RULES),
    ];
    for (parent, table) in trees {
        assert_eq!(against_the_order(table), [""; 0]);
        let wrong = against_the_direction(&files, parent, table);
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        for (module, _) in table {
            let path: Vec<&str> = parent.iter().chain([module]).copied().collect();
            assert!(
                files.iter().any(|file| file.module == path),
                "the table has a row for {}, and the agent has no such module",
                path.join("::")
            );
        }
    }
}

#[test]
fn every_file_is_part_of_a_module() {
    let wrong = orphans(&sources(&agent().join("src")));
    assert!(
        wrong.is_empty(),
        "no mod line declares {}",
        wrong.join(", ")
    );
}

#[test]
fn the_pipeline_has_no_clock_no_file_and_no_network() {
    let manifest = std::fs::read_to_string(agent().join("Cargo.toml")).unwrap();
    let dependencies = dependencies(&manifest);
    assert!(dependencies.iter().any(|name| name == "rustix"));
    let mut files = sources(&agent().join("src"));
    files.retain(|file| {
        file.module
            .first()
            .is_some_and(|module| PURE.contains(&module.as_str()))
    });
    let wrong = impure(&files, &dependencies);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (at, what, _) in ARGUED {
        let file = files.iter().find(|file| file.file == *at).unwrap();
        assert!(
            file.paths()
                .iter()
                .any(|named| named.path.join("::").starts_with(what)),
            "{at} does not name {what} any more: remove the exception"
        );
    }
}

#[test]
fn every_module_of_the_pipeline_forbids_unsafe_code() {
    let files = sources(&agent().join("src"));
    for module in PURE {
        let root = files.iter().find(|file| file.module == [*module]).unwrap();
        assert!(
            root.text.contains("\n#![forbid(unsafe_code)]\n"),
            "{} does not say #![forbid(unsafe_code)]",
            root.file
        );
    }
}

#[test]
fn an_import_against_the_direction_is_found() {
    let table: &[(&str, &[&str])] = &[
        ("sample", &[]),
        ("queue", &["sample"]),
        ("detect", &["queue"]),
    ];
    let planted = [
        Source::new("sample/mod.rs", "use crate::detect::Event;"),
        Source::new(
            "queue/disk.rs",
            "use super::Kind;\nfn f() { crate::sample::g(); super::super::detect::h() }",
        ),
        Source::new("detect/tests.rs", "use crate::sample::Sample;"),
        Source::new(
            "detect/gauge.rs",
            "use crate::{queue::Kind, sample::Sample};",
        ),
        Source::new("other.rs", ""),
    ];
    assert_eq!(
        against_the_direction(&planted, &[], table),
        [
            "sample/mod.rs:1: sample may not import detect",
            "queue/disk.rs:2: queue may not import detect",
            "detect/gauge.rs:1: detect may not import sample",
            "other.rs: the module other has no row in the table",
        ]
    );
    let circle: &[(&str, &[&str])] = &[("detect", &["diagnose"]), ("diagnose", &["detect"])];
    assert_eq!(
        against_the_order(circle),
        ["detect may import diagnose, which has no row above it"]
    );
}

#[test]
fn an_import_within_a_module_against_its_direction_is_found() {
    let table: &[(&str, &[&str])] = &[("facts", &[]), ("rules", &["facts"])];
    let planted = [
        Source::new(
            "diagnose/mod.rs",
            "use rules::Rule;\nuse crate::diagnose::facts::Fact;",
        ),
        Source::new(
            "diagnose/facts.rs",
            "use super::rules::Rule;\nuse crate::queue::rules;",
        ),
        Source::new(
            "diagnose/rules/mod.rs",
            "use super::facts::Fact;\nuse super::Diagnosis;",
        ),
    ];
    assert_eq!(
        against_the_direction(&planted, &["diagnose"], table),
        [
            "diagnose/facts.rs:1: facts may not import rules",
            "diagnose/rules/mod.rs:2: rules may not import Diagnosis",
        ]
    );
}

#[test]
fn a_file_without_a_declaration_is_found() {
    let planted = [
        Source::new("lib.rs", "mod queue;"),
        Source::new("queue/mod.rs", "mod disk;"),
        Source::new("queue/disk.rs", ""),
        Source::new("queue/old.rs", ""),
    ];
    assert_eq!(orphans(&planted), ["queue/old.rs"]);
}

#[test]
fn what_touches_the_world_is_found() {
    let planted = [
        Source::new(
            "detect/a.rs",
            "use std::{collections::BTreeMap, time::{Duration, Instant}};\nuse std::net::{IpAddr, SocketAddr};",
        ),
        Source::new(
            "detect/b.rs",
            "use std::time;\nfn f() { std::fs::read(\"x\"); rustix::process::getpid(); }",
        ),
        Source::new(
            "detect/c.rs",
            "fn f() { println!(\"x\"); writeln!(out, \"x\"); }",
        ),
        Source::new("sample/file.rs", "use std::io::Read;\nuse std::fs::File;"),
        Source::new("sample/cut.rs", "use std::io::Read;"),
        Source::new("queue/tests.rs", "use std::fs::File;"),
        Source::new(
            "queue/d.rs",
            "#[cfg(test)]\nmod tests { use std::fs::File; }",
        ),
    ];
    let dependencies = dependencies(
        "[dependencies]\nserde.workspace = true\nrustix = { workspace = true }\n[dev-dependencies]\nuuid = \"1\"\n",
    );
    assert_eq!(dependencies, ["serde", "rustix"]);
    assert_eq!(
        impure(&planted, &dependencies),
        [
            "detect/a.rs:1: std::time::Instant",
            "detect/b.rs:1: std::time",
            "detect/b.rs:2: std::fs::read",
            "detect/b.rs:2: rustix::process::getpid",
            "detect/c.rs:1: println",
            "sample/file.rs:2: std::fs::File",
            "sample/cut.rs:1: std::io::Read",
        ]
    );
}
