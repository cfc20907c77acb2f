//! Everything between the kernel and the outputs of the agent is pure.

use crate::{
    directions::agent,
    rust_source::{Source, sources},
};

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
        "queue/syscalls/table.rs",
        "libc",
        "constants, which the build compares the table with",
    ),
];

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
fn code_that_touches_the_outside_world_is_found() {
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
