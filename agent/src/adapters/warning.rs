//! Consumers that cannot act on the signal, for `tailback status` and `tailback doctor`.

use std::fmt::Debug;

use serde_json::{Value, json};

/// A fault in the setup of an adapter or its consumer. The adapter fails open in spite of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    pub code: &'static str,
    /// What is wrong, and its effect.
    pub text: String,
    pub remedy: String,
}

impl Warning {
    pub fn new(code: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
            remedy: remedy.into(),
        }
    }

    pub fn to_json(&self) -> Value {
        json!({"code": self.code, "text": self.text, "remedy": self.remedy})
    }
}

/// What an adapter knows about its consumers.
pub trait Consumers: Debug + Send + Sync {
    /// Adds it to the status of the adapter, which is a JSON object.
    fn describe(&self, status: &mut Value);

    fn warnings(&self) -> Vec<Warning>;
}
