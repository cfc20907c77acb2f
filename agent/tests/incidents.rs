//! Replays recorded incidents and checks the verdicts. It needs no kernel and takes milliseconds.
//!
//! Each recording is one run of a scenario of `tests/scenarios`, cut and anonymized by `tailback anonymize`. To add one:
//! `cargo xtask scenarios --keep DIR NAME`, then `tailback anonymize DIR/NAME.tbk agent/tests/incidents/NAME.tbk
//! --from 2s --until 15s`, and a row here.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
};

use tailback::{
    cause::Cause,
    config::Config,
    event::{CulpritKind, Episode, Event, Verdict},
    pipeline::Pipeline,
    queue::Kind,
    sample::{
        Architecture, Sample,
        anonymize::{
            Anonymizer, LEFT_OUT, PLACES, PRESETS, PROGRAMS, TITLES, is_of_a_pattern,
            is_of_a_runtime, is_token,
        },
        file::{Reader, Writer},
        texts::{Text, each_text},
    },
};
use tailback_tests::calibration::{Calibration, Judged};

/// The expected verdicts on one incident.
struct Planted {
    cause: Cause,
    /// If the cause is in another service: this cause is accepted as well, with `cause` as its root.
    seen_as: Option<Cause>,
    /// Kinds of queues that suffer from it: at least one has an episode, and each episode of these kinds has the cause.
    queues: &'static [Kind],
    /// Part of the culprit's name; `""`: there is no culprit.
    culprit: &'static str,
    /// Causes that episodes of other kinds may have instead.
    elsewhere: &'static [Cause],
    /// The recording ends before the incident does.
    ongoing: bool,
    /// Kinds of queues that recover after the others, when the recording has ended.
    recover_later: &'static [Kind],
}

const fn planted(cause: Cause, queues: &'static [Kind], culprit: &'static str) -> Planted {
    Planted {
        cause,
        seen_as: None,
        queues,
        culprit,
        elsewhere: &[],
        ongoing: false,
        recover_later: &[],
    }
}

macro_rules! incidents {
    ($($test:ident $name:literal $planted:expr,)*) => {
        $(mod $test {
            use super::*;

            #[test]
            fn has_the_planted_verdict() {
                check($name, $planted);
            }

            #[test]
            fn contains_no_name_of_the_recorded_machine() {
                check_texts($name);
            }

            #[test]
            fn has_the_same_verdict_before_and_after_anonymization() {
                check_secrets($name);
            }
        })*

        const NAMES: &[&str] = &[$($name,)*];

        /// What was planted in each.
        fn all() -> Vec<(&'static str, Option<Planted>)> {
            vec![$(($name, $planted),)*]
        }
    };
}

use Cause::*;
use Kind::*;

