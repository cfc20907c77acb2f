//! The current state as JSON, for stream subscribers, `tailback status` and `tailback top`, and for the live page.

use std::{
    path::Path,
    sync::{Arc, atomic::Ordering},
};

use serde_json::{Map, Value, json};

use super::{
    controller::ControllerState,
    live::view::{self, View},
    pressure::Pressure,
    state::{SharedState, Snapshot},
};
use crate::{
    collect::{boot_ns, unix_ns},
    emit::json::{Object, round},
    queue::QueueKey,
    sample::HookReport,
};

/// One line per service whose name is wanted.
pub fn standing(snapshot: &Snapshot, is_wanted: impl Fn(&str) -> bool) -> String {
    let all = snapshot.pressures.iter().zip(snapshot.names.iter());
    all.filter(|(pressure, _)| is_wanted(&pressure.target.name))
        .map(|(pressure, name)| format!("{}\n", object(snapshot.unix_ns, pressure, name)))
        .collect()
}

/// The state of the agent, on one line.
pub fn agent(state: &SharedState, directory: &Path) -> String {
    let snapshot = state.snapshot();
    let targets: Vec<Value> = snapshot
        .pressures
        .iter()
        .zip(snapshot.names.iter())
        .map(|(pressure, name)| {
            let mut target = object(snapshot.unix_ns, pressure, name);
            target["controllers"] = controllers(pressure);
            target["page"] = directory
                .join(name)
                .join("page")
                .display()
                .to_string()
                .into();
            target
        })
        .collect();
    let subscribers: Vec<Value> = state
        .subscribers()
        .into_iter()
        .map(|subscriber| {
            let mut object = Object(Map::new());
            object.put_some("pid", subscriber.pid);
            object.put_some("target", subscriber.target);
            object.put("min_level", subscriber.min_level.name());
            object.put("since_unix_ns", subscriber.since_unix_ns);
            object.put("lines", subscriber.lines);
            Value::Object(object.0)
        })
        .collect();
    let pages = snapshot.pages;
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let mut status = json!({
        "type": "status",
        "of": "agent",
        "time_unix_ns": unix_ns(),
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "directory": directory.display().to_string(),
        "sampling": snapshot.is_current(),
        "last_sample_age_ns": unix_ns().saturating_sub(snapshot.unix_ns),
        "boot_ns": boot_ns(),
        "pages": {
            "written": pages.written,
            "failed": pages.failed,
            "over_limit": pages.over_limit,
            "renamed": pages.renamed,
        },
        "targets": targets,
        "subscribers": subscribers,
        "stream": {
            "lines": count(&state.counts.lines),
            "rejected": count(&state.counts.rejected),
            "too_slow": count(&state.counts.too_slow),
            "invalid_commands": count(&state.counts.invalid_commands),
        },
    });
    if let Some(file) = state.config_file() {
        let mut object = Object(Map::new());
        object.put("file", file.path.as_str());
        object.put("loaded_unix_ns", file.loaded_unix_ns);
        object.put("reloads", file.reloads);
        object.put("rejected", file.rejected);
        object.put_some("error", file.error.as_deref());
        object.put("needs_restart", file.needs_restart.clone());
        status["config"] = object.0.into();
    }
    if let Some(report) = &state.exact_waits().report {
        status["hooks"] = hooks(report);
    }
    if let Some(report) = snapshot.report.as_deref() {
        status["agent"] = json!(report);
    }
    format!("{status}\n")
}

/// The state of the hooks.
fn hooks(report: &HookReport) -> Value {
    let hooks = report.hooks.iter();
    let hooks: Vec<Value> = hooks
        .map(|hook| json!({"name": hook.name, "runs": hook.runs, "cpu_ns": hook.cpu_ns}))
        .collect();
    let lost = report.lost.iter();
    let lost: Vec<Value> = lost
        .map(|loss| json!({"reason": loss.reason, "count": loss.count}))
        .collect();
    json!({
        "attached": report.is_attached,
        "reason": report.reason,
        "cpu_share": report.share,
        "expected_cpu_share": report.expected_share,
        "cpu_budget": report.budget,
        "programs": hooks,
        "lost": lost,
    })
}

/// What the live page and `tailback top` show, on one line.
pub fn live(state: &SharedState, directory: &Path) -> String {
    let snapshot = state.snapshot();
    let mut view = View::of(
        snapshot.unix_ns,
        &snapshot.pressures,
        &snapshot.names,
        &snapshot.live,
    );
    view.agent = Some(view::Agent {
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        sampling: snapshot.is_current(),
        node: snapshot.downward.node.clone(),
    });
    let subscribers = state.subscribers().into_iter();
    view.subscribers = subscribers
        .map(|of| view::Subscriber {
            pid: of.pid,
            target: of.target,
        })
        .collect();
    let readers = state.readers.get(directory);
    view.add_readers(readers.iter().map(|reader| {
        let (pid, name) = (reader.pid, reader.name.clone());
        (reader.target.as_str(), view::Reader { pid, name })
    }));
    format!("{}\n", json!(view))
}

