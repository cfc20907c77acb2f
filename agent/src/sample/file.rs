//! Recordings: a stream of samples in a file.
//!
//! Layout: the magic bytes, a u32 version, then chunks. A chunk is a u32 length (little-endian) and one zstd frame with
//! checksum. The frame holds samples, each as a u32 length and its postcard encoding. Fields that samples gained since this
//! version of the layout follow within that length, and may be absent (`Appended`). A chunk covers about one second, so a
//! truncated recording (full disk, crash) loses at most that, and the reader reports it.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    fmt,
    io::{self, Read, Write},
    net::SocketAddr,
};

use serde::{Deserialize, Serialize};

use super::{
    AppAnswer, Architecture, Conntrack, Epoll, Hidden, HookReport, IoLimit, JvmCounters,
    LocalPorts, LockWait, OnAccelerator, Refaults, Sample, TargetId, Workload,
};

const MAGIC: &[u8; 12] = b"TAILBACKREC\n";
/// Incremented whenever [`Sample`] changes: postcard is not self-describing.
const VERSION: u32 = 3;
/// Time covered by one chunk, ns: the most that a crash can lose.
const CHUNK_NS: u64 = 1_000_000_000;
/// Time covered by one chunk of a packed copy, ns: a copy has nothing to lose, and longer chunks compress better.
const PACKED_CHUNK_NS: u64 = 60_000_000_000;
/// Largest chunk of a packed copy before compression, in bytes.
const PACKED_CHUNK_BYTES: usize = 16 << 20;
/// Largest chunk that is read, in bytes: a malicious file must not allocate all memory. No recording has larger ones.
const MAX_CHUNK_BYTES: usize = 256 << 20;
/// zstd level while recording: its default.
const LEVEL: i32 = 3;
/// zstd level of a packed copy: the highest regular one.
const PACKED_LEVEL: i32 = 19;
/// Latest valid time, ns (the year 2262): half the range of u64, so that adding times and durations cannot overflow.
const LATEST_NS: u64 = i64::MAX as u64;

/// Fields of [`Sample`] that older recordings do not have. A new field goes into a new structure of this kind,
/// after the last one.
#[derive(Serialize, Deserialize)]
struct Appended<LockWaits> {
    lock_waits: LockWaits,
}

/// See [`Appended`].
#[derive(Serialize, Deserialize)]
struct AppendedNext<OnAccelerator, LocalPorts, IoLimits, Refaults> {
    on_accelerator: OnAccelerator,
    local_ports: LocalPorts,
    io_limits: IoLimits,
    refaults: Refaults,
}

/// See [`Appended`].
#[derive(Serialize, Deserialize)]
struct AppendedEpolls<Epolls> {
    epolls: Epolls,
}

/// See [`Appended`].
#[derive(Serialize, Deserialize)]
struct AppendedHidden<Hidden> {
    hidden: Hidden,
}

/// See [`Appended`]. Of the targets that the sample reports, those that have one.
#[derive(Serialize, Deserialize)]
struct AppendedWorkloads<Workloads> {
    workloads: Workloads,
}

/// See [`Appended`].
#[derive(Serialize, Deserialize)]
struct AppendedConntrack<Conntrack> {
    conntrack: Conntrack,
}

/// See [`Appended`].
#[derive(Serialize, Deserialize)]
struct AppendedArchitecture {
    architecture: Architecture,
}

/// See [`Appended`].
#[derive(Serialize, Deserialize)]
struct AppendedJvmCounters<JvmCounters> {
    jvm_counters: JvmCounters,
}

/// See [`Appended`].
#[derive(Serialize, Deserialize)]
struct AppendedHooks<Hooks> {
    hooks: Hooks,
}

/// See [`Appended`].
#[derive(Serialize, Deserialize)]
struct AppendedApp<App> {
    app: App,
}

/// See [`Appended`]. By answer and queue, as numbers in `app`: where the queues of proxies and pools are served.
#[derive(Serialize, Deserialize)]
struct AppendedServedOn {
    served_on: Vec<(u32, u32, Vec<SocketAddr>)>,
}

