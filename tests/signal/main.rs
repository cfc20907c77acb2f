//! The published signals with their real consumers: pages and readers in every language, HAProxy, Prometheus, gRPC and KEDA
//! clients; and agents that are killed, stopped, started twice, or cannot write their directory.

mod adapters;
mod confined;
mod envoy;
mod examples;
mod faults;
mod grpc;
mod handover;
mod haproxy;
mod leaks;
mod live_page;
mod native_histograms;
mod pages;
mod probes;
mod prometheus;
mod readers;
mod reload;
mod stage;
