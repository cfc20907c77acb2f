//! The attributes of spans. Names are a closed list; unknown values are absent.

use opentelemetry::{KeyValue, Value};

use crate::{
    emit::cause,
    event::{CauseStretch, Episode, Hop, MeasuredKind, MeasuredWaits, Stretch, Verdict},
    queue::{Kind, QueueId, QueueKey, UnixEnd},
    text::bounded,
};

/// Longest untrusted attribute value, in bytes.
pub(super) const MAX_VALUE_BYTES: usize = 1024;
/// Longest untrusted attribute name, in bytes.
pub(super) const MAX_KEY_BYTES: usize = 128;

/// Collects attributes; an unknown value adds none.
#[derive(Default)]
pub struct Attributes(Vec<KeyValue>);

impl Attributes {
    pub fn into_vec(self) -> Vec<KeyValue> {
        self.0
    }

    pub fn text(mut self, key: &'static str, value: &str) -> Self {
        if !value.is_empty() {
            self.0
                .push(KeyValue::new(key, bounded(value, MAX_VALUE_BYTES)));
        }
        self
    }

    /// OTLP has no unsigned integers: values above `i64::MAX` become `i64::MAX`.
    pub fn count(self, key: &'static str, value: impl Into<Option<u64>>) -> Self {
        self.push(
            key,
            value.into().map(|n| i64::try_from(n).unwrap_or(i64::MAX)),
        )
    }

    pub fn ratio(self, key: &'static str, value: impl Into<Option<f64>>) -> Self {
        self.push(key, value.into().filter(|x| x.is_finite()))
    }

    fn push(mut self, key: &'static str, value: Option<impl Into<Value>>) -> Self {
        if let Some(value) = value {
            self.0.push(KeyValue::new(key, value));
        }
        self
    }

    /// The queue's kind and name, and its local or peer address if it has one. Unix sockets have a path for an address.
    pub fn queue(self, key: &QueueKey) -> Self {
        let transport = if key.kind == Kind::Udp { "udp" } else { "tcp" };
        let named = self
            .text("tailback.queue.kind", key.kind.name())
            .text("tailback.queue.name", key.name());
        match &key.id {
            QueueId::Local(at) => named
                .text("network.transport", transport)
                .text("network.local.address", &at.ip().to_string())
                .count("network.local.port", u64::from(at.port())),
            QueueId::Remote(at) => named
                .text("network.transport", transport)
                .text("network.peer.address", &at.ip().to_string())
                .count("network.peer.port", u64::from(at.port()))
                .text("server.address", &at.ip().to_string())
                .count("server.port", u64::from(at.port())),
            QueueId::UnixListener(path)
            | QueueId::UnixSockets {
                end: UnixEnd::Local(path),
                ..
            } => named
                .text("network.transport", "unix")
                .text("network.local.address", path),
            QueueId::UnixSockets {
                end: UnixEnd::Remote(path),
                ..
            } => named
                .text("network.transport", "unix")
                .text("network.peer.address", path),
            _ => named,
        }
    }

    /// All numbers of an episode.
    pub fn episode(self, episode: &Episode) -> Self {
        let numbers = self.numbers(episode);
        match &episode.verdict {
            Some(verdict) => numbers.verdict(verdict),
            None => numbers
                .text("tailback.evidence", &episode.evidence)
                .text("tailback.advice", &episode.advice),
        }
    }

    fn numbers(self, episode: &Episode) -> Self {
        self.queue(&episode.key)
            .text("tailback.episode.id", &episode.id)
            .text("tailback.queue.level.max", episode.level_max.name())
            .count("tailback.queue.depth.max", episode.depth_max)
            .count("tailback.queue.limit", episode.limit)
            .ratio("tailback.queue.score.max", episode.score_max)
            .count("tailback.wait.p50_ns", episode.wait_p50_ns)
            .count("tailback.wait.p99_ns", episode.wait_p99_ns)
            .count("tailback.wait.max_ns", episode.wait_max_ns)
            .count("tailback.arrivals", episode.arrivals)
            .count("tailback.departures", episode.departures)
            .ratio("tailback.arrival_rate", episode.arrival_rate)
            .ratio("tailback.service_rate", episode.service_rate)
            .time_to_full(episode.time_to_full_ns)
            .losses(episode.losses)
            .measured(&episode.measured_waits)
    }

