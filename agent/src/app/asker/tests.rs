//! Against real servers of the test's own, which answer as badly as a hostile service can.

use std::{
    io::Write as _,
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::net::UnixListener,
    sync::atomic::AtomicUsize,
    time::Instant,
};

use super::*;
use crate::app::{
    own::Ends,
    table::{Ask, Table},
};

/// Deadline of each wait: far longer than any limit that is tested.
const DEADLINE: Duration = Duration::from_mins(1);

/// A server that hands each connection to `serve`, in a thread of its own.
struct Server {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    ended: Arc<AtomicUsize>,
}

impl Server {
    fn start(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let ended = Arc::new(AtomicUsize::new(0));
        let (count, end_count) = (Arc::clone(&connections), Arc::clone(&ended));
        let serve = Arc::new(serve);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                count.fetch_add(1, Ordering::Relaxed);
                let (serve, ended) = (Arc::clone(&serve), Arc::clone(&end_count));
                thread::spawn(move || {
                    serve(stream);
                    ended.fetch_add(1, Ordering::Relaxed);
                });
            }
        });
        Self {
            address,
            connections,
            ended,
        }
    }

    /// A server that answers each request with these bytes.
    fn answering(answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::start(move |mut stream| {
            while read_request(&mut stream) {
                if stream.write_all(&answer).is_err() {
                    return;
                }
            }
        })
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint::Tcp {
            address: self.address,
            cookie: 1,
            pid: std::process::id(),
        }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Connections that have not ended.
    fn open(&self) -> usize {
        let ended = self.ended.load(Ordering::Relaxed);
        self.connections().saturating_sub(ended)
    }
}

/// Reads the head of a request; `None` at the end of the connection.
fn request(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            _ => return None,
        }
    }
    String::from_utf8(head).ok()
}

/// Reads the head of a request; `false` at the end of the connection.
fn read_request(stream: &mut TcpStream) -> bool {
    request(stream).is_some()
}

fn ok(body: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn preset(name: &str) -> Arc<Preset> {
    let text = format!(
        "name = \"{name}\"\nfind = {{ exe = [\"shopd\"] }}\nproof = \"waiting\"\npace = \"500ms\"\nfocused_pace = \"500ms\"\n\
         ask = [{{ protocol = \"prometheus\", paths = [\"/metrics\"] }}]\n\
         queue = [{{ name = \"q {{queue}}\", unit = \"jobs\", depth = \"waiting\" }}]\n"
    );
    let preset: Preset = toml::from_str(&text).unwrap();
    Table::new(std::slice::from_ref(&preset), &[], &[]).unwrap();
    Arc::new(preset)
}

fn process(tgid: u32, endpoints: Vec<Endpoint>) -> Process {
    Process {
        tgid,
        start_ns: 1,
        preset: preset("shop"),
        program: Program::new("shopd", b"shopd\0"),
        endpoints,
        uid: Some(0),
        unreachable: None,
        is_focused: false,
    }
}

fn asker(processes: Vec<Process>) -> Asker {
    let asker = Asker::start(BTreeMap::new(), || 7).unwrap();
    asker.set_processes(processes);
    asker
}

/// Attempts that follow each other quickly.
const QUICK: Timing = Timing {
    late: Duration::from_millis(300),
    retry: Duration::from_millis(50),
    suspension: Duration::from_hours(1),
};

fn asker_with(processes: Vec<Process>, timing: Timing) -> Asker {
    let asker = Asker::with_timing(BTreeMap::new(), || 7, timing).unwrap();
    asker.set_processes(processes);
    asker
}

/// The report of the failure of the only process, once the attempt is over: under load, the answer may be late.
fn failed(asker: &Asker) -> Report {
    report_when(asker, |report| {
        let failure = report.failure.as_ref();
        failure.is_some_and(|why| !why.contains("no answer within"))
    })
}

/// An address that is taken, and at which nothing listens, as long as the sockets exist.
fn silent() -> (Endpoint, (TcpListener, TcpStream)) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let endpoint = Endpoint::Tcp {
        address: stream.local_addr().unwrap(),
        cookie: 9,
        pid: std::process::id(),
    };
    (endpoint, (listener, stream))
}