impl AppendedServedOn {
    fn of(app: &[AppAnswer]) -> Self {
        let queues = app.iter().enumerate().flat_map(|(answer, one)| {
            let queues = one.queues.iter().flatten().enumerate();
            queues.map(move |(queue, one)| (answer as u32, queue as u32, &one.served_on))
        });
        let served_on = queues
            .filter_map(|(answer, queue, ends)| Some((answer, queue, ends.clone()?)))
            .collect();
        Self { served_on }
    }

    fn add_to(self, app: &mut [AppAnswer]) {
        for (answer, queue, ends) in self.served_on {
            let answer = app.get_mut(answer as usize);
            let queues = answer.and_then(|answer| answer.queues.as_mut());
            if let Some(queue) = queues.and_then(|queues| queues.get_mut(queue as usize)) {
                queue.served_on = Some(ends);
            }
        }
    }
}

/// Writes samples.
pub struct Writer<W: Write> {
    out: W,
    pending: Vec<u8>,
    pending_samples: u64,
    begun_ns: Option<u64>,
    /// Samples in written chunks.
    kept: u64,
    chunk_ns: u64,
    chunk_bytes: usize,
    level: i32,
}

impl<W: Write> Writer<W> {
    /// Begins a recording.
    pub fn new(mut out: W) -> io::Result<Self> {
        out.write_all(MAGIC)?;
        out.write_all(&VERSION.to_le_bytes())?;
        Ok(Self {
            out,
            pending: Vec::new(),
            pending_samples: 0,
            begun_ns: None,
            kept: 0,
            chunk_ns: CHUNK_NS,
            chunk_bytes: usize::MAX,
            level: LEVEL,
        })
    }

    /// Begins a packed copy of a recording: at most a third of the size, but slow to write.
    pub fn packed(out: W) -> io::Result<Self> {
        Ok(Self {
            chunk_ns: PACKED_CHUNK_NS,
            chunk_bytes: PACKED_CHUNK_BYTES,
            level: PACKED_LEVEL,
            ..Self::new(out)?
        })
    }