    /// What hooks measured.
    fn measured(self, all: &[MeasuredWaits]) -> Self {
        all.iter().fold(self, |attributes, waits| {
            let attributes = match waits.kind {
                MeasuredKind::Cpu => attributes
                    .count("tailback.cpu_wait.count", waits.count)
                    .count("tailback.cpu_wait.mean_ns", waits.mean_ns)
                    .count("tailback.cpu_wait.p50_ns", waits.p50_ns)
                    .count("tailback.cpu_wait.p99_ns", waits.p99_ns)
                    .count("tailback.cpu_wait.max_ns", waits.max_ns),
                MeasuredKind::Io => attributes
                    .count("tailback.io_wait.count", waits.count)
                    .count("tailback.io_wait.mean_ns", waits.mean_ns)
                    .count("tailback.io_wait.p50_ns", waits.p50_ns)
                    .count("tailback.io_wait.p99_ns", waits.p99_ns)
                    .count("tailback.io_wait.max_ns", waits.max_ns),
            };
            match &waits.culprit {
                Some((culprit, culprit_ns)) => {
                    let name = format!("{} ({})", culprit.comm, culprit.tid);
                    attributes
                        .text("tailback.cpu_wait.culprit", &name)
                        .count("tailback.cpu_wait.culprit_ns", *culprit_ns)
                }
                None => attributes,
            }
        })
    }

    /// The cause, its evidence and the advice.
    fn verdict(self, verdict: &Verdict) -> Self {
        let culprit = verdict.culprit.as_ref().map(cause::culprit);
        self.text("tailback.cause", verdict.cause.name())
            .ratio("tailback.cause.share", verdict.share)
            .text("tailback.cause.culprit", culprit.as_deref().unwrap_or(""))
            .text("tailback.evidence", &verdict.evidence)
            .text("tailback.advice", &verdict.advice)
    }

    /// A stretch in which a cause held.
    pub fn cause(self, stretch: &CauseStretch) -> Self {
        self.queue(&stretch.key)
            .text("tailback.episode.id", &stretch.episode)
            .verdict(&stretch.verdict)
    }

    /// A service on the wait chain and its state. The queue belongs to another service, so it is not named.
    pub fn hop(self, stretch: &CauseStretch, hop: &Hop) -> Self {
        let culprit = stretch.verdict.culprit.as_ref().map(cause::culprit);
        self.text("tailback.episode.id", &stretch.episode)
            .text("tailback.cause", hop.cause.name())
            .text("tailback.cause.culprit", culprit.as_deref().unwrap_or(""))
            .text("tailback.evidence", &format!("{}: {}", hop.name, hop.state))
    }

    /// The attributes known when a queue leaves ok.
    pub fn onset(self, episode: &Episode) -> Self {
        self.queue(&episode.key)
            .text("tailback.episode.id", &episode.id)
            .count("tailback.queue.limit", episode.limit)
            .time_to_full(episode.time_to_full_ns)
    }

    /// The numbers of one stretch.
    pub fn stretch(self, stretch: &Stretch) -> Self {
        self.queue(&stretch.key)
            .text("tailback.episode.id", &stretch.episode)
            .text("tailback.queue.level.max", stretch.level.name())
            .count("tailback.queue.depth.max", stretch.depth_max)
            .count("tailback.queue.limit", stretch.limit)
            .ratio("tailback.queue.score.max", stretch.score_max)
            .count("tailback.wait.max_ns", stretch.wait_max_ns)
            .time_to_full(stretch.time_to_full_ns)
            .losses(stretch.losses)
    }