incidents! {
    flash_sale "flash-sale" Some(Planted {
        recover_later: &[Inflight],
        ..planted(DownstreamSlow, &[Accept], "postgres (12326)")
    }),
    slow_redis "slow-redis" Some(planted(DownstreamSlow, &[Accept], "redis-server (12473)")),
    redis_blocked "redis-blocked" Some(Planted {
        // The service that calls Redis has eight workers, and all of them wait.
        elsewhere: &[UndersizedLimit],
        ..planted(EventLoopBlocked, &[Recv, Eventloop], "redis-server (12816)")
    }),
    pool_exhausted "pool-exhausted" Some(Planted {
        seen_as: Some(DownstreamSlow),
        ..planted(PoolExhausted, &[Accept, Inflight, App], "a pool of 1 connections to 127.0.0.1:22718")
    }),
    few_workers "few-workers" Some(planted(UndersizedLimit, &[Accept], "3 workers")),
    surge "surge" Some(planted(ProducerSurge, &[Accept], "")),
    surge_nginx "surge-nginx" Some(planted(ProducerSurge, &[Inflight], "")),
    stopped "stopped" Some(planted(ConsumerStalled, &[Accept, Inflight], "uwsgi-core (15074)")),
    convoy "convoy" Some(planted(LockContention, &[Accept, Lock], "(15284)")),
    convoy_downstream "convoy-downstream" Some(Planted {
        elsewhere: &[CpuBound],
        ..planted(DownstreamSlow, &[Accept, Lock], "redis-server (17129)")
    }),
    deadlock "deadlock" Some(planted(ConsumerStalled, &[Accept, Lock, Inflight], "of name-a (17525)")),
    interpreter_lock "interpreter-lock" Some(planted(LockContention, &[Accept, Lock], "(31408)")),
    monitor "monitor" Some(planted(LockContention, &[Inflight, Recv], "name-a (25573)")),
    locked_call "locked-call" Some(Planted {
        ongoing: true,
        ..planted(LockContention, &[Inflight], "name-a (27017)")
    }),
    short_locked_calls "short-locked-calls" None,
    event_loop "event-loop" Some(Planted {
        ongoing: true,
        ..planted(EventLoopBlocked, &[Accept, Eventloop, Recv], "uvicorn (20699)")
    }),
    output_pipe "output-pipe" Some(Planted {
        // The reader of the pipe is stopped.
        elsewhere: &[ConsumerStalled],
        ..planted(OutputBlocked, &[Accept], "(310)")
    }),
    cpu_neighbour "cpu-neighbour" Some(planted(CpuStarved, &[Accept, Runqueue], "(2497)")),
    cpu_neighbour_hooks "cpu-neighbour-hooks" Some(planted(CpuStarved, &[Accept, Runqueue], "(1111)")),
    own_threads "own-threads" Some(Planted {
        // Other processes of the machine computed as well, for a moment.
        elsewhere: &[CpuStarved],
        ..planted(CpuBound, &[Accept, Runqueue], "of name-a (32698)")
    }),
    quota "quota" Some(planted(CpuThrottled, &[Accept, Runqueue], "the CPU quota of /group-a/group-b")),
    quota_podman "quota-podman" Some(planted(CpuThrottled, &[Accept, Runqueue], "the CPU quota of /group-a/group-b")),
    silent_clients "silent-clients" Some(planted(PeerNotSending, &[Accept], "python3 (3379)")),
    non_sending_clients_haproxy "non-sending-clients-haproxy" Some(planted(PeerNotSending, &[Accept], "python3 (3691)")),
    non_reading_clients "non-reading-clients" Some(planted(PeerNotReading, &[Accept, Send], "(4260)")),
    non_reading_clients_nginx "non-reading-clients-nginx" Some(planted(PeerNotReading, &[Send], "(4693)")),
    llm_slow_provider "llm-slow-provider" Some(planted(DownstreamSlow, &[Downstream, Inflight, Recv, Accept], "uvicorn (5137)")),
    llm_small_pool "llm-small-pool" Some(planted(
        PoolExhausted,
        &[Downstream, Inflight, Recv, Accept],
        "a pool of 3 connections to 127.0.0.1:44023",
    )),
    // Recorded from half a minute into the incident: the exhausted pool is visible, the baseline of its calls is not.
    llm_slow_provider_midway "llm-slow-provider-midway" Some(Planted {
        ongoing: true,
        ..planted(PoolExhausted, &[Inflight], "a pool of 16 connections to 127.0.0.1:33381")
    }),
    // The same with a pool that is large enough: a queue that neither grows nor shrinks may be slow by design.
    llm_slow_provider_standing "llm-slow-provider-standing" None,
    iot_gridlock "iot-gridlock" Some(planted(DownstreamSlow, &[Recv], "postgres (7508)")),
    fsync "fsync" Some(planted(DiskSlow, &[Recv, Eventloop, Disk], "/tmp/path-a/path-b/path-c on device-a")),
    link_limited "link-limited" Some(planted(NetworkLimited, &[Send], "(7998)")),
    // Its responses do not get through, and the client waits for them.
    slow_link_both_ways "slow-link-both-ways" Some(Planted {
        elsewhere: &[DownstreamSlow],
        ..planted(NetworkLimited, &[Send], "(11652)")
    }),
    // The queue is empty in every sample after the first.
    small_backlog_bursts "small-backlog-bursts" Some(planted(UndersizedLimit, &[Accept], "a backlog of 8")),
    small_backlog "small-backlog" Some(planted(UndersizedLimit, &[Accept], "a backlog of 8")),
    files_exhausted "files-exhausted" Some(planted(FdExhausted, &[Fd, Accept], "RLIMIT_NOFILE of 120")),
    leaked_connections "leaked-connections" Some(planted(
        PoolExhausted,
        &[Inflight, Recv],
        "a pool of 4 connections to 127.0.0.1:19635",
    )),
    pool_deadlock "pool-deadlock" Some(planted(
        PoolExhausted,
        &[Inflight, Recv],
        "a pool of 4 connections to 127.0.0.1:23783",
    )),
    slow_behind_semaphore "slow-behind-semaphore" Some(planted(DownstreamSlow, &[Inflight], "uvicorn (8916)")),
    blocking_call "blocking-call" Some(planted(DownstreamSlow, &[Inflight, Accept], "uvicorn (26230)")),
    loop_calls_itself "loop-calls-itself" Some(planted(ConsumerStalled, &[Inflight, Accept], "uvicorn (8913)")),
    keep_alive_workers "keep-alive-workers" Some(planted(
        UndersizedLimit,
        &[Accept],
        "6 workers, all held by idle keep-alive connections",
    )),
    file_lock "file-lock" Some(planted(LockContention, &[Accept, Inflight], "(11578)")),
    file_lock_php "file-lock-php" Some(planted(LockContention, &[Accept, Inflight], "name-a (16554)")),
    file_lock_downstream "file-lock-downstream" Some(Planted {
        // Another client keeps Redis busy.
        elsewhere: &[CpuBound],
        ..planted(DownstreamSlow, &[Accept], "redis-server (26854)")
    }),
    sqlite_lock "sqlite-lock" Some(planted(LockContention, &[Accept, Inflight], "(27294)")),
    shared_mutex "shared-mutex" Some(planted(ConsumerStalled, &[Accept, Inflight], "(11380)")),
    log_socket "log-socket" Some(Planted {
        // The collector behind the log daemon is stopped, and the daemon writes to it.
        elsewhere: &[ConsumerStalled, PeerNotReading],
        ..planted(OutputBlocked, &[Accept], "(11718)")
    }),
    // The server that the service connects to is stopped.
    unanswered_connect "unanswered-connect" Some(Planted {
        seen_as: Some(DownstreamSlow),
        ..planted(ConsumerStalled, &[Accept], "(11741)")
    }),
    back_off "back-off" Some(planted(ConsumerStalled, &[Accept], "(11777)")),
    reuseport "reuseport" Some(planted(EventLoopBlocked, &[Accept], "name-a (27031)")),
    reuseport_nginx "reuseport-nginx" Some(planted(ConsumerStalled, &[Accept], "nginx (27159)")),
    reuseport_even "reuseport-even" None,
    close_wait_calls "close-wait-calls" Some(planted(
        FdExhausted,
        &[Fd, Accept],
        "connections that name-a (23894) does not close",
    )),
    accelerator_loop "accelerator-loop" Some(planted(
        AcceleratorBound,
        &[Inflight, Accept, Recv, Eventloop],
        "of name-a (22942), in libcuda",
    )),
    accelerator_thread "accelerator-thread" Some(planted(
        AcceleratorBound,
        &[Inflight],
        "of name-a (24011), in libcuda",
    )),
    tracking_table "tracking-table" Some(planted(
        NetworkLimited,
        &[Accept],
        "the connection tracking table of its network namespace",
    )),
    local_ports "local-ports" Some(planted(
        PortsExhausted,
        &[Accept],
        "the local ports 20000 to 20999",
    )),
    memory_thrash_mapped "memory-thrash-mapped" Some(planted(
        MemoryStalled,
        &[Accept, Inflight, Memory],
        "the memory limit of /group-a",
    )),
    memory_thrash_sqlite "memory-thrash-sqlite" Some(planted(
        MemoryStalled,
        &[Accept, Inflight, Memory],
        "the memory limit of /group-a",
    )),
    vm_lock "vm-lock" Some(Planted {
        // Its backlog is full, so what a client sends is not acknowledged.
        elsewhere: &[DownstreamSlow],
        ongoing: true,
        ..planted(LockContention, &[Accept], "ruby3.1 (8343)")
    }),
    // The queue is inside Redis, and the workers of RQ wait for a row.
    job_queue "job-queue" Some(planted(DownstreamSlow, &[App], "postgres (27089)")),
    job_queue_forking "job-queue-forking" Some(planted(DownstreamSlow, &[App], "postgres (15519)")),
    job_queue_alone "job-queue-alone" Some(planted(ConsumerStalled, &[App], "")),
    // The queue is inside HAProxy, and the workers of its server wait for a row.
    proxy_queue "proxy-queue" Some(planted(DownstreamSlow, &[App, Inflight], "postgres (13364)")),
    // A client of PgBouncer keeps two transactions open.
    pool_held "pool-held" Some(planted(PoolExhausted, &[App, Inflight], "python3 (13575)")),
    master_lock "master-lock" Some(planted(LockContention, &[Accept, Inflight], "name-a (19563)")),
    resolver_threads "resolver-threads" Some(planted(DownstreamSlow, &[Accept, Inflight], "127.53.31.66:53")),
    // Two of the threads in which Node resolves names wait, and its loop waits for them.
    resolver_node "resolver-node" Some(planted(DownstreamSlow, &[Inflight], "127.53.31.67:53")),
    memory_limit_go "memory-limit-go" Some(planted(CpuBound, &[Accept, Inflight], "of name-a (9245)")),
    memory_limit_java "memory-limit-java" Some(Planted {
        ongoing: true,
        ..planted(CpuBound, &[Inflight, Recv], "of name-a (19478)")
    }),
    // The accept queue drains between two collections.
    collector_pauses "collector-pauses" Some(Planted {
        ongoing: true,
        ..planted(CpuBound, &[Accept], "of name-a (11775)")
    }),
    // Profiling begins in the middle of the first long turn.
    event_loop_at_times "event-loop-at-times" Some(planted(EventLoopBlocked, &[Accept], "uvicorn (11861)")),
    full_handshakes "full-handshakes" Some(planted(CpuBound, &[Accept], "nginx (8955)")),
    retry_storm "retry-storm" Some(Planted {
        ongoing: true,
        ..planted(ProducerSurge, &[Accept], "")
    }),
    metadata_lock "metadata-lock" Some(planted(DownstreamSlow, &[Accept, Inflight], "mariadbd (8166)")),
    // Few samples: memory was slow. In the healthy seconds before, no sample saw a request.
    leaked_connections_go "leaked-connections-go" Some(Planted {
        ongoing: true,
        ..planted(PoolExhausted, &[Inflight], "a pool of 8 connections to 127.0.0.1:29652")
    }),
    leaked_rows_go "leaked-rows-go" Some(planted(
        PoolExhausted,
        &[Inflight],
        "a pool of 4 connections to 127.0.0.1:14292",
    )),
    leaked_connections_java "leaked-connections-java" Some(planted(
        PoolExhausted,
        &[Inflight, Recv],
        "a pool of 4 connections to 127.0.0.1:29965",
    )),
    short_file_locks "short-file-locks" None,
    busy_log_socket "busy-log-socket" None,
    accept_mutex "accept-mutex" None,
    busy "busy" None,
    batch "batch" None,
    bursty "bursty" None,
    jobs "jobs" None,
    keep_alive "keep-alive" None,
    rolling_restart "rolling-restart" None,
    slow_by_design "slow-by-design" None,
    keep_alive_free "keep-alive-free" None,
    small_pool_busy "small-pool-busy" None,
    // The number of long polls grows when the recording begins, and then their first responses arrive.
    long_polls "long-polls" None,
    // None of them is answered until they have grown for five seconds. The responses of that time are to quick requests.
    long_polls_begin "long-polls-begin" None,
    websockets "websockets" None,
    batch_consumers "batch-consumers" None,
    cache_refill "cache-refill" None,
    warm_up "warm-up" None,
    cron "cron" None,
    schema_change "schema-change" None,
    short_row_locks "short-row-locks" None,
    replication "replication" None,
}

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/incidents")
}

