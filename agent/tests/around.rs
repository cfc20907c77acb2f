//! The closer look at a suspicious service, on the running kernel: who else is watched for its sake, who holds the other
//! ends of its connections, and how often all their threads are looked at.
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
const LASTS: Duration = Duration::from_secs(12);

/// Accepts one connection. With the port of another server it asks that one, and reads nothing from its own client before
/// the answer; without, it never answers.
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

/// Writes to the server at the port given until there is no room left, and waits there.
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

/// A server of the kind above, and its port.
fn server(name: &str, args: &[&str]) -> (Process, String) {
    let server = python(name, SERVER, args);
    let line = server.wait_line("port ", START).unwrap();
    let port = line.text.split(' ').nth(1).unwrap().to_owned();
    (server, port)
}

/// What the agent recorded of one process and those around it.
fn record(pid: u32, folder: &Path) -> Vec<Sample> {
    let (file, config) = (folder.join("samples"), folder.join("config"));
    // Enough for the rate that is asked for below, whatever else this machine is busy with.
    fs::write(&config, "cpu_budget = 0.05").unwrap();
    let lasts = format!("{}s", LASTS.as_secs());
    let mut command = Command::new(agent::binary().unwrap());
    command.args(["record", "--pid", &pid.to_string(), "--duration", &lasts]);
    command.arg("--config").arg(&config);
    let recording = Process::start("tailback", command.arg("--out").arg(&file)).unwrap();
    assert_eq!(recording.wait_end(LASTS + START).unwrap(), End::Code(0));
    let mut reader = Reader::new(BufReader::new(File::open(file).unwrap())).unwrap();
    let mut samples = Vec::new();
    while let Some(sample) = reader.next_sample().unwrap() {
        samples.push(sample);
    }
    samples
}

/// The processes of the targets that were told, with whether they are followed; and the ids that these have had.
fn told(samples: &[Sample]) -> BTreeMap<u32, (bool, BTreeSet<u32>)> {
    let mut told: BTreeMap<u32, (bool, BTreeSet<u32>)> = BTreeMap::new();
    for target in samples
        .iter()
        .filter_map(|sample| sample.targets.as_ref())
        .flatten()
    {
        for tgid in &target.tgids {
            let (followed, ids) = told.entry(*tgid).or_default();
            *followed = target.followed;
            ids.insert(target.id);
        }
    }
    told
}

/// Looks per second at the threads of a process, over the last half of the recording.
fn looks_per_s(samples: &[Sample], tgid: u32) -> f64 {
    let end_ns = samples.last().unwrap().mono_ns;
    let from_ns = end_ns - LASTS.as_nanos() as u64 / 2;
    let late = samples.iter().filter(|sample| sample.mono_ns >= from_ns);
    let looks = late.filter(|sample| sample.profile.iter().any(|wait| wait.tgid == tgid));
    looks.count() as f64 / (LASTS.as_secs_f64() / 2.0)
}

#[test]
fn whoever_keeps_a_suspicious_service_waiting_is_watched_with_it() {
    if !needs::met(
        "whoever_keeps_a_suspicious_service_waiting_is_watched_with_it",
        &["python3"],
    ) {
        return;
    }
    let folder = TempDir::new("around").unwrap();
    let (behind, port) = server("behind", &[]);
    let (service, port) = server("service", &[&port]);
    let client = python("client", CLIENT, &[&port]);
    service.wait_line("waits", START).unwrap();
    let stranger = server("stranger", &[]).0;

    let samples = record(client.pid(), folder.path());
    let [client, service, behind, stranger] =
        [client, service, behind, stranger].map(|process| process.pid());
    // Both hops, each under one id; and the one that was asked for stays what it is.
    let told = told(&samples);
    let kinds: BTreeMap<u32, bool> = told.iter().map(|(tgid, told)| (*tgid, told.0)).collect();
    let expected = [(client, false), (service, true), (behind, true)];
    assert_eq!(
        kinds,
        expected.into(),
        "{stranger} has nothing to do with it"
    );
    assert!(told.values().all(|(_, ids)| ids.len() == 1), "{told:?}");

    let peers = samples
        .iter()
        .rev()
        .find_map(|sample| sample.peers.as_ref());
    let peers = peers.expect("the other ends were looked for");
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
        let rate = looks_per_s(&samples, tgid);
        println!("{tgid}: {rate:.1} looks per second");
        assert!(rate > 30.0, "{tgid}: {rate:.1} looks per second");
    }
    // The client's one thread waits in a call on its connection.
    let waits = samples.iter().flat_map(|sample| &sample.profile);
    let asleep = waits
        .filter(|wait| wait.tgid == client && wait.state == State::Sleeping)
        .filter(|wait| wait.syscall.is_some())
        .count();
    assert!(asleep > 100, "{asleep}");
    // Nobody has given itself a title, and command lines are nobody's business.
    assert!(samples.iter().all(|sample| sample.titles.is_empty()));
}
