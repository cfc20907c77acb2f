// Checks the dashboard with the types that Grafana publishes for its schema (Apache-2.0).
module tailback.dev/tests/grafana

go 1.26.0

require github.com/grafana/grafana-foundation-sdk/go v0.0.22
