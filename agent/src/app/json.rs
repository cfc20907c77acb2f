//! JSON, flattened: a number at `.a.b` is the value `a.b`. The elements of an array share its name. If an element has a
//! text `name`, that text becomes a label, which is named after the array: `streams.messages{streams="ORDERS"}`. Other
//! texts become labels where a row says so.
//!
//! Nothing is built in memory but the values that are wanted, however large the document.

use std::{collections::BTreeMap, fmt};

use anyhow::{Context as _, Result};
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::series::{Names, Series, SeriesSet};

/// Longest path of a value, bytes. Wanted ones are shorter.
const MAX_PATH_BYTES: usize = 512;

/// The values in `names`, each with `prefix` before its path. `renamed`: labels of arrays with other names. `labels`: keys whose texts
/// are labels of the values in the same object, `KEY` or `KEY=LABEL`.
pub fn parse(
    text: &str,
    prefix: &str,
    renamed: &BTreeMap<String, String>,
    labels: &[String],
    names: &Names,
) -> Result<SeriesSet> {
    let mut out = SeriesSet::default();
    let mut reader = serde_json::Deserializer::from_str(text);
    let place = Place {
        path: prefix.to_owned(),
        array: None,
    };
    let flatten = Flatten {
        place: &place,
        renamed,
        labels,
        names,
        out: &mut out,
    };
    flatten
        .deserialize(&mut reader)
        .and_then(|_| reader.end())
        .context("invalid JSON")?;
    Ok(out)
}

/// Where in the document a value is.
struct Place {
    path: String,
    /// Name of the array that the value is an element of.
    array: Option<String>,
}

struct Flatten<'a> {
    place: &'a Place,
    renamed: &'a BTreeMap<String, String>,
    labels: &'a [String],
    names: &'a Names,
    out: &'a mut SeriesSet,
}

impl Flatten<'_> {
    fn put(self, value: f64) {
        if self.names.contains(&self.place.path) {
            self.out.push(Series {
                name: self.place.path.clone(),
                labels: Vec::new(),
                value,
            });
        }
    }
}

