//! Every constant of the controllers, in one table: what it is, its unit, and where the value comes from.
//!
//! Sources:
//!
//! - *CoDel*: RFC 8289.
//! - *Model*: the tests on a simulated service in `controller/tests.rs` check the resulting goodput, latency and recovery, with even
//!   and with Poisson arrivals.
//! - *Overload*: the overload benchmark (`cargo xtask bench overload`), with real servers and proxies, reaches its goals with the
//!   value.
//! - *Convention*: a choice without a measurement behind it.
//!
//! A decision is one step of an admission controller; its interval is [`DECISION_INTERVAL_TARGETS`] target delays, within bounds.

use crate::queue;

// Decisions.

/// Decision interval, in target delays: with a longer target the delay is noisier. Model.
pub const DECISION_INTERVAL_TARGETS: u64 = 2;
/// Bounds of the decision interval, ns. The lower one is CoDel's interval and the default sampling interval; the upper one is a
/// convention.
pub const DECISION_INTERVAL_MIN_NS: u64 = 100_000_000;
pub const DECISION_INTERVAL_MAX_NS: u64 = 1_000_000_000;
/// Tenths of the interval after which a decision may be made: samples may come a little early. Convention.
pub const DECISION_INTERVAL_TENTHS: u64 = 9;

// Standing delay: what counts as overload.

/// Number of decisions over which the minimum delay has to exceed its target. Model.
pub const STANDING_DECISIONS: usize = 3;
/// One decision less suffices if the minimum delay exceeds this many targets. Model.
pub const FAR_ABOVE_TARGETS: f64 = 4.0;
/// Delay from which a queue without departures counts as stalled, ns. With a lower value, a single long request would count too.
/// Convention.
pub const STALLED_AFTER_NS: u64 = 1_000_000_000;

// Equilibrium: admit ratio × departures ÷ arrivals.

/// Time constant of the equilibrium and of the overload utilization, in decisions. Model.
pub const EQUILIBRIUM_MEMORY_DECISIONS: f64 = 10.0;
/// An interval counts towards the equilibrium if the admit ratio changed by at most this fraction before it. Model.
pub const STEADY_ADMIT_CHANGE: f64 = 0.05;
/// An interval counts towards a known equilibrium if the admit ratio was at least this fraction of it. Overload.
pub const MIN_CONCLUSIVE_ADMIT: f64 = 0.5;
/// If the delay stays above the acceptable one for more than this many decisions, the equilibrium is too high … Model.
pub const EQUILIBRIUM_DECREASE_AFTER: u32 = 10;
/// … and is lowered by this fraction at each decision at which the delay does not fall. Model.
pub const EQUILIBRIUM_DECREASE: f64 = 0.02;

// Admit ratio: decrease and increase.

/// Lower bound of the admit ratio: without any work nothing could show that the overload is over. Overload.
pub const MIN_ADMIT_RATIO: f64 = 0.05;
/// Time in which the excess delay is to drain, ns. It determines how far below the equilibrium the admit ratio is. Overload.
pub const DRAIN_TIME_NS: f64 = 4e8;
/// Largest fraction of the equilibrium that is held back to drain. Model.
pub const MAX_DRAIN_TRIM: f64 = 0.9;
/// Without a standing delay, the admit ratio rises to at least this fraction of the equilibrium, or aims at this fraction of the
/// overload utilization. Model.
pub const RECOVERY_TARGET: f64 = 0.95;
/// How much the admit ratio rises at each decision without a standing delay. Model.
pub const PROBE_STEP: f64 = 0.005;
/// Largest factor by which the admit ratio rises at one decision because the utilization is low. Model.
pub const MAX_RECOVERY_FACTOR: f64 = 1.5;
/// Decisions without anything to shed after which a controller is dropped. Convention.
pub const FORGET_AFTER_DECISIONS: u32 = 50;

// Significance, in standard deviations of Poisson counts (σ = √count).

/// Requests in flight are growing if arrivals exceed departures by this in one second; the service time is not measured then.
/// Convention.
pub const GROWTH_SIGMAS: f64 = 2.0;
/// Tolerance when the equilibrium is clamped while the admit ratio changes. Model.
pub const CLAMP_SIGMAS: f64 = 1.5;
/// If the utilization is below its overload level by more than this, the overload is over, and the admit ratio rises quickly. About
/// one false alarm in 15. Model.
pub const IDLE_SIGMAS: f64 = 1.5;
/// The utilization is averaged over up to this many decisions for that. Model.
pub const IDLE_DECISIONS: usize = 5;

// Concurrency limit.

/// Time constant of the requests in service and of the response rate under overload, ns. Overload.
pub const IN_SERVICE_TIME_CONSTANT_NS: f64 = 1e9;
/// Time constant of the occupancy (requests waiting or in service, up to those in service under overload), ns: long, so that a
/// random lull does not end the limit. Overload.
pub const OCCUPANCY_TIME_CONSTANT_NS: f64 = 4e9;
/// The limit holds while the occupancy is at least this fraction of the requests in service under overload. Overload.
pub const MIN_OCCUPANCY: f64 = 0.85;
/// Queueing within the service that the limit allows, in target delays. Overload.
pub const IN_SERVICE_QUEUE_TARGETS: f64 = 0.25;
/// The limit is probed upward by one this often, ns, …
pub const PROBE_INTERVAL_NS: u64 = 60_000_000_000;
/// … for this long, ns. Proxies poll five to ten times a second, so they notice; less than one request in a hundred is delayed by
/// a probe.
pub const PROBE_DURATION_NS: u64 = 500_000_000;