    /// Adds a sample; it reaches the disk with its chunk, within about a second.
    pub fn add(&mut self, sample: &Sample) -> io::Result<()> {
        let mut encoded = postcard::to_stdvec(sample).map_err(io::Error::other)?;
        let targets = sample.targets.iter().flatten();
        let workloads: Vec<(TargetId, &Workload)> = targets
            .map(|target| (target.id, &target.workload))
            .filter(|(_, workload)| **workload != Workload::default())
            .collect();
        let has_app = !sample.app.is_empty();
        let has_hooks = sample.hooks.is_some() || has_app;
        let has_jvm_counters = !sample.jvm_counters.is_empty() || has_hooks;
        let has_architecture = sample.architecture != Architecture::default() || has_jvm_counters;
        let has_conntrack = sample.conntrack.is_some() || has_architecture;
        let has_workloads = !workloads.is_empty() || has_conntrack;
        let has_hidden = !sample.hidden.is_empty() || has_workloads;
        let has_epolls = !sample.epolls.is_empty() || has_hidden;
        let has_next = !sample.on_accelerator.is_empty()
            || sample.local_ports.is_some()
            || !sample.io_limits.is_empty()
            || !sample.refaults.is_empty()
            || has_epolls;
        if sample.lock_waits.is_some() || has_next {
            let appended = Appended {
                lock_waits: &sample.lock_waits,
            };
            encoded = postcard::to_extend(&appended, encoded).map_err(io::Error::other)?;
        }
        if has_next {
            let appended = AppendedNext {
                on_accelerator: &sample.on_accelerator,
                local_ports: &sample.local_ports,
                io_limits: &sample.io_limits,
                refaults: &sample.refaults,
            };
            encoded = postcard::to_extend(&appended, encoded).map_err(io::Error::other)?;
        }
        if has_epolls {
            let appended = AppendedEpolls {
                epolls: &sample.epolls,
            };
            encoded = postcard::to_extend(&appended, encoded).map_err(io::Error::other)?;
        }
        if has_hidden {
            let appended = AppendedHidden {
                hidden: &sample.hidden,
            };
            encoded = postcard::to_extend(&appended, encoded).map_err(io::Error::other)?;
        }
        if has_workloads {
            let appended = AppendedWorkloads { workloads };
            encoded = postcard::to_extend(&appended, encoded).map_err(io::Error::other)?;
        }
        if has_conntrack {
            let appended = AppendedConntrack {
                conntrack: &sample.conntrack,
            };
            encoded = postcard::to_extend(&appended, encoded).map_err(io::Error::other)?;
        }
        if has_architecture {
            let appended = AppendedArchitecture {
                architecture: sample.architecture,
            };
            encoded = postcard::to_extend(&appended, encoded).map_err(io::Error::other)?;
        }
        if has_jvm_counters {
            let appended = AppendedJvmCounters {
                jvm_counters: &sample.jvm_counters,
            };
            encoded = postcard::to_extend(&appended, encoded).map_err(io::Error::other)?;
        }
        if has_hooks {
            let appended = AppendedHooks {
                hooks: &sample.hooks,
            };
            encoded = postcard::to_extend(&appended, encoded).map_err(io::Error::other)?;
        }
        if has_app {
            let appended = AppendedApp { app: &sample.app };
            encoded = postcard::to_extend(&appended, encoded).map_err(io::Error::other)?;
            let appended = AppendedServedOn::of(&sample.app);
            if !appended.served_on.is_empty() {
                encoded = postcard::to_extend(&appended, encoded).map_err(io::Error::other)?;
            }
        }
        self.pending.extend((encoded.len() as u32).to_le_bytes());
        self.pending.extend(encoded);
        self.pending_samples += 1;
        let begun = *self.begun_ns.get_or_insert(sample.mono_ns);
        let full = self.pending.len() >= self.chunk_bytes;
        if full || sample.mono_ns.saturating_sub(begun) >= self.chunk_ns {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes the pending samples. After an error the recording must not be continued.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let mut encoder = zstd::Encoder::new(Vec::new(), self.level)?;
        encoder.include_checksum(true)?;
        encoder.write_all(&self.pending)?;
        let frame = encoder.finish()?;
        self.out.write_all(&(frame.len() as u32).to_le_bytes())?;
        self.out.write_all(&frame)?;
        self.out.flush()?;
        self.kept += self.pending_samples;
        self.pending.clear();
        self.pending_samples = 0;
        self.begun_ns = None;
        Ok(())
    }

    /// The number of samples in written chunks.
    pub fn kept(&self) -> u64 {
        self.kept
    }

    /// The number of samples not yet written.
    pub fn pending(&self) -> u64 {
        self.pending_samples
    }
}

/// Why a recording cannot be read further.
#[derive(Debug)]
pub enum ReadError {
    /// Not a recording at all.
    Foreign,
    /// A recording of a version that this agent does not read.
    Version(u32),
    /// It ends within a chunk.
    Truncated { samples: u64 },
    /// Invalid content for this version.
    Corrupt { samples: u64, what: String },
    /// The file cannot be read.
    Io(io::Error),
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => write!(
                f,
                "not a Tailback recording; create one with `tailback record --out FILE`"
            ),
            Self::Version(version) => write!(
                f,
                "recording has format {version}, but this version of tailback reads format {VERSION}: replay it with the version that recorded it"
            ),
            Self::Truncated { samples } => write!(
                f,
                "the recording is truncated after {samples} samples: it was still being written, or the disk was full"
            ),
            Self::Corrupt { samples, what } => {
                write!(
                    f,
                    "the recording is corrupt after {samples} samples: {what}"
                )
            }
            Self::Io(error) => write!(f, "{error}"),
        }
    }
}

impl std::error::Error for ReadError {}

/// Reads samples back, in order.
pub struct Reader<R: Read> {
    input: R,
    chunk: Vec<u8>,
    at: usize,
    samples: u64,
}

impl<R: Read> Reader<R> {
    /// Starts reading; fails if `input` is not a recording.
    pub fn new(mut input: R) -> Result<Self, ReadError> {
        let mut magic = [0; MAGIC.len()];
        let mut version = [0; 4];
        let is_ours = match input.read_exact(&mut magic) {
            Ok(()) => &magic == MAGIC,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => false,
            Err(error) => return Err(ReadError::Io(error)),
        };
        if !is_ours {
            return Err(ReadError::Foreign);
        }
        input
            .read_exact(&mut version)
            .map_err(|_| ReadError::Truncated { samples: 0 })?;
        match u32::from_le_bytes(version) {
            VERSION => Ok(Self {
                input,
                chunk: Vec::new(),
                at: 0,
                samples: 0,
            }),
            other => Err(ReadError::Version(other)),
        }
    }

