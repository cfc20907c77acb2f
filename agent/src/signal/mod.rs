//! Backpressure signals, published on this node for the services and for the proxies and autoscalers around them.
//!
//! Pure: `controller` decides the admit ratio of one queue, `waits` the max queue wait, `concurrency` the concurrency limit, and
//! `load` the load; `requests` measures service times, and how long requests wait inside. `constants` is the table of their
//! constants. `pressure` combines them per service, and `encode` is its page. `live` is what people see of all this.
//!
//! Not pure: `page`, `pages` and `files` are the files under `/run/tailback` (`names` decides what they are called), and `learned` is the one that a later agent continues
//! with. The agent's loop leaves events and state in `state`; `stream` serves them on `agent.sock` in a thread of its own, with
//! `status`, `readers`, `metrics` in an `exposition`, and each `histogram` of `wait_histograms` and `exact_waits`. Every other consumer is served by the [adapter process](crate::adapters), which reads
//! the pages as anyone may. So when the agent is gone, all of them report no pressure.

mod concurrency;
pub mod constants;
pub mod controller;
pub mod directory;
mod encode;
mod exact_waits;
pub mod exposition;
pub mod files;
#[cfg(test)]
mod fixture;
mod histogram;
mod learned;
pub mod live;
mod load;
pub mod metrics;
pub mod names;
mod page;
mod pages;
mod pressure;
pub mod readers;
mod requests;
mod response_size;
mod state;
mod status;
pub mod stream;
mod wait_histograms;
mod waits;

use std::{sync::Arc, thread, time::Duration};

use anyhow::{Context as _, Result};
use constants::LEARNED_INTERVAL_NS;
use directory::Directory;
pub use encode::{Published, Words, encode, pattern};
use files::Files;
use live::Live;
pub use page::{PageFile, check_own_file};
pub use pages::HEARTBEAT;
use pages::Pages;
pub use pressure::{Pressure, PressureTracker};
pub use state::ConfigFile;
use state::{Causes, Line, SharedState, Snapshot};

use crate::{
    collect::boot_ns,
    config::signal::Signal,
    emit::{Sink as _, json::Json},
    event::{Event, Level},
    pipeline::Pipeline,
    sample::{AgentReport, Notice, Sample, TargetId},
    target::Downward,
};

/// Minimum time between two publications, ns, unless a level or the time to live changes. Focused services are sampled more often than
/// this, but only to find the cause.
const MIN_PUBLISH_INTERVAL_NS: u64 = 50_000_000;

/// Publishes the result of each sample.
pub struct Signals {
    pressures: PressureTracker,
    pages: Pages,
    state: Arc<SharedState>,
    json: Json<Vec<u8>>,
    live: Live,
    /// As it was last shared.
    shared_live: Arc<Live>,
    /// It has changed since then.
    is_live_changed: bool,
    report: Option<Arc<AgentReport>>,
    causes: Causes,
    /// Services in the last publication, and those with a queue that is not ok.
    services: (usize, usize),
    last_ns: u64,
    /// The time to live has changed: pages may expire before they would be written again.
    is_due: bool,
    /// The sampling interval.
    interval_ns: u64,
    downward: Arc<Downward>,
    /// When the state for a later agent was last saved.
    learned_ns: u64,
}

impl Signals {
    /// Starts publishing in the configured directory, about every `interval`, and serves the stream there.
    pub fn start(config: &Signal, interval: Duration) -> Result<Self> {
        let directory = config.directory();
        let mut pages = Pages::open(
            &directory,
            config.ttl_ns(interval),
            config.max_pages(),
            config.directory_wait(),
        )?;
        let learned = pages.load_learned();
        let state = Arc::new(SharedState::default());
        serve(Arc::clone(&state), pages.directory())?;
        let interval_ns = interval.as_nanos() as u64;
        pages.beat(interval_ns);
        Ok(Self {
            interval_ns,
            downward: Arc::new(Downward::read()),
            pressures: PressureTracker::resume(learned),
            pages,
            state,
            json: Json::new(Vec::new()),
            live: Live::default(),
            shared_live: Arc::default(),
            is_live_changed: false,
            report: None,
            causes: Causes::default(),
            services: (0, 0),
            last_ns: boot_ns(),
            is_due: false,
            learned_ns: 0,
        })
    }

