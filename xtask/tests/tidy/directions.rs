//! The agent's modules point in one direction.

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
    ("confinement", &[]),
    ("target", &["sample", "text"]),
    ("app", &["sample", "text"]),
    (
        "collect",
        &[
            "app", "in_order", "kernel", "messages", "sample", "target", "text",
        ],
    ),
    // What users say, and what they get.
    (
        "config",
        &["app", "collect", "detect", "messages", "queue", "target"],
    ),
    (
        "emit",
        &["cause", "diagnose", "event", "queue", "sample", "text"],
    ),
    (
        "signal",
        &[
            "cause", "collect", "config", "detect", "emit", "event", "ewma", "pipeline", "queue",
            "sample", "target",
        ],
    ),
    (
        "adapters",
        &["collect", "config", "confinement", "signal", "text"],
    ),
    (
        "cli",
        &[
            "adapters",
            "collect",
            "config",
            "confinement",
            "emit",
            "event",
            "kernel",
            "pipeline",
            "sample",
            "signal",
            "target",
            "text",
        ],
    ),
];

/// The same within `diagnose`: facts before the wait graph, the wait graph before the rules, the rules before what keeps verdicts.
const DIAGNOSE: &[(&str, &[&str])] = &[
    ("exact_waits", &[]),
    ("jvm_counters", &[]),
    ("inputs", &["exact_waits", "jvm_counters"]),
    ("titles", &[]),
    ("thread_names", &[]),
    ("seconds", &[]),
    ("listening_sockets", &["seconds"]),
    ("topology", &["inputs", "listening_sockets", "titles"]),
    ("held_pool", &["inputs", "topology"]),
    ("log_evidence", &[]),
    ("consumers", &[]),
    ("served", &["topology"]),
    ("classify", &["topology"]),
    ("loop_turns", &["classify", "inputs"]),
    (
        "profile",
        &["classify", "loop_turns", "seconds", "topology"],
    ),
    ("no_baseline", &["inputs", "topology"]),
    ("thread_set", &["classify", "profile"]),
    (
        "wait_graph",
        &[
            "classify",
            "consumers",
            "listening_sockets",
            "profile",
            "served",
            "thread_set",
            "topology",
        ],
    ),
    (
        "case",
        &["inputs", "listening_sockets", "served", "wait_graph"],
    ),
    (
        "words",
        &[
            "case",
            "classify",
            "listening_sockets",
            "profile",
            "topology",
            "wait_graph",
        ],
    ),
    (
        "rules",
        &[
            "case",
            "classify",
            "exact_waits",
            "held_pool",
            "inputs",
            "jvm_counters",
            "profile",
            "served",
            "thread_names",
            "topology",
            "wait_graph",
            "words",
        ],
    ),
    ("open_episode", &["exact_waits", "rules"]),
];

/// The same within `diagnose/rules`: what the rules share, then one file per cause, then the table of all rules, then the engine
/// that tries them.
const RULES: &[(&str, &[&str])] = &[
    ("checks", &[]),
    ("rule", &["checks"]),
    ("shared", &["checks", "rule"]),
    ("accelerator_bound", CAUSE_IMPORTS),
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
    ("ports_exhausted", CAUSE_IMPORTS),
    ("producer_surge", CAUSE_IMPORTS),
    ("undersized_limit", CAUSE_IMPORTS),
    (
        "table",
        &[
            "rule",
            "accelerator_bound",
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
            "ports_exhausted",
            "producer_surge",
            "undersized_limit",
        ],
    ),
    ("assemble", &["rule", "shared", "table"]),
];

/// What the file of one cause may import: no other cause.
const CAUSE_IMPORTS: &[&str] = &["checks", "rule", "shared"];

pub fn agent() -> PathBuf {
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
