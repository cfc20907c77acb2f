//! What every protocol's answer is turned into: named values with labels, as in a Prometheus exposition.

use std::{collections::BTreeSet, net::SocketAddr};

/// Maximum number of values that are kept of one answer: as many as an exposition of 1 MiB has lines of 64 bytes.
pub const MAX_SERIES: usize = 16_384;
/// Maximum number of labels of one value.
const MAX_LABELS: usize = 32;
/// Maximum number of addresses that are kept of one answer.
const MAX_ADDRESSES: usize = 4_096;
/// Longest value of a label that is kept, bytes: the longest name of a queue in AMQP. With the other limits it bounds the memory.
const MAX_LABEL_BYTES: usize = 256;

/// One value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    pub name: String,
    /// In the order of the answer.
    pub labels: Vec<(String, String)>,
    pub value: f64,
}

impl Series {
    pub fn label(&self, name: &str) -> Option<&str> {
        let mut labels = self.labels.iter();
        labels.find_map(|(known, value)| (known == name).then_some(value.as_str()))
    }

    /// Adds a label, within the bounds.
    pub fn add_label(&mut self, name: &str, value: &str) {
        if self.labels.len() < MAX_LABELS && self.label(name).is_none() {
            let end = value.floor_char_boundary(MAX_LABEL_BYTES);
            self.labels.push((name.to_owned(), value[..end].to_owned()));
        }
    }
}

/// The names that a preset uses. Other values of an answer are skipped.
#[derive(Clone, Debug, Default)]
pub struct Names(BTreeSet<String>);

impl Names {
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self(names.into_iter().collect())
    }

    pub fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}

/// The values of one answer.
#[derive(Clone, Debug, Default)]
pub struct SeriesSet {
    pub all: Vec<Series>,
    /// Clients of the service that take items from a queue, or servers to which it sends them: with the labels of the queue, and the
    /// address that the service sees.
    pub addresses: Vec<(Series, SocketAddr)>,
    /// Values beyond [`MAX_SERIES`].
    pub left_out: usize,
    /// Lines, or other parts of the answer, that could not be understood.
    pub malformed: usize,
}

impl SeriesSet {
    /// Adds a value. Infinite ones and NaN are no numbers of items.
    pub fn push(&mut self, series: Series) {
        if !series.value.is_finite() {
            self.malformed += 1;
        } else if self.all.len() < MAX_SERIES {
            self.all.push(series);
        } else {
            self.left_out += 1;
        }
    }

    /// Adds the address of a client or of a server.
    pub fn push_address(&mut self, queue: Series, address: SocketAddr) {
        if self.addresses.len() < MAX_ADDRESSES {
            self.addresses.push((queue, address));
        }
    }

    pub fn append(&mut self, other: Self) {
        self.malformed += other.malformed;
        for (queue, address) in other.addresses {
            self.push_address(queue, address);
        }
        self.left_out += other.left_out;
        for series in other.all {
            self.push(series);
        }
    }

    pub fn has(&self, name: &str) -> bool {
        self.all.iter().any(|series| series.name == name)
    }
}
