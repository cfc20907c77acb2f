//! Metric families, and the two formats in which Prometheus reads them: text, and the protobuf messages of its client model
//! (`io.prometheus.client`), which also carry native histograms and exemplars.

#![forbid(unsafe_code)]

use std::fmt::Write as _;

use prost_types::Timestamp;

/// The media type of the text format.
pub const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// The media type of the protobuf format: messages, each after its length.
pub const PROTOBUF: &str =
    "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited";

/// Metric families in their order.
#[derive(Debug, Default)]
pub struct Exposition(Vec<MetricFamily>);

impl Exposition {
    /// A new family, to add metrics to.
    pub fn family(&mut self, name: &str, kind: Type, help: &str) -> &mut MetricFamily {
        self.0.push(MetricFamily {
            name: name.to_owned(),
            help: help.to_owned(),
            r#type: kind.into(),
            metric: Vec::new(),
        });
        let last = self.0.len() - 1;
        &mut self.0[last]
    }

    /// A family with a single value.
    pub fn one(&mut self, name: &str, kind: Type, help: &str, value: f64) {
        self.family(name, kind, help).add(&[], value);
    }

    pub fn text(&self) -> String {
        let mut text = String::new();
        for family in &self.0 {
            family.write(&mut text);
        }
        text
    }

    pub fn protobuf(&self) -> Vec<u8> {
        let of_metrics = self.0.iter().filter(|family| !family.metric.is_empty());
        of_metrics
            .flat_map(prost::Message::encode_length_delimited_to_vec)
            .collect()
    }
}

/// Metrics of one name.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MetricFamily {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    help: String,
    #[prost(enumeration = "Type", tag = "3")]
    r#type: i32,
    #[prost(message, repeated, tag = "4")]
    metric: Vec<Metric>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
pub enum Type {
    Counter = 0,
    Gauge = 1,
    Histogram = 4,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Metric {
    #[prost(message, repeated, tag = "1")]
    label: Vec<LabelPair>,
    #[prost(message, optional, tag = "2")]
    gauge: Option<Value>,
    #[prost(message, optional, tag = "3")]
    counter: Option<Value>,
    #[prost(message, optional, boxed, tag = "7")]
    histogram: Option<Box<Histogram>>,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LabelPair {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub value: String,
}

/// The value of a gauge or a counter.
#[derive(Clone, Copy, PartialEq, prost::Message)]
struct Value {
    #[prost(double, tag = "1")]
    value: f64,
}

/// Values in buckets with fixed bounds, and in those of a native histogram.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Histogram {
    #[prost(uint64, tag = "1")]
    pub sample_count: u64,
    #[prost(double, tag = "2")]
    pub sample_sum: f64,
    #[prost(message, repeated, tag = "3")]
    pub bucket: Vec<Bucket>,
    /// Each power of two is split into 2 to the power of this many buckets.
    #[prost(sint32, tag = "5")]
    pub schema: i32,
    #[prost(double, tag = "6")]
    pub zero_threshold: f64,
    #[prost(uint64, tag = "7")]
    pub zero_count: u64,
    #[prost(message, repeated, tag = "12")]
    pub positive_span: Vec<BucketSpan>,
    /// The counts of the buckets in the spans, each as the difference to the one before.
    #[prost(sint64, repeated, tag = "13")]
    pub positive_delta: Vec<i64>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Bucket {
    #[prost(uint64, tag = "1")]
    pub cumulative_count: u64,
    #[prost(double, tag = "2")]
    pub upper_bound: f64,
    #[prost(message, optional, tag = "3")]
    pub exemplar: Option<Exemplar>,
}

/// Buckets in a row.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct BucketSpan {
    /// Empty buckets before it: since the previous span, or of the first span its index.
    #[prost(sint32, tag = "1")]
    pub offset: i32,
    #[prost(uint32, tag = "2")]
    pub length: u32,
}

/// One of the values in a bucket.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Exemplar {
    #[prost(message, repeated, tag = "1")]
    pub label: Vec<LabelPair>,
    #[prost(double, tag = "2")]
    pub value: f64,
    #[prost(message, optional, tag = "3")]
    pub timestamp: Option<Timestamp>,
}

pub fn label_pairs(labels: &[(&str, &str)]) -> Vec<LabelPair> {
    let pair = |(name, value): &(&str, &str)| LabelPair {
        name: (*name).to_owned(),
        value: (*value).to_owned(),
    };
    labels.iter().map(pair).collect()
}

