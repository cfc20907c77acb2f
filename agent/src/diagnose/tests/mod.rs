//! Diagnosis of hand-made scenes: observations, shares, wait chains, verdicts, explanations.

mod accelerators;
mod classify;
mod conntrack;
mod consumers;
mod explain;
mod hidden;
mod jvm_counters;
mod listening_sockets;
mod local_ports;
mod memory;
mod open_episode;
mod profile;
mod scene;
mod served;
mod shared_locks;
mod unclosed;
mod verdicts;
mod wait_graph;
