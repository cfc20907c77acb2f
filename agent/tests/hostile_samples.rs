//! Malicious recordings: well-formed samples with arbitrary values. The pipeline and every output must accept them without
//! a panic, and no control character may reach the terminal.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
};

use serde::{
    Deserialize as _,
    de::{
        DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer as _, SeqAccess, VariantAccess,
        Visitor, value::Error,
    },
    forward_to_deserialize_any,
};
use tailback::{
    config::Config,
    emit::{
        Sink as _,
        json::Json,
        report::{self, Findings},
        spans::{Host, Spans},
        table,
        terminal::{Colour, Terminal, Verbosity},
    },
    event::{Event, QueueState},
    pipeline::Pipeline,
    queue::{Criterion, Kind},
    sample::{
        AppAnswer, HookReport, Sample,
        anonymize::Anonymizer,
        file::{Reader, Writer},
    },
};

/// Deterministic pseudo-random numbers (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Small numbers, so that objects recur from sample to sample, and numbers at which sums overflow.
    fn extreme(&mut self) -> u64 {
        match self.below(16) {
            0..8 => self.below(4),
            8 => u64::MAX,
            9 => u64::MAX - self.below(3),
            10 => u64::from(u32::MAX),
            11 => u64::from(u32::MAX) - self.below(3),
            12 => 1 << 63,
            13 => 1 << self.below(64),
            14 => self.below(10_000_000_000),
            _ => self.next(),
        }
    }
}

/// Deserializes a value of any type from random numbers.
struct Anything<'a>(&'a mut Numbers);

macro_rules! numbers {
    ($($method:ident $visit:ident $ty:ty,)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            visitor.$visit(self.0.extreme() as $ty)
        }
    )*};
}

impl<'de> Deserializer<'de> for Anything<'_> {
    type Error = Error;

    numbers! {
        deserialize_u8 visit_u8 u8,
        deserialize_u16 visit_u16 u16,
        deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64,
        deserialize_i16 visit_i16 i16,
        deserialize_i32 visit_i32 i32,
        deserialize_i64 visit_i64 i64,
    }

    fn is_human_readable(&self) -> bool {
        false
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bool(self.0.below(2) == 0)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let choices = [f64::NAN, f64::INFINITY, -1.0, 0.0, 1e300, 0.5];
        visitor.visit_f64(choices[self.0.below(6) as usize])
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let long = "long".repeat(1_000);
        let choices = [
            "",
            "nginx",
            "\u{1b}[2J\n\u{7}\u{202e}",
            "\"\\\r\t\0",
            &long,
            "postgres: bob shop [local] UPDATE waiting",
            "postgres: bob shop [local] idle in transaction",
            "/dev/pts/3",
        ];
        visitor.visit_str(choices[self.0.below(8) as usize])
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0.below(2) {
            0 => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let len = self.0.below(4) as usize;
        self.deserialize_tuple(len, visitor)
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(Sequence(self.0, len))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_tuple(fields.len(), visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let variant = self.0.below(variants.len() as u64) as u32;
        visitor.visit_enum(Variant(self.0, variant))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
        panic!("a sample has a type that this generator does not support yet")
    }

    forward_to_deserialize_any! {
        i8 i128 u128 f32 char str bytes byte_buf unit unit_struct newtype_struct tuple_struct map identifier
        ignored_any
    }
}

struct Sequence<'a>(&'a mut Numbers, usize);

impl<'de> SeqAccess<'de> for Sequence<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        if self.1 == 0 {
            return Ok(None);
        }
        self.1 -= 1;
        seed.deserialize(Anything(self.0)).map(Some)
    }
}

struct Variant<'a>(&'a mut Numbers, u32);

impl<'de, 'a> EnumAccess<'de> for Variant<'a> {
    type Error = Error;
    type Variant = Anything<'a>;

    fn variant_seed<V: DeserializeSeed<'de>>(
        self,
        seed: V,
    ) -> Result<(V::Value, Self::Variant), Error> {
        let name = seed.deserialize(self.1.into_deserializer())?;
        Ok((name, Anything(self.0)))
    }
}

impl<'de> VariantAccess<'de> for Anything<'_> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Error> {
        seed.deserialize(self)
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_tuple(len, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_tuple(fields.len(), visitor)
    }
}

