//! Deterministic ids: a replay creates the same ids, and two agents derive the same id for one connection.

use opentelemetry::trace::{SpanId, TraceId};
use sha2::{Digest, Sha256};

/// Version prefix of every hash, so that a later rule can differ.
const RULE: &str = "tailback1";

/// The trace id of an incident: the incident's id if it is 32 hexadecimal digits, as it should be, else a hash of it.
pub fn trace_id(incident: &str) -> TraceId {
    match TraceId::from_hex(incident) {
        Ok(id) if incident.len() == 32 && id != TraceId::INVALID => id,
        _ => {
            let hash = hash(&["trace", incident]);
            let mut bytes = [0; 16];
            bytes.copy_from_slice(&hash[..16]);
            TraceId::from_bytes(never_zero(bytes))
        }
    }
}

/// The first 8 bytes of an unkeyed hash over the rule and `parts`; never zero, which is invalid in OTLP.
pub fn span_id(parts: &[&str]) -> SpanId {
    let hash = hash(parts);
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash[..8]);
    SpanId::from_bytes(never_zero(bytes))
}

/// Hashes each part with its length, so that ("ab", "c") and ("a", "bc") differ.
fn hash(parts: &[&str]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for part in [RULE].iter().chain(parts) {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().into()
}

fn never_zero<const N: usize>(mut bytes: [u8; N]) -> [u8; N] {
    if bytes == [0; N] {
        bytes[N - 1] = 1;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_incident_id_is_the_trace_id() {
        let id = "0af7651916cd43dd8448eb211c80319c";
        assert_eq!(trace_id(id).to_string(), id);
    }

    #[test]
    fn an_unexpected_incident_id_still_gives_a_valid_trace_id() {
        for id in [
            "",
            "7",
            "00000000000000000000000000000000",
            "not hexadecimal",
            "+af7651916cd43dd8448eb211c80319c",
        ] {
            assert_ne!(trace_id(id), TraceId::INVALID, "{id:?}");
            assert_eq!(trace_id(id), trace_id(id));
        }
        assert_ne!(trace_id("a"), trace_id("b"));
    }

    #[test]
    fn span_ids_depend_on_each_part() {
        assert_eq!(span_id(&["e1", "onset"]), span_id(&["e1", "onset"]));
        assert_ne!(span_id(&["e1", "onset"]), span_id(&["e2", "onset"]));
        assert_ne!(
            span_id(&["e1", "level", "1"]),
            span_id(&["e1", "level", "2"])
        );
        assert_ne!(span_id(&["ab", "c"]), span_id(&["a", "bc"]));
    }

    #[test]
    fn span_ids_do_not_change_between_versions_of_the_agent() {
        // Agents of different versions may watch the two ends of a connection.
        assert_eq!(span_id(&["e1", "onset"]).to_string(), "ff04323737f5c4de");
    }

    #[test]
    fn an_id_is_never_zero() {
        assert_eq!(never_zero([0u8; 8]), [0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(never_zero([7u8; 8]), [7; 8]);
    }
}
