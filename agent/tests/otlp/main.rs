//! Delivery of spans: to scripted collectors that fail in every way, and to a real Jaeger.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod collector;
mod grpc;
mod http;
mod jaeger;
mod jam;
mod shutdown;
mod spans;
mod tls;
