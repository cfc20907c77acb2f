//! Who has the CPU that a service's threads want.

use super::culprit;
use crate::{
    diagnose::{
        case::Case,
        exact_waits::{Asked, CpuWaits},
        inputs::{Hog, LONG_TURN_NS},
        rules::checks::Checks,
    },
    event::{Activity, Confidence, Culprit, explain::Unit},
};

/// A quota or other processes are the cause if they took at least this share of the time in which threads needed a CPU.
/// The recorded incidents `cpu-neighbour` and `quota` test the value.
const MIN_TAKEN: f64 = 0.25;

/// Shares of the wall time of the threads that serve the queue, 0 to 1. How long they waited for a CPU is known from samples. Who had
/// it is estimated from the CPU time of all processes, whatever their CPUs; if hooks measured the longest waits, and these represent the
/// others, they decide.
pub(in crate::diagnose::rules) struct CpuTime {
    /// On a CPU, or waiting for one.
    pub(in crate::diagnose::rules) needed: f64,
    /// Waiting while other services or the hypervisor had the CPU.
    pub(in crate::diagnose::rules) foreign: f64,
    /// Waiting while other threads of the same service had it.
    own: f64,
    /// Kept off the CPU by the control group's quota.
    throttled: f64,
    measured: Option<Measured>,
}

/// What hooks measured, and what samples say instead.
struct Measured {
    waits: CpuWaits,
    /// The share that others had the CPU, as estimated.
    estimated_foreign: f64,
    /// Mean number of threads that waited for a CPU, as sampled.
    sampled_threads: f64,
}

impl CpuTime {
    pub(in crate::diagnose::rules) fn of(case: Case<'_>) -> Self {
        let stolen = case.share(Activity::Stolen);
        let estimated_foreign = case.share(Activity::RunnableForeign);
        let estimated_own = case.share(Activity::RunnableOwn);
        let throttled = case.share(Activity::Throttled);
        let waiting = estimated_foreign + estimated_own;
        // Hooks count a wait for the quota as one for a CPU, and such waits are the longest. Whoever ran before did not cause them.
        let waits =
            asked(case, |asked| case.inputs.measured_cpu_waits(asked)).filter(|_| throttled <= 0.0);
        let (foreign, own) = match waits.filter(|waits| waits.is_sure) {
            Some(waits) => (waiting * waits.foreign, waiting * (1.0 - waits.foreign)),
            None => (estimated_foreign, estimated_own),
        };
        let measured = waits.map(|waits| Measured {
            waits,
            estimated_foreign: estimated_foreign + stolen,
            sampled_threads: (waiting + stolen + throttled) * case.threads() as f64,
        });
        let foreign = foreign + stolen;
        Self {
            needed: Activity::NEEDS_CPU
                .iter()
                .map(|activity| case.share(*activity))
                .sum(),
            foreign,
            own,
            throttled,
            measured,
        }
    }

    /// For `--explain`: the numbers from samples beside those that hooks measured, which decide.
    fn explain(&self, checks: &mut Checks) {
        let Some(measured) = &self.measured else {
            return;
        };
        let numbers = [
            (
                "time others had the CPU, estimated from samples",
                measured.estimated_foreign,
                Unit::Ratio,
            ),
            (
                "share of the longest waits in which others had the CPU, measured by hooks",
                measured.waits.foreign,
                Unit::Ratio,
            ),
            (
                "threads of the service waiting for a CPU, measured by hooks",
                measured.waits.threads,
                Unit::Count,
            ),
            (
                "threads that serve the queue waiting for a CPU, from samples",
                measured.sampled_threads,
                Unit::Count,
            ),
        ];
        for (name, value, unit) in numbers {
            checks.context(name, Some(value), unit);
        }
    }

    /// The process that had the CPU instead, and how sure that is. If hooks measured, only a process is blamed that they saw: the busiest
    /// of the machine may use another CPU.
    pub(in crate::diagnose::rules) fn hog(&self, case: Case<'_>) -> (Option<Hog>, Confidence) {
        let (inputs, time) = (case.inputs, case.time());
        let busiest = || inputs.hog(case.target(), case.view.targets, time);
        let Some(measured) = &self.measured else {
            return (busiest(), Confidence::High);
        };
        match asked(case, |asked| inputs.measured_culprit(asked)) {
            Some(tgid) => match inputs.cpu_user(tgid, time) {
                Some(hog) if measured.waits.is_sure => (Some(hog), Confidence::High),
                known => (known, Confidence::Medium),
            },
            None => {
                let was_seen =
                    |hog: &Hog| asked(case, |asked| inputs.was_seen_with_the_cpu(asked, hog.tgid));
                (busiest().filter(was_seen), Confidence::Medium)
            }
        }
    }