fn samples(name: &str) -> Vec<Sample> {
    let bytes = fs::read(directory().join(format!("{name}.tbk"))).unwrap();
    let mut reader = Reader::new(bytes.as_slice()).unwrap();
    std::iter::from_fn(|| reader.next_sample().unwrap()).collect()
}

/// The last report of each episode, in the order in which they opened.
fn episodes(samples: &[Sample]) -> Vec<Episode> {
    let mut pipeline = Pipeline::new(Config::default().settings_for(), false);
    let mut events: Vec<Event> = samples
        .iter()
        .flat_map(|sample| pipeline.step(sample).events)
        .collect();
    events.extend(pipeline.finish());
    let mut order = Vec::new();
    let mut last: BTreeMap<String, Episode> = BTreeMap::new();
    for event in events {
        match event {
            Event::EpisodeOpened(episode) => order.push(episode.id.clone()),
            Event::Episode(episode) => {
                last.insert(episode.id.clone(), *episode);
            }
            _ => {}
        }
    }
    order.iter().map(|id| last.remove(id).unwrap()).collect()
}

fn describe(episode: &Episode) -> String {
    let verdict = episode.verdict.as_deref();
    let cause = verdict.map_or("no verdict", |verdict| verdict.cause.name());
    let root = verdict.and_then(|verdict| verdict.root).map(Cause::name);
    let culprit = verdict.and_then(|verdict| verdict.culprit.as_ref());
    format!(
        "{} {}: {cause}, root {root:?}, culprit {:?}",
        episode.key.kind.name(),
        episode.key.name(),
        culprit.map(|culprit| &culprit.name)
    )
}

