//! The services that are asked for their own queues: which were found, how each was asked and verified, and the cost.

use std::time::Duration;

use super::Check;
use crate::{
    collect::{AppReport, AppSettings, Collector, OutputStats, SamplePlan},
    sample::anonymize::PRESETS,
    text::{count, duration},
};

/// How long answers are waited for.
const LIMIT: Duration = Duration::from_secs(1);

const COST: &str = "the queues inside it are not watched; its kernel queues are";

/// A line per service, or one that says that there is none.
pub(super) fn checks(collector: &mut Collector, settings: Option<AppSettings>) -> Vec<Check> {
    let line = |state| Check {
        name: "queues inside services".into(),
        state,
        cost: "brokers, pools and gateways are watched from outside only",
        remedy: "`[app] enabled = true` in the configuration".into(),
        required: false,
    };
    if settings.is_none() {
        let why = "turned off by the configuration".to_owned();
        return vec![line(Err(why))];
    }
    collector.ask_apps(settings);
    // Finds the unix sockets on which services listen.
    if let Err(error) = collector.sample(SamplePlan::complete(), OutputStats::default()) {
        return vec![line(Err(format!("{error:#}")))];
    }
    collector.wait_for_apps(LIMIT);
    let mut reports = collector.app_reports();
    if reports.is_empty() {
        return vec![line(Ok("no service recognized".to_owned()))];
    }
    reports.sort_by(|a, b| (&a.preset, a.tgid).cmp(&(&b.preset, b.tgid)));
    reports.iter().map(check).collect()
}

fn check(report: &AppReport) -> Check {
    let AppReport {
        tgid,
        preset,
        exe,
        endpoint,
        proof,
        queues,
        left_out,
        malformed,
        took,
        pace,
        failure,
        missing,
        is_asked: _,
    } = report;
    let state = match (endpoint, failure) {
        (_, Some(failure)) => Err(failure.clone()),
        (None, None) => Err(format!(
            "no answer within {}",
            duration(LIMIT.as_nanos() as u64)
        )),
        (Some(endpoint), None) => {
            let mut how = format!(
                "asked at {endpoint}, verified by {proof}: {} queues, {} every {}",
                count(*queues as u64),
                duration(took.as_nanos() as u64),
                duration(pace.as_nanos() as u64)
            );
            for (number, what) in [
                (left_out, "beyond the limit"),
                (malformed, "not understood"),
            ] {
                if *number > 0 {
                    how += &format!(", {} {what}", count(*number as u64));
                }
            }
            if let Some(missing) = missing {
                how += &format!("; without {missing}");
            }
            Ok(how)
        }
    };
    let page = match PRESETS.contains(&preset.as_str()) {
        true => format!("app-{preset}.md"),
        false => "app.md".to_owned(),
    };
    Check {
        name: format!("queues inside {exe} ({tgid}), {preset}").into(),
        state,
        cost: COST,
        remedy: format!(
            "see docs/reference/queues/{page}; `[app] disabled = [\"{preset}\"]` asks none"
        )
        .into(),
        required: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_where_a_service_was_asked_what_proved_it_and_what_it_costs() {
        let report = AppReport {
            tgid: 12,
            preset: "redis".to_owned(),
            exe: "redis-server".to_owned(),
            endpoint: Some("127.0.0.1:6379".to_owned()),
            proof: "info.blocked_clients".to_owned(),
            queues: 3,
            malformed: 1,
            took: Duration::from_micros(800),
            pace: Duration::from_secs(5),
            is_asked: true,
            ..AppReport::default()
        };
        let line = check(&report);
        assert_eq!(line.name, "queues inside redis-server (12), redis");
        assert_eq!(
            line.state.unwrap(),
            "asked at 127.0.0.1:6379, verified by info.blocked_clients: 3 queues, 800 µs every 5.0 s, 1 not understood"
        );
        let failed = AppReport {
            failure: Some("cannot connect".to_owned()),
            ..report.clone()
        };
        assert_eq!(check(&failed).state.unwrap_err(), "cannot connect");
        assert!(line.remedy.contains("queues/app-redis.md"));
        let of_a_user = AppReport {
            preset: "shop".to_owned(),
            missing: Some("GET /large: it is too large".to_owned()),
            ..report
        };
        let line = check(&of_a_user);
        assert!(line.remedy.contains("queues/app.md"), "{}", line.remedy);
        assert!(
            line.state
                .unwrap()
                .ends_with("; without GET /large: it is too large")
        );
    }
}
