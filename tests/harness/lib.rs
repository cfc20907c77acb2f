//! Real servers, loads and collectors under control, for tests, the demo and the benchmarks.
//!
//! Every process started here is ended by its owner's `Drop`, or by [`cleanup`] after Ctrl-C; it is addressed by pid,
//! never by name. Every wait is for a condition, with a deadline ([`wait`], [`lines`]), never a sleep of a guessed length.
#![forbid(unsafe_code)]

pub mod accuracy;
pub mod agent;
pub mod apache;
pub mod calibration;
pub mod certificate;
pub mod cgroup;
pub mod checked;
pub mod chromium;
pub mod cleanup;
pub mod collector;
pub mod container;
pub mod envoy;
pub mod exact_waits;
pub mod exit_code;
pub mod grpc;
pub mod haproxy;
pub mod hikari;
pub mod http;
pub mod idle;
pub mod jaeger;
pub mod lines;
pub mod load;
pub mod mariadb;
pub mod memcached;
pub mod mosquitto;
pub mod needs;
pub mod network;
pub mod nginx;
pub mod pgbouncer;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod program;
pub mod pty;
pub mod python;
pub mod random;
pub mod redis;
pub mod sample;
pub mod scenario;
pub mod service;
pub mod skip;
pub mod soak;
pub mod sockets;
pub mod ss;
pub mod talk;
pub mod temp;
pub mod uwsgi;
pub mod wait;
pub mod workloads;
