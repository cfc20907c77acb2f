//! The result of one check, as `tailback-cluster` prints it for `cargo xtask test --cluster`: a line of JSON.

use serde_json::{Value, json};

/// One check.
#[derive(Debug, PartialEq)]
pub struct Checked {
    pub name: String,
    pub took_s: f64,
    /// Why it failed.
    pub failure: Option<String>,
}

impl Checked {
    pub fn to_json(&self) -> String {
        let Self {
            name,
            took_s,
            failure,
        } = self;
        json!({"check": name, "took_s": took_s, "failure": failure}).to_string()
    }

    /// `None` if the line is something else.
    pub fn from_json(line: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(line).ok()?;
        Some(Self {
            name: value["check"].as_str()?.to_owned(),
            took_s: value["took_s"].as_f64()?,
            failure: value["failure"].as_str().map(str::to_owned),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_read_as_it_was_written() {
        for failure in [None, Some("no page\nat all".to_owned())] {
            let checked = Checked {
                name: "a_pod_reads_its_page".to_owned(),
                took_s: 1.5,
                failure,
            };
            assert_eq!(Checked::from_json(&checked.to_json()), Some(checked));
        }
        assert_eq!(Checked::from_json("{}"), None);
    }
}
