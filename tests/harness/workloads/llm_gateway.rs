//! A gateway in front of a provider whose answers are long streams, with a bounded pool of connections to it.
//!
//! Callers are accepted at once and wait inside: what fills is not the accept queue.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};

use super::Uvicorn;
use crate::temp::TempDir;

/// Two uvicorns, one behind the other.
pub struct LlmGateway {
    pub gateway: Uvicorn,
    pub provider: Uvicorn,
    slow: TempDir,
}

impl LlmGateway {
    /// What a caller asks for.
    pub const PATH: &str = "/chat";
    /// To the first word of an answer, and to its end.
    pub const FIRST_WORD: Duration = Duration::from_millis(50);
    pub const ANSWER: Duration = Duration::from_millis(250);

    /// With a pool of so many connections.
    pub fn start(pool: u32) -> Result<Self> {
        let slow = TempDir::new("slow")?;
        let file = slow.path().join("ms").display().to_string();
        let text = include_str!("apps/provider.py");
        let provider = Uvicorn::start("provider", text, &[("PROVIDER_SLOW", file)])?;
        let env = [
            ("GATEWAY_PROVIDER", provider.port.to_string()),
            ("GATEWAY_POOL", pool.to_string()),
        ];
        let gateway = Uvicorn::start("gateway", include_str!("apps/gateway.py"), &env)?;
        Ok(Self {
            gateway,
            provider,
            slow,
        })
    }

    /// From the next request on the provider takes so long to its first word.
    pub fn slow_provider(&self, first_word: Duration) -> Result<()> {
        // Renamed into place: the provider never reads half of it.
        let ms = first_word.as_millis().to_string();
        let new = self.slow.write("ms.new", &ms)?;
        let file = self.slow.path().join("ms");
        fs::rename(&new, &file).with_context(|| format!("write {}", file.display()))
    }

    pub fn restore_provider(&self) -> Result<()> {
        let file = self.slow.path().join("ms");
        fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))
    }
}
