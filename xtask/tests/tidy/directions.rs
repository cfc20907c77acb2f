//! The agent's modules point in one direction, and everything between the kernel and the outputs is pure.

use std::{collections::BTreeSet, path::PathBuf};

use crate::rust_source::{Source, sources};

/// The modules of `agent/src`, upstream first, each with the modules that it may import. Each of those has a row above: that is
/// what makes it one direction. `lib.rs` and `main.rs` hold everything together and have no row.
const MODULES: &[(&str, &[&str])] = &[
    // Tools without a domain.
    ("text", &[]),
    ("ewma", &[]),
    ("in_order", &[]),
    // Closed lists.
    ("cause", &[]),
    ("messages", &["cause"]),
    // The pipeline.
    ("sample", &["messages"]),
    ("queue", &["ewma", "in_order", "sample", "text"]),
    ("event", &["cause", "queue", "sample"]),
    ("detect", &["event", "ewma", "queue", "sample", "text"]),
    (
        "diagnose",
        &[
            "cause", "detect", "event", "ewma", "queue", "sample", "text",
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

/// From the sample to the verdict: a function of the stream of samples and of nothing else, so that a recording replays to the
/// same output on any machine.
const PURE: &[&str] = &[
    "text", "ewma", "in_order", "cause", "messages", "sample", "queue", "event", "detect",
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

/// What is wrong with the imports of these files.
fn against_the_direction(files: &[Source], table: &[(&str, &[&str])]) -> Vec<String> {
    let mut wrong = Vec::new();
    for file in files.iter().filter(|file| !file.is_test()) {
        let Some(own) = file.module.first() else {
            continue;
        };
        let Some((_, allowed)) = table.iter().find(|(name, _)| name == own) else {
            wrong.push(format!(
                "{}: the module {own} has no row in the table",
                file.file
            ));
            continue;
        };
        for named in file.paths() {
            let [root, module, ..] = named.path.as_slice() else {
                continue;
            };
            if root == "crate" && module != own && !allowed.contains(&module.as_str()) {
                wrong.push(format!(
                    "{}:{}: {own} may not import {module}",
                    file.file, named.line
                ));
            }
        }
    }
    wrong
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
    assert_eq!(against_the_order(MODULES), [""; 0]);
    let files = sources(&agent().join("src"));
    let wrong = against_the_direction(&files, MODULES);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (module, _) in MODULES {
        assert!(
            files.iter().any(|file| file.module == [*module]),
            "the table has a row for {module}, and the agent has no such module"
        );
    }
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
        against_the_direction(&planted, table),
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
