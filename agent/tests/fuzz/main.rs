//! Bytes that come in from outside, changed at random: the kernel's BTF, the iterators' records, recordings, the
//! configuration. None of them makes the agent panic or hang.
//!
//! `cargo xtask fuzz` hunts for longer; without a word this takes a quarter of a minute for each target.
#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is how a test fails"
)]

mod corpus;
mod hunt;
mod mutation;

use std::{
    hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher, Hash},
    net::SocketAddr,
};

use hunt::{Hunt, hunt};
use tailback::{
    collect::sample_of_records,
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
    sample::{Sample, Walks, file::Reader},
};

fn outcome(of: impl Hash) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(of)
}

#[test]
fn btf() {
    hunt(Hunt {
        target: "btf",
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
    hunt(Hunt {
        target: "records",
        corpus: corpus::records(),
        words: &[],
        feed: |bytes| match sample_of_records(bytes) {
            Ok(sample) => told(in_time(sample).into_iter()),
            // All the same: each length has a text of its own.
            Err(_) => outcome("refused"),
        },
    });
}

/// The same things seen again and again, for longer than any window: what is judged is judged.
fn in_time(sample: Sample) -> Vec<Sample> {
    let mut sample = Sample {
        walks: Walks {
            files: true,
            marked: false,
            threads: true,
            waits: true,
            ..Walks::default()
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
    hunt(Hunt {
        target: "recordings",
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
            let told = told(samples);
            outcome((told, ended))
        },
    });
}

/// The whole pipeline, and all that tells its events; which kinds of events there were.
fn told(samples: impl Iterator<Item = Sample>) -> u64 {
    let (mut terminal, mut json) = (Vec::new(), Vec::new());
    let mut spans = Spans::new(Host {
        id: "id".to_owned(),
        name: "name".to_owned(),
        ip: "127.0.0.1".to_owned(),
    });
    let mut words = std::collections::BTreeSet::new();
    {
        let mut for_people = Terminal::new(&mut terminal, Colour::Never, Verbosity::Verbose);
        let mut for_programs = Json::new(&mut json);
        let mut tell = |events: &[Event]| {
            for event in events {
                for_people.emit(event).unwrap();
                for_programs.emit(event).unwrap();
                spans.take(event);
            }
        };
        let mut pipeline = Pipeline::new(Config::default().settings_for(), true);
        for sample in samples {
            tell(&pipeline.step(&sample).events);
        }
        tell(&pipeline.finish());
    }
    assert!(
        !terminal.contains(&0x1b),
        "an escape gets through to the terminal"
    );
    for line in String::from_utf8(json).unwrap().lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        words.insert(format!("{}{}{}", line["type"], line["kind"], line["level"]));
    }
    outcome(words)
}

#[test]
fn config() {
    hunt(Hunt {
        target: "config",
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
            // What is accepted can be worked with.
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