fn check(name: &str, planted: Option<Planted>) {
    let episodes = episodes(&samples(name));
    let described: Vec<String> = episodes.iter().map(describe).collect();
    let Some(planted) = planted else {
        assert!(
            described.is_empty(),
            "a healthy service has episodes: {described:#?}"
        );
        return;
    };
    let suffers = |episode: &&Episode| planted.queues.contains(&episode.key.kind);
    assert!(episodes.iter().any(|one| suffers(&one)), "{described:#?}");
    for episode in &episodes {
        let recovers_later = planted.recover_later.contains(&episode.key.kind);
        let over = !episode.ongoing || planted.ongoing || recovers_later;
        assert!(over, "it did not recover: {}", describe(episode));
        let right = match episode.verdict.as_deref() {
            Some(verdict) if suffers(&episode) => planted.fits(verdict) && planted.names(verdict),
            Some(verdict) => planted.allows(verdict),
            None => false,
        };
        assert!(right, "{}", describe(episode));
    }
}

impl Planted {
    fn fits(&self, verdict: &Verdict) -> bool {
        let seen = self.seen_as.map(|seen| (seen, Some(self.cause)));
        verdict.cause == self.cause || seen == Some((verdict.cause, verdict.root))
    }

    fn names(&self, verdict: &Verdict) -> bool {
        match &verdict.culprit {
            Some(culprit) => !self.culprit.is_empty() && culprit.name.contains(self.culprit),
            None => self.culprit.is_empty(),
        }
    }