    /// The control group's quota takes enough of the time to be the cause.
    pub(in crate::diagnose::rules) fn is_throttled(&self, checks: &mut Checks) -> bool {
        let enough = checks.at_least(
            "time throttled by the CPU quota",
            self.throttled,
            self.needed * MIN_TAKEN,
            Unit::Ratio,
        );
        let most = checks.at_least(
            "time throttled (threshold: time others had the CPU)",
            self.throttled,
            self.foreign,
            Unit::Ratio,
        );
        enough && most
    }

    /// Other services or the hypervisor take enough of the time to be the cause.
    pub(in crate::diagnose::rules) fn is_starved(&self, checks: &mut Checks) -> bool {
        self.explain(checks);
        let enough = checks.at_least(
            "time others had the CPU",
            self.foreign,
            self.needed * MIN_TAKEN,
            Unit::Ratio,
        );
        let most = checks.more_than(
            "time others had the CPU (threshold: time own threads had it)",
            self.foreign,
            self.own,
            Unit::Ratio,
        );
        enough && most
    }
}

/// Asks hooks about the threads that serve the queue.
fn asked<T>(case: Case<'_>, ask: impl FnOnce(&Asked<'_>) -> T) -> T {
    let (target, targets) = (case.target(), case.view.targets);
    let members = case.first().map(|first| &first.threads.members);
    let serves = |tid: u32| {
        let mut members = members.into_iter().flatten();
        members.any(|((_, member), _)| *member == tid)
    };
    ask(&Asked {
        target,
        time: case.time(),
        is_own: &|tgid| targets.of(tgid) == Some(target),
        serves: &serves,
    })
}

/// Whether the queue is served by one thread, which runs an event loop and has been away from epoll_wait for a long time. A loop
/// that merely has too much work is away for a long time, too, but it keeps answering. So each turn must handle one request, or
/// nothing at all must be answered for a while.
pub(in crate::diagnose::rules) fn is_one_long_turn(case: Case<'_>, checks: &mut Checks) -> bool {
    /// Without any response for this long, a turn is too long, no matter how many responses there were before.
    const MIN_PAUSE_NS: u64 = 3 * LONG_TURN_NS;
    let Some(first) = case.first() else {
        return false;
    };
    let alone = checks.at_most(
        "threads that serve the queue",
        first.threads.len() as f64,
        1.0,
        Unit::Count,
    );
    let (from_ns, to_ns) = case.time();
    let Some(responses) = case.inputs.responses(case.target(), from_ns) else {
        return checks.unknown("responses", Unit::Count);
    };
    // Of a turn whose begin was not seen, one may have been answered before it.
    let is_silent = responses <= 1;
    let window = case.view.window;
    let mut members = first.threads.members.iter();
    let long = members.any(|(thread, _)| {
        window.had_a_long_turn(*thread) || (is_silent && window.was_under_way(*thread))
    });
    let long = checks.is(
        "it computed for 100 ms or more without returning to epoll_wait",
        long,
        true,
    );
    let each_ns = to_ns.saturating_sub(from_ns) / responses.max(1);
    let rare = checks.at_least(
        "time per response",
        each_ns as f64,
        LONG_TURN_NS as f64,
        Unit::Nanoseconds,
    );
    let pause_ns = case.inputs.longest_pause_ns(case.target(), from_ns);
    let pauses = checks.at_least(
        "or longest pause between responses",
        pause_ns as f64,
        MIN_PAUSE_NS as f64,
        Unit::Nanoseconds,
    );
    alone && long && (rare || pauses)
}

/// The thread that uses the most CPU, as a culprit.
pub(in crate::diagnose::rules) fn busiest(case: Case<'_>) -> Option<Culprit> {
    case.first()
        .map(|first| culprit::busiest_thread(case, first))
}
