//! The spans of a live session: builds them from events and exports them over OTLP.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    time::Duration,
};

use anyhow::Context as _;

use super::{
    Failure,
    exit_code::{Outcome, print_stderr},
};
use crate::{
    collect::OutputStats,
    emit::{
        otlp::{Exporter, OtlpConfig},
        spans::{Host, Spans},
    },
    event::Event,
    target::Downward,
};

/// How long the agent waits at its end for queued spans to be delivered.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) struct Traces {
    spans: Spans,
    exporter: Exporter,
}

impl Traces {
    /// Exports to the endpoint of the command line, else of the environment, else of the configuration file; `None` if
    /// none is set.
    pub(super) fn start(flag: Option<&str>, file: Option<&str>) -> Outcome<Option<Self>> {
        let config = match OtlpConfig::from_env_and(flag).map_err(Failure::usage)? {
            None if file.is_some() => OtlpConfig::from_env_and(file)
                .context("invalid `otlp` in the configuration file")
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

    /// Queues the spans that these events complete for export.
    pub(super) fn export(&mut self, events: &[Event]) {
        for batch in events.iter().flat_map(|event| self.spans.take(event)) {
            self.exporter.send(batch);
        }
    }

    /// Adds the export counters and notices to the agent's report.
    pub(super) fn report(&self, outputs: &mut OutputStats) {
        let stats = self.exporter.stats();
        outputs.spans = stats.submitted;
        outputs.spans_delivered = stats.delivered;
        outputs.spans_dropped = stats.dropped() + stats.rejected + self.spans.orphans();
        outputs.notices.extend(self.exporter.notices());
    }

    /// Delivers the queued spans within [`FLUSH_TIMEOUT`] and reports what could not be delivered.
    pub(super) fn finish(self) {
        let summary = self.exporter.shutdown(FLUSH_TIMEOUT);
        if !summary.is_complete() {
            print_stderr(summary);
        }
    }
}

fn host() -> Host {
    let line = |path: &str| {
        fs::read_to_string(path).map_or_else(|_| String::new(), |text| text.trim().to_owned())
    };
    let downward = Downward::read();
    Host {
        id: line("/etc/machine-id"),
        name: line("/proc/sys/kernel/hostname"),
        ip: own_address()
            .unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
            .to_string(),
        node: downward.node.unwrap_or_default(),
        namespace: downward.namespace.unwrap_or_default(),
        pod: downward.pod.unwrap_or_default(),
    }
}

/// This host's source address for outgoing traffic. Connecting a UDP socket sends no packet; it only consults the routing
/// table. 192.0.2.1 is a documentation address (RFC 5737).
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}
