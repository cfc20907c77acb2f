//! The numbers of a row: which values of an answer make them up.

use std::fmt;

use anyhow::{Context as _, Result, ensure};
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer},
};

use crate::app::series::Series;

/// A number: a value of the answer, the sum of several, the first of several that the answer has, or the value of an option of the
/// process.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Sum(Vec<Metric>),
    First(Vec<Self>),
    Option(Vec<String>),
}

impl Value {
    /// The names of the values of an answer that it may use.
    pub fn names(&self) -> Vec<&str> {
        match self {
            Self::Sum(metrics) => metrics.iter().map(|metric| &*metric.name).collect(),
            Self::First(values) => values.iter().flat_map(Self::names).collect(),
            Self::Option(_) => Vec::new(),
        }
    }
}

/// Values of an answer: a name, and labels that they must have, or must not have. `waiting{state=ready,priority!=high}`
#[derive(Clone, Debug, PartialEq)]
pub struct Metric {
    pub name: String,
    labels: Vec<Condition>,
}

/// A label that must have this text, or must not.
#[derive(Clone, Debug, PartialEq)]
struct Condition {
    label: String,
    text: String,
    is_equal: bool,
}

/// A time, as the sum of what is given, or as the difference from a moment.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Time {
    #[serde(default)]
    pub seconds: Option<Value>,
    #[serde(default)]
    pub milliseconds: Option<Value>,
    #[serde(default)]
    pub microseconds: Option<Value>,
    /// Seconds since 1970.
    #[serde(default)]
    pub since_seconds: Option<Value>,
    #[serde(default)]
    pub since_milliseconds: Option<Value>,
}

impl Metric {
    fn parse(text: &str) -> Result<Self> {
        let (name, labels) = match text.split_once('{') {
            None => (text, ""),
            Some((name, rest)) => (name, rest.strip_suffix('}').context("a `{` is not closed")?),
        };
        ensure!(
            !name.is_empty() && !name.contains(char::is_whitespace),
            "the name of a value is empty, or has a space"
        );
        let labels = labels.split(',').filter(|label| !label.is_empty());
        let labels = labels.map(|label| {
            let (label, text) = label.split_once('=').context("a label has no `=`")?;
            let unequal = label.strip_suffix('!');
            Ok(Condition {
                label: unequal.unwrap_or(label).trim().to_owned(),
                text: text.trim().trim_matches('"').to_owned(),
                is_equal: unequal.is_none(),
            })
        });
        Ok(Self {
            name: name.to_owned(),
            labels: labels.collect::<Result<_>>()?,
        })
    }

    pub fn matches(&self, series: &Series) -> bool {
        let holds = |condition: &Condition| {
            let is_equal = series.label(&condition.label) == Some(condition.text.as_str());
            is_equal == condition.is_equal
        };
        self.name == series.name && self.labels.iter().all(holds)
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Other {
            #[serde(default)]
            option: Vec<String>,
            #[serde(default)]
            first: Vec<Value>,
        }
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a value, a list of names, { first = [\"name\", \"name\"] }, or { option = [\"--name\"] }")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Value, E> {
                let metric = Metric::parse(text)
                    .map_err(|error| E::custom(format!("{text:?}: {error:#}")))?;
                Ok(Value::Sum(vec![metric]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut texts: A) -> Result<Value, A::Error> {
                let mut metrics = Vec::new();
                while let Some(text) = texts.next_element::<String>()? {
                    let metric = Metric::parse(&text);
                    metrics.push(
                        metric
                            .map_err(|error| de::Error::custom(format!("{text:?}: {error:#}")))?,
                    );
                }
                if metrics.is_empty() {
                    return Err(de::Error::invalid_length(0, &self));
                }
                Ok(Value::Sum(metrics))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Value, A::Error> {
                let Other { option, first } = Other::deserialize(MapAccessDeserializer::new(map))?;
                match (option.is_empty(), first.is_empty()) {
                    (false, true) => Ok(Value::Option(option)),
                    (true, false) => Ok(Value::First(first)),
                    _ => Err(de::Error::custom("give one of `option` and `first`")),
                }
            }
        }
        deserializer.deserialize_any(Text)
    }
}
