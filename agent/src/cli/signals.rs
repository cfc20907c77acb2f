//! The backpressure signals of a live session: publishes them, and has the helper process supervise the adapter process.

use std::time::Duration;

use anyhow::{Context as _, bail};
use tracing::debug;

use super::{Failure, exit_code::Outcome, helper::Helper};
use crate::{
    collect::OutputStats,
    config::signal::Signal,
    event::Event,
    pipeline::Pipeline,
    sample::{Notice, Sample},
    signal::{ConfigFile, Signals},
};

pub(super) struct LiveSignals {
    /// `None` if publishing is off or failed; the agent keeps watching.
    signals: Option<Signals>,
    /// Creates the files, and runs the adapter process.
    helper: Option<Helper>,
    notices: Vec<Notice>,
}

impl LiveSignals {
    /// Starts publishing. A failure is only a notice, unless adapters are configured: then it is an error. `text` is the
    /// text of the configuration, for the adapter process.
    pub(super) fn start(
        config: &Signal,
        text: &str,
        interval: Duration,
        helper: Option<Helper>,
    ) -> Outcome<Self> {
        let mut live = Self {
            signals: None,
            helper: None,
            notices: Vec::new(),
        };
        if !config.publishes() {
            return Ok(live);
        }
        // Checked again: the command line may override the file's interval.
        config
            .check(interval)
            .context("invalid [signal]")
            .map_err(Failure::usage)?;
        match Signals::start(config, interval) {
            Ok(mut signals) => {
                debug!(directory = %signals.directory().path.display(), "publishing signals");
                if let Some(helper) = helper {
                    let ready = helper.use_directory(signals.directory());
                    ready.map_err(Failure::bug)?;
                    signals.set_files(Box::new(helper.clone()));
                    live.helper = Some(helper);
                }
                live.signals = Some(signals);
            }
            Err(error) if config.has_adapters() => {
                return Err(Failure::usage(error.context("cannot publish signals")));
            }
            Err(error) => live.notices.push(Notice {
                code: "not_published".to_owned(),
                text: format!("signals are not published: {error:#}"),
            }),
        }
        if config.starts_adapter_process() {
            live.serve_adapters(text);
        }
        Ok(live)
    }

    /// Fails if the configuration cannot replace the one in force.
    pub(super) fn check(&self, next: &Signal, interval: Duration) -> anyhow::Result<()> {
        if !next.publishes() {
            return Ok(());
        }
        next.check(interval).context("invalid [signal]")?;
        if self.signals.is_none() && next.starts_adapter_process() {
            bail!("adapters need pages, and signals are not published: restart the agent");
        }
        Ok(())
    }

    /// Applies a configuration that was [checked](Self::check). Adapters that are not changed are not interrupted.
    pub(super) fn reload(&mut self, from: &Signal, to: &Signal, text: &str, interval: Duration) {
        if let Some(signals) = &mut self.signals {
            signals.set_limits(to, interval);
        }
        if to.has_same_adapters(from) {
            return;
        }
        if to.starts_adapter_process() {
            self.serve_adapters(text);
        } else if from.starts_adapter_process() {
            self.ask(Helper::serve_no_adapters);
        }
    }

    fn serve_adapters(&mut self, text: &str) {
        self.ask(|helper| helper.serve_adapters(text));
    }

    /// A failure becomes a notice.
    fn ask(&mut self, request: impl FnOnce(&Helper) -> anyhow::Result<()>) {
        let Some(helper) = &self.helper else { return };
        if let Err(error) = request(helper) {
            self.notices.push(Notice {
                code: "helper_failed".to_owned(),
                text: format!("the adapters of the new configuration are not served: {error:#}"),
            });
        }
    }

    /// Whether the helper process has ended. Without it, no page of a new service can be created.
    pub(super) fn has_lost_helper(&self) -> bool {
        self.helper.as_ref().is_some_and(Helper::is_gone)
    }

    /// Publishes the state of the configuration file.
    pub(super) fn set_config_file(&self, file: &ConfigFile) {
        if let Some(signals) = &self.signals {
            signals.set_config_file(file.clone());
        }
    }

    /// Adds this notice to the next sample.
    pub(super) fn notify(&mut self, notice: Notice) {
        self.notices.push(notice);
    }

    /// Adds the notices about publishing to the next sample.
    pub(super) fn report(&mut self, outputs: &mut OutputStats) {
        if let Some(signals) = &mut self.signals {
            self.notices.append(&mut signals.notices());
        }
        if let Some(helper) = &self.helper {
            self.notices.append(&mut helper.notices());
        }
        outputs.notices.append(&mut self.notices);
    }

    /// Publishes the state after a sample, and its events.
    pub(super) fn publish(&mut self, sample: &Sample, pipeline: &Pipeline, events: &[Event]) {
        if let Some(signals) = &mut self.signals {
            signals.set_hooks(sample, pipeline);
            signals.publish(sample.mono_ns, sample.unix_ns, pipeline, events);
        }
    }

    /// How many services are published, and how many of them have a queue that is not ok.
    pub(super) fn services(&self) -> (usize, usize) {
        self.signals.as_ref().map_or((0, 0), Signals::services)
    }

    /// Publishes "no pressure" and stops. The adapter process lives on for [`EXIT_IDLE_TIME`] to report it.
    pub(super) fn finish(self, events: &[Event], pipeline: &Pipeline) {
        if let Some(signals) = self.signals {
            signals.finish(events, pipeline);
        }
    }
}