    /// Whether an episode of another queue may have this verdict: `unknown`, or nothing wrong.
    fn allows(&self, verdict: &Verdict) -> bool {
        verdict.cause == Unknown
            || self.fits(verdict)
            || self.elsewhere.contains(&verdict.cause)
            || !self.culprit.is_empty() && self.names(verdict)
    }
}

#[test]
fn old_requests_without_a_baseline_are_reported_and_not_judged() {
    let unjudged = |name: &str| {
        let mut pipeline = Pipeline::new(Config::default().settings_for(), false);
        for sample in samples(name) {
            pipeline.step(&sample);
        }
        pipeline.no_baseline()
    };
    let reported = unjudged("llm-slow-provider-standing");
    assert!(
        matches!(reported.as_slice(), [one] if one.key.kind == Inflight && one.waiting.depth > 30),
        "{reported:?}"
    );
    let silent = [
        "slow-by-design",
        "keep-alive",
        "busy",
        "bursty",
        "llm-slow-provider-midway",
    ];
    for name in silent {
        assert_eq!(unjudged(name), [], "{name}");
    }
}

#[test]
fn the_counters_of_a_jvm_support_a_verdict_that_is_the_same_without_them() {
    let verdicts = |samples: &[Sample]| -> Vec<Verdict> {
        let episodes = episodes(samples).into_iter();
        let verdicts = episodes.filter_map(|episode| episode.verdict);
        verdicts.map(|verdict| (*verdict).clone()).collect()
    };
    let mut samples = samples("memory-limit-java");
    let counted = verdicts(&samples);
    samples
        .iter_mut()
        .for_each(|sample| sample.jvm_counters.clear());
    let alone = verdicts(&samples);
    assert!(!counted.is_empty() && counted.len() == alone.len());
    for (counted, alone) in counted.iter().zip(&alone) {
        assert!(
            counted.evidence.contains("counters agree"),
            "{}",
            counted.evidence
        );
        assert!(!alone.evidence.contains("counters"), "{}", alone.evidence);
        let known = |verdict: &Verdict| (verdict.cause, verdict.confidence, verdict.advice.clone());
        assert_eq!(known(counted), known(alone));
    }
}

