//! A limit too small for the load, or a load too large for the limit.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Result;
use tailback_tests::{
    idle::Idle,
    load::{Load, Plan, Spacing},
    nginx::{Limit, Nginx},
    uwsgi::Uwsgi,
};

use crate::{
    play::{Culprit, Play},
    programs::{app, family, load, steady_load, uwsgi_is_full},
};

/// The load exceeds three workers' capacity from the start and never changes: no surge, no slowdown.
pub fn few_workers(play: &mut Play) -> Result<()> {
    let uwsgi = Uwsgi::start_app(&app(3, 200))?;
    play.watch_pid(uwsgi.process().pid())?;
    play.watch_own_messages(uwsgi.process().lines(), uwsgi_is_full);
    let family = family(&uwsgi)?;
    play.planted(Culprit::default().and(family).or("worker"));
    let load = load(uwsgi.address(), "/sleep/200", 25.0)?;
    play.hold()?;
    play.removing(Some(&load));
    drop(load);
    play.recover()
}

/// The arrival rate triples; the service time does not change.
pub fn surge(play: &mut Play) -> Result<()> {
    let uwsgi = Uwsgi::start_app(&app(4, 100))?;
    let load = load(uwsgi.address(), "/sleep/100", 20.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.watch_own_messages(uwsgi.process().lines(), uwsgi_is_full);
    three_times_as_much(play, &load)
}

/// The same behind nginx, which limits the rate and delays the excess.
pub fn surge_of_nginx(play: &mut Play) -> Result<()> {
    let limit = Limit {
        per_s: 40,
        burst: 150,
    };
    let nginx = Nginx::start_limited(1, limit)?;
    let load = load(nginx.address(), "/", 20.0)?;
    play.watch_pid(nginx.process().pid())?;
    // Its log lines about delayed requests do not count as a warning: it delays part of every burst.
    play.watch_own_messages(nginx.process().lines(), |line| {
        line.contains("limiting requests")
    });
    three_times_as_much(play, &load)
}

/// Requests a second during recovery: below the normal load of 20.
fn three_times_as_much(play: &mut Play, load: &Load) -> Result<()> {
    play.healthy()?;
    play.planted(Culprit::default());
    load.set_rate(60.0)?;
    play.hold()?;
    play.removing(Some(load));
    load.set_rate(10.0)?;
    play.recover()
}

/// The normal number of requests, but each second's arrive in one burst: the workers are mostly idle, and the backlog
/// holds only a few.
pub fn small_backlog(play: &mut Play) -> Result<()> {
    let uwsgi = Uwsgi::start_app(&app(4, 8))?;
    let usual = steady_load(uwsgi.address(), "/sleep/10", 40.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.watch_own_messages(uwsgi.process().lines(), uwsgi_is_full);
    play.healthy()?;
    let family = family(&uwsgi)?;
    play.planted(Culprit::default().and(family).or("backlog").or("listen"));
    usual.stop()?;
    let bursts = Bursts::start(uwsgi.address(), "/sleep/10", 40, Duration::from_secs(1));
    play.hold()?;
    play.removing(None);
    drop(bursts);
    play.recover()
}

/// The number of open connections grows without bound.
pub fn files(play: &mut Play) -> Result<()> {
    const LIMIT: usize = 120;
    let nginx = Nginx::start_with(1, |words| {
        words.extend(["-g".to_owned(), format!("worker_rlimit_nofile {LIMIT};")]);
    })?;
    let load = load(nginx.address(), "/", 15.0)?;
    play.watch_pid(nginx.process().pid())?;
    play.watch_own_messages(nginx.process().lines(), |line| {
        line.contains("Too many open files")
    });
    play.healthy()?;
    let pids = crate::programs::with_children(nginx.process().pid())?;
    play.planted(Culprit::default().and(pids));
    let begun = Instant::now();
    let mut left_open = Vec::new();
    while left_open.len() < LIMIT {
        left_open.push(Idle::open(nginx.address(), 1)?);
        let due = begun + Duration::from_millis(50) * u32::try_from(left_open.len())?;
        play.lasts(due.saturating_duration_since(Instant::now()))?;
    }
    play.hold()?;
    play.removing(Some(&load));
    drop(left_open);
    play.recover()
}

/// Bursts of `count` simultaneous requests, repeated until it is dropped.
pub struct Bursts {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Bursts {
    pub fn start(to: SocketAddr, path: &str, size: u32, every: Duration) -> Self {
        const PER_S: f64 = 50_000.0;
        let stop = Arc::new(AtomicBool::new(false));
        let plan = Plan {
            to,
            path: path.to_owned(),
            per_s: PER_S,
            spacing: Spacing::Even,
            duration: Duration::from_secs_f64(f64::from(size) / PER_S),
            timeout: Duration::from_secs(5),
            max_in_flight: 1000,
        };
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut loads = Vec::new();
            let begun = Instant::now();
            while !stopped.load(Ordering::Relaxed) {
                loads.extend(Load::start(plan.clone()));
                let due = begun + every * u32::try_from(loads.len()).unwrap_or(u32::MAX);
                while Instant::now() < due && !stopped.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(10));
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Bursts {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
