//! A limit is too small for the work, or the work too much for the limit.

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

/// More work than three workers can do comes from the beginning, and nothing changes: no surge, no slowness.
pub fn few_workers(play: &mut Play) -> Result<()> {
    let uwsgi = Uwsgi::start_app(&app(3, 200))?;
    play.watch_pid(uwsgi.process().pid())?;
    play.own_words(uwsgi.process().lines(), uwsgi_is_full);
    let family = family(&uwsgi)?;
    play.planted(Culprit::default().and(family).or("worker"));
    let load = load(uwsgi.address(), "/sleep/200", 25.0)?;
    play.hold()?;
    play.removing(Some(&load));
    drop(load);
    play.recover()
}

/// Three times as much comes as usual; each request takes what it always takes.
pub fn surge(play: &mut Play) -> Result<()> {
    let uwsgi = Uwsgi::start_app(&app(4, 100))?;
    let load = load(uwsgi.address(), "/sleep/100", 20.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.own_words(uwsgi.process().lines(), uwsgi_is_full);
    three_times_as_much(play, &load)
}

/// The same where nginx lets so many through as the service can bear, and keeps the others until it is their turn.
pub fn surge_of_nginx(play: &mut Play) -> Result<()> {
    let limit = Limit {
        per_s: 40,
        burst: 150,
    };
    let nginx = Nginx::start_limited(1, limit)?;
    let load = load(nginx.address(), "/", 20.0)?;
    play.watch_pid(nginx.process().pid())?;
    // What it says of those that it keeps is no news: it keeps some of every burst.
    play.own_words(nginx.process().lines(), |line| {
        line.contains("limiting requests")
    });
    three_times_as_much(play, &load)
}

/// Of a load of 20 a second; for recovery, less than usual.
fn three_times_as_much(play: &mut Play, load: &Load) -> Result<()> {
    play.healthy()?;
    play.planted(Culprit::default());
    load.set_rate(60.0)?;
    play.hold()?;
    play.removing(Some(load));
    load.set_rate(10.0)?;
    play.recover()
}

/// As many requests as usual, and all of a second at once: the workers are idle most of the time, and the backlog has
/// room for a few.
pub fn small_backlog(play: &mut Play) -> Result<()> {
    let uwsgi = Uwsgi::start_app(&app(4, 8))?;
    let usual = steady_load(uwsgi.address(), "/sleep/10", 40.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.own_words(uwsgi.process().lines(), uwsgi_is_full);
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

/// Connections are left open, more and more of them.
pub fn files(play: &mut Play) -> Result<()> {
    const LIMIT: usize = 120;
    let nginx = Nginx::start_with(1, |words| {
        words.extend(["-g".to_owned(), format!("worker_rlimit_nofile {LIMIT};")]);
    })?;
    let load = load(nginx.address(), "/", 15.0)?;
    play.watch_pid(nginx.process().pid())?;
    play.own_words(nginx.process().lines(), |line| {
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

/// So many requests at one moment, again and again, until it is dropped.
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
