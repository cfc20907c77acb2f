//! Counts uWSGI's own messages about its full queue, in a log file that is truncated and rotated meanwhile.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::Path,
    time::Duration,
};

use rustix::process::Signal;
use tailback::{
    diagnose::log_evidence::LogEvidence,
    event::Instant,
    queue::Model,
    sample::{Message, Sample, file::Reader},
};
use tailback_tests::{
    agent::Agent,
    load::{Load, Plan, Spacing},
    needs,
    process::End,
    temp::TempDir,
    uwsgi::{self, Options, Uwsgi},
    wait,
};

/// Longest wait for each step.
const TIMEOUT: Duration = Duration::from_secs(90);

/// The samples recorded so far. The last one may be incomplete.
fn samples(path: &Path) -> Vec<Sample> {
    let mut samples = Vec::new();
    let Ok(mut reader) = Reader::new(File::open(path).unwrap()) else {
        return samples;
    };
    while let Ok(Some(sample)) = reader.next_sample() {
        samples.push(sample);
    }
    samples
}

fn recorded(path: &Path) -> u64 {
    let samples = samples(path);
    let messages = samples.iter().flat_map(|sample| &sample.messages);
    let full = messages.filter(|message| message.name == "listen_queue_full");
    full.map(|message: &Message| u64::from(message.count)).sum()
}

/// Messages in the log file, as `grep -c` counts them.
fn written(log: &Path) -> u64 {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    text.lines().filter(|line| uwsgi::is_full(line)).count() as u64
}

fn wait_for(what: &str, done: impl Fn() -> bool) {
    wait::until(what, TIMEOUT, || Ok(done().then_some(()))).unwrap();
}

#[test]
fn messages_about_a_full_queue_are_counted_across_truncation_and_rotation() {
    let test = "messages_about_a_full_queue_are_counted_across_truncation_and_rotation";
    if !needs::met(test, &["uwsgi"]) {
        return;
    }
    let dir = TempDir::new("messages").unwrap();
    let log = dir.path().join("uwsgi.log");
    let rotated = dir.path().join("uwsgi.log.1");
    let recording = dir.path().join("recording");
    let uwsgi = Uwsgi::start_logging_to(
        &Options {
            workers: 2,
            backlog: 100,
            redis_port: 0,
            calls: 0,
            work: Duration::from_millis(200),
        },
        &log,
    )
    .unwrap();
    let port = uwsgi.port().to_string();
    let agent = Agent::run(["--port", &port, "--record", recording.to_str().unwrap()]).unwrap();
    let is_target = |event: &tailback_tests::agent::Event| event.is("target");
    agent.wait_for("the target", TIMEOUT, is_target).unwrap();
    let load = Load::start(Plan {
        to: uwsgi.address(),
        path: "/".to_owned(),
        per_s: 22.0,
        spacing: Spacing::Even,
        duration: 4 * TIMEOUT,
        timeout: TIMEOUT,
        max_in_flight: 200,
    })
    .unwrap();

    // Truncate the file after some lines. uWSGI is frozen meanwhile, so that no line is lost unread.
    wait_for("three lines in the log", || written(&log) >= 3);
    uwsgi.process().freeze().unwrap();
    let truncated = written(&log);
    wait_for("the recording to hold them", || {
        recorded(&recording) >= truncated
    });
    File::options()
        .write(true)
        .open(&log)
        .unwrap()
        .set_len(0)
        .unwrap();
    uwsgi.process().thaw().unwrap();
    wait_for("two more lines", || written(&log) >= 2);
    // uWSGI writes to the renamed file until it opens the new one.
    fs::rename(&log, &rotated).unwrap();
    fs::write(uwsgi::reopen_file(&log), "now").unwrap();
    wait_for("two lines in the new log", || written(&log) >= 2);
    uwsgi.process().freeze().unwrap();
    let total = truncated + written(&rotated) + written(&log);
    wait_for("the recording to hold them all", || {
        recorded(&recording) >= total
    });
    load.stop().unwrap();

    let warned = agent.wait_for("the warning", TIMEOUT, |event| {
        event.is("level") && event.text("kind") == "accept" && event.text("from") == "ok"
    });
    let warned = warned.unwrap();
    let warned_unix_ns = warned.value["time_unix_ns"].as_u64().unwrap();
    let agent = agent.into_process();
    agent.signal(Signal::INT).unwrap();
    assert_eq!(agent.wait_end(TIMEOUT).unwrap(), End::Code(0));

    let samples = samples(&recording);
    let (mut model, mut evidence) = (Model::default(), LogEvidence::default());
    let mut warning = None;
    for sample in &samples {
        model.read(sample);
        evidence.read(sample, model.targets());
        if sample.unix_ns == warned_unix_ns {
            warning = Some(Instant {
                mono_ns: sample.mono_ns,
                unix_ns: sample.unix_ns,
            });
        }
    }
    let target = model.targets().all().next().unwrap().id;
    let found = evidence.over(target, Instant::default(), warning.unwrap());
    let paths: BTreeSet<&str> = found.iter().map(|message| message.path.as_str()).collect();
    assert_eq!(paths, BTreeSet::from([log.to_str().unwrap()]));
    let full = found
        .iter()
        .find(|message| message.name == "listen_queue_full")
        .unwrap();
    assert_eq!(full.count, total, "as grep counts: {found:?}");
    assert!(
        uwsgi::is_full(&full.line) && full.line.contains(&port),
        "{}",
        full.line
    );
    let lead_ns = full.lead_ns.unwrap();
    println!(
        "{total} lines; warned {:.1} s before the first",
        lead_ns as f64 / 1e9
    );
    assert!(lead_ns > 0, "warned before uWSGI logged it: {full:?}");
}