    /// The next sample; `None` at the end.
    pub fn next_sample(&mut self) -> Result<Option<Sample>, ReadError> {
        if self.at == self.chunk.len() && !self.next_chunk()? {
            return Ok(None);
        }
        let encoded = self
            .chunk
            .get(self.at..)
            .and_then(|rest| {
                let len = u32::from_le_bytes(rest.get(..4)?.try_into().ok()?) as usize;
                rest.get(4..4usize.checked_add(len)?)
            })
            .ok_or_else(|| self.corrupt("a sample extends past its chunk"))?;
        let decoded = postcard::take_from_bytes::<Sample>(encoded);
        let (mut sample, mut rest) = decoded.map_err(|error| self.corrupt(&error.to_string()))?;
        if !rest.is_empty() {
            let decoded = postcard::take_from_bytes::<Appended<Option<Vec<LockWait>>>>(rest);
            let (appended, next) = decoded.map_err(|error| self.corrupt(&error.to_string()))?;
            (sample.lock_waits, rest) = (appended.lock_waits, next);
        }
        if !rest.is_empty() {
            type Next = AppendedNext<
                Vec<OnAccelerator>,
                Option<Vec<LocalPorts>>,
                Vec<IoLimit>,
                Vec<Refaults>,
            >;
            let decoded = postcard::take_from_bytes::<Next>(rest);
            let (appended, next) = decoded.map_err(|error| self.corrupt(&error.to_string()))?;
            rest = next;
            sample.on_accelerator = appended.on_accelerator;
            sample.local_ports = appended.local_ports;
            sample.io_limits = appended.io_limits;
            sample.refaults = appended.refaults;
        }
        if !rest.is_empty() {
            let decoded = postcard::take_from_bytes::<AppendedEpolls<Vec<Epoll>>>(rest);
            let (appended, next) = decoded.map_err(|error| self.corrupt(&error.to_string()))?;
            sample.epolls = appended.epolls;
            rest = next;
        }
        if !rest.is_empty() {
            let decoded = postcard::take_from_bytes::<AppendedHidden<Vec<Hidden>>>(rest);
            let (appended, next) = decoded.map_err(|error| self.corrupt(&error.to_string()))?;
            sample.hidden = appended.hidden;
            rest = next;
        }
        if !rest.is_empty() {
            type Next = AppendedWorkloads<Vec<(TargetId, Workload)>>;
            let decoded = postcard::take_from_bytes::<Next>(rest);
            let (appended, next) = decoded.map_err(|error| self.corrupt(&error.to_string()))?;
            rest = next;
            let mut workloads: HashMap<TargetId, Workload> =
                appended.workloads.into_iter().collect();
            for target in sample.targets.iter_mut().flatten() {
                target.workload = workloads.remove(&target.id).unwrap_or_default();
            }
        }
        if !rest.is_empty() {
            type Next = AppendedConntrack<Option<Vec<Conntrack>>>;
            let decoded = postcard::take_from_bytes::<Next>(rest);
            let (appended, next) = decoded.map_err(|error| self.corrupt(&error.to_string()))?;
            rest = next;
            sample.conntrack = appended.conntrack;
        }
        if !rest.is_empty() {
            let decoded = postcard::take_from_bytes::<AppendedArchitecture>(rest);
            let (appended, next) = decoded.map_err(|error| self.corrupt(&error.to_string()))?;
            rest = next;
            sample.architecture = appended.architecture;
            for wait in sample.waits.iter_mut().chain(&mut sample.profile) {
                if let Some(syscall) = &mut wait.syscall {
                    syscall.architecture = appended.architecture;
                }
            }
        }
        if !rest.is_empty() {
            let decoded = postcard::take_from_bytes::<AppendedJvmCounters<Vec<JvmCounters>>>(rest);
            let (appended, next) = decoded.map_err(|error| self.corrupt(&error.to_string()))?;
            rest = next;
            sample.jvm_counters = appended.jvm_counters;
        }
        if !rest.is_empty() {
            let decoded = postcard::take_from_bytes::<AppendedHooks<Option<HookReport>>>(rest);
            let (appended, next) = decoded.map_err(|error| self.corrupt(&error.to_string()))?;
            rest = next;
            sample.hooks = appended.hooks;
        }
        if !rest.is_empty() {
            let decoded = postcard::take_from_bytes::<AppendedApp<Vec<AppAnswer>>>(rest);
            let (appended, next) = decoded.map_err(|error| self.corrupt(&error.to_string()))?;
            rest = next;
            sample.app = appended.app;
        }
        if !rest.is_empty() {
            let appended: AppendedServedOn =
                postcard::from_bytes(rest).map_err(|error| self.corrupt(&error.to_string()))?;
            appended.add_to(&mut sample.app);
        }
        if sample.mono_ns.max(sample.unix_ns) > LATEST_NS {
            return Err(self.corrupt("a time is out of range"));
        }
        self.at += 4 + encoded.len();
        self.samples += 1;
        Ok(Some(sample))
    }