/// The report of the only process, as soon as `is_done` holds for it.
fn report_when(asker: &Asker, is_done: impl Fn(&Report) -> bool) -> Report {
    let until = Instant::now() + DEADLINE;
    loop {
        let reports = asker.reports();
        if let Some(report) = reports.iter().find(|report| is_done(report)) {
            return report.clone();
        }
        assert!(Instant::now() < until, "{reports:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The failure of a service that answers with these bytes.
fn failure_of(answer: impl Into<Vec<u8>>) -> String {
    let server = Server::answering(answer);
    let asker = asker(vec![process(1, vec![server.endpoint()])]);
    let report = failed(&asker);
    assert_eq!((report.queues, report.endpoint), (0, None));
    assert!(asker.take().iter().all(|answer| answer.queues.is_none()));
    report.failure.unwrap()
}

#[test]
fn a_service_is_asked_again_and_again_and_no_connection_stays_idle() {
    let server = Server::answering(ok("waiting{queue=\"a\"} 3\n"));
    let asker = asker(vec![process(9, vec![server.endpoint()])]);
    let mut answers = Vec::new();
    let until = Instant::now() + DEADLINE;
    while answers.len() < 3 && Instant::now() < until {
        answers.extend(asker.take());
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(answers.len(), 3);
    let queues = answers[2].queues.as_ref().unwrap();
    assert_eq!((queues[0].name.as_str(), queues[0].depth), ("q a", 3));
    assert_eq!((answers[2].tgid, answers[2].at_ns), (9, 7));
    assert!(server.connections() >= 3);
    // Each ends with its answer, so that it holds no thread of the service.
    let until = Instant::now() + DEADLINE;
    while server.open() > 1 && Instant::now() < until {
        thread::sleep(Duration::from_millis(5));
    }
    assert!(server.open() <= 1);
    let report = report_when(&asker, |report| report.endpoint.is_some());
    assert_eq!(report.endpoint, Some(server.address.to_string()));
    assert_eq!(report.failure, None);
}

#[test]
fn answers_without_the_proof_are_not_believed() {
    let failure = failure_of(ok("other 3\n"));
    assert!(
        failure.contains("lacks waiting: it is not shop"),
        "{failure}"
    );
}

#[test]
fn redirects_are_not_followed() {
    let other = Server::answering(ok("waiting{queue=\"a\"} 3\n"));
    let location = format!(
        "HTTP/1.1 302 Found\r\nLocation: http://{}/metrics\r\nContent-Length: 0\r\n\r\n",
        other.address
    );
    let failure = failure_of(location);
    assert!(failure.contains("redirects are not followed"), "{failure}");
    assert_eq!(other.connections(), 0);
}

#[test]
fn no_credential_is_guessed() {
    let failure = failure_of("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n");
    assert!(failure.contains("requires credentials"), "{failure}");
}

#[test]
fn compressed_answers_are_refused_unread() {
    let failure = failure_of(
        "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 100\r\n\r\n\x1f\u{8b}",
    );
    assert!(failure.contains("compressed"), "{failure}");
}

#[test]
fn answers_that_announce_or_send_too_much_are_cut_off() {
    let announced = failure_of("HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\nwaiting 1\n");
    assert!(
        announced.contains("larger than 1048576 bytes"),
        "{announced}"
    );
    let endless = Server::start(|mut stream| {
        read_request(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
        while stream.write_all(b"waiting{queue=\"a\"} 1\n").is_ok() {}
    });
    let asker = asker(vec![process(1, vec![endless.endpoint()])]);
    let report = report_when(&asker, |report| {
        report
            .failure
            .as_ref()
            .is_some_and(|failure| failure.contains("larger than"))
    });
    assert_eq!(report.queues, 0);
}

#[test]
fn answers_that_announce_others_without_end_are_cut_off() {
    let announcing = Server::start(|mut stream| {
        read_request(&mut stream);
        let many = b"HTTP/1.1 103 Early Hints\r\n\r\n".repeat(1_000);
        while stream.write_all(&many).is_ok() {}
    });
    let asker = asker(vec![process(1, vec![announcing.endpoint()])]);
    let began = Instant::now();
    let is_over = |failure: &String| !failure.contains("no answer within");
    let report = report_when(&asker, |report| {
        report.failure.as_ref().is_some_and(is_over)
    });
    assert_eq!(report.queues, 0);
    assert!(began.elapsed() < DEADLINE);
}

#[test]
fn heads_without_end_and_garbage_are_refused() {
    let headers = Server::start(|mut stream| {
        read_request(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
        while stream
            .write_all(b"X-Filler: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n")
            .is_ok()
        {}
    });
    let asker = asker(vec![process(1, vec![headers.endpoint()])]);
    report_when(&asker, |report| report.failure.is_some());
    failure_of("SSH-2.0-OpenSSH_9.2\r\n");
    let invalid =
        failure_of(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n\xff\xfe\xfd\n".to_vec());
    assert!(invalid.contains("UTF-8"), "{invalid}");
}

#[test]
fn values_that_are_no_numbers_of_items_make_no_queue() {
    let body = "waiting{queue=\"a\"} NaN\nwaiting{queue=\"b\"} -5\nwaiting{queue=\"c\"} +Inf\nwaiting{queue=\"d\"} 1e300\n\
                waiting{queue=\"e\" 1\n";
    let server = Server::answering(ok(body));
    let asker = asker(vec![process(1, vec![server.endpoint()])]);
    let report = report_when(&asker, |report| report.endpoint.is_some());
    assert_eq!((report.queues, report.malformed), (1, 3));
    let answers = asker.take();
    let queues = answers[0].queues.as_ref().unwrap();
    assert_eq!(
        (queues[0].name.as_str(), queues[0].depth),
        ("q d", u64::MAX)
    );
}

#[test]
fn queues_beyond_the_limit_are_counted() {
    let body: String = (0..10_000)
        .map(|at| format!("waiting{{queue=\"{at}\"}} {at}\n"))
        .collect();
    let server = Server::answering(ok(&body));
    let asker = asker(vec![process(1, vec![server.endpoint()])]);
    let report = report_when(&asker, |report| report.endpoint.is_some());
    assert_eq!((report.queues, report.left_out), (256, 9_744));
}

#[test]
fn a_service_that_hangs_has_one_request_and_delays_no_other() {
    let hanging = Server::start(|mut stream| {
        read_request(&mut stream);
        thread::sleep(DEADLINE);
    });
    let healthy = Server::answering(ok("waiting{queue=\"a\"} 3\n"));
    let asker = asker(vec![
        process(1, vec![hanging.endpoint()]),
        process(2, vec![healthy.endpoint()]),
    ]);
    let report = report_when(&asker, |report| {
        report.tgid == 1 && report.failure.is_some()
    });
    assert!(report.failure.unwrap().contains("no answer within 200ms"));
    let mut answers = 0;
    let until = Instant::now() + DEADLINE;
    while answers < 3 && Instant::now() < until {
        answers += asker.take().len();
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(answers, 3);
    assert_eq!(hanging.connections(), 1);
}

#[test]
fn a_service_that_stops_answering_is_reported_as_such() {
    let asked = AtomicUsize::new(0);
    let server = Server::start(move |mut stream| {
        while read_request(&mut stream) {
            if asked.fetch_add(1, Ordering::Relaxed) > 0 {
                thread::sleep(DEADLINE);
            }
            let _ = stream.write_all(ok("waiting{queue=\"a\"} 3\n").as_bytes());
        }
    });
    let asker = asker(vec![process(1, vec![server.endpoint()])]);
    report_when(&asker, |report| report.endpoint.is_some());
    let report = report_when(&asker, |report| report.failure.is_some());
    assert!(report.endpoint.is_some());
    let answers = asker.take();
    assert!(answers[0].queues.is_some());
    assert!(answers.last().unwrap().queues.is_none());
}

#[test]
fn the_interval_grows_with_the_time_that_an_answer_takes() {
    let server = Server::start(|mut stream| {
        while read_request(&mut stream) {
            thread::sleep(Duration::from_millis(100));
            let _ = stream.write_all(ok("waiting{queue=\"a\"} 3\n").as_bytes());
        }
    });
    let asker = asker(vec![process(1, vec![server.endpoint()])]);
    let report = report_when(&asker, |report| report.endpoint.is_some());
    assert!(report.took >= Duration::from_millis(100));
    assert!(report.pace >= Duration::from_secs(5), "{report:?}");
}

#[test]
fn polling_is_suspended_after_three_failures() {
    let began = Instant::now();
    let (endpoint, _sockets) = silent();
    let asker = asker_with(vec![process(1, vec![endpoint])], QUICK);
    let report = report_when(&asker, |report| report.pace == QUICK.suspension);
    let failure = report.failure.unwrap();
    assert!(
        failure.contains("nothing listens") && failure.contains("next attempt in 60 min"),
        "{failure}"
    );
    // The interval of the preset has passed twice.
    assert!(began.elapsed() >= Duration::from_secs(1));
}

#[test]
fn queues_end_when_their_listener_is_replaced_by_one_that_does_not_answer() {
    let server = Server::answering(ok("waiting{queue=\"a\"} 3\n"));
    let (endpoint, _sockets) = silent();
    let unreachable = Process {
        unreachable: Some("elsewhere".to_owned()),
        ..process(1, Vec::new())
    };
    for replaced in [process(1, vec![endpoint]), unreachable] {
        let asker = asker_with(vec![process(1, vec![server.endpoint()])], QUICK);
        report_when(&asker, |report| report.endpoint.is_some());
        asker.set_processes(vec![replaced]);
        let until = Instant::now() + DEADLINE;
        let mut last = None;
        while last != Some(0) && Instant::now() < until {
            let answers = asker.take().into_iter();
            let mut counts = answers.filter_map(|answer| Some(answer.queues?.len()));
            last = counts.next_back().or(last);
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(last, Some(0));
    }
}

#[test]
fn no_other_request_follows_one_without_an_answer() {
    let hanging = Server::start(|mut stream| {
        read_request(&mut stream);
        thread::sleep(DEADLINE);
    });
    let mut two_paths = (*preset("shop")).clone();
    for ask in &mut two_paths.ask {
        if let Ask::Prometheus { paths, .. } = ask {
            paths.push("/other".to_owned());
        }
    }
    let of_server = Process {
        preset: Arc::new(two_paths),
        ..process(1, vec![hanging.endpoint()])
    };
    let once = Timing {
        retry: QUICK.suspension,
        ..QUICK
    };
    let asker = asker_with(vec![of_server], once);
    report_when(&asker, |report| report.pace == once.retry);
    thread::sleep(Duration::from_millis(100));
    assert_eq!(hanging.connections(), 1);
    let own = asker.own().all();
    assert!(own.len() == 1 && !own[0].is_accepted, "{own:?}");
}

#[test]
fn the_search_goes_on_at_the_next_listener() {
    let hanging = Server::start(|mut stream| {
        read_request(&mut stream);
        thread::sleep(DEADLINE);
    });
    let right = Server::answering(ok("waiting{queue=\"a\"} 3\n"));
    let endpoints = vec![hanging.endpoint(), right.endpoint()];
    // The next attempt follows after 50 times the time of this one.
    let brief = Timing {
        late: Duration::from_millis(1),
        ..QUICK
    };
    let asker = asker_with(vec![process(1, endpoints)], brief);
    let report = report_when(&asker, |report| report.endpoint.is_some());
    assert_eq!(report.endpoint, Some(right.address.to_string()));
    assert_eq!(hanging.connections(), 1);
}

#[test]
fn names_of_programs_are_escaped() {
    let server = Server::answering(ok("waiting{queue=\"a\"} 3\n"));
    let hostile = Process {
        program: Program::new("/tmp/envoy-\u{1b}[2K\u{7}", b""),
        ..process(1, vec![server.endpoint()])
    };
    let asker = asker(vec![hostile]);
    let report = report_when(&asker, |report| report.is_asked);
    assert!(report.exe.starts_with("envoy-"), "{}", report.exe);
    assert!(!report.exe.contains(char::is_control), "{:?}", report.exe);
}

#[test]
fn large_answers_share_one_budget_of_memory() {
    let servers: Vec<Server> = (0..16)
        .map(|_| {
            Server::start(|mut stream| {
                let _ = stream.read(&mut [0; 4096]);
                let _ = stream.write_all(b"$1000000\r\n");
                let _ = stream.write_all(&[b'x'; 900_000]);
                thread::sleep(DEADLINE);
            })
        })
        .collect();
    let processes = servers.iter().enumerate().map(|(at, server)| Process {
        preset: built_in("redis"),
        ..process(at as u32, vec![server.endpoint()])
    });
    let asker = asker(processes.collect());
    report_when(&asker, |report| {
        let failure = report.failure.as_ref();
        failure.is_some_and(|why| why.contains("too many large answers"))
    });
}

#[test]
fn the_first_listener_with_the_proof_is_kept() {
    let wrong = Server::answering(ok("other 1\n"));
    let right = Server::answering(ok("waiting{queue=\"a\"} 3\n"));
    let asker = asker(vec![process(1, vec![wrong.endpoint(), right.endpoint()])]);
    let report = report_when(&asker, |report| report.endpoint.is_some());
    assert_eq!(report.endpoint, Some(right.address.to_string()));
    asker.set_processes(Vec::new());
    let until = Instant::now() + DEADLINE;
    while !asker.reports().is_empty() && Instant::now() < until {
        thread::sleep(Duration::from_millis(5));
    }
    assert!(asker.reports().is_empty());
}

#[test]
fn a_port_that_another_process_has_taken_over_is_not_believed() {
    let is_other = Arc::new(AtomicBool::new(false));
    let switch = Arc::clone(&is_other);
    let server = Server::start(move |mut stream| {
        while read_request(&mut stream) {
            let body = match switch.load(Ordering::Relaxed) {
                true => "another_value 99\n",
                false => "waiting{queue=\"a\"} 3\n",
            };
            let _ = stream.write_all(ok(body).as_bytes());
        }
    });
    let asker = asker(vec![process(1, vec![server.endpoint()])]);
    report_when(&asker, |report| report.endpoint.is_some());
    is_other.store(true, Ordering::Relaxed);
    // The listener is the same for the kernel.
    let report = failed(&asker);
    assert!(report.failure.unwrap().contains("it is not shop"));
    assert!(asker.take().last().unwrap().queues.is_none());
    // It is another one: nothing of the old answers stays.
    let taken_over = Endpoint::Tcp {
        address: server.address,
        cookie: 2,
        pid: std::process::id(),
    };
    asker.set_processes(vec![process(1, vec![taken_over])]);
    report_when(&asker, |report| {
        report.failure.is_some() && report.endpoint.is_none()
    });
}

#[test]
fn own_connections_are_listed_while_they_are_open() {
    let server = Server::answering(ok("waiting{queue=\"a\"} 3\n"));
    let asker = asker(vec![process(1, vec![server.endpoint()])]);
    report_when(&asker, |report| report.endpoint.is_some());
    let own = asker.own().all();
    assert!(!own.is_empty());
    let is_to_it = |ends: Ends| matches!(ends, Ends::Tcp(_, service) if service == server.address);
    assert!(own.iter().all(|listed| is_to_it(listed.ends)));
    // It is in no accept queue any more.
    assert!(own[0].is_accepted);
}

#[test]
fn a_unix_socket_of_another_process_is_not_asked() {
    let directory = std::env::temp_dir().join(format!("tailback-asker-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join("shop.sock");
    let listener = UnixListener::bind(&path).unwrap();
    // The parent did not create it.
    let endpoint = Endpoint::Unix {
        path: path.to_str().unwrap().to_owned(),
        inode: 1,
        pid: std::os::unix::process::parent_id(),
    };
    let asker = asker(vec![process(1, vec![endpoint])]);
    let report = failed(&asker);
    let failure = report.failure.unwrap();
    assert!(failure.contains("belongs to process"), "{failure}");
    let (mut stream, _) = listener.accept().unwrap();
    let mut sent = Vec::new();
    stream.read_to_end(&mut sent).unwrap();
    assert!(sent.is_empty(), "{sent:?}");
    std::fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn a_listener_of_another_process_is_not_asked() {
    let bytes = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&bytes);
    let server = Server::start(move |mut stream| {
        let mut sent = Vec::new();
        let _ = stream.read_to_end(&mut sent);
        count.fetch_add(sent.len(), Ordering::Relaxed);
    });
    // The parent does not hold it: it has taken the place of one that the parent had. It is not even connected to.
    let endpoint = Endpoint::Tcp {
        address: server.address,
        cookie: 1,
        pid: std::os::unix::process::parent_id(),
    };
    let asker = asker(vec![process(1, vec![endpoint])]);
    let report = failed(&asker);
    let failure = report.failure.unwrap();
    assert!(
        failure.contains("belongs to a process other than"),
        "{failure}"
    );
    assert_eq!(
        (server.connections(), bytes.load(Ordering::Relaxed)),
        (0, 0)
    );
}

#[test]
fn an_optional_answer_that_is_too_large_is_left_out_from_then_on() {
    let large = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&large);
    let server = Server::start(move |mut stream| {
        while let Some(head) = request(&mut stream) {
            let answer = if head.starts_with("GET /large ") {
                count.fetch_add(1, Ordering::Relaxed);
                "HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n{".to_owned()
            } else {
                ok("waiting{queue=\"a\"} 3\n")
            };
            if stream.write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    });
    let text = "name = \"shop\"\nfind = { exe = [\"shopd\"] }\nproof = \"waiting\"\npace = \"500ms\"\n\
                ask = [{ protocol = \"prometheus\", paths = [\"/metrics\"] },\n\
                { protocol = \"json\", path = \"/large\", optional = true }]\n\
                queue = [{ name = \"q {queue}\", unit = \"jobs\", depth = \"waiting\" }]\n";
    let preset: Preset = toml::from_str(text).unwrap();
    let of_server = process(1, vec![server.endpoint()]);
    let asker = asker(vec![Process {
        preset: Arc::new(preset),
        ..of_server
    }]);
    let mut answers = 0;
    let until = Instant::now() + DEADLINE;
    while answers < 3 && Instant::now() < until {
        let new = asker.take();
        answers += new.iter().filter(|answer| answer.queues.is_some()).count();
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!((answers, large.load(Ordering::Relaxed)), (3, 1));
    let report = report_when(&asker, |report| report.missing.is_some());
    let missing = report.missing.unwrap();
    assert!(
        missing.contains("GET /large") && missing.contains("larger than"),
        "{missing}"
    );
    assert_eq!((report.queues, report.failure), (1, None));
}

/// A server of Redis that wants a password. Returns what it received.
fn redis_with_a_password(answer: &'static str) -> (Server, Arc<Mutex<Vec<u8>>>) {
    let received = Arc::new(Mutex::new(Vec::new()));
    let shared = Arc::clone(&received);
    let server = Server::start(move |mut stream| {
        let mut bytes = [0; 4096];
        while let Ok(len @ 1..) = stream.read(&mut bytes) {
            lock(&shared).extend(&bytes[..len]);
            if stream.write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    });
    (server, received)
}

fn built_in(name: &str) -> Arc<Preset> {
    let table = Table::new(&[], &[], &[]).unwrap();
    let mut presets = table.presets().iter();
    Arc::new(presets.find(|preset| preset.name == name).unwrap().clone())
}

fn redis_process(server: &Server, login: Option<u32>) -> Asker {
    with_login(built_in("redis"), server, login)
}

fn with_login(preset: Arc<Preset>, server: &Server, login: Option<u32>) -> Asker {
    let name = preset.name.clone();
    let of_preset = Process {
        preset,
        uid: Some(crate::app::users(std::process::id())[0]),
        ..process(1, vec![server.endpoint()])
    };
    let login = login.map(|process_user| {
        let file =
            std::env::temp_dir().join(format!("tailback-password-{name}-{}", std::process::id()));
        std::fs::write(&file, "secret\n").unwrap();
        let login = Login {
            process_user,
            user: None,
            password_file: file,
        };
        (name, login)
    });
    let asker = Asker::start(login.into_iter().collect(), || 7).unwrap();
    asker.set_processes(vec![of_preset]);
    asker
}

#[test]
fn a_refused_password_is_sent_once() {
    let (server, received) = redis_with_a_password("-WRONGPASS invalid username-password pair\r\n");
    let asker = redis_process(&server, Some(crate::app::users(std::process::id())[0]));
    let report = failed(&asker);
    let failure = report.failure.unwrap();
    assert!(failure.contains("login as default: WRONGPASS"), "{failure}");
    assert!(report.pace >= Duration::from_mins(10), "{:?}", report.pace);
    let received = String::from_utf8(lock(&received).clone()).unwrap();
    assert_eq!(received.matches("secret").count(), 1);
}

#[test]
fn a_password_is_for_the_processes_of_its_user_only() {
    let (server, received) = redis_with_a_password("-NOAUTH Authentication required.\r\n");
    let asker = redis_process(&server, Some(4_000_000));
    let report = failed(&asker);
    assert!(report.failure.unwrap().contains("it requires a password"));
    let received = String::from_utf8(lock(&received).clone()).unwrap();
    assert!(!received.contains("secret"), "{received}");
}

/// A message of PostgreSQL's protocol that asks for a password.
fn authentication(method: u32, data: &str) -> Vec<u8> {
    let mut message = vec![b'R'];
    message.extend((8 + data.len() as u32).to_be_bytes());
    message.extend(method.to_be_bytes());
    message.extend(data.bytes());
    message
}

/// How a login ends if the server sends these after it has begun SCRAM; NONCE stands for the agent's nonce.
fn after_scram(messages: &'static [(u32, &'static str)]) -> (String, String) {
    let received = Arc::new(Mutex::new(String::new()));
    let shared = Arc::clone(&received);
    let server = Server::start(move |mut stream| {
        let mut bytes = [0; 4096];
        let _ = stream.read(&mut bytes);
        let _ = stream.write_all(&authentication(10, "SCRAM-SHA-256\0\0"));
        let len = stream.read(&mut bytes).unwrap_or(0);
        let first = String::from_utf8_lossy(&bytes[..len]).into_owned();
        let nonce = first.rsplit("r=").next().unwrap_or_default();
        for (method, data) in messages {
            let data = data.replace("NONCE", nonce);
            let _ = stream.write_all(&authentication(*method, &data));
        }
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        lock(&shared).push_str(&String::from_utf8_lossy(&rest));
    });
    let own_user = crate::app::users(std::process::id())[0];
    let asker = with_login(built_in("pgbouncer"), &server, Some(own_user));
    let failure = failed(&asker).failure.unwrap();
    let until = Instant::now() + DEADLINE;
    while server.open() > 0 && Instant::now() < until {
        thread::sleep(Duration::from_millis(5));
    }
    (failure, lock(&received).clone())
}

#[test]
fn scram_is_done_once_and_no_plain_password_is_sent_within_it() {
    const SECOND: (u32, &str) = (11, "r=NONCEx,s=c2FsdA==,i=4096");
    let (failure, _) = after_scram(&[SECOND, SECOND]);
    assert!(failure.contains("repeats a message"), "{failure}");
    let (failure, _) = after_scram(&[(10, "SCRAM-SHA-256\0\0")]);
    assert!(failure.contains("begins SCRAM twice"), "{failure}");
    let (failure, received) = after_scram(&[(3, "")]);
    assert!(failure.contains("within SCRAM"), "{failure}");
    assert!(!received.contains("secret"), "{received}");
}