// Size of responses.

/// Time constant of the size of a response, ns: 300 samples. Convention.
pub const RESPONSE_SIZE_TIME_CONSTANT_NS: f64 = queue::SIZE_TIME_CONSTANT_NS;
/// Responses are about equally long if their size differs from its mean by at most this fraction, on average. Convention.
pub const MAX_SIZE_DEVIATION: f64 = queue::MAX_SIZE_DEVIATION;
/// A service is at rest up to this utilization. Beyond it, requests wait, and an HTTP/2 server answers each of them with a ping.
/// Overload.
pub const MAX_SIZING_UTILIZATION: f64 = 0.85;

// Service time and max queue wait.

/// Time constant of the service time, ns. Overload.
pub const SERVICE_TIME_CONSTANT_NS: f64 = 1e10;
/// Minimum number of samples for a service time. Model.
pub const SERVICE_TIME_MIN_SAMPLES: u32 = 10;
/// A target delay that is not configured is this fraction of the service time, … (as in detection)
pub const TARGET_SERVICE_TIMES: f64 = 0.5;
/// … within these bounds, ns (those of the target delay in detection).
pub const MIN_DERIVED_TARGET_NS: u64 = 5_000_000;
pub const MAX_DERIVED_TARGET_NS: u64 = 500_000_000;
/// Max queue wait, in target delays: an admitted request has waited nearly as long and still has to be answered in time. Model.
pub const MAX_QUEUE_WAIT_TARGETS: f64 = 0.75;
/// The max queue wait is long enough to answer at least this many requests: with Poisson arrivals a worker might otherwise find no
/// request that is fresh enough, and idle. Model.
pub const RESPONSES_WITHIN_MAX_QUEUE_WAIT: f64 = 2.0;
/// But the max queue wait is at most this many service times. Model.
pub const MAX_QUEUE_WAIT_SERVICE_TIMES: f64 = 1.3;
/// Resolution of the clock with which page readers measure a wait, ns: a tick of a kernel with CONFIG_HZ=250.
pub const CLOCK_TICK_NS: u64 = 4_000_000;

// Wait inside a service that takes every request immediately.

/// Ages of requests in flight include the wait before dequeue: the longest one, decaying with this time constant, ns. Overload.
pub const DEQUEUE_WAIT_MEMORY_NS: f64 = 5e8;
/// Time constant of the requests in service under overload, ns, over the samples in which others wait. Overload.
pub const CONCURRENCY_TIME_CONSTANT_NS: f64 = 1e9;
/// The service has become slower if its requests still take too long in this many consecutive samples with no more of them in
/// flight than usual. Convention.
pub const SLOWER_AFTER_SAMPLES: u32 = 5;

// Load.

/// Time constant of the published utilization, ns. Overload.
pub const UTILIZATION_TIME_CONSTANT_NS: f64 = 2e9;
/// Time constant of the utilization that the controllers use, ns: about one sample. Model.
pub const RECENT_UTILIZATION_TIME_CONSTANT_NS: f64 = 1e8;
/// If at least this fraction of the requests in service under overload is in service, all workers are assumed to have one.
/// Convention.
pub const MIN_FULL_BY_REQUESTS: f64 = 0.9;
/// If less than this share of the workers then looks busy, their thread states do not show their work. Convention.
pub const MIN_BUSY_WHEN_FULL: f64 = 0.5;
/// Time constant of that share, ns: a few samples. Convention.
pub const WHEN_FULL_TIME_CONSTANT_NS: f64 = 5e8;
/// Upper bound of the load: beyond it, demand cannot be distinguished from retries. Convention.
pub const MAX_LOAD: f64 = 2.0;

// Signals.

/// Bounds of the Retry-After, ms. Convention.
pub const RETRY_AFTER_MS: (u64, u64) = (1_000, 30_000);
/// No work is shed for a queue that was last observed this long ago, ns. Convention.
pub const FAIL_OPEN_AFTER_NS: u64 = 5_000_000_000;
/// A queue that was last observed this long ago is no longer reported, ns. The slowest scan runs every 30 s.
pub const EXPIRE_AFTER_NS: u64 = 60_000_000_000;

// What an agent saves for the next one.

/// Interval at which it is written, ns: the age of the state that a killed agent leaves. Convention.
pub const LEARNED_INTERVAL_NS: u64 = 1_000_000_000;
/// A service time is still used after this, ns: it changes with the service, not with the load. Convention.
pub const SERVICE_TIME_VALID_NS: u64 = 3_600_000_000_000;
/// A controller is continued after at most this, ns: an overload may be over by then. A supervisor restarts an agent in less.
/// Convention.
pub const CONTROLLER_VALID_NS: u64 = 10_000_000_000;
