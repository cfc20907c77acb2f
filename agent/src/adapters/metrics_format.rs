//! The format of the metrics that a scraper asks for in its `Accept` header.

#![forbid(unsafe_code)]

use http::{HeaderMap, header::ACCEPT};

/// Whether it prefers protobuf messages to text. Prometheus asks for them once it stores native histograms.
pub(super) fn is_protobuf(headers: &HeaderMap) -> bool {
    let values = headers.get_all(ACCEPT).iter();
    let (mut protobuf, mut text) = (0.0_f64, 0.0_f64);
    for range in values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
    {
        let mut parts = range.split(';').map(str::trim);
        let kind = parts.next().unwrap_or_default();
        let parameters: Vec<(String, &str)> = parts.filter_map(parameter).collect();
        let value_of = |name: &str| {
            let named = parameters.iter().find(|(known, _)| known == name);
            named.map(|(_, value)| *value)
        };
        let quality = value_of("q").map_or(Some(1.0), |q| q.parse::<f64>().ok());
        let Some(quality) = quality.filter(|quality| (0.0..=1.0).contains(quality)) else {
            continue;
        };
        if kind.eq_ignore_ascii_case("text/plain") {
            text = text.max(quality);
        } else if kind.eq_ignore_ascii_case("application/vnd.google.protobuf")
            && value_of("proto") == Some("io.prometheus.client.MetricFamily")
            && value_of("encoding") == Some("delimited")
        {
            protobuf = protobuf.max(quality);
        }
    }
    protobuf > text
}

fn parameter(text: &str) -> Option<(String, &str)> {
    let (name, value) = text.split_once('=')?;
    let value = value.trim().trim_matches('"');
    Some((name.trim().to_ascii_lowercase(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protobuf_is_sent_only_to_scrapers_that_prefer_it() {
        const PROTOBUF: &str = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited";
        let of = |accept: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, accept.parse().unwrap());
            is_protobuf(&headers)
        };
        let text = "text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        // Prometheus with native histograms, and without.
        let openmetrics = "application/openmetrics-text;version=1.0.0;q=0.8";
        assert!(of(&format!("{PROTOBUF},{openmetrics},{text}")));
        assert!(of(&format!("{PROTOBUF};q=0.6, {text}")));
        assert!(of(
            "application/vnd.google.protobuf; Encoding=delimited; proto=\"io.prometheus.client.MetricFamily\""
        ));
        assert!(!of(&format!("{openmetrics},{text}")));
        assert!(!of(&format!("{PROTOBUF};q=0.4,{text}")));
        assert!(!of(&format!("{PROTOBUF};q=0")));
        assert!(!of(&format!("{PROTOBUF};q=high")));
        assert!(!of("application/vnd.google.protobuf;encoding=text"));
        for other in ["*/*", "", ";;,=,q", "text/html"] {
            assert!(!of(other), "{other}");
        }
        assert!(!is_protobuf(&HeaderMap::new()));
    }
}