impl MetricFamily {
    pub fn add(&mut self, labels: &[(&str, &str)], value: f64) {
        let value = Some(Value { value });
        let is_counter = self.r#type() == Type::Counter;
        self.metric.push(Metric {
            label: label_pairs(labels),
            gauge: value.filter(|_| !is_counter),
            counter: value.filter(|_| is_counter),
            histogram: None,
        });
    }

    pub fn add_histogram(&mut self, labels: &[(&str, &str)], histogram: Histogram) {
        self.metric.push(Metric {
            label: label_pairs(labels),
            histogram: Some(Box::new(histogram)),
            ..Metric::default()
        });
    }

    fn write(&self, text: &mut String) {
        let kind = match self.r#type() {
            Type::Counter => "counter",
            Type::Gauge => "gauge",
            Type::Histogram => "histogram",
        };
        let (name, help) = (&self.name, &self.help);
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for metric in &self.metric {
            let labels = metric.labels();
            let in_braces = if labels.is_empty() {
                String::new()
            } else {
                format!("{{{labels}}}")
            };
            if let Some(Value { value }) = metric.gauge.or(metric.counter) {
                let _ = writeln!(text, "{name}{in_braces} {value}");
            }
            if let Some(histogram) = &metric.histogram {
                for bucket in &histogram.bucket {
                    let (bound, count) = (bound(bucket.upper_bound), bucket.cumulative_count);
                    let comma = if labels.is_empty() { "" } else { "," };
                    let _ = writeln!(
                        text,
                        "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {count}"
                    );
                }
                let _ = writeln!(text, "{name}_sum{in_braces} {}", histogram.sample_sum);
                let _ = writeln!(text, "{name}_count{in_braces} {}", histogram.sample_count);
            }
        }
    }
}

impl Metric {
    fn labels(&self) -> String {
        let labels = self.label.iter();
        let labels = labels.map(|label| format!("{}=\"{}\"", label.name, escaped(&label.value)));
        labels.collect::<Vec<_>>().join(",")
    }
}

fn bound(bound: f64) -> String {
    if bound.is_infinite() {
        "+Inf".to_owned()
    } else {
        bound.to_string()
    }
}

/// Escapes a label value for the text format.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    fn exposition() -> Exposition {
        let mut all = Exposition::default();
        all.one("up", Type::Gauge, "Whether it runs.", 1.0);
        let runs = all.family("runs_total", Type::Counter, "Runs.");
        runs.add(&[("of", "a \"b\"\\\n"), ("at", "c")], 0.5);
        let waits = all.family("wait_seconds", Type::Histogram, "Waits.");
        let bucket = |upper_bound, cumulative_count| Bucket {
            cumulative_count,
            upper_bound,
            exemplar: None,
        };
        waits.add_histogram(
            &[("of", "a")],
            Histogram {
                sample_count: 3,
                sample_sum: 1.5,
                bucket: vec![bucket(0.001, 2), bucket(f64::INFINITY, 3)],
                ..Histogram::default()
            },
        );
        all.family("none", Type::Gauge, "Nothing.");
        all
    }

    #[test]
    fn the_text_has_every_family_with_its_labels_escaped() {
        let text = exposition().text();
        let expected = "# HELP up Whether it runs.\n# TYPE up gauge\nup 1\n\
            # HELP runs_total Runs.\n# TYPE runs_total counter\n\
            runs_total{of=\"a \\\"b\\\"\\\\\\n\",at=\"c\"} 0.5\n\
            # HELP wait_seconds Waits.\n# TYPE wait_seconds histogram\n\
            wait_seconds_bucket{of=\"a\",le=\"0.001\"} 2\nwait_seconds_bucket{of=\"a\",le=\"+Inf\"} 3\n\
            wait_seconds_sum{of=\"a\"} 1.5\nwait_seconds_count{of=\"a\"} 3\n\
            # HELP none Nothing.\n# TYPE none gauge\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn the_messages_of_two_expositions_can_be_read_one_after_the_other() {
        let mut bytes = exposition().protobuf();
        bytes.extend(exposition().protobuf());
        let mut rest = bytes.as_slice();
        let mut names = Vec::new();
        while !rest.is_empty() {
            let family = MetricFamily::decode_length_delimited(&mut rest).unwrap();
            assert_eq!(
                family.metric.len(),
                1,
                "families without metrics are left out"
            );
            names.push(family.name);
        }
        let once = ["up", "runs_total", "wait_seconds"];
        assert_eq!(names, [once, once].concat());
    }
}