    fn next_chunk(&mut self) -> Result<bool, ReadError> {
        let mut len = [0; 4];
        let mut have = 0;
        while have < len.len() {
            match self.input.read(&mut len[have..]) {
                Ok(0) if have == 0 => return Ok(false),
                Ok(0) => {
                    return Err(ReadError::Truncated {
                        samples: self.samples,
                    });
                }
                Ok(more) => have += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ReadError::Io(error)),
            }
        }
        let len = u32::from_le_bytes(len) as usize;
        if len > MAX_CHUNK_BYTES {
            return Err(self.corrupt("a chunk exceeds the size limit"));
        }
        let mut frame = Vec::new();
        Read::by_ref(&mut self.input)
            .take(len as u64)
            .read_to_end(&mut frame)
            .map_err(ReadError::Io)?;
        if frame.len() < len {
            return Err(ReadError::Truncated {
                samples: self.samples,
            });
        }
        let mut chunk = Vec::new();
        let unpacked = zstd::Decoder::new(frame.as_slice())
            .and_then(|decoder| decoder.take(MAX_CHUNK_BYTES as u64).read_to_end(&mut chunk));
        if let Err(error) = unpacked {
            return Err(self.corrupt(&error.to_string()));
        }
        self.chunk = chunk;
        self.at = 0;
        if self.chunk.is_empty() {
            Err(self.corrupt("an empty chunk"))
        } else {
            Ok(true)
        }
    }

    fn corrupt(&self, what: &str) -> ReadError {
        ReadError::Corrupt {
            samples: self.samples,
            what: what.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{
        Accelerator, AppQueue, AppUnit, Detail, HiddenFact, LockHolder, NamedBy, Owner, SharedLock,
        State, Syscall, Target, Wait,
    };

    fn recording(samples: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes).unwrap();
        for tick in 0..samples {
            let sample = Sample {
                mono_ns: tick * 100_000_000,
                ..Sample::default()
            };
            writer.add(&sample).unwrap();
        }
        writer.flush().unwrap();
        assert_eq!(writer.kept(), samples);
        bytes
    }

    fn read_all(bytes: &[u8]) -> (u64, Option<ReadError>) {
        let mut reader = match Reader::new(bytes) {
            Ok(reader) => reader,
            Err(error) => return (0, Some(error)),
        };
        let mut count = 0;
        loop {
            match reader.next_sample() {
                Ok(Some(sample)) => {
                    assert_eq!(sample.mono_ns, count * 100_000_000);
                    count += 1;
                }
                Ok(None) => return (count, None),
                Err(error) => return (count, Some(error)),
            }
        }
    }

    #[test]
    fn a_recording_is_read_back() {
        assert!(matches!(read_all(&recording(55)), (55, None)));
        assert!(matches!(read_all(&recording(0)), (0, None)));
    }

    #[test]
    fn a_packed_copy_has_the_same_samples_and_is_smaller() {
        let mut bytes = Vec::new();
        let mut writer = Writer::packed(&mut bytes).unwrap();
        let whole = recording(55);
        let mut reader = Reader::new(whole.as_slice()).unwrap();
        while let Some(sample) = reader.next_sample().unwrap() {
            writer.add(&sample).unwrap();
        }
        writer.flush().unwrap();
        assert!(matches!(read_all(&bytes), (55, None)));
        assert!(bytes.len() < whole.len());
    }

    #[test]
    fn fields_that_older_recordings_lack_are_read_back() {
        let wait = LockWait {
            tgid: 7,
            tid: 8,
            voluntary: 9,
            id: 10,
            lock: SharedLock::Memory { address: 0x1000 },
            holder: LockHolder::Exited(11),
            holder_name: String::new(),
        };
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes).unwrap();
        let spins = OnAccelerator {
            tgid: 7,
            tid: 8,
            through: Accelerator::Cuda,
        };
        let ports = LocalPorts {
            netns: 1,
            remote: "10.0.0.2:5432".parse().unwrap(),
            lowest: 40_000,
            highest: 40_999,
            used: 1_000,
            time_wait: 900,
        };
        let epoll = Epoll {
            tgid: 7,
            fd: 4,
            ready: 12,
            more: false,
        };
        let quota = Hidden {
            cgroup: "/a".to_owned(),
            fact: HiddenFact::CpuQuota,
        };
        let samples = [
            (None, vec![], None, vec![], vec![]),
            (Some(vec![wait.clone()]), vec![], None, vec![], vec![]),
            (None, vec![spins], None, vec![], vec![]),
            (None, vec![], None, vec![epoll], vec![]),
            (
                Some(vec![wait]),
                vec![spins],
                Some(vec![ports]),
                vec![epoll],
                vec![quota.clone()],
            ),
            (None, vec![], Some(vec![]), vec![], vec![]),
            (None, vec![], None, vec![], vec![quota]),
            (None, vec![], None, vec![], vec![]),
        ];
        for (lock_waits, on_accelerator, local_ports, epolls, hidden) in samples.clone() {
            let sample = Sample {
                lock_waits,
                on_accelerator,
                local_ports,
                epolls,
                hidden,
                ..Sample::default()
            };
            writer.add(&sample).unwrap();
        }
        writer.flush().unwrap();
        let mut reader = Reader::new(bytes.as_slice()).unwrap();
        for expected in samples {
            let sample = reader.next_sample().unwrap().unwrap();
            let read = (
                sample.lock_waits,
                sample.on_accelerator,
                sample.local_ports,
                sample.epolls,
                sample.hidden,
            );
            assert_eq!(read, expected);
        }
    }

    #[test]
    fn where_services_run_is_read_back() {
        let pod = Workload {
            owner: Owner::Container("default_shop-1_web".to_owned()),
            named_by: NamedBy::Pod,
            declared_name: Some("shop".to_owned()),
            ..Workload::default()
        };
        let target = |id, workload| Target {
            id,
            workload,
            ..Target::default()
        };
        let targets = vec![target(1, Workload::default()), target(2, pod)];
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes).unwrap();
        for targets in [Some(targets.clone()), None] {
            let sample = Sample {
                targets,
                ..Sample::default()
            };
            writer.add(&sample).unwrap();
        }
        writer.flush().unwrap();
        let mut reader = Reader::new(bytes.as_slice()).unwrap();
        let first = reader.next_sample().unwrap().unwrap();
        assert_eq!(first.targets, Some(targets));
        assert_eq!(reader.next_sample().unwrap(), Some(Sample::default()));
    }

    /// Writes these samples to one recording, and reads the same from it.
    fn check_read_back(samples: impl AsRef<[Sample]>) {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes).unwrap();
        for sample in samples.as_ref() {
            writer.add(sample).unwrap();
        }
        writer.flush().unwrap();
        let mut reader = Reader::new(bytes.as_slice()).unwrap();
        for expected in samples.as_ref() {
            assert_eq!(reader.next_sample().unwrap().as_ref(), Some(expected));
        }
    }

    #[test]
    fn a_full_table_is_read_back_with_or_without_the_fields_before_it() {
        let table = Conntrack {
            netns: 7,
            is_of_host: true,
            entries: 9,
            limit: 9,
            drops: 1,
        };
        let samples = [Some(vec![table]), None, Some(Vec::new())].map(|conntrack| Sample {
            conntrack,
            ..Sample::default()
        });
        check_read_back(samples);
    }

    #[test]
    fn counters_of_jvms_are_read_back_with_or_without_the_fields_before_them() {
        let counters = JvmCounters {
            tgid: 7,
            collector_ns: 9_000_000_000,
            collections: 3,
            is_collecting: true,
            safepoint_ns: 9_500_000_000,
            safepoints: 40,
        };
        for architecture in [Architecture::X86_64, Architecture::Aarch64] {
            let samples = [vec![counters], Vec::new()].map(|jvm_counters| Sample {
                jvm_counters,
                architecture,
                ..Sample::default()
            });
            check_read_back(samples);
        }
    }

    #[test]
    fn system_calls_are_read_back_with_the_architecture_that_numbers_them() {
        let sample = |architecture| {
            let wait = Wait {
                tgid: 7,
                tid: 7,
                own_tid: 7,
                comm: String::new(),
                state: State::Sleeping,
                io: false,
                syscall: Some(Syscall {
                    architecture,
                    number: 98,
                    args: [0; 4],
                    detail: Detail::None,
                }),
                voluntary: 0,
                involuntary: 0,
                cpu_ns: 0,
                run_delay_ns: 0,
            };
            Sample {
                waits: vec![wait.clone()],
                profile: vec![wait],
                architecture,
                ..Sample::default()
            }
        };
        for architecture in [Architecture::X86_64, Architecture::Aarch64] {
            check_read_back([sample(architecture)]);
        }
    }

    #[test]
    fn what_hooks_measured_is_read_back() {
        let sample = Sample {
            hooks: Some(HookReport {
                is_attached: true,
                reason: "requested".to_owned(),
                interval_ns: 1_000,
                ..HookReport::default()
            }),
            ..Sample::default()
        };
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes).unwrap();
        writer.add(&sample).unwrap();
        writer.add(&Sample::default()).unwrap();
        writer.flush().unwrap();
        let mut reader = Reader::new(bytes.as_slice()).unwrap();
        assert_eq!(reader.next_sample().unwrap(), Some(sample));
        assert_eq!(reader.next_sample().unwrap(), Some(Sample::default()));
    }

    #[test]
    fn queues_that_services_report_are_read_back() {
        let queue = AppQueue {
            name: "orders".to_owned(),
            unit: AppUnit::Messages,
            depth: 7,
            oldest_ns: Some(3),
            context: vec![("alarms".to_owned(), 1.0)],
            served_on: Some(vec![SocketAddr::from(([127, 0, 0, 1], 5432))]),
            ..AppQueue::default()
        };
        let answer = |queues| AppAnswer {
            tgid: 7,
            preset: "rabbitmq".to_owned(),
            at_ns: 5,
            took_ns: 2,
            queues,
        };
        let answers = [vec![answer(Some(vec![queue]))], vec![], vec![answer(None)]];
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes).unwrap();
        let samples = answers.map(|app| Sample {
            app,
            ..Sample::default()
        });
        for sample in &samples {
            writer.add(sample).unwrap();
        }
        writer.flush().unwrap();
        let mut reader = Reader::new(bytes.as_slice()).unwrap();
        for expected in samples {
            assert_eq!(reader.next_sample().unwrap(), Some(expected));
        }
    }

    #[test]
    fn a_truncated_recording_yields_its_complete_chunks_and_an_error() {
        let whole = recording(55);
        for cut in 0..whole.len() {
            let (count, error) = read_all(&whole[..cut]);
            assert!(count < 55, "cut at {cut}");
            // A cut between two chunks cannot be detected.
            assert!(
                error.is_some() || count > 0 || cut == MAGIC.len() + 4,
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn a_time_out_of_range_is_rejected() {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes).unwrap();
        let sample = Sample {
            unix_ns: u64::MAX,
            ..Sample::default()
        };
        writer.add(&sample).unwrap();
        writer.flush().unwrap();
        let (_, error) = read_all(&bytes);
        assert!(error.unwrap().to_string().contains("out of range"));
    }

    #[test]
    fn foreign_and_corrupt_files_are_rejected() {
        assert!(matches!(
            read_all(b"#!/bin/sh\necho no recording\n").1,
            Some(ReadError::Foreign)
        ));
        assert!(matches!(read_all(b"").1, Some(ReadError::Foreign)));
        let mut newer = recording(3);
        newer[MAGIC.len()] = 9;
        assert!(matches!(read_all(&newer).1, Some(ReadError::Version(9))));
        let whole = recording(20);
        for at in MAGIC.len() + 8..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x40;
            let (count, error) = read_all(&damaged);
            // A few bits of a zstd header are unused; then all samples are intact (`read_all` compares them).
            assert!(
                (error.is_some() && count < 20) || count == 20,
                "flipped at {at}"
            );
        }
    }
}