/// Returns the text, if the value is one: it may be the name of the object around it.
impl<'de> DeserializeSeed<'de> for Flatten<'_> {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Flatten<'_> {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Self::Value, E> {
        self.put(f64::from(u8::from(value)));
        Ok(None)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Self::Value, E> {
        self.put(value as f64);
        Ok(None)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Self::Value, E> {
        self.put(value as f64);
        Ok(None)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Self::Value, E> {
        self.put(value);
        Ok(None)
    }

    /// A time is a number of seconds since 1970.
    fn visit_str<E: Error>(self, value: &str) -> Result<Self::Value, E> {
        if let Some(seconds) = seconds_of_time(value) {
            self.put(seconds);
        }
        Ok(Some(value.to_owned()))
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Self::Value, A::Error> {
        let name = self.place.path.rsplit('.').next().unwrap_or_default();
        let place = Place {
            path: self.place.path.clone(),
            array: Some(name.to_owned()),
        };
        loop {
            let element = Flatten {
                place: &place,
                renamed: self.renamed,
                labels: self.labels,
                names: self.names,
                out: &mut *self.out,
            };
            if elements.next_element_seed(element)?.is_none() {
                return Ok(None);
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let first = self.out.all.len();
        let mut own_name = None;
        let mut texts = Vec::new();
        while let Some(key) = entries.next_key::<String>()? {
            let path = &self.place.path;
            let dot = if path.is_empty() || path.ends_with('.') {
                ""
            } else {
                "."
            };
            let mut path = format!("{path}{dot}{key}");
            path.truncate(path.floor_char_boundary(MAX_PATH_BYTES));
            let place = Place { path, array: None };
            let text = entries.next_value_seed(Flatten {
                place: &place,
                renamed: self.renamed,
                labels: self.labels,
                names: self.names,
                out: &mut *self.out,
            })?;
            let Some(text) = text else {
                continue;
            };
            let names =
                |label: &String| label.split_once('=').map_or(&**label, |(key, _)| key) == key;
            if let Some(label) = self.labels.iter().find(|label| names(label)) {
                let label = label.split_once('=').map_or(&**label, |(_, label)| label);
                // A key that is repeated, against the rules, would cost as much as all values of the object each time.
                if texts.iter().all(|(known, _)| *known != label) {
                    texts.push((label, text.clone()));
                }
            }
            if key == "name" {
                own_name = Some(text);
            }
        }
        for (label, text) in texts {
            for series in self.out.all.iter_mut().skip(first) {
                series.add_label(label, &text);
            }
        }
        if let (Some(array), Some(own_name)) = (&self.place.array, own_name) {
            let label = self.renamed.get(array).unwrap_or(array);
            for series in self.out.all.iter_mut().skip(first) {
                series.add_label(label, &own_name);
            }
        }
        Ok(None)
    }
}

/// Seconds since 1970 of a time such as `2026-11-30T20:00:00.5Z`.
pub fn seconds_of_time(text: &str) -> Option<f64> {
    // Shorter than any time, or longer than any: not worth parsing.
    if !(20..=35).contains(&text.len()) {
        return None;
    }
    let time = humantime::parse_rfc3339(text).ok()?;
    let since = time.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str, names: &[&str]) -> SeriesSet {
        let names = Names::new(names.iter().map(|name| (*name).to_owned()));
        let renamed = BTreeMap::from([("stream_detail".to_owned(), "stream".to_owned())]);
        let labels = ["priority".to_owned(), "zone=region".to_owned()];
        parse(text, "", &renamed, &labels, &names).unwrap()
    }

    #[test]
    fn elements_of_arrays_are_labelled_by_their_names() {
        let text = r#"{"account_details": [{"name": "$G", "stream_detail": [
            {"state": {"messages": 7, "first_ts": "1970-01-01T00:00:09.5Z"}, "name": "ORDERS"},
            {"name": "MAIL", "state": {"messages": 8}}, {"state": {"messages": 9}}]}], "other": [1, 2]}"#;
        let messages = "account_details.stream_detail.state.messages";
        let first = "account_details.stream_detail.state.first_ts";
        let set = parsed(text, &[messages, first]);
        let labels: Vec<_> = set
            .all
            .iter()
            .map(|series| series.label("stream"))
            .collect();
        assert_eq!(labels, [Some("ORDERS"), Some("ORDERS"), Some("MAIL"), None]);
        assert_eq!(set.all[0].label("account_details"), Some("$G"));
        assert_eq!((set.all[0].value, set.all[1].value), (7.0, 9.5));
    }

    #[test]
    fn texts_of_an_object_are_labels_where_a_row_says_so() {
        let text = r#"{"zone": "eu", "limits": [{"max": 1}, {"priority": "HIGH", "max": 2}, {"max": 3, "priority": 4}]}"#;
        let set = parsed(text, &["limits.max"]);
        let priorities: Vec<_> = set
            .all
            .iter()
            .map(|series| series.label("priority"))
            .collect();
        assert_eq!(priorities, [None, Some("HIGH"), None]);
        assert!(
            set.all
                .iter()
                .all(|series| series.label("region") == Some("eu"))
        );
    }

    #[test]
    fn a_label_that_is_repeated_costs_no_more_than_one() {
        let values = "\"max\":1,".repeat(16_384);
        let labels = "\"priority\":\"\",".repeat(60_000);
        let text = format!("{{{values}{labels}\"end\":0}}");
        assert!(text.len() <= crate::app::transport::MAX_ANSWER_BYTES);
        // Work for each value and each label would take minutes.
        let began = std::time::Instant::now();
        assert_eq!(parsed(&text, &["max"]).all.len(), 16_384);
        assert!(began.elapsed() < std::time::Duration::from_secs(20));
    }

    #[test]
    fn what_is_no_document_is_an_error() {
        let names = Names::default();
        for text in ["", "{", "{\"a\":}", "[1,2", "{} {}", &"[".repeat(100_000)] {
            assert!(parse(text, "", &BTreeMap::new(), &[], &names).is_err());
        }
    }

    #[test]
    fn a_large_document_leaves_only_what_is_wanted() {
        let text = format!("[{}1]", "1,".repeat(400_000));
        assert_eq!(parsed(&text, &["a"]).all.len(), 0);
    }
}