    pub fn time_to_full(self, ns: Option<u64>) -> Self {
        self.count("tailback.time_to_full_ms", ns.map(|ns| ns / 1_000_000))
    }

    /// The number of losses, even if zero, and `error.type` if there are any.
    fn losses(self, losses: u64) -> Self {
        let counted = self.count("tailback.losses", losses);
        if losses > 0 {
            counted.text("error.type", "work_lost")
        } else {
            counted
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: Kind, name: &str) -> Vec<(String, String)> {
        of_id(kind, name.into())
    }

    fn of_id(kind: Kind, id: QueueId) -> Vec<(String, String)> {
        let key = QueueKey::new(1, kind, id);
        let attributes = Attributes::default().queue(&key).into_vec();
        attributes
            .into_iter()
            .map(|kv| (kv.key.to_string(), kv.value.to_string()))
            .collect()
    }

    fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn a_listener_is_the_local_end() {
        let expected = [
            ("tailback.queue.kind", "accept"),
            ("tailback.queue.name", "[::1]:8080"),
            ("network.transport", "tcp"),
            ("network.local.address", "::1"),
            ("network.local.port", "8080"),
        ];
        assert_eq!(of(Kind::Accept, "[::1]:8080"), pairs(&expected));
    }

    #[test]
    fn a_remote_endpoint_is_the_peer_and_the_server() {
        let expected = [
            ("tailback.queue.kind", "send"),
            ("tailback.queue.name", "-> 10.0.0.5:6379"),
            ("network.transport", "tcp"),
            ("network.peer.address", "10.0.0.5"),
            ("network.peer.port", "6379"),
            ("server.address", "10.0.0.5"),
            ("server.port", "6379"),
        ];
        assert_eq!(of(Kind::Send, "-> 10.0.0.5:6379"), pairs(&expected));
    }

    #[test]
    fn the_transport_is_that_of_the_queue() {
        let expected = [
            ("tailback.queue.kind", "udp"),
            ("tailback.queue.name", "0.0.0.0:53"),
            ("network.transport", "udp"),
            ("network.local.address", "0.0.0.0"),
            ("network.local.port", "53"),
        ];
        assert_eq!(of(Kind::Udp, "0.0.0.0:53"), pairs(&expected));
        let remote = of(Kind::Udp, "-> 10.0.0.5:53");
        assert!(remote.contains(&pairs(&[("network.transport", "udp")])[0]));

        let expected = [
            ("tailback.queue.kind", "accept"),
            ("tailback.queue.name", "/run/app.sock"),
            ("network.transport", "unix"),
            ("network.local.address", "/run/app.sock"),
        ];
        let listener = QueueId::UnixListener("/run/app.sock".into());
        assert_eq!(of_id(Kind::Accept, listener), pairs(&expected));
        let expected = [
            ("tailback.queue.kind", "unix"),
            ("tailback.queue.name", "-> /run/log sent"),
            ("network.transport", "unix"),
            ("network.peer.address", "/run/log"),
        ];
        let sent = QueueId::UnixSockets {
            end: UnixEnd::Remote("/run/log".into()),
            sent: true,
        };
        assert_eq!(of_id(Kind::Unix, sent), pairs(&expected));
    }

    #[test]
    fn an_identity_without_an_address_has_no_network_attributes() {
        for name in ["fd 1", "", "pipe:[4711]", "node/11", "0x7f00 of 11", ":80"] {
            assert!(of(Kind::Pipe, name).len() <= 2, "{name:?}");
        }
    }

    #[test]
    fn numbers_that_otlp_cannot_represent_are_clamped_or_absent() {
        let attributes = Attributes::default()
            .count("tailback.arrivals", u64::MAX)
            .ratio("tailback.arrival_rate", f64::NAN)
            .ratio("tailback.service_rate", None)
            .into_vec();
        assert_eq!(attributes, [KeyValue::new("tailback.arrivals", i64::MAX)]);
    }
}
