//! The local signal, with those it is for: real pages and real readers, a real HAProxy, and agents that are killed, stopped,
//! doubled, or refused their place.

mod adapters;
mod examples;
mod faults;
mod grpc;
mod pages;
mod readers;
mod stage;
