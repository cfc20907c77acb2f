//! The spans of a live session: made from its events, and delivered.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    time::Duration,
};

use anyhow::Context as _;

use super::{
    Failure,
    exit_code::{Outcome, say},
};
use crate::{
    collect::Others,
    emit::{
        otlp::{Exporter, OtlpConfig},
        spans::{Host, Spans},
    },
    event::Event,
};

/// What is still to be delivered when we are asked to stop gets this long.
const FLUSH: Duration = Duration::from_secs(5);

pub(super) struct Traces {
    spans: Spans,
    exporter: Exporter,
}

impl Traces {
    /// Delivers to the endpoint of the command line, else of the environment, else of the configuration file; to none
    /// where none is named.
    pub(super) fn start(flag: Option<&str>, file: Option<&str>) -> Outcome<Option<Self>> {
        let config = match OtlpConfig::from_env_and(flag).map_err(Failure::usage)? {
            None if file.is_some() => OtlpConfig::from_env_and(file)
                .context("`otlp` in the configuration file cannot be used")
                .map_err(Failure::usage)?,
            config => config,
        };
        let Some(config) = config else {
            return Ok(None);
        };
        let exporter = Exporter::start(&config).map_err(Failure::usage)?;
        Ok(Some(Self {
            spans: Spans::new(host()),
            exporter,
        }))
    }

    /// Hands over the spans that these events complete.
    pub(super) fn tell(&mut self, events: &[Event]) {
        for batch in events.iter().flat_map(|event| self.spans.take(event)) {
            self.exporter.send(batch);
        }
    }

    /// What became of the spans so far, for the agent's report.
    pub(super) fn report(&self, others: &mut Others) {
        let stats = self.exporter.stats();
        others.spans = stats.handed;
        others.spans_delivered = stats.delivered;
        others.spans_dropped = stats.dropped() + stats.rejected + self.spans.strays();
        others.notices.extend(self.exporter.notices());
    }

    /// Delivers what waits, for a few seconds at most; says so where something is left.
    pub(super) fn finish(self) {
        let summary = self.exporter.shutdown(FLUSH);
        if !summary.is_complete() {
            say(summary);
        }
    }
}

fn host() -> Host {
    let line = |path: &str| {
        fs::read_to_string(path).map_or_else(|_| String::new(), |text| text.trim().to_owned())
    };
    Host {
        id: line("/etc/machine-id"),
        name: line("/proc/sys/kernel/hostname"),
        ip: own_address()
            .unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
            .to_string(),
    }
}

/// The address from which this host would speak to others. Connecting a UDP socket sends nothing: it asks the routing table.
/// (192.0.2.1 is an address of documentation, RFC 5737.)
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}
