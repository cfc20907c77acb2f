//! A gateway in front of a provider with long streamed responses, over a bounded pool of connections.
//!
//! The gateway accepts clients at once and lets them wait inside, so the accept queue does not fill.

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
    /// Path of a request.
    pub const PATH: &str = "/chat";
    /// Healthy time to the first word of a response.
    pub const FIRST_WORD: Duration = Duration::from_millis(50);
    /// Healthy time to the end of a response.
    pub const RESPONSE: Duration = Duration::from_millis(250);

    /// Starts both, with a pool of this many connections.
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

    /// Plants the fault: from the next request on, the provider takes this time to its first word.
    pub fn slow_provider(&self, first_word: Duration) -> Result<()> {
        // Renamed into place, so that the provider never reads a partial file.
        let ms = first_word.as_millis().to_string();
        let new = self.slow.write("ms.new", &ms)?;
        let file = self.slow.path().join("ms");
        fs::rename(&new, &file).with_context(|| format!("write {}", file.display()))
    }

    /// Removes the fault.
    pub fn restore_provider(&self) -> Result<()> {
        let file = self.slow.path().join("ms");
        fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))
    }
}
