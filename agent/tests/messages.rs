//! A real server's own words about its full queue, in a log that is truncated and rotated meanwhile: counted as they
//! stand in the files.

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

const PATIENCE: Duration = Duration::from_secs(90);

/// What the recording holds so far; it may be cut short anywhere.
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

fn heard(path: &Path) -> u64 {
    let samples = samples(path);
    let messages = samples.iter().flat_map(|sample| &sample.messages);
    let full = messages.filter(|message| message.name == "listen_queue_full");
    full.map(|message: &Message| u64::from(message.count)).sum()
}

/// What `grep -c` finds in the file.
fn written(log: &Path) -> u64 {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    text.lines().filter(|line| uwsgi::is_full(line)).count() as u64
}

fn wait_for(what: &str, done: impl Fn() -> bool) {
    wait::until(what, PATIENCE, || Ok(done().then_some(()))).unwrap();
}

#[test]
fn a_servers_words_about_its_full_queue_are_counted_as_they_stand_in_its_log() {
    let test = "a_servers_words_about_its_full_queue_are_counted_as_they_stand_in_its_log";
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
    agent.wait_for("the target", PATIENCE, is_target).unwrap();
    let load = Load::start(Plan {
        to: uwsgi.address(),
        path: "/".to_owned(),
        per_s: 22.0,
        spacing: Spacing::Even,
        duration: 4 * PATIENCE,
        timeout: PATIENCE,
        max_in_flight: 200,
    })
    .unwrap();

    // Some lines, which a truncation then takes away. It stands still meanwhile, so that none is taken away unread.
    wait_for("three lines in the log", || written(&log) >= 3);
    uwsgi.process().freeze().unwrap();
    let truncated = written(&log);
    wait_for("the recording to hold them", || {
        heard(&recording) >= truncated
    });
    File::options()
        .write(true)
        .open(&log)
        .unwrap()
        .set_len(0)
        .unwrap();
    uwsgi.process().thaw().unwrap();
    wait_for("two more lines", || written(&log) >= 2);
    // It writes to the renamed file until it opens the new one.
    fs::rename(&log, &rotated).unwrap();
    fs::write(uwsgi::reopen_file(&log), "now").unwrap();
    wait_for("two lines in the new log", || written(&log) >= 2);
    uwsgi.process().freeze().unwrap();
    let total = truncated + written(&rotated) + written(&log);
    wait_for("the recording to hold them all", || {
        heard(&recording) >= total
    });
    load.stop().unwrap();

    let warned = agent.wait_for("the warning", PATIENCE, |event| {
        event.is("level") && event.text("kind") == "accept" && event.text("from") == "ok"
    });
    let warned = warned.unwrap();
    let warned_unix_ns = warned.value["time_unix_ns"].as_u64().unwrap();
    let agent = agent.into_process();
    agent.signal(Signal::INT).unwrap();
    assert_eq!(agent.wait_end(PATIENCE).unwrap(), End::Code(0));

    let samples = samples(&recording);
    let (mut model, mut heard) = (Model::default(), LogEvidence::default());
    let mut warning = None;
    for sample in &samples {
        model.read(sample);
        heard.read(sample, model.targets());
        if sample.unix_ns == warned_unix_ns {
            warning = Some(Instant {
                mono_ns: sample.mono_ns,
                unix_ns: sample.unix_ns,
            });
        }
    }
    let target = model.targets().all().next().unwrap().id;
    let said = heard.over(target, Instant::default(), warning.unwrap());
    let paths: BTreeSet<&str> = said.iter().map(|said| said.path.as_str()).collect();
    assert_eq!(paths, BTreeSet::from([log.to_str().unwrap()]));
    let full = said
        .iter()
        .find(|said| said.name == "listen_queue_full")
        .unwrap();
    assert_eq!(full.count, total, "as grep counts: {said:?}");
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
    assert!(lead_ns > 0, "warned before uWSGI itself said so: {full:?}");
}