/// A process on another CPU uses more CPU time than the one that the service waits for.
#[test]
fn without_hooks_the_busiest_process_is_blamed_whatever_its_cpu() {
    let mut samples = samples("cpu-neighbour-hooks");
    let measured = samples.iter().filter(|sample| sample.hooks.is_some());
    assert!(measured.count() > 5, "it was recorded without hooks");
    let culprits = |samples: &[Sample]| -> Vec<Option<u32>> {
        let episodes = episodes(samples);
        let of_accept = episodes.iter().filter(|one| one.key.kind == Accept);
        let verdicts = of_accept.filter_map(|one| one.verdict.as_ref());
        let culprits = verdicts.map(|verdict| verdict.culprit.as_ref()?.pid);
        culprits.collect()
    };
    assert_eq!(culprits(&samples), [Some(1111)]);
    for sample in &mut samples {
        sample.hooks = None;
    }
    assert_eq!(culprits(&samples), [Some(1085)]);
}

/// `cargo xtask calibration` prints these verdicts as a table.
#[test]
fn confidence_is_earned() {
    let mut calibration = Calibration::default();
    for (name, planted) in all() {
        for episode in episodes(&samples(name)) {
            let Some(verdict) = episode.verdict.as_deref() else {
                continue;
            };
            let judged = Judged {
                of: format!("{name} {}", episode.key.kind.name()),
                cause: describe(&episode),
                confidence: verdict.confidence.name().to_owned(),
                // Another true answer about another queue is not the root cause.
                right: planted.as_ref().is_some_and(|planted| {
                    planted.fits(verdict) || !planted.culprit.is_empty() && planted.names(verdict)
                }),
            };
            // `unknown` makes no claim.
            if verdict.cause != Unknown {
                println!("{}", judged.to_json());
                calibration.add(judged);
            }
        }
    }
    assert_eq!(calibration.missed(), [""; 0], "{calibration}");
}

/// Numbers of system calls on x86-64, and on aarch64. Where the latter lacks a call, that of the one that replaced it.
#[rustfmt::skip]
const CALLS: &[(i32, i32)] = &[
    (0, 63), (1, 64), (2, 56), (7, 73), (9, 222), (11, 215), (17, 67), (18, 68),
    (19, 65), (20, 66), (23, 72), (24, 124), (26, 227), (28, 233), (34, 133), (35, 101),
    (40, 71), (42, 203), (43, 202), (44, 206), (45, 207), (46, 211), (47, 212), (61, 260),
    (65, 193), (70, 188), (72, 25), (73, 32), (74, 82), (75, 83), (77, 46), (82, 276),
    (87, 35), (128, 137), (130, 133), (162, 81), (202, 98), (208, 4), (217, 61), (230, 115),
    (232, 22), (247, 95), (257, 56), (262, 79), (263, 35), (270, 72), (271, 73), (275, 76),
    (277, 84), (281, 22), (285, 47), (288, 242), (295, 69), (296, 70), (299, 243), (306, 267),
    (307, 269), (316, 276), (327, 286), (328, 287), (332, 291), (426, 426), (441, 441),
];

/// The recording, as if it had been taken on aarch64.
fn on_aarch64(samples: &[Sample]) -> Vec<Sample> {
    /// No architecture has such a call.
    const OTHER: i32 = 10_000;
    let mut bytes = Vec::new();
    let mut writer = Writer::new(&mut bytes).unwrap();
    for mut sample in samples.iter().cloned() {
        sample.architecture = Architecture::Aarch64;
        for wait in sample.waits.iter_mut().chain(&mut sample.profile) {
            if let Some(call) = &mut wait.syscall {
                let same = CALLS.iter().find(|(x86_64, _)| *x86_64 == call.number);
                call.number = same.map_or(OTHER, |(_, aarch64)| *aarch64);
            }
        }
        writer.add(&sample).unwrap();
    }
    writer.flush().unwrap();
    let mut reader = Reader::new(bytes.as_slice()).unwrap();
    std::iter::from_fn(|| reader.next_sample().unwrap()).collect()
}

#[test]
fn a_recording_of_another_architecture_gives_the_same_verdicts() {
    let verdicts = |samples: &[Sample]| -> Vec<_> {
        let of = |episode: &Episode| {
            let verdict = episode.verdict.as_deref().map(|verdict| {
                let share = verdict.share.map(f64::to_bits);
                let culprit = verdict.culprit.as_ref().map(|it| (it.kind, it.pid));
                (verdict.cause, verdict.root, share, culprit)
            });
            (episode.key.kind, verdict)
        };
        episodes(samples).iter().map(of).collect()
    };
    for (name, _) in all() {
        let samples = samples(name);
        assert_eq!(
            verdicts(&on_aarch64(&samples)),
            verdicts(&samples),
            "{name}"
        );
    }
}

