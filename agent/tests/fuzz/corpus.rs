//! Seeds of the fuzzer: valid inputs of each format.

use std::{fs, io::Write as _, path::PathBuf};

use bytemuck::{Zeroable as _, bytes_of};
use tailback::{
    collect::sample_of_records,
    sample::{
        Sample,
        file::{Reader, Writer},
    },
};
use tailback_ebpf::{
    Header, HolderRecord, KIND_HOLDER, KIND_LISTENER, KIND_PEER, KIND_PIPE, KIND_PROCESS,
    KIND_RING, KIND_SOCKET, KIND_THREAD, KIND_UDP, KIND_UNIX, KIND_WAIT, ListenerRecord,
    PIPE_READ_END, PIPE_WRITE_END, PeerRecord, PipeRecord, ProcessRecord, RingRecord, SocketRecord,
    ThreadRecord, UdpRecord, UnixRecord, WaitRecord,
};

use crate::{mutation::MAX_BYTES, perf_data, repeated};

fn directory(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The BTF excerpt of each kernel.
pub fn btf() -> Vec<Vec<u8>> {
    let mut files: Vec<PathBuf> = fs::read_dir(directory("tests/golden"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "btf"))
        .collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

const TGID: u32 = 7;
const LOCALHOST: [u8; 16] = [127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn header<T>(kind: u16) -> Header {
    Header {
        kind,
        len: size_of::<T>() as u16,
        tgid: TGID,
    }
}

/// Records of one process with a queue of each kind, all filling.
fn service() -> Vec<u8> {
    let mut comm = [0; 16];
    comm[..5].copy_from_slice(b"nginx");
    let process = ProcessRecord {
        header: header::<ProcessRecord>(KIND_PROCESS),
        pid: TGID,
        comm,
        ..ProcessRecord::zeroed()
    };
    let mut listener = ListenerRecord {
        header: header::<ListenerRecord>(KIND_LISTENER),
        cookie: 1,
        now_ns: 9_000_000_000,
        depth: 2,
        limit: 2,
        netns: 4,
        waiting: 2,
        port: 80,
        family: 2,
        local: LOCALHOST,
        ..ListenerRecord::zeroed()
    };
    listener.header.len += 16;
    let stamps = [80_u64 << 48 | 1_000_000, 80 << 48 | 2_000_000].map(u64::to_le_bytes);
    let socket = |cookie, local_port, remote_port| SocketRecord {
        header: header::<SocketRecord>(KIND_SOCKET),
        cookie,
        state: 1,
        family: 2,
        local_port,
        remote_port,
        netns: 4,
        rcv_nxt: 500_000,
        copied_seq: 1_000,
        write_seq: 5_000,
        snd_una: 1_000,
        snd_nxt: 3_000,
        rmem_alloc: 600_000,
        rcvbuf: 650_000,
        wmem_queued: 6_000,
        sndbuf: 6_000,
        local: LOCALHOST,
        remote: LOCALHOST,
        ..SocketRecord::zeroed()
    };
    let udp = UdpRecord {
        header: header::<UdpRecord>(KIND_UDP),
        cookie: 4,
        head: 99,
        netns: 4,
        memory: 200_000,
        rcvbuf: 212_992,
        queued: 3,
        local_port: 53,
        family: 10,
        ..UdpRecord::zeroed()
    };
    let mut unix = UnixRecord {
        header: header::<UnixRecord>(KIND_UNIX),
        inode: 31,
        peer: 32,
        style: 1,
        state: 10,
        queued: 9,
        limit: 9,
        path_len: 9,
        ..UnixRecord::zeroed()
    };
    unix.path[..6].copy_from_slice(b"/run/a");
    let stream = UnixRecord {
        inode: 33,
        peer: 34,
        state: 1,
        written: 70_000,
        sndbuf: 80_000,
        peer_written: 70_000,
        peer_sndbuf: 80_000,
        ..unix
    };
    let ring = RingRecord {
        header: header::<RingRecord>(KIND_RING),
        id: 77,
        sq_tail: 8,
        sq_entries: 8,
        cq_tail: 16,
        cq_entries: 16,
        ..RingRecord::zeroed()
    };
    let pipe = PipeRecord {
        header: header::<PipeRecord>(KIND_PIPE),
        inode: 41,
        end: PIPE_READ_END | PIPE_WRITE_END,
        head: 20,
        tail: 4,
        limit: 16,
        bytes: 60_000,
        readers: 1,
        writers: 1,
        ..PipeRecord::zeroed()
    };
    let thread = ThreadRecord {
        header: header::<ThreadRecord>(KIND_THREAD),
        tid: TGID,
        run_delay_ns: 5_000_000,
        dispatches: 10,
        cpu_ns: 5_000_000,
        ..ThreadRecord::zeroed()
    };
    let wait = WaitRecord {
        header: header::<WaitRecord>(KIND_WAIT),
        tid: TGID,
        own_tid: TGID,
        state: 1,
        syscall: 7,
        polled_len: 2,
        polled: [[3, 1]; 8],
        comm,
        ..WaitRecord::zeroed()
    };
    let holder = HolderRecord {
        header: header::<HolderRecord>(KIND_HOLDER),
        inode: 41,
        fd: 1,
        end: PIPE_READ_END,
    };
    let peer = PeerRecord {
        header: header::<PeerRecord>(KIND_PEER),
        cookie: 51,
        fd: 9,
        netns: 1,
        local_port: 40_000,
        remote_port: 80,
        family: 2,
        ..PeerRecord::zeroed()
    };
    [
        bytes_of(&process),
        bytes_of(&listener),
        stamps.as_flattened(),
        bytes_of(&socket(2, 80, 40_000)),
        bytes_of(&socket(3, 40_000, 80)),
        bytes_of(&udp),
        bytes_of(&unix),
        bytes_of(&stream),
        bytes_of(&ring),
        bytes_of(&pipe),
        bytes_of(&thread),
        bytes_of(&wait),
        bytes_of(&holder),
        bytes_of(&peer),
    ]
    .concat()
}

/// The records of that process, only its process record, and no record.
pub fn records() -> Vec<Vec<u8>> {
    let whole = service();
    vec![
        whole[..size_of::<ProcessRecord>()].to_vec(),
        Vec::new(),
        whole,
    ]
}

/// The performance data of a JVM in both byte orders, of one without a collector, and of one that has just started.
pub fn jvm_counters() -> Vec<Vec<u8>> {
    let values = [
        1_000_000_000,
        5,
        3_000_000,
        4,
        2_500_000,
        9_000_000,
        8_000_000,
    ];
    let mut starting = perf_data::jvm(values, true);
    starting[7] = 0;
    let without_collector: Vec<(&str, i64)> = perf_data::NAMES[..3]
        .iter()
        .map(|name| (*name, 1))
        .collect();
    vec![
        perf_data::jvm(values, true),
        perf_data::jvm(values, false),
        perf_data::file(&without_collector, true),
        starting,
    ]
}

/// Two seconds of samples of that process.
pub fn samples() -> Vec<Sample> {
    repeated(sample_of_records(&service()).unwrap())
}

fn recorded(samples: &[Sample]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = Writer::new(&mut bytes).unwrap();
    for sample in samples {
        writer.add(sample).unwrap();
    }
    writer.flush().unwrap();
    drop(writer);
    bytes
}

/// Whole files, and the uncompressed content of chunks: inside a file, the checksum would reject every change.
pub fn recordings() -> Vec<Vec<u8>> {
    let samples = samples();
    let inside: Vec<u8> = samples
        .iter()
        .flat_map(|sample| postcard::to_stdvec(sample).unwrap())
        .collect();
    assert!(inside.len() < MAX_BYTES / 2);
    let few = samples[..3]
        .iter()
        .flat_map(|sample| postcard::to_stdvec(sample).unwrap())
        .collect();
    vec![recorded(&samples), inside, few]
}

/// The bytes themselves if they start like a recording; else a recording with one chunk that has the bytes as samples.
pub fn recording_of(bytes: &[u8]) -> Vec<u8> {
    let mut file = recorded(&[]);
    if Reader::new(bytes).is_ok() {
        return bytes.to_vec();
    }
    let mut chunk = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        // What cannot be read as a sample goes in as it is: the reader has to refuse it.
        let after = postcard::take_from_bytes::<Sample>(rest).map_or(&[][..], |(_, after)| after);
        let sample = &rest[..rest.len() - after.len()];
        chunk.extend((sample.len() as u32).to_le_bytes());
        chunk.extend(sample);
        rest = after;
    }
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.write_all(&chunk).unwrap();
    let frame = encoder.finish().unwrap();
    file.extend((frame.len() as u32).to_le_bytes());
    file.extend(frame);
    file
}

/// The example of the documentation, and each of its sections.
pub fn configs() -> Vec<Vec<u8>> {
    let page = fs::read_to_string(directory("../docs/reference/configuration.md")).unwrap();
    let example = page.split("```").nth(1).unwrap();
    let example = example.trim_start_matches("toml").to_owned();
    let parts = example.split("\n\n").map(str::to_owned);
    let mut all: Vec<Vec<u8>> = parts.map(String::into_bytes).collect();
    all.push(example.into_bytes());
    all
}

pub const CONFIG_WORDS: &[&str] = &[
    "[[target]]\n",
    "[detect.accept]\n",
    "[detect.all]\n",
    "[[detect.queue]]\n",
    "pid = 1\n",
    "name = \"*\"\n",
    "cgroup = \"/\"\n",
    "port = 65535\n",
    "warn = nan\n",
    "exit_ratio = inf\n",
    "window = \"584y\"\n",
    "dwell = \"0s\"\n",
    "interval = \"1ns\"\n",
    "thresholds = {}\n",
    "9223372036854775807",
    "-1",
    "0",
    "1e308",
    "\"\"",
    "'''",
    "\u{0}",
    "\u{202e}",
    "[[[[[[[[",
    "{a={a={a={",
    "*",
    "?",
    "ms",
    "h",
];
