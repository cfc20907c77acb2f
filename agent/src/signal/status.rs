//! How things stand, as JSON: for those who subscribe, and for `tailback status`.

use std::{path::Path, sync::atomic::Ordering};

use serde_json::{Map, Value, json};

use super::{
    hub::{Hub, Snapshot},
    pressure::Pressure,
};
use crate::collect::{boot_ns, unix_ns};

/// A line for each service that is wanted by its name.
pub fn standing(snapshot: &Snapshot, is_wanted: impl Fn(&str) -> bool) -> String {
    let all = snapshot.pressures.iter().zip(snapshot.names.iter());
    all.filter(|(pressure, _)| is_wanted(&pressure.target.name))
        .map(|(pressure, name)| format!("{}\n", object(snapshot.unix_ns, pressure, name)))
        .collect()
}

/// All of the agent's side, on one line.
pub fn agent(hub: &Hub, directory: &Path) -> String {
    let snapshot = hub.snapshot();
    let targets: Vec<Value> = snapshot
        .pressures
        .iter()
        .zip(snapshot.names.iter())
        .map(|(pressure, name)| {
            let mut target = object(snapshot.unix_ns, pressure, name);
            target["page"] = directory
                .join(name)
                .join("page")
                .display()
                .to_string()
                .into();
            target
        })
        .collect();
    let subscribers: Vec<Value> = hub
        .subscribers()
        .into_iter()
        .map(|subscriber| {
            let mut object = Map::new();
            put_some(&mut object, "pid", subscriber.pid);
            put_some(&mut object, "target", subscriber.target);
            object.insert("min_level".to_owned(), subscriber.min_level.name().into());
            object.insert("since_unix_ns".to_owned(), subscriber.since_unix_ns.into());
            object.insert("lines".to_owned(), subscriber.lines.into());
            Value::Object(object)
        })
        .collect();
    let (written, failed, beyond) = snapshot.pages;
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let status = json!({
        "type": "status",
        "of": "agent",
        "time_unix_ns": unix_ns(),
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "directory": directory.display().to_string(),
        "last_tick_age_ns": unix_ns().saturating_sub(snapshot.unix_ns),
        "boot_ns": boot_ns(),
        "pages": {"written": written, "failed": failed, "beyond_bound": beyond},
        "targets": targets,
        "subscribers": subscribers,
        "stream": {
            "lines": count(&hub.counts.lines),
            "refused": count(&hub.counts.refused),
            "too_slow": count(&hub.counts.too_slow),
            "not_understood": count(&hub.counts.not_understood),
        },
        "agent": snapshot.report.as_deref(),
    });
    format!("{status}\n")
}

fn object(unix_ns: u64, pressure: &Pressure, name: &str) -> Value {
    let mut object = Map::new();
    object.insert("type".to_owned(), "pressure".into());
    object.insert("time_unix_ns".to_owned(), unix_ns.into());
    object.insert("target".to_owned(), pressure.target.name.as_str().into());
    object.insert("directory".to_owned(), name.into());
    object.insert("pid".to_owned(), pressure.target.pid.into());
    object.insert("level".to_owned(), pressure.level.name().into());
    object.insert("score".to_owned(), round(pressure.score));
    object.insert("admit".to_owned(), round(pressure.admit));
    object.insert("oldest_wait_ns".to_owned(), pressure.oldest_wait_ns.into());
    put_some(&mut object, "time_to_full_ns", pressure.time_to_full_ns);
    object.insert("retry_after_ms".to_owned(), pressure.retry_after_ms.into());
    if let Some((key, gauge)) = pressure.queues.first() {
        let mut worst = Map::new();
        worst.insert("kind".to_owned(), key.kind.name().into());
        worst.insert("name".to_owned(), key.name.as_str().into());
        worst.insert("depth".to_owned(), gauge.depth.into());
        put_some(&mut worst, "limit", gauge.limit);
        object.insert("worst".to_owned(), worst.into());
    }
    Value::Object(object)
}

fn put_some(object: &mut Map<String, Value>, key: &str, value: Option<impl Into<Value>>) {
    if let Some(value) = value {
        object.insert(key.to_owned(), value.into());
    }
}

fn round(value: f64) -> Value {
    ((value * 1e4).round() / 1e4).into()
}