/// A stream of samples. Time usually advances normally, and most of a sample carries over to the next: otherwise no queue
/// would have a history.
fn stream(seed: u64, len: usize) -> Vec<Sample> {
    let mut numbers = Numbers(seed);
    // A sample does not serialize what hooks measured and services answered. Random numbers of their own, so that the rest
    // stays the same.
    let mut of_hooks = Numbers(!seed);
    let mut of_apps = Numbers(seed.rotate_left(32));
    let (mut mono_ns, mut unix_ns) = (1_000_000_000, 1_700_000_000_000_000_000);
    let mut samples: Vec<Sample> = Vec::with_capacity(len);
    for _ in 0..len {
        let fresh = Sample::deserialize(Anything(&mut numbers)).unwrap();
        let mut sample = samples.last().cloned().unwrap_or_default();
        match numbers.below(32) {
            0 => sample.targets = fresh.targets,
            1 => sample.listeners = fresh.listeners,
            2 => sample.connections = fresh.connections,
            3 => sample.pipes = fresh.pipes,
            4 => sample.threads = fresh.threads,
            5 => sample.networks = fresh.networks,
            6 => sample.scans = fresh.scans,
            7 => sample = fresh,
            8 => sample.datagrams = fresh.datagrams,
            9 => sample.unix = fresh.unix,
            10 => sample.rings = fresh.rings,
            11 => sample.files = fresh.files,
            12 => sample.waits = fresh.waits,
            13 => sample.cgroups = fresh.cgroups,
            14 => sample.machine = fresh.machine,
            15 => sample.cpu_users = fresh.cpu_users,
            16 => sample.listening = fresh.listening,
            17 => sample.holders = fresh.holders,
            18 => sample.profile = fresh.profile,
            19 => sample.peers = fresh.peers,
            20 => sample.titles = fresh.titles,
            21 => sample.messages = fresh.messages,
            // The profile of focused targets, without which there is no evidence for a cause.
            22 => (sample.scans.profile, sample.scans.waits) = (true, true),
            23 => sample.scans.files = true,
            _ => (sample.agent, sample.notices) = (fresh.agent, fresh.notices),
        }
        sample.hooks = (of_hooks.below(4) == 0)
            .then(|| HookReport::deserialize(Anything(&mut of_hooks)).unwrap());
        // The reader rejects later times.
        sample.mono_ns >>= 1;
        sample.unix_ns >>= 1;
        if numbers.below(50) != 0 {
            mono_ns += 100_000_000;
            unix_ns += 100_000_000;
            (sample.mono_ns, sample.unix_ns) = (mono_ns, unix_ns);
        }
        sample.app = match of_apps.below(4) {
            0 => vec![app_answer(&mut of_apps, &sample)],
            _ => Vec::new(),
        };
        samples.push(sample);
    }
    samples
}

/// Usually of a watched process that reports the same queues again: otherwise none would have a history.
fn app_answer(numbers: &mut Numbers, sample: &Sample) -> AppAnswer {
    let mut answer = AppAnswer::deserialize(Anything(numbers)).unwrap();
    let mut watched = sample.targets.iter().flatten().flat_map(|it| &it.tgids);
    if numbers.below(8) > 0
        && let Some(tgid) = watched.next()
    {
        answer.tgid = *tgid;
        answer.at_ns = sample.mono_ns;
        "redis".clone_into(&mut answer.preset);
        for (index, queue) in answer.queues.iter_mut().flatten().enumerate() {
            queue.name = format!("queue {index}");
            // Every other one is a proxy's, and names some connections.
            let connections = sample.connections.iter().take(3);
            let ends = connections.map(|one| {
                if index % 4 == 0 {
                    one.local
                } else {
                    one.remote
                }
            });
            queue.served_on = (index % 2 == 0).then(|| ends.collect());
        }
    }
    answer
}

fn recorded(samples: &[Sample]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = Writer::new(&mut bytes).unwrap();
    for sample in samples {
        writer.add(sample).unwrap();
    }
    writer.flush().unwrap();
    drop(writer);
    bytes
}