#[test]
fn every_recording_is_replayed_by_a_test() {
    let files = fs::read_dir(directory()).unwrap();
    let files: BTreeSet<String> = files
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let rows = NAMES.iter().map(|name| format!("{name}.tbk")).collect();
    assert_eq!(files, rows);
}

/// Whether an anonymized recording may contain a text.
fn is_anonymous(what: Text, text: &str) -> bool {
    let is_program = |word: &str| {
        let word = word.trim_end_matches(|letter: char| letter.is_ascii_digit() || letter == '.');
        PROGRAMS.contains(&word)
    };
    let is_number = |part: &str| part.bytes().all(|digit| digit.is_ascii_digit());
    let known = |word: &str| match what {
        Text::Name => is_token(word) || is_program(word),
        Text::Path | Text::Group => {
            let parts = word.trim_start_matches('@').split('/');
            parts.into_iter().all(|part| {
                part.is_empty()
                    || is_token(part)
                    || PLACES.contains(&part)
                    || is_number(part)
                    || part
                        .strip_prefix("socket:[")
                        .and_then(|it| it.strip_suffix(']'))
                        .is_some_and(is_number)
            })
        }
        Text::Title => TITLES.contains(&word) || word.strip_suffix(':').is_some_and(is_program),
        Text::Line => is_of_a_pattern(word),
        Text::Message => true,
        Text::Preset => is_token(word) || PRESETS.contains(&word),
        Text::Container | Text::Attribute | Text::Device | Text::Notice | Text::Queue => {
            is_token(word)
        }
    };
    let is_of_a_runtime = matches!(what, Text::Name) && is_of_a_runtime(text);
    is_of_a_runtime
        || text
            .split_whitespace()
            .all(|word| word == LEFT_OUT || known(word))
}

fn check_texts(name: &str) {
    for mut sample in samples(name) {
        each_text(&mut sample, &mut |what, text| {
            assert!(is_anonymous(what, text), "the {what:?} {text:?}");
        });
    }
}

/// The part of a verdict that does not depend on names.
type EpisodeSummary = (
    Kind,
    Cause,
    Option<Cause>,
    Option<u64>,
    Option<(CulpritKind, Option<u32>)>,
);

fn summary(samples: &[Sample]) -> Vec<EpisodeSummary> {
    let summary = |episode: &Episode| {
        let verdict = episode.verdict.clone().unwrap();
        let share = verdict.share.map(f64::to_bits);
        let culprit = verdict.culprit.as_ref().map(|it| (it.kind, it.pid));
        (
            episode.key.kind,
            verdict.cause,
            verdict.root,
            share,
            culprit,
        )
    };
    episodes(samples).iter().map(summary).collect()
}

/// The recording with a secret in place of each anonymous token, as on a real machine.
fn with_secrets(samples: &[Sample]) -> Vec<Sample> {
    let secret = |word: &str| match word {
        LEFT_OUT => "bob@secret".to_owned(),
        _ if is_token(word) => format!("Secret.{}.x", word.replace('-', "_")),
        _ => word.to_owned(),
    };
    let mut samples = samples.to_vec();
    for sample in &mut samples {
        each_text(sample, &mut |what, text| {
            let joint = match what {
                Text::Path | Text::Group => '/',
                _ => ' ',
            };
            let words: Vec<String> = text.split(joint).map(secret).collect();
            *text = words.join(&joint.to_string());
        });
    }
    samples
}

fn secrets(samples: &[Sample]) -> Vec<String> {
    let mut found = Vec::new();
    for sample in samples {
        each_text(&mut sample.clone(), &mut |_, text| {
            if text.to_ascii_lowercase().contains("secret") {
                found.push(text.clone());
            }
        });
    }
    found
}

fn check_secrets(name: &str) {
    let before = with_secrets(&samples(name));
    assert!(!secrets(&before).is_empty());
    let mut anonymizer = Anonymizer::default();
    for sample in &before {
        anonymizer.learn(sample);
    }
    let anonymous = before.iter().map(|sample| anonymizer.anonymize(sample));
    let after: Vec<Sample> = anonymous.collect();
    assert_eq!(secrets(&after), Vec::<String>::new());
    assert_eq!(summary(&before), summary(&after));
}
