//! Fuzzes the parsers of outside bytes: the kernel's BTF, the iterators' records, a JVM's performance data, recordings, the
//! configuration. No input may make the agent panic or hang.
//!
//! Each target runs for 6 s; `cargo xtask fuzz` runs longer. The mutator is our own and guided by the outcomes of the
//! target, not by coverage: cargo-fuzz and bolero need a nightly compiler for coverage, and without it they generate less
//! useful inputs than mutants of these corpora. `tests/properties.rs` checks properties on generated inputs.
#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is how a test fails"
)]

mod corpus;
mod mutation;
#[path = "../perf_data/mod.rs"]
mod perf_data;
mod runner;

use std::{
    hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher, Hash},
    net::SocketAddr,
};

use runner::{Target, fuzz};
use tailback::{
    collect::{parse_jvm_counters, sample_of_records},
    config::Config,
    detect::Settings,
    emit::{
        Sink as _,
        json::Json,
        spans::{Host, Spans},
        terminal::{Colour, Terminal, Verbosity},
    },
    event::Event,
    kernel::{
        btf::Btf,
        layout::{resolve, resolve_without},
    },
    pipeline::Pipeline,
    queue::{Kind, QueueId, QueueKey},
    sample::{Sample, Scans, file::Reader},
};

fn outcome(of: impl Hash) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(of)
}

#[test]
fn btf() {
    fuzz(Target {
        name: "btf",
        corpus: corpus::btf(),
        words: &[],
        feed: |bytes| match Btf::parse(bytes) {
            Ok(btf) => {
                let resolved = resolve(&btf);
                let without = resolve_without(&btf, &["copied_seq"]);
                outcome((
                    btf.len(),
                    format!("{:?}", resolved.layout),
                    without.missing.len(),
                ))
            }
            Err(error) => outcome(error.to_string()),
        },
    });
}

#[test]
fn records() {
    fuzz(Target {
        name: "records",
        corpus: corpus::records(),
        words: &[],
        feed: |bytes| match sample_of_records(bytes) {
            Ok(sample) => events_of(repeated(sample).into_iter()),
            // One outcome for all: each length has a message of its own.
            Err(_) => outcome("rejected"),
        },
    });
}

#[test]
fn jvm_counters() {
    fuzz(Target {
        name: "jvm_counters",
        corpus: corpus::jvm_counters(),
        words: &[],
        feed: |bytes| match parse_jvm_counters(7, bytes) {
            // One outcome for all values.
            Ok(counters) => outcome(counters.is_collecting),
            Err(reason) => outcome(reason),
        },
    });
}

/// Repeats a sample for longer than any detection window, so that each queue gets a level.
fn repeated(sample: Sample) -> Vec<Sample> {
    let mut sample = Sample {
        scans: Scans {
            files: true,
            focused_sockets: false,
            threads: true,
            waits: true,
            ..Scans::default()
        },
        ..sample
    };
    (0..40)
        .map(|tick| {
            sample.mono_ns = 1_000_000_000 + tick * 100_000_000;
            sample.unix_ns = sample.mono_ns;
            sample.clone()
        })
        .collect()
}

#[test]
fn recordings() {
    fuzz(Target {
        name: "recordings",
        corpus: corpus::recordings(),
        words: &[],
        feed: |bytes| {
            let file = corpus::recording_of(bytes);
            let mut reader = match Reader::new(file.as_slice()) {
                Ok(reader) => reader,
                Err(error) => return outcome(error.to_string()),
            };
            let mut ended = String::new();
            let samples = std::iter::from_fn(|| match reader.next_sample() {
                Ok(sample) => sample,
                Err(error) => {
                    ended = error.to_string();
                    None
                }
            });
            let events = events_of(samples);
            outcome((events, ended))
        },
    });
}

/// Runs the pipeline and every output; returns a hash of the kinds of events.
fn events_of(samples: impl Iterator<Item = Sample>) -> u64 {
    let (mut terminal, mut json) = (Vec::new(), Vec::new());
    let mut spans = Spans::new(Host {
        id: "id".to_owned(),
        name: "name".to_owned(),
        ip: "127.0.0.1".to_owned(),
        ..Host::default()
    });
    let mut words = std::collections::BTreeSet::new();
    {
        let mut terminal_sink = Terminal::new(&mut terminal, Colour::Never, Verbosity::Verbose);
        let mut json_sink = Json::new(&mut json);
        let mut emit = |events: &[Event]| {
            for event in events {
                terminal_sink.emit(event).unwrap();
                json_sink.emit(event).unwrap();
                spans.take(event);
            }
        };
        let mut pipeline = Pipeline::new(Config::default().settings_for(), true);
        for sample in samples {
            emit(&pipeline.step(&sample).events);
        }
        emit(&pipeline.finish());
    }
    assert!(
        !terminal.contains(&0x1b),
        "an escape character reached the terminal"
    );
    for line in String::from_utf8(json).unwrap().lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        words.insert(format!("{}{}{}", line["type"], line["kind"], line["level"]));
    }
    outcome(words)
}

#[test]
fn config() {
    fuzz(Target {
        name: "config",
        corpus: corpus::configs(),
        words: corpus::CONFIG_WORDS,
        feed: |bytes| {
            let config = match Config::parse(&String::from_utf8_lossy(bytes)) {
                Ok(config) => config,
                Err(error) => return outcome(format!("{error:#}").len()),
            };
            let settings_for = config.settings_for();
            let settings: Vec<Settings> = Kind::ALL
                .iter()
                .map(|kind| {
                    let local = SocketAddr::from(([127, 0, 0, 1], 8080));
                    settings_for(&QueueKey::new(1, *kind, QueueId::Local(local)))
                })
                .collect();
            // The pipeline can use every accepted configuration.
            let mut pipeline = Pipeline::new(settings_for, true);
            for sample in corpus::samples() {
                pipeline.step(&sample);
            }
            pipeline.finish();
            let budget = config.budget();
            outcome(format!("{:?}{settings:?}{budget:?}", config.specs()))
        },
    });
}