fn object(unix_ns: u64, pressure: &Pressure, name: &str) -> Value {
    let mut object = Object::new("pressure");
    object.put("time_unix_ns", unix_ns);
    object.put("target", pressure.target.name.as_str());
    object.put("directory", name);
    object.put("pid", pressure.target.pid);
    object.put("level", pressure.level.name());
    object.put("score", round(pressure.score));
    object.put("admit_ratio", round(pressure.admit_ratio));
    object.put("load", round(pressure.load.all));
    object.put_some("utilization", pressure.utilization.map(round));
    object.put_some("concurrency_limit", pressure.concurrency_limit);
    object.put_some("max_queue_wait_ns", pressure.max_queue_wait_ns);
    object.put("oldest_age_ns", pressure.oldest_age_ns);
    object.put_some("time_to_full_ns", pressure.time_to_full_ns);
    object.put("retry_after_ms", pressure.retry_after_ms);
    if let Some((key, gauge)) = pressure.queues.first() {
        let mut worst = Object(Map::new());
        worst.put("kind", key.kind.name());
        worst.put("name", key.name());
        worst.put("depth", gauge.depth);
        worst.put_some("limit", gauge.limit);
        object.put("worst", worst.0);
    }
    Value::Object(object.0)
}

/// The inner state of each admission controller of a service.
fn controllers(pressure: &Pressure) -> Value {
    let one = |(key, state): &(Arc<QueueKey>, ControllerState)| {
        let mut object = Object(Map::new());
        object.put("kind", key.kind.name());
        object.put("name", key.name());
        object.put("mode", state.mode.name());
        object.put("reason", state.mode.reason());
        object.put("admit_ratio", round(state.admit_ratio));
        object.put_some(
            "equilibrium_admit_ratio",
            state.equilibrium_admit_ratio.map(round),
        );
        object.put_some("utilization", state.utilization.map(round));
        object.put_some(
            "overload_utilization",
            state.overload_utilization.map(round),
        );
        object.put("target_delay_ns", state.target_delay_ns);
        object.put("standing_delay_ns", state.standing_delay_ns);
        object.put("max_queue_wait_ns", state.max_queue_wait_ns);
        Value::Object(object.0)
    };
    pressure.controllers.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        emit::json::reference::assert_documented,
        queue::Kind,
        sample::Target,
        signal::{PressureTracker, controller::Mode, fixture},
    };

    #[test]
    fn the_keys_of_status_and_pressure_are_those_of_the_documentation() {
        let parsed = |text: String| serde_json::from_str::<Value>(&text).unwrap();
        let state = fixture::state();
        let status = parsed(agent(&state, Path::new("/run/tailback")));
        assert_documented(r#""of": "agent""#, &[status]);
        let pressure = parsed(standing(&state.snapshot(), |_| true));
        assert_documented("pressure", &[pressure]);
        let empty = parsed(agent(&SharedState::default(), Path::new("/run/tailback")));
        assert!(
            empty.get("agent").is_none(),
            "absent before the first report: {empty}"
        );
    }

    #[test]
    fn a_controller_is_reported_with_its_mode_and_the_numbers_behind_it() {
        let state = ControllerState {
            mode: Mode::Draining,
            admit_ratio: 0.31,
            equilibrium_admit_ratio: Some(0.5),
            utilization: Some(1.0),
            overload_utilization: None,
            target_delay_ns: 20_000_000,
            standing_delay_ns: 170_000_000,
            max_queue_wait_ns: 15_000_000,
        };
        let shop = Arc::new(Target::default());
        let mut pressures =
            PressureTracker::default().read(0, std::iter::empty(), std::iter::once(&shop));
        let key = QueueKey::new(1, Kind::Accept, ":80".into());
        pressures[0].controllers = vec![(Arc::new(key), state)];
        assert_eq!(
            controllers(&pressures[0]),
            json!([{
                "kind": "accept",
                "name": ":80",
                "mode": "draining",
                "reason": Mode::Draining.reason(),
                "admit_ratio": 0.31,
                "equilibrium_admit_ratio": 0.5,
                "utilization": 1.0,
                "target_delay_ns": 20_000_000,
                "standing_delay_ns": 170_000_000,
                "max_queue_wait_ns": 15_000_000,
            }])
        );
    }
}
