//! Tests of focus on the running kernel: which neighbours of a focused target are watched too, which processes hold the other
//! ends of its connections, and how often the threads of all of them are sampled.
//!
//! Needs root, and a kernel with BTF.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::BufReader,
    path::Path,
    process::Command,
    time::Duration,
};

use tailback::sample::{Sample, State, file::Reader};
use tailback_tests::{
    agent, needs,
    process::{End, Process},
    program,
    temp::TempDir,
};

const START: Duration = Duration::from_secs(30);
/// Duration of the recording.
const DURATION: Duration = Duration::from_secs(12);
/// Longest time between two samples of a focused process that is not a pause of the machine.
const MAX_GAP_NS: u64 = 200_000_000;

/// Accepts one connection. Given the port of another server, it calls that one and reads nothing from its own client before the
/// response. Otherwise it never responds.
const SERVER: &str = "
import socket, sys
listener = socket.create_server(('127.0.0.1', 0))
print('port', listener.getsockname()[1], flush=True)
held = listener.accept()
if len(sys.argv) > 1:
    behind = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
    behind.sendall(b'a question')
    print('waits', flush=True)
    behind.recv(1)
while held[0].recv(65536): pass
";

/// Writes to the server at the given port until the buffers are full, and blocks there.
const CLIENT: &str = "
import socket, sys
connection = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
print('writes', flush=True)
while True: connection.sendall(b'x' * 65536)
";

fn python(name: &str, text: &str, args: &[&str]) -> Process {
    let python = program::need(&["python3"]).unwrap();
    Process::start(name, Command::new(python).args(["-c", text]).args(args)).unwrap()
}

/// Starts [`SERVER`] and returns its port.
fn server(name: &str, args: &[&str]) -> (Process, String) {
    let server = python(name, SERVER, args);
    let line = server.wait_line("port ", START).unwrap();
    let port = line.text.split(' ').nth(1).unwrap().to_owned();
    (server, port)
}

/// Records one process and its neighbours.
fn record(pid: u32, directory: &Path) -> Vec<Sample> {
    let (file, config) = (directory.join("samples"), directory.join("config"));
    // Enough budget for the sampling rate required below, even on a busy machine.
    fs::write(&config, "cpu_budget = 0.05").unwrap();
    let duration = format!("{}s", DURATION.as_secs());
    let mut command = Command::new(agent::binary().unwrap());
    command.args(["record", "--pid", &pid.to_string(), "--duration", &duration]);
    command.arg("--config").arg(&config);
    let recording = Process::start("tailback", command.arg("--out").arg(&file)).unwrap();
    assert_eq!(recording.wait_end(DURATION + START).unwrap(), End::Code(0));
    let mut reader = Reader::new(BufReader::new(File::open(file).unwrap())).unwrap();
    let mut samples = Vec::new();
    while let Some(sample) = reader.next_sample().unwrap() {
        samples.push(sample);
    }
    samples
}

/// Processes of the reported targets, whether each is a neighbour, and the target ids that it had.
fn reported(samples: &[Sample]) -> BTreeMap<u32, (bool, BTreeSet<u32>)> {
    let mut reported: BTreeMap<u32, (bool, BTreeSet<u32>)> = BTreeMap::new();
    for target in samples
        .iter()
        .filter_map(|sample| sample.targets.as_ref())
        .flatten()
    {
        for tgid in &target.tgids {
            let (is_neighbour, ids) = reported.entry(*tgid).or_default();
            *is_neighbour = target.is_neighbour;
            ids.insert(target.id);
        }
    }
    reported
}

/// Thread samples of a process per second, over the last half of the recording. The time in which the machine pauses does not
/// count: of the time between two samples, at most [`MAX_GAP_NS`].
fn samples_per_s(samples: &[Sample], tgid: u32) -> f64 {
    let end_ns = samples.last().unwrap().mono_ns;
    let from_ns = end_ns - DURATION.as_nanos() as u64 / 2;
    let late = samples.iter().filter(|sample| sample.mono_ns >= from_ns);
    let late: Vec<&Sample> = late.collect();
    let gaps = late.windows(2).map(|two| two[1].mono_ns - two[0].mono_ns);
    let passed_ns: u64 = gaps.map(|gap_ns| gap_ns.min(MAX_GAP_NS)).sum();
    let is_profiled = |sample: &&&Sample| sample.profile.iter().any(|wait| wait.tgid == tgid);
    let profiled = late.iter().filter(is_profiled).count();
    profiled as f64 / (passed_ns as f64 / 1e9)
}

#[test]
fn the_chain_that_blocks_a_focused_service_is_monitored_with_it() {
    if !needs::met(
        "the_chain_that_blocks_a_focused_service_is_monitored_with_it",
        &["python3"],
    ) {
        return;
    }
    let directory = TempDir::new("around").unwrap();
    let (behind, port) = server("behind", &[]);
    let (service, port) = server("service", &[&port]);
    let client = python("client", CLIENT, &[&port]);
    service.wait_line("waits", START).unwrap();
    let stranger = server("stranger", &[]).0;

    let samples = record(client.pid(), directory.path());
    let [client, service, behind, stranger] =
        [client, service, behind, stranger].map(|process| process.pid());
    // Both hops are followed, each under one target id; the requested target is not a neighbour.
    let reported = reported(&samples);
    let kinds: BTreeMap<u32, bool> = reported
        .iter()
        .map(|(tgid, state)| (*tgid, state.0))
        .collect();
    let expected = [(client, false), (service, true), (behind, true)];
    assert_eq!(kinds, expected.into(), "{stranger} is unrelated");
    assert!(
        reported.values().all(|(_, ids)| ids.len() == 1),
        "{reported:?}"
    );

    let peers = samples
        .iter()
        .rev()
        .find_map(|sample| sample.peers.as_ref());
    let peers = peers.expect("peers were resolved");
    let connections = || samples.iter().flat_map(|sample| &sample.connections);
    for (process, other) in [(client, service), (service, behind)] {
        let opened = connections()
            .rfind(|connection| connection.tgid == process && connection.write_seq != 0)
            .unwrap();
        let other_end = |connection: &&tailback::sample::Connection| {
            connection.tgid == process
                && peers.iter().any(|peer| {
                    peer.tgid == other
                        && (peer.netns, peer.local, peer.remote)
                            == (connection.netns, connection.remote, connection.local)
                })
        };
        assert!(
            connections().any(|connection| other_end(&connection)),
            "{opened:?} is held by {other}, not by {peers:?}"
        );
    }
    assert!(peers.iter().all(|peer| peer.tgid != stranger));

    for tgid in [client, service, behind] {
        let rate = samples_per_s(&samples, tgid);
        println!("{tgid}: {rate:.1} samples per second");
        assert!(rate > 30.0, "{tgid}: {rate:.1} samples per second");
    }
    // The client's only thread blocks in a system call on its connection.
    let waits = samples.iter().flat_map(|sample| &sample.profile);
    let asleep = waits
        .filter(|wait| wait.tgid == client && wait.state == State::Sleeping)
        .filter(|wait| wait.syscall.is_some())
        .count();
    assert!(asleep > 100, "{asleep}");
    // No process set its title, and command lines are never recorded.
    assert!(samples.iter().all(|sample| sample.titles.is_empty()));
}