    /// Publishes the state after a sample, and its events.
    pub fn publish(&mut self, mono_ns: u64, unix_ns: u64, pipeline: &Pipeline, events: &[Event]) {
        self.pages.beat(self.interval_ns);
        for event in events {
            self.publish_event(event, pipeline);
        }
        let now_ns = boot_ns();
        let has_level_changed = events
            .iter()
            .any(|event| matches!(event, Event::Level { .. }));
        let is_due = std::mem::take(&mut self.is_due) || has_level_changed;
        if now_ns.saturating_sub(self.last_ns) < MIN_PUBLISH_INTERVAL_NS && !is_due {
            return;
        }
        let targets = pipeline.targets();
        let pressures = self
            .pressures
            .read(mono_ns, pipeline.gauges(), targets.all());
        let published = self.pages.now(now_ns.saturating_sub(self.last_ns));
        let names = self.pages.publish(&pressures, published);
        self.last_ns = now_ns;
        if now_ns.saturating_sub(self.learned_ns) >= LEARNED_INTERVAL_NS {
            self.learned_ns = now_ns;
            self.pages
                .save_learned(&self.pressures.learned(mono_ns, &pressures));
        }
        let filling = pressures.iter().filter(|it| it.level > Level::Ok);
        self.services = (pressures.len(), filling.count());
        self.state.count_waits(&pressures);
        self.is_live_changed |= self.live.read(mono_ns, unix_ns, &pressures);
        if std::mem::take(&mut self.is_live_changed) {
            self.shared_live = Arc::new(self.live.clone());
        }
        self.state.set(Snapshot {
            unix_ns,
            until_ns: published.at_ns + published.ttl_ns,
            pressures: Arc::new(pressures),
            names: Arc::new(names),
            causes: Arc::clone(&self.causes),
            report: self.report.clone(),
            pages: self.pages.counts(),
            live: Arc::clone(&self.shared_live),
            downward: Arc::clone(&self.downward),
        });
    }

    /// Adds what hooks have measured, for `status`, metrics and the view.
    pub fn set_hooks(&mut self, sample: &Sample, pipeline: &Pipeline) {
        let Some(report) = &sample.hooks else { return };
        self.is_live_changed |= self.live.set_exact_waits(report, sample.architecture);
        let targets = pipeline.targets().all().map(|target| target.id).collect();
        let at = (sample.mono_ns, sample.unix_ns);
        self.state
            .exact_waits()
            .add(report, at, sample.architecture, &targets);
        self.state.count_exact_waits(sample.mono_ns, report);
    }

    /// How many services were published last, and how many of them have a queue that is not ok.
    pub fn services(&self) -> (usize, usize) {
        self.services
    }

    /// The directory in use.
    pub fn directory(&self) -> &Directory {
        self.pages.directory()
    }

    /// From now on, `files` creates and removes the files of services.
    pub fn set_files(&mut self, files: Box<dyn Files>) {
        self.pages.set_files(files);
    }

    /// From now on, publishes with this time to live and number of pages.
    pub fn set_limits(&mut self, config: &Signal, interval: Duration) {
        self.interval_ns = interval.as_nanos() as u64;
        self.is_due = true;
        self.pages
            .set_limits(config.ttl_ns(interval), config.max_pages());
    }

    /// The state of the configuration file, for `status` and metrics.
    pub fn set_config_file(&self, file: ConfigFile) {
        self.state.set_config_file(file);
    }

    /// Notices about publishing itself, since the last call.
    pub fn notices(&mut self) -> Vec<Notice> {
        self.pages.notices()
    }

    /// Publishes the last events, and no pressure from now on.
    pub fn finish(mut self, events: &[Event], pipeline: &Pipeline) {
        for event in events {
            self.publish_event(event, pipeline);
        }
        self.pages.finish();
    }

    fn publish_event(&mut self, event: &Event, pipeline: &Pipeline) {
        self.is_live_changed |= self.live.take(event);
        match event {
            Event::Cause(stretch) => {
                // Copied only while a snapshot still has the previous ones.
                Arc::make_mut(&mut self.causes)
                    .insert(Arc::clone(&stretch.key), stretch.verdict.cause);
            }
            Event::Episode(episode) if !episode.ongoing => {
                Arc::make_mut(&mut self.causes).remove(&episode.key);
            }
            _ => {}
        }
        let about: Option<(TargetId, Level)> = match event {
            Event::Level {
                state, from, to, ..
            } => Some((state.key.target, *from.max(to))),
            Event::Episode(episode) => Some((episode.key.target, episode.level_max)),
            // Only queues above ok have causes.
            Event::Cause(stretch) => Some((stretch.key.target, Level::Warn)),
            Event::Agent { report, .. } => {
                self.report = Some(Arc::new(report.clone()));
                None
            }
            _ => None,
        };
        // The writer needs all events: it learns the names of the services from them.
        if self.json.emit(event).is_err() {
            return;
        }
        let text = self.json.take();
        let Some((target, level)) = about.filter(|_| !text.is_empty()) else {
            return;
        };
        let target = pipeline
            .targets()
            .get(target)
            .map(|target| target.name.clone());
        let text = String::from_utf8(text).unwrap_or_default();
        self.state.publish(Line {
            target,
            level,
            text,
        });
    }
}

/// Serves the stream in its own thread.
fn serve(state: Arc<SharedState>, directory: &Directory) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot serve the stream")?;
    let path = directory.path_to(stream::SOCKET);
    let listener = {
        let _inside = runtime.enter();
        stream::bind_locked(&path, 0o660)?
    };
    let directory = directory.path.clone();
    thread::Builder::new()
        .name("stream".to_owned())
        .spawn(move || runtime.block_on(stream::serve(listener, state, directory)))
        .context("cannot start a thread")?;
    Ok(())
}