/// Feeds the samples through the pipeline into every output; returns those of the terminal and of JSON.
fn outputs(samples: impl Iterator<Item = Sample>) -> (Vec<u8>, Vec<u8>) {
    let (mut terminal, mut json) = (Vec::new(), Vec::new());
    let mut spans = Spans::new(Host {
        id: "id".to_owned(),
        name: "name".to_owned(),
        ip: IpAddr::V4(Ipv4Addr::LOCALHOST).to_string(),
        ..Host::default()
    });
    {
        let mut terminal_sink = Terminal::new(&mut terminal, Colour::Never, Verbosity::Verbose);
        let mut json_sink = Json::new(&mut json);
        let mut findings = Findings::default();
        let mut emit = |findings: &mut Findings, events: &[Event]| {
            for event in events {
                terminal_sink.emit(event).unwrap();
                json_sink.emit(event).unwrap();
                findings.take(event);
                spans.take(event);
            }
        };
        let mut pipeline = Pipeline::new(Config::default().settings_for(), true);
        let mut states: Vec<QueueState> = Vec::new();
        for sample in samples {
            let events = pipeline.step(&sample).events;
            emit(&mut findings, &events);
            findings.observed(&sample, events.len());
            states = events
                .into_iter()
                .filter_map(|event| match event {
                    Event::Queue(state) => Some(state),
                    _ => None,
                })
                .collect();
        }
        emit(&mut findings, &pipeline.finish());
        let mut report = Vec::new();
        report::write(&mut report, &findings, Colour::Never, Verbosity::Verbose).unwrap();
        let report = String::from_utf8(report).unwrap();
        let long = report.lines().find(|line| line.chars().count() > 100);
        assert_eq!(long, None);
        assert!(report.chars().all(|it| it == '\n' || !it.is_control()));
        table::write(&mut Vec::new(), &states, |_| None, true, Colour::Never).unwrap();
    }
    (terminal, json)
}

#[test]
fn samples_with_arbitrary_values_never_cause_a_panic() {
    let (mut episodes, mut causes) = (BTreeSet::new(), BTreeSet::new());
    for seed in 1..=30 {
        let (terminal, json) = outputs(stream(seed * 0x9e37_79b9, 300).into_iter());
        assert!(!terminal.is_empty(), "seed {seed}");
        for line in String::from_utf8(json).unwrap().lines() {
            let object: serde_json::Value = serde_json::from_str(line).unwrap();
            if object["type"] == "episode" {
                episodes.insert(object["kind"].as_str().unwrap().to_owned());
                // Every episode has a verdict.
                causes.insert(object["cause"].as_str().unwrap().to_owned());
            }
        }
    }
    // The samples lead to episodes of every kind, except those that need values to agree: an event loop and its
    // connections, a futex word and the value that a thread expects, the sequence numbers of a request.
    let need_agreement = [Kind::Eventloop, Kind::Lock, Kind::Inflight];
    let judged = Kind::ALL
        .iter()
        .filter(|kind| kind.criterion() != Criterion::Context && !need_agreement.contains(kind));
    let kinds: BTreeSet<String> = judged.map(|kind| kind.name().to_owned()).collect();
    let silent: Vec<&String> = kinds.difference(&episodes).collect();
    assert!(silent.is_empty(), "{silent:?}");
    // Not every verdict is `unknown`.
    assert!(causes.len() >= 8, "{causes:?}");
}

#[test]
fn control_characters_of_a_recording_never_reach_the_terminal() {
    let bytes = recorded(&stream(0x7a11_bac4, 300));
    let mut reader = Reader::new(bytes.as_slice()).unwrap();
    let samples = std::iter::from_fn(|| reader.next_sample().unwrap());
    let (terminal, _) = outputs(samples);
    let text = String::from_utf8(terminal).unwrap();
    let harmful = |c: char| c != '\n' && (c.is_control() || c == '\u{202e}');
    if let Some(at) = text.find(harmful) {
        let around: String = text[at..].chars().take(80).collect();
        panic!("{around:?}");
    }
}

#[test]
fn samples_with_arbitrary_values_can_be_anonymized() {
    let samples = stream(0xa111, 300);
    let mut anonymizer = Anonymizer::default();
    for sample in &samples {
        anonymizer.learn(sample);
    }
    for sample in &samples {
        let anonymous = anonymizer.anonymize(sample);
        let json = serde_json::to_string(&(&anonymous, &anonymous.hooks, &anonymous.app)).unwrap();
        assert!(!json.contains("longlong") && !json.contains("bob"));
        assert!(!json.contains("u001b") && !json.contains("\u{202e}"));
    }
}

#[test]
fn a_replayed_recording_yields_the_same_output() {
    let samples = stream(0xf111, 200);
    let bytes = recorded(&samples);
    let mut reader = Reader::new(bytes.as_slice()).unwrap();
    let replayed = std::iter::from_fn(|| reader.next_sample().unwrap());
    assert!(outputs(samples.into_iter()) == outputs(replayed));
}
